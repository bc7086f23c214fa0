"""Lengths to work: which CTA computes which piece of which request.

Words
-----
A *row* is one query token of one head; row ``r`` of a kv head is token ``r // group_heads``, head ``r % group_heads``
of the group. A *row block* is ``rows`` consecutive rows, one CTA's share. A *job* is a request, a kv head and
``blocks_per_job`` consecutive row blocks, whose CTAs read the same KV tiles at the same time. A *piece* is a range of
KV tiles of a job. A *part* is the list of pieces of one group of ``blocks_per_job`` CTAs. A job in more than one piece
leaves partial results in *slots*, which a second kernel merges.

This module is the planner in NumPy and the oracle of the one on the device (``kernels_cu/plan``), which makes the same
lists to the bit: all costs are integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .pieces import TILE_COST, TILE_TOKENS, Int64Array, Piece, PieceCosts, ceil_div, divide
from .shape import CLAIM_TILES, HEAD_BLOCK_SHIFT, MAX_ROW_BLOCKS, ScheduleShape, require

WHOLE_JOB = -1  # slot of a piece that is a whole job

Int32Array = npt.NDArray[np.int32]


@dataclass(slots=True)
class Schedule:
    """A work list.

    Attributes
    ----------
    part_begin
        int32 [num_parts + 1]: part p has items ``part_begin[p]:part_begin[p + 1]``.
    items
        int32 [n, 8]: request, kv_head << 16 | first row block, first tile, end tile, seqlen_k, seqlen_q, first query
        token (0 unless ragged; of a request with two lists of keys the length of the first), slot (-1: the piece is a
        whole job).
    merges
        int32 [m, 8]: request, kv_head << 16 | first row block, seqlen_q, first query token, first slot, number of
        slots, 0, 0.
    num_slots
        Partial results in all.
    budget
        The cost that no part exceeds, in 1/16 tile.
    num_jobs
        Jobs, with and without visible keys.
    claimed_parts
        Parts that have work, if CTAs claim them because others have none; 0: CTA i has part i.
    """

    part_begin: Int32Array
    items: Int32Array
    merges: Int32Array
    num_slots: int
    budget: int
    num_jobs: int
    claimed_parts: int


def kv_head_of(head_block: int) -> int:
    """The kv head in the second number of an item."""
    return head_block >> HEAD_BLOCK_SHIFT


def first_row_block_of(head_block: int) -> int:
    """The first row block in the second number of an item."""
    return head_block & (MAX_ROW_BLOCKS - 1)


@dataclass(frozen=True, slots=True)
class _Job:
    request: int
    kv_head: int
    first_row_block: int
    tiles: int
    seqlen_k: int
    seqlen_q: int
    q_begin: int
    first_list: int

    @property
    def head_block(self) -> int:
        return self.kv_head << HEAD_BLOCK_SHIFT | self.first_row_block


def piece_costs(items: Int32Array, cost: PieceCosts) -> Int64Array:
    """What each item of `Schedule.items` costs, [n], in 1/16 tile: its tiles and its overhead."""
    overheads = np.where(items[:, 7] == WHOLE_JOB, cost.piece_overhead, cost.split_overhead)
    return (items[:, 3] - items[:, 2]).astype(np.int64) * TILE_COST + overheads


def make_schedule(
    shape: ScheduleShape,
    cache_seqlens: npt.ArrayLike | None,
    cu_seqlens_q: npt.ArrayLike | None = None,
    extra_lengths: npt.ArrayLike | None = None,
) -> Schedule:
    """Divide the work of a batch among the parts.

    Jobs are walked in order of request, kv head and rows. Each part takes from them until its budget is used up; a job
    that does not fit is cut there if a few tiles fit. Where ``PieceCosts.packs`` says so, and parts have about one or
    two jobs each, they take the longest that fit instead, and what then remains of a part is filled from a longer job,
    which is cut, if that is a few tiles. The budget is the smallest with which the parts suffice (for packing, among
    those a quarter of a tile apart).
    If leaving all jobs whole needs hardly more (``PieceCosts.merge_overhead`` and 1/16), nothing is cut. Each job is
    covered once; a job without a visible key has one piece of no tiles.

    Parameters
    ----------
    shape
        Bounds and settings.
    cache_seqlens
        int [batch], or so many that ``shape.requests_per_length`` requests share one: KV tokens of each request. Taken
        as 0 if negative, as ``shape.max_length`` if larger. None: all have so many.
    cu_seqlens_q
        int [batch + 1], when ``shape.ragged``: query tokens of request i are rows ``cu_seqlens_q[i]`` to
        ``cu_seqlens_q[i + 1]`` of q.
    extra_lengths
        The same as ``cache_seqlens`` for the second list of keys, where ``shape.max_extra_k`` says that there is one.

    Returns
    -------
    Schedule

    Raises
    ------
    InvalidArgumentError
        An array of the wrong length, or ``cu_seqlens_q`` given or missing against ``shape.ragged``.
    """
    lengths = _lengths(shape, cache_seqlens, "cache_seqlens", shape.max_length, shape.requests_per_length)
    extra = _lengths(shape, extra_lengths, "extra_lengths", shape.max_extra_k or 0, shape.requests_per_extra_length)
    require("cu_seqlens_q", "an array if and only if ragged", cu_seqlens_q, (cu_seqlens_q is not None) == shape.ragged)
    offsets = np.zeros(0, np.int64) if cu_seqlens_q is None else np.asarray(cu_seqlens_q, dtype=np.int64)
    if shape.ragged:
        require("cu_seqlens_q", f"shape ({shape.batch + 1},)", offsets.shape, offsets.shape == (shape.batch + 1,))
    jobs = _list_jobs(shape, lengths, offsets, extra)
    pieces, budget = divide([job.tiles for job in jobs], shape.fixed_split_tiles, shape.num_parts, shape.cost)
    return _number(shape, jobs, pieces, budget)


def _lengths(
    shape: ScheduleShape, given: npt.ArrayLike | None, name: str, longest: int, requests_per_length: int
) -> Int64Array:
    """[batch] lengths within 0 and ``longest``."""
    all_longest = np.full(ceil_div(shape.batch, requests_per_length), longest)
    lengths = all_longest if given is None else np.asarray(given, dtype=np.int64)
    require(name, f"shape {all_longest.shape}", lengths.shape, lengths.shape == all_longest.shape)
    return np.clip(np.repeat(lengths, requests_per_length)[: shape.batch], 0, longest)


def _list_jobs(shape: ScheduleShape, lengths: Int64Array, offsets: Int64Array, extra: Int64Array) -> list[_Job]:
    jobs: list[_Job] = []
    for request in range(shape.batch):
        total, first_list = int(lengths[request]), 0
        seqlen_k = total if shape.shard is None else shape.shard.count(total)
        if shape.max_extra_k is not None:
            first_list = seqlen_k
            seqlen_k = ceil_div(first_list, TILE_TOKENS) * TILE_TOKENS + int(extra[request])
        seqlen_q, q_begin = shape.seqlen_q, 0
        if shape.ragged:
            q_begin = min(max(int(offsets[request]), 0), shape.total_q or 0)
            q_end = min(max(int(offsets[request + 1]), q_begin), shape.total_q or 0)
            seqlen_q = min(q_end - q_begin, shape.seqlen_q)
        num_rows = seqlen_q * shape.group_heads
        for kv_head in range(shape.num_heads_kv):
            for first_row in range(0, num_rows, shape.rows_per_job):
                visible = seqlen_k
                if shape.causal:
                    last_token = (min(first_row + shape.rows_per_job, num_rows) - 1) // shape.group_heads
                    hidden = seqlen_q - last_token - 1
                    visible = max(total - hidden, 0)
                    if shape.shard is not None:
                        visible = shape.shard.count(visible)
                tiles = ceil_div(visible, TILE_TOKENS)
                rows = kv_head, first_row // shape.rows
                length = seqlen_k if shape.shard is None else total
                jobs.append(_Job(request, *rows, tiles, length, seqlen_q, q_begin, first_list))
    return jobs[: shape.max_jobs]  # more only if the offsets do not rise


def _number(shape: ScheduleShape, jobs: list[_Job], pieces: list[Piece], budget: int) -> Schedule:
    """Write the lists; slots are numbered job by job, and in a job in the order of its pieces."""
    counts = [0] * len(jobs)
    for piece in pieces:
        counts[piece.job] += 1
    merges: list[tuple[int, ...]] = []
    next_slot = [WHOLE_JOB] * len(jobs)
    num_slots = 0
    for index, (job, count) in enumerate(zip(jobs, counts, strict=True)):
        if count > 1:
            merges.append((job.request, job.head_block, job.seqlen_q, job.q_begin, num_slots, count, 0, 0))
            next_slot[index] = num_slots
            num_slots += count
    items: list[tuple[int, ...]] = []
    for piece in pieces:
        job, slot = jobs[piece.job], next_slot[piece.job]
        next_slot[piece.job] += counts[piece.job] > 1
        request = (job.seqlen_k, job.seqlen_q, job.q_begin + job.first_list)
        items.append((job.request, job.head_block, piece.tile_begin, piece.tile_end, *request, slot))
    parts = [piece.part for piece in pieces]
    return Schedule(
        part_begin=np.searchsorted(parts, np.arange(shape.num_parts + 1)).astype(np.int32),
        items=np.array(items, np.int32).reshape(-1, 8),
        merges=np.array(merges, np.int32).reshape(-1, 8),
        num_slots=num_slots,
        budget=budget,
        num_jobs=len(jobs),
        claimed_parts=_claimed_parts(shape, parts, budget),
    )


def _claimed_parts(shape: ScheduleShape, parts: list[int], budget: int) -> int:
    used = max(parts, default=-1) + 1
    claims = shape.blocks_per_job == 1 and used < shape.num_parts and budget >= CLAIM_TILES * TILE_COST
    return used if claims else 0
