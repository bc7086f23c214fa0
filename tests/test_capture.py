"""Memory that a CUDA graph needs is kept until CUDA says that the graph is gone. CUDA itself is a stand-in here."""

from __future__ import annotations

import ctypes
import gc
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
