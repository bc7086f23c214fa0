"""The two halves of a chip: told apart by latencies, and as busy as each other where CTAs claim their parts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpu import HALF, NUM_SMS, FakeGpu, fake_gpu
from host_kernels import claimed_part, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule import dense

from cupy_mla import mla_decode
from cupy_mla.call.memo import forget
from cupy_mla.gpu import hopper
from cupy_mla.gpu.jit.source import kernels_root
from cupy_mla.kernels import halves
from cupy_mla.kernels.halves import split_halves
from cupy_mla.kernels.structs import HALF_SHARE_UNIT
from cupy_mla.schedule.make import make_schedule
from cupy_mla.schedule.pieces import TILE_TOKENS
from cupy_mla.schedule.shape import CLAIM_TILES


def claims(second: list[bool], parts: int, second_parts: int) -> list[int]:
    """What CTAs get that come one after another, each of the half that `second` says."""
    before = [0, 0]
    taken = []
    for is_second in second:
        half, other = (second_parts, parts - second_parts) if is_second else (parts - second_parts, second_parts)
        spare = len(second) - parts
        taken.append(claimed_part(is_second, half, other, spare, before[is_second], before[not is_second]))
        before[is_second] += 1
    return taken


@needs_compiler
@settings(deadline=None)
@given(st.integers(1, 160), st.data())
def test_each_part_is_claimed_once_whoever_comes(ctas: int, data: st.DataObject) -> None:
    second = data.draw(st.lists(st.booleans(), min_size=ctas, max_size=ctas))
    parts = data.draw(st.integers(0, ctas))
    taken = claims(second, parts, data.draw(st.integers(0, parts)))
    assert sorted(part for part in taken if part < parts) == list(range(parts))
    assert all(part == parts for part in taken if part >= parts)


@needs_compiler
def test_both_halves_are_as_busy_as_each_other() -> None:
    second = [sm % 2 == 1 for sm in range(132)]
    random.Random(0).shuffle(second)
    taken = claims(second, 128, 64)
    for half in (False, True):
        of_half = [part < 128 for is_second, part in zip(second, taken, strict=True) if is_second == half]
        assert of_half == [True] * 64 + [False] * 2  # the last ones go without


@pytest.mark.parametrize(
    ("batch", "tiles", "blocks", "claimed"),
    [
        (128, 128, 1, 128),
        (64, 128, 1, 128),  # two pieces each
        (132, 128, 1, 0),  # no part is without work
        (128, CLAIM_TILES // 2, 1, 0),  # too short
        (128, 128, 2, 0),  # CTAs of a part are neighbours
        (0, 128, 1, 0),
    ],
)
def test_when_parts_are_claimed(batch: int, tiles: int, blocks: int, claimed: int) -> None:
    shape = dense(batch, blocks_per_job=blocks, max_seqlen_k=tiles * TILE_TOKENS)
    assert make_schedule(shape, [tiles * TILE_TOKENS] * batch).claimed_parts == claimed
    assert shape.may_claim or not claimed


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    yield fake_gpu(monkeypatch)
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize(("batch", "pages", "told"), [(128, 128, True), (128, 16, False), (4, 128, False)])
def test_the_kernel_is_told_the_halves_where_it_may_need_them(gpu: FakeGpu, batch: int, pages: int, told: bool) -> None:
    mla_decode(
        gpu.array((batch, 1, 16, 576)),
        gpu.array((64, 64, 1, 576)),
        gpu.array((batch, pages), "int32"),
        gpu.array((batch,), "int32"),
        head_dim_v=512,
    )
    params = next(launched.arguments[2][0] for launched in gpu.take() if launched.kernel == "decode")
    assert params["second_half"].tolist() == (HALF.tolist() if told else [0] * len(HALF))
    assert params["second_half_share"] == (HALF_SHARE_UNIT * 66 // NUM_SMS if told else 0)


def latencies(is_second: np.ndarray, near: float, noise: float) -> np.ndarray:
    """Clocks of SMs that differ among each other, as lines do, with lines of either half."""
    rng = np.random.default_rng(0)
    line_is_second = rng.random(32) < 0.5
    common = 2000 + rng.normal(0, 200, (len(is_second), 1)) + rng.normal(0, 200, 32)
    nearer = np.where(is_second[:, None] == line_is_second, -near / 2, near / 2)
    return (common + nearer + rng.normal(0, noise, nearer.shape)).astype(np.uint32)


def clocks_of(is_second: np.ndarray) -> np.ndarray:
    found = np.zeros((hopper.MAX_SMS, 32), np.uint32)
    found[: len(is_second)] = latencies(is_second, 1400, 100)
    return found


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[int]]]:
    """Measures the halves with these results, one an attempt, all of which must be asked for; gives the words."""

    def run(*results: np.ndarray | None) -> list[int]:
        waiting = list(results)
        monkeypatch.setattr(halves, "require_supported", lambda device_id: SimpleNamespace(num_sms=NUM_SMS))
        monkeypatch.setattr(halves, "_measure", lambda device_id, num_sms: waiting.pop(0))
        halves.second_half.cache_clear()
        words = halves.second_half(0)
        assert not waiting
        return words.tolist()

    yield run
    halves.second_half.cache_clear()


def test_a_bit_for_each_sm_of_the_second_half(measure: Callable[..., list[int]]) -> None:
    assert measure(clocks_of(np.arange(NUM_SMS) >= 66)) == [0, 0, 0xFFFFFFFC, 0xFFFFFFFF, 0xF]


def test_an_sm_without_a_cta_is_measured_again(measure: Callable[..., list[int]]) -> None:
    complete = clocks_of(np.arange(NUM_SMS) % 2 == 1)
    partial = complete.copy()
    partial[77] = 0
    assert measure(partial, complete) == [0xAAAAAAAA] * 4 + [0xA]
    assert measure(partial, partial, partial) == [0] * 5


def test_a_busy_gpu_is_asked_once(measure: Callable[..., list[int]]) -> None:
    assert measure(None) == [0] * 5


def test_lines_are_as_far_apart_on_both_sides() -> None:
    text = (kernels_root() / halves.PROBE_SOURCE.entry).read_text()
    assert f"kLineStride = {halves._LINE_STRIDE};" in text


def test_halves_are_told_apart() -> None:
    is_second = np.random.default_rng(1).random(132) < 0.5
    found = split_halves(latencies(is_second, 1400, 100))
    np.testing.assert_array_equal(found, is_second != is_second[0])


@pytest.mark.parametrize("near", [0, 50])
def test_no_halves_are_found_in_noise(near: float) -> None:
    assert not split_halves(latencies(np.arange(132) < 66, near, 100)).any()


def test_one_sm_apart_is_no_half() -> None:
    assert not split_halves(latencies(np.arange(132) < 1, 1400, 10)).any()
