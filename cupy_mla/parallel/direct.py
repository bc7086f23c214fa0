"""Ranks of one host that store queries and results into each other's memory, without a collective."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays.dtypes import ITEM_SIZES
from ..arrays.exchange import empty_like
from ..arrays.frameworks import current_stream
from ..call.problem import LSE_DTYPE
from ..errors import InvalidArgumentError
from ..gpu.device import describe_device
from ..gpu.jit.module import load
from ..gpu.launch import launch_kernel
from ..kernels.push import PUSH_SOURCE, VALUE_BYTES, WORD_BYTES, push_geometry
from ..kernels.structs import PUSH_PARAMS
from ..schedule.pieces import ceil_div
from .exchange import ALL_TO_ALL, DIRECT, HeadExchange, merge_received
from .group import CupyGroup, TorchGroup
from .heads import Heads
from .host_memory import HostMemory, share_memory

_ALIGNMENT = 128  # bytes, of arrays in the memory
_MEETING_WORDS = 2


def exchange_of(
    q: Any, ranks: TorchGroup | CupyGroup, heads: Heads, exchange: str, *, may_be_tokens: bool
) -> HeadExchange | DirectExchange:
    """The exchange that is asked for; where it is the direct one and ranks cannot reach each other's memory, the
    all-to-all, with a warning.

    Raises
    ------
    InvalidArgumentError
        ``exchange`` is none that these ranks have.
    """
    if not isinstance(ranks, TorchGroup):
        if exchange != ALL_TO_ALL:
            raise InvalidArgumentError("exchange", f"{ALL_TO_ALL} for CuPy arrays", repr(exchange))
    elif exchange == DIRECT:
        memory = share_memory(ranks, _Places(heads).total, q)
        if isinstance(memory, HostMemory):
            return DirectExchange(q, heads, memory)
        warnings.warn(f"no direct exchange: {memory}; results go by an all-to-all", RuntimeWarning, stacklevel=5)
        exchange = ALL_TO_ALL
    return HeadExchange(q, ranks, heads, exchange=exchange, may_be_tokens=may_be_tokens)


class _Places:
    """Where things lie in a rank's memory, in bytes: the last meeting of each rank, the rank's own count of meetings,
    queries of all heads, and what the ranks send, out [world, *rows, heads, head_dim_v] and lse [world, (batch,) heads,
    tokens].
    """

    def __init__(self, heads: Heads) -> None:
        out_shape, lse_shape = heads.result_shapes
        item_size, queries = ITEM_SIZES[heads.dtype], 0 if heads.gathered else math.prod(heads.every) * heads.width
        self.meetings = _aligned(heads.world * WORD_BYTES)
        self.queries = self.meetings + _aligned(_MEETING_WORDS * WORD_BYTES)
        self.outs = self.queries + _aligned(queries * item_size)
        self.lses = self.outs + _aligned(heads.world * math.prod(out_shape) * item_size)
        self.total = self.lses + _aligned(heads.world * math.prod(lse_shape) * ITEM_SIZES[LSE_DTYPE])


class DirectExchange:
    """As `HeadExchange`, of ranks that have memory which all of them can store to (kernels_cu/exchange/push.cu).

    A call is two meetings, after the queries and after the results: each begins when all ranks have read what came at
    the one before, so everything has one place. Nothing is copied but what is sent: queries and results go from where
    they lie, to where they are wanted.

    Attributes
    ----------
    heads, as_tokens, queries, out, lse, exchange
        As of `HeadExchange`.

    Parameters
    ----------
    q, heads
        As of `HeadExchange`.
    memory
        Of at least as many bytes as `exchange_of` asks for.
    """

    exchange = DIRECT
    as_tokens = False

    def __init__(self, q: Any, heads: Heads, memory: HostMemory) -> None:
        self.heads, self._memory, self._places = heads, memory, _Places(heads)
        rows, dtype = heads.rows, heads.dtype

        def part(begin: int, shape: tuple[int, ...], element: Any) -> Any:
            whole = memory.own[begin:].view(element)
            return whole[: math.prod(shape)].view(shape)

        type_of_lse = empty_like(q, (0,), LSE_DTYPE).dtype
        self.queries = q if heads.gathered else part(self._places.queries, (*heads.every, heads.width), q.dtype)
        self.out = empty_like(q, (*heads.every, heads.head_dim_v), dtype)
        self.lse = empty_like(q, (*rows[:-1], heads.every[-1], rows[-1]), LSE_DTYPE)
        out_shape, lse_shape = heads.result_shapes
        self._received = (
            part(self._places.outs, (heads.world, *out_shape), q.dtype),
            part(self._places.lses, (heads.world, *lse_shape), type_of_lse),
        )
        self._own_meetings = memory.own.data_ptr() + self._places.meetings
        self._device_id = memory.own.device.index
        self._kernel = load(PUSH_SOURCE, self._device_id)
        self._send_results = self._params()
        self._fill_results(self._send_results[0])

    def gather(self, q: Any) -> Any:
        """Queries for a call, of all ranks; what others still read, nobody writes to before they are there."""
        params, heads = self._params(), self.heads
        if not heads.gathered:
            item_size = ITEM_SIZES[heads.dtype]
            if q.stride(-1) != 1 or any(stride * item_size % VALUE_BYTES for stride in q.stride()[:-1]):
                q = q.contiguous()
            row_bytes = heads.width * item_size
            begin = self._places.queries + heads.rank * heads.own * row_bytes
            _fill(params[0]["values"], q, self.queries, begin, row_bytes // VALUE_BYTES, rank_step=0)
        self._push(params)
        return self.queries if not heads.gathered else q

    def finish(self, out: Any, lse: Any) -> None:
        """As `HeadExchange.finish`."""
        self._push(self._send_results)
        merge_received(*self._received, out, lse)

    def _params(self) -> npt.NDArray[Any]:
        """Of a meeting at which nothing is handed over."""
        params = np.zeros(1, PUSH_PARAMS)
        params["memories"], params["meetings"] = self._memory.addresses.data_ptr(), self._own_meetings
        params["world"], params["rank"] = self.heads.world, self.heads.rank
        params["values"]["chunks"] = params["words"]["chunks"] = 1  # no rows have any number
        return params

    def _fill_results(self, params: Any) -> None:
        heads, (outs, lses) = self.heads, self._received
        out_row, lse_row = heads.head_dim_v * ITEM_SIZES[heads.dtype], heads.rows[-1] * ITEM_SIZES[LSE_DTYPE]
        of_rank = self._places.outs + heads.rank * outs.stride(0) * outs.element_size()
        chunks = out_row // VALUE_BYTES
        _fill(params["values"], self._own(self.out), outs[0], of_rank, chunks, rank_step=heads.own * out_row)
        of_rank = self._places.lses + heads.rank * lses.stride(0) * lses.element_size()
        chunks = lse_row // WORD_BYTES
        _fill(params["words"], self._own(self.lse), lses[0], of_rank, chunks, rank_step=heads.own * lse_row)

    def _own(self, array: Any) -> Any:
        """The first rank's part of [..., world * heads, n]."""
        return array[..., : self.heads.own, :]

    def _push(self, params: npt.NDArray[Any]) -> None:
        parts = params[0]["values"], params[0]["words"]
        most = max(math.prod(map(int, rows["sizes"])) * int(rows["chunks"]) for rows in parts)
        geometry = push_geometry(describe_device(self._device_id).num_sms, most)
        stream = current_stream(self.out, self._device_id)
        launch_kernel(self._kernel, geometry.grid, geometry.block, geometry.shared_memory, stream, (params,))


def _fill(rows: Any, source: Any, target: Any, begin: int, chunks: int, *, rank_step: int) -> None:
    """A PUSH_ROWS, from a tensor [..., n] to where an equal part of one lies; ``begin`` is that part's place."""
    sizes, steps = tuple(source.shape[:-1]), tuple(source.stride()[:-1])
    to_steps = tuple(target.stride()[:-1])
    missing = 3 - len(sizes)
    rows["from"], rows["rank_step"], rows["to"] = source.data_ptr(), rank_step, begin
    rows["sizes"] = (*[1] * missing, *sizes)
    rows["from_strides"] = (*[0] * missing, *(step * source.element_size() for step in steps))
    rows["to_strides"] = (*[0] * missing, *(step * target.element_size() for step in to_steps))
    rows["chunks"] = chunks


def _aligned(size: int) -> int:
    return ceil_div(size, _ALIGNMENT) * _ALIGNMENT
