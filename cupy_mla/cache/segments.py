"""The columns that move between a cache and rows of tokens: views of both sides, matched.

Rows of one element type belong to a cache of the same, or to one that holds fewer bits of each value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import view as arrays
from ..arrays.frameworks import CUDA, current_stream, framework_of
from ..arrays.view import ArrayView
from ..call.arguments import check_no_overlap
from ..errors import InvalidArgumentError
from ..kernels.append import CHUNK_BYTES
from ..layouts.base import CACHE_RANK

TOKEN_AXIS = 1  # of a cache
_ROWS_RANK = 3
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Segment:
    """Columns that are contiguous on both sides: ``width`` values from a first column of each.

    Attributes
    ----------
    cache, cache_column
        The cache, and where in its rows the first value lies, in elements.
    rows, rows_column
        The tokens [num_tokens, num_heads_kv, d], in the same way.
    width
        How many values.
    value_bits
        What a value takes in the cache.
    token_bytes
        From the values of one token of a page of the cache to those of the next.
    rows_page_step
        Of rows in pages: bytes from where a page's tokens end to where the next page's begin.
    """

    cache: ArrayView
    cache_column: int
    rows: ArrayView
    rows_column: int
    width: int
    value_bits: int
    token_bytes: int
    rows_page_step: int = 0


def parts_of(value: Any, name: str) -> list[tuple[Any, str]]:
    """An array and its name, or those of the parts of a pair.

    Raises
    ------
    InvalidArgumentError
        It is a list or tuple of another length than two.
    """
    if not isinstance(value, (tuple, list)):
        return [(value, name)]
    if len(value) != 2:
        raise InvalidArgumentError(name, "an array or a pair (latent, rope)", f"{len(value)} items")
    return [(part, f"{name}[{index}]") for index, part in enumerate(value)]


def first_part(value: Any) -> Any:
    """An array, or the first of a pair; what is neither as it is."""
    return value[0] if isinstance(value, (tuple, list)) and value else value


def stream_of(array: Any, name: str) -> int | None:
    """The current stream of an array's framework; None on the CPU.

    Raises
    ------
    InvalidArgumentError
        It is no array; the error calls it ``name``.
    """
    seen = arrays.view(array, name)
    return current_stream(array, seen.device_id) if seen.device == CUDA else None


def view_pages(pages: Any, stream: int | None, name: str = "kv_cache", *, written: bool) -> list[ArrayView]:
    """A cache, or another array of pages, or its two parts.

    Parameters
    ----------
    name
        What errors call it.
    written
        Whether it is to be written to.

    Raises
    ------
    InvalidArgumentError
        It has a wrong rank, shape or strides, or is to be written to and cannot be.
    """
    views = []
    for part, part_name in parts_of(pages, name):
        view = arrays.view(part, part_name, stream)
        if view.ndim != CACHE_RANK:
            raise InvalidArgumentError(part_name, "shape [num_pages, page_size, num_heads_kv, d]", str(view.shape))
        if written:
            _check_writable(part, view, part_name)
        check_last_contiguous(view, part_name)
        views.append(view)
    if views[0].shape[1] < 1:
        raise InvalidArgumentError(name, "a page_size of at least 1", str(views[0].shape))
    if views[0].shape[0] > _INT32_MAX:
        raise InvalidArgumentError(name, "fewer than 2^31 pages", str(views[0].shape))
    if views[-1].shape[:3] != views[0].shape[:3]:
        raise InvalidArgumentError(
            f"{name}[1]", f"[num_pages, page_size, num_heads_kv] = {views[0].shape[:3]}", str(views[1].shape)
        )
    return views


def _check_writable(part: Any, view: ArrayView, name: str) -> None:
    # JAX hands out its buffers through DLPack but counts on nobody writing to them.
    if not isinstance(part, ArrayView) and framework_of(part) == "jax":
        raise InvalidArgumentError(name, "an array that can be written to", "a JAX array, which is immutable")
    if isinstance(part, np.ndarray) and not part.flags.writeable:
        raise InvalidArgumentError(name, "an array that can be written to", "a read-only NumPy array")
    check_no_overlap(view, name)


def view_rows(kv_new: Any, stream: int | None) -> list[ArrayView]:
    """The new rows, or their two parts, each [num_tokens, num_heads_kv, d].

    Raises
    ------
    InvalidArgumentError
        They have a wrong rank, shape or strides.
    """
    views = []
    for part, name in parts_of(kv_new, "kv_new"):
        view = arrays.view(part, name, stream)
        if view.ndim == _ROWS_RANK - 1:  # [num_tokens, d]: one KV head
            view = ArrayView(
                pointer=view.pointer,
                shape=(view.shape[0], 1, view.shape[1]),
                strides=(view.strides[0], view.shape[1], view.strides[1]),
                dtype=view.dtype,
                device=view.device,
                device_id=view.device_id,
                owner=view.owner,
            )
        if view.ndim != _ROWS_RANK:
            raise InvalidArgumentError(name, "shape [num_tokens, num_heads_kv, d] or [num_tokens, d]", str(view.shape))
        check_last_contiguous(view, name)
        views.append(view)
    if views[0].shape[0] > _INT32_MAX:
        raise InvalidArgumentError("kv_new", "fewer than 2^31 tokens", str(views[0].shape))
    if views[-1].shape[:2] != views[0].shape[:2]:
        raise InvalidArgumentError(
            "kv_new[1]", f"[num_tokens, num_heads_kv] = {views[0].shape[:2]}", str(views[1].shape)
        )
    return views


def check_last_contiguous(view: ArrayView, name: str) -> None:
    """Refuse an array whose last dimension has gaps.

    Raises
    ------
    InvalidArgumentError
        Its last dimension is not contiguous.
    """
    # Strides mean nothing in an array without elements, nor in a dimension of one.
    if 0 not in view.shape and view.shape[-1] > 1 and view.strides[-1] != 1:
        raise InvalidArgumentError(name, "a contiguous last dimension", f"stride {view.strides[-1]}")


def check_same_place(view: ArrayView, name: str, reference: ArrayView) -> None:
    """Refuse an array that is not where the cache is.

    Raises
    ------
    InvalidArgumentError
        It is on another device.
    """
    if (view.device, view.device_id) != (reference.device, reference.device_id):
        raise InvalidArgumentError(
            name,
            f"an array on kv_cache's device {reference.device}:{reference.device_id}",
            f"{view.device}:{view.device_id}",
        )


def _check_together(cache_views: list[ArrayView], rows_views: list[ArrayView], rows_dtype: str, rows_name: str) -> None:
    """One device, one number of heads and one width on both sides, and the types that belong together."""
    reference = cache_views[0]
    sides = ("kv_cache", cache_views, reference.dtype), (rows_name, rows_views, rows_dtype)
    for name, views, dtype in sides:
        for view in views:
            if view.dtype != dtype:
                of_what = "cache" if dtype == reference.dtype else "other part"
                raise InvalidArgumentError(name, f"the type {dtype} of the {of_what}", view.dtype)
            check_same_place(view, name, reference)
    if rows_views[0].shape[1] != reference.shape[2]:
        raise InvalidArgumentError(rows_name, f"num_heads_kv = {reference.shape[2]}", str(rows_views[0].shape[1]))
    cache_widths = [view.shape[-1] for view in cache_views]
    rows_widths = [view.shape[-1] for view in rows_views]
    both_pairs = len(cache_views) == len(rows_views) == 2
    if sum(cache_widths) != sum(rows_widths) or (both_pairs and cache_widths != rows_widths):
        raise InvalidArgumentError(
            rows_name,
            "the widths of kv_cache, " + " + ".join(map(str, cache_widths)),
            " + ".join(map(str, rows_widths)),
        )


def match_segments(
    cache_views: list[ArrayView], rows_views: list[ArrayView], rows_dtype: str, rows_name: str = "kv_new"
) -> list[Segment]:
    """Column ranges that belong together: one when both sides are packed, else the two parts of the pair.

    Parameters
    ----------
    rows_dtype
        What the rows' type has to be.
    rows_name
        What errors call the rows.

    Raises
    ------
    InvalidArgumentError
        The rows have another type, or the sides differ in device, number of heads or widths.
    """
    _check_together(cache_views, rows_views, rows_dtype, rows_name)
    pair = cache_views if len(cache_views) == 2 else rows_views
    segments = []
    column = 0
    for index, part in enumerate(pair):
        width = part.shape[-1]
        cache_column = column if len(cache_views) == 1 else 0
        rows_column = column if len(rows_views) == 1 else 0
        cache = cache_views[min(index, len(cache_views) - 1)]
        rows = rows_views[min(index, len(rows_views) - 1)]
        if width > 0:
            token_bytes = cache.strides[1] * cache.itemsize
            segments.append(Segment(cache, cache_column, rows, rows_column, width, 8 * cache.itemsize, token_bytes))
        column += width
    return segments


def check_chunks(segments: list[Segment], rows_name: str = "kv_new") -> None:
    """The kernels take 16 bytes of a row at a time, and what belongs to them of the cache. Addresses, strides and
    widths have to allow that.

    Raises
    ------
    InvalidArgumentError
        An address, a stride or a width is no multiple of the bytes that are moved at a time.
    """
    for segment in segments:
        cache, rows = segment.cache, segment.rows
        cached = CHUNK_BYTES // rows.itemsize * segment.value_bits // 8
        sides = (
            ("kv_cache", cache, segment.cache_column, segment.value_bits, cached),
            (rows_name, rows, segment.rows_column, 8 * rows.itemsize, CHUNK_BYTES),
        )
        for name, view, column, value_bits, chunk in sides:
            values = {"width": segment.width * value_bits // 8, "address": view.pointer + column * view.itemsize}
            if view is rows:
                values["step from page to page"] = segment.rows_page_step
            for axis, (size, stride) in enumerate(zip(view.shape[:-1], view.strides[:-1], strict=True)):
                if size > 1:
                    of_tokens = view is cache and axis == TOKEN_AXIS
                    values[f"stride of dimension {axis}"] = segment.token_bytes if of_tokens else stride * view.itemsize
            for what, value in values.items():
                if value % chunk != 0:
                    raise InvalidArgumentError(name, f"{what} a multiple of {chunk} bytes", f"{value} bytes")
