"""Appending in programs that JAX compiles (`cupy_mla.jax_ops` has it)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..call.traced import jax_module, like, take_parts, two_parts
from . import append
from .append import run_append
from .jax_in_place import InPlaceCall, Options, pair
from .new_tokens import APPEND_PARTS, AppendArrays, describe_append


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
    return _APPEND.trace(take_parts(APPEND_PARTS, parts, named), layout, None, platform)


def _arrays_of(parts: Sequence[Any]) -> AppendArrays:
    """One array or None for each of `APPEND_PARTS`."""
    kv_cache, kv_rope, kv_new, kv_new_rope, *others = parts
    return AppendArrays(pair(kv_cache, kv_rope), pair(kv_new, kv_new_rope), *others)


def _check(parts: Sequence[Any], options: Options) -> None:
    describe_append(_arrays_of(parts), None, options.layout)


def _run(parts: Sequence[Any], options: Options, stream: int | None) -> None:
    run_append(describe_append(_arrays_of(parts), stream, options.layout), stream)


_APPEND = InPlaceCall(
    "cupy_mla.append_tokens",
    ("kv_cache", "kv_cache[1]", "kv_new", "kv_new[1]", *APPEND_PARTS[4:]),
    _check,
    _run,
)
