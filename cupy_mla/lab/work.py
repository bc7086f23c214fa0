"""How much work a decode is, whatever computes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..arrays.dtypes import ITEM_SIZES
from ..call.problem import INDEX_DTYPE
from ..layouts import CacheLayout

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Work:
    """The least that a case costs.

    Attributes
    ----------
    flops
        Both products.
    bytes
        What must be read of the cache, once per request; indices, q and out.
    """

    flops: int
    bytes: int


def count_work(
    kv_lengths: IntArray,
    q_lengths: IntArray,
    *,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    head_dim_v: int,
    causal: bool,
    layout: CacheLayout,
    item_size: int,
) -> Work:
    """2 (d_qk + d_v) FLOP per query row and visible key; the bytes of `Work`.

    Parameters
    ----------
    kv_lengths, q_lengths
        [batch]: cached tokens and query tokens of each request.
    num_heads_q, num_heads_kv, head_dim, head_dim_v, causal
        As in ``mla_decode``; ``head_dim`` is d_qk.
    layout
        Of the cache.
    item_size
        Bytes of a value of q and out.
    """
    pairs = num_heads_q * visible_pairs(kv_lengths, q_lengths, causal)
    cache_bytes = int(kv_lengths[q_lengths > 0].sum()) * layout.token_bytes(
        head_dim_v, head_dim - head_dim_v, num_heads_kv
    )
    row_values = num_heads_q * int(q_lengths.sum()) * (head_dim + head_dim_v)
    return Work(flops=2 * (head_dim + head_dim_v) * pairs, bytes=cache_bytes + row_values * item_size)


def count_sparse_work(
    counts: IntArray,
    kv_lengths: IntArray,
    *,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    head_dim_v: int,
    layout: CacheLayout,
    item_size: int,
) -> Work:
    """The same of attention to chosen tokens.

    Query tokens of one request may choose the same tokens, which are then read once: of a request of L tokens,
    L (1 - prod_i (1 - c_i / L)) are counted, the number to be expected where query token i chooses c_i at random.

    Parameters
    ----------
    counts
        [batch, seqlen_q]: tokens that each query token attends to.
    kv_lengths
        [batch]: tokens that they are chosen from.
    num_heads_q, num_heads_kv, head_dim, head_dim_v, layout, item_size
        As in `count_work`.
    """
    lengths = np.maximum(kv_lengths, 1)
    distinct = int(np.rint(lengths * (1 - np.prod(1 - counts / lengths[:, None], axis=1))).sum())
    cache_bytes = distinct * layout.token_bytes(head_dim_v, head_dim - head_dim_v, num_heads_kv)
    tokens = int(counts.sum())
    row_values = num_heads_q * counts.size * (head_dim + head_dim_v)
    return Work(
        flops=2 * (head_dim + head_dim_v) * num_heads_q * tokens,
        bytes=cache_bytes + tokens * ITEM_SIZES[INDEX_DTYPE] + row_values * item_size,
    )


def visible_pairs(kv_lengths: IntArray, q_lengths: IntArray, causal: bool) -> int:
    """Pairs of a query token and a key it sees; causal: query i of s_q sees keys up to length - s_q + i."""
    if not causal:
        return int((kv_lengths * q_lengths).sum())
    # The last n = min(s_q, length) query tokens see length - n + 1, ..., length keys; those before them see none.
    seeing = np.minimum(q_lengths, kv_lengths)
    return int((seeing * (2 * kv_lengths - seeing + 1) // 2).sum())
