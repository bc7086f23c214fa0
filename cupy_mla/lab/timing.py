"""How long a decode takes.

On the GPU: all kernels of a call, without planning (a plan serves every layer of a step) and without the host. A CUDA
graph of calls is replayed and timed with events. Successive calls read different copies of the cache, so that each
finds it in HBM, not in L2, as a decode step does after the other layers of a model. On the CPU: wall time.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cases import Case

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


def time_decode(case: Case) -> Timing:
    """Time ``mla_decode`` on a case; see the module's text for what is counted."""
    return _time_on_gpu(case) if case.backend == "cuda" else _time_on_cpu(case)


def graph_shape(cache_bytes: int) -> tuple[int, int]:
    """(calls per graph, copies of the cache) for a cache of so many bytes."""
    copies = -(-COLD_BYTES // max(cache_bytes, 1))
    if cache_bytes > LARGE_CACHE_BYTES:
        return CALLS_PER_GRAPH_LARGE, min(copies, CALLS_PER_GRAPH_LARGE)
    calls = min(max(copies, CALLS_PER_GRAPH), MAX_CALLS_PER_GRAPH)
    return calls, min(copies, calls)


def replay_graph(calls: Sequence[Callable[[], object]]) -> list[float]:
    """GPU seconds of each of several replays of a CUDA graph that holds the calls in order.

    The calls launch on CuPy's current stream, do not synchronise and do not allocate.
    """
    import cupy

    cupy.cuda.Device().synchronize()  # what the calls read may come from another stream
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for call in calls[:2]:  # compiles and loads, which a capture may not
            call()
        stream.synchronize()
        stream.begin_capture()
        for call in calls:
            call()
        graph = stream.end_capture()
        for _ in range(WARM_UP_REPLAYS):
            graph.launch(stream)
        events = [cupy.cuda.Event() for _ in range(REPLAYS + 1)]
        events[0].record(stream)
        for event in events[1:]:
            graph.launch(stream)
            event.record(stream)
        stream.synchronize()
    milliseconds = [cupy.cuda.get_elapsed_time(*pair) for pair in itertools.pairwise(events)]
    return [value / 1e3 for value in milliseconds]


def _time_on_gpu(case: Case) -> Timing:
    from ..decode.dense import mla_decode, plan_decode

    num_calls, num_copies = graph_shape(case.kv_cache.nbytes)
    caches = [case.kv_cache, *(_copy(case.kv_cache) for _ in range(num_copies - 1))]
    plan = plan_decode(*case.tensors, **case.plan_options)
    out, lse = mla_decode(*case.tensors, **case.options, plan=plan)

    # Validation would synchronise, which a capture cannot.
    fixed = {**case.options, "plan": plan, "out": out, "lse": lse, "validate": False}

    def call_on(cache: Any) -> Callable[[], object]:
        return lambda: mla_decode(case.q, cache, case.block_table, case.cache_seqlens, **fixed)

    calls = [call_on(caches[i % num_copies]) for i in range(num_calls)]
    seconds = [replay / num_calls for replay in replay_graph(calls)]
    protocol = f"CUDA graph of {num_calls} calls, {num_copies} caches in turn, median of {REPLAYS} replays"
    return _timing(seconds, num_calls, protocol)


def _copy(array: Any) -> Any:
    import cupy

    copy = cupy.empty_like(array.view(np.uint16))
    copy[...] = array.view(np.uint16)
    return copy.view(array.dtype)


def _time_on_cpu(case: Case) -> Timing:
    from ..decode.dense import mla_decode

    seconds: list[float] = []
    while len(seconds) < CPU_REPEATS and sum(seconds) < CPU_SECONDS:
        start = time.perf_counter()
        mla_decode(*case.tensors, **case.options)
        seconds.append(time.perf_counter() - start)
    return _timing(seconds, 1, f"wall time, median of {len(seconds)}")


def _timing(seconds: list[float], calls: int, protocol: str) -> Timing:
    return Timing(statistics.median(seconds), min(seconds), max(seconds), calls, protocol)
