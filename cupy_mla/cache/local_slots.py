"""Of the tokens that sparse attention chooses, those of one rank of a cache that is sharded along the sequence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..arrays.exchange import as_numpy, empty_like, finish, keep_imported
from ..arrays.frameworks import check_stream, current_stream
from ..arrays.view import ArrayView, view
from ..call.arguments import as_integer, shard_of
from ..call.problem import INDEX_DTYPE
from ..call.shard import Shard
from ..errors import InvalidArgumentError
from ..gpu.device import require_backend
from ..kernels.slots import LOCAL_SLOTS_SOURCE, local_slots_geometry
from ..kernels.structs import LOCAL_SLOTS_PARAMS
from .slots import NO_TOKEN, check_tokens, pack_slots_params, slots_reference


def local_slots(
    token_indices: Any,
    block_table: Any,
    page_size: int,
    *,
    cp_world: int,
    cp_rank: int,
    cp_interleave: int = 1,
    requests: Any = None,
    stream: int | None = None,
) -> tuple[Any, Any]:
    """Slots of those tokens that lie on one rank: ``indices`` and ``topk_length`` of its `cupy_mla.mla_sparse_decode`.

    As `cupy_mla.slots_of`, but what lies on other ranks is left out, and the rest stands together. One small kernel on
    a GPU, NumPy elsewhere.

    Parameters
    ----------
    token_indices
        [n, ..., topk] int32, contiguous, e.g. [batch, seqlen_q, topk]: token numbers, counted from the first token of
        the whole request.
    block_table
        [num_requests, max_pages_per_seq] int32: pages of each request on this rank.
    page_size
        Tokens per page of the cache.
    cp_world, cp_rank, cp_interleave
        Ranks that share the cache, which of them this one is, and tokens in a row that lie on the same rank.
    requests
        [n] int32: each first index' row of ``block_table``; None: there are as many rows, in turn.
    stream
        ``cudaStream_t`` to run on; None: the current stream of the framework of ``token_indices``.

    Returns
    -------
    indices
        int32 of the shape of ``token_indices``: the slots in their order, then -1.
    topk_length
        int32 [n, ...]: how many they are.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    check_stream(stream)
    tokens = view(token_indices, "token_indices", stream)
    table = view(block_table, "block_table", stream)
    rows = None if requests is None else view(requests, "requests", stream)
    page_size = as_integer(page_size, "page_size")
    shard = shard_of(cp_world, cp_rank, cp_interleave)
    check_rows_of_tokens(tokens.ndim)
    check_tokens(tokens, table, rows, page_size)
    on_gpu = require_backend(*tokens.location, "token_indices")
    slots = empty_like(token_indices, tokens.shape, INDEX_DTYPE, stream)
    counts = empty_like(token_indices, tokens.shape[:-1], INDEX_DTYPE, stream)
    if not on_gpu:
        as_numpy(slots)[...], as_numpy(counts)[...] = _local_slots_numpy(tokens, table, rows, page_size, shard)
    elif 0 not in tokens.shape[:-1]:
        stream = current_stream(token_indices, tokens.device_id) if stream is None else stream
        results = view(slots, "slots", stream), view(counts, "counts", stream)
        params = pack_params(tokens, table, rows, page_size, shard, *results)
        _local_slots_cuda(params, math.prod(tokens.shape[:-1]), tokens.device_id, stream)
        keep_imported((tokens, table, rows), stream)
    return finish(token_indices, slots, stream), finish(token_indices, counts, stream)


def check_rows_of_tokens(ndim: int) -> None:
    """Refuse token numbers of so many dimensions that are no rows.

    Raises
    ------
    InvalidArgumentError
        There are fewer than 2.
    """
    if ndim < 2:
        raise InvalidArgumentError("token_indices", "2 dimensions or more [n, ..., topk]", str(ndim))


def _local_slots_numpy(
    tokens: ArrayView, table: ArrayView, rows: ArrayView | None, page_size: int, shard: Shard
) -> tuple[np.ndarray, np.ndarray]:
    """As the kernel does it."""
    numbers = as_numpy(tokens).astype(np.int64)
    local = np.where((numbers >= 0) & shard.has(numbers), shard.count(numbers), NO_TOKEN)
    slots = slots_reference(local, table, rows, page_size)
    order = np.argsort(slots < 0, axis=-1, kind="stable")
    return np.take_along_axis(slots, order, -1), (slots >= 0).sum(-1, dtype=np.int32)


def _local_slots_cuda(params: np.ndarray, num_rows: int, device_id: int, stream: int) -> None:
    # The modules that reach the driver are only loaded for arrays that are on a GPU.
    from ..gpu.jit.module import load
    from ..gpu.launch import launch_kernel

    geometry = local_slots_geometry(num_rows)
    kernel = load(LOCAL_SLOTS_SOURCE, device_id)
    launch_kernel(kernel, geometry.grid, geometry.block, geometry.shared_memory, stream, (params,))


def pack_params(
    tokens: ArrayView,
    table: ArrayView,
    rows: ArrayView | None,
    page_size: int,
    shard: Shard,
    slots: ArrayView,
    counts: ArrayView,
) -> np.ndarray:
    """The kernel's by-value parameter: an array of size one and type ``LOCAL_SLOTS_PARAMS``."""
    of_slots = pack_slots_params(tokens, table, rows, page_size, slots)
    params = np.zeros(1, LOCAL_SLOTS_PARAMS)
    for name in of_slots.dtype.names or ():
        params[name] = of_slots[name]
    params["row_tokens"], params["counts"] = tokens.shape[-1], counts.pointer
    params["rows_per_request"], params["shard"] = math.prod(tokens.shape[1:-1]), shard.word
    return params
