"""What a decode case is made of, without its arrays: `build_case` makes those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays.dtypes import ITEM_SIZES
from ..errors import InvalidArgumentError
from ..layouts import DENSE_LAYOUTS
from ..schedule.pieces import ceil_div
from .work import IntArray, Work, count_work

DTYPES = tuple(DENSE_LAYOUTS)
DEFAULT_DTYPE = DTYPES[0]
DEFAULT_HEAD_DIM_V = 512
DEFAULT_ROPE_DIM = 64
DEFAULT_PAGE_SIZE = 64

# One array for latent and rope columns; one for each; a view into a larger pool.
PACKED, SPLIT, STRIDED = STORAGES = ("packed", "split", "strided")

SPARE_PAGES = 3  # of a poisoned cache: pages of no request


@dataclass(frozen=True)
class CaseSpec:
    """One decode case. Equal specs give equal arrays, on the same library.

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
        Name of the cache's layout; None: the dense one of ``dtype``, the only one served so far.
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
    seed
        Of the values, and of the order of the pages.

    Raises
    ------
    InvalidArgumentError
        An unknown dtype, layout or storage.
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
    seed: int = 0

    def __post_init__(self) -> None:
        for argument, known in (("dtype", DTYPES), ("storage", STORAGES)):
            if getattr(self, argument) not in known:
                raise InvalidArgumentError(argument, "one of " + ", ".join(known), repr(getattr(self, argument)))
        dense = DENSE_LAYOUTS[self.dtype].name
        if self.layout not in (None, dense):
            raise InvalidArgumentError("layout", f"{dense}, that of {self.dtype}", repr(self.layout))

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
        """[batch, seqlen_q, h, d], or [total_q, h, d] when ragged."""
        rows = (self.batch, self.seqlens_q) if isinstance(self.seqlens_q, int) else (sum(self.seqlens_q),)
        return (*rows, self.num_heads_q, self.head_dim)

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """[num_pages, page_size, h_kv, d]."""
        return self.num_pages, self.page_size, self.num_heads_kv, self.head_dim

    @property
    def cache_bytes(self) -> int:
        return int(np.prod(self.cache_shape, dtype=np.int64)) * ITEM_SIZES[self.dtype]

    @property
    def work(self) -> Work:
        return count_work(
            self.kv_lengths,
            self.q_lengths,
            num_heads_q=self.num_heads_q,
            num_heads_kv=self.num_heads_kv,
            head_dim=self.head_dim,
            head_dim_v=self.latent_dim,
            causal=self.causal,
            layout=DENSE_LAYOUTS[self.dtype],
            item_size=ITEM_SIZES[self.dtype],
        )


def starts_of(counts: Sequence[int] | IntArray) -> IntArray:
    """[len + 1] int64: 0, and the sums of the first one, two, ... counts."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))])
