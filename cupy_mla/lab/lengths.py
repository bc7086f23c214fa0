"""Request lengths: from a CSV file, the sample that ships with the package, and a draw of requests in mid-decode."""

from __future__ import annotations

import csv
import math
import re
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..call.problem import MAX_TOKENS
from ..errors import InvalidArgumentError

IntArray = npt.NDArray[np.int64]

_CONTEXT, _GENERATED = "context_tokens", "generated_tokens"
_NO_LETTERS = re.compile(r"[\W_]")
_SHIPPED = "azure_llm_2023_conv_lengths.csv"


def shipped_lengths() -> Path:
    """The file of real request lengths in the package (see data/README.md for where it comes from)."""
    return Path(str(resources.files(__package__.partition(".")[0]).joinpath("data", _SHIPPED)))


def read_lengths(path: Path) -> IntArray:
    """Read a table of request lengths.

    Parameters
    ----------
    path
        CSV with a header line that has ``context_tokens`` and, if known, ``generated_tokens`` (0 without it). Case,
        blanks and underscores in these names do not matter (the published trace has ContextTokens); other columns are
        not read.

    Returns
    -------
    [requests, 2] int64: context tokens, generated tokens.

    Raises
    ------
    InvalidArgumentError
        The file cannot be read, has no such column or two of them, has no rows, or a value (named by its line) is not a
        whole number, makes a request longer than there can be or belongs to no column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = list(reader.fieldnames or [])
            context, generated = _find(columns, _CONTEXT), _find(columns, _GENERATED)
            if context is None:
                raise InvalidArgumentError("lengths", f"a header with the column {_CONTEXT}", f"{columns}")
            rows = []
            for row in reader:
                if any(row.get(None) or ()):
                    expected = f"{len(columns)} values, one a column"
                    raise InvalidArgumentError("lengths", expected, f"more in line {reader.line_num}")
                tokens = _whole_number(row[context], reader.line_num, MAX_TOKENS)
                answer = _whole_number(row[generated], reader.line_num, MAX_TOKENS - tokens) if generated else 0
                rows.append((tokens, answer))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidArgumentError("lengths", "a readable CSV file", f"{path} ({error})") from error
    if not rows:
        raise InvalidArgumentError("lengths", "at least one request", f"none in {path}")
    return np.array(rows, dtype=np.int64)


def _find(columns: list[str], name: str) -> str | None:
    """The column of this name, however it is written."""
    found = [column for column in columns if _letters(column) == _letters(name)]
    if len(found) > 1:
        raise InvalidArgumentError("lengths", f"one column {name}", f"{found}")
    return found[0] if found else None


def _letters(name: str) -> str:
    return _NO_LETTERS.sub("", name).lower()


def _whole_number(text: str | None, line: int, most: int) -> int:
    digits = (text or "").strip()
    number = float(digits) if digits.isdecimal() else math.nan  # int() has an error of its own for thousands of digits
    if not number <= most:
        raise InvalidArgumentError("lengths", f"a whole number of tokens up to {most}", f"{text!r} in line {line}")
    return int(number)


def mid_decode_lengths(requests: IntArray, batch: int, seed: int) -> IntArray:
    """Lengths of the KV caches of a batch of requests, each caught somewhere in its answer.

    Parameters
    ----------
    requests
        [requests, 2]: context tokens, generated tokens.
    batch
        How many different requests to draw.
    seed
        Chooses the requests and how far each one is: context + uniform(0 .. generated).

    Returns
    -------
    [batch] int64, in tokens.

    Raises
    ------
    InvalidArgumentError
        ``batch`` is below one or above the number of requests.
    """
    if not 1 <= batch <= len(requests):
        raise InvalidArgumentError("batch", f"1 to {len(requests)} (the requests in the file)", str(batch))
    rng = np.random.default_rng(seed)
    drawn = requests[rng.choice(len(requests), size=batch, replace=False)]
    lengths: IntArray = drawn[:, 0] + rng.integers(0, drawn[:, 1], endpoint=True)
    return lengths
