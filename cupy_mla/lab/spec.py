"""What a case is made of, without its arrays: `build_case` makes those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arrays.dtypes import ITEM_SIZES
from ..call.options import AUTO, COMPUTES
from ..errors import InvalidArgumentError
from ..layouts import DENSE_LAYOUTS, CacheLayout, find_layout
from ..schedule.pieces import ceil_div
from .work import IntArray, Work, count_sparse_work, count_work

DTYPES = tuple(DENSE_LAYOUTS)
DEFAULT_DTYPE = DTYPES[0]
DEFAULT_HEAD_DIM_V = 512
DEFAULT_ROPE_DIM = 64
DEFAULT_PAGE_SIZE = 64
KV_SCALE = 0.75  # of a cache with a scale; no power of two, so that it cannot be lost in exponents

# One array for latent and rope columns; one for each; a view into a larger pool.
PACKED, SPLIT, STRIDED = STORAGES = ("packed", "split", "strided")

_EXTRA_SEED = 1 << 20  # apart from those of other cases
SPARE_PAGES = 3  # of a poisoned cache: pages of no request


@dataclass(frozen=True)
class CaseSpec:
    """One case of dense decoding or, with ``topk``, of sparse attention. Equal specs give equal arrays, on the same
    library.

    Attributes
    ----------
    lengths
        [batch] tokens in each request's cache.
    num_heads_q, num_heads_kv
        Heads; the first is a multiple of the second.
    seqlens_q
        Query tokens of a request: one number for all, or [batch] numbers for a ragged q.
    latent_dim, rope_dim
        Widths of the two parts of a cached token; the latent part is also the value.
    dtype
        Element type of q and out: ``bfloat16`` or ``float16``.
    layout
        Name of the cache's layout; None: the dense one of ``dtype``.
    compute
        As in ``mla_decode``.
    page_size
        Tokens of a page.
    causal, softmax_scale
        As in ``mla_decode``.
    storage
        ``packed``: q and cache are one array each. ``split``: pairs (latent, rope). ``strided``: the cache is a view
        into a pool that holds the pages of two layers side by side.
    padded
        q and cache are views of arrays with wider rows and more tokens.
    poison
        Fill what belongs to no token with what must never reach a result: the rest of each last page and spare pages
        with not-a-number and infinities, the rest of each row of the block table with numbers of other pages and of
        none. (What lies between the elements of a view is always poisoned.)
    topk
        How many tokens of its request each query token attends to, chosen at random: indices that do not find a token
        name none. None: dense decoding.
    prefill
        One request, each of whose query tokens is a row of ``mla_sparse_prefill``.
    topk_length
        Whether only so many leading indices count, another number for each query token.
    attn_sink
        Whether there is an attention sink.
    extra_topk
        How many tokens of a second cache, which has as many of each request, each query token attends to besides. None:
        there is none.
    extra_page_size, extra_layout, extra_topk_length
        Of the second cache, as their namesakes; extra_layout None: ``layout``.
    seed
        Of the values, of the order of the pages and of the tokens that are chosen.

    Raises
    ------
    InvalidArgumentError
        An unknown dtype, layout, storage or way to compute; a layout that cannot store such tokens or does not go with
        such queries; or what dense decoding or sparse attention does not have.
    """

    lengths: tuple[int, ...]
    num_heads_q: int
    num_heads_kv: int = 1
    seqlens_q: int | tuple[int, ...] = 1
    latent_dim: int = DEFAULT_HEAD_DIM_V
    rope_dim: int = DEFAULT_ROPE_DIM
    dtype: str = DEFAULT_DTYPE
    layout: str | None = None
    page_size: int = DEFAULT_PAGE_SIZE
    causal: bool = False
    softmax_scale: float | None = None
    storage: str = PACKED
    padded: bool = False
    poison: bool = False
    compute: str = AUTO
    topk: int | None = None
    prefill: bool = False
    topk_length: bool = False
    attn_sink: bool = False
    extra_topk: int | None = None
    extra_page_size: int = DEFAULT_PAGE_SIZE
    extra_layout: str | None = None
    extra_topk_length: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for argument, known in (("dtype", DTYPES), ("storage", STORAGES), ("compute", COMPUTES)):
            if getattr(self, argument) not in known:
                raise InvalidArgumentError(argument, "one of " + ", ".join(known), repr(getattr(self, argument)))
        layout, widths = self.cache_layout, (self.latent_dim, self.rope_dim)
        if self.dtype not in layout.query_dtypes or not layout.supports(*widths):
            expected = f"one for {self.dtype} queries and tokens of {widths[0]} + {widths[1]}"
            raise InvalidArgumentError("layout", expected, repr(self.layout))
        if layout.page_end_bytes and (self.storage != PACKED or self.padded):
            expected = f"{PACKED}, without padding, for pages of {layout.name}"
            raise InvalidArgumentError("storage", expected, repr(self.storage))
        self._check_kind()

    def _check_kind(self) -> None:
        if self.topk is None:
            for argument in ("prefill", "topk_length", "attn_sink", "extra_topk"):
                if getattr(self, argument):
                    raise InvalidArgumentError(argument, "nothing without topk", "both")
            return
        if self.prefill and self.extra_topk is not None:
            raise InvalidArgumentError("extra_topk", "nothing beside prefill, which has one cache", "both")
        if self.extra is not None:
            assert self.extra.batch == self.batch  # a spec of its own checks the rest
        if self.topk < 1:
            raise InvalidArgumentError("topk", "at least 1", str(self.topk))
        if self.causal:
            raise InvalidArgumentError("causal", "nothing beside topk: indices say what is seen", "both")
        if self.ragged:
            raise InvalidArgumentError("seqlens_q", "the same number for all requests beside topk", "several")
        if self.storage == SPLIT:
            raise InvalidArgumentError("storage", f"{PACKED} or {STRIDED} beside topk", repr(self.storage))
        if self.prefill and self.batch != 1:
            raise InvalidArgumentError("prefill", "one request", str(self.batch))

    @property
    def cache_layout(self) -> CacheLayout:
        """The layout itself."""
        return DENSE_LAYOUTS[self.dtype] if self.layout is None else find_layout(self.layout)

    @property
    def extra(self) -> CaseSpec | None:
        """A case over the second cache alone, which is as that one is stored; None if there is none."""
        if self.extra_topk is None:
            return None
        return replace(
            self,
            topk=self.extra_topk,
            page_size=self.extra_page_size,
            layout=self.extra_layout or self.layout,
            topk_length=self.extra_topk_length,
            attn_sink=False,
            seed=self.seed + _EXTRA_SEED,
            extra_topk=None,
        )

    @property
    def ragged(self) -> bool:
        return not isinstance(self.seqlens_q, int)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def head_dim(self) -> int:
        """Width of q and of a cached token."""
        return self.latent_dim + self.rope_dim

    @property
    def scale(self) -> float:
        """The factor on the scores."""
        return float(self.head_dim**-0.5) if self.softmax_scale is None else self.softmax_scale

    @property
    def kv_lengths(self) -> IntArray:
        """[batch] int64: cached tokens."""
        return np.array(self.lengths, dtype=np.int64)

    @property
    def q_lengths(self) -> IntArray:
        """[batch] int64: query tokens."""
        return np.broadcast_to(np.asarray(self.seqlens_q, dtype=np.int64), (self.batch,))

    @property
    def q_starts(self) -> IntArray:
        """[batch + 1] int64: where each request's query tokens begin among all."""
        return starts_of(self.q_lengths)

    @property
    def page_counts(self) -> IntArray:
        """[batch] int64: pages that a request's tokens fill."""
        return np.array([ceil_div(length, self.page_size) for length in self.lengths], dtype=np.int64)

    @property
    def num_pages(self) -> int:
        """Pages of the cache: those that are used, at least one, and spare ones of a poisoned cache."""
        return max(int(self.page_counts.sum()) + SPARE_PAGES * self.poison, 1)

    @property
    def q_shape(self) -> tuple[int, ...]:
        """[batch, seqlen_q, h, d], or [total_q, h, d] when ragged or of prefill."""
        total = int(self.q_lengths.sum())
        rows = (total,) if self.ragged or self.prefill else (self.batch, total // max(self.batch, 1))
        return (*rows, self.num_heads_q, self.head_dim)

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """[num_pages, page_size, h_kv, width], in elements of the layout's type."""
        width = self.cache_layout.width(self.latent_dim, self.rope_dim)
        return self.num_pages, self.page_size, self.num_heads_kv, width

    @property
    def cache_bytes(self) -> int:
        """Of both, where there are two."""
        size = int(np.prod(self.cache_shape, dtype=np.int64)) * ITEM_SIZES[self.cache_layout.dtype]
        return size if self.extra is None else size + self.extra.cache_bytes

    @property
    def chosen(self) -> IntArray:
        """[batch, seqlen_q] int64: tokens that each query token attends to where all its indices count."""
        seqlen_q = int(self.q_lengths.max(initial=0))
        return np.repeat(np.minimum(self.kv_lengths, self.topk or 0)[:, None], seqlen_q, axis=1)

    @property
    def work(self) -> Work:
        return self.work_of(self.chosen, None if self.extra is None else self.extra.chosen)

    def work_of(self, counts: IntArray, extra_counts: IntArray | None = None) -> Work:
        """Where query tokens attend to so many tokens, [batch, seqlen_q], and so many of a second cache; looked at with
        ``topk`` only."""
        shape: dict[str, Any] = {
            "num_heads_q": self.num_heads_q,
            "num_heads_kv": self.num_heads_kv,
            "head_dim": self.head_dim,
            "head_dim_v": self.latent_dim,
            "layout": self.cache_layout,
            "item_size": ITEM_SIZES[self.dtype],
        }
        if self.topk is not None:
            work = count_sparse_work(counts, self.kv_lengths, **shape)
            if self.extra is None or extra_counts is None:
                return work
            of_extra = self.extra.work_of(extra_counts)
            rows = count_sparse_work(np.zeros_like(counts), self.kv_lengths, **shape)  # counted in both
            return Work(work.flops + of_extra.flops, work.bytes + of_extra.bytes - rows.bytes)
        return count_work(self.kv_lengths, self.q_lengths, causal=self.causal, **shape)


def starts_of(counts: Sequence[int] | IntArray) -> IntArray:
    """[len + 1] int64: 0, and the sums of the first one, two, ... counts."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))])
