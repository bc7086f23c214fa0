"""What each rank has of a decode case whose cache is sharded along the sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ..call.shard import Shard
from ..schedule.pieces import ceil_div
from .cases import NO_PAGE, Case, each_part, parts_of
from .random_values import Array

_POISON_BYTE = 0xFF  # not-a-number in every type, where there is no token


def shards_of(case: Case, world: int, interleave: int) -> Iterator[tuple[Shard, Case]]:
    """A host case over the tokens of each rank, with all queries, lengths of the rank, and pages of its own."""
    for rank in range(world):
        shard = Shard(world, rank, interleave)
        yield shard, _share(case, shard)


def _share(case: Case, shard: Shard) -> Case:
    page_size = parts_of(case.kv_cache)[0].shape[1]
    lengths = shard.count(case.kv_lengths)
    num_pages = ceil_div(lengths, page_size)
    table = np.full((case.batch, max(int(num_pages.max(initial=0)), 1)), NO_PAGE, np.int32)
    first = np.cumsum(num_pages) - num_pages
    old, new = [], []
    for request, total in enumerate(case.kv_lengths):
        tokens = np.flatnonzero(shard.has(np.arange(total)))
        old.append(_slots(case.block_table[request], tokens, page_size))
        table[request, : num_pages[request]] = first[request] + np.arange(num_pages[request])
        new.append(_slots(table[request], np.arange(tokens.size), page_size))
    total_pages = max(int(num_pages.sum()), 1)

    def move(part: Array) -> Array:
        stored = np.full((total_pages, *part.shape[1:-1], part.shape[-1] * part.itemsize), _POISON_BYTE, np.uint8)
        moved: Array = stored.view(part.dtype)
        to, source = np.concatenate(new), np.concatenate(old)
        moved[to // page_size, to % page_size] = part[source // page_size, source % page_size]
        return moved

    return replace(
        case,
        kv_cache=each_part(move, case.kv_cache),
        block_table=table,
        cache_seqlens=lengths.astype(np.int32),
        kv_lengths=lengths,
    )


def _slots(table: Array, tokens: Array, page_size: int) -> Array:
    slots: Array = table[tokens // page_size].astype(np.int64) * page_size + tokens % page_size
    return slots
