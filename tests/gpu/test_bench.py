"""The benchmark on the GPU: every storage is timed and right, a wrong result is seen. No time decides a test."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from cupy_mla.bench import BenchCase, measure_ceilings, run_bench
from cupy_mla.bench import measure as protocol
from cupy_mla.bench.inputs import Inputs, choose_library
from cupy_mla.bench.measure import measure
from cupy_mla.bench.ours import OurSide
from cupy_mla.lab.libraries import CUPY, ArrayLibrary
from cupy_mla.lab.spec import STORAGES

pytestmark = pytest.mark.timeout(60)

CASES = (
    *(BenchCase(3, (300, 0, 70), 16, storage=storage) for storage in STORAGES),
    BenchCase(2, 200, 12, seqlen_q=2, causal=True, dtype="float16"),
    BenchCase(2, 200, 16, ragged=(1, 3), causal=True),
    BenchCase(2, 300, 16, fixed_split_tokens=64),
    BenchCase(2, 300, 16, layout="fp8_e4m3"),
    BenchCase(2, 300, 16, seqlen_q=2, topk=100),
    BenchCase(1, 300, 16, seqlen_q=5, topk=100, prefill=True),
)


@pytest.fixture(autouse=True)
def _short_sustained_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SUSTAINED_SECONDS", 0.02)


def test_a_run_times_every_kind_of_case() -> None:
    results = run_bench([CASES[0], CASES[1:]], backend="cuda", sustained=True)
    assert [row.case for row in results.rows] == list(CASES)
    for row in results.rows:
        assert row.failure is None, f"{row.name}: {row.failure}"
        assert row.calls >= 64
        assert row.copies > 1
        for value in (row.ours.us, row.ours.sustained_us, row.ours.error):
            assert value is not None
            assert 0 < value < math.inf
    assert results.ceilings is not None
    assert results.metadata["device"].startswith("NVIDIA")


def test_cupy_arrays_are_timed_without_torch() -> None:
    for row in measure([*CASES[:4], *CASES[-3:]], [OurSide()], CUPY, sustained=True):
        assert row.failure is None, f"{row.name}: {row.failure}"
        assert row.ours.us is not None
        assert row.ours.sustained_us is not None


@pytest.mark.parametrize("make", [lambda: choose_library("cuda"), lambda: CUPY], ids=["chosen", "cupy"])
def test_a_wrong_result_is_seen(make: Callable[[], ArrayLibrary]) -> None:
    library = make()
    inputs = Inputs(CASES[0], library)
    out, lse = OurSide().prepare(inputs)(inputs.caches[-1])
    error, lse_error = inputs.errors(out, lse)
    assert error < 3e-3
    assert lse_error < 1e-5
    library.assign(out[:1], out[2:])  # the longest request gets another's result
    assert inputs.errors(out, lse)[0] > 0.1


def test_ceilings_are_measured() -> None:
    ceilings = measure_ceilings()
    assert ceilings.source == "measured"
    assert ceilings.read_gigabytes_per_second > 0
    assert ceilings.tflops > 0
    assert ceilings.sustained_tflops is not None
    assert ceilings.sustained_tflops > 0
