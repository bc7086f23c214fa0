"""Random sparse cases on poisoned caches, and an independent float64 formula for them. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from cases_dense import DTYPES

NO_TOKENS = (-1, -(2**31), 2**31 - 1)  # besides those that lie just past the cache


@dataclass(frozen=True)
class SparseCase:
    """Shapes and kinds of a case. Prefill has no batch: ``batch`` query tokens, ``seqlen_q`` 1."""

    batch: int = 3
    seqlen_q: int = 1
    num_heads_q: int = 16
    num_heads_kv: int = 1
    latent_dim: int = 512
    rope_dim: int = 64
    dtype: str = "bfloat16"
    num_pages: int = 7
    page_size: int = 16
    topk: int = 40
    lengths: str | None = None  # "token", "request" or None
    sinks: bool = False
    invalid: float = 0.2  # how many of the indices name no token
    seed: int = 0

    @property
    def num_slots(self) -> int:
        return self.num_pages * self.page_size

    @property
    def softmax_scale(self) -> float:
        return (self.latent_dim + self.rope_dim) ** -0.5

    def build(self) -> SparseArrays:
        """NumPy arrays. Slots that no query token counts hold NaN, and so do indices' tokens past the lengths."""
        rng = np.random.default_rng(self.seed)
        dtype, width = DTYPES[self.dtype], self.latent_dim + self.rope_dim
        queries = (self.batch, self.seqlen_q)
        q = rng.normal(size=(*queries, self.num_heads_q, width)).astype(dtype)
        indices = rng.integers(0, self.num_slots, (*queries, self.num_heads_kv, self.topk), dtype=np.int32)
        no_token = rng.choice([*NO_TOKENS, self.num_slots, self.num_slots + 3], indices.shape).astype(np.int32)
        indices = np.where(rng.random(indices.shape) < self.invalid, no_token, indices)
        lengths = None
        if self.lengths is not None:
            lengths = rng.integers(0, self.topk + 1, queries if self.lengths == "token" else self.batch, dtype=np.int32)
            lengths.flat[0], lengths.flat[-1] = 0, self.topk
        sinks = None
        if self.sinks:
            sinks = rng.normal(size=self.num_heads_q).astype(np.float32)
            sinks[::5], sinks[1::7] = -np.inf, np.inf
        kv = np.full((self.num_pages, self.page_size, self.num_heads_kv, width), np.nan, dtype)
        arrays = SparseArrays(self, q, kv, indices, lengths, sinks)
        flat = kv.reshape(self.num_slots, self.num_heads_kv, width)
        for head in range(self.num_heads_kv):
            used = np.unique(np.concatenate([arrays.chosen(*query, head) for query in np.ndindex(queries)]))
            flat[used, head] = rng.normal(size=(used.size, width)).astype(dtype)
        return arrays


@dataclass(frozen=True)
class SparseArrays:
    """q [batch, seqlen_q, heads, d], kv [pages, page_size, kv heads, d], indices [batch, seqlen_q, kv heads, topk]."""

    case: SparseCase
    q: np.ndarray
    kv: np.ndarray
    indices: np.ndarray
    lengths: np.ndarray | None
    sinks: np.ndarray | None

    def count(self, request: int, token: int) -> int:
        """How many indices of a query token count."""
        if self.lengths is None:
            return self.case.topk
        return int(self.lengths[request, token] if self.lengths.ndim == 2 else self.lengths[request])

    def chosen(self, request: int, token: int, kv_head: int) -> np.ndarray:
        """Slots that a query token attends to, as often as it does."""
        slots = self.indices[request, token, kv_head, : self.count(request, token)]
        return slots[(slots >= 0) & (slots < self.case.num_slots)]


def exact_sparse(arrays: SparseArrays, scale: float | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """out [batch, seqlen_q, heads, d_v], max_logits and lse [batch, seqlen_q, heads] in float64, kv head by kv head."""
    case = arrays.case
    queries, group = (case.batch, case.seqlen_q), case.num_heads_q // case.num_heads_kv
    out = np.zeros((*queries, case.num_heads_q, case.latent_dim))
    largest, lse = np.full((2, *queries, case.num_heads_q), -np.inf)
    sinks = np.full(case.num_heads_q, -np.inf) if arrays.sinks is None else arrays.sinks.astype(np.float64)
    flat = arrays.kv.reshape(case.num_slots, case.num_heads_kv, -1)
    for *query, kv_head in np.ndindex(*queries, case.num_heads_kv):
        keys = flat[arrays.chosen(*query, kv_head), kv_head].astype(np.float64)
        if not len(keys):
            continue
        place = (*query, slice(kv_head * group, (kv_head + 1) * group))
        q = arrays.q[place].astype(np.float64)
        scores = (case.softmax_scale if scale is None else scale) * (q @ keys.T)
        largest[place] = top = scores.max(axis=1)
        weights = np.exp(scores - top[:, None])
        total = weights.sum(axis=1)
        lse[place] = top + np.log(total)
        with np.errstate(over="ignore"):
            denominator = total + np.exp(sinks[place[-1]] - top)
        out[place] = weights @ keys[:, : case.latent_dim] / denominator[:, None]
    return out, largest, lse
