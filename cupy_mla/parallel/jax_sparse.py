"""Context-parallel sparse decode in programs of JAX, inside ``jax.shard_map``; `cupy_mla.parallel.jax_ops` has it."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import jax_ops
from ..cache.local_slots import check_rows_of_tokens
from ..cache.slots import MAX_SLOT, NO_TOKEN, check_tokens
from ..call.arguments import as_integer, shard_of
from ..call.problem import INDEX_DTYPE
from ..call.traced import jax_module, like, views_of_parts
from ..decode import sparse
from .exchange import ALL_TO_ALL, check_exchange
from .jax_ranks import EXCHANGES, Ranks

_OF_ONE_CACHE = ("attn_sink", "extra_kv_cache", "extra_indices", "extra_topk_length", "extra_layout")
_OF_THE_SHARD = ("cp_world", "validate", "empty_lse", *_OF_ONE_CACHE)


@like(sparse.mla_sparse_decode, sparse.plan_sparse_decode, without=_OF_THE_SHARD)
def cp_sparse_decode(
    q: Any,
    kv_cache: Any,
    indices: Any,
    *,
    axis_name: Any,
    gathered: bool = False,
    exchange: str = ALL_TO_ALL,
    platform: str | None = None,
    plan: Any = None,
    **named: Any,
) -> tuple[Any, Any]:
    """`cupy_mla.parallel.cp_sparse_decode` on each device's part of a program under ``jax.shard_map``.

    Devices are ranks in the order of ``axis_name``. ``shard_map`` has to be told ``check_vma=False``.

    Parameters
    ----------
    q
        [batch, seqlen_q, num_heads_q, d_qk] bfloat16 or float16: queries of this device's heads, as many on each. With
        ``gathered`` those of all heads, the same on each device.
    kv_cache, indices
        This device's tokens, and those of them that were chosen, as in `cupy_mla.mla_sparse_decode`; `local_slots`
        finds these, and the ``topk_length`` to go with them.
    axis_name
        Axis of the mesh, or a tuple of axes, that the tokens are sharded over.
    gathered, exchange
        As in `cupy_mla.parallel.cp_decode`.
    platform
        As in `cupy_mla.jax_ops.mla_decode`.
    plan
        From `plan_cp_sparse_decode`, made with the same options. None: the call makes its own.
    **named
        Other arrays and options, as in `cupy_mla.jax_ops.mla_sparse_decode`.

    Returns
    -------
    out, lse
        Of this device's heads, over the tokens of all: [batch, seqlen_q, num_heads_q, head_dim_v] of q's type and
        [batch, num_heads_q, seqlen_q] float32.

    Raises
    ------
    InvalidArgumentError, PlanMismatchError
        An argument is wrong, or there is no such axis; raised while tracing.
    UnsupportedDeviceError
        The GPU is not Hopper, the platform is neither CPU nor CUDA, or the settings ask for the other backend.
    MissingDependencyError
        JAX is not installed, or the platform is CUDA and jax-tvm-ffi is not.
    """
    check_exchange(exchange, among=EXCHANGES)
    ranks = Ranks(axis_name)
    heads = ranks.heads_of(q, gathered)
    queries = q if gathered else ranks.gather(q)
    named = {**named, "cp_world": ranks.world, "platform": platform}
    out, lse = jax_ops.mla_sparse_decode(queries, kv_cache, indices, plan=plan, **named)
    return ranks.finish(out, lse, heads, exchange, platform)


@like(sparse.plan_sparse_decode, without=_OF_THE_SHARD)
def plan_cp_sparse_decode(
    q: Any,
    kv_cache: Any,
    indices: Any,
    *,
    axis_name: Any,
    gathered: bool = False,
    platform: str | None = None,
    **named: Any,
) -> Any:
    """The plan of a device's sparse decodes in one step, a uint8 array, for all layers of a program under
    ``jax.shard_map`` that share their ``topk_length``.

    Arguments and errors are those of `cp_sparse_decode` and of `cupy_mla.plan_sparse_decode`. Of q only shape and type
    count. Nothing is sent.
    """
    ranks = Ranks(axis_name)
    heads = ranks.heads_of(q, gathered) * ranks.world
    queries = jax_module().numpy.zeros((*q.shape[:-2], heads, q.shape[-1]), q.dtype)
    named = {**named, "cp_world": ranks.world, "platform": platform}
    return jax_ops.plan_sparse_decode(queries, kv_cache, indices, **named)


def local_slots(
    token_indices: Any,
    block_table: Any,
    page_size: int,
    *,
    axis_name: Any,
    cp_interleave: int = 1,
    requests: Any = None,
) -> tuple[Any, Any]:
    """`cupy_mla.parallel.local_slots` of the device that a program under ``jax.shard_map`` runs on: JAX's arithmetic.

    Parameters
    ----------
    token_indices, page_size, cp_interleave, requests
        As in `cupy_mla.parallel.local_slots`.
    block_table
        [num_requests, max_pages_per_seq] int32: pages of each request on this device.
    axis_name
        Axis of the mesh, or a tuple of axes, that the tokens are sharded over.

    Returns
    -------
    indices, topk_length
        As `cupy_mla.parallel.local_slots` returns them.

    Raises
    ------
    InvalidArgumentError
        An argument is wrong, or there is no such axis; raised while tracing.
    MissingDependencyError
        JAX is not installed.
    """
    names = ("token_indices", "block_table", "requests")
    _, (tokens, table, rows), _ = views_of_parts((token_indices, block_table, requests), names, None)
    page_size = as_integer(page_size, "page_size")
    check_rows_of_tokens(tokens.ndim)
    check_tokens(tokens, table, rows, page_size)
    page_size = min(page_size, MAX_SLOT)
    ranks = Ranks(axis_name)
    interleave = shard_of(ranks.world, 0, cp_interleave).interleave
    jnp = jax_module().numpy
    if 0 in tokens.shape:
        return jnp.zeros(tokens.shape, INDEX_DTYPE), jnp.zeros(tokens.shape[:-1], INDEX_DTYPE)
    numbers = jnp.asarray(token_indices).reshape(tokens.shape[0], -1, tokens.shape[-1])
    local = numbers // (ranks.world * interleave) * interleave + numbers % interleave
    page_index, offset = local // page_size, local % page_size
    row = jnp.asarray(np.arange(tokens.shape[0], dtype=INDEX_DTYPE) if requests is None else requests)[:, None, None]
    there = (numbers >= 0) & (numbers // interleave % ranks.world == ranks.rank)
    there &= (page_index < table.shape[1]) & (row >= 0) & (row < table.shape[0])
    page = jnp.asarray(block_table)[jnp.where(there, row, 0), jnp.where(there, page_index, 0)]
    there &= (page >= 0) & (page <= (MAX_SLOT - offset) // page_size)
    slots = page * page_size + offset
    # What is not there goes past the end, which drops it.
    place = jnp.where(there, jnp.cumsum(there, -1) - 1, tokens.shape[-1])
    first, second, _ = jnp.indices(place.shape, sparse=True)
    kept = jnp.full(place.shape, NO_TOKEN, INDEX_DTYPE).at[first, second, place].set(slots, mode="drop")
    return kept.reshape(tokens.shape), there.sum(-1, dtype=INDEX_DTYPE).reshape(tokens.shape[:-1])
