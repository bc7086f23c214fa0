"""Memory for one call: from torch's allocator without a tensor, from the others' as an array; given back in time."""

from __future__ import annotations

from typing import Any

import pytest
from fake_gpu import fake_gpu

from cupy_mla.arrays import scratch
from cupy_mla.arrays.scratch import scratch_like

torch = pytest.importorskip("torch", reason="torch is not installed")

SIZE, STREAM = 4096, 77
CAPTURED = {99}  # streams


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """What torch's allocator of GPU 0 has given: size and stream by address."""
    given: dict[int, tuple[int, int]] = {}

    def allocate(size: int, stream: int) -> int:
        given[len(given) + 1] = size, stream
        return len(given)

    monkeypatch.setattr(scratch, "is_captured", CAPTURED.__contains__)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_cudaCachingAllocator_raw_alloc", allocate, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_cudaCachingAllocator_raw_delete", given.pop, raising=False)
    return given


def test_torch_gives_memory_on_the_stream_and_has_it_back(held: dict[int, tuple[int, int]]) -> None:
    tensor = torch.zeros(1)
    first = scratch_like(tensor, SIZE, 0, STREAM)
    second = scratch_like(tensor, SIZE + 1, 0, STREAM + 1)
    assert (first.pointer, second.pointer) == (1, 2)
    assert held == {1: (SIZE, STREAM), 2: (SIZE + 1, STREAM + 1)}
    del first
    assert held == {2: (SIZE + 1, STREAM + 1)}
    del second
    assert not held


@pytest.mark.parametrize(("device_id", "stream"), [(1, STREAM), (0, 99)], ids=["another GPU", "a captured stream"])
def test_elsewhere_than_on_the_current_gpu_and_in_a_capture_it_is_a_tensor(
    held: dict[int, tuple[int, int]], monkeypatch: pytest.MonkeyPatch, device_id: int, stream: int
) -> None:
    made: list[Any] = []

    def empty_like(obj: Any, shape: tuple[int, ...], dtype: str, stream: int) -> Any:
        made.append((shape, dtype, stream))
        return torch.zeros(shape, dtype=getattr(torch, dtype))

    monkeypatch.setattr(scratch, "empty_like", empty_like)
    assert scratch_like(torch.zeros(1), SIZE, device_id, stream).pointer != 0
    assert made == [((SIZE,), "uint8", stream)]
    assert not held


def test_other_frameworks_give_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu(monkeypatch)
    given = scratch_like(gpu.array((1,)), SIZE, 0, STREAM)
    [allocated] = gpu.allocated
    assert (given.pointer, allocated.shape) == (allocated.pointer, (SIZE,))
