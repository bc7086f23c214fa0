"""What an append writes and where to: its arguments as checked views, and the columns that are copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import view as arrays
from ..arrays.frameworks import CUDA, framework_of
from ..arrays.view import ArrayView
from ..call.arguments import check_no_overlap, misaligned
from ..errors import InvalidArgumentError
from ..gpu.device import require_backend
from ..kernels.append import CHUNK_BYTES
from ..layouts.base import CACHE_RANK

_ROWS_RANK = 3
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class AppendArrays:
    """The arrays of an append as given: of any framework, or views; as in `cupy_mla.append_tokens`."""

    kv_cache: Any
    kv_new: Any
    slot_mapping: Any = None
    block_table: Any = None
    positions: Any = None
    requests: Any = None


@dataclass(frozen=True, slots=True)
class Segment:
    """Columns that are contiguous on both sides: ``width`` elements from a first column of each."""

    cache: ArrayView
    cache_column: int
    rows: ArrayView
    rows_column: int
    width: int


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens go: a slot mapping, or a block table with positions (and requests)."""

    slot_mapping: ArrayView | None
    block_table: ArrayView | None
    positions: ArrayView | None
    requests: ArrayView | None
    tokens_per_request: int


def _parts(value: Any, name: str) -> list[tuple[Any, str]]:
    if not isinstance(value, (tuple, list)):
        return [(value, name)]
    if len(value) != 2:
        raise InvalidArgumentError(name, "an array or a pair (latent, rope)", f"{len(value)} items")
    return [(part, f"{name}[{index}]") for index, part in enumerate(value)]


def view_cache(kv_cache: Any, stream: int | None) -> list[ArrayView]:
    """The cache to write to, or its two parts.

    Raises
    ------
    InvalidArgumentError
        It has a wrong rank, shape or strides, or cannot be written to.
    """
    views = []
    for part, name in _parts(kv_cache, "kv_cache"):
        view = arrays.view(part, name, stream)
        if view.ndim != CACHE_RANK:
            raise InvalidArgumentError(name, "shape [num_pages, page_size, num_heads_kv, d]", str(view.shape))
        # JAX hands out its buffers through DLPack but counts on nobody writing to them.
        if not isinstance(part, ArrayView) and framework_of(part) == "jax":
            raise InvalidArgumentError(name, "an array that can be written to", "a JAX array, which is immutable")
        if isinstance(part, np.ndarray) and not part.flags.writeable:
            raise InvalidArgumentError(name, "an array that can be written to", "a read-only NumPy array")
        _check_last_contiguous(view, name)
        check_no_overlap(view, name)
        views.append(view)
    if views[0].shape[1] < 1:
        raise InvalidArgumentError("kv_cache", "a page_size of at least 1", str(views[0].shape))
    if views[0].shape[0] > _INT32_MAX:
        raise InvalidArgumentError("kv_cache", "fewer than 2^31 pages", str(views[0].shape))
    if views[-1].shape[:3] != views[0].shape[:3]:
        raise InvalidArgumentError(
            "kv_cache[1]", f"[num_pages, page_size, num_heads_kv] = {views[0].shape[:3]}", str(views[1].shape)
        )
    return views


def view_rows(kv_new: Any, stream: int | None) -> list[ArrayView]:
    """The new rows, or their two parts, each [num_tokens, num_heads_kv, d].

    Raises
    ------
    InvalidArgumentError
        They have a wrong rank, shape or strides.
    """
    views = []
    for part, name in _parts(kv_new, "kv_new"):
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
        _check_last_contiguous(view, name)
        views.append(view)
    if views[0].shape[0] > _INT32_MAX:
        raise InvalidArgumentError("kv_new", "fewer than 2^31 tokens", str(views[0].shape))
    if views[-1].shape[:2] != views[0].shape[:2]:
        raise InvalidArgumentError(
            "kv_new[1]", f"[num_tokens, num_heads_kv] = {views[0].shape[:2]}", str(views[1].shape)
        )
    return views


def _check_last_contiguous(view: ArrayView, name: str) -> None:
    # Strides mean nothing in an array without elements, nor in a dimension of one.
    if 0 not in view.shape and view.shape[-1] > 1 and view.strides[-1] != 1:
        raise InvalidArgumentError(name, "a contiguous last dimension", f"stride {view.strides[-1]}")


def _check_same_place(view: ArrayView, name: str, reference: ArrayView) -> None:
    if (view.device, view.device_id) != (reference.device, reference.device_id):
        raise InvalidArgumentError(
            name,
            f"an array on kv_cache's device {reference.device}:{reference.device_id}",
            f"{view.device}:{view.device_id}",
        )


def _check_together(cache_views: list[ArrayView], rows_views: list[ArrayView]) -> None:
    """One type, one device, one number of heads and one width on both sides."""
    reference = cache_views[0]
    for name, views in (("kv_cache", cache_views), ("kv_new", rows_views)):
        for view in views:
            if view.dtype != reference.dtype:
                raise InvalidArgumentError(name, f"the type {reference.dtype} of the cache", view.dtype)
            _check_same_place(view, name, reference)
    if rows_views[0].shape[1] != reference.shape[2]:
        raise InvalidArgumentError("kv_new", f"num_heads_kv = {reference.shape[2]}", str(rows_views[0].shape[1]))
    cache_widths = [view.shape[-1] for view in cache_views]
    rows_widths = [view.shape[-1] for view in rows_views]
    both_pairs = len(cache_views) == len(rows_views) == 2
    if sum(cache_widths) != sum(rows_widths) or (both_pairs and cache_widths != rows_widths):
        raise InvalidArgumentError(
            "kv_new",
            "the widths of kv_cache, " + " + ".join(map(str, cache_widths)),
            " + ".join(map(str, rows_widths)),
        )


def match_segments(cache_views: list[ArrayView], rows_views: list[ArrayView]) -> list[Segment]:
    """Column ranges to copy: one when both sides are packed, else the two parts of the pair.

    Raises
    ------
    InvalidArgumentError
        The sides differ in type, device, number of heads or widths.
    """
    _check_together(cache_views, rows_views)
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
            segments.append(Segment(cache, cache_column, rows, rows_column, width))
        column += width
    return segments


def _index_array(
    value: Any, name: str, dtype: str, shape: tuple[int | None, ...], cache: ArrayView, stream: int | None
) -> ArrayView:
    """View of an index array, after its type, shape (None: any size) and device are checked."""
    view = arrays.view(value, name, stream)
    expected = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    fits = view.ndim == len(shape) and all(
        size is None or size == got for size, got in zip(shape, view.shape, strict=True)
    )
    if view.dtype != dtype or not fits:
        raise InvalidArgumentError(name, f"{dtype} {expected}", f"{view.dtype} {list(view.shape)}")
    _check_same_place(view, name, cache)
    _check_last_contiguous(view, name)
    if view.device == CUDA and view.pointer % view.itemsize:
        raise misaligned(name, view.pointer, view.itemsize)
    return view


@dataclass(frozen=True, slots=True)
class Append:
    """An append that was checked.

    Attributes
    ----------
    segments
        What is copied; none where there is nothing to copy.
    places
        Where to.
    num_tokens
        How many rows.
    """

    segments: list[Segment]
    places: Places
    num_tokens: int

    @property
    def location(self) -> tuple[str, int]:
        """Device and its number, of all arrays."""
        return self.segments[0].cache.location

    def inputs(self) -> list[ArrayView | None]:
        """What is read."""
        places = self.places
        rows = [segment.rows for segment in self.segments]
        return [*rows, places.slot_mapping, places.block_table, places.positions, places.requests]


def describe_append(given: AppendArrays, stream: int | None = None) -> Append:
    """Check the arrays of an append. Reads no array's contents.

    Raises
    ------
    InvalidArgumentError
        An array has a wrong rank, shape, type, device, strides or alignment, or the cache cannot be written to.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    cache_views = view_cache(given.kv_cache, stream)
    rows_views = view_rows(given.kv_new, stream)
    segments = match_segments(cache_views, rows_views)
    num_tokens = rows_views[0].shape[0]
    places = describe_places(cache_views[0], num_tokens, given, stream)
    if require_backend(*cache_views[0].location, "kv_cache"):
        check_chunks(segments)
    return Append(segments if num_tokens else [], places, num_tokens)


def describe_places(cache: ArrayView, num_tokens: int, given: AppendArrays, stream: int | None) -> Places:
    """Where the tokens go.

    Raises
    ------
    InvalidArgumentError
        Both ways to say it are given or neither, or an index array has a wrong type, shape, device or strides.
    """
    if given.slot_mapping is not None:
        for name in ("block_table", "positions", "requests"):
            if getattr(given, name) is not None:
                raise InvalidArgumentError(name, "None beside slot_mapping", type(getattr(given, name)).__name__)
        slots = _index_array(given.slot_mapping, "slot_mapping", "int64", (num_tokens,), cache, stream)
        return Places(slots, None, None, None, 1)
    for name in ("block_table", "positions"):
        if getattr(given, name) is None:
            raise InvalidArgumentError(name, "an array (or slot_mapping instead)", "None")
    table = _index_array(given.block_table, "block_table", "int32", (None, None), cache, stream)
    place = _index_array(given.positions, "positions", "int32", (num_tokens,), cache, stream)
    if given.requests is not None:
        owner = _index_array(given.requests, "requests", "int32", (num_tokens,), cache, stream)
        return Places(None, table, place, owner, 1)
    batch = table.shape[0]
    if num_tokens > 0 and (batch == 0 or num_tokens % batch != 0):
        raise InvalidArgumentError(
            "positions", f"a multiple of the batch of block_table, {batch} (or requests given)", str(num_tokens)
        )
    return Places(None, table, place, None, max(1, num_tokens // max(1, batch)))


def check_chunks(segments: list[Segment]) -> None:
    """The kernel moves 16 bytes at a time: addresses, strides and widths have to allow that.

    Raises
    ------
    InvalidArgumentError
        An address, a stride or a width is not a multiple of 16 bytes.
    """
    for segment in segments:
        itemsize = segment.cache.itemsize
        sides = (("kv_cache", segment.cache, segment.cache_column), ("kv_new", segment.rows, segment.rows_column))
        for name, view, column in sides:
            values = {"width": segment.width * itemsize, "address": view.pointer + column * itemsize}
            for axis, (size, stride) in enumerate(zip(view.shape[:-1], view.strides[:-1], strict=True)):
                if size > 1:
                    values[f"stride of dimension {axis}"] = stride * itemsize
            for what, value in values.items():
                if value % CHUNK_BYTES != 0:
                    raise InvalidArgumentError(name, f"{what} a multiple of {CHUNK_BYTES} bytes", f"{value} bytes")
