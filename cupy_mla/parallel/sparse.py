"""Context-parallel sparse decode on torch.distributed: each rank attends to those chosen tokens that it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..decode.sparse import mla_sparse_decode, plan_sparse_decode
from ..decode.sparse_plan import SparsePlan
from .plan import ExchangePlan, plan_given


@dataclass(frozen=True, slots=True)
class _Options:
    """What a plan is made for besides arrays; as in `cp_sparse_decode`."""

    head_dim_v: int
    layout: str | None
    gathered: bool
    exchange: str


class ContextParallelSparsePlan(ExchangePlan[SparsePlan]):
    """The buffers of one kind of context-parallel sparse call, and the plan of its decode; made by
    `plan_cp_sparse_decode`.

    Calls that share a plan must follow one another on one stream, as they share its memory.

    Attributes
    ----------
    decode_plan : SparsePlan
        Of this rank's decode; each call updates it with its ``topk_length``.
    """

    def __init__(self, arrays: tuple[Any, ...], group: Any, options: _Options, **of_plan: Any) -> None:
        q, kv_cache, indices, topk_length, kv_scale = arrays
        # As query tokens, ranks would be given the same tokens of the cache one after the other.
        super().__init__(q, group, options, may_be_tokens=False)
        queries, named = self._exchange.queries, self._decode_options(topk_length, kv_scale)
        self.decode_plan = plan_sparse_decode(queries, kv_cache, indices, **named, **of_plan)

    def decode(self, arrays: tuple[Any, ...], softmax_scale: float | None) -> None:
        """This rank's part of `cp_sparse_decode`: gathers queries, and attends with all heads to its own tokens."""
        q, kv_cache, indices, topk_length, kv_scale = arrays
        self.decode_plan.update(topk_length)
        mla_sparse_decode(
            self._exchange.gather(q),
            kv_cache,
            indices,
            **self._decode_options(topk_length, kv_scale),
            softmax_scale=softmax_scale,
            plan=self.decode_plan,
            out=self._exchange.out,
            lse=self._exchange.lse,
        )

    def _decode_options(self, topk_length: Any, kv_scale: Any) -> dict[str, Any]:
        return {
            "topk_length": topk_length,
            "head_dim_v": self._options.head_dim_v,
            "layout": self._options.layout,
            "kv_scale": kv_scale,
            "cp_world": self.ranks.world,
        }


def plan_cp_sparse_decode(
    q: Any,
    kv_cache: Any,
    indices: Any,
    *,
    topk_length: Any = None,
    group: Any = None,
    layout: str | None = None,
    kv_scale: Any = None,
    head_dim_v: int = 512,
    gathered: bool = False,
    exchange: str = "a2a",
    fixed_split_tokens: int | None = None,
    kernel: str = "auto",
) -> ContextParallelSparsePlan:
    """Plan context-parallel sparse decodes of one kind once, for all layers and steps.

    Every rank of the group has to call it with the same options. Nothing is sent but for the direct exchange, for which
    ranks agree on memory.

    Parameters
    ----------
    q, kv_cache, indices, topk_length, group, layout, kv_scale, head_dim_v, gathered, exchange
        As in `cp_sparse_decode`; only shapes, types and strides count.
    fixed_split_tokens, kernel
        As in `cupy_mla.plan_sparse_decode`.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value, or there is no process group.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    MissingDependencyError
        torch is not installed.
    """
    options = _Options(head_dim_v, layout, gathered, exchange)
    arrays = (q, kv_cache, indices, topk_length, kv_scale)
    return ContextParallelSparsePlan(arrays, group, options, fixed_split_tokens=fixed_split_tokens, kernel=kernel)


def cp_sparse_decode(
    q: Any,
    kv_cache: Any,
    indices: Any,
    *,
    topk_length: Any = None,
    group: Any = None,
    layout: str | None = None,
    kv_scale: Any = None,
    softmax_scale: float | None = None,
    head_dim_v: int = 512,
    gathered: bool = False,
    exchange: str = "a2a",
    plan: ContextParallelSparsePlan | None = None,
    out: Any = None,
    lse: Any = None,
) -> tuple[Any, Any]:
    """`cupy_mla.mla_sparse_decode` over a cache that is sharded along the sequence over the ranks of a process group.

    Every rank of the group calls it, with the same shapes and options, but with indices of its own. Each gathers the
    queries of all heads, attends with them to its own tokens, and gets the merged results of its own heads.

    Parameters
    ----------
    q
        [batch, seqlen_q, num_heads_q, d_qk] bfloat16 or float16, of torch or CuPy: queries of this rank's heads, as
        many on each rank; with ``gathered`` those of all heads, the same on each rank.
    kv_cache, layout, kv_scale
        This rank's tokens, as in `cupy_mla.mla_sparse_decode`.
    indices, topk_length
        [batch, seqlen_q, topk] and [batch, seqlen_q] int32: what `cupy_mla.parallel.local_slots` makes of the tokens
        that were chosen; each rank has room for all of them.
    group, gathered, exchange, out, lse
        As in `cp_decode`.
    softmax_scale, head_dim_v
        As in `cupy_mla.mla_sparse_decode`.
    plan
        From `plan_cp_sparse_decode`, made with the same options; each call updates it with its ``topk_length``. None:
        the call makes its own.

    Returns
    -------
    out, lse
        As `cp_decode` returns them.

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
    options = _Options(head_dim_v, layout, gathered, exchange)
    arrays = (q, kv_cache, indices, topk_length, kv_scale)
    plan = plan_given(plan, ContextParallelSparsePlan) or ContextParallelSparsePlan(arrays, group, options)
    plan.check(q, group, options)
    results = plan.results(out, lse)
    plan.decode(arrays, softmax_scale)
    return plan.finish(*results)
