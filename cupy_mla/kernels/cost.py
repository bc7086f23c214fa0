"""What a decode kernel's work costs: the figures by which kernels are chosen and work is cut."""

from __future__ import annotations

from dataclasses import dataclass

from ..schedule.pieces import TILE_TOKENS, PieceCosts, ceil_div
from ..schedule.shape import choose_parts

_READ_BYTES_PER_US = 4.4e6  # of a cache, by the decode of 128 requests of 8192 tokens, 16 heads


@dataclass(frozen=True, slots=True)
class Load:
    """The work of a call, as if all its requests were as long as the longest may be.

    Attributes
    ----------
    rows
        Query rows that share a kv head: its query heads, of all tokens of a request.
    requests
        Requests, counted once for each kv head.
    tokens_k
        KV tokens that each of them reads.
    token_bytes
        Of each of these tokens, bytes that come from memory; 0 where several requests may read the same ones.
    """

    rows: int
    requests: int
    tokens_k: int
    token_bytes: int = 0


@dataclass(frozen=True, slots=True)
class CostModel:
    """What the work of one kernel costs, measured on an H200.

    Times are microseconds and were fitted to whole calls with equal lengths, batches of 1 to 64 with 64 to 131,072
    tokens (kernels_cu/DESIGN.md has the table). ``pieces`` is in 1/16 of a tile's time, whole numbers, with which the
    planner on the device makes the same lists as the one in NumPy; it was fitted to what balances real batches best.
    The two speak of one thing with two figures: by ``item`` an item costs 0.9 to 1.6 tiles more than by ``pieces``.
    Items of a tile each, one after another on all SMs at once, show their whole latency; among longer ones it counts
    for less.

    Attributes
    ----------
    start
        Of a call with nothing to do.
    tile
        Of each KV tile, on the SM that has most of them.
    item
        Of each item after the first, on that SM.
    merge
        Of merging partial results.
    pieces
        What pieces cost besides their tiles, for the planner.
    """

    start: float
    tile: float
    item: float
    merge: float
    pieces: PieceCosts

    def piece_time(self, tokens_k: int) -> float:
        """About how many microseconds a piece of so many tokens takes, one of several of a CTA."""
        return self.item + self.tile * ceil_div(tokens_k, TILE_TOKENS)

    def call_time(self, load: Load, block_rows: int, num_sms: int) -> float:
        """About how many microseconds a call takes, its requests whole or cut, with so many query rows a CTA.

        Not less than reading the cache takes, however few rows there are.
        """
        row_blocks = ceil_div(load.rows, block_rows)
        blocks_per_job, num_parts = choose_parts(num_sms, row_blocks)
        jobs = load.requests * ceil_div(row_blocks, blocks_per_job)
        tiles = ceil_div(load.tokens_k, TILE_TOKENS)
        items = ceil_div(jobs, num_parts)
        whole = self.tile * items * tiles
        cut = self.tile * ceil_div(jobs * tiles, num_parts) + self.merge
        read = load.requests * load.tokens_k * load.token_bytes / _READ_BYTES_PER_US
        return self.start + self.item * max(items - 1, 0) + max(min(whole, cut), read)
