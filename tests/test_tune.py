"""The suites of scripts/tune.py and how they are judged, without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cupy_mla.bench import (
    BenchCase,
    Measurement,
    Results,
    Row,
    load_results,
)
from cupy_mla.gpu import device

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def suites(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import tune_suites

    return tune_suites


def cases_of(suites: Any, name: str) -> list[BenchCase]:
    return [
        case
        for group in suites.SUITES[name].groups()
        for case in ([group] if isinstance(group, BenchCase) else list(group))
    ]


def columns_of(suites: Any, name: str, results: Results) -> dict[str, list[str]]:
    return {column.title: [column.text(row) for row in results.rows] for column in suites.SUITES[name].columns(results)}


def test_targets_are_judged_by_the_fastest_peer_or_the_figure_on_file(suites: Any) -> None:
    cases = cases_of(suites, "targets")
    assert len(cases) == 20
    peers = {"flash_mla": Measurement(us=300.0), "fa3": Measurement(us=250.0)}
    rows = [Row(cases[0], ours=Measurement(us=200.0), peers=peers), Row(cases[1], ours=Measurement(us=290.5))]
    columns = columns_of(suites, "targets", Results({}, None, rows))
    assert columns["fastest peer"] == ["fa3", "(on file)"]
    assert columns["ratio to fastest"] == ["1.250", "1.000"]
    assert columns["met"] == ["yes", "NO"]


def test_traces_are_judged_by_throughput(suites: Any) -> None:
    cases = cases_of(suites, "traces")
    assert len(cases) == 2 * suites.TRACE_DRAWS * len(suites.TRACE_HEADS)
    trace, equal = cases[:2]
    assert equal.kv_lengths.sum() == pytest.approx(trace.kv_lengths.sum(), rel=1e-3)
    for us, verdict in ((100.0, "yes"), (110.0, "NO")):
        peers = {"flash_mla": Measurement(us=150.0)}
        rows = [Row(trace, ours=Measurement(us=us), peers=peers), Row(equal, ours=Measurement(us=99.0))]
        assert columns_of(suites, "traces", Results({}, None, rows))["met"] == [verdict, "-"]


def test_variants_are_judged_by_the_plain_case_of_their_group(suites: Any) -> None:
    groups = suites.SUITES["parity"].groups()
    rows = [Row(case, ours=Measurement(us=100.0 + number)) for number, group in enumerate(groups) for case in group]
    columns = columns_of(suites, "parity", Results({}, None, rows))
    judged = [text for text in columns["times plain"] if text != "-"]
    assert len(judged) == sum(len(group) for group in suites.parity_variants())
    assert set(judged) == {"1.000"}  # the same plain case has other times in other groups
    for variants in suites.parity_variants():
        for variant in variants:
            if variant.limit == suites.VARIANT_LIMIT and not variant.case.causal:
                assert variant.case.work == variant.plain.work
    plain, slow = rows[0], next(row for row in rows if row.case.dtype == "float16")
    slow.ours.us = 1.03 * plain.ours.us
    assert columns_of(suites, "parity", Results({}, None, rows))["met"].count("NO") == 1


def test_an_e4m3_cache_is_to_be_faster_where_memory_decides(suites: Any) -> None:
    variants = [variant for group in suites.fp8_parity_variants() for variant in group]
    assert {variant.case.layout for variant in variants} == {"fp8_e4m3"}
    assert {variant.plain.layout for variant in variants} == {None}
    shape = {
        (variant.plain.batch, int(variant.plain.kv_lengths[0]), variant.plain.num_heads_q): variant.limit
        for variant in variants
    }
    assert shape[1, 64, 16] == shape[64, 128, 16] == shape[64, 4096, 128] == suites.VARIANT_LIMIT
    assert shape[64, 256, 8] == shape[64, 4096, 64] == suites.FASTER_LIMIT == 1.0
    rows = [
        Row(case, ours=Measurement(us=us))
        for variant in variants[:2]
        for case, us in ((variant.plain, 100.0), (variant.case, 106.0))
    ]
    rows[-1].ours.us = 104.0
    columns = columns_of(suites, "fp8_parity", Results({}, None, rows))
    assert columns["times plain"] == ["-", "1.060", "-", "1.040"]
    assert columns["met"] == ["-", "NO", "-", "yes"]


def test_the_scaling_curve_leaves_out_what_does_not_fit(suites: Any) -> None:
    cases = cases_of(suites, "scaling")
    longest = {batch: max(int(case.kv_lengths[0]) for case in cases if case.batch == batch) for batch in (1, 8, 64)}
    assert longest == {1: 1 << 20, 8: 1 << 20, 64: 1 << 18}
    assert {case.batch for case in cases} == {1, 8, 64}
    assert min(int(case.kv_lengths[0]) for case in cases) == 64


def test_tune_measures_saves_and_prints_again(tmp_path: Path) -> None:
    def tune(*arguments: str) -> str:
        command = [sys.executable, str(SCRIPTS / "tune.py"), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    folder = str(tmp_path / "new" / "folder")
    selection = ("scaling", "--cases", "b1_k128_h16")
    output = tune(*selection, "--backend", "numpy", "--peer", "", "--save", folder)
    assert "scaling 1/1 b1_k128_h16_q1" in output
    assert "scaling: 1 cases, 0 failed" in output
    saved = Path(folder, "tune_scaling.json")
    assert load_results(saved).metadata["command"] == "scripts/tune.py scaling"
    assert "\nb1_k128_h16_q1,cupy-mla," in saved.with_suffix(".csv").read_text(encoding="utf-8")
    assert "b1_k128_h16_q1" in tune("scaling", "--load", folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--peer", "flashy", "--backend", "numpy"], "--peer: expected one of flash_mla"),
        (["--load", "nowhere"], "--load: expected a file that can be read"),
        (["--cases", "zzz", "--peer", "", "--backend", "numpy"], "no case has 'zzz' in its name"),
    ],
)
def test_tune_names_the_wrong_argument(arguments: list[str], words: str) -> None:
    command = [sys.executable, str(SCRIPTS / "tune.py"), "scaling", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("name", "count", "function"),
    [("fp8", 22, "decode"), ("sparse", 37, "sparse decode"), ("prefill", 11, "sparse prefill")],
)
def test_times_are_judged_by_those_on_file(suites: Any, name: str, count: int, function: str) -> None:
    cases = cases_of(suites, name)
    assert len(set(cases)) == len({case.name for case in cases}) == count
    assert {case.function for case in cases} == {function}
    wanted = suites.read_time_targets(name)[cases[0]][1]
    rows = [Row(cases[0], ours=Measurement(us=wanted * factor)) for factor in (0.99, 1.01)]
    assert columns_of(suites, name, Results({}, None, rows))["met"] == ["yes", "NO"]


@pytest.mark.skipif(device.why_unsupported() is None, reason="there is a Hopper GPU")
def test_without_a_gpu_tune_says_what_it_would_time() -> None:
    command = [sys.executable, str(SCRIPTS / "tune.py"), "targets", "parity"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 3
    assert result.stdout.splitlines()[0] == "targets: 20 cases, b128_k8192_h16_q1 to b1_k131072_h128_q1"
    assert "timed on a Hopper GPU: " in result.stderr
    assert "Traceback" not in result.stderr
