"""Files that are whole or not there, and JSON that every parser reads."""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InvalidArgumentError


@contextmanager
def written_beside(path: Path, argument: str, expected: str = "a file that can be written") -> Iterator[Path]:
    """A new file to write to, which takes the place of ``path`` when the block ends, and is removed when it fails.

    So an earlier file is there until the new one is whole. The new one has its mode; a link stays one. What is no plain
    file, e.g. ``/dev/stdout``, is written to as it is.

    Parameters
    ----------
    path
        Where the result goes.
    argument, expected
        Whose value ``path`` is and what it should be, for the error.

    Raises
    ------
    InvalidArgumentError
        The file cannot be written.
    """
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            yield target
            return
        partial = target.with_name(f".{secrets.token_hex(8)}.partial")  # as short as a name may have to be
        try:
            partial.touch(exist_ok=False)
            mode = (target if target.exists() else partial).stat().st_mode
            yield partial
            partial.chmod(stat.S_IMODE(mode))  # whoever wrote it may have made it anew
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidArgumentError(argument, expected, f"{path} ({reason})") from error


def write_text(path: Path, text: str, argument: str) -> None:
    """Write a text file in UTF-8, as a whole.

    Raises
    ------
    InvalidArgumentError
        The file cannot be written.
    """
    with written_beside(path, argument) as partial:
        partial.write_text(text, encoding="utf-8")


class Writing:
    """Files that are written while there is more to do: what fails is kept for the end, and costs nothing else."""

    def __init__(self) -> None:
        self._failures: dict[str, InvalidArgumentError] = {}

    @property
    def failures(self) -> list[InvalidArgumentError]:
        """Why files are not written, whose last attempt failed."""
        return list(self._failures.values())

    def attempt(self, argument: str, write: Callable[[], object]) -> None:
        """Write the file of an argument."""
        self._failures.pop(argument, None)
        try:
            write()
        except InvalidArgumentError as error:
            self._failures[argument] = error


def check_folder(path: Path, argument: str) -> None:
    """Refuse a path in a folder that is not there, before a run rather than after it.

    Raises
    ------
    InvalidArgumentError
        There is no such folder, or it cannot be looked at.
    """
    if not os.path.isdir(path.absolute().parent):  # where it cannot be looked at, Path.is_dir raises
        raise InvalidArgumentError(argument, "a path in a folder that exists", str(path))


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON of plain values; a number that is none, or infinite, is null: JSON has no word for it."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
