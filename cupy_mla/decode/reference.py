"""The NumPy backend: decode attention on CPU arrays, one request after the other, with BLAS.

It is the default where no Hopper GPU is, and with ``dtype=numpy.float64`` the oracle of everything else. Only tokens
inside a sequence are ever gathered, so what lies past its end, in unused pages or in padding cannot reach a result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays.dtypes import numpy_dtype
from ..arrays.events import unheeded
from ..arrays.exchange import as_numpy
from ..call.options import FP8
from ..call.problem import DecodeInputs, DecodeProblem
from .rounded_queries import round_queries

Array = npt.NDArray[Any]

# Keys that are converted and multiplied at once. Bounds the memory of a request whatever its length, and keeps the
# float32 keys of a step (2.4 MB at width 576) in the cache: at 128 heads and 8192 tokens, one thread takes 45 ms a
# request in steps of 512 to 2048, 69 ms in one step.
TOKENS_PER_STEP = 1024


@unheeded
def mla_decode_reference(
    problem: DecodeProblem,
    inputs: DecodeInputs,
    softmax_scale: float,
    *,
    dtype: npt.DTypeLike = np.float32,
    out: Array | None = None,
    lse: Array | None = None,
    empty_lse: float = -np.inf,
) -> tuple[Array, Array]:
    """``out = softmax(scale * q @ k^T) @ k[..., :d_v]`` over a paged cache, and the log-sum-exp of the scores.

    The softmax is taken in steps over the keys with a running maximum (Milakov and Gimelshein, "Online normalizer
    calculation for softmax", 2018).

    Parameters
    ----------
    problem, inputs
        What `cupy_mla.describe.describe_decode` returned. CUDA arrays are copied to the host first.
    softmax_scale
        Factor on the scores.
    dtype
        Type of all arithmetic, ``numpy.float32`` or ``numpy.float64``.
    out
        Array to write to, of `DecodeProblem.out_shape` and any floating type; None: a new one.
    lse
        Array to write to, of `DecodeProblem.lse_shape` and any floating type; None: a new one.
    empty_lse
        -inf or +inf.

    Returns
    -------
    out
        [batch, seqlen_q, num_heads_q, d_v], or [total_q, num_heads_q, d_v] when ragged, of q's type; float64 when
        that is ``dtype``. 0 for a query that sees no key.
    lse
        [batch, num_heads_q, seqlen_q], or [num_heads_q, total_q] when ragged, of type ``dtype``; natural logarithm.
        ``empty_lse`` for a query that sees no key.

    Notes
    -----
    Lengths are taken as clamped to 0 and the block table's capacity, and a page number outside the cache as a page
    of zeros, as in the kernels. A ragged query outside of every request gets 0 and ``empty_lse``.
    """
    compute = np.dtype(dtype)
    q_latent = as_numpy(inputs.q_latent)
    q_rope = None if inputs.q_rope is None else as_numpy(inputs.q_rope)
    if out is not None and np.may_share_memory(out, q_latent):  # e.g. an output in the place of the query
        q_latent = q_latent.copy()
    if out is not None and q_rope is not None and np.may_share_memory(out, q_rope):
        q_rope = q_rope.copy()
    if out is None:
        out_dtype = compute if compute == np.float64 else numpy_dtype(problem.queries.dtype)
        out = np.zeros(problem.queries.out_shape, out_dtype)
    else:
        out[...] = 0
    if lse is None:
        lse = np.full(problem.queries.lse_shape, -np.inf, compute)
    else:
        lse[...] = -np.inf
    keys = _PagedKeys(problem, inputs, compute)
    lengths, totals = _lengths(problem, inputs)
    starts = None if inputs.cu_seqlens_q is None else np.clip(as_numpy(inputs.cu_seqlens_q), 0, problem.queries.total_q)

    for request in range(problem.queries.batch):
        rows: Any  # this request's queries in q and out, and in the last axes of lse
        if starts is None:
            rows = request
            lse_rows = lse[request]
        else:
            rows = slice(int(starts[request]), int(starts[request + 1]))
            lse_rows = lse[:, rows]
        if out[rows].size == 0:
            continue
        given = [part[rows].astype(compute) for part in (q_latent, q_rope) if part is not None]
        if problem.compute == FP8:
            given = round_queries(given, keys.scales)
        queries = [_by_kv_head(part, problem.queries.num_heads_kv) for part in given]
        for part in queries:
            part *= softmax_scale
        length = int(lengths[request])
        visible = _visible_keys(queries[0].shape[1], length, int(totals[request]), problem)
        request_out, request_lse = _attend(queries, keys, request, length, visible, problem)
        seqlen_q = out[rows].shape[0]
        out[rows] = _by_query(request_out, seqlen_q)
        lse_rows[...] = _by_query(request_lse[..., None], seqlen_q)[..., 0].T
    lse[np.isneginf(lse)] = empty_lse
    return out, lse


@unheeded
def merge_states_reference(outs: Array, lses: Array, *, dtype: npt.DTypeLike = np.float32) -> tuple[Array, Array]:
    """Merge attention over disjoint sets of keys into attention over all of them.

    ``lse = log(sum(exp(lse_i)))``, ``out = sum(exp(lse_i - lse) * out_i)``.

    Parameters
    ----------
    outs
        [n, ..., d]: n partial results of any floating type.
    lses
        [n, ...]: their log-sum-exps, natural logarithm; -inf or +inf where a part saw no key, whose out is not looked
        at.
    dtype
        Type of the arithmetic, ``numpy.float32`` or ``numpy.float64``.

    Returns
    -------
    out
        [..., d] of the type of ``outs``; float64 when that is ``dtype``. 0 where no part saw a key.
    lse
        [...] of type ``dtype``; -inf where no part saw a key.
    """
    compute = np.dtype(dtype)
    parts = lses.astype(compute)
    parts[np.isposinf(parts)] = -np.inf
    highest = parts.max(axis=0)
    weights = np.exp(parts - _finite(highest))
    total = weights.sum(axis=0)
    lse = _finite(highest) + np.log(total)
    seen = np.where(np.isneginf(parts)[..., None], compute.type(0), outs.astype(compute))
    summed = (weights[..., None] * seen).sum(axis=0)
    out = np.divide(summed, total[..., None], out=np.zeros_like(summed), where=(total != 0)[..., None])
    return out.astype(compute if compute == np.float64 else outs.dtype), lse


class _PagedKeys:
    """The cache, read token by token."""

    def __init__(self, problem: DecodeProblem, inputs: DecodeInputs, compute: np.dtype[Any]) -> None:
        self.page_size = problem.keys.page_size
        self.num_pages = inputs.num_pages
        self.compute = compute
        self.block_table = as_numpy(inputs.block_table)
        self.scales = inputs.kv_scale_values
        if inputs.kv_scale is not None:
            found = as_numpy(inputs.kv_scale).reshape(-1)
            self.scales = float(found[0]), float(found[-1])
        self.layout = problem.layout
        self.latent_dim = problem.queries.latent_dim
        self.parts = [as_numpy(inputs.kv_latent)]
        if inputs.kv_rope is not None:
            self.parts.append(as_numpy(inputs.kv_rope))

    def gather(self, request: int, begin: int, end: int) -> list[Array]:
        """Latent and rope keys of tokens begin..end of a request: each [num_heads_kv, end - begin, width]."""
        tokens = np.arange(begin, end)
        pages = self.block_table[request, tokens // self.page_size]
        outside = (pages < 0) | (pages >= self.num_pages)
        pages = np.where(outside, 0, pages)
        if not self.layout.has_columns:
            slots = pages * np.int64(self.page_size) + tokens % self.page_size
            rows = self.layout.dequantise_tokens(self.parts[0], slots, 0).astype(self.compute)[None]
            rows[:, outside] = 0
            return [part for part in np.split(rows, [self.latent_dim], axis=-1) if part.shape[-1]]
        gathered = []
        for part, scale in zip(self.parts, self.scales, strict=False):
            values = part[pages, tokens % self.page_size].astype(self.compute)
            values[outside] = 0
            if scale != 1:
                values *= scale
            gathered.append(values.transpose(1, 0, 2))
        return gathered


def _attend(
    queries: list[Array], keys: _PagedKeys, request: int, length: int, visible: Array, problem: DecodeProblem
) -> tuple[Array, Array]:
    """out [num_heads_kv, rows, d_v] and lse [num_heads_kv, rows] of one request; row = query * group_heads + head."""
    num_heads_kv, rows, _ = queries[0].shape
    compute = queries[0].dtype
    highest = np.full((num_heads_kv, rows), -np.inf, compute)
    total = np.zeros((num_heads_kv, rows), compute)
    summed = np.zeros((num_heads_kv, rows, problem.queries.head_dim_v), compute)
    for begin in range(0, length, TOKENS_PER_STEP):
        end = min(begin + TOKENS_PER_STEP, length)
        gathered = keys.gather(request, begin, end)
        scores = queries[0] @ gathered[0].swapaxes(1, 2)
        for query_part, key_part in zip(queries[1:], gathered[1:], strict=True):
            scores += query_part @ key_part.swapaxes(1, 2)
        if visible.min() < end:
            scores[:, np.arange(begin, end) >= visible[:, None]] = -np.inf
        new_highest = np.maximum(highest, scores.max(axis=2))
        base = _finite(new_highest)
        scores -= base[..., None]
        weights = np.exp(scores, out=scores)
        shrink = np.exp(highest - base)
        total = total * shrink + weights.sum(axis=2)
        summed = summed * shrink[..., None] + weights @ gathered[0]
        highest = new_highest
    lse = _finite(highest) + np.log(total)
    out = np.divide(summed, total[..., None], out=np.zeros_like(summed), where=(total != 0)[..., None])
    return out, lse


def _lengths(problem: DecodeProblem, inputs: DecodeInputs) -> tuple[Array, Array]:
    """Keys that the cache has of each request, and tokens of the whole requests."""
    most, shard = problem.keys.max_seqlen_k, problem.keys.shard
    if shard is None or inputs.total_seqlens is None:
        lengths = np.clip(as_numpy(inputs.cache_seqlens), 0, most)
        return lengths, lengths
    totals = np.clip(as_numpy(inputs.total_seqlens).astype(np.int64), 0, shard.longest_request(most))
    return shard.count(totals), totals


def _visible_keys(rows: int, length: int, total: int, problem: DecodeProblem) -> Array:
    """How many leading keys each row sees: [rows]. Causal: query i of s_q sees those of the total - s_q + i + 1 first
    tokens that are there.
    """
    if not problem.queries.causal:
        return np.full(rows, length)
    query = np.arange(rows) // problem.queries.group_heads
    seqlen_q = rows // problem.queries.group_heads
    tokens = np.clip(total - seqlen_q + query + 1, 0, total)
    return tokens if problem.keys.shard is None else problem.keys.shard.count(tokens)


def _finite(highest: Array) -> Array:
    """Row maxima to subtract; 0 for a row that has seen nothing (-inf - -inf would be NaN)."""
    return np.where(np.isneginf(highest), highest.dtype.type(0), highest)


def _by_kv_head(values: Array, num_heads_kv: int) -> Array:
    """[s_q, num_heads_q, width] to [num_heads_kv, s_q * group_heads, width]."""
    seqlen_q, num_heads_q, width = values.shape
    group_heads = num_heads_q // num_heads_kv
    grouped = values.reshape(seqlen_q, num_heads_kv, group_heads, width).transpose(1, 0, 2, 3)
    return np.ascontiguousarray(grouped).reshape(num_heads_kv, seqlen_q * group_heads, width)


def _by_query(values: Array, seqlen_q: int) -> Array:
    """The inverse of `_by_kv_head`."""
    num_heads_kv, rows, width = values.shape
    group_heads = rows // seqlen_q
    grouped = values.reshape(num_heads_kv, seqlen_q, group_heads, width).transpose(1, 0, 2, 3)
    return grouped.reshape(seqlen_q, num_heads_kv * group_heads, width)
