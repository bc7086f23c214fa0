"""Whole pages of 16-bit values to a cache of fewer bits, and back.

One kernel launch on a Hopper GPU (kernels_cu/cache/quantise.cu, as of appends, or dequantise.cu), the layouts' own
NumPy on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arrays.dtypes import numpy_dtype
from ..arrays.exchange import as_numpy, keep_imported
from ..arrays.frameworks import CUDA, check_stream
from ..arrays.view import ArrayView
from ..call.arguments import as_boolean, settled_strides
from ..errors import InvalidArgumentError
from ..gpu.device import require_backend
from ..layouts import DENSE_LAYOUTS, CacheLayout
from ..layouts.block_scaled import BlockScaled
from .new_tokens import Append, Places
from .page_numbers import Numbers, check_numbers, read_numbers, view_numbers
from .quantise import put_numpy, quantised_segments, settle_quantiser
from .segments import Segment, check_chunks, parts_of, stream_of, view_pages

_VALUES = "values"
_MAX_TOKENS = 2**31 - 1


def quantise_cache(
    kv_cache: Any,
    values: Any,
    *,
    pages: Any = None,
    kv_scale: Any = None,
    layout: CacheLayout | str | None = None,
    validate: bool | None = None,
    stream: int | None = None,
) -> None:
    """Round pages of 16-bit values to a cache in an FP8 or FP4 layout, in place.

    Parameters
    ----------
    kv_cache
        [num_pages, page_size, num_heads_kv, width] of the layout, or for ``fp8_e4m3`` the pair (latent, rope) of such
        arrays; it is written to. Pages may have any strides that the layout takes.
    values
        bfloat16 or float16 [n, page_size, num_heads_kv, d], or the pair (latent, rope). Pages, tokens and heads may
        have any strides.
    pages
        int32 [n]: where each of the pages goes. None: there are as many as in the cache, in turn. One that is outside
        of the cache (-1 says so on purpose) is not written; of two that go to one page either may stay.
    kv_scale
        For ``fp8_e4m3`` what stored values are to be multiplied by: a number, or one float32 in an array [] or [1] on
        the cache's device, which is read when the kernel runs; or two of either, as in `cupy_mla.append_tokens`.
    layout
        As in `cupy_mla.append_tokens`.
    validate
        Whether page numbers are read and checked, which waits for the GPU. None: on the CPU, or if CUPY_MLA_VALIDATE
        says so.
    stream
        Raw CUDA stream; the current stream of the framework of ``values`` if not given.

    Raises
    ------
    InvalidArgumentError
        An argument of the wrong rank, shape, type, device, strides or alignment, a cache of 16-bit values or one that
        cannot be written to, a layout that is unknown or in doubt, a scale that is missing or out of place, or a page
        number that validation found wrong. Nothing is written then.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    _convert(ConvertArrays(kv_cache, values, pages, kv_scale), layout, validate, stream, reads=False)


def dequantise_cache(
    kv_cache: Any,
    values: Any,
    *,
    pages: Any = None,
    kv_scale: Any = None,
    layout: CacheLayout | str | None = None,
    validate: bool | None = None,
    stream: int | None = None,
) -> None:
    """Read pages of a cache in an FP8 or FP4 layout as 16-bit values, into an array that is given.

    A value is its code times its scale in float32, rounded once to the type of ``values``.

    Parameters
    ----------
    kv_cache, kv_scale, layout, validate, stream
        As in `quantise_cache`; the cache is only read.
    values
        As in `quantise_cache`; it is written to.
    pages
        int32 [n]: which pages are read, e.g. a row of a block table. None: all of them, in turn. For one that is
        outside of the cache nothing is written.

    Raises
    ------
    InvalidArgumentError
        An argument of the wrong rank, shape, type, device, strides or alignment, a cache of 16-bit values, values that
        cannot be written to, a layout that is unknown or in doubt, a scale that is missing or out of place, or a page
        number that validation found wrong. Nothing is written then.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    _convert(ConvertArrays(kv_cache, values, pages, kv_scale), layout, validate, stream, reads=True)


@dataclass(frozen=True, slots=True, eq=False)
class ConvertArrays:
    """The arrays of a conversion as given: of any framework, or views; ``kv_scale`` may be a number, or two."""

    kv_cache: Any
    values: Any
    pages: Any = None
    kv_scale: Any = None


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that was checked.

    Attributes
    ----------
    tokens
        Its tokens as those of an append, or of a read.
    values
        The pages of 16-bit values, or the two parts of them.
    pages
        [n] where they go or come from; None: 0, 1, 2, ...
    """

    tokens: Append
    values: list[ArrayView]
    pages: ArrayView | None


def _convert(
    given: ConvertArrays, layout: CacheLayout | str | None, validate: bool | None, stream: int | None, *, reads: bool
) -> None:
    check_stream(stream)
    if validate is not None:
        validate = as_boolean(validate, "validate")
    if stream is None:
        stream = stream_of(*parts_of(given.values, _VALUES)[0])
    conversion = describe_conversion(given, layout, stream, reads=reads)
    run_conversion(conversion, validate, stream)
    if stream is not None:
        keep_imported(conversion.tokens.parts(), stream)


def describe_conversion(
    given: ConvertArrays, layout: CacheLayout | str | None = None, stream: int | None = None, *, reads: bool
) -> Conversion:
    """Check the arrays of a conversion, from the cache if it ``reads``. Reads no array's contents.

    Raises
    ------
    InvalidArgumentError
        An array has a wrong rank, shape, type, device, strides or alignment or cannot be written to where it has to be,
        the layout is unknown or in doubt, or a scale is missing or out of place.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    caches = view_pages(given.kv_cache, stream, written=not reads)
    values = view_pages(given.values, stream, _VALUES, written=reads)
    for part in values:
        if part.dtype not in DENSE_LAYOUTS:
            raise InvalidArgumentError(_VALUES, " or ".join(DENSE_LAYOUTS), part.dtype)
    if caches[0].dtype in DENSE_LAYOUTS:
        expected = "a cache in an FP8 or FP4 layout (pages of 16-bit values are copied by copy_pages)"
        raise InvalidArgumentError("kv_cache", expected, caches[0].dtype)
    rows = [_as_rows(part) for part in values]
    quantiser = settle_quantiser(caches, rows, given.kv_scale, layout, stream)
    assert quantiser is not None  # the two sides differ in type
    num_pages, page_size = values[0].shape[:2]
    expected_pages = caches[0].shape[0] if given.pages is None else num_pages
    if (num_pages, page_size) != (expected_pages, caches[0].shape[1]):
        words = f"[{expected_pages}, {caches[0].shape[1]}, num_heads_kv, d] as kv_cache" + " and pages" * (
            given.pages is not None
        )
        raise InvalidArgumentError(_VALUES, words, str(list(values[0].shape)))
    if num_pages * page_size > _MAX_TOKENS:
        raise InvalidArgumentError(_VALUES, "fewer than 2^31 tokens", str(list(values[0].shape)))
    pages = view_numbers(given.pages, "pages", num_pages, caches[0], stream)
    segments = [
        replace(segment, rows_page_step=_page_step(values[_index_of(segment, rows)]))
        for segment in quantised_segments(quantiser.layout, caches, rows, _VALUES)
    ]
    if require_backend(*caches[0].location, "kv_cache"):
        check_chunks(segments, _VALUES)
    num_tokens = rows[0].shape[0]
    table = None if pages is None else replace(pages, shape=(1, num_pages), strides=(num_pages, 1))
    places = Places(None, table, None, None, max(1, num_tokens))
    tokens = Append(caches, rows, segments if num_tokens else [], places, num_tokens, quantiser, reads)
    return Conversion(tokens, values, pages)


def run_conversion(conversion: Conversion, validate: bool | None, stream: int | None) -> None:
    """Do what was checked; on a GPU on a stream.

    Raises
    ------
    InvalidArgumentError
        A page number that validation found wrong.
    """
    tokens = conversion.tokens
    check_numbers(conversion.pages, "pages", tokens.caches[0], validate, stream, written=not tokens.reads)
    if not tokens.segments:
        return
    if tokens.location[0] != CUDA:
        pages = read_numbers(conversion.pages, conversion.values[0].shape[0])
        kept = np.flatnonzero((pages >= 0) & (pages < tokens.caches[0].shape[0]))
        (_read_numpy if tokens.reads else _write_numpy)(conversion, kept, pages[kept])
        return
    from .append_call import AppendCall  # what reaches the driver is only loaded for arrays that are on a GPU

    call = AppendCall(tokens)
    call(tuple(0 if part is None else part.pointer for part in tokens.parts()), 0 if stream is None else stream)


def _as_rows(pages: ArrayView) -> ArrayView:
    """Pages as rows of tokens [num_pages * page_size, num_heads_kv, d], `_page_step` apart where a page ends."""
    num_pages, page_size, heads, width = pages.shape
    _, *strides = settled_strides(pages)
    return replace(pages, shape=(num_pages * page_size, heads, width), strides=tuple(strides))


def _page_step(pages: ArrayView) -> int:
    """From where the tokens of a page end to where those of the next begin, in bytes."""
    page, token, *_ = settled_strides(pages)
    return (page - pages.shape[1] * token) * pages.itemsize


def _index_of(segment: Segment, rows: list[ArrayView]) -> int:
    return next(index for index, part in enumerate(rows) if part is segment.rows)


def _write_numpy(conversion: Conversion, kept: Numbers, pages: Numbers) -> None:
    tokens = conversion.tokens
    page_size = tokens.caches[0].shape[1]
    assert tokens.quantiser is not None
    values = []
    for segment in tokens.segments:
        part = as_numpy(conversion.values[_index_of(segment, tokens.rows)])[kept]
        columns = part[..., segment.rows_column : segment.rows_column + segment.width].astype(np.float32)
        values.append(columns.reshape(-1, *columns.shape[2:]))
    offsets = np.tile(np.arange(page_size), pages.size)
    put_numpy(tokens.quantiser, tokens.segments, np.repeat(pages, page_size), offsets, values)


def _read_numpy(conversion: Conversion, kept: Numbers, pages: Numbers) -> None:
    tokens = conversion.tokens
    assert tokens.quantiser is not None
    layout = tokens.quantiser.layout
    page_size, heads = tokens.caches[0].shape[1:3]
    slots = (pages[:, None] * page_size + np.arange(page_size)).reshape(-1)
    column = 0
    for segment, scale in zip(tokens.segments, tokens.quantiser.factors(), strict=False):  # there may be no rope part
        target = as_numpy(conversion.values[_index_of(segment, tokens.rows)])
        stored = as_numpy(segment.cache)
        if isinstance(layout, BlockScaled):
            read = layout.dequantise_tokens(stored, slots, 0)[:, None, column : column + segment.width]
        else:
            stored = stored[..., segment.cache_column : segment.cache_column + segment.width]
            read = np.stack([layout.dequantise_tokens(stored, slots, head, scale) for head in range(heads)], axis=1)
        with np.errstate(over="ignore"):  # beyond float16's range
            rounded = read.astype(numpy_dtype(conversion.values[0].dtype))
        shape = kept.size, page_size, heads, segment.width
        assert math.prod(shape) == rounded.size
        target[kept, :, :, segment.rows_column : segment.rows_column + segment.width] = rounded.reshape(shape)
        column += segment.width
