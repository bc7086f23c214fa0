"""A step of a batch: room for new tokens in every layer, and the arrays that all layers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .allocator import AppendPlan
from .storage import Storage, typed

_SLOT_BYTES, _POSITION_BYTES = 8, 4


class StepCache(Protocol):
    """What a step asks of its `PagedKVCache`."""

    num_layers: int
    storage: Any

    @property
    def tables_changed(self) -> int:
        """As in `PagedKVCache`."""

    def make_room(self, requests: Sequence[int], counts: Sequence[int], stream: int | None = None) -> AppendPlan:
        """As in `PagedKVCache`."""

    def write(self, layer: int, kv_new: Any, slot_mapping: Any, *, stream: int | None = None) -> None:
        """As in `PagedKVCache`."""

    def block_table(self, requests: Sequence[int], *, out: Any = None, stream: int | None = None) -> Any:
        """As in `PagedKVCache`."""


class CacheStep:
    """New tokens of a batch of requests, in all layers of a `PagedKVCache`; made by its ``step``.

    The bookkeeping is done once, for all layers: pages are taken, those shared with a fork are copied, and the arrays
    below are on the device. `append` then only launches a kernel. The arrays keep their memory, so a CUDA graph may
    hold the appends and decodes of a step: call `advance` before each replay. (Those of JAX are new ones after
    `advance`.)

    Attributes
    ----------
    requests
        The batch, in its order.
    block_table
        int32 [batch, max_pages_per_seq], as ``mla_decode`` takes it.
    cache_seqlens
        int32 [batch]: lengths with the new tokens, of what this cache has.
    total_seqlens
        int32 [batch]: lengths with the new tokens on all ranks; `cache_seqlens` of a cache that is not sharded.
    slot_mapping
        int64 [num_tokens]: where the new tokens of each layer go, as ``append_tokens`` takes it (JAX: int32); -1: to
        another rank.
    positions
        int32 [num_tokens]: place of each new token in its request, counted from 0, e.g. for rotary embeddings.
    """

    def __init__(self, cache: StepCache, requests: Sequence[int], counts: Sequence[int], stream: int | None) -> None:
        self.requests = tuple(requests)
        self.block_table: Any = None
        self.cache_seqlens: Any = None
        self.total_seqlens: Any = None
        self.slot_mapping: Any = None
        self.positions: Any = None
        self._cache = cache
        self._counts = tuple(counts)
        self._tables_seen = -1
        self._small: Any = None  # slots, positions and both lengths, one behind the other: one copy a step
        self.advance(stream=stream)

    def __repr__(self) -> str:
        tokens, layers = sum(self._counts), self._cache.num_layers
        return f"CacheStep({tokens} new tokens of {len(self.requests)} requests, {layers} layers)"

    def append(self, layer: int, kv_new: Any, *, stream: int | None = None) -> None:
        """Write the new tokens of one layer; one kernel launch on the GPU.

        Parameters
        ----------
        layer
            Which one, from 0.
        kv_new
            [num_tokens, d] or a pair (latent, rope), as in `PagedKVCache.append`.
        stream
            Raw CUDA stream; the current stream of ``kv_new``'s framework if not given.

        Raises
        ------
        InvalidArgumentError
            There is no such layer, or an array has the wrong shape, type or device.
        """
        self._cache.write(layer, kv_new, self.slot_mapping, stream=stream)

    def advance(self, *, stream: int | None = None) -> None:
        """Make room for as many tokens of each request again, and bring the arrays up to date, in their places.

        Parameters
        ----------
        stream
            Raw CUDA stream; the current stream of the cache's framework if not given.

        Raises
        ------
        InvalidArgumentError
            A request is gone or would get longer than ``max_pages_per_seq`` pages, or the stream is captured.
        OutOfPagesError
            Too few free pages. In each case the requests and the arrays are as they were.
        """
        plan = self._cache.make_room(self.requests, self._counts, stream)
        lengths = plan.new_seqlens.astype(np.int32)
        positions = plan.positions.astype(np.int32)
        storage = self._cache.storage
        if isinstance(storage, Storage):
            self._write(storage, plan, positions, lengths, stream)
            return
        self.slot_mapping, self.positions = storage.upload(plan.slots, stream), storage.upload(positions, stream)
        self.cache_seqlens = self.total_seqlens = storage.upload(lengths, stream)
        if plan.is_sharded:
            self.total_seqlens = storage.upload(plan.new_lengths.astype(np.int32), stream)
        self.block_table = self._cache.block_table(self.requests)

    def _write(self, storage: Storage, plan: AppendPlan, positions: Any, lengths: Any, stream: int | None) -> None:
        host_arrays = [plan.slots, positions, lengths]
        if plan.is_sharded:
            host_arrays.append(plan.new_lengths.astype(np.int32))
        host = np.concatenate([array.view(np.uint8) for array in host_arrays])
        if self._small is None:
            self._small = storage.empty(host.size, stream)
            slots_end = plan.slots.size * _SLOT_BYTES
            positions_end = slots_end + positions.size * _POSITION_BYTES
            self.slot_mapping = typed(self._small[:slots_end], "int64")
            self.positions = typed(self._small[slots_end:positions_end], "int32")
            lengths_end = positions_end + lengths.nbytes
            self.cache_seqlens = self.total_seqlens = typed(self._small[positions_end:lengths_end], "int32")
            if plan.is_sharded:
                self.total_seqlens = typed(self._small[lengths_end:], "int32")
            self.block_table = self._cache.block_table(self.requests, stream=stream)
        else:
            if self._tables_seen != self._cache.tables_changed:
                self._cache.block_table(self.requests, out=self.block_table, stream=storage.stream(stream))
        self._tables_seen = self._cache.tables_changed
        storage.write(self._small, host, stream)
