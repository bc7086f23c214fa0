"""Attention to chosen tokens on CPU arrays with NumPy: the backend where no Hopper GPU is, and the oracle in float64.

Decode and prefill are the same arithmetic: every query token has its own list of keys. Only chosen tokens are ever
gathered, so what lies in other slots cannot reach a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays.events import unheeded
from ..arrays.exchange import as_numpy
from ..arrays.view import ArrayView
from ..call.sparse_problem import SparseInputs, SparseProblem
from ..layouts import CacheLayout

Array = npt.NDArray[Any]
# (slots [n], kv_head) to the keys of these slots, [n, d_qk] of the type of the arithmetic.
Gather = Callable[[npt.NDArray[np.int64], int], Array]

# Keys that are gathered at once: bounds the memory whatever the number of queries (75 MB of float32 at width 576).
_KEYS_PER_STEP = 32_768


@dataclass(frozen=True, slots=True)
class ChosenKeys:
    """One cache, and the tokens of it that each query attends to.

    Attributes
    ----------
    gather
        Reads keys.
    num_slots
        Tokens in the cache; an index that is negative or not below it names no token.
    indices
        [num_queries, num_heads_kv, topk] integers: slots of the cache.
    lengths
        [num_queries] integers: so many leading indices of a query count; None: all.
    """

    gather: Gather
    num_slots: int
    indices: Array
    lengths: Array | None = None

    def valid(self, begin: int, end: int, kv_head: int) -> Array:
        """Which indices of queries begin..end name a token that counts: [queries, topk]."""
        indices = self.indices[begin:end, kv_head]
        valid = (indices >= 0) & (indices < self.num_slots)
        if self.lengths is not None:
            valid &= np.arange(indices.shape[1]) < self.lengths[begin:end, None]
        return valid


@unheeded
def sparse_attention_reference(
    q: Array,
    sources: Sequence[ChosenKeys],
    softmax_scale: float,
    *,
    num_heads_kv: int,
    head_dim_v: int,
    out: Array,
    lse: Array,
    max_logits: Array | None = None,
    attn_sink: Array | None = None,
    dtype: npt.DTypeLike = np.float32,
) -> None:
    """``out = softmax(scale * q @ k^T) @ k[..., :head_dim_v]`` over the chosen tokens of all sources together.

    A token that is chosen twice counts twice. With ``attn_sink``, out is scaled by exp(lse) / (exp(lse) + exp(sink)),
    as if the softmax had one more score without a value; lse and max_logits are without it.

    Parameters
    ----------
    q
        [num_queries, num_heads_q, d_qk], any floating type.
    sources
        Caches and the tokens chosen of them.
    softmax_scale
        Factor on the scores.
    num_heads_kv
        Heads of the caches; it divides num_heads_q.
    head_dim_v
        Leading columns of a key that are its value.
    out
        [num_queries, num_heads_q, head_dim_v], written: 0 for a query without a token.
    lse, max_logits
        [num_queries, num_heads_q], written: natural logarithm of the sum of exponentials of the scaled scores, and
        their largest; -inf for a query without a token.
    attn_sink
        [num_heads_q]; -inf has no effect, +inf gives out = 0.
    dtype
        Type of all arithmetic, ``numpy.float32`` or ``numpy.float64``.
    """
    compute = np.dtype(dtype)
    num_queries, num_heads_q, _ = q.shape
    group_heads = num_heads_q // num_heads_kv
    keys_of_query = max(sum(source.indices.shape[2] for source in sources), 1)
    step = max(_KEYS_PER_STEP // keys_of_query, 1)
    sinks = None if attn_sink is None else attn_sink.astype(compute)
    for kv_head in range(num_heads_kv):
        heads = slice(kv_head * group_heads, (kv_head + 1) * group_heads)
        for begin in range(0, num_queries, step):
            rows = slice(begin, min(begin + step, num_queries))
            keys, valid = _gather(sources, rows, kv_head, compute, q.shape[2])
            scores = (q[rows, heads].astype(compute) * softmax_scale) @ keys.swapaxes(1, 2)
            scores = np.where(valid[:, None], scores, -np.inf)
            highest = scores.max(axis=2, initial=-np.inf)
            base = np.where(np.isneginf(highest), highest.dtype.type(0), highest)
            weights = np.exp(scores - base[..., None])
            total = weights.sum(axis=2)
            row_lse = base + np.log(total)
            divisor = total if sinks is None else total + np.exp(sinks[heads] - base)
            summed = weights @ keys[..., :head_dim_v]
            out[rows, heads] = np.where((total == 0)[..., None], total.dtype.type(0), summed / divisor[..., None])
            lse[rows, heads] = row_lse
            if max_logits is not None:
                max_logits[rows, heads] = highest


def _gather(
    sources: Sequence[ChosenKeys], rows: slice, kv_head: int, compute: np.dtype[Any], width: int
) -> tuple[Array, Array]:
    """Keys [queries, tokens, width] of the queries ``rows``, 0 where there is none, and where there is one."""
    all_keys, all_valid = [], []
    for source in sources:
        valid = source.valid(rows.start, rows.stop, kv_head)
        keys = np.zeros((*valid.shape, width), compute)
        keys[valid] = source.gather(source.indices[rows, kv_head][valid].astype(np.int64), kv_head)
        all_keys.append(keys)
        all_valid.append(valid)
    return np.concatenate(all_keys, axis=1), np.concatenate(all_valid, axis=1)


@unheeded
def sparse_reference(
    problem: SparseProblem,
    inputs: SparseInputs,
    softmax_scale: float,
    *,
    out: Array,
    lse: Array,
    max_logits: Array | None = None,
    empty_lse: float = -np.inf,
    dtype: npt.DTypeLike = np.float32,
) -> None:
    """`sparse_attention_reference` on a call that was described. CUDA arrays are copied to the host first.

    Parameters
    ----------
    problem, inputs
        What `describe_sparse_decode` or `describe_sparse_prefill` returned.
    softmax_scale
        Factor on the scores.
    out
        [batch, seqlen_q, num_heads_q, d_v] of any floating type and strides, written. It may lie where q does.
    lse, max_logits
        [batch, num_heads_q, seqlen_q] and [batch * seqlen_q, num_heads_q] of any floating type, written.
    empty_lse
        The lse of a query without a token.
    dtype
        Type of all arithmetic.
    """
    queries, keys = problem.queries, problem.keys
    total, heads, compute = queries.total_q, queries.num_heads_q, np.dtype(dtype)
    scale = inputs.kv_scale_value if inputs.kv_scale is None else float(as_numpy(inputs.kv_scale).reshape(()))

    def chosen_of(
        layout: CacheLayout,
        kv: ArrayView,
        num_slots: int,
        indices: ArrayView,
        lengths: ArrayView | None,
        tokens_per_length: int | None,
    ) -> ChosenKeys:
        cache, kv_scale = as_numpy(kv), scale if layout.needs_scale else None
        all_lengths = None
        if lengths is not None and tokens_per_length is not None:
            all_lengths = np.repeat(as_numpy(lengths).reshape(-1), tokens_per_length)
        return ChosenKeys(
            gather=lambda slots, kv_head: layout.dequantise_tokens(cache, slots, kv_head, kv_scale).astype(compute),
            num_slots=num_slots,
            indices=as_numpy(indices).reshape(total, queries.num_heads_kv, indices.shape[-1]),
            lengths=all_lengths,
        )

    lengths, extra_lengths = inputs.topk_length, inputs.extra_topk_length
    sources = [
        chosen_of(problem.layout, inputs.kv, inputs.num_slots, inputs.indices, lengths, keys.tokens_per_length)
    ]
    if problem.extra_layout is not None and inputs.extra_kv is not None and inputs.extra_indices is not None:
        of_extra = inputs.extra_kv, inputs.num_extra_slots, inputs.extra_indices, extra_lengths
        sources.append(chosen_of(problem.extra_layout, *of_extra, keys.extra_tokens_per_length))
    results = np.empty((total, heads, queries.head_dim_v), compute)
    sums, largest = np.empty((total, heads), compute), np.empty((total, heads), compute)
    sparse_attention_reference(
        as_numpy(inputs.q).reshape(total, heads, queries.head_dim_qk),
        sources,
        softmax_scale,
        num_heads_kv=queries.num_heads_kv,
        head_dim_v=queries.head_dim_v,
        out=results,
        lse=sums,
        max_logits=largest,
        attn_sink=None if inputs.attn_sink is None else as_numpy(inputs.attn_sink),
        dtype=compute,
    )
    sums[np.isneginf(sums)] = empty_lse
    out[...] = results.reshape(out.shape)
    lse[...] = sums.reshape(queries.batch, queries.seqlen_q, heads).swapaxes(1, 2)
    if max_logits is not None:
        max_logits[...] = largest
