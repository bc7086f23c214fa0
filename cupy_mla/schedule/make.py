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

from ..errors import InvalidArgumentError
from .pieces import MAX_OVERHEAD, TILE_COST, TILE_TOKENS, Int64Array, Piece, PieceCosts, ceil_div, divide

WHOLE_JOB = -1  # slot of a piece that is a whole job
MAX_BLOCKS_PER_JOB = 8

_DEFAULT_COST = PieceCosts()
_HEAD_BLOCK_SHIFT = 16
_MAX_ROW_BLOCKS = 1 << _HEAD_BLOCK_SHIFT
_MAX_KV_HEADS = 1 << (31 - _HEAD_BLOCK_SHIFT)
_MAX_COST = 2**30  # budgets stay clear of int32's end
# CTAs claim their parts (kernels_cu/decode/claim.h) if some parts have no work and others this many tiles. It takes up
# to 1 us, and gains 2% where a part has 64 tiles or more, 145 us.
CLAIM_TILES = 48

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class ScheduleShape:
    """All that bounds a schedule besides the lengths.

    Attributes
    ----------
    num_parts
        Parts to fill; the decode kernel has ``num_parts * blocks_per_job`` CTAs.
    blocks_per_job
        Row blocks of a job.
    rows
        Query rows of a row block.
    group_heads
        Query heads per kv head.
    num_heads_kv
        kv heads.
    batch
        Requests.
    seqlen_q
        Query tokens of a request; when ragged, of the longest.
    max_seqlen_k
        Largest length a request may have, in tokens; longer ones are taken for this.
    causal
        Whether query i of s_q sees keys up to length - s_q + i only.
    ragged
        Whether the number of query tokens differs among requests.
    fixed_split_tokens
        Cut every job after each so many tokens (a multiple of 64) and nowhere else, so that a request is cut the same
        way in any batch. None: cut where the load asks for it.
    total_q
        Query tokens of all requests together; needed when ragged.
    cost
        What pieces cost besides their tiles.
    requests_per_length
        Requests, one after the other, that share a length.

    Raises
    ------
    InvalidArgumentError
        A number out of range.
    """

    num_parts: int
    blocks_per_job: int
    rows: int
    group_heads: int
    num_heads_kv: int
    batch: int
    seqlen_q: int
    max_seqlen_k: int
    causal: bool = False
    ragged: bool = False
    fixed_split_tokens: int | None = None
    total_q: int | None = None
    cost: PieceCosts = _DEFAULT_COST
    requests_per_length: int = 1

    def __post_init__(self) -> None:
        for name in ("num_parts", "blocks_per_job", "rows", "group_heads", "num_heads_kv", "requests_per_length"):
            _require(name, "a positive integer", getattr(self, name), getattr(self, name) > 0)
        for name in ("batch", "seqlen_q", "max_seqlen_k"):
            _require(name, "a non-negative integer", getattr(self, name), getattr(self, name) >= 0)
        _require("total_q", "a number, since ragged", self.total_q, not self.ragged or self.total_q is not None)
        check_fixed_split(self.fixed_split_tokens)
        _require("num_heads_kv", f"less than {_MAX_KV_HEADS}", self.num_heads_kv, self.num_heads_kv < _MAX_KV_HEADS)
        row_blocks = ceil_div(self.seqlen_q * self.group_heads, self.rows)
        way_out = "; max_seqlen_q says how many query tokens a request has" if self.ragged else ""
        _require(
            "q", f"at most {_MAX_ROW_BLOCKS} row blocks a request{way_out}", row_blocks, row_blocks <= _MAX_ROW_BLOCKS
        )
        cost = ceil_div(self.max_jobs, self.num_parts) * (self.max_tiles * TILE_COST + MAX_OVERHEAD)
        _require("max_seqlen_k", "less work for a part", self.max_seqlen_k, cost < _MAX_COST)

    @property
    def rows_per_job(self) -> int:
        """Query rows of a job, and of a partial slot."""
        return self.blocks_per_job * self.rows

    @property
    def jobs_per_request(self) -> int:
        """Jobs of a request with ``seqlen_q`` query tokens."""
        return self.num_heads_kv * ceil_div(self.seqlen_q * self.group_heads, self.rows_per_job)

    @property
    def max_tiles(self) -> int:
        """KV tiles of the longest request."""
        return ceil_div(self.max_seqlen_k, TILE_TOKENS)

    @property
    def max_jobs(self) -> int:
        """Most jobs there can be."""
        jobs = self.batch * self.jobs_per_request
        if not self.ragged or self.total_q is None:
            return jobs
        # Only one job of each request and kv head is not full of rows.
        full = self.total_q * self.group_heads // self.rows_per_job
        return min(jobs, self.num_heads_kv * (full + self.batch))

    @property
    def fixed_split_tiles(self) -> int:
        """Tiles of a piece when the split is fixed, else 0."""
        return (self.fixed_split_tokens or 0) // TILE_TOKENS

    @property
    def may_claim(self) -> bool:
        """Whether CTAs may have to claim their parts: work can be long, and a part's CTAs need not be neighbours."""
        # The fullest part may hold more than the mean; one of more than twice as much has few others beside it.
        return self.blocks_per_job == 1 and self.max_jobs * self.max_tiles >= CLAIM_TILES * self.num_parts // 2

    @property
    def _max_cuts(self) -> int:
        """Most cuts, when jobs are cut only where one part ends and the next begins."""
        return min(self.num_parts - 1, self.max_jobs * max(self.max_tiles - 1, 0))

    @property
    def _max_fixed_pieces(self) -> int:
        return ceil_div(self.max_tiles, self.fixed_split_tiles)

    @property
    def max_merges(self) -> int:
        """Most jobs that can be in more than one piece. 0: nothing is ever merged, whatever the lengths."""
        if self.fixed_split_tiles:
            return self.max_jobs if self._max_fixed_pieces > 1 else 0
        return min(self._max_cuts, self.max_jobs)

    @property
    def max_items(self) -> int:
        """Most pieces."""
        if self.fixed_split_tiles:
            return self.max_jobs * max(self._max_fixed_pieces, 1)
        return self.max_jobs + self._max_cuts

    @property
    def max_slots(self) -> int:
        """Most partial results; each takes ``rows_per_job`` rows of memory."""
        if self.fixed_split_tiles:
            return self.max_merges * self._max_fixed_pieces
        return self._max_cuts + self.max_merges


def _require(name: str, expected: str, got: object, condition: bool) -> None:
    if not condition:
        raise InvalidArgumentError(name, expected, str(got))


def check_fixed_split(tokens: int | None) -> None:
    """Refuse a fixed split that is not made of whole tiles.

    Raises
    ------
    InvalidArgumentError
        It is neither None nor a positive multiple of a tile's tokens.
    """
    whole = tokens is None or (tokens > 0 and tokens % TILE_TOKENS == 0)
    _require("fixed_split_tokens", f"a positive multiple of {TILE_TOKENS}", tokens, whole)


def choose_parts(num_sms: int, row_blocks: int) -> tuple[int, int]:
    """Row blocks per job and number of parts that leave the fewest CTAs of a GPU idle.

    With R row blocks and G of them per job, ceil(R / G) jobs use R / (ceil(R / G) * G) of their CTAs, and
    num_sms // G groups of G CTAs fit the GPU. Among equals the larger G wins: CTAs of a job share what they read in L2.

    Parameters
    ----------
    num_sms
        Multiprocessors of the GPU, one CTA each.
    row_blocks
        Row blocks of one request and kv head: ceil(seqlen_q * group_heads / rows); for ragged batches, of one token.

    Returns
    -------
    blocks_per_job, num_parts : int

    Raises
    ------
    InvalidArgumentError
        ``num_sms`` is not positive.
    """
    _require("num_sms", "a positive integer", num_sms, num_sms > 0)
    row_blocks = max(row_blocks, 1)
    best, best_parts, best_jobs = 1, num_sms, row_blocks
    for blocks in range(2, min(MAX_BLOCKS_PER_JOB, row_blocks, num_sms) + 1):
        parts, jobs = num_sms // blocks, ceil_div(row_blocks, blocks)
        # The busy share is row_blocks / num_sms * parts / jobs; compared without division.
        if parts * best_jobs >= best_parts * jobs:
            best, best_parts, best_jobs = blocks, parts, jobs
    return best, best_parts


@dataclass(slots=True)
class Schedule:
    """A work list.

    Attributes
    ----------
    part_begin
        int32 [num_parts + 1]: part p has items ``part_begin[p]:part_begin[p + 1]``.
    items
        int32 [n, 8]: request, kv_head << 16 | first row block, first tile, end tile, seqlen_k, seqlen_q, first query
        token (0 unless ragged), slot (-1: the piece is a whole job).
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
    return head_block >> _HEAD_BLOCK_SHIFT


def first_row_block_of(head_block: int) -> int:
    """The first row block in the second number of an item."""
    return head_block & (_MAX_ROW_BLOCKS - 1)


@dataclass(frozen=True, slots=True)
class _Job:
    request: int
    kv_head: int
    first_row_block: int
    tiles: int
    seqlen_k: int
    seqlen_q: int
    q_begin: int

    @property
    def head_block(self) -> int:
        return self.kv_head << _HEAD_BLOCK_SHIFT | self.first_row_block


def piece_costs(items: Int32Array, cost: PieceCosts) -> Int64Array:
    """What each item of `Schedule.items` costs, [n], in 1/16 tile: its tiles and its overhead."""
    overheads = np.where(items[:, 7] == WHOLE_JOB, cost.piece_overhead, cost.split_overhead)
    return (items[:, 3] - items[:, 2]).astype(np.int64) * TILE_COST + overheads


def make_schedule(
    shape: ScheduleShape,
    cache_seqlens: npt.ArrayLike | None,
    cu_seqlens_q: npt.ArrayLike | None = None,
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
        as 0 if negative, as ``shape.max_seqlen_k`` if larger. None: all have so many.
    cu_seqlens_q
        int [batch + 1], when ``shape.ragged``: query tokens of request i are rows ``cu_seqlens_q[i]`` to
        ``cu_seqlens_q[i + 1]`` of q.

    Returns
    -------
    Schedule

    Raises
    ------
    InvalidArgumentError
        An array of the wrong length, or ``cu_seqlens_q`` given or missing against ``shape.ragged``.
    """
    longest = np.full(ceil_div(shape.batch, shape.requests_per_length), shape.max_seqlen_k)
    lengths = longest if cache_seqlens is None else np.asarray(cache_seqlens, dtype=np.int64)
    _require("cache_seqlens", f"shape {longest.shape}", lengths.shape, lengths.shape == longest.shape)
    lengths = np.repeat(lengths, shape.requests_per_length)[: shape.batch]
    _require("cu_seqlens_q", "an array if and only if ragged", cu_seqlens_q, (cu_seqlens_q is not None) == shape.ragged)
    offsets = np.zeros(0, np.int64) if cu_seqlens_q is None else np.asarray(cu_seqlens_q, dtype=np.int64)
    if shape.ragged:
        _require("cu_seqlens_q", f"shape ({shape.batch + 1},)", offsets.shape, offsets.shape == (shape.batch + 1,))
    jobs = _list_jobs(shape, lengths, offsets)
    pieces, budget = divide([job.tiles for job in jobs], shape.fixed_split_tiles, shape.num_parts, shape.cost)
    return _number(shape, jobs, pieces, budget)


def _list_jobs(shape: ScheduleShape, lengths: Int64Array, offsets: Int64Array) -> list[_Job]:
    jobs: list[_Job] = []
    for request in range(shape.batch):
        seqlen_k = min(max(int(lengths[request]), 0), shape.max_seqlen_k)
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
                    visible = min(max(seqlen_k - seqlen_q + last_token + 1, 0), seqlen_k)
                tiles = ceil_div(visible, TILE_TOKENS)
                jobs.append(_Job(request, kv_head, first_row // shape.rows, tiles, seqlen_k, seqlen_q, q_begin))
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
        request = (job.seqlen_k, job.seqlen_q, job.q_begin)
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
