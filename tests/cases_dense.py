"""Random dense decode cases on poisoned caches, and an independent float64 formula for them. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from cupy_mla.lab.build import build_case
from cupy_mla.lab.cases import Case
from cupy_mla.lab.spec import CaseSpec

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


@dataclass(frozen=True)
class DenseCase(CaseSpec):
    """A poisoned case, and what most tests want of it."""

    lengths: tuple[int, ...] = (140, 64, 1)
    num_heads_q: int = 16
    poison: bool = True

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of the call that are no arrays."""
        return {"head_dim_v": self.latent_dim, "causal": self.causal, "softmax_scale": self.softmax_scale}

    def seqlen_q_of(self, request: int) -> int:
        return int(self.q_lengths[request])

    def build(self) -> Case:
        """NumPy arrays."""
        return build_case(self)


def exact_decode(case: DenseCase, arrays: Case) -> tuple[np.ndarray, np.ndarray]:
    """out and lse in float64, query by query and head by head: the formula, and nothing shared with the package."""
    q = arrays.q.astype(np.float64)
    cache = arrays.kv_cache
    batch = len(case.lengths)
    group_heads = case.num_heads_q // case.num_heads_kv
    out = np.zeros((*q.shape[:-1], case.latent_dim))
    lse = np.full((case.num_heads_q, q.shape[0]) if case.ragged else (batch, case.num_heads_q, q.shape[1]), -np.inf)
    row = 0
    for request in range(batch):
        length = case.lengths[request]
        seqlen_q = case.seqlen_q_of(request)
        tokens = np.arange(length)
        pages = arrays.block_table[request, tokens // case.page_size]
        keys = cache[pages, tokens % case.page_size].astype(np.float64)  # [length, num_heads_kv, head_dim]
        for i in range(seqlen_q):
            visible = min(length, max(0, length - seqlen_q + i + 1)) if case.causal else length
            where = (row,) if case.ragged else (request, i)
            row += 1
            if visible == 0:
                continue
            for head in range(case.num_heads_q):
                key = keys[:visible, head // group_heads]
                scores = case.scale * (key @ q[(*where, head)])
                top = scores.max()
                weights = np.exp(scores - top)
                out[(*where, head)] = weights @ key[:, : case.latent_dim] / weights.sum()
                lse_at = (head, row - 1) if case.ragged else (request, head, i)
                lse[lse_at] = top + np.log(weights.sum())
    return out, lse


def frobenius_error(result: np.ndarray, exact: np.ndarray) -> float:
    """Norm of the difference over the norm of ``exact``; NaN if the result has one."""
    norm = np.linalg.norm(exact)
    return float(np.linalg.norm(np.asarray(result, np.float64) - exact) / (norm if norm > 0 else 1.0))
