"""How the ranks of a torch process group hand each other queries and results, head by head.

A rank computes all heads over its own tokens, and wants the results of its own heads over all tokens.
"""

from __future__ import annotations

import math
from typing import Any

from ..arrays.frameworks import CUDA, current_stream
from ..arrays.view import view
from ..decode.merge import merge_views
from ..errors import InvalidArgumentError, PlanMismatchError
from ..schedule.pieces import ceil_div
from .group import all_gather, all_to_all, ranks_of, reduce_scatter, torch_module

ALL_TO_ALL, GATHER_AND_REDUCE = "a2a", "ag_rs"
EXCHANGES = (ALL_TO_ALL, GATHER_AND_REDUCE)
_SEGMENT_ALIGNMENT = 16  # bytes; rows of results are stored 16 bytes at once
_LSE_BYTES = 4


class HeadExchange:
    """Buffers of one kind of call, through which queries and results go.

    What goes to one rank, or comes from it, lies together. Kernels take one distance between heads, so queries of
    several ranks are copied once more, and results too; but of one query token the heads of the ranks are as good as
    query tokens that see the same keys, and nothing is copied.

    Attributes
    ----------
    world, rank
        Of the process group.
    as_tokens
        Whether a call has the heads of a rank, and the ranks as its query tokens; else all heads.
    queries
        Queries of such a call, [batch, world, heads, width] or [*rows, world * heads, width]: filled by `gather`, but
        for queries that have all heads already.
    out, lse
        Where such a call writes to.
    result_shapes
        Of out and lse of this rank's heads: [*rows, heads, head_dim_v] and [(batch,) heads, tokens].

    Parameters
    ----------
    q
        Queries of this rank's heads, [*rows, heads, width], or of all heads.
    group
        torch process group; None: that of all processes.
    gathered
        Whether ``q`` has all heads.
    head_dim_v
        Width of an output.
    exchange
        ``"a2a"`` or ``"ag_rs"``.
    may_be_tokens
        Whether a call may have the ranks as query tokens, if it has one query token.

    Raises
    ------
    InvalidArgumentError
        ``exchange`` is none, there is no process group, q is no tensor of queries, or its heads cannot be shared out
        equally.
    MissingDependencyError
        torch is not installed.
    """

    def __init__(
        self, q: Any, group: Any, *, gathered: bool, head_dim_v: int, exchange: str, may_be_tokens: bool
    ) -> None:
        torch = torch_module()
        if exchange not in EXCHANGES:
            raise InvalidArgumentError("exchange", " or ".join(EXCHANGES), repr(exchange))
        self.world, self.rank = ranks_of(group)
        if not isinstance(q, torch.Tensor) or q.ndim not in (3, 4):
            raise InvalidArgumentError("q", "a tensor [*rows, heads, width]", getattr(q, "shape", type(q).__name__))
        *rows, heads, width = q.shape
        if gathered and heads % self.world:
            raise InvalidArgumentError("q", f"a number of heads that {self.world} ranks divide", str(heads))
        self._group, self._gathered, self._made_for = group, gathered, (q.shape, q.dtype, q.device)
        self._heads = heads // self.world if gathered else heads
        self.as_tokens = may_be_tokens and len(rows) == 2 and rows[1] == 1
        self._gathering = None if gathered else q.new_empty((self.world, *q.shape))
        every_head = (*rows, self.world * self._heads)

        self.result_shapes = (*rows, self._heads, head_dim_v), (*rows[:-1], self._heads, rows[-1])
        results = math.prod(rows) * self._heads
        out_bytes = results * head_dim_v * q.element_size()
        segment = ceil_div(out_bytes + results * _LSE_BYTES, _SEGMENT_ALIGNMENT) * _SEGMENT_ALIGNMENT

        def buffer() -> tuple[Any, Any, Any]:
            """Of a segment for each rank: the whole, out [world, *rows, heads, head_dim_v], lse [world, ...]."""
            whole = torch.empty((self.world, segment), dtype=torch.uint8, device=q.device)
            out = whole[:, :out_bytes].view(q.dtype).unflatten(1, self.result_shapes[0])
            lse = whole[:, out_bytes : out_bytes + results * _LSE_BYTES].view(torch.float32)
            return whole, out, lse.unflatten(1, self.result_shapes[1])

        self._sent, self._sent_out, self._sent_lse = buffer()
        self._received = buffer() if exchange == ALL_TO_ALL else None
        if self.as_tokens:
            self.queries = self._queries_of(q if gathered else self._gathering)
            self.out, self.lse = self._sent_out[:, :, 0].transpose(0, 1), self._sent_lse[..., 0].permute(1, 2, 0)
        else:
            self.queries = q if gathered else q.new_empty((*every_head, width))
            self.out = q.new_empty((*every_head, head_dim_v))
            self.lse = torch.empty((*rows[:-1], every_head[-1], rows[-1]), device=q.device)

    def check(self, q: Any) -> None:
        """Refuse queries that the buffers are not for.

        Raises
        ------
        PlanMismatchError
            Shape, type or device are others.
        """
        came = tuple(getattr(q, name, None) for name in ("shape", "dtype", "device"))
        if came != self._made_for:
            raise PlanMismatchError("plan", f"a plan for q {_said(came)}", f"one for {_said(self._made_for)}")

    def gather(self, q: Any) -> Any:
        """Queries for a call, of all ranks: ``self.queries``, or a view of ``q`` where that has all heads."""
        if self._gathered:
            return self._queries_of(q) if self.as_tokens else q
        all_gather(self._gathering, q.contiguous(), self._group)
        if not self.as_tokens:
            self._by_rank(self.queries).copy_(self._gathering)
        return self.queries

    def send(self) -> None:
        """Put what a call wrote where the collective takes it, if it is not there."""
        if not self.as_tokens:
            self._sent_out.copy_(self._by_rank(self.out))
            self._sent_lse.copy_(self._by_rank(self.lse))

    def finish(self, out: Any, lse: Any) -> None:
        """Exchange what a call wrote, and merge the results of this rank's heads.

        Parameters
        ----------
        out, lse
            [*rows, heads, head_dim_v] of q's type and [(batch,) heads, tokens] float32, to be written to.
        """
        self.send()
        if self._received is None:
            self._reduce(out, lse)
        else:
            all_to_all(self._received[0], self._sent, self._group)
            self.merge(out, lse)

    def merge(self, out: Any, lse: Any) -> None:
        """Merge what was received, as it lies."""
        assert self._received is not None
        _, outs, lses = self._received
        stream = current_stream(out, out.device.index) if out.device.type == CUDA else None
        outs, lses, out, lse = (
            view(array, name, stream) for array, name in ((outs, "outs"), (lses, "lses"), (out, "out"), (lse, "lse"))
        )
        merge_views(outs, lses, out, lse, stream)

    def _queries_of(self, q: Any) -> Any:
        """[batch, world, heads, width] of gathered queries of one token."""
        return q[:, 0].unflatten(1, (self.world, self._heads)) if self._gathered else q[:, :, 0].transpose(0, 1)

    def _by_rank(self, array: Any) -> Any:
        """[..., world * heads, n] as [world, ..., heads, n]."""
        return array.unflatten(-2, (self.world, self._heads)).movedim(-3, 0)

    def _reduce(self, out: Any, lse: Any) -> None:
        """All-gather of lse, correction, and a sum in float32 of which each rank gets its heads."""
        torch = torch_module()
        mine = self._sent_lse.contiguous()
        lses = mine.new_empty((self.world, *mine.shape))
        all_gather(lses, mine, self._group)
        merged = lses.logsumexp(0)
        weights = torch.where(mine == -math.inf, 0.0, (mine - merged).exp())
        weighted = self._sent_out.float() * weights.transpose(-1, -2).unsqueeze(-1)
        summed = torch.empty(out.shape, device=out.device)
        reduce_scatter(summed, weighted, self._group)
        out.copy_(summed)
        lse.copy_(merged[self.rank])


def _said(made_for: tuple[Any, ...]) -> str:
    shape, dtype, device = made_for
    return f"{dtype} {None if shape is None else list(shape)} on {device}"
