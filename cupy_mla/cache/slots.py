"""Token numbers of requests to slots of a paged cache, as sparse attention takes them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..arrays.exchange import as_numpy, empty_like, finish, keep_imported
from ..arrays.frameworks import CUDA, check_stream, current_stream
from ..arrays.view import ArrayView, contiguous_strides, view
from ..call.arguments import as_integer, check_output, misaligned, place_name, settled_strides
from ..call.problem import INDEX_DTYPE
from ..errors import InvalidArgumentError
from ..gpu.device import require_backend
from ..kernels.slots import SLOTS_SOURCE, slots_blocks, slots_geometry
from ..kernels.structs import SLOTS_PARAMS

NO_TOKEN = -1
MAX_SLOT = 2**31 - 1
_MAX_BLOCKS = 2**31 - 1


def slots_of(
    token_indices: Any,
    block_table: Any,
    page_size: int,
    *,
    requests: Any = None,
    out: Any = None,
    stream: int | None = None,
) -> Any:
    """Slots of a paged cache, ``page * page_size + offset``, of tokens that are numbered within their requests.

    Top-k selection yields token numbers of each request; `mla_sparse_decode` and `mla_sparse_prefill` take slots. One
    small kernel on a GPU, NumPy elsewhere.

    Parameters
    ----------
    token_indices
        [n, ...] int32, contiguous, e.g. [batch, seqlen_q, topk]: token numbers, counted from a request's first token.
    block_table
        [num_requests, max_pages_per_seq] int32: pages of each request.
    page_size
        Tokens per page of the cache.
    requests
        [n] int32: each first index' row of ``block_table``; None: there are as many rows, in turn.
    out
        Array to write to, of the shape and type of ``token_indices``, contiguous; it may be that array. None: a new
        one of its framework.
    stream
        ``cudaStream_t`` to run on; None: the current stream of the framework of ``token_indices``.

    Returns
    -------
    slots
        int32 of the shape of ``token_indices``. -1 stays -1, and so does every token whose number is negative or past
        its row of ``block_table``, whose request or page is negative or no row, or whose slot int32 cannot hold.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value. Nothing was written.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    check_stream(stream)
    tokens = view(token_indices, "token_indices", stream)
    table = view(block_table, "block_table", stream)
    rows = None if requests is None else view(requests, "requests", stream)
    page_size = as_integer(page_size, "page_size")
    check_tokens(tokens, table, rows, page_size)
    given = None if out is None else view(out, "out", stream)
    if given is not None:
        check_output(given, "out", tokens.shape, INDEX_DTYPE, tokens.location)
        _check_contiguous(given, "out")
    on_gpu = require_backend(*tokens.location, "token_indices")
    result = empty_like(token_indices, tokens.shape, INDEX_DTYPE, stream) if out is None else out
    if 0 in tokens.shape:
        return result if out is not None else finish(token_indices, result, stream)
    if not on_gpu:
        as_numpy(result)[...] = slots_reference(as_numpy(tokens).astype(np.int64), table, rows, page_size)
    else:
        stream = current_stream(token_indices, tokens.device_id) if stream is None else stream
        _slots_cuda(tokens, table, rows, page_size, view(result, "out", stream), stream)
        keep_imported((tokens, table, rows), stream)
    return result if out is not None else finish(token_indices, result, stream)


def check_tokens(tokens: ArrayView, table: ArrayView, rows: ArrayView | None, page_size: int) -> None:
    """Refuse arguments of `slots_of` that do not fit each other.

    Raises
    ------
    InvalidArgumentError
        An array has a wrong rank, shape, type, device, stride or alignment, or the page size is below 1.
    """
    if tokens.ndim == 0:
        raise InvalidArgumentError("token_indices", "1 dimension or more [n, ...]", "0")
    if table.ndim != 2 or (0 in table.shape and 0 not in tokens.shape):
        raise InvalidArgumentError("block_table", "[num_requests, max_pages_per_seq]", str(list(table.shape)))
    if page_size < 1:
        raise InvalidArgumentError("page_size", "1 or more", str(page_size))
    if rows is None and tokens.shape[0] != table.shape[0]:
        expected = f"{tokens.shape[0]} rows as in token_indices (there is no requests)"
        raise InvalidArgumentError("block_table", expected, str(list(table.shape)))
    if rows is not None and rows.shape != tokens.shape[:1]:
        raise InvalidArgumentError("requests", f"shape {list(tokens.shape[:1])}", str(list(rows.shape)))
    arrays = [("token_indices", tokens), ("block_table", table), ("requests", rows)]
    for name, array in arrays:
        if array is None:
            continue
        if array.dtype != INDEX_DTYPE:
            raise InvalidArgumentError(name, INDEX_DTYPE, array.dtype)
        if array.location != tokens.location:
            place = place_name(tokens.location)
            raise InvalidArgumentError(name, f"an array on {place}, as token_indices", place_name(array.location))
        if array.device == CUDA and array.pointer % array.itemsize:
            raise misaligned(name, array.pointer, array.itemsize)
        if name != "block_table":
            _check_contiguous(array, name)
    if 0 not in table.shape and table.shape[1] > 1 and table.strides[1] != 1:
        raise InvalidArgumentError("block_table", "a contiguous last dimension", f"strides {table.strides}")
    if tokens.device == CUDA and tokens.shape[0] * slots_blocks(math.prod(tokens.shape[1:])) > _MAX_BLOCKS:
        raise InvalidArgumentError("token_indices", "fewer rows at once", str(list(tokens.shape)))


def _check_contiguous(array: ArrayView, name: str) -> None:
    if 0 not in array.shape and settled_strides(array) != contiguous_strides(array.shape):
        raise InvalidArgumentError(name, "a contiguous array", f"strides {array.strides}")


def slots_reference(numbers: np.ndarray, table: ArrayView, rows: ArrayView | None, page_size: int) -> np.ndarray:
    """As the kernel does it, of int64 token numbers."""
    pages = as_numpy(table)
    requests = np.arange(numbers.shape[0]) if rows is None else as_numpy(rows).astype(np.int64)
    requests = np.broadcast_to(requests.reshape(-1, *[1] * (numbers.ndim - 1)), numbers.shape)
    page_index = numbers // page_size
    there = (numbers >= 0) & (page_index < pages.shape[1]) & (requests >= 0) & (requests < pages.shape[0])
    page = pages[np.where(there, requests, 0), np.where(there, page_index, 0)].astype(np.int64)
    slots = page * page_size + numbers % page_size
    return np.where(there & (page >= 0) & (slots <= MAX_SLOT), slots, NO_TOKEN).astype(np.int32)


def _slots_cuda(
    tokens: ArrayView, table: ArrayView, rows: ArrayView | None, page_size: int, out: ArrayView, stream: int
) -> None:
    # The modules that reach the driver are only loaded for arrays that are on a GPU.
    from ..gpu.jit.module import load
    from ..gpu.launch import launch_kernel

    params = pack_slots_params(tokens, table, rows, page_size, out)
    geometry = slots_geometry(tokens.shape[0], int(params["row_tokens"][0]))
    kernel = load(SLOTS_SOURCE, tokens.device_id)
    launch_kernel(kernel, geometry.grid, geometry.block, geometry.shared_memory, stream, (params,))


def pack_slots_params(
    tokens: ArrayView, table: ArrayView, rows: ArrayView | None, page_size: int, out: ArrayView
) -> np.ndarray:
    """The kernel's by-value parameter: an array of size one and type ``SLOTS_PARAMS``."""
    row_tokens = math.prod(tokens.shape[1:])
    params = np.zeros(1, SLOTS_PARAMS)
    params["tokens"], params["block_table"], params["slots"] = tokens.pointer, table.pointer, out.pointer
    params["requests"] = 0 if rows is None else rows.pointer
    params["block_table_stride"], params["row_tokens"] = settled_strides(table)[0], row_tokens
    params["blocks_per_row"], params["page_size"] = slots_blocks(row_tokens), min(page_size, MAX_SLOT)
    params["num_requests"], params["max_pages_per_seq"] = table.shape
    return params
