"""What a decode call is: a frozen description of its shapes, and views of its arrays."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..arrays.view import ArrayView
from ..layouts import CacheLayout
from ..shown.html import facts_table
from .shard import Shard

INDEX_DTYPE = "int32"
SLOT_DTYPE = "int64"  # of a slot mapping
LSE_DTYPE = "float32"
PLAN_DTYPE = "uint8"
PLAN_ALIGNMENT = 32  # bytes; sections of a plan
# Of a request: lengths are int32, and tokens are counted in it up to the end of a tile of 64.
MAX_TOKENS = 2**31 - 64


@dataclass(frozen=True, slots=True)
class Queries:
    """The queries of a call, and who attends to what.

    Attributes
    ----------
    batch
        Number of requests.
    seqlen_q
        Query tokens per request; for ragged queries the maximum.
    total_q
        Query tokens of all requests together.
    num_heads_q, num_heads_kv
        Heads; the second divides the first.
    latent_dim, rope_dim
        Width of the part of a key that is also the value, and of the part that is not (may be 0).
    dtype
        Element type of q and output: ``"bfloat16"`` or ``"float16"``.
    causal
        Whether query i of s_q sees keys up to length - s_q + i only.
    ragged
        Whether the queries of all requests lie one behind the other, cut by cu_seqlens_q.
    """

    batch: int
    seqlen_q: int
    total_q: int
    num_heads_q: int
    num_heads_kv: int
    latent_dim: int
    rope_dim: int
    dtype: str
    causal: bool
    ragged: bool

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute: no request, or no query token."""
        return self.batch == 0 or self.total_q == 0

    @property
    def head_dim_qk(self) -> int:
        """Width of a query or key."""
        return self.latent_dim + self.rope_dim

    @property
    def head_dim_v(self) -> int:
        """Width of a value and of the output."""
        return self.latent_dim

    @property
    def group_heads(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads_q // self.num_heads_kv

    @property
    def default_softmax_scale(self) -> float:
        """``head_dim_qk ** -0.5``."""
        return float(self.head_dim_qk**-0.5)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """[batch, seqlen_q, num_heads_q, d_v], or [total_q, num_heads_q, d_v] when ragged."""
        if self.ragged:
            return self.total_q, self.num_heads_q, self.head_dim_v
        return self.batch, self.seqlen_q, self.num_heads_q, self.head_dim_v

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """[batch, num_heads_q, seqlen_q], or [num_heads_q, total_q] when ragged."""
        if self.ragged:
            return self.num_heads_q, self.total_q
        return self.batch, self.num_heads_q, self.seqlen_q


@dataclass(frozen=True, slots=True)
class PagedKeys:
    """Keys that a block table names, page by page. How many pages there are does not count: the pool may grow.

    Attributes
    ----------
    page_size
        Tokens per page of the cache.
    max_pages_per_seq
        Columns of the block table.
    cp_world, cp_rank, cp_interleave
        Which tokens of whole requests these are (`cupy_mla.call.shard`), where a mask goes by places in these; else
        1, 0, 1.
    cp_share
        Whether they are a rank's share of requests (``cp_world`` of the call is above 1): then results are merged with
        those of other ranks.
    """

    page_size: int
    max_pages_per_seq: int
    cp_world: int = 1
    cp_rank: int = 0
    cp_interleave: int = 1
    cp_share: bool = False

    @property
    def shard(self) -> Shard | None:
        """Which tokens of whole requests these are; None where that does not matter."""
        return Shard(self.cp_world, self.cp_rank, self.cp_interleave) if self.cp_world > 1 else None

    @property
    def max_seqlen_k(self) -> int:
        """Longest sequence that the block table can name."""
        return self.page_size * self.max_pages_per_seq

    def bound(self, max_seqlen_k: int | None) -> int:
        """Longest sequence under a limit; None: there is no other."""
        return self.max_seqlen_k if max_seqlen_k is None else min(max_seqlen_k, self.max_seqlen_k)


@dataclass(frozen=True, slots=True)
class DecodeProblem:
    """Static description of a decode call: all that a plan and a kernel depend on, and no address.

    Attributes
    ----------
    queries
        What attends.
    keys
        What it attends to.
    layout
        How the cache stores a token.
    compute
        How products with an FP8 cache are computed, as in `cupy_mla.mla_decode`.
    """

    queries: Queries
    keys: PagedKeys
    layout: CacheLayout
    compute: str = "auto"

    def facts(self) -> dict[str, Any]:
        """Every field of the parts by its name, and the layout by its own."""
        parts = {**dataclasses.asdict(self.queries), **dataclasses.asdict(self.keys)}
        return {**parts, "layout": self.layout.name, "compute": self.compute}

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        queries = self.queries
        shapes = {"out": list(queries.out_shape), "lse": list(queries.lse_shape)}
        return facts_table("DecodeProblem", {**self.facts(), **shapes, "longest sequence": self.keys.max_seqlen_k})


class Addresses(NamedTuple):
    """Where the arrays of a call lie; 0 for one that is not there. Fields as those of `DecodeInputs`."""

    q_latent: int
    q_rope: int
    kv_latent: int
    kv_rope: int
    block_table: int
    cache_seqlens: int
    cu_seqlens_q: int
    total_seqlens: int
    kv_scale: int
    plan: int
    out: int
    lse: int


@dataclass(slots=True, eq=False)
class DecodeInputs:
    """Views of the arrays of a call; None for one that is not there. A packed q or cache is two views of its memory.

    Attributes
    ----------
    q_latent, q_rope
        [batch, seqlen_q, num_heads_q, latent_dim] and [..., rope_dim], or without the first axis and with total_q
        as the second when ragged. q_rope is None when rope_dim is 0.
    kv_latent, kv_rope
        [num_pages, page_size, num_heads_kv, latent_dim] and [..., rope_dim]; kv_rope is None when rope_dim is 0. Of a
        layout without columns (`CacheLayout.has_columns`) kv_latent is the cache, and kv_rope None.
    block_table
        [batch, max_pages_per_seq] int32.
    cache_seqlens
        [batch] int32.
    cu_seqlens_q
        [batch + 1] int32, or None.
    total_seqlens
        [batch] int32: tokens of each request on all ranks; None where keys are not sharded.
    kv_scale
        One float32 number for the whole cache, or two, for its latent and its rope part; or None: then
        ``kv_scale_values`` count.
    plan
        A plan in an array, uint8, or None.
    out, lse
        Of `Queries.out_shape` and `Queries.lse_shape`, to be written to; None: the callee makes them.
    kv_scale_values
        What stored values of the two parts are multiplied by where no array says it.
    """

    q_latent: ArrayView
    q_rope: ArrayView | None
    kv_latent: ArrayView
    kv_rope: ArrayView | None
    block_table: ArrayView
    cache_seqlens: ArrayView
    cu_seqlens_q: ArrayView | None
    total_seqlens: ArrayView | None = None
    kv_scale: ArrayView | None = None
    plan: ArrayView | None = None
    out: ArrayView | None = None
    lse: ArrayView | None = None
    kv_scale_values: tuple[float, float] = (1.0, 1.0)

    @property
    def location(self) -> tuple[str, int]:
        """Device and its number; the same for all arrays."""
        return self.q_latent.location

    @property
    def num_pages(self) -> int:
        """Pages in the cache."""
        return self.kv_latent.shape[0]

    @property
    def planned_lengths(self) -> ArrayView:
        """The lengths that a plan is made for."""
        return self.cache_seqlens if self.total_seqlens is None else self.total_seqlens

    def views(self) -> tuple[ArrayView | None, ...]:
        """All of them, None for one that is not there."""
        return tuple(getattr(self, name) for name in Addresses._fields)

    def addresses(self) -> Addresses:
        """Where they lie."""
        return Addresses._make(0 if array is None else array.pointer for array in self.views())
