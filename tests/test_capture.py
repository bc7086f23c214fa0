"""Memory that a CUDA graph needs is kept until CUDA says that the graph is gone. CUDA itself is a stand-in here."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from cupy_mla.arrays import capture
from cupy_mla.errors import DriverError

pytest.importorskip("cuda.bindings")
STREAM = 5


class Memory:
    """What has to be kept."""


class Driver:
    """Holds the user objects of one graph, and posts them when it is destroyed."""

    CUuserObject_flags = SimpleNamespace(CU_USER_OBJECT_NO_DESTRUCTOR_SYNC=1)
    CUuserObjectRetain_flags = SimpleNamespace(CU_GRAPH_USER_OBJECT_MOVE=1)
    CUhostFn = CUstream = int

    def __init__(self) -> None:
        self.objects: list[tuple[int, int]] = []
        self.retained: list[tuple[int, int]] = []
        self.refusal = 0

    def cuStreamGetCaptureInfo(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        assert stream == STREAM
        return 0, 1, 17, "graph", [], 0

    def cuUserObjectCreate(self, pointer: int, destroy: int, count: int, flags: int) -> tuple[int, int]:  # noqa: N802
        assert count == flags == 1
        self.objects.append((pointer, destroy))
        return 0, len(self.objects) - 1

    def cuGraphRetainUserObject(self, graph: str, number: int, count: int, flags: int) -> tuple[int]:  # noqa: N802
        assert graph == "graph"
        assert count == flags == 1
        if not self.refusal:
            self.retained.append(self.objects[number])
        return (self.refusal,)

    def cuUserObjectRelease(self, number: int, count: int) -> tuple[int]:  # noqa: N802
        self.post(self.objects[number])
        return (0,)

    def destroy_graph(self) -> None:
        for entry in self.retained:
            self.post(entry)
        self.retained.clear()

    @staticmethod
    def post(entry: tuple[int, int]) -> None:
        pointer, destroy = entry
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(destroy)(pointer)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    stand_in = Driver()
    monkeypatch.setattr(capture, "_driver", lambda: stand_in)
    monkeypatch.setattr(capture, "_kept", [])
    return stand_in


def keep() -> weakref.ref[Memory]:
    memory = Memory()
    capture.keep_for_graph([memory], STREAM)
    return weakref.ref(memory)


def test_memory_lives_as_long_as_its_graph(driver: Driver) -> None:
    first, second = keep(), keep()
    gc.collect()
    capture.release_kept()
    assert first() is not None
    assert second() is not None
    driver.destroy_graph()
    capture.release_kept()
    gc.collect()
    assert first() is None
    assert second() is None


def test_memory_of_a_graph_that_is_gone_goes_with_the_next_capture(driver: Driver) -> None:
    first = keep()
    driver.destroy_graph()
    second = keep()
    gc.collect()
    assert first() is None
    assert second() is not None


def test_a_refusal_of_the_driver_is_raised_and_keeps_nothing(driver: Driver) -> None:
    driver.refusal = 1
    memory = Memory()
    with pytest.raises(DriverError, match="cuGraphRetainUserObject"):
        capture.keep_for_graph([memory], STREAM)
    capture.release_kept()
    assert capture._kept == []


# Tensors of torch, whose own graphs have a pool of memory ------------------------------------------------------------


class Tensor:
    """Memory from 1,000 on."""

    def __init__(self, numel: int = 1) -> None:
        self.count = numel

    def numel(self) -> int:
        return self.count

    def data_ptr(self) -> int:
        return 1000


class Allocator:
    """torch's, of which one thing is asked; ``pool`` is that of the tensor, None: it has no pools."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pool: tuple[int, int] | None, *, captured: bool = True) -> None:
        self.pool, self.asked = pool, 0
        monkeypatch.setattr(capture, "is_captured", lambda stream: captured)
        monkeypatch.setattr(capture, "_of_torch", {})
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=self))

    def memory_snapshot(self) -> list[dict[str, Any]]:
        self.asked += 1
        if self.pool is None:
            raise RuntimeError("cudaMallocAsync has no snapshot")
        places = (0, (0, 7)), (1000, self.pool), (2000, (0, 0))
        return [{"address": start, "total_size": 1000, "segment_pool_id": pool} for start, pool in places]


def test_a_tensor_is_kept_for_a_graph_that_torch_does_not_capture(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocator = Allocator(monkeypatch, (0, 0))
    tensors = [Tensor(), Tensor()]
    for tensor in tensors:
        capture.keep_tensor(tensor, STREAM)
    assert [kept.objects for kept in capture._kept] == [[tensor] for tensor in tensors]
    assert allocator.asked == 1
    driver.destroy_graph()
    capture.release_kept()
    assert capture._kept == []


@pytest.mark.parametrize(
    ("pool", "captured", "numel", "asked"),
    [((0, 3), True, 1, 1), ((3, 0), True, 1, 1), (None, True, 1, 1), ((0, 0), False, 1, 0), ((0, 0), True, 0, 0)],
)
def test_other_tensors_are_left_to_torch(
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
    pool: tuple[int, int] | None,
    captured: bool,
    numel: int,
    asked: int,
) -> None:
    allocator = Allocator(monkeypatch, pool, captured=captured)
    for _ in range(2):
        capture.keep_tensor(Tensor(numel), STREAM)
    assert capture._kept == []
    assert allocator.asked == asked
