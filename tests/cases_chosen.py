"""Tokens that queries of a decode case choose, and attention to them in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cupy_mla import slots_of
from cupy_mla.call.sparse import describe_sparse_decode
from cupy_mla.call.sparse_options import SparseDecodeArrays, SparseOptions
from cupy_mla.decode.reference_sparse import sparse_reference
from cupy_mla.lab.cases import Case


def choose_tokens(lengths: Sequence[int], seqlen_q: int, topk: int, most: int | None = None) -> np.ndarray:
    """[batch, seqlen_q, topk] token numbers of each request, different ones and at most so many, then -1."""
    most = topk if most is None else most
    rng = np.random.default_rng(most)
    tokens = np.full((len(lengths), seqlen_q, topk), -1, np.int32)
    for request, query in np.ndindex(tokens.shape[:2]):
        count = min(most, lengths[request])
        tokens[request, query, :count] = rng.choice(lengths[request], count, replace=False)
    return tokens


def attend_to_chosen(arrays: Case, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """out and lse of a host case's queries over these tokens of its whole cache, in float64."""
    slots = slots_of(tokens, arrays.block_table, arrays.kv_cache.shape[1])
    given = SparseDecodeArrays(arrays.q, arrays.kv_cache, slots, kv_scale=arrays.kv_scale)
    problem, inputs = describe_sparse_decode(given, SparseOptions(layout=arrays.layout))
    out, lse = np.empty(problem.queries.out_shape), np.empty(problem.queries.lse_shape)
    scale = problem.queries.default_softmax_scale
    sparse_reference(problem, inputs, scale, out=out, lse=lse, dtype=np.float64)
    return out, lse
