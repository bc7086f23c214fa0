"""The benchmark without a GPU: grids, inputs, the protocol with fake timers, results."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cupy_mla import bench as package
from cupy_mla.bench import (
    BenchCase,
    Ceilings,
    Measurement,
    Results,
    Row,
    compare,
    expand_grid,
    load_results,
    measure,
    run,
    run_bench,
)
from cupy_mla.bench import inputs as inputs_module
from cupy_mla.bench.ceilings import published_ceilings
from cupy_mla.bench.inputs import Inputs
from cupy_mla.bench.ours import OurSide
from cupy_mla.errors import InvalidArgumentError, UnsupportedDeviceError
from cupy_mla.gpu import device
from cupy_mla.lab import accuracy, timing
from cupy_mla.lab.build import build_case
from cupy_mla.lab.lengths import mid_decode_lengths, read_lengths, shipped_lengths
from cupy_mla.lab.libraries import NUMPY, NumpyLibrary, TorchLibrary
from cupy_mla.lab.spec import STORAGES, CaseSpec
from cupy_mla.lab.work import Work

SMALL = BenchCase(2, 70, 4)


# --- cases and grids


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "b2_k70_h4_q1"),
        ({"dtype": "float16", "page_size": 16, "storage": "split"}, "b2_k70_h4_q1_fp16_p16_split"),
        ({"lengths": (10, 21)}, "b2_mean16_h4_q1"),
        ({"ragged": (1, 3), "causal": True}, "b2_k70_h4_q3_causal_ragged"),
        ({"fixed_split_tokens": 128, "latent_dim": 256}, "b2_k70_h4_q1_d256+64_cut128"),
    ],
)
def test_a_case_is_named_by_what_it_is(options: dict[str, Any], name: str) -> None:
    assert BenchCase(**{"batch": 2, "lengths": 70, "num_heads_q": 4, **options}).name == name


def test_equal_work_is_equal_whatever_its_name() -> None:
    assert BenchCase(2, 70, 4, name="mine") == SMALL
    assert BenchCase(2, 70, 4, seqlen_q=2) != SMALL


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seqlen_q": 3, "causal": True},
        {"ragged": (0, 3, 1), "causal": True},
        {"lengths": (5, 0, 200), "page_size": 16},
    ],
)
def test_work_is_that_of_the_case_that_is_decoded(options: dict[str, Any]) -> None:
    case = BenchCase(**{"batch": 3, "lengths": 70, "num_heads_q": 4, **options})
    seqlens_q = case.seqlen_q if case.ragged is None else case.ragged
    lengths = tuple(case.kv_lengths.tolist())
    spec = CaseSpec(lengths, 4, seqlens_q=seqlens_q, page_size=case.page_size, causal=case.causal)
    assert case.spec == spec
    decoded = build_case(spec)
    assert case.work == decoded.work
    assert spec.q_shape == decoded.q.shape
    assert spec.cache_shape == decoded.kv_cache.shape
    assert case.cache_bytes == decoded.kv_cache.nbytes


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"batch": 0}, "batch"),
        ({"seqlen_q": 0}, "seqlen_q"),
        ({"dtype": "float32"}, "dtype"),
        ({"storage": "scattered"}, "storage"),
        ({"lengths": (1, 2, 3)}, "lengths"),
        ({"lengths": -1}, "lengths"),
        ({"lengths": 2**31}, "lengths"),
        ({"lengths": (1, 2**70)}, "lengths"),
        ({"lengths": 70.0}, "lengths"),
        ({"lengths": "70"}, "lengths"),
        ({"lengths": np.array([1.5, 2.0])}, "lengths"),
        ({"batch": 1.5}, "batch"),
        ({"batch": np.float64(2)}, "batch"),
        ({"batch": True}, "batch"),
        ({"latent_dim": 512.0}, "latent_dim"),
        ({"causal": "no"}, "causal"),
        ({"ragged": 2}, "ragged"),
        ({"fixed_split_tokens": 64.0}, "fixed_split_tokens"),
        ({"ragged": (1,)}, "ragged"),
        ({"ragged": (-1, 2)}, "ragged"),
        ({"ragged": (0, 0)}, "ragged"),
        ({"fixed_split_tokens": 100}, "fixed_split_tokens"),
        ({"layout": "fp9"}, "layout"),
        ({"layout": "fp8_e4m3", "dtype": "float16"}, "layout"),
        ({"compute": "fast"}, "compute"),
        ({"topk": 1.5}, "topk"),
        ({"topk": 5, "causal": True}, "causal"),
        ({"topk": 5, "prefill": True}, "prefill"),
        ({"topk": 5, "batch": 1, "prefill": True, "fixed_split_tokens": 64}, "fixed_split_tokens"),
        ({"prefill": "yes"}, "prefill"),
    ],
)
def test_a_case_that_cannot_be_is_refused(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        BenchCase(**{"batch": 2, "lengths": 70, "num_heads_q": 4, **options})
    assert caught.value.argument == argument


def test_lists_and_arrays_of_lengths_are_taken_as_tuples() -> None:
    case = BenchCase(2, np.array([5, 9]), 4, ragged=[1, 2])  # type: ignore[arg-type]
    assert case == BenchCase(2, (5, 9), 4, ragged=(1, 2))
    assert hash(case) == hash(BenchCase.from_dict(json.loads(json.dumps(case.as_dict()))))
    with pytest.raises(InvalidArgumentError, match="lengths"):
        BenchCase(2, [5, 9, 1], 4)  # type: ignore[arg-type]


def test_numpys_numbers_fit_into_json(tmp_path: Path) -> None:
    sizes: Any = np.array([1, 2, 64, 128])
    cases = expand_grid(
        batches=sizes[:1],
        lengths=sizes[2:3],
        heads=sizes[1:2],
        seqlens_q=sizes[1:2],
        page_sizes=sizes[2:3],
        splits=sizes[3:],
        causal=sizes[0] == 1,
    )
    by_hand = BenchCase(sizes[1], (sizes[0], sizes[1]), 2, ragged=sizes[1::-1], latent_dim=4 * sizes[3])
    path = tmp_path / "results.json"
    results = run_bench([*cases, by_hand], backend="numpy")
    results.write_json(path)
    assert load_results(path) == results
    assert [row.case for row in results.rows] == [
        BenchCase(1, 64, 2, seqlen_q=2, causal=True, fixed_split_tokens=128),
        BenchCase(2, (1, 2), 2, ragged=(2, 1)),
    ]
    assert results.rows[0].name == "b1_k64_h2_q2_causal_cut128"


def test_a_case_survives_json() -> None:
    case = BenchCase(2, (5, 9), 4, ragged=(1, 2), name="mine")
    restored = BenchCase.from_dict(json.loads(json.dumps(case.as_dict())))
    assert restored == case
    assert restored.name == "mine"


def test_a_grid_has_every_combination_once() -> None:
    cases = expand_grid(
        batches=[1, 2],
        lengths=[64, 100],
        heads=[4],
        seqlens_q=[1, 2],
        dtypes=["bfloat16", "float16"],
        page_sizes=[16, 64],
        storages=["packed", "split", "strided"],
        splits=[None, 128],
        causal=True,
    )
    assert len(cases) == len(set(cases)) == len({case.name for case in cases}) == 2 * 2 * 2 * 2 * 2 * 3 * 2
    assert all(case.causal for case in cases)


def test_a_grid_of_layouts_and_chosen_tokens() -> None:
    sizes: dict[str, Any] = {"batches": [1], "lengths": [64], "heads": [4]}
    cases = expand_grid(**sizes, layouts=["bf16", "fp8_e4m3"], computes=["auto", "exact"])
    assert [case.name for case in cases] == ["b1_k64_h4_q1", "b1_k64_h4_q1_fp8_e4m3", "b1_k64_h4_q1_fp8_e4m3_exact"]
    cases = expand_grid(**sizes, topks=[None, 16], layouts=["fp8_ds_mla"])
    assert [case.name for case in cases] == ["b1_k64_h4_q1_fp8_ds_mla", "b1_k64_h4_q1_top16_fp8_ds_mla"]
    (prefill,) = expand_grid(**sizes, topks=[16], seqlens_q=[9], prefill=True)
    assert (prefill.name, prefill.function) == ("prefill_k64_h4_q9_top16", "sparse prefill")
    assert prefill == BenchCase.from_dict(json.loads(json.dumps(prefill.as_dict())))
    assert BenchCase(1, 64, 4, layout="bf16") == BenchCase(1, 64, 4)


def test_storages_have_an_earlier_name() -> None:
    sizes: dict[str, Any] = {"batches": [1], "lengths": [64], "heads": [4]}
    assert expand_grid(**sizes, layouts=["split"]) == expand_grid(**sizes, storages=["split"])
    values = BenchCase(1, 64, 4, storage="split").as_dict()
    values["layout"] = values.pop("storage")  # as in a file of an earlier version
    assert BenchCase.from_dict(values) == BenchCase(1, 64, 4, storage="split")


def test_a_preset_brings_heads_and_widths() -> None:
    cases = expand_grid(batches=[1], lengths=[64], preset="deepseek-v3", tensor_parallel=[1, 8, 16])
    assert [case.num_heads_q for case in cases] == [128, 16, 8]
    with pytest.raises(InvalidArgumentError, match="tp"):
        expand_grid(preset="deepseek-v3", tensor_parallel=[3])


def test_traces_are_draws_of_the_shipped_lengths() -> None:
    cases = expand_grid(batches=[8], lengths=[100], heads=[4], traces=2)
    assert [case.name for case in cases] == ["b8_k100_h4_q1", "b8_trace0_h4_q1", "b8_trace1_h4_q1"]
    expected = mid_decode_lengths(read_lengths(shipped_lengths()), 8, 1)
    np.testing.assert_array_equal(cases[2].kv_lengths, expected)


# --- inputs


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_holds_the_same_values(storage: str, dtype: str) -> None:
    case = BenchCase(2, (70, 5), 4, storage=storage, dtype=dtype)
    inputs = Inputs(case, NUMPY)
    cache = inputs.caches[0]
    packed = np.concatenate(cache, axis=-1) if storage == "split" else cache
    plain = Inputs(BenchCase(2, (70, 5), 4, dtype=dtype), NUMPY)
    np.testing.assert_array_equal(packed.view(np.uint16), plain.caches[0].view(np.uint16))
    np.testing.assert_array_equal(inputs.block_table, plain.block_table)
    if storage == "strided":
        page = case.page_size * case.spec.head_dim * cache.itemsize
        assert cache.strides[0] == 2 * page
    if storage == "split":
        assert [part.shape[-1] for part in cache] == [512, 64]
        assert all(part.flags.c_contiguous for part in (*cache, *inputs.stored_case.q))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"storage": "split", "seqlen_q": 2, "causal": True},
        {"storage": "strided", "page_size": 16},
        {"ragged": (2, 0, 3), "lengths": (40, 7, 0), "causal": True},
        {"fixed_split_tokens": 64, "dtype": "float16"},
        {"layout": "fp8_e4m3", "storage": "split"},
        {"layout": "fp8_e4m3", "compute": "exact", "seqlen_q": 2, "causal": True, "storage": "strided"},
        {"topk": 30, "seqlen_q": 2},
        {"topk": 100, "lengths": (40, 0, 200), "page_size": 16, "storage": "strided", "fixed_split_tokens": 64},
        {"topk": 30, "prefill": True, "batch": 1, "seqlen_q": 9, "dtype": "float16"},
        {"topk": 30, "layout": "fp8_ds_mla"},
        {"topk": 30, "layout": "fp8_ds_mla_no_rope", "rope_dim": 0},
        {"topk": 30, "prefill": True, "batch": 1, "seqlen_q": 9, "layout": "fp8_ds_mla"},
    ],
)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_our_side_is_right_on_every_kind_of_case(options: dict[str, Any], library: str) -> None:
    case = BenchCase(**{"batch": 3, "lengths": 70, "num_heads_q": 4, **options})
    if library == "torch":
        pytest.importorskip("torch")
    inputs = Inputs(case, NUMPY if library == "numpy" else TorchLibrary("cpu"))
    out, lse, *_ = OurSide().prepare(inputs)(inputs.caches[0])
    error, lse_error = inputs.errors(out, lse)
    assert 0 < error < accuracy.OUT_BOUNDS[case.dtype]
    assert lse_error < accuracy.LSE_BOUNDS["exact"]
    assert inputs.errors(out)[0] == error
    assert inputs.errors(out + out)[0] > 0.9  # the float64 result is not simply taken from the call


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_rounded_queries_are_compared_as_rounded_where_asked(library: str) -> None:
    if library == "torch":
        pytest.importorskip("torch")
    case = BenchCase(3, 200, 4, layout="fp8_e4m3", compute="fp8", seqlen_q=2, causal=True)
    inputs = Inputs(case, NUMPY if library == "numpy" else TorchLibrary("cpu"))
    out, lse = OurSide().prepare(inputs)(inputs.caches[0])
    error, lse_error = inputs.errors(out, lse, as_rounded=True)
    assert 0 < error < accuracy.OUT_BOUNDS[case.dtype]
    assert lse_error < accuracy.LSE_BOUNDS["exact"]
    assert 5 * accuracy.OUT_BOUNDS[case.dtype] < inputs.errors(out, lse)[0] < 0.1  # what rounding q to four bits costs


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("ragged", [None, (2, 0, 3)])
def test_torch_inputs_are_rotated_and_checked(
    monkeypatch: pytest.MonkeyPatch, ragged: tuple[int, ...] | None, storage: str
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(inputs_module, "graph_shape", lambda cache_bytes: (4, 3))
    case = BenchCase(3, (40, 7, 90), 4, ragged=ragged, causal=True, storage=storage)
    inputs = Inputs(case, TorchLibrary("cpu"))
    assert (inputs.calls, len(inputs.caches)) == (4, 3)
    call = OurSide().prepare(inputs)
    for cache in inputs.caches:
        error, lse_error = inputs.errors(*call(cache))
        assert error < accuracy.OUT_BOUNDS[case.dtype]
        assert lse_error < accuracy.LSE_BOUNDS["exact"]
    out, lse = call(inputs.caches[0])
    assert inputs.errors(2 * out)[0] > 0.9
    assert math.isnan(inputs.errors(out * math.nan)[0])
    assert inputs.errors(out, lse + 1)[1] > 0.01


def test_torch_reference_is_the_numpy_one() -> None:
    torch = pytest.importorskip("torch")
    from cupy_mla.bench.torch_reference import attention64, relative_errors

    rng = np.random.default_rng(0)
    for seqlen_q, length, causal in [(1, 50, False), (3, 50, True), (4, 2, True), (2, 0, False)]:
        q, keys = rng.standard_normal((seqlen_q, 4, 96)), rng.standard_normal((length, 96))
        out, lse = attention64(torch.from_numpy(q), torch.from_numpy(keys), 0.1, 64, causal)
        exact_out, exact_lse = np.zeros((seqlen_q, 4, 64)), np.full((4, seqlen_q), -np.inf)
        for token in range(seqlen_q):
            seen = max(length - seqlen_q + token + 1, 0) if causal else length
            if seen:
                weights = np.exp(0.1 * q[token] @ keys[:seen].T)
                exact_out[token] = weights @ keys[:seen, :64] / weights.sum(-1, keepdims=True)
                exact_lse[:, token] = np.log(weights.sum(-1))
        np.testing.assert_allclose(out.numpy(), exact_out, atol=1e-12)
        np.testing.assert_allclose(lse.numpy(), exact_lse, atol=1e-12)
        assert relative_errors((out, lse), (out, lse)) == (0.0, 0.0)
        assert relative_errors((out, None), (out, lse)) == (0.0, 0.0)
        wrong = relative_errors((out + 1, lse + 1), (out, lse))
        assert wrong[0] > 0.01
        assert wrong[1] > 0.01 or not length  # minus infinity stays what it is
        assert relative_errors((out, torch.zeros_like(lse)), (out, torch.full_like(lse, -math.inf)))[1] == math.inf


# --- the protocol


class FakeSide:
    """A peer by its own words; its result is right unless told otherwise."""

    version = "1.0"

    def __init__(self, name: str, *, refuses: str | None = None, breaks: str = "", wrong: bool = False) -> None:
        self.name, self.refuses, self.breaks, self.wrong = name, refuses, breaks, wrong

    def unsupported(self, case: BenchCase) -> str | None:
        return self.refuses

    def prepare(self, inputs: Inputs) -> Any:
        if self.breaks == "prepare":
            raise RuntimeError("no such kernel")
        exact = OurSide().prepare(inputs)

        def call(cache: Any) -> tuple[Any, Any]:
            if self.breaks == "call":
                raise RuntimeError("illegal access")
            out, lse = exact(cache)
            return (2 * out if self.wrong else out), lse

        return call


class FakeTimers:
    """Timers that give the times they are told, and keep a list of who ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: list[float | Exception]) -> None:
        self.seconds, self.log = seconds, list[tuple[str, int]]()
        monkeypatch.setattr(measure, "make_timer", self.make)
        self._made: list[str] = []

    def make(self, *_: Any) -> Any:
        name = list(self.seconds)[len(self._made)]
        self._made.append(name)
        values = iter(self.seconds[name])

        def seconds(replays: int = 1) -> float:
            self.log.append((name, replays))
            value = next(values)
            if isinstance(value, Exception):
                raise value
            return value

        return SimpleNamespace(seconds=seconds)


def test_sides_are_replayed_in_turn_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    timers = FakeTimers(monkeypatch, ours=[3e-6, 1e-6, 2e-6], peer=[8e-6, 4e-6, 5e-6])
    (row,) = measure.measure([SMALL], [OurSide(), FakeSide("peer")], NUMPY)
    assert timers.log == [("ours", 1), ("peer", 1)] * 3
    assert row.ours.us == pytest.approx(2.0)
    assert (row.ours.fastest_us, row.ours.slowest_us) == (pytest.approx(1.0), pytest.approx(3.0))
    assert row.ratio("peer") == row.best_ratio == pytest.approx(2.5)
    assert row.best_peer == "peer"
    assert row.failure is None
    assert row.ours.error is not None
    assert row.ours.error < 3e-3


def test_sustained_runs_follow_for_as_long_as_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    timers = FakeTimers(monkeypatch, ours=[1e-3] * 3 + [2e-3] * 3, peer=[1e-1] * 3 + [3e-1] * 3)
    (row,) = measure.measure([SMALL], [OurSide(), FakeSide("peer")], NUMPY, sustained=True)
    assert timers.log[6:] == [("ours", 300), ("peer", 3)] * measure.SUSTAINED_ROUNDS
    assert row.ours.sustained_us == pytest.approx(2000)
    assert row.sustained_ratio("peer") == pytest.approx(150)
    assert row.ratio("peer") == pytest.approx(100)


def test_cases_of_a_group_are_replayed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    timers = FakeTimers(monkeypatch, first=[1e-6] * 3, second=[2e-6] * 3)
    rows = measure.measure([SMALL, BenchCase(2, 80, 4)], [OurSide()], NUMPY)
    assert timers.log == [("first", 1), ("second", 1)] * 3
    assert [row.ours.us for row in rows] == [pytest.approx(1.0), pytest.approx(2.0)]


@pytest.mark.parametrize("step", ["prepare", "call"])
def test_a_peer_that_fails_takes_nothing_with_it(step: str) -> None:
    (row,) = measure.measure([SMALL], [OurSide(), FakeSide("bad", breaks=step), FakeSide("good")], NUMPY)
    assert row.peers["bad"].us is None
    assert row.peers["bad"].failure is not None
    assert row.peers["bad"].failure.startswith("RuntimeError: ")
    assert row.ours.us is not None
    assert row.best_peer == "good"
    assert row.failure is None


def test_a_replay_that_fails_ends_only_its_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    timers = FakeTimers(monkeypatch, ours=[1e-6] * 3, bad=[2e-6, RuntimeError("gone")], good=[3e-6] * 3)
    (row,) = measure.measure([SMALL], [OurSide(), FakeSide("bad"), FakeSide("good")], NUMPY)
    assert row.peers["bad"].us is None
    assert row.peers["bad"].failure == "RuntimeError: gone"
    assert row.best_ratio == pytest.approx(3.0)
    assert [name for name, _ in timers.log].count("bad") == 2


def test_what_a_peer_does_not_support_is_no_failure() -> None:
    (row,) = measure.measure([SMALL], [OurSide(), FakeSide("peer", refuses="only 64 heads")], NUMPY)
    assert row.peers["peer"] == Measurement(skipped="only 64 heads")


def test_our_failure_is_the_rows_failure_and_the_peers_are_timed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: OurSide, inputs: Inputs) -> Any:
        raise MemoryError("too large")

    peer = FakeSide("peer")
    exact = peer.prepare(Inputs(SMALL, NUMPY))
    monkeypatch.setattr(OurSide, "prepare", broken)
    monkeypatch.setattr(FakeSide, "prepare", lambda self, inputs: exact)
    (row,) = measure.measure([SMALL], [OurSide(), peer], NUMPY)
    assert row.failure == "MemoryError: too large"
    assert row.peers["peer"].us is not None
    assert row.ratio("peer") is None


def test_arrays_that_cannot_be_made_fail_their_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def normal(self: NumpyLibrary, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        if shape[-2] == 8:
            raise MemoryError("no room")
        return original(self, shape, dtype, seed)

    original = NumpyLibrary.normal
    monkeypatch.setattr(NumpyLibrary, "normal", normal)
    results = run_bench([BenchCase(1, 64, 8), BenchCase(1, 64, 4)], backend="numpy")
    assert [row.failure for row in results.rows] == ["MemoryError: no room", None]
    assert results.failed == results.rows[:1]


def test_a_wrong_result_of_ours_is_a_failure_and_of_a_peer_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = measure.measure([SMALL], [OurSide(), FakeSide("peer", wrong=True)], NUMPY)
    assert row.failure is None
    assert row.peers["peer"].error == pytest.approx(1.0, abs=0.01)
    monkeypatch.setitem(accuracy.OUT_BOUNDS, "bfloat16", 1e-9)
    (row,) = measure.measure([SMALL], [OurSide()], NUMPY)
    assert row.failure is not None
    assert "bound 1e-09" in row.failure


def test_the_limit_holds_between_steps_and_ahead_of_long_ones() -> None:
    now = 0.0
    deadline = measure.Deadline(10.0, clock=lambda: now)
    deadline.check()
    deadline.check(9.0)
    with pytest.raises(measure.TimeLimitError, match=r"would take 11 s, beyond the limit of 10 s"):
        deadline.check(11.0)
    now = 4.0
    with pytest.raises(measure.TimeLimitError, match=r"take 9 s, beyond the 6 s that are left of the limit of 10 s"):
        deadline.check(9.0)
    now = 10.5
    with pytest.raises(measure.TimeLimitError, match=r"limit of 10 s for a case has passed"):
        deadline.check()
    (row,) = measure.measure([SMALL], [OurSide()], NUMPY, limit=1e-9)
    assert row.failure is not None
    assert "TimeLimitError" in row.failure


def test_the_limit_counts_the_calls_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of them, without the warm-up and the rounds of a GPU."""
    seconds = 10.0
    monkeypatch.setattr(measure, "_first_calls", lambda call, inputs: (seconds, call(inputs.caches[0])))
    (row,) = measure.measure([SMALL], [OurSide()], NUMPY, limit=60.0)
    assert row.failure is None
    assert row.ours.us is not None
    seconds = 100.0
    (row,) = measure.measure([SMALL], [OurSide()], NUMPY, limit=60.0)
    assert row.failure == "TimeLimitError: it would take 300 s, beyond the limit of 60 s for a case"


def test_rounds_that_were_run_count_when_the_time_is_up() -> None:
    now = [0.0]

    def seconds(replays: int = 1) -> float:
        now[0] += 4.0
        return 1e-6

    lane = measure.Lane(Measurement(), SimpleNamespace(seconds=seconds), 1)
    ((_, times),) = measure.in_turn([lane], 5, [1], measure.Deadline(10.0, clock=lambda: now[0]))
    assert len(times) == 3


def test_the_protocol_says_how_many_calls_a_graph_has() -> None:
    counts = {inputs_module.graph_shape(size)[0] for size in (1, 1 << 20, 1 << 24, 150_000_000, 1 << 30)}
    text = measure.__doc__ or ""
    assert {min(counts), min(counts - {min(counts)}), max(counts)} == {4, 64, 1024}
    assert "64 to 1,024 calls (4 above 200 MB" in text


def test_a_capture_that_fails_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    log = []

    class Stream:
        def __init__(self, non_blocking: bool) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

        def synchronize(self) -> None: ...

        def begin_capture(self) -> None:
            log.append("begin")

        def end_capture(self) -> None:
            log.append("end")

    cuda = SimpleNamespace(
        Stream=Stream, Device=lambda: SimpleNamespace(synchronize=lambda: None), Event=None, get_elapsed_time=None
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))

    def call(cache: Any) -> Any:
        if log:
            raise RuntimeError("allocates in a capture")
        return None, None

    with pytest.raises(RuntimeError, match="allocates"):
        timing.CupyGraph(call, caches=[0, 1], calls=4)
    assert log == ["begin", "end"]


# --- ceilings


def test_published_ceilings_go_by_the_gpus_name() -> None:
    h200 = published_ceilings("NVIDIA H200")
    assert h200 is not None
    assert (h200.read_gigabytes_per_second, h200.tflops) == (4800, 989)
    assert h200.source == "published for H200"
    assert published_ceilings("NVIDIA H100 80GB HBM3").source == "published for H100"  # type: ignore[union-attr]
    assert published_ceilings("NVIDIA H100 PCIe").tflops == 756  # type: ignore[union-attr]
    assert published_ceilings("Quadro 4000") is None


def test_the_work_of_sparse_attention_is_that_of_the_tokens_chosen() -> None:
    pages = {"page_size": 16, "num_heads_q": 4}
    # Two requests of one query token: each reads what it has chosen.
    one = BenchCase(2, (1000, 20), topk=100, **pages).work
    assert one.flops == 2 * (576 + 512) * 4 * 120
    assert one.bytes == 120 * (1152 + 4) + 2 * 4 * (576 + 512) * 2
    # Two query tokens choose half of the tokens each, and share half of those.
    two = BenchCase(1, 1000, seqlen_q=2, topk=500, layout="fp8_ds_mla", **pages).work
    assert two.flops == 2 * (576 + 512) * 4 * 1000
    assert two.bytes == 750 * 656 + 1000 * 4 + 2 * 4 * (576 + 512) * 2
    # A long prefill reads everything once.
    prefill = BenchCase(1, 1000, seqlen_q=200, topk=500, prefill=True, **pages).work
    assert prefill.bytes == 1000 * 1152 + 200 * 500 * 4 + 200 * 4 * (576 + 512) * 2
    assert BenchCase(2, 70, 4, layout="fp8_e4m3").work.bytes == 140 * 576 + 2 * 4 * (576 + 512) * 2


def test_the_share_is_of_the_roofline() -> None:
    ceilings = Ceilings(1000.0, 100.0, None, "measured")
    assert ceilings.least_seconds(Work(flops=10**14, bytes=10)) == pytest.approx(1.0)
    assert ceilings.least_seconds(Work(flops=1, bytes=10**12)) == pytest.approx(1.0)
    row = Row(SMALL, ours=Measurement(us=2e6 * ceilings.least_seconds(SMALL.work)))
    assert row.share(ceilings) == pytest.approx(0.5)


# --- a run and its results


def some_results(*times: float, ceilings: Ceilings | None = None) -> Results:
    rows = [
        Row(
            BenchCase(1, 64 * (index + 1), 4),
            ours=Measurement(us=time, fastest_us=time, slowest_us=time, error=1e-3),
            peers={"flash_mla": Measurement(us=2 * time, error=1e-3), "fa3": Measurement(failure="<gone>")},
            calls=64,
            copies=4,
        )
        for index, time in enumerate(times)
    ]
    return Results({"device": "NVIDIA <H200>", "backend": "cuda", "date": "2030-01-01"}, ceilings, rows)


def test_a_run_says_where_and_how_it_was_made() -> None:
    seen: list[tuple[int, list[str]]] = []
    results = run_bench(
        [SMALL, (BenchCase(1, 64, 4), BenchCase(1, 80, 4))],
        backend="numpy",
        command="cupy-mla bench",
        on_rows=lambda results, rows: seen.append((len(results.rows), [row.name for row in rows])),
    )
    assert seen == [(1, ["b2_k70_h4_q1"]), (3, ["b1_k64_h4_q1", "b1_k80_h4_q1"])]
    assert not results.failed
    assert results.ceilings is None
    facts = results.metadata
    assert facts["device"].startswith("CPU")
    assert facts["versions"]["numpy"] == np.__version__
    assert facts["versions"]["cupy-mla"]
    assert facts["command"] == "cupy-mla bench"
    assert "CUDA graph of 64 to 1,024 calls" in facts["protocol"]
    assert facts["date"].endswith("+00:00")


def test_a_device_that_gives_no_memory_back_costs_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(library: NumpyLibrary) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(NumpyLibrary, "release", fails)
    seen: list[int] = []
    results = run_bench(
        [SMALL, BenchCase(1, 64, 4)], backend="numpy", on_rows=lambda results, rows: seen.append(len(results.rows))
    )
    assert seen == [1, 2]
    assert len(results.rows) == 2


def test_ceilings_that_were_asked_for_on_a_cpu_are_said_to_be_missing() -> None:
    assert run_bench([SMALL], backend="numpy", ceilings=True).metadata["ceilings_failure"]
    assert "ceilings_failure" not in run_bench([SMALL], backend="numpy").metadata


def test_peers_that_cannot_run_are_named_with_the_reason() -> None:
    results = run_bench([SMALL], peers=["flash_mla", "torch"], backend="numpy")
    assert set(results.metadata["missing_peers"]) == {"flash_mla", "torch"}
    assert all(results.metadata["missing_peers"].values())
    assert results.rows[0].peers == {}
    with pytest.raises(InvalidArgumentError, match="peer"):
        run_bench([SMALL], peers=["flashy"], backend="numpy")


def test_wrong_arguments_of_a_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match="limit"):
        run_bench([SMALL], limit=0)
    with pytest.raises(InvalidArgumentError, match="backend"):
        run_bench([SMALL], backend="tpu")
    monkeypatch.setattr(device, "why_unsupported", lambda *_: "there is no GPU")
    with pytest.raises(UnsupportedDeviceError):
        run_bench([SMALL], backend="cuda")


def test_ceilings_that_cannot_be_measured_are_those_of_the_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Ceilings:
        raise ImportError("no library for matrix products")

    monkeypatch.setattr(run, "measure_ceilings", fails)
    record: dict[str, Any] = {"backend": "cuda", "device": "NVIDIA H200"}
    ceilings = run._choose_ceilings(True, record)
    assert ceilings is not None
    assert ceilings.source == "published for H200"
    assert record["ceilings_failure"] == "ImportError: no library for matrix products"


def test_results_survive_a_file(tmp_path: Path) -> None:
    results = some_results(10.0, 20.0, ceilings=Ceilings(4700.0, 780.0, 680.0, "measured"))
    results.rows[1].ours.failure = "boom"
    path = tmp_path / "results.json"
    results.write_json(path)
    assert load_results(path) == results
    row = json.loads(path.read_text())["rows"][0]
    assert row["ours"]["tflops"] == pytest.approx(results.rows[0].case.work.flops / 10e-6 / 1e12)
    assert row["peers"]["flash_mla"]["ratio"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"format": "other"}', '{"format": "cupy-mla bench 1"}'),
        pytest.param("[" * 100_000, id="nested"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError, match="results"):
        load_results(path)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("rows", 0, "ours", "us"), 0, "us is 0 in b1_k64_h4_q1"),
        (("rows", 0, "ours", "us"), -1.0, "us is -1.0"),
        (("rows", 0, "ours", "us"), math.nan, "us is nan"),
        (("rows", 0, "ours", "us"), 10**400, "OverflowError"),
        (("rows", 0, "ours", "us"), "10", "TypeError"),
        (("rows", 0, "peers", "fa3", "sustained_us"), "fast", "TypeError"),
        (("rows", 0, "case", "batch"), 0, "batch"),
        (("rows", 0, "case", "lengths"), "many", "lengths"),
        (("metadata",), None, "TypeError"),
        (("metadata",), {"backend": "cuda", "date": "2030-01-01"}, "KeyError.*device"),
        (("metadata", "backend"), None, "backend is None"),
    ],
)
def test_results_that_cannot_be_compared_are_refused_when_read(
    tmp_path: Path, place: tuple[str | int, ...], value: Any, words: str
) -> None:
    path = tmp_path / "old.json"
    values: Any = some_results(10.0).as_dict()
    part = values
    for step in place[:-1]:
        part = part[step]
    part[place[-1]] = value
    path.write_text(json.dumps(values))
    with pytest.raises(InvalidArgumentError, match=f"results: expected a JSON file of cupy-mla bench.*{words}"):
        load_results(path)


def test_csv_has_a_line_for_each_case_and_side(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    some_results(10.0, 20.0).write_csv(path)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["implementation"] for line in lines] == ["cupy-mla", "flash_mla", "fa3"] * 2
    assert float(lines[1]["us"]) == 20.0
    assert float(lines[1]["times_ours"]) == 2.0
    assert lines[2]["failure"] == "<gone>"
    assert lines[3]["kv_tokens"] == "128"


def test_files_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    for write in (some_results(1.0).write_json, some_results(1.0).write_csv):
        with pytest.raises(InvalidArgumentError, match="can be written"):
            write(tmp_path / "no" / "such" / "file")


def test_runs_are_compared_case_by_case() -> None:
    old, new = some_results(10.0, 20.0, 30.0), some_results(11.0, 18.0)
    new.rows.append(Row(SMALL, ours=Measurement(us=1.0)))
    changes = compare(old, new)
    assert [change.name for change in changes] == ["b1_k64_h4_q1", "b1_k128_h4_q1"]
    assert [change.percent for change in changes] == [pytest.approx(10.0), pytest.approx(-10.0)]


def test_results_are_a_table_in_a_notebook() -> None:
    text = some_results(10.0, ceilings=Ceilings(4700.0, 780.0, None, "measured"))._repr_html_()
    for words in (
        "<td>b1_k64_h4_q1</td>",
        "<td>10.0</td>",
        "<td>2.00</td>",
        "&lt;H200&gt;",
        "fa3 failed: &lt;gone&gt;",
    ):
        assert words in text
    assert "% of ceiling" in text
    assert "<gone>" not in text


def test_the_packages_names_are_there() -> None:
    assert all(hasattr(package, name) for name in package.__all__)
