"""Timers of one implementation on one case: CUDA graphs with torch or CuPy, wall time on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from ..lab.timing import WARM_UP_REPLAYS
from .inputs import Inputs

Call = Callable[[Any], tuple[Any, Any]]


class Timer(Protocol):
    """Ready to run the calls of one side again and again."""

    def seconds(self, replays: int = 1) -> float:
        """Seconds of a call, over so many replays back to back."""


class TorchGraph:
    """A CUDA graph of torch calls."""

    def __init__(self, inputs: Inputs, call: Call) -> None:
        import torch

        self._torch = torch
        self._calls = inputs.calls
        self._kept = inputs, call  # a graph holds addresses only
        for cache in inputs.caches[:2]:
            call(cache)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for index in range(inputs.calls):
                call(inputs.caches[index % len(inputs.caches)])
        for _ in range(WARM_UP_REPLAYS):
            self._graph.replay()
        torch.cuda.synchronize()

    def seconds(self, replays: int = 1) -> float:
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            self._graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / replays / self._calls


class CupyGraph:
    """A CUDA graph of calls on CuPy arrays."""

    def __init__(self, inputs: Inputs, call: Call) -> None:
        import cupy

        self._calls = inputs.calls
        self._kept = inputs, call  # as in `TorchGraph`
        cupy.cuda.Device().synchronize()  # what the calls read comes from another stream
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._event = cupy.cuda.Event
        self._elapsed = cupy.cuda.get_elapsed_time
        with self._stream:
            for cache in inputs.caches[:2]:
                call(cache)
            self._stream.synchronize()
            self._stream.begin_capture()
            try:
                for index in range(inputs.calls):
                    call(inputs.caches[index % len(inputs.caches)])
            finally:  # a capture left open would break whatever comes next
                self._graph = self._stream.end_capture()
        for _ in range(WARM_UP_REPLAYS):
            self._graph.launch(self._stream)
        self._stream.synchronize()

    def seconds(self, replays: int = 1) -> float:
        start, end = self._event(), self._event()
        start.record(self._stream)
        for _ in range(replays):
            self._graph.launch(self._stream)
        end.record(self._stream)
        end.synchronize()
        return float(self._elapsed(start, end)) / 1e3 / replays / self._calls


class WallClock:
    """Calls in host memory, one after the other."""

    def __init__(self, inputs: Inputs, call: Call) -> None:
        self._call, self._cache = call, inputs.caches[0]

    def seconds(self, replays: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(replays):
            self._call(self._cache)
        return (time.perf_counter() - start) / replays


def make_timer(inputs: Inputs, call: Call) -> Timer:
    """The timer for the library that the inputs are of."""
    timers: dict[str, type[TorchGraph] | type[CupyGraph] | type[WallClock]] = {
        "torch": TorchGraph,
        "cupy": CupyGraph,
        "numpy": WallClock,
    }
    return timers[inputs.library.name](inputs, call)


def synchronize(inputs: Inputs) -> None:
    """Wait until the device is done; raises what a kernel did wrong."""
    if inputs.library.name == "torch":
        import torch

        torch.cuda.synchronize()
    elif inputs.library.name == "cupy":
        import cupy

        cupy.cuda.Device().synchronize()
