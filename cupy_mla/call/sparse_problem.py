"""What a sparse call is: a frozen description of its shapes, and views of its arrays."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..arrays.view import ArrayView
from ..layouts import CacheLayout
from ..shown.html import facts_table
from .problem import Queries


@dataclass(frozen=True, slots=True)
class GatheredKeys:
    """Keys that indices name one by one. How many slots the cache has does not count: the pool may grow.

    Attributes
    ----------
    topk
        Indices of a query token.
    page_size
        Tokens per page of the cache; 1 where all slots are equally far apart, whatever their pages.
    tokens_per_length
        Query tokens that share an entry of topk_length; None: there is no topk_length, all indices count.
    extra_topk, extra_page_size, extra_tokens_per_length
        The same of a second cache; extra_topk is None where there is none.
    cp_share
        Whether they are chosen from a rank's share of requests (``cp_world`` of the call is above 1): then results are
        merged with those of other ranks.
    """

    topk: int
    page_size: int
    tokens_per_length: int | None
    extra_topk: int | None = None
    extra_page_size: int | None = None
    extra_tokens_per_length: int | None = None
    cp_share: bool = False

    @property
    def most_tokens(self) -> int:
        """Most tokens that a query token attends to."""
        return self.topk + (self.extra_topk or 0)


@dataclass(frozen=True, slots=True)
class SparseProblem:
    """Static description of a sparse call: all that a plan and a kernel depend on, and no address.

    Attributes
    ----------
    queries
        What attends. Prefill has a batch of requests of one query token.
    keys
        What it attends to.
    layout, extra_layout
        How the cache stores a token, and how a second one does; None: there is no second cache.
    """

    queries: Queries
    keys: GatheredKeys
    layout: CacheLayout
    extra_layout: CacheLayout | None = None

    def facts(self) -> dict[str, Any]:
        """Every field of the parts by its name, and the layout by its own."""
        parts = {**dataclasses.asdict(self.queries), **dataclasses.asdict(self.keys)}
        extra = None if self.extra_layout is None else self.extra_layout.name
        return {**parts, "layout": self.layout.name, "extra_layout": extra}

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        shapes = {"out": list(self.queries.out_shape), "lse": list(self.queries.lse_shape)}
        return facts_table("SparseProblem", {**self.facts(), **shapes})


@dataclass(slots=True, eq=False)
class SparseInputs:
    """The arrays of a sparse call, checked and with the axes of decode: prefill's query tokens are requests of one.

    Attributes
    ----------
    q
        [batch, seqlen_q, num_heads_q, d_qk].
    kv
        [num_pages, page_size, num_heads_kv, width]; the layout says what a token's row is.
    indices
        [batch, seqlen_q, num_heads_kv, topk]; kv heads that share their indices are 0 elements apart.
    topk_length
        [batch] or [batch, seqlen_q], contiguous; None: all indices count.
    attn_sink
        [num_heads_q], contiguous; None: no sinks.
    kv_scale
        One float32 number for the whole cache, or None: then ``kv_scale_value`` counts.
    extra_kv, extra_indices, extra_topk_length
        Of a second cache, as kv, indices and topk_length; all None where there is none.
    plan
        A plan in an array, or None.
    out, lse
        Of `Queries.out_shape` and `Queries.lse_shape`, to be written to; None: the callee makes them.
    max_logits
        [batch, num_heads_q] of prefill, to be written to; None: the callee makes it, or it is not wanted.
    kv_scale_value
        What stored values are multiplied by where no array says it.
    """

    q: ArrayView
    kv: ArrayView
    indices: ArrayView
    topk_length: ArrayView | None = None
    attn_sink: ArrayView | None = None
    kv_scale: ArrayView | None = None
    extra_kv: ArrayView | None = None
    extra_indices: ArrayView | None = None
    extra_topk_length: ArrayView | None = None
    plan: ArrayView | None = None
    out: ArrayView | None = None
    max_logits: ArrayView | None = None
    lse: ArrayView | None = None
    kv_scale_value: float = 1.0

    @property
    def location(self) -> tuple[str, int]:
        """Device and its number; the same for all arrays."""
        return self.q.location

    @property
    def num_slots(self) -> int:
        """Tokens that the cache has room for."""
        return self.kv.shape[0] * self.kv.shape[1]

    @property
    def num_extra_slots(self) -> int:
        """The same of the second cache; 0 without one."""
        return 0 if self.extra_kv is None else self.extra_kv.shape[0] * self.extra_kv.shape[1]

    def views(self) -> tuple[ArrayView | None, ...]:
        """All of them, None for one that is not there."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(value for value in values if not isinstance(value, float))

    def addresses(self, *names: str) -> tuple[int, ...]:
        """Where those of these fields lie; 0 for one that is not there."""
        arrays = (getattr(self, name) for name in names)
        return tuple(0 if array is None else array.pointer for array in arrays)
