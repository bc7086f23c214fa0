"""Write new KV rows of many requests to their places in a paged cache.

One kernel launch on a Hopper GPU (kernels_cu/cache/append.cu), NumPy indexing on the CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..arrays.exchange import as_numpy, keep_imported
from ..arrays.frameworks import CUDA, check_stream, current_stream
from ..call.known import KnownCalls
from ..call.options import APPEND_ROPES
from ..layouts import CacheLayout
from ..settings import get_settings
from .new_tokens import APPEND_PARTS, Append, AppendArrays, Places, describe_append
from .quantise import put_numpy
from .segments import first_part, stream_of

if TYPE_CHECKING:
    from .append_call import AppendCall

_known: KnownCalls[AppendCall] = KnownCalls(APPEND_PARTS, pairs=len(APPEND_ROPES))


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
        are rounded to it: ``fp8_e4m3``, or a layout whose scales are in the cache, found here as the quantisers of
        `cupy_mla.layouts` find them.
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
        on the cache's device, which is read when the kernel runs; or, where the cache or the rows are a pair, one for
        latent and rope part each: a pair of numbers, or two float32 in an array [2]. Only for rows that are rounded to
        that layout.
    layout
        The cache's layout, by name or as an object of `cupy_mla.layouts`, where its type and width leave a doubt
        (528 bytes are ``fp8_ds_mla_no_rope`` or ``fp8_v41``).
    stream
        Raw CUDA stream; the current stream of ``kv_new``'s framework if not given.

    Raises
    ------
    InvalidArgumentError
        An argument of the wrong rank, shape, type, device or alignment, a cache that cannot be written to, a layout
        that is unknown or in doubt, a scale that is missing or out of place, or a stream that is no number. Nothing is
        written then.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    check_stream(stream)
    given = kv_cache, kv_new, slot_mapping, block_table, positions, requests, kv_scale
    settings = get_settings()
    found = _known.find(given, (layout,), None, settings)
    if found is not None:
        key, addresses, call = found
        if call is not None:  # recognised, which only arrays of torch and CuPy are
            call(addresses, current_stream(first_part(kv_new), call.device_id) if stream is None else stream)
            return
    if stream is None:
        stream = stream_of(first_part(kv_new), "kv_new")
    append = describe_append(AppendArrays(*given), stream, layout)
    made = run_append(append, stream)
    if made is not None:
        if found is not None:
            _known.remember(key, made, settings)
        if stream is not None:
            keep_imported(append.parts(), stream)


def run_append(append: Append, stream: int | None) -> AppendCall | None:
    """Write what was checked; on a GPU on a stream, by the call that is returned."""
    if not append.segments:
        return None
    if append.location[0] != CUDA:
        _append_numpy(append)
        return None
    from .append_call import AppendCall  # what reaches the driver is only loaded for arrays that are on a GPU

    call = AppendCall(append)
    call(tuple(0 if part is None else part.pointer for part in append.parts()), 0 if stream is None else stream)
    return call


def _append_numpy(append: Append) -> None:
    num_pages, page_size = append.segments[0].cache.shape[:2]
    pages, offsets, tokens = _find_slots(append.places, append.num_tokens, num_pages=num_pages, page_size=page_size)
    if append.quantiser is not None:
        values = [
            as_numpy(part.rows)[tokens, :, part.rows_column : part.rows_column + part.width].astype(np.float32)
            for part in append.segments
        ]
        put_numpy(append.quantiser, append.segments, pages, offsets, values)
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
