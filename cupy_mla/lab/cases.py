"""A decode case: the arguments of one mla_decode call with what the host knows about them.

Cases are built from request lengths here, on either backend, or loaded (case_files.py). A case also says how much
work it is (FLOP and bytes) and gives single requests of itself back as small host cases, for checks against float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .case_arrays import Array, random_normal, take_pages, to_device, to_host

IntArray = npt.NDArray[np.int64]

NO_PAGE = -1  # fills the block table past a request's last page; never read as a page
DEFAULT_HEAD_DIM_V = 512
TENSORS = ("q", "kv_cache", "block_table", "cache_seqlens")
OPTIONS = ("cu_seqlens_q", "softmax_scale", "causal", "head_dim_v")


@dataclass(frozen=True, slots=True)
class Work:
    """The least that a case costs. ``flops``: both products; ``bytes``: the cache once per request, q and out."""

    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Case:
    """Arguments of ``mla_decode`` (shapes there) and the host's copy of the lengths.

    Attributes
    ----------
    q, kv_cache, block_table, cache_seqlens, cu_seqlens_q, head_dim_v, softmax_scale, causal
        As in ``mla_decode``; the arrays are NumPy arrays or CuPy arrays, all on one backend.
    kv_lengths, q_lengths
        [batch] int64 on the host: cached tokens and query tokens of each request.
    """

    q: Any
    kv_cache: Any
    block_table: Any
    cache_seqlens: Any
    kv_lengths: IntArray
    q_lengths: IntArray
    cu_seqlens_q: Any = None
    head_dim_v: int = DEFAULT_HEAD_DIM_V
    softmax_scale: float | None = None
    causal: bool = False

    @property
    def backend(self) -> str:
        """``cuda`` or ``numpy``."""
        return "numpy" if isinstance(self.q, np.ndarray) else "cuda"

    @property
    def batch(self) -> int:
        return len(self.kv_lengths)

    @property
    def tensors(self) -> tuple[Any, Any, Any, Any]:
        """The positional arguments of ``mla_decode`` and ``plan_decode``."""
        return self.q, self.kv_cache, self.block_table, self.cache_seqlens

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of ``mla_decode`` that belong to the case."""
        return {name: getattr(self, name) for name in OPTIONS}

    @property
    def plan_options(self) -> dict[str, Any]:
        """The keyword arguments of ``plan_decode`` that belong to the case: a plan serves any scale."""
        return {name: value for name, value in self.options.items() if name != "softmax_scale"}

    @property
    def work(self) -> Work:
        """2 (d_qk + d_v) FLOP per query row and visible key; the bytes of ``Work``."""
        num_heads_q, head_dim = self.q.shape[-2:]
        num_heads_kv = self.kv_cache.shape[2]
        pairs = num_heads_q * visible_pairs(self.kv_lengths, self.q_lengths, self.causal)
        kv_vectors = num_heads_kv * int(self.kv_lengths[self.q_lengths > 0].sum())
        rows = num_heads_q * int(self.q_lengths.sum())
        values = kv_vectors * head_dim + rows * (head_dim + self.head_dim_v)
        return Work(flops=2 * (head_dim + self.head_dim_v) * pairs, bytes=values * self.q.dtype.itemsize)

    def on(self, backend: str) -> Case:
        """The same case with its arrays on ``backend`` (itself when they are there)."""
        if backend == self.backend:
            return self
        move = to_device if backend == "cuda" else to_host
        return replace(
            self,
            q=move(self.q),
            kv_cache=move(self.kv_cache),
            block_table=move(self.block_table),
            cache_seqlens=move(self.cache_seqlens),
            cu_seqlens_q=None if self.cu_seqlens_q is None else move(self.cu_seqlens_q),
        )

    def request(self, index: int) -> Case:
        """One request as a host case of batch 1, q [1, its query tokens, h_q, d_qk], with only its own pages."""
        kv_length = int(self.kv_lengths[index])
        num_pages = -(-kv_length // self.kv_cache.shape[1])
        pages = to_host(self.block_table[index])[:num_pages].astype(np.int64)
        return Case(
            q=to_host(self._rows(self.q, index))[None],
            # An empty request still needs a cache and a table that are well formed.
            kv_cache=take_pages(self.kv_cache, pages if num_pages else np.zeros(1, dtype=np.int64)),
            block_table=np.arange(max(num_pages, 1), dtype=np.int32)[None],
            cache_seqlens=np.array([kv_length], dtype=np.int32),
            kv_lengths=self.kv_lengths[index : index + 1],
            q_lengths=self.q_lengths[index : index + 1],
            head_dim_v=self.head_dim_v,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
        )

    def request_result(self, index: int, out: Any, lse: Any) -> tuple[Array, Array]:
        """One request's part of a result of ``mla_decode``: out [s_q, h_q, d_v] and lse [h_q, s_q], on the host."""
        lse_of_request = lse[index] if self.cu_seqlens_q is None else lse[:, self._span(index)]
        return to_host(self._rows(out, index)), to_host(lse_of_request)

    def _rows(self, array: Any, index: int) -> Any:
        return array[index] if self.cu_seqlens_q is None else array[self._span(index)]

    def _span(self, index: int) -> slice:
        begin = int(self.q_lengths[:index].sum())
        return slice(begin, begin + int(self.q_lengths[index]))


def visible_pairs(kv_lengths: IntArray, q_lengths: IntArray, causal: bool) -> int:
    """Pairs of a query token and a key it sees; causal: query i of s_q sees keys up to length - s_q + i."""
    if not causal:
        return int((kv_lengths * q_lengths).sum())
    # The last n = min(s_q, length) query tokens see length - n + 1, ..., length keys; those before them see none.
    seeing = np.minimum(q_lengths, kv_lengths)
    return int((seeing * (2 * kv_lengths - seeing + 1) // 2).sum())


def build_case(
    kv_lengths: Sequence[int] | IntArray,
    *,
    num_heads_q: int,
    num_heads_kv: int = 1,
    latent_dim: int = DEFAULT_HEAD_DIM_V,
    rope_dim: int = 64,
    seqlens_q: int | Sequence[int] = 1,
    dtype: str = "bfloat16",
    page_size: int = 64,
    causal: bool = False,
    seed: int = 0,
    backend: str = "numpy",
) -> Case:
    """A case with normal random values and pages in random order.

    Parameters
    ----------
    kv_lengths
        [batch] tokens in each request's cache.
    seqlens_q
        Query tokens per request: one number for all, or [batch] numbers for a ragged q.
    dtype, backend, seed
        As in ``random_normal``; the seed also shuffles the pages.

    Returns
    -------
    A case with q [batch, s_q, h_q, d] (ragged: [total, h_q, d]), d = latent_dim + rope_dim, and the latent part as v.
    """
    lengths = np.asarray(kv_lengths, dtype=np.int64)
    ragged = not isinstance(seqlens_q, int)
    q_lengths = np.broadcast_to(np.asarray(seqlens_q, dtype=np.int64), lengths.shape)
    page_counts = -(-lengths // page_size)
    num_pages = max(int(page_counts.sum()), 1)
    table = page_table(page_counts, np.random.default_rng(seed).permutation(num_pages))
    head_dim = latent_dim + rope_dim
    rows = (int(q_lengths.sum()),) if ragged else (len(lengths), int(q_lengths[0]))
    cu_seqlens_q = np.concatenate([[0], np.cumsum(q_lengths)]).astype(np.int32) if ragged else None
    move = to_device if backend == "cuda" else to_host
    return Case(
        # Two streams of values from one seed: the query must not repeat the cache.
        q=random_normal((*rows, num_heads_q, head_dim), dtype, 2 * seed, backend),
        kv_cache=random_normal((num_pages, page_size, num_heads_kv, head_dim), dtype, 2 * seed + 1, backend),
        block_table=move(table),
        cache_seqlens=move(lengths.astype(np.int32)),
        kv_lengths=lengths,
        q_lengths=q_lengths,
        cu_seqlens_q=None if cu_seqlens_q is None else move(cu_seqlens_q),
        head_dim_v=latent_dim,
        causal=causal,
    )


def page_table(page_counts: IntArray, pages: IntArray) -> Array:
    """Deal ``pages`` out in order: [batch, most pages (at least 1)] int32, NO_PAGE past a request's last page."""
    table = np.full((len(page_counts), max(int(page_counts.max(initial=0)), 1)), NO_PAGE, dtype=np.int32)
    used = np.arange(table.shape[1]) < page_counts[:, None]
    table[used] = pages[: int(page_counts.sum())]
    return table
