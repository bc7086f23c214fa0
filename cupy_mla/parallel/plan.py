"""What plans of context-parallel calls have in common: buffers, the exchange, where results go."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Generic, TypeVar

from ..arrays.exchange import empty_like
from ..arrays.view import view
from ..call.arguments import as_boolean, check_output
from ..call.problem import LSE_DTYPE
from ..decode.plan import DecodePlan
from ..decode.sparse_plan import SparsePlan
from ..errors import InvalidArgumentError, PlanMismatchError
from .direct import exchange_of
from .exchange import check_exchange
from .group import ranks_of
from .heads import Heads

_Plan = TypeVar("_Plan", DecodePlan, SparsePlan)


class ExchangePlan(Generic[_Plan]):
    """The buffers of one kind of context-parallel call, and the plan of its decode.

    Calls that share a plan must follow one another on one stream, as they share its memory.

    Attributes
    ----------
    decode_plan : DecodePlan or SparsePlan
        Of this rank's decode.
    ranks
        Who shares the cache, and this process among them.

    Parameters
    ----------
    q, group
        As in `cp_decode`.
    options
        A dataclass of what calls have to agree in; has ``head_dim_v``, ``gathered`` and ``exchange``.
    may_be_tokens
        Whether ranks may be query tokens (`HeadExchange`).
    """

    decode_plan: _Plan

    def __init__(self, q: Any, group: Any, options: Any, *, may_be_tokens: bool) -> None:
        self._options, self._group = options, group
        check_exchange(options.exchange)
        self.ranks, gathered = ranks_of(group), as_boolean(options.gathered, "gathered")
        heads = Heads.of(q, self.ranks, gathered=gathered, head_dim_v=options.head_dim_v)
        self._exchange = exchange_of(q, self.ranks, heads, options.exchange, may_be_tokens=may_be_tokens)

    @property
    def exchange(self) -> str:
        """How results go to whom they belong: what was asked for, or ``"a2a"`` where ranks cannot reach each other."""
        return self._exchange.exchange

    def check(self, q: Any, group: Any, options: Any) -> None:
        """Refuse a call that this plan was not made for.

        Raises
        ------
        PlanMismatchError
            Queries, process group or options differ from the plan's.
        """
        if group is not self._group:
            raise PlanMismatchError("group", "the process group that the plan was made for", "another")
        if options != self._options:
            made_for = asdict(self._options)
            name, came = next((name, came) for name, came in asdict(options).items() if came != made_for[name])
            raise PlanMismatchError("plan", f"a plan for {name} = {came}", f"one for {name} = {made_for[name]}")
        self._exchange.heads.check(q)

    def results(self, out: Any, lse: Any) -> tuple[Any, Any]:
        """What results are written to: what was given, or new tensors for None.

        Raises
        ------
        InvalidArgumentError
            Shape, type, device or strides of what was given are wrong.
        """
        (out_shape, lse_shape), queries = self._exchange.heads.result_shapes, self._exchange.queries
        dtype, location = self.decode_plan.problem.queries.dtype, self.decode_plan.location
        if out is None:
            out = empty_like(queries, out_shape, dtype)
        else:
            check_output(view(out, "out"), "out", out_shape, dtype, location, contiguous_rows=True)
        if lse is None:
            lse = empty_like(queries, lse_shape, LSE_DTYPE)
        else:
            check_output(view(lse, "lse"), "lse", lse_shape, LSE_DTYPE, location)
        return out, lse

    def finish(self, out: Any, lse: Any) -> tuple[Any, Any]:
        """Exchange what the decode wrote, and merge the results of this rank's heads into these."""
        self._exchange.finish(out, lse)
        return out, lse


def plan_given(plan: Any, kind: type) -> Any:
    """A plan that was given, or None.

    Raises
    ------
    InvalidArgumentError
        It is something else.
    """
    if plan is not None and not isinstance(plan, kind):
        raise InvalidArgumentError("plan", f"a {kind.__name__} of this function's, or None", type(plan).__name__)
    return plan
