"""How the ranks that share a cache hand each other queries and results, head by head.

A rank computes all heads over its own tokens, and wants the results of its own heads over all tokens.
"""

from __future__ import annotations

import math
from typing import Any

from ..arrays.dtypes import ITEM_SIZES
from ..arrays.exchange import empty_like
from ..arrays.frameworks import CUDA, current_stream, torch_module
from ..arrays.view import view
from ..call.problem import LSE_DTYPE
from ..decode.merge import merge_views
from ..errors import InvalidArgumentError, PlanMismatchError
from ..schedule.pieces import ceil_div
from .group import CupyGroup, TorchGroup

ALL_TO_ALL, GATHER_AND_REDUCE = "a2a", "ag_rs"
EXCHANGES = (ALL_TO_ALL, GATHER_AND_REDUCE)
_SEGMENT_ALIGNMENT = 16  # bytes; rows of results are stored 16 bytes at once
_BYTES = "uint8"


class HeadExchange:
    """Buffers of one kind of call, through which queries and results go.

    What goes to one rank, or comes from it, lies together. Kernels take one distance between heads, so queries of
    several ranks are copied once more, and results too; but of one query token the heads of the ranks are as good as
    query tokens that see the same keys, and nothing is copied.

    Attributes
    ----------
    ranks
        The ranks, and this process among them.
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
    ranks
        Who shares the cache.
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
        ``exchange`` is none, or none that these ranks have, q is no array of queries and of their framework, or its
        heads cannot be shared out equally.
    """

    def __init__(
        self,
        q: Any,
        ranks: TorchGroup | CupyGroup,
        *,
        gathered: bool,
        head_dim_v: int,
        exchange: str,
        may_be_tokens: bool,
    ) -> None:
        if exchange not in EXCHANGES:
            raise InvalidArgumentError("exchange", " or ".join(EXCHANGES), repr(exchange))
        if exchange == GATHER_AND_REDUCE and not isinstance(ranks, TorchGroup):
            raise InvalidArgumentError("exchange", f"{ALL_TO_ALL} for CuPy arrays", repr(exchange))
        ranks.refuse_others(q, "q", "[*rows, heads, width]")
        if q.ndim not in (3, 4):
            raise InvalidArgumentError("q", "an array [*rows, heads, width]", f"{list(q.shape)}")
        *rows, heads, width = q.shape
        world = ranks.world
        if gathered and heads % world:
            raise InvalidArgumentError("q", f"a number of heads that {world} ranks divide", str(heads))
        self.ranks = ranks
        self._gathered, self._made_for = gathered, _kind_of(q)
        self._heads = heads // world if gathered else heads
        self.as_tokens = may_be_tokens and len(rows) == 2 and rows[1] == 1
        dtype = view(q, "q").dtype
        self._gathering = None if gathered else empty_like(q, (world, *q.shape), dtype)
        every_head = (*rows, world * self._heads)

        self.result_shapes = (*rows, self._heads, head_dim_v), (*rows[:-1], self._heads, rows[-1])
        results, lse_bytes = math.prod(rows) * self._heads, ITEM_SIZES[LSE_DTYPE]
        out_bytes = ceil_div(results * head_dim_v * ITEM_SIZES[dtype], lse_bytes) * lse_bytes
        segment = ceil_div(out_bytes + results * lse_bytes, _SEGMENT_ALIGNMENT) * _SEGMENT_ALIGNMENT
        type_of_lse = empty_like(q, (0,), LSE_DTYPE).dtype

        def buffer() -> tuple[Any, Any, Any]:
            """Of a segment for each rank: the whole, out [world, *rows, heads, head_dim_v], lse [world, ...]."""
            whole = empty_like(q, (world, segment), _BYTES)
            out = whole.view(q.dtype)[:, : results * head_dim_v]
            lse = whole.view(type_of_lse)[:, out_bytes // lse_bytes :][:, :results]
            return whole, out.reshape(world, *self.result_shapes[0]), lse.reshape(world, *self.result_shapes[1])

        self._sent, self._sent_out, self._sent_lse = buffer()
        self._received = buffer() if exchange == ALL_TO_ALL else None
        if self.as_tokens:
            self.queries = self._queries_of(q if gathered else self._gathering)
            self.out = self._sent_out[:, :, 0].swapaxes(0, 1)
            self.lse = self._sent_lse[..., 0].swapaxes(0, 1).swapaxes(1, 2)
        else:
            self.queries = q if gathered else empty_like(q, (*every_head, width), dtype)
            self.out = empty_like(q, (*every_head, head_dim_v), dtype)
            self.lse = empty_like(q, (*rows[:-1], every_head[-1], rows[-1]), LSE_DTYPE)

    def check(self, q: Any) -> None:
        """Refuse queries that the buffers are not for.

        Raises
        ------
        PlanMismatchError
            Shape, type or device are others.
        """
        came = _kind_of(q)
        if came != self._made_for:
            raise PlanMismatchError("plan", f"a plan for q {_said(came)}", f"one for {_said(self._made_for)}")

    def gather(self, q: Any) -> Any:
        """Queries for a call, of all ranks: ``self.queries``, or a view of ``q`` where that has all heads."""
        if self._gathered:
            return self._queries_of(q) if self.as_tokens else q
        self.ranks.all_gather(self._gathering, q)
        if not self.as_tokens:
            self.ranks.copy(self._by_rank(self.queries), self._gathering)
        return self.queries

    def send(self) -> None:
        """Put what a call wrote where the collective takes it, if it is not there."""
        if not self.as_tokens:
            self.ranks.copy(self._sent_out, self._by_rank(self.out))
            self.ranks.copy(self._sent_lse, self._by_rank(self.lse))

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
            self.ranks.all_to_all(self._received[0], self._sent)
            self.merge(out, lse)

    def merge(self, out: Any, lse: Any) -> None:
        """Merge what was received, as it lies."""
        assert self._received is not None
        _, outs, lses = self._received
        to = view(out, "out")
        stream = current_stream(out, to.device_id) if to.device == CUDA else None
        merge_views(view(outs, "outs", stream), view(lses, "lses", stream), to, view(lse, "lse", stream), stream)

    def _queries_of(self, q: Any) -> Any:
        """[batch, world, heads, width] of gathered queries of one token."""
        if not self._gathered:
            return q[:, :, 0].swapaxes(0, 1)
        return q[:, 0].reshape(q.shape[0], self.ranks.world, self._heads, q.shape[-1])

    def _by_rank(self, array: Any) -> Any:
        """[..., world * heads, n] as [world, ..., heads, n]."""
        split = array.reshape(*array.shape[:-2], self.ranks.world, self._heads, array.shape[-1])
        for axis in range(split.ndim - 3, 0, -1):
            split = split.swapaxes(axis, axis - 1)
        return split

    def _reduce(self, out: Any, lse: Any) -> None:
        """All-gather of lse, correction, and a sum in float32 of which each rank gets its heads."""
        assert isinstance(self.ranks, TorchGroup)
        torch = torch_module("cupy_mla.parallel")
        mine = self._sent_lse.contiguous()
        lses = mine.new_empty((self.ranks.world, *mine.shape))
        self.ranks.all_gather(lses, mine)
        merged = lses.logsumexp(0)
        weights = torch.where(mine == -math.inf, 0.0, (mine - merged).exp())
        weighted = self._sent_out.float() * weights.transpose(-1, -2).unsqueeze(-1)
        summed = torch.empty(out.shape, device=out.device)
        self.ranks.reduce_scatter(summed, weighted)
        out.copy_(summed)
        lse.copy_(merged[self.ranks.rank])


def _kind_of(q: Any) -> tuple[Any, ...]:
    return tuple(getattr(q, name, None) for name in ("shape", "dtype", "device"))


def _said(made_for: tuple[Any, ...]) -> str:
    shape, dtype, device = made_for
    return f"{dtype} {None if shape is None else list(shape)} on {device}"
