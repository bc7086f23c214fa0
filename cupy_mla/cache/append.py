"""Write new KV rows of many requests to their places in a paged cache.

One kernel launch on a Hopper GPU (kernels_cu/cache/append.cu), NumPy indexing on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import view as arrays
from ..arrays.exchange import as_numpy, keep_imported
from ..arrays.frameworks import CUDA, check_stream, current_stream, framework_of
from ..arrays.view import ArrayView
from ..call.arguments import check_no_overlap, misaligned
from ..errors import InvalidArgumentError
from ..gpu.device import require_backend
from ..kernels.append import APPEND_SOURCE, CHUNK_BYTES, append_geometry
from ..kernels.structs import APPEND_PARAMS

_CACHE_RANK = 4
_ROWS_RANK = 3
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Segment:
    """Columns that are contiguous on both sides: ``width`` elements from a first column of each."""

    cache: ArrayView
    cache_column: int
    rows: ArrayView
    rows_column: int
    width: int


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the tokens go: a slot mapping, or a block table with positions (and requests)."""

    slot_mapping: ArrayView | None
    block_table: ArrayView | None
    positions: ArrayView | None
    requests: ArrayView | None
    tokens_per_request: int


def append_tokens(
    kv_cache: Any,
    kv_new: Any,
    slot_mapping: Any = None,
    *,
    block_table: Any = None,
    positions: Any = None,
    requests: Any = None,
    stream: int | None = None,
) -> None:
    """Write new tokens into a paged KV cache, in place.

    Give either ``slot_mapping``, or ``block_table`` and ``positions``. A token whose slot lies outside the cache
    (negative, too large, or past its block-table row) is not stored; padding is marked with -1 in this way.
    When two tokens have the same slot, either may be the one that stays.

    Parameters
    ----------
    kv_cache
        [num_pages, page_size, num_heads_kv, d], or the pair (latent, rope) of such arrays. Any element type of a
        fixed size; the values are copied bit for bit. Pages, rows and heads may have any strides.
    kv_new
        [num_tokens, num_heads_kv, d] or, with one KV head, [num_tokens, d]; or the pair (latent, rope). Packed rows
        may go to a pair of caches and the other way round.
    slot_mapping
        int64 [num_tokens]: ``page * page_size + offset``.
    block_table
        int32 [batch, max_pages_per_seq].
    positions
        int32 [num_tokens]: place of each token in its request, counted from 0. The lengths before the append are
        the positions of one new token per request.
    requests
        int32 [num_tokens]: each token's row of ``block_table``. Without it every request has the same number of new
        tokens, ``num_tokens / batch``, in the order of the rows.
    stream
        Raw CUDA stream; the current stream of ``kv_new``'s framework if not given.

    Raises
    ------
    InvalidArgumentError
        An argument of the wrong rank, shape, type, device or alignment, a cache that cannot be written to, or a stream
        that is no number. Nothing is written then.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    check_stream(stream)
    if stream is None:
        stream = _framework_stream(kv_new)
    cache_views = _cache_views(kv_cache, stream)
    rows_views = _rows_views(kv_new, stream)
    _check_together(cache_views, rows_views)
    segments = _match_segments(cache_views, rows_views)
    num_tokens = rows_views[0].shape[0]
    places = _describe_places(cache_views[0], num_tokens, slot_mapping, block_table, positions, requests, stream)
    on_gpu = require_backend(*cache_views[0].location, "kv_cache")
    if on_gpu:
        _check_chunks(segments)
    if num_tokens == 0 or not segments:
        return
    if on_gpu:
        stream = stream if stream is not None else 0
        _append_cuda(segments, places, num_tokens, stream)
        keep_imported((*rows_views, places.slot_mapping, places.block_table, places.positions, places.requests), stream)
    else:
        _append_numpy(segments, places, num_tokens)


def _framework_stream(kv_new: Any) -> int | None:
    """Current stream of the framework that made the rows; None on the CPU."""
    first = kv_new[0] if isinstance(kv_new, (tuple, list)) and kv_new else kv_new
    probe = arrays.view(first, "kv_new")
    return current_stream(first, probe.device_id) if probe.device == CUDA else None


def _parts(value: Any, name: str) -> list[tuple[Any, str]]:
    if not isinstance(value, (tuple, list)):
        return [(value, name)]
    if len(value) != 2:
        raise InvalidArgumentError(name, "an array or a pair (latent, rope)", f"{len(value)} items")
    return [(part, f"{name}[{index}]") for index, part in enumerate(value)]


def _cache_views(kv_cache: Any, stream: int | None) -> list[ArrayView]:
    views = []
    for part, name in _parts(kv_cache, "kv_cache"):
        view = arrays.view(part, name, stream)
        if view.ndim != _CACHE_RANK:
            raise InvalidArgumentError(name, "shape [num_pages, page_size, num_heads_kv, d]", str(view.shape))
        # JAX hands out its buffers through DLPack but counts on nobody writing to them.
        if framework_of(part) == "jax":
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


def _rows_views(kv_new: Any, stream: int | None) -> list[ArrayView]:
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


def _match_segments(cache_views: list[ArrayView], rows_views: list[ArrayView]) -> list[_Segment]:
    """Column ranges to copy: one when both sides are packed, else the two parts of the pair."""
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
            segments.append(_Segment(cache, cache_column, rows, rows_column, width))
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


def _describe_places(
    cache: ArrayView,
    num_tokens: int,
    slot_mapping: Any,
    block_table: Any,
    positions: Any,
    requests: Any,
    stream: int | None,
) -> _Places:
    if slot_mapping is not None:
        for name, value in (("block_table", block_table), ("positions", positions), ("requests", requests)):
            if value is not None:
                raise InvalidArgumentError(name, "None beside slot_mapping", type(value).__name__)
        slots = _index_array(slot_mapping, "slot_mapping", "int64", (num_tokens,), cache, stream)
        return _Places(slots, None, None, None, 1)
    for name, value in (("block_table", block_table), ("positions", positions)):
        if value is None:
            raise InvalidArgumentError(name, "an array (or slot_mapping instead)", "None")
    table = _index_array(block_table, "block_table", "int32", (None, None), cache, stream)
    place = _index_array(positions, "positions", "int32", (num_tokens,), cache, stream)
    if requests is not None:
        owner = _index_array(requests, "requests", "int32", (num_tokens,), cache, stream)
        return _Places(None, table, place, owner, 1)
    batch = table.shape[0]
    if num_tokens > 0 and (batch == 0 or num_tokens % batch != 0):
        raise InvalidArgumentError(
            "positions", f"a multiple of the batch of block_table, {batch} (or requests given)", str(num_tokens)
        )
    return _Places(None, table, place, None, max(1, num_tokens // max(1, batch)))


def _append_numpy(segments: list[_Segment], places: _Places, num_tokens: int) -> None:
    num_pages, page_size = segments[0].cache.shape[:2]
    pages, offsets, tokens = _find_slots(places, num_tokens, num_pages=num_pages, page_size=page_size)
    for segment in segments:
        target = as_numpy(segment.cache)
        source = as_numpy(segment.rows)
        cache_columns = slice(segment.cache_column, segment.cache_column + segment.width)
        rows_columns = slice(segment.rows_column, segment.rows_column + segment.width)
        target[pages, offsets, :, cache_columns] = source[tokens, :, rows_columns]


def _find_slots(
    places: _Places, num_tokens: int, *, num_pages: int, page_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Page, offset and token of each token that has a slot in the cache: ``find_slot`` of append.cu."""
    tokens = np.arange(num_tokens, dtype=np.int64)
    if places.slot_mapping is not None:
        slots = as_numpy(places.slot_mapping).astype(np.int64)
        kept = (slots >= 0) & (slots < num_pages * page_size)
        return slots[kept] // page_size, slots[kept] % page_size, tokens[kept]
    assert places.block_table is not None
    assert places.positions is not None
    table = as_numpy(places.block_table)
    positions = as_numpy(places.positions).astype(np.int64)
    if places.requests is not None:
        requests = as_numpy(places.requests).astype(np.int64)
    else:
        requests = tokens // places.tokens_per_request
    page_index = positions // page_size
    kept = (requests >= 0) & (requests < table.shape[0]) & (positions >= 0) & (page_index < table.shape[1])
    tokens, positions, requests, page_index = tokens[kept], positions[kept], requests[kept], page_index[kept]
    pages = table[requests, page_index].astype(np.int64)
    inside = (pages >= 0) & (pages < num_pages)
    return pages[inside], positions[inside] % page_size, tokens[inside]


def _check_chunks(segments: list[_Segment]) -> None:
    """The kernel moves 16 bytes at a time: addresses, strides and widths have to allow that."""
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


def _append_cuda(segments: list[_Segment], places: _Places, num_tokens: int, stream: int) -> None:
    # The modules that reach the driver are only loaded for arrays that are on a GPU.
    from ..gpu.jit.module import load
    from ..gpu.launch import launch_kernel

    geometry = append_geometry(num_tokens)
    launch_kernel(
        load(APPEND_SOURCE, segments[0].cache.device_id),
        geometry.grid,
        geometry.block,
        geometry.shared_memory,
        stream,
        (pack_params(segments, places, num_tokens),),
    )


def pack_params(segments: list[_Segment], places: _Places, num_tokens: int) -> npt.NDArray[np.void]:
    """The kernel's by-value parameter: an array of size one and type ``APPEND_PARAMS``."""
    params = np.zeros(1, APPEND_PARAMS)
    for packed, segment in zip(params[0]["segments"], segments, strict=False):
        itemsize = segment.cache.itemsize
        packed["cache"] = segment.cache.pointer + segment.cache_column * itemsize
        packed["rows"] = segment.rows.pointer + segment.rows_column * itemsize
        for name, stride in zip(("page", "token", "head"), segment.cache.strides[:3], strict=True):
            packed[f"cache_{name}_stride"] = stride * itemsize
        for name, stride in zip(("token", "head"), segment.rows.strides[:2], strict=True):
            packed[f"rows_{name}_stride"] = stride * itemsize
        packed["chunks"] = segment.width * itemsize // CHUNK_BYTES
    fields = params[0]
    for name in ("slot_mapping", "block_table", "positions", "requests"):
        view: ArrayView | None = getattr(places, name)
        fields[name] = 0 if view is None else view.pointer
    if places.block_table is not None:
        fields["block_table_stride"] = places.block_table.strides[0]
        fields["num_requests"], fields["max_pages_per_seq"] = places.block_table.shape
    fields["num_pages"], fields["page_size"], fields["num_heads_kv"] = segments[0].cache.shape[:3]
    fields["num_tokens"] = num_tokens
    fields["tokens_per_request"] = places.tokens_per_request
    return params
