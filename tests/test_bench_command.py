"""``cupy-mla bench`` on the NumPy backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from cupy_mla.bench import (
    Results,
    grid,
    load_results,
    run,
)
from cupy_mla.cli import main
from cupy_mla.commands import bench as command
from cupy_mla.errors import install_command
from cupy_mla.lab import accuracy
from cupy_mla.lab.spec import STORAGES


def bench(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["bench", "--backend", "numpy", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


TINY = ("--batch", "1", "--length", "64,100", "--heads", "2")


def test_bench_runs_its_default_grid_on_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    result = bench("--json", str(path))
    assert result.exit_code == 0
    rows = load_results(path).rows
    assert len(rows) == len(grid.CPU_BATCHES) * len(grid.CPU_LENGTHS) * len(grid.CPU_HEADS)
    for row in rows:
        assert row.name in result.output


def test_bench_takes_lists_and_writes_files(tmp_path: Path) -> None:
    first, second, table = tmp_path / "1.json", tmp_path / "2.json", tmp_path / "2.csv"
    arguments = (*TINY, "--storage", "packed,split", "--storage", "strided", "--dtype", "float16", "--causal")
    assert bench(*arguments, "--json", str(first)).exit_code == 0
    result = bench(*arguments, "--json", str(second), "--csv", str(table), "--compare", str(first), "--sustained")
    assert result.exit_code == 0
    results = load_results(second)
    assert {row.case.storage for row in results.rows} == set(STORAGES)
    assert results.metadata["command"].startswith("cupy-mla bench --batch 1 --length 64,100 --heads 2 --dtype float16")
    assert all(row.ours.sustained_us for row in results.rows)
    assert "our time, before (20" in result.output
    assert "The earlier run" not in result.output
    elsewhere = json.loads(first.read_text())
    elsewhere["metadata"]["device"] = "another computer"
    first.write_text(json.dumps(elsewhere))
    assert "The earlier run was on another computer with numpy" in bench(*TINY, "--compare", str(first)).output
    assert len(table.read_text().splitlines()) == 1 + len(results.rows)


def test_bench_takes_the_earlier_name_of_storage(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    arguments = ("--batch", "1", "--length", "64", "--heads", "2", "--layout", "split", "--storage", "split,packed")
    assert bench(*arguments, "--json", str(path)).exit_code == 0
    assert [row.case.storage for row in load_results(path).rows] == ["split", "packed"]
    shown = " ".join(bench("--help").output.split())
    assert "--layout LAYOUT[,...] Layout of the cache: bf16, fp16, fp8_e4m3" in shown


def test_bench_times_what_is_named_twice_once(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert (
        bench("--batch", "1,1", "--batch", "1", "--length", "64,64", "--heads", "2", "--json", str(path)).exit_code == 0
    )
    assert [row.name for row in load_results(path).rows] == ["b1_k64_h2_q1"]


def test_bench_takes_presets_and_traces(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert bench("--batch", "1", "--tp", "64,128", "--trace", "2", "--json", str(path)).exit_code == 0
    assert [row.name for row in load_results(path).rows] == [
        "b1_trace0_h2_q1",
        "b1_trace0_h1_q1",
        "b1_trace1_h2_q1",
        "b1_trace1_h1_q1",
    ]


def test_bench_exits_with_1_when_ours_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(accuracy.OUT_BOUNDS, "bfloat16", 1e-9)
    result = bench(*TINY)
    assert result.exit_code == 1
    assert "relative error" in result.output


def test_bench_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def write_plots(results: Results, folder: Path) -> list[Path]:
        assert len(results.rows) == 2
        return [folder / "roofline.png"]

    monkeypatch.setitem(sys.modules, "cupy_mla.bench.plots", SimpleNamespace(write_plots=write_plots))
    monkeypatch.setattr("cupy_mla.shown.drawing.make_figure", lambda width, height: None)  # as if matplotlib was there
    result = bench(*TINY, "--plot", str(tmp_path))
    assert result.exit_code == 0
    assert f"wrote {tmp_path / 'roofline.png'}" in result.output


def test_bench_without_matplotlib_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = bench(*TINY, "--plot", str(tmp_path / "pictures"), "--json", str(tmp_path / "results.json"))
    assert result.exit_code == 3
    assert f"drawing pictures needs matplotlib: {install_command('plot')}" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], ["--batch"]),
        (["--batch", "1,x"], ["--batch", "x"]),
        (["--storage", "scattered"], ["--storage"]),
        (["--layout", "scattered"], ["--layout"]),
        (["--heads", "4", "--tp", "2"], ["--heads", "--preset or --tp"]),
        (["--tp", "3"], ["--tp: ", "divisor of the 128 heads"]),
        (["--split", "100", *TINY], ["--split: ", "multiple of 64"]),
        (["--peer", "flashy", *TINY], ["--peer: ", "flashy"]),
        (["--compare", "nowhere.json"], ["--compare: ", "nowhere.json"]),
        (["--json", "no/such/folder/results.json"], ["--json: ", "folder that exists"]),
        (["--limit", "0"], ["--limit"]),
        (["--peers-path", "nowhere"], ["--peers-path: ", "folder"]),
        (["--json", "."], ["--json", "is a directory"]),
        (["--csv", "."], ["--csv", "is a directory"]),
        (["--batch", "5000", "--trace", "1"], ["--batch: ", "1 to 1024"]),
    ],
)
def test_bench_names_the_wrong_argument(arguments: list[str], words: list[str]) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("Error: ")
    for word in words:
        assert word in message


def test_a_file_that_cannot_be_written_costs_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the other cases nor the report nor the other files."""
    earlier, table = tmp_path / "results.json", tmp_path / "results.csv"
    earlier.write_text("earlier")
    replace = os.replace

    def no_room(source: Path, target: Path) -> None:
        if target == earlier:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", no_room)
    result = bench(*TINY, "--json", str(earlier), "--csv", str(table))
    assert result.exit_code == 2
    assert "--json: expected a file that can be written" in result.stderr.splitlines()[-1]
    assert "b1_k64_h2_q1" in result.stdout
    assert "b1_k100_h2_q1" in result.stdout
    assert len(table.read_text().splitlines()) == 3
    assert earlier.read_text() == "earlier"


def test_a_folder_for_pictures_that_cannot_be_is_refused_before_the_run(tmp_path: Path) -> None:
    result = bench(*TINY, "--plot", str(tmp_path / ("x" * 300)))
    assert result.exit_code == 2
    assert "--plot: expected a folder that can be made" in result.stderr
    assert "b1_k64" not in result.stdout


def test_bench_does_not_run_when_the_earlier_results_cannot_be_compared(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    assert bench(*TINY, "--json", str(old)).exit_code == 0
    values = json.loads(old.read_text())
    values["rows"][0]["ours"]["us"] = 0
    old.write_text(json.dumps(values))
    result = bench(*TINY, "--compare", str(old), "--json", str(new))
    assert result.exit_code == 2
    assert "--compare: " in result.stderr
    assert "us is 0 in b1_k64_h2_q1" in result.stderr
    assert not new.exists()


def test_the_command_line_starts_without_the_benchmark_and_has_its_choices() -> None:
    assert command.STORAGES is grid.STORAGES
    assert command.DEFAULT_LIMIT_SECONDS == run.DEFAULT_LIMIT_SECONDS
    script = "import sys, cupy_mla.cli; sys.exit('cupy_mla.bench' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
