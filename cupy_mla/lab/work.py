"""How much work a decode is, whatever computes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..layouts import CacheLayout

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Work:
    """The least that a case costs. ``flops``: both products; ``bytes``: the cache once per request, q and out."""

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


def visible_pairs(kv_lengths: IntArray, q_lengths: IntArray, causal: bool) -> int:
    """Pairs of a query token and a key it sees; causal: query i of s_q sees keys up to length - s_q + i."""
    if not causal:
        return int((kv_lengths * q_lengths).sum())
    # The last n = min(s_q, length) query tokens see length - n + 1, ..., length keys; those before them see none.
    seeing = np.minimum(q_lengths, kv_lengths)
    return int((seeing * (2 * kv_lengths - seeing + 1) // 2).sum())
