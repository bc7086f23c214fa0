"""Timing a call of the user's own by the protocol of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..arrays.frameworks import CPU, CUDA, framework_of
from ..arrays.view import view
from ..errors import InvalidArgumentError
from ..lab.libraries import CUPY, NUMPY, ArrayLibrary, TorchLibrary
from ..lab.timing import Timing, graph_shape, make_timer, time_replays


def time_call(call: Callable[[Any], object], cold: Any) -> Timing:
    """Time a call of your own as the benchmarks time theirs: GPU time in a CUDA graph, with what it reads not in L2.

    Parameters
    ----------
    call
        Takes ``cold`` or a copy of it. On a GPU it launches on the current stream of the framework, does not
        synchronise, and writes to outputs that exist already (in CuPy; torch has memory for a graph).
    cold
        What each call is to find in device memory and not in the L2 cache, e.g. the KV cache: an array of torch, CuPy
        or NumPy, or a tuple of arrays. Successive calls get different copies, 256 MB in all. On the CPU wall time is
        measured, on ``cold`` itself.

    Returns
    -------
    Timing
        ``seconds`` is the median of five replays of a graph of 4 to 1,024 calls (three calls on the CPU); ``protocol``
        says so in words.

    Raises
    ------
    InvalidArgumentError
        ``cold`` is no such array or tuple, or its arrays are of several frameworks or devices.

    Examples
    --------
    >>> import numpy as np
    >>> time_call(lambda array: array.sum(), np.ones(1000)).calls
    1
    """
    parts = cold if isinstance(cold, tuple) else (cold,)
    if not parts:
        raise InvalidArgumentError("cold", "an array or a tuple of arrays", "an empty tuple")
    said = {(framework_of(part, "cold"), view(part, "cold").location) for part in parts}
    if len(said) != 1:
        raise InvalidArgumentError("cold", "arrays of one framework on one device", str(sorted(said)))
    [(framework, (device, _))] = said
    library = _library(framework, device)
    if library is NUMPY:
        return time_replays(make_timer(library, call, [cold], 1), 1, 1)
    calls, copies = graph_shape(sum(part.nbytes for part in parts))
    caches = [cold, *(_copy(cold) for _ in range(copies - 1))]
    return time_replays(make_timer(library, call, caches, calls), calls, copies)


def _library(framework: str, device: str) -> ArrayLibrary:
    if device == CPU:
        return NUMPY
    if device == CUDA and framework == "torch":
        return TorchLibrary()
    if framework != "cupy":
        raise InvalidArgumentError("cold", "arrays of torch or CuPy on a GPU (a CUDA graph holds no others)", framework)
    return CUPY


def _copy(cold: Any) -> Any:
    if isinstance(cold, tuple):
        return tuple(map(_copy, cold))
    return cold.clone() if hasattr(cold, "clone") else cold.copy()
