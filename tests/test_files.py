"""Files are whole or as they were, and JSON is JSON."""

from __future__ import annotations

import json
import math
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupy_mla.bench import BenchCase, Measurement, Results, Row
from cupy_mla.errors import InvalidArgumentError
from cupy_mla.lab.array_files import write_arrays
from cupy_mla.lab.files import Writing, check_folder, to_json, write_text, written_beside

ROOM = 32  # bytes
RESULTS = Results({"device": "none"}, None, [Row(BenchCase(1, 64, 4), Measurement(us=1.0))])
WRITERS: dict[str, Callable[[Path], object]] = {
    "new.npz": lambda path: write_arrays(path, {"out": np.zeros(3)}),
    "new.safetensors": lambda path: write_arrays(path, {"out": np.zeros(3)}),
    "new.json": RESULTS.write_json,
    "new.csv": RESULTS.write_csv,
    "new.txt": lambda path: write_text(path, "new" * ROOM, "text"),
}


@contextmanager
def no_room() -> Iterator[None]:
    """No file may become longer than a few bytes, as on a disk that is nearly full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_written_whole(name: str, tmp_path: Path) -> None:
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    path = tmp_path / name
    path.write_bytes(b"earlier")
    path.chmod(0o640)
    WRITERS[name](path)
    assert path.read_bytes() != b"earlier"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_earlier_file(name: str, tmp_path: Path) -> None:
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    path = tmp_path / name
    path.write_bytes(b"earlier")

    with no_room(), pytest.raises(InvalidArgumentError, match=r"can be written, got .*new.* \(.*File too large"):
        WRITERS[name](path)
    assert path.read_bytes() == b"earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_what_was_begun_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_text("earlier")

    def interrupted() -> None:
        with written_beside(path, "save") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "earlier"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(Path("far", "result"))
    write_text(tmp_path / "link", "one", "save")
    write_text(tmp_path / "link", "two", "save")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "result").read_text() == "two"
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(InvalidArgumentError, match="save: expected a file that can be written"):
        write_text(tmp_path / "circle" / "result", "one", "save")


def test_a_device_is_written_to_as_it_is() -> None:
    write_text(Path(os.devnull), "text", "json")
    assert not Path(os.devnull).is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_device_without_space_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match=r"json: .*/dev/full \(No space left on device\)"):
        write_text(Path("/dev/full"), "text", "json")


@pytest.mark.parametrize("name", ["x" * 300, "no/folder/result"])
def test_a_place_that_cannot_be_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="save: expected a file that can be written"):
        write_text(tmp_path / name, "text", "save")


def test_a_long_name_may_be_the_longest(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write_text(path, "text", "save")
    assert path.read_text() == "text"


def test_folders_are_looked_for_without_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_folder(tmp_path / "result", "save")
    monkeypatch.chdir(tmp_path)
    check_folder(Path("result"), "save")
    for name in ("no/folder", "x" * 300 + "/result"):
        with pytest.raises(InvalidArgumentError, match="save: expected a path in a folder that exists"):
            check_folder(tmp_path / name, "save")

    def forbidden(*_: object, **__: object) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", forbidden)
    with pytest.raises(InvalidArgumentError, match="save: expected a path in a folder that exists"):
        check_folder(tmp_path / "result", "save")


def test_failures_are_kept_until_the_end() -> None:
    def fail() -> None:
        raise InvalidArgumentError("json", "space", "none")

    writing = Writing()
    for argument, write in (("json", fail), ("csv", fail), ("json", print), ("plot", print)):
        writing.attempt(argument, write)
    assert len(writing.failures) == 1
    with pytest.raises(ZeroDivisionError):  # whatever else goes wrong is no matter of files
        writing.attempt("plot", lambda: 1 / 0)


def test_numbers_that_json_has_not_are_null() -> None:
    value = {"a": [math.nan, math.inf, (-math.inf, 1.5)], "b": {"c": np.float64("nan"), "d": np.float64(2)}, "e": "nan"}
    text = to_json(value, indent=1)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads(text, parse_constant=refuse)
    assert found == {"a": [None, None, [None, 1.5]], "b": {"c": None, "d": 2.0}, "e": "nan"}


def test_results_with_an_error_that_is_no_number_can_be_read_again(tmp_path: Path) -> None:
    from cupy_mla.bench import load_results

    metadata = {"device": "none", "backend": "numpy", "date": "2030-01-01"}
    row = Row(BenchCase(1, 64, 4), Measurement(us=1.0, error=math.nan, failure="relative error nan, bound 3e-03"))
    path = tmp_path / "results.json"
    Results(metadata, None, [row]).write_json(path)
    assert "NaN" not in path.read_text()
    (loaded,) = load_results(path).rows
    assert loaded.ours == Measurement(us=1.0, error=None, failure=row.failure)


@pytest.mark.parametrize("name", WRITERS)
def test_a_new_file_has_the_usual_mode(name: str, tmp_path: Path) -> None:
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    (tmp_path / "plain").touch()
    WRITERS[name](tmp_path / name)
    assert len({stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}) == 1
