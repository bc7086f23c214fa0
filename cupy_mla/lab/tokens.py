"""Which tokens the query tokens of a sparse case attend to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .random_values import Array
from .spec import CaseSpec
from .work import IntArray

NO_TOKEN = -1
# In a poisoned case every so many-th index names no token, by one of these numbers or by one just past the cache.
_NO_TOKEN_EVERY = 5
_NO_TOKENS = (NO_TOKEN, -(2**31), 2**31 - 1)
_SINK_STEPS = (5, 7)  # heads whose sink has no effect, and those whose sink leaves nothing


@dataclass(frozen=True, slots=True)
class ChosenTokens:
    """Arguments of a sparse call, on the host.

    Attributes
    ----------
    indices
        [batch, seqlen_q, topk] int32, or [s_q, topk] of prefill.
    topk_length
        [batch, seqlen_q] int32, [batch], or [s_q] of prefill; None: all indices count.
    attn_sink
        [num_heads_q] float32, or None.
    counts
        [batch, seqlen_q] int64, also of prefill: tokens that each query token attends to.
    """

    indices: Array
    topk_length: Array | None
    attn_sink: Array | None
    counts: IntArray


def choose_tokens(spec: CaseSpec, table: Array, unused: Array, *, length_of_request: bool = False) -> ChosenTokens:
    """Tokens of each query token's request at random, none twice; all of a request that has no more than ``topk``.

    Parameters
    ----------
    spec
        With ``topk``.
    table
        The block table [batch, columns].
    unused
        Pages of no request; of a poisoned case, whose indices that do not count name them.
    length_of_request
        Whether all query tokens of a request share their length, as FlashMLA has it; topk_length is then [batch].
    """
    assert spec.topk is not None
    rng = np.random.default_rng(spec.seed + 1)
    seqlen_q = int(spec.q_lengths.max(initial=0))
    indices = np.full((spec.batch, seqlen_q, spec.topk), NO_TOKEN, np.int32)
    for request, length in enumerate(spec.lengths):
        count = min(spec.topk, length)
        if not count:
            continue
        # One of each of so many stretches of the request, in random order.
        edges = np.arange(count + 1, dtype=np.int64) * length // count
        tokens = edges[:-1] + (rng.random((seqlen_q, count)) * np.diff(edges)).astype(np.int64)
        tokens = rng.permuted(tokens, axis=1)
        pages = table[request, tokens // spec.page_size]
        indices[request, :, :count] = pages * spec.page_size + tokens % spec.page_size
    num_slots = spec.num_pages * spec.page_size
    if spec.poison:
        names_none = rng.random(indices.shape) * _NO_TOKEN_EVERY < 1
        indices[names_none] = rng.choice(np.array([*_NO_TOKENS, num_slots], np.int32), int(names_none.sum()))
    counting = np.ones(indices.shape, bool)
    topk_length = None
    if spec.topk_length:
        sharing = (spec.batch, 1) if length_of_request else indices.shape[:2]
        topk_length = rng.integers(0, spec.topk + 1, sharing, dtype=np.int32)
        topk_length.flat[0], topk_length.flat[-1] = 0, spec.topk
        counting = np.arange(spec.topk) < topk_length[..., None]
        if spec.poison:
            counting = np.broadcast_to(counting, indices.shape)
            indices[~counting] = rng.choice(unused, int((~counting).sum())) * spec.page_size
    counts = (counting & (indices >= 0) & (indices < num_slots)).sum(axis=-1)
    sink = None
    if spec.attn_sink:
        sink = rng.standard_normal(spec.num_heads_q, np.float32)
        sink[1 :: _SINK_STEPS[0]], sink[2 :: _SINK_STEPS[1]] = -np.inf, np.inf
    if length_of_request and topk_length is not None:
        topk_length = topk_length[:, 0]
    if spec.prefill:
        indices, topk_length = indices[0], None if topk_length is None else topk_length[0]
    return ChosenTokens(indices, topk_length, sink, counts)
