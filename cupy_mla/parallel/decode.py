"""Context-parallel decode on torch.distributed: each rank attends with all heads to its own tokens, and hands the
results to the ranks whose heads they are of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..arrays.exchange import empty_like
from ..arrays.view import view
from ..call.arguments import shard_of
from ..call.options import DecodeOptions
from ..call.problem import INDEX_DTYPE
from ..decode.dense import mla_decode, plan_decode
from ..decode.plan import DecodePlan
from ..errors import InvalidArgumentError
from .group import CupyGroup, TorchGroup
from .plan import ExchangePlan, plan_given


@dataclass(frozen=True, slots=True)
class _Options:
    """What a plan is made for besides arrays; as in `cp_decode`."""

    head_dim_v: int
    causal: bool
    max_seqlen_q: int | None
    compute: str
    layout: str | None
    cp_interleave: int
    gathered: bool
    exchange: str


class _Repeated:
    """An int32 array of requests, as often as a call has them: all of a rank behind all of the rank before.

    What is no such array is handed on as it is, to be refused where it is decoded.
    """

    def __init__(self, array: Any, repeats: int, ranks: TorchGroup | CupyGroup) -> None:
        self._ranks, self._shape, self._copies = ranks, getattr(array, "shape", None), None
        if repeats > 1 and self._is_such(array):
            self._copies = empty_like(array, (repeats, *array.shape), INDEX_DTYPE)

    def of(self, array: Any) -> Any:
        """It, repeated now."""
        if self._copies is not None and self._is_such(array):
            self._ranks.copy(self._copies, array)
        return self.latest(array)

    def latest(self, array: Any) -> Any:
        """What it was when it was last repeated."""
        if self._copies is None or not self._is_such(array):
            return array
        repeats, requests, *rest = self._copies.shape
        return self._copies.reshape(repeats * requests, *rest)

    def _is_such(self, array: Any) -> bool:
        return bool(array.shape == self._shape and view(array, "array").dtype == INDEX_DTYPE)


class ContextParallelPlan(ExchangePlan[DecodePlan]):
    """The buffers of one kind of context-parallel call, and the plan of its decode; made by `plan_cp_decode`.

    Calls that share a plan must follow one another on one stream, as they share its memory.

    Attributes
    ----------
    shard : Shard
        Which tokens this rank has.
    cache_seqlens
        [batch] int32: how many these are, of the lengths it was last updated with.
    decode_plan : DecodePlan
        Of this rank's decode.
    """

    def __init__(self, arrays: tuple[Any, ...], group: Any, options: _Options, **of_plan: Any) -> None:
        q, kv_cache, block_table, total_seqlens, cu_seqlens_q, kv_scale = arrays
        # Of one query token the mask hides nothing, and the decode is not given these.
        DecodeOptions(head_dim_v=options.head_dim_v, causal=options.causal, max_seqlen_q=options.max_seqlen_q)
        is_one_group = _num_kv_heads(kv_cache) == 1
        super().__init__(q, group, options, may_be_tokens=cu_seqlens_q is None and is_one_group)
        ranks = self.ranks
        self.shard = shard_of(ranks.world, ranks.rank, options.cp_interleave)
        self._check_lengths(total_seqlens, getattr(block_table, "shape", ())[:1])
        self.cache_seqlens = empty_like(total_seqlens, tuple(total_seqlens.shape), INDEX_DTYPE)
        ranks.count(self.shard, total_seqlens, self.cache_seqlens)
        of_requests, repeats = (block_table, self.cache_seqlens, total_seqlens), self._exchange.repeats
        self._table, self._lengths, self._totals = (_Repeated(array, repeats, ranks) for array in of_requests)
        self.decode_plan = plan_decode(
            self._exchange.queries,
            kv_cache,
            self._table.of(block_table),
            self._lengths.of(self.cache_seqlens),
            **self._decode_options(self._totals.of(total_seqlens), cu_seqlens_q, kv_scale),
            **of_plan,
        )
        self._exchange.merges_pieces(self.decode_plan)

    def update(self, total_seqlens: Any, cu_seqlens_q: Any = None) -> None:
        """Plan again for new lengths, on the device and without a synchronisation; may be captured in a CUDA graph.

        Parameters
        ----------
        total_seqlens
            [batch] int32: tokens of each request on all ranks.
        cu_seqlens_q
            [batch + 1] int32 for ragged queries, else None.

        Raises
        ------
        InvalidArgumentError
            A wrong shape, type or device, or cu_seqlens_q given or missing against the plan.
        """
        self._check_lengths(total_seqlens, self.cache_seqlens.shape)
        self.ranks.count(self.shard, total_seqlens, self.cache_seqlens)
        lengths, totals = self._lengths.of(self.cache_seqlens), self._totals.of(total_seqlens)
        is_masked = self.decode_plan.problem.keys.shard is not None
        self.decode_plan.update(totals if is_masked else lengths, cu_seqlens_q)

    def decode(self, arrays: tuple[Any, ...], softmax_scale: float | None) -> None:
        """This rank's part of `cp_decode`: gathers queries, and attends with all heads to its own tokens."""
        q, kv_cache, block_table, total_seqlens, cu_seqlens_q, kv_scale = arrays
        mla_decode(
            self._exchange.gather(q),
            kv_cache,
            self._table.of(block_table),
            self._lengths.latest(self.cache_seqlens),
            **self._decode_options(self._totals.latest(total_seqlens), cu_seqlens_q, kv_scale),
            softmax_scale=softmax_scale,
            plan=self.decode_plan,
            out=self._exchange.out,
            lse=self._exchange.lse,
        )

    def _check_lengths(self, total_seqlens: Any, shape: Any) -> None:
        """Refuse lengths of another shape; it is (), and any shape goes, if none is known."""
        self.ranks.refuse_others(total_seqlens, "total_seqlens", "[batch]")
        dtype = view(total_seqlens, "total_seqlens").dtype
        if dtype != INDEX_DTYPE or total_seqlens.shape != (shape or total_seqlens.shape):
            got = f"{dtype} {list(total_seqlens.shape)}"
            raise InvalidArgumentError("total_seqlens", f"int32 {list(shape)}, one per request", got)

    def _decode_options(self, total_seqlens: Any, cu_seqlens_q: Any, kv_scale: Any) -> dict[str, Any]:
        options, shard = self._options, self.shard
        named = {
            "head_dim_v": options.head_dim_v,
            "compute": options.compute,
            "layout": options.layout,
            "kv_scale": kv_scale,
            "cp_world": shard.world,
            "cp_rank": shard.rank,
            "cp_interleave": shard.interleave,
        }
        if self._exchange.as_tokens:
            return named
        return {
            **named,
            "causal": options.causal,
            "cu_seqlens_q": cu_seqlens_q,
            "max_seqlen_q": options.max_seqlen_q,
            "total_seqlens": total_seqlens,
        }


def plan_cp_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    total_seqlens: Any,
    *,
    group: Any = None,
    head_dim_v: int = 512,
    causal: bool = False,
    cu_seqlens_q: Any = None,
    max_seqlen_q: int | None = None,
    kv_scale: Any = None,
    compute: str = "auto",
    layout: str | None = None,
    cp_interleave: int = 1,
    gathered: bool = False,
    exchange: str = "a2a",
    max_seqlen_k: int | None = None,
    fixed_split_tokens: int | None = None,
    kernel: str = "auto",
) -> ContextParallelPlan:
    """Plan a context-parallel decode step once, for all layers that share its shapes and lengths.

    Every rank of the group has to call it with the same options. Nothing is sent but for the direct exchange, for which
    ranks agree on memory.

    Parameters
    ----------
    q, kv_cache, block_table, total_seqlens, group, head_dim_v, causal, cu_seqlens_q, kv_scale, compute, layout,
    cp_interleave, gathered, exchange
        As in `cp_decode`. Of q, kv_cache and kv_scale only shapes, types and strides count.
    max_seqlen_q, fixed_split_tokens, kernel
        As in `cupy_mla.plan_decode`.
    max_seqlen_k
        Largest number of a request's tokens on this rank that a later update may bring; None: what the block table can
        hold.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value, or there is no process group.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    MissingDependencyError
        torch is not installed.
    """
    options = _Options(head_dim_v, causal, max_seqlen_q, compute, layout, cp_interleave, gathered, exchange)
    arrays = (q, kv_cache, block_table, total_seqlens, cu_seqlens_q, kv_scale)
    of_plan = {"max_seqlen_k": max_seqlen_k, "fixed_split_tokens": fixed_split_tokens, "kernel": kernel}
    return ContextParallelPlan(arrays, group, options, **of_plan)


def cp_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    total_seqlens: Any,
    *,
    group: Any = None,
    head_dim_v: int = 512,
    softmax_scale: float | None = None,
    causal: bool = False,
    cu_seqlens_q: Any = None,
    max_seqlen_q: int | None = None,
    kv_scale: Any = None,
    compute: str = "auto",
    layout: str | None = None,
    cp_interleave: int = 1,
    gathered: bool = False,
    exchange: str = "a2a",
    plan: ContextParallelPlan | None = None,
    out: Any = None,
    lse: Any = None,
) -> tuple[Any, Any]:
    """`cupy_mla.mla_decode` over a cache that is sharded along the sequence over the ranks of a process group.

    Every rank of the group calls it, with the same shapes and options. Each gathers the queries of all heads, attends
    with them to its own tokens, and gets the merged results of its own heads. Nothing waits for the device; with a plan
    it may be captured in a CUDA graph (with NCCL).

    Parameters
    ----------
    q
        [batch, seqlen_q, num_heads_q, d_qk] bfloat16 or float16, of torch or CuPy: queries of this rank's heads, as
        many on each rank; with ``cu_seqlens_q`` [total_q, num_heads_q, d_qk]. With ``gathered`` those of all heads, the
        same on each rank.
    kv_cache
        This rank's tokens, as in `cupy_mla.mla_decode`: token t of a request is on rank
        ``t // cp_interleave % world``, behind the tokens before it that are there (`cupy_mla.PagedKVCache`).
    block_table
        [batch, max_pages_per_seq] int32: pages of each request on this rank.
    total_seqlens
        [batch] int32: tokens of each request on all ranks.
    group
        torch process group, of NCCL for tensors on GPUs and of gloo for those on the CPU (the direct exchange uses
        neither); None: that of all processes. For CuPy arrays a communicator of ``cupyx.distributed``.
    head_dim_v, softmax_scale, causal, cu_seqlens_q, max_seqlen_q, kv_scale, compute, layout
        As in `cupy_mla.mla_decode`; the mask goes by places in whole requests.
    cp_interleave
        Tokens in a row that lie on the same rank.
    gathered
        Whether q has all heads; they are those of rank 0, then those of rank 1, and so on.
    exchange
        How results go to whom they belong. ``"a2a"``: one all-to-all of outputs and lse, then one kernel that merges.
        ``"ag_rs"``: an all-gather of lse, a correction, and a reduce-scatter of float32. ``"direct"``: of torch tensors
        on GPUs of one host, each rank's kernels store queries and results into the memory of the others; where they
        cannot, a warning says why, and it is ``"a2a"``. Such a plan is made together by all ranks, which wait for each
        other and for the device; without a plan each call does.
    plan
        From `plan_cp_decode`, made with the same options. None: the call makes its own.
    out, lse
        Tensors to write to, of the shapes returned; None: new ones.

    Returns
    -------
    out
        [batch, seqlen_q, num_heads_q, head_dim_v] of q's type, or [total_q, num_heads_q, head_dim_v]: of this rank's
        heads, over the tokens of all ranks.
    lse
        [batch, num_heads_q, seqlen_q] float32, or [num_heads_q, total_q], natural logarithm; -inf for a query that sees
        no key.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value, or there is no process group.
        Nothing was sent.
    PlanMismatchError
        The plan was made for other shapes or options.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    MissingDependencyError
        torch is not installed.
    """
    options = _Options(head_dim_v, causal, max_seqlen_q, compute, layout, cp_interleave, gathered, exchange)
    arrays = (q, kv_cache, block_table, total_seqlens, cu_seqlens_q, kv_scale)
    plan = plan_given(plan, ContextParallelPlan) or ContextParallelPlan(arrays, group, options)
    plan.check(q, group, options)
    results = plan.results(out, lse)
    plan.decode(arrays, softmax_scale)
    return plan.finish(*results)


def _num_kv_heads(kv_cache: Any) -> int:
    shape: Any = getattr(kv_cache[0] if isinstance(kv_cache, (tuple, list)) else kv_cache, "shape", ())
    return int(shape[2]) if len(shape) > 2 else 1  # anything else is refused where it is decoded
