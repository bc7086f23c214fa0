"""Write new KV rows of many requests to their places in a paged cache.

One kernel launch on a Hopper GPU (kernels_cu/cache/append.cu), NumPy indexing on the CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import view as arrays
from ..arrays.exchange import as_numpy, keep_imported
from ..arrays.frameworks import CUDA, check_stream, current_stream
from ..arrays.view import ArrayView
from ..kernels.append import APPEND_SOURCE, CHUNK_BYTES, append_geometry, quantise_source
from ..kernels.structs import APPEND_PARAMS, QUANTISE_PARAMS
from ..layouts import CacheLayout
from .new_tokens import Append, AppendArrays, Places, describe_append
from .quantise import pack_quantiser, put_numpy
from .segments import Segment


def append_tokens(
    kv_cache: Any,
    kv_new: Any,
    slot_mapping: Any = None,
    *,
    block_table: Any = None,
    positions: Any = None,
    requests: Any = None,
    kv_scale: Any = None,
    layout: CacheLayout | str | None = None,
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
        fixed size; rows of the same type are copied bit for bit. Pages, rows and heads may have any strides.
    kv_new
        [num_tokens, num_heads_kv, d] or, with one KV head, [num_tokens, d]; or the pair (latent, rope). Packed rows
        may go to a pair of caches and the other way round. Rows of bfloat16 or float16 for a cache in an FP8 layout
        are rounded to it: ``fp8_e4m3``, or a layout whose scales are in the cache, found here as DeepSeek's powers
        of two.
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
    kv_scale
        What the stored values of ``fp8_e4m3`` are to be multiplied by: a number, or one float32 in an array [] or [1]
        on the cache's device, which is read when the kernel runs. Only for rows that are rounded to that layout.
    layout
        The cache's layout, by name or as an object of `cupy_mla.layouts`, where its type and width leave a doubt
        (528 bytes are ``fp8_ds_mla_no_rope`` or ``fp8_v41``).
    stream
        Raw CUDA stream; the current stream of ``kv_new``'s framework if not given.

    Raises
    ------
    InvalidArgumentError
        An argument of the wrong rank, shape, type, device or alignment, a cache that cannot be written to, a layout
        that is unknown, in doubt or never written, a scale that is missing or out of place, or a stream that is no
        number. Nothing is written then.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    check_stream(stream)
    if stream is None:
        stream = _framework_stream(kv_new)
    given = AppendArrays(kv_cache, kv_new, slot_mapping, block_table, positions, requests, kv_scale)
    append = describe_append(given, stream, layout)
    run_append(append, stream)
    if stream is not None and append.segments:
        keep_imported(append.inputs(), stream)


def run_append(append: Append, stream: int | None) -> None:
    """Write what was checked; on a GPU on a stream."""
    if not append.segments:
        return
    if append.location[0] == CUDA:
        _append_cuda(append, 0 if stream is None else stream)
    else:
        _append_numpy(append)


def _framework_stream(kv_new: Any) -> int | None:
    """Current stream of the framework that made the rows; None on the CPU."""
    first = kv_new[0] if isinstance(kv_new, (tuple, list)) and kv_new else kv_new
    probe = arrays.view(first, "kv_new")
    return current_stream(first, probe.device_id) if probe.device == CUDA else None


def _append_numpy(append: Append) -> None:
    num_pages, page_size = append.segments[0].cache.shape[:2]
    pages, offsets, tokens = _find_slots(append.places, append.num_tokens, num_pages=num_pages, page_size=page_size)
    if append.quantiser is not None:
        put_numpy(append.quantiser, append.segments, pages, offsets, tokens)
        return
    for segment in append.segments:
        target = as_numpy(segment.cache)
        source = as_numpy(segment.rows)
        cache_columns = slice(segment.cache_column, segment.cache_column + segment.width)
        rows_columns = slice(segment.rows_column, segment.rows_column + segment.width)
        target[pages, offsets, :, cache_columns] = source[tokens, :, rows_columns]


def _find_slots(
    places: Places, num_tokens: int, *, num_pages: int, page_size: int
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


def _append_cuda(append: Append, stream: int) -> None:
    # The modules that reach the driver are only loaded for arrays that are on a GPU.
    from ..gpu.jit.module import load
    from ..gpu.launch import launch_kernel

    geometry = append_geometry(append.num_tokens)
    rounded = append.quantiser is not None
    launch_kernel(
        load(quantise_source(append.segments[0].rows.dtype) if rounded else APPEND_SOURCE, append.location[1]),
        geometry.grid,
        geometry.block,
        geometry.shared_memory,
        stream,
        (pack_params(append),),
    )


def pack_params(append: Append) -> npt.NDArray[np.void]:
    """The kernel's by-value parameter: an array of size one and type ``APPEND_PARAMS``, or ``QUANTISE_PARAMS`` where
    rows are rounded."""
    params = np.zeros(1, APPEND_PARAMS if append.quantiser is None else QUANTISE_PARAMS)
    fields = params[0]
    for packed, segment in zip(fields["segments"], append.segments, strict=False):
        _pack_segment(packed, segment)
    _pack_places(fields["places"], append.places, append.segments[0].cache, append.num_tokens)
    if append.quantiser is not None:
        pack_quantiser(fields, append.quantiser, append.segments)
    return params


def _pack_segment(packed: Any, segment: Segment) -> None:
    cache, rows = segment.cache, segment.rows
    packed["cache"] = cache.pointer + segment.cache_column * cache.itemsize
    packed["rows"] = rows.pointer + segment.rows_column * rows.itemsize
    packed["cache_page_stride"] = cache.strides[0] * cache.itemsize
    packed["cache_token_stride"] = segment.token_bytes
    packed["cache_head_stride"] = cache.strides[2] * cache.itemsize
    for name, stride in zip(("token", "head"), rows.strides[:2], strict=True):
        packed[f"rows_{name}_stride"] = stride * rows.itemsize
    packed["chunks"] = segment.width * rows.itemsize // CHUNK_BYTES


def _pack_places(packed: Any, places: Places, cache: ArrayView, num_tokens: int) -> None:
    for name in ("slot_mapping", "block_table", "positions", "requests"):
        view: ArrayView | None = getattr(places, name)
        packed[name] = 0 if view is None else view.pointer
    if places.block_table is not None:
        packed["block_table_stride"] = places.block_table.strides[0]
        packed["num_requests"], packed["max_pages_per_seq"] = places.block_table.shape
    packed["num_pages"], packed["page_size"], packed["num_heads_kv"] = cache.shape[:3]
    packed["num_tokens"] = num_tokens
    packed["tokens_per_request"] = places.tokens_per_request
