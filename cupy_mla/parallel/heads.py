"""Whose heads the queries of a context-parallel call are, and the shapes that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..arrays.view import view
from ..errors import InvalidArgumentError, PlanMismatchError
from .group import CupyGroup, TorchGroup


@dataclass(frozen=True)
class Heads:
    """Of queries [*rows, heads, width] that were given: those of one rank, as many on each, or of all.

    Attributes
    ----------
    world, rank
        Of the ranks that share the heads out.
    rows
        [batch, seqlen_q], or [total_q].
    own
        Heads of one rank.
    width, head_dim_v
        Of a query and of an output.
    dtype
        Element type.
    gathered
        Whether what was given has all heads.
    kind
        Shape, type and device of what was given, as its framework has them.
    """

    world: int
    rank: int
    rows: tuple[int, ...]
    own: int
    width: int
    head_dim_v: int
    dtype: str
    gathered: bool
    kind: tuple[Any, ...]

    @staticmethod
    def of(q: Any, ranks: TorchGroup | CupyGroup, *, gathered: bool, head_dim_v: int) -> Heads:
        """Of these queries.

        Raises
        ------
        InvalidArgumentError
            q is no array of queries and of the ranks' framework, or its heads cannot be shared out equally.
        """
        ranks.refuse_others(q, "q", "[*rows, heads, width]")
        if q.ndim not in (3, 4):
            raise InvalidArgumentError("q", "an array [*rows, heads, width]", f"{list(q.shape)}")
        *rows, heads, width = q.shape
        world = ranks.world
        if gathered and heads % world:
            raise InvalidArgumentError("q", f"a number of heads that {world} ranks divide", str(heads))
        own = heads // world if gathered else heads
        dtype = view(q, "q").dtype
        return Heads(world, ranks.rank, tuple(rows), own, width, head_dim_v, dtype, gathered, _kind_of(q))

    @property
    def every(self) -> tuple[int, ...]:
        """[*rows, world * heads]."""
        return (*self.rows, self.world * self.own)

    @property
    def result_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of out and lse of one rank's heads: [*rows, heads, head_dim_v] and [(batch,) heads, tokens]."""
        return (*self.rows, self.own, self.head_dim_v), (*self.rows[:-1], self.own, self.rows[-1])

    def check(self, q: Any) -> None:
        """Refuse other queries.

        Raises
        ------
        PlanMismatchError
            Shape, type or device are others.
        """
        came = _kind_of(q)
        if came != self.kind:
            raise PlanMismatchError("plan", f"a plan for q {_said(came)}", f"one for {_said(self.kind)}")


def _kind_of(q: Any) -> tuple[Any, ...]:
    return tuple(getattr(q, name, None) for name in ("shape", "dtype", "device"))


def _said(kind: tuple[Any, ...]) -> str:
    shape, dtype, device = kind
    return f"{dtype} {None if shape is None else list(shape)} on {device}"
