"""Appending in programs that JAX compiles (`cupy_mla.jax_ops` has it): XLA's custom call, whose result is the cache.

JAX's arrays do not change. The result of the call shares the memory of its first inputs, the cache, by XLA's own rules:
a cache that the program does not need any more (or that was donated to it) is written in place, another copied before.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import xla
from ..arrays.exchange import as_numpy
from ..arrays.view import ArrayView
from ..arrays.xla import CustomCall, start, view_buffer, view_hosts
from ..call.traced import jax_module, like, take_parts, two_parts, views_of_parts
from ..layouts import LAYOUTS, find_layout
from . import append
from .append import run_append
from .new_tokens import APPEND_PARTS, AppendArrays, describe_append

_TARGET = "cupy_mla.append_tokens"
# By number: longer strings arrive damaged as attributes of custom calls (jax-tvm-ffi 0.1.3).
_LAYOUTS = (None, *LAYOUTS.values())


@like(append.append_tokens)
def append_tokens(
    kv_cache: Any, kv_new: Any, slot_mapping: Any = None, *, platform: str | None = None, **named: Any
) -> Any:
    """`cupy_mla.append_tokens`, which returns the cache with the tokens in it: JAX's arrays do not change.

    The memory of ``kv_cache`` is used again where the program does not need its old contents, which inside ``jax.jit``
    takes a donated argument (``donate_argnums``); otherwise the cache is copied first.

    Parameters
    ----------
    kv_cache, kv_new, slot_mapping
        As in `cupy_mla.append_tokens`; JAX has int64 arrays only with ``jax_enable_x64``, so slots may be int32.
    platform
        As in `cupy_mla.jax_ops.mla_decode`.
    **named
        ``block_table``, ``positions``, ``requests``, ``kv_scale`` and ``layout``, as in `cupy_mla.append_tokens`.

    Returns
    -------
    The new cache: an array, or the pair (latent, rope).

    Raises
    ------
    InvalidArgumentError
        An array has a wrong rank, shape, type or alignment, or the layout or the scale is wrong; raised while tracing.
    TypeError
        There is no argument of that name.
    UnsupportedDeviceError
        The GPU is not Hopper, the platform is neither CPU nor CUDA, or the settings ask for the other backend.
    MissingDependencyError
        The platform is CUDA and jax-tvm-ffi is not installed.
    """
    jax = jax_module()
    layout = named.pop("layout", None)
    parts = (*two_parts(kv_cache, "kv_cache"), *two_parts(kv_new, "kv_new"), slot_mapping)
    names_of_places = APPEND_PARTS[len(parts) : -1]
    if str(getattr(slot_mapping, "dtype", "")).startswith("int") and all(
        named.get(name) is None for name in names_of_places
    ):
        slots = jax.numpy.asarray(slot_mapping)
        parts = (*parts[:-1], slots)
        if slots.dtype == "int32" and hasattr(parts[0], "shape"):
            # A slot is a position in a request whose pages are those of the cache, one after the other.
            pages = jax.numpy.arange(parts[0].shape[0], dtype="int32")
            parts = (*parts[:-1], None)
            named |= {"block_table": pages[None], "positions": slots, "requests": jax.numpy.zeros_like(slots)}
    parts = take_parts(APPEND_PARTS, parts, named)
    names = ("kv_cache", "kv_cache[1]", "kv_new", "kv_new[1]", *APPEND_PARTS[4:])
    arrays, views, location = views_of_parts(parts, names, platform)
    describe_append(_arrays_of(views), None, layout)
    number_of_layout = _LAYOUTS.index(None if layout is None else find_layout(layout))
    given = sum(1 << index for index, part in enumerate(parts) if part is not None)
    caches = [part for part in parts[:2] if part is not None]
    results = tuple(jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in caches)
    if register_calls(location[0]):
        aliases = {index: index for index in range(len(caches))}
        call = jax.ffi.ffi_call(_TARGET, results, input_output_aliases=aliases)
        new = call(*arrays, given=np.int64(given), layout=np.int64(number_of_layout))
    else:
        new = jax.pure_callback(functools.partial(_append_in_callback, given, number_of_layout), results, *arrays)
    return new[0] if len(new) == 1 else tuple(new)


def _arrays_of(parts: Sequence[Any]) -> AppendArrays:
    """One array or None for each of `APPEND_PARTS`."""
    kv_cache, kv_rope, kv_new, kv_new_rope, *others = parts
    return AppendArrays(
        kv_cache if kv_rope is None else (kv_cache, kv_rope),
        kv_new if kv_new_rope is None else (kv_new, kv_new_rope),
        *others,
    )


def _append_in_callback(given: int, layout: int, *arrays: Any) -> tuple[np.ndarray, ...]:
    """The NumPy backend, on what ``jax.pure_callback`` brings."""
    caches = [np.array(array) for array in arrays[: _num_caches(given)]]
    _append(given, layout, view_hosts([*caches, *arrays[len(caches) :]]), None)
    return tuple(caches)


def _run(given: int, layout: int, *buffers: Any) -> None:
    """The custom call: the attributes, then the inputs, then the cache or its two parts."""
    views = [view_buffer(buffer) for buffer in buffers]
    num_inputs = given.bit_count()
    inputs, results = views[:num_inputs], views[num_inputs:]
    stream = start(results[0].location)
    for old, new in zip(inputs, results, strict=False):
        if old.pointer != new.pointer and stream is None:
            as_numpy(new)[...] = as_numpy(old)
    _append(given, layout, [*results, *inputs[len(results) :]], stream)


def _append(given: int, layout: int, arrays: list[ArrayView], stream: int | None) -> None:
    rest = iter(arrays)
    parts = [next(rest) if given >> index & 1 else None for index in range(len(APPEND_PARTS))]
    run_append(describe_append(_arrays_of(parts), stream, _LAYOUTS[layout]), stream)


def _num_caches(given: int) -> int:
    return (given & 0b11).bit_count()


@functools.cache
def register_calls(device: str) -> bool:
    """Register the custom call for a device; False where jax-tvm-ffi is missing and not needed.

    Raises
    ------
    MissingDependencyError
        It is missing, and the device is a GPU.
    """
    return xla.register({_TARGET: CustomCall(_run, ("given", "layout"))}, device)
