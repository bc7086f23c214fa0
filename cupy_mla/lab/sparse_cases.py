"""A case of sparse attention: the arguments of one call with what the host knows about them.

It offers what `Case` offers to those that check, time and run cases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..call.options import EXACT
from ..layouts import find_layout
from .libraries import NUMPY, ArrayLibrary
from .random_values import Array
from .spec import DEFAULT_HEAD_DIM_V
from .work import IntArray, Work

if TYPE_CHECKING:
    from ..decode.sparse_plan import SparsePlan


@dataclass(frozen=True, slots=True)
class ChosenOf:
    """A second cache and what is chosen of it, as the fields of `SparseCase` of these names."""

    kv_cache: Any
    indices: Any
    topk_length: Any = None
    layout: str | None = None

    def arguments(self) -> dict[str, Any]:
        """As ``mla_sparse_decode`` takes them."""
        return {
            "extra_kv_cache": self.kv_cache,
            "extra_indices": self.indices,
            "extra_topk_length": self.topk_length,
            "extra_layout": self.layout,
        }


@dataclass(frozen=True, slots=True)
class SparseCase:
    """Arguments of ``mla_sparse_decode`` or ``mla_sparse_prefill`` (shapes there), and what the host knows of them.

    A *request* of prefill is one of its query tokens.

    Attributes
    ----------
    q, kv_cache, indices, topk_length, attn_sink, head_dim_v, softmax_scale, layout, kv_scale
        As in the functions; also of prefill, kv_cache has pages. Arrays are of one library.
    counts
        [batch, seqlen_q] int64 on the host: tokens that each query token attends to, of both caches; of prefill
        [1, s_q].
    work
        The least that the case costs.
    prefill
        Which of the functions it is for.
    extra
        A second cache, or None.
    library
        The arrays' library.
    """

    q: Any
    kv_cache: Any
    indices: Any
    counts: IntArray
    work: Work
    topk_length: Any = None
    attn_sink: Any = None
    prefill: bool = False
    head_dim_v: int = DEFAULT_HEAD_DIM_V
    softmax_scale: float | None = None
    layout: str | None = None
    kv_scale: float | None = None
    extra: ChosenOf | None = None
    library: ArrayLibrary = NUMPY

    @property
    def batch(self) -> int:
        return len(self.kv_lengths)

    @property
    def dtype(self) -> str:
        """Element type of q."""
        return str(self.q.dtype).removeprefix("torch.")

    @property
    def computes(self) -> str:
        """As of `Case`."""
        return EXACT

    @property
    def read_bytes(self) -> int:
        """About as much as a call reads."""
        return self.work.bytes

    @property
    def cold(self) -> Any:
        """What a call is to find in device memory, not in L2: the cache, or both."""
        return self.kv_cache if self.extra is None else (self.kv_cache, self.extra.kv_cache)

    def with_cold(self, cold: Any) -> SparseCase:
        """The same case over other arrays like these."""
        if self.extra is None:
            return replace(self, kv_cache=cold)
        return replace(self, kv_cache=cold[0], extra=replace(self.extra, kv_cache=cold[1]))

    @property
    def kv_lengths(self) -> IntArray:
        """[batch] int64: tokens that the query tokens of each request attend to, together."""
        counts: IntArray = self.counts.reshape(-1) if self.prefill else self.counts.sum(axis=1)
        return counts

    @property
    def q_lengths(self) -> IntArray:
        """[batch] int64: query tokens of each request."""
        return np.full(self.batch, self.counts.size // max(self.batch, 1), np.int64)

    def plan(self, *, fixed_split_tokens: int | None = None) -> SparsePlan | None:
        """A plan for the case; None for prefill, which has none."""
        if self.prefill:
            return None
        from ..decode.sparse import plan_sparse_decode

        return plan_sparse_decode(
            *(self.q, self.kv_cache, self.indices),
            topk_length=self.topk_length,
            layout=self.layout,
            kv_scale=self.kv_scale,
            head_dim_v=self.head_dim_v,
            fixed_split_tokens=fixed_split_tokens,
            **({} if self.extra is None else self.extra.arguments()),
        )

    def run(
        self, plan: SparsePlan | None = None, *, results: tuple[Any, ...] | None = None, validate: bool | None = None
    ) -> tuple[Any, ...]:
        """Call the function.

        Parameters
        ----------
        plan
            From `plan`, or None.
        results
            What an earlier call returned, to be written to.
        validate
            As in the function.

        Returns
        -------
        ``out`` and ``lse``, and for prefill ``max_logits``.
        """
        given = dict(zip(("out", "lse", "max_logits"), results or (), strict=False))
        options = {
            "topk_length": self.topk_length,
            "attn_sink": self.attn_sink,
            "layout": self.layout,
            "kv_scale": self.kv_scale,
            "softmax_scale": self.softmax_scale,
            "head_dim_v": self.head_dim_v,
            "validate": validate,
            **given,
        }
        if not self.prefill:
            from ..decode.sparse import mla_sparse_decode

            extra = {} if self.extra is None else self.extra.arguments()
            return mla_sparse_decode(self.q, self.kv_cache, self.indices, plan=plan, **options, **extra)
        from ..decode.prefill import mla_sparse_prefill

        out, max_logits, lse = mla_sparse_prefill(self.q, self.kv_cache, self.indices, **options)
        return out, lse, max_logits

    def exact(self) -> tuple[Array, Array]:
        """In float64, of a host case: out [batch, s_q, h_q, d_v] and lse [batch, h_q, s_q]."""
        from ..call.sparse import describe_sparse_decode
        from ..call.sparse_options import SparseDecodeArrays, SparseOptions
        from ..decode.reference_sparse import sparse_reference

        extra = {} if self.extra is None else self.extra.arguments()
        extra_layout = extra.pop("extra_layout", None)
        arrays = SparseDecodeArrays(
            self.q, self.kv_cache, self.indices, self.topk_length, self.attn_sink, kv_scale=self.kv_scale, **extra
        )
        options = SparseOptions(head_dim_v=self.head_dim_v, layout=self.layout, extra_layout=extra_layout)
        problem, inputs = describe_sparse_decode(arrays, options)
        queries = problem.queries
        scale = queries.default_softmax_scale if self.softmax_scale is None else self.softmax_scale
        out, lse = np.empty(queries.out_shape), np.empty(queries.lse_shape)
        sparse_reference(problem, inputs, scale, out=out, lse=lse, dtype=np.float64)
        return out, lse

    def on(self, library: ArrayLibrary) -> SparseCase:
        """The same case with arrays of another library (itself when they are); from the host with their strides."""
        if library is self.library:
            return self

        def moved(of: SparseCase | ChosenOf, *names: str) -> dict[str, Any]:
            there = {name: getattr(of, name) for name in names if getattr(of, name) is not None}
            on_host = {name: self.library.download(array) for name, array in there.items()}
            if of.layout is not None:
                on_host["kv_cache"] = find_layout(of.layout).with_page_starts(on_host["kv_cache"])
            return {name: library.upload(array) for name, array in on_host.items()}

        chosen = "kv_cache", "indices", "topk_length"
        extra = None if self.extra is None else replace(self.extra, **moved(self.extra, *chosen))
        return replace(self, **moved(self, *chosen, "q", "attn_sink"), extra=extra, library=library)

    def request(self, index: int) -> SparseCase:
        """One request as a host case of decode with batch 1, with only the pages that it attends to."""
        main, counts = self._chosen_by(ChosenOf(self.kv_cache, self.indices, self.topk_length, self.layout), index)
        extra = None
        if self.extra is not None:
            extra, extra_counts = self._chosen_by(self.extra, index)
            counts = counts + extra_counts
        return replace(
            self,
            q=self._of(self.q, index),
            kv_cache=main.kv_cache,
            indices=main.indices,
            topk_length=main.topk_length,
            attn_sink=None if self.attn_sink is None else self.library.download(self.attn_sink),
            extra=extra,
            counts=counts,
            prefill=False,
            library=NUMPY,
        )

    def _chosen_by(self, chosen: ChosenOf, index: int) -> tuple[ChosenOf, IntArray]:
        """A cache with only the pages that one request attends to, on the host; and how many tokens that is."""
        indices = self._of(chosen.indices, index)
        lengths = None if chosen.topk_length is None else self._of(chosen.topk_length, index)
        num_pages, page_size = chosen.kv_cache.shape[:2]
        counting = (indices >= 0) & (indices < num_pages * page_size)
        if lengths is not None:
            counting &= np.arange(indices.shape[-1]) < lengths[..., None]
        slots = indices[counting].astype(np.int64)
        pages, places = np.unique(slots // page_size, return_inverse=True)
        moved = np.full_like(indices, -1)
        moved[counting] = places * page_size + slots % page_size
        # Without any token it still needs a cache that is well formed.
        pages = pages if len(pages) else np.zeros(1, np.int64)
        cache = self.library.take_pages(chosen.kv_cache, pages)
        if chosen.layout is not None:
            cache = find_layout(chosen.layout).with_page_starts(cache)
        return replace(chosen, kv_cache=cache, indices=moved, topk_length=lengths), counting.sum(axis=-1)

    def request_result(self, index: int, out: Any, lse: Any) -> tuple[Array, Array]:
        """One request's part of a result: out [s_q, h_q, d_v] and lse [h_q, s_q], on the host."""
        found = self.library.download(lse[index])
        return self._of(out, index)[0], found[:, None] if self.prefill else found

    def _of(self, array: Any, index: int) -> Array:
        """A request's part of an array, on the host, with an axis for the request and one for its query tokens."""
        part = self.library.download(array[index])
        return part[None, None] if self.prefill else part[None]
