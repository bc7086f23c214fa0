"""What runs for `cupy_mla.jax_ops.append_tokens`: XLA's custom call, whose result is the cache it was given.

JAX's arrays do not change. The result of the call shares the memory of its first inputs, the cache, by XLA's own rules:
a cache that the program does not need any more (or that was donated to it) is written in place, another copied before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays.exchange import as_numpy
from ..arrays.view import ArrayView
from ..arrays.xla import CustomCall, start, view_buffer, view_hosts
from .append import run_append
from .new_tokens import AppendArrays, describe_append

TARGET = "cupy_mla.append_tokens"
# Arrays of a call, those of a pair apart: bit i of the attribute says whether the i-th is there.
PARTS = ("kv_cache", "kv_rope", "kv_new", "kv_new_rope", "slot_mapping", "block_table", "positions", "requests")


def arrays_of(parts: Sequence[Any]) -> AppendArrays:
    """One array or None for each of `PARTS`."""
    kv_cache, kv_rope, kv_new, kv_new_rope, *places = parts
    return AppendArrays(
        kv_cache if kv_rope is None else (kv_cache, kv_rope),
        kv_new if kv_new_rope is None else (kv_new, kv_new_rope),
        *places,
    )


def append_in_callback(given: int, *arrays: Any) -> tuple[np.ndarray, ...]:
    """The NumPy backend, on what ``jax.pure_callback`` brings."""
    caches = [np.array(array) for array in arrays[: _num_caches(given)]]
    _append(given, view_hosts([*caches, *arrays[len(caches) :]]), None)
    return tuple(caches)


def _run(given: int, *buffers: Any) -> None:
    """The custom call: the attribute, then the inputs, then the cache or its two parts."""
    views = [view_buffer(buffer) for buffer in buffers]
    num_inputs = given.bit_count()
    inputs, results = views[:num_inputs], views[num_inputs:]
    stream = start(results[0].location)
    for old, new in zip(inputs, results, strict=False):
        if old.pointer != new.pointer and stream is None:
            as_numpy(new)[...] = as_numpy(old)
    _append(given, [*results, *inputs[len(results) :]], stream)


def _append(given: int, arrays: list[ArrayView], stream: int | None) -> None:
    rest = iter(arrays)
    parts = [next(rest) if given >> index & 1 else None for index in range(len(PARTS))]
    run_append(describe_append(arrays_of(parts), stream), stream)


def _num_caches(given: int) -> int:
    return (given & 0b11).bit_count()


CALLS = {TARGET: CustomCall(_run, ("given",))}
