"""Random dense decode cases on poisoned caches, and an independent float64 formula for them. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
# Extra columns behind a strided row: still a multiple of 16 bytes, which the copy engine needs.
PADDING_COLUMNS = 32
PADDING_TOKENS = 3


@dataclass(frozen=True)
class DenseArrays:
    """Arguments of a decode call. q and kv_cache are ``pool[slices]``, so that a copy of the pool on a GPU can be cut
    the same way."""

    q_pool: np.ndarray
    q_slices: tuple[slice, ...]
    kv_pool: np.ndarray
    kv_slices: tuple[slice, ...]
    block_table: np.ndarray  # [batch, max_pages_per_seq] int32
    cache_seqlens: np.ndarray  # [batch] int32
    cu_seqlens_q: np.ndarray | None  # [batch + 1] int32 when ragged

    @property
    def q(self) -> np.ndarray:
        """[batch, seqlen_q, num_heads_q, d_qk], or [total_q, num_heads_q, d_qk] when ragged."""
        return self.q_pool[self.q_slices]

    @property
    def kv_cache(self) -> np.ndarray:
        """[num_pages, page_size, num_heads_kv, d_qk]."""
        return self.kv_pool[self.kv_slices]


@dataclass(frozen=True)
class DenseCase:
    """What to build. ``seqlens_q`` is one number, or one per request for a ragged call."""

    lengths: tuple[int, ...] = (140, 64, 1)
    seqlens_q: int | tuple[int, ...] = 1
    num_heads_q: int = 16
    num_heads_kv: int = 1
    latent_dim: int = 512
    rope_dim: int = 64
    dtype: str = "bfloat16"
    page_size: int = 64
    causal: bool = False
    strided: bool = False  # q and cache are views into larger arrays
    spare_pages: int = 3  # pages that no request uses
    spare_columns: int = 2  # columns of the block table past the longest sequence's last page
    softmax_scale: float | None = None
    seed: int = 0

    @property
    def ragged(self) -> bool:
        return isinstance(self.seqlens_q, tuple)

    @property
    def head_dim(self) -> int:
        return self.latent_dim + self.rope_dim

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the call that are no arrays."""
        return {"head_dim_v": self.latent_dim, "causal": self.causal, "softmax_scale": self.softmax_scale}

    def seqlen_q_of(self, request: int) -> int:
        return self.seqlens_q[request] if isinstance(self.seqlens_q, tuple) else self.seqlens_q

    def build(self) -> DenseArrays:
        """Arrays of random values, with poison wherever no token of a sequence is."""
        random = np.random.default_rng(self.seed)
        dtype = DTYPES[self.dtype]
        batch = len(self.lengths)
        used = [-(-length // self.page_size) for length in self.lengths]
        num_pages = sum(used) + max(self.spare_pages, 0 if sum(used) else 1)
        order = random.permutation(num_pages)

        kv_pool, kv_slices = self._pool(
            (num_pages, self.page_size, self.num_heads_kv, self.head_dim), token_axis=1, dtype=dtype
        )
        cache = kv_pool[kv_slices]
        columns = max(max(used) + self.spare_columns, 1)
        # Entries past a sequence's last page: pages of others, and numbers that are no page at all.
        garbage = np.array([-1, num_pages, 2**31 - 1, -(2**31), *range(num_pages)], np.int32)
        block_table = random.choice(garbage, (batch, columns))
        next_page = 0
        for request, length in enumerate(self.lengths):
            pages = order[next_page : next_page + used[request]]
            next_page += used[request]
            block_table[request, : len(pages)] = pages
            for index, page in enumerate(pages):
                tokens = min(self.page_size, length - index * self.page_size)
                values = random.standard_normal((tokens, self.num_heads_kv, self.head_dim), np.float32)
                cache[page, :tokens] = values.astype(dtype)

        cu_seqlens_q = None
        if isinstance(self.seqlens_q, tuple):
            cu_seqlens_q = np.concatenate([[0], np.cumsum(self.seqlens_q)]).astype(np.int32)
            q_shape: tuple[int, ...] = (int(cu_seqlens_q[-1]), self.num_heads_q, self.head_dim)
        else:
            q_shape = (batch, self.seqlens_q, self.num_heads_q, self.head_dim)
        q_pool, q_slices = self._pool(q_shape, token_axis=0, dtype=dtype)
        q_pool[q_slices] = random.standard_normal(q_shape, np.float32).astype(dtype)
        return DenseArrays(
            q_pool, q_slices, kv_pool, kv_slices, block_table, np.array(self.lengths, np.int32), cu_seqlens_q
        )

    def _pool(self, shape: tuple[int, ...], token_axis: int, dtype: np.dtype) -> tuple[np.ndarray, tuple[slice, ...]]:
        """An array full of NaN and infinities, and the slices that cut ``shape`` out of it."""
        pool_shape = list(shape)
        if self.strided:
            pool_shape[-1] += PADDING_COLUMNS
            pool_shape[token_axis] += PADDING_TOKENS
        pool = np.full(pool_shape, np.nan, np.float32)
        pool[..., ::3] = np.inf
        return pool.astype(dtype), tuple(slice(0, extent) for extent in shape)


def exact_decode(case: DenseCase, arrays: DenseArrays) -> tuple[np.ndarray, np.ndarray]:
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
