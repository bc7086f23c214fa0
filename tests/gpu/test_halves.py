"""The halves of the chip, measured, and calls in which CTAs claim their parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cupy_mla import mla_decode, plan_decode
from cupy_mla.call.memo import forget
from cupy_mla.decode import prepared as decode_call_module
from cupy_mla.decode.plan import DecodePlan
from cupy_mla.gpu import device
from cupy_mla.kernels import halves
from cupy_mla.kernels.structs import PLAN_HEADER, SM_WORDS

from . import gpu_arrays as gpu

pytestmark = pytest.mark.timeout(60)

TOKENS, PAGE, POOL = 3200, 64, 600  # 50 tiles each; requests share the pages of a small pool
RUNS = 30


@pytest.fixture(autouse=True)
def fresh_calls() -> Iterator[None]:
    forget_halves()
    yield
    forget_halves()


def forget_halves() -> None:
    halves.second_half.cache_clear()
    forget()


def header_of(plan: DecodePlan) -> np.void:
    import cupy

    memory = cupy.cuda.UnownedMemory(plan.pointer, PLAN_HEADER.itemsize, plan)
    words = cupy.ndarray((PLAN_HEADER.itemsize,), np.uint8, cupy.cuda.MemoryPointer(memory, 0))
    return cupy.asnumpy(words).view(PLAN_HEADER)[0]


def make_call(heads: int, batch: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(heads)
    pages = TOKENS // PAGE
    return (
        gpu.upload(rng.standard_normal((batch, 1, heads, 576)).astype(np.float16)),
        gpu.upload(rng.standard_normal((POOL, PAGE, 1, 576)).astype(np.float16)),
        gpu.upload(rng.integers(0, POOL, (batch, pages)).astype(np.int32)),
        gpu.upload(np.full(batch, TOKENS, np.int32)),
    )


def test_each_half_has_about_half_of_the_sms_each_time() -> None:
    num_sms = device.describe_device(0).num_sms
    found = halves.second_half(0)
    assert abs(2 * sum(int(word).bit_count() for word in found) - num_sms) <= num_sms // 4
    halves.second_half.cache_clear()
    np.testing.assert_array_equal(halves.second_half(0), found)


def test_halves_are_found_during_a_capture() -> None:
    torch = pytest.importorskip("torch")
    expected = halves.second_half(0)
    halves.second_half.cache_clear()
    word = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        word += 1
        found = halves.second_half(0)
    graph.replay()
    assert word.item() == 1
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("heads", [3, 16, 32, 64])
def test_claimed_parts_give_the_same_bits_as_parts_in_order(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back to back, so that CTAs of one call claim while those of the call before still run."""
    num_sms = device.describe_device(0).num_sms
    q, kv_cache, block_table, cache_seqlens = make_call(heads, num_sms - 3)
    plan = plan_decode(q, kv_cache, block_table, cache_seqlens)
    outputs = [
        (gpu.empty((num_sms - 3, 1, heads, 512), "float16"), gpu.empty((num_sms - 3, heads, 1), "float32"))
        for _ in range(RUNS)
    ]
    for out, lse in outputs:
        mla_decode(q, kv_cache, block_table, cache_seqlens, plan=plan, out=out, lse=lse)
    header = header_of(plan)
    assert header["claimed_parts"] == num_sms - 3
    assert header["claims"] == 0

    forget()
    monkeypatch.setattr(decode_call_module, "second_half", lambda device_id: np.zeros(SM_WORDS, np.uint32))
    expected = mla_decode(q, kv_cache, block_table, cache_seqlens)
    for found in outputs:
        for array, reference in zip(found, expected, strict=True):
            np.testing.assert_array_equal(gpu.bits_of(array), gpu.bits_of(reference))
