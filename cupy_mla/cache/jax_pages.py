"""Calls on whole pages of a cache in programs that JAX compiles (`cupy_mla.jax_ops` has them)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..call.traced import like, scale_as_array, two_parts
from . import convert
from . import copy_pages as copying
from .convert import ConvertArrays, describe_conversion, run_conversion
from .copy_pages import CopyArrays, describe_copies, run_copies
from .jax_in_place import InPlaceCall, Options, pair


@like(copying.copy_pages)
def copy_pages(
    kv_cache: Any,
    source_pages: Any = None,
    target_pages: Any = None,
    *,
    source: Any = None,
    validate: bool | None = None,
    platform: str | None = None,
) -> Any:
    """`cupy_mla.copy_pages`, which returns the cache with the pages copied: JAX's arrays do not change.

    The memory of ``kv_cache`` is used again as in `append_tokens`. What ``validate`` finds is raised when the program
    runs.

    Returns
    -------
    The new cache: an array, or the pair (latent, rope).

    Raises
    ------
    InvalidArgumentError
        An array has a wrong rank, shape, type or alignment, or the layout or the scale is wrong; raised while tracing.
    UnsupportedDeviceError
        The GPU is not Hopper, the platform is neither CPU nor CUDA, or the settings ask for the other backend.
    MissingDependencyError
        The platform is CUDA and jax-tvm-ffi is not installed.
    """
    parts = *two_parts(kv_cache, "kv_cache"), *two_parts(source, "source"), source_pages, target_pages
    return _COPY.trace(parts, None, validate, platform)


@like(convert.quantise_cache)
def quantise_cache(
    kv_cache: Any,
    values: Any,
    *,
    pages: Any = None,
    kv_scale: Any = None,
    layout: Any = None,
    validate: bool | None = None,
    platform: str | None = None,
) -> Any:
    """`cupy_mla.quantise_cache`, which returns the cache with the pages in it; else as `copy_pages`.

    Raises
    ------
    InvalidArgumentError
        An array has a wrong rank, shape, type or alignment, or the layout or the scale is wrong; raised while tracing.
    UnsupportedDeviceError
        The GPU is not Hopper, the platform is neither CPU nor CUDA, or the settings ask for the other backend.
    MissingDependencyError
        The platform is CUDA and jax-tvm-ffi is not installed.
    """
    parts = *two_parts(kv_cache, "kv_cache"), *two_parts(values, "values"), pages, scale_as_array(kv_scale)
    return _QUANTISE.trace(parts, layout, validate, platform)


@like(convert.dequantise_cache)
def dequantise_cache(
    kv_cache: Any,
    values: Any,
    *,
    pages: Any = None,
    kv_scale: Any = None,
    layout: Any = None,
    validate: bool | None = None,
    platform: str | None = None,
) -> Any:
    """`cupy_mla.dequantise_cache`, which returns the values, in the memory of those that it was given; else as
    `copy_pages`.

    Raises
    ------
    InvalidArgumentError
        An array has a wrong rank, shape, type or alignment, or the layout or the scale is wrong; raised while tracing.
    UnsupportedDeviceError
        The GPU is not Hopper, the platform is neither CPU nor CUDA, or the settings ask for the other backend.
    MissingDependencyError
        The platform is CUDA and jax-tvm-ffi is not installed.
    """
    parts = *two_parts(values, "values"), *two_parts(kv_cache, "kv_cache"), pages, scale_as_array(kv_scale)
    return _DEQUANTISE.trace(parts, layout, validate, platform)


def _copy_arrays(parts: Sequence[Any]) -> CopyArrays:
    kv_cache, kv_rope, source, source_rope, source_pages, target_pages = parts
    return CopyArrays(pair(kv_cache, kv_rope), source_pages, target_pages, pair(source, source_rope))


def _check_copies(parts: Sequence[Any], options: Options) -> None:
    describe_copies(_copy_arrays(parts))


def _run_copies(parts: Sequence[Any], options: Options, stream: int | None) -> None:
    run_copies(describe_copies(_copy_arrays(parts), stream), options.validate, stream)


def _convert_arrays(parts: Sequence[Any], reads: bool) -> ConvertArrays:
    first, second = pair(*parts[:2]), pair(*parts[2:4])
    kv_cache, values = (second, first) if reads else (first, second)
    return ConvertArrays(kv_cache, values, *parts[4:])


def _conversion(target: str, written: str, read: str, *, reads: bool) -> InPlaceCall:
    def check(parts: Sequence[Any], options: Options) -> None:
        describe_conversion(_convert_arrays(parts, reads), options.layout, reads=reads)

    def run(parts: Sequence[Any], options: Options, stream: int | None) -> None:
        conversion = describe_conversion(_convert_arrays(parts, reads), options.layout, stream, reads=reads)
        run_conversion(conversion, options.validate, stream)

    return InPlaceCall(target, (written, f"{written}[1]", read, f"{read}[1]", "pages", "kv_scale"), check, run)


_COPY = InPlaceCall(
    "cupy_mla.copy_pages",
    ("kv_cache", "kv_cache[1]", "source", "source[1]", "source_pages", "target_pages"),
    _check_copies,
    _run_copies,
)
_QUANTISE = _conversion("cupy_mla.quantise_cache", "kv_cache", "values", reads=False)
_DEQUANTISE = _conversion("cupy_mla.dequantise_cache", "values", "kv_cache", reads=True)
