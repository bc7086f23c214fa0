"""How long a decode takes.

On the GPU: all kernels of a call, without planning (a plan serves every layer of a step) and without the host. A CUDA
graph of calls is replayed and timed with events. Successive calls read different copies of the cache, so that each
finds it in HBM, not in L2, as a decode step does after the other layers of a model. On the CPU: wall time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..schedule.pieces import ceil_div
from .cases import Case, each_part
from .libraries import NUMPY, ArrayLibrary, empty_cache_like
from .sparse_cases import SparseCase

COLD_BYTES = 256_000_000  # copies of the cache hold at least this much in all: several times any Hopper GPU's L2
LARGE_CACHE_BYTES = 200_000_000  # from here on a call is long: a few per graph will do
CALLS_PER_GRAPH = 64
CALLS_PER_GRAPH_LARGE = 4
MAX_CALLS_PER_GRAPH = 1024
WARM_UP_REPLAYS = 2
REPLAYS = 5
DEFAULT_LIMIT_SECONDS = 60.0  # for a case of a benchmark
CPU_REPEATS = 3
CPU_SECONDS = 2.0  # after so long no further repeat is begun

Call = Callable[[Any], object]  # of one decode, on one of the caches


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call.

    Attributes
    ----------
    seconds, fastest, slowest
        Median, least and most of the repeats (each the mean over the calls of one replay).
    calls
        Calls per repeat.
    protocol
        What was timed and how, in words.
    """

    seconds: float
    fastest: float
    slowest: float
    calls: int
    protocol: str


class Timer(Protocol):
    """Ready to run calls again and again."""

    def seconds(self, replays: int = 1) -> float:
        """Seconds of a call, over so many replays back to back."""


def graph_shape(cache_bytes: int) -> tuple[int, int]:
    """(calls per graph, copies of the cache) where a call reads so many bytes of the cache."""
    copies = ceil_div(COLD_BYTES, max(cache_bytes, 1))
    if cache_bytes > LARGE_CACHE_BYTES:
        return CALLS_PER_GRAPH_LARGE, min(copies, CALLS_PER_GRAPH_LARGE)
    calls = min(max(copies, CALLS_PER_GRAPH), MAX_CALLS_PER_GRAPH)
    return calls, min(copies, calls)


def make_timer(library: ArrayLibrary, call: Call, caches: Sequence[Any], calls: int) -> Timer:
    """A timer of calls on arrays of a library.

    Parameters
    ----------
    call
        Launches on the library's current stream, does not synchronise, and on CuPy arrays does not allocate.
    caches, calls
        On a GPU, call i of so many in a graph reads ``caches[i % len(caches)]``; on the CPU each reads the first.
    """
    timers: dict[str, type[TorchGraph] | type[CupyGraph] | type[WallClock]] = {
        "torch": TorchGraph,
        "cupy": CupyGraph,
        "numpy": WallClock,
    }
    return timers[library.name](call, caches, calls)


class TorchGraph:
    """A CUDA graph of torch calls."""

    def __init__(self, call: Call, caches: Sequence[Any], calls: int) -> None:
        import torch

        self._torch = torch
        self._calls = calls
        self._kept = call, caches  # a graph holds addresses only
        for cache in caches[:2]:  # compiles and loads, which a capture may not
            call(cache)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for index in range(calls):
                call(caches[index % len(caches)])
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

    def __init__(self, call: Call, caches: Sequence[Any], calls: int) -> None:
        import cupy

        self._calls = calls
        self._kept = call, caches  # as in `TorchGraph`
        cupy.cuda.Device().synchronize()  # what the calls read comes from another stream
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._event = cupy.cuda.Event
        self._elapsed = cupy.cuda.get_elapsed_time
        with self._stream:
            for cache in caches[:2]:
                call(cache)
            self._stream.synchronize()
            self._stream.begin_capture()
            try:
                for index in range(calls):
                    call(caches[index % len(caches)])
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

    def __init__(self, call: Call, caches: Sequence[Any], calls: int) -> None:
        self._call, self._cache = call, caches[0]

    def seconds(self, replays: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(replays):
            self._call(self._cache)
        return (time.perf_counter() - start) / replays


def time_decode(case: Case | SparseCase, call: Call | None = None, replays: int = 1) -> Timing:
    """Time a case; see the module's text for what is counted.

    Parameters
    ----------
    case
        What is decoded, or for another ``call`` whose cache that reads.
    call
        As `prepare_call` makes it; None: that.
    replays
        As of `time_replays`.
    """
    return _time_on_cpu(case, call) if case.library is NUMPY else _time_on_gpu(case, call, replays)


def prepare_call(case: Case | SparseCase, **options: Any) -> Callable[[Any], tuple[Any, ...]]:
    """A call of a case with a plan and outputs made before, as every layer of a step but the first makes it.

    Parameters
    ----------
    options
        Of the case's `plan`.

    Returns
    -------
    The call, on what is like the case's `cold`.
    """
    plan = case.plan(**options)
    results = case.run(plan)  # type: ignore[arg-type]  # each kind of case has its kind of plan

    def call(cache: Any) -> tuple[Any, ...]:
        # Validation would synchronise, which a capture cannot.
        return case.with_cold(cache).run(plan, results=results, validate=False)  # type: ignore[arg-type]

    return call


def _time_on_gpu(case: Case | SparseCase, call: Call | None, replays: int) -> Timing:
    calls, copies = graph_shape(case.read_bytes)

    def copy(part: Any) -> Any:
        result = empty_cache_like(case.library, part)
        case.library.assign(result, part)
        return result

    caches = [case.cold, *(each_part(copy, case.cold) for _ in range(copies - 1))]
    return time_replays(make_timer(case.library, call or prepare_call(case), caches, calls), calls, copies, replays)


def _time_on_cpu(case: Case | SparseCase, call: Call | None) -> Timing:
    return time_replays(make_timer(case.library, call or (lambda _: case.run()), [case.cold], 1), 1, 1)


def time_replays(timer: Timer, calls: int, copies: int, replays: int = 1) -> Timing:
    """The median of several replays.

    Parameters
    ----------
    timer
        Of `make_timer`.
    calls, copies
        Calls of a replay, and the copies of the cache that they take in turn.
    replays
        On a GPU, so many at a time, one right behind the other: what processes that wait for each other do not begin
        together counts once.
    """
    if isinstance(timer, WallClock):
        seconds: list[float] = []
        while len(seconds) < CPU_REPEATS and sum(seconds) < CPU_SECONDS:
            seconds.append(timer.seconds())
        protocol = f"wall time, median of {len(seconds)}"
    else:
        seconds = [timer.seconds(replays) for _ in range(REPLAYS)]
        at_a_time = f" times {replays}" if replays > 1 else ""
        protocol = f"CUDA graph of {calls} calls, {copies} caches in turn, median of {REPLAYS}{at_a_time} replays"
    return Timing(statistics.median(seconds), min(seconds), max(seconds), calls, protocol)
