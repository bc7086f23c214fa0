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
from ..decode.plan import DecodePlan
from ..errors import InvalidArgumentError
from ..schedule.pieces import ceil_div
from .group import FEATURE, CupyGroup, TorchGroup
from .heads import Heads

ALL_TO_ALL, GATHER_AND_REDUCE, DIRECT = "a2a", "ag_rs", "direct"
EXCHANGES = (ALL_TO_ALL, GATHER_AND_REDUCE, DIRECT)
_SEGMENT_ALIGNMENT = 16  # bytes; rows of results are stored 16 bytes at once
_BYTES = "uint8"
# Query rows of a rank's heads from which a kernel computes longer than it reads: they may read the keys for themselves.
ROWS_OF_REQUEST = 128


class HeadExchange:
    """Buffers of one kind of call, through which queries and results go.

    What goes to one rank, or comes from it, lies together. Kernels take one distance between heads, so queries of
    several ranks are copied once more, and results too. But of one query token the heads of the ranks are as good as
    query tokens that see the same keys, and of several, with many rows, as requests with the same pages: nothing is
    copied.

    Attributes
    ----------
    heads
        Whose heads the queries are.
    as_tokens
        Whether a call has the heads of a rank, and the ranks as its query tokens; else all heads.
    repeats
        How often a call has each request: the number of ranks, if it has the heads of a rank, and its requests rank
        after rank; else 1.
    queries
        Queries of such a call, [batch, world, heads, width], [world * batch, tokens, heads, width] or
        [*rows, world * heads, width]: filled by `gather`, but for queries that have all heads already.
    out, lse
        Where such a call writes to.

    Parameters
    ----------
    q
        Queries of this rank's heads, [*rows, heads, width], or of all heads.
    ranks
        Who shares the cache.
    exchange
        ``"a2a"``, or of torch ``"ag_rs"``.
    may_be_tokens
        Whether a call may have the ranks as query tokens, if it has one query token, or as requests.
    """

    def __init__(
        self, q: Any, ranks: TorchGroup | CupyGroup, heads: Heads, *, exchange: str, may_be_tokens: bool
    ) -> None:
        self._ranks, self.heads, self.exchange = ranks, heads, exchange
        world, rows, dtype = heads.world, heads.rows, heads.dtype
        self.as_tokens = may_be_tokens and len(rows) == 2 and rows[1] == 1
        may_be_requests = may_be_tokens and not self.as_tokens and not heads.gathered and len(rows) == 2
        self.repeats = world if may_be_requests and rows[1] * heads.own >= ROWS_OF_REQUEST else 1
        self._gathering = None if heads.gathered else empty_like(q, (world, *q.shape), dtype)

        out_shape, lse_shape = heads.result_shapes
        # Out and lse of all requests, or of one after the other: as far apart as what is for the next rank.
        parts = rows[0] if self.repeats > 1 else 1
        results, lse_bytes = math.prod(lse_shape) // max(parts, 1), ITEM_SIZES[LSE_DTYPE]
        out_bytes = ceil_div(results * heads.head_dim_v * ITEM_SIZES[dtype], lse_bytes) * lse_bytes
        segment = ceil_div(out_bytes + results * lse_bytes, _SEGMENT_ALIGNMENT) * _SEGMENT_ALIGNMENT
        type_of_lse = empty_like(q, (0,), LSE_DTYPE).dtype

        def buffer() -> tuple[Any, Any, Any]:
            """Of segments for each rank: the whole, out [world, *rows, heads, head_dim_v], lse [world, ...]."""
            whole = empty_like(q, (world, parts, segment), _BYTES)
            out = whole.view(q.dtype)[..., : results * heads.head_dim_v]
            lse = whole.view(type_of_lse)[..., out_bytes // lse_bytes :][..., :results]
            return whole, out.reshape(world, *out_shape), lse.reshape(world, *lse_shape)

        self._sent, self._sent_out, self._sent_lse = buffer()
        self._received = buffer() if exchange == ALL_TO_ALL else None
        if self.as_tokens:
            self.queries = self._queries_of(q if heads.gathered else self._gathering)
            self.out = self._sent_out[:, :, 0].swapaxes(0, 1)
            self.lse = self._sent_lse[..., 0].swapaxes(0, 1).swapaxes(1, 2)
        elif self.repeats > 1:
            of_ranks: tuple[Any, ...] = self._gathering, self._sent_out, self._sent_lse
            requests = (array.reshape(world * rows[0], *array.shape[2:]) for array in of_ranks)
            self.queries, self.out, self.lse = requests
        else:
            self.queries = q if heads.gathered else empty_like(q, (*heads.every, heads.width), dtype)
            self.out = empty_like(q, (*heads.every, heads.head_dim_v), dtype)
            self.lse = empty_like(q, (*rows[:-1], heads.every[-1], rows[-1]), LSE_DTYPE)

    def merges_pieces(self, plan: DecodePlan) -> None:
        """Nothing: calls of the plan merge their partial results by themselves."""

    def gather(self, q: Any) -> Any:
        """Queries for a call, of all ranks: ``self.queries``, or a view of ``q`` where that has all heads."""
        if self.heads.gathered:
            return self._queries_of(q) if self.as_tokens else q
        self._ranks.all_gather(self._gathering, q)
        if not self._lies_by_rank:
            self._ranks.copy(self._by_rank(self.queries), self._gathering)
        return self.queries

    def send(self) -> None:
        """Put what a call wrote where the collective takes it, if it is not there."""
        if not self._lies_by_rank:
            self._ranks.copy(self._sent_out, self._by_rank(self.out))
            self._ranks.copy(self._sent_lse, self._by_rank(self.lse))

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
            self._ranks.all_to_all(self._received[0], self._sent)
            self.merge(out, lse)

    def merge(self, out: Any, lse: Any) -> None:
        """Merge what was received, as it lies."""
        assert self._received is not None
        merge_received(*self._received[1:], out, lse)

    @property
    def _lies_by_rank(self) -> bool:
        """Whether a call takes and gives what is of each rank as it is sent."""
        return self.as_tokens or self.repeats > 1

    def _queries_of(self, q: Any) -> Any:
        """[batch, world, heads, width] of gathered queries of one token."""
        if not self.heads.gathered:
            return q[:, :, 0].swapaxes(0, 1)
        return q[:, 0].reshape(q.shape[0], self.heads.world, self.heads.own, q.shape[-1])

    def _by_rank(self, array: Any) -> Any:
        """[..., world * heads, n] as [world, ..., heads, n]."""
        split = array.reshape(*array.shape[:-2], self.heads.world, self.heads.own, array.shape[-1])
        for axis in range(split.ndim - 3, 0, -1):
            split = split.swapaxes(axis, axis - 1)
        return split

    def _reduce(self, out: Any, lse: Any) -> None:
        """All-gather of lse, correction, and a sum in float32 of which each rank gets its heads."""
        assert isinstance(self._ranks, TorchGroup)
        torch = torch_module(FEATURE)
        mine = self._sent_lse.contiguous()
        lses = mine.new_empty((self._ranks.world, *mine.shape))
        self._ranks.all_gather(lses, mine)
        merged = lses.logsumexp(0)
        weights = torch.where(mine == -math.inf, 0.0, (mine - merged).exp())
        weighted = self._sent_out.float() * weights.transpose(-1, -2).unsqueeze(-1)
        summed = torch.empty(out.shape, device=out.device)
        self._ranks.reduce_scatter(summed, weighted)
        out.copy_(summed)
        lse.copy_(merged[self._ranks.rank])


def merge_received(outs: Any, lses: Any, out: Any, lse: Any) -> None:
    """Merge results of all ranks, [world, ...], into others, on the current stream of their framework."""
    to = view(out, "out")
    stream = current_stream(out, to.device_id) if to.device == CUDA else None
    merge_views(view(outs, "outs", stream), view(lses, "lses", stream), to, view(lse, "lse", stream), stream)


def check_exchange(exchange: Any, *, among: tuple[str, ...] = EXCHANGES) -> None:
    """Refuse what is no name of an exchange.

    Raises
    ------
    InvalidArgumentError
        ``exchange`` is none of these.
    """
    if exchange not in among:
        raise InvalidArgumentError("exchange", " or ".join(among), repr(exchange))
