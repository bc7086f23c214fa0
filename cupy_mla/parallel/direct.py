"""Ranks of one host that store queries and results into each other's memory, without a collective."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays.dtypes import ITEM_SIZES
from ..arrays.exchange import empty_like
from ..arrays.frameworks import CUDA, current_stream
from ..arrays.view import ArrayView
from ..call.problem import LSE_DTYPE
from ..decode.plan import DecodePlan
from ..errors import InvalidArgumentError
from ..gpu.hopper import MAX_SMS
from ..gpu.jit.module import load
from ..gpu.jit.source import KernelSource
from ..gpu.launch import Geometry, Launch
from ..kernels.combine import STORE_ALIGNMENT
from ..kernels.exchange import (
    CHUNK_BYTES,
    PACKET_BYTES,
    PUSH_SOURCE,
    WORD_BYTES,
    combine_push_geometry,
    combine_push_source,
    goes_in_packets,
    merges_packets,
    packets_of_row,
    push_geometry,
    push_merge_geometry,
    push_merge_source,
)
from ..kernels.structs import COMBINE_PARAMS, PUSH_MERGE_PARAMS, PUSH_PARAMS
from ..schedule.pieces import ceil_div
from .exchange import ALL_TO_ALL, DIRECT, HeadExchange
from .group import CupyGroup, TorchGroup
from .heads import Heads
from .host_memory import HostMemory, share_memory

_ALIGNMENT = 128  # bytes, of arrays in the memory


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
            return DirectExchange(q, heads, memory, may_be_tokens=may_be_tokens)
        warnings.warn(f"no direct exchange: {memory}; results go by an all-to-all", RuntimeWarning, stacklevel=5)
        exchange = ALL_TO_ALL
    return HeadExchange(q, ranks, heads, exchange=exchange, may_be_tokens=may_be_tokens)


class _Places:
    """Where things lie in a rank's memory, in bytes: of meetings over queries and over results each rank's flags and
    the rank's own counts, one for each CTA; queries of all heads; packets in which few of them come, and few results;
    and what the ranks send, out [turns, world, *rows, heads, head_dim_v] and lse [turns, world, *rows, heads].

    Attributes
    ----------
    turns
        Calls whose results have places of their own. A rank may be a call ahead of another that still merges, unless
        all meet over queries between.
    """

    def __init__(self, heads: Heads) -> None:
        self.turns = 2 if heads.gathered else 1
        results, item_size = self.turns * heads.world * math.prod((*heads.rows, heads.own)), ITEM_SIZES[heads.dtype]
        query_bytes = 0 if heads.gathered else math.prod(heads.every) * heads.width * item_size
        self.has_packets = query_bytes > 0 and goes_in_packets(query_bytes // heads.world)
        packets = query_bytes // CHUNK_BYTES * PACKET_BYTES if self.has_packets else 0
        self.query_flags = 0
        self.query_calls = self.query_flags + _aligned(MAX_SMS * heads.world * WORD_BYTES)
        self.result_flags = self.query_calls + _aligned(MAX_SMS * WORD_BYTES)
        self.result_calls = self.result_flags + _aligned(MAX_SMS * heads.world * WORD_BYTES)
        self.queries = self.result_calls + _aligned(MAX_SMS * WORD_BYTES)
        self.packets = self.queries + _aligned(query_bytes)
        self.result_packets = self.packets + _aligned(packets)
        row_bytes = heads.head_dim_v * item_size
        may_merge_packets = merges_packets(MAX_SMS, results // self.turns // heads.world, heads.world, row_bytes)
        packets = results * packets_of_row(row_bytes) * PACKET_BYTES if may_merge_packets else 0
        self.outs = self.result_packets + _aligned(packets)
        self.lses = self.outs + _aligned(results * heads.head_dim_v * item_size)
        self.total = self.lses + _aligned(results * ITEM_SIZES[LSE_DTYPE])


class DirectExchange:
    """As `HeadExchange`, of ranks that have memory which all of them can store to (kernels_cu/exchange).

    A call is two kernels: one that stores queries where all want them, and one that stores results where the ranks of
    their heads want them, and merges those that come. Queries that are gathered already need the second only. Nothing
    is copied but what is sent: from where it lies, to where it is wanted.

    Few queries and results go in packets (kernels_cu/exchange), which take more bytes and less time.

    Where there are more, the ranks may be query tokens (`HeadExchange`), and their memories are mapped equally far
    apart, as those of two ranks always are, the decode itself stores results where they are wanted, while it still
    computes others. Queries that are gathered already do without: of two calls in turn the decode does not know which
    it is.

    Attributes
    ----------
    heads, as_tokens, repeats, queries, out, lse, exchange
        As of `HeadExchange`.

    Parameters
    ----------
    q, heads, may_be_tokens
        As of `HeadExchange`.
    memory
        Of at least as many bytes as `exchange_of` asks for.
    """

    exchange, repeats = DIRECT, 1

    def __init__(self, q: Any, heads: Heads, memory: HostMemory, *, may_be_tokens: bool) -> None:
        self.heads, self._memory, self._places = heads, memory, _Places(heads)
        self._device_id, rows, own = memory.own.device.index, heads.rows, memory.own
        self.out: Any
        self.lse: Any
        addresses = memory.addresses.tolist()
        steps = {after - before for before, after in itertools.pairwise(addresses)} or {0}
        may_be_tokens = may_be_tokens and not heads.gathered and len(rows) == 2 and rows[1] == 1
        num_rows, row_bytes = math.prod((*rows, heads.own)), heads.head_dim_v * ITEM_SIZES[heads.dtype]
        self._push: Launch | None = None
        self._merges_packets = merges_packets(memory.num_sms, num_rows, heads.world, row_bytes)
        self.as_tokens = may_be_tokens and len(steps) == 1 and not self._merges_packets
        self.queries = q
        if not heads.gathered:
            queries = own[self._places.queries :].view(q.dtype)
            queries = queries[: math.prod(heads.every) * heads.width].view(*heads.every, heads.width)
            self.queries = queries
        if self.as_tokens:
            self.queries = queries.view(rows[0], heads.world, heads.own, heads.width)
            self.out, self.lse = self._stored_by_decode(addresses[0], steps.pop())
        else:
            self.out = empty_like(q, (*heads.every, heads.head_dim_v), heads.dtype)
            self.lse = empty_like(q, (*rows[:-1], heads.every[-1], rows[-1]), LSE_DTYPE)
        if not heads.gathered:
            self._push_params = self._for_push(queries)
            chunks = num_rows * int(self._push_params["chunks"][0])
            self._push = self._launch(PUSH_SOURCE, push_geometry(memory.num_sms, chunks), (self._push_params,))
        shared_memory = heads.world * (row_bytes + WORD_BYTES) if self._merges_packets else 0
        self._merge_params, geometry = self._for_merge(), push_merge_geometry(memory.num_sms, num_rows, shared_memory)
        self._push_merge = self._launch(push_merge_source(heads.dtype), geometry, (self._merge_params,))
        self._combine_push: Launch | None = None

    def merges_pieces(self, plan: DecodePlan) -> None:
        """Merge also the partial results of a plan's calls, if results go in packets: one kernel less."""
        kind = plan.blueprint
        if not self._merges_packets or kind is None or kind.shape.max_merges == 0:
            return
        geometry = combine_push_geometry(self._memory.num_sms, self.heads.world)
        if geometry is not None:
            plan.pieces = np.zeros(1, COMBINE_PARAMS)
            source = combine_push_source(kind.config)
            self._combine_push = self._launch(source, geometry, (plan.pieces, self._merge_params))

    def gather(self, q: Any) -> Any:
        """Queries for a call, of all ranks."""
        if self._push is None:
            return q
        item_size, params = ITEM_SIZES[self.heads.dtype], self._push_params
        if q.stride(-1) != 1 or any(stride * item_size % CHUNK_BYTES for stride in q.stride()[:-1]):
            q = q.contiguous()
        params["from"] = q.data_ptr()
        params["from_strides"] = _three([stride * item_size for stride in q.stride()[:-1]], 0)
        self._push(current_stream(q, self._device_id))
        return self.queries

    def finish(self, out: Any, lse: Any) -> None:
        """As `HeadExchange.finish`."""
        params, step = self._merge_params, STORE_ALIGNMENT // ITEM_SIZES[self.heads.dtype]
        strides = out.stride()[:-1]
        params["out"], params["lse"] = out.data_ptr(), lse.data_ptr()
        params["out_strides"] = _three(strides, 0)
        *of_batch, of_head, of_token = lse.stride()
        params["lse_strides"] = _three([*of_batch, of_token, of_head], 0)
        params["aligned"] = not any(stride % step for stride in strides) and not out.data_ptr() % STORE_ALIGNMENT
        finish = self._combine_push or self._push_merge
        finish(current_stream(out, self._device_id))

    def _stored_by_decode(self, first: int, step: int) -> tuple[ArrayView, ArrayView]:
        """Where the decode stores results: out [batch, world, heads, head_dim_v] and lse [batch, heads, world], of
        which each query token lies in the memory of the rank that it stands for: so many bytes behind the one before.
        """
        heads, places = self.heads, self._places
        batch, world, own, width = heads.rows[0], heads.world, heads.own, heads.head_dim_v
        item_size, lse_size = ITEM_SIZES[heads.dtype], ITEM_SIZES[LSE_DTYPE]
        sent_before = heads.rank * batch * own
        out, lse = places.outs + sent_before * width * item_size, places.lses + sent_before * lse_size
        of_out, of_lse = (own * width, step // item_size, width, 1), (own, 1, step // lse_size)
        location = CUDA, self._device_id, self._memory
        return (
            ArrayView(first + out, (batch, world, own, width), of_out, heads.dtype, *location),
            ArrayView(first + lse, (batch, own, world), of_lse, LSE_DTYPE, *location),
        )

    def _for_push(self, queries: Any) -> npt.NDArray[Any]:
        heads, params = self.heads, np.zeros(1, PUSH_PARAMS)
        row_bytes, item_size = heads.width * ITEM_SIZES[heads.dtype], ITEM_SIZES[heads.dtype]
        params["to"] = self._places.queries + heads.rank * heads.own * row_bytes
        params["packets"] = self._places.packets if self._places.has_packets else 0
        # What waits in place for queries takes SMs, of which ranks on the same GPU need some to send theirs.
        params["starts_next"] = self._memory.has_own_gpus
        params["to_strides"] = _three([stride * item_size for stride in queries.stride()[:-1]], 0)
        params["sizes"], params["chunks"] = _three([*heads.rows, heads.own], 1), row_bytes // CHUNK_BYTES
        self._say_where_to_meet(params, self._places.query_flags, self._places.query_calls)
        return params

    def _for_merge(self) -> npt.NDArray[Any]:
        heads, places, params = self.heads, self._places, np.zeros(1, PUSH_MERGE_PARAMS)
        if not isinstance(self.out, ArrayView):
            params["outs"], params["lses"] = self.out.data_ptr(), self.lse.data_ptr()
        params["received_outs"], params["received_lses"], params["places"] = places.outs, places.lses, places.turns
        params["packets"] = places.result_packets if self._merges_packets else 0
        params["sizes"], params["d_v"] = _three([*heads.rows, heads.own], 1), heads.head_dim_v
        self._say_where_to_meet(params, places.result_flags, places.result_calls)
        return params

    def _say_where_to_meet(self, params: npt.NDArray[Any], flags: int, calls: int) -> None:
        meetings = params["meetings"]
        meetings["memories"], meetings["flags"] = self._memory.addresses.data_ptr(), flags
        meetings["calls"] = self._memory.own.data_ptr() + calls
        meetings["world"], meetings["rank"] = self.heads.world, self.heads.rank

    def _launch(self, source: KernelSource, geometry: Geometry, arguments: tuple[npt.NDArray[Any], ...]) -> Launch:
        kernel, shape = load(source, self._device_id), (geometry.grid, geometry.block, geometry.shared_memory)
        return Launch(kernel, *shape, arguments, programmatic=True)


def _three(values: Sequence[int], missing: int) -> tuple[int, ...]:
    """Of (batch, token, head), of which ragged queries have no batch."""
    return (*[missing] * (3 - len(values)), *values)


def _aligned(size: int) -> int:
    return ceil_div(size, _ALIGNMENT) * _ALIGNMENT
