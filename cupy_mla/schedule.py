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

import bisect
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import InvalidArgumentError

TILE_TOKENS = 64  # KV tokens of a tile, the unit of a split: kTileTokens in kernels_cu/core/work.h
TILE_COST = 16  # costs are counted in 1/16 tile
WHOLE_JOB = -1  # slot of a piece that is a whole job
MAX_BLOCKS_PER_JOB = 8

_HEAD_BLOCK_SHIFT = 16
_MAX_ROW_BLOCKS = 1 << _HEAD_BLOCK_SHIFT
_MAX_KV_HEADS = 1 << (31 - _HEAD_BLOCK_SHIFT)
_MAX_OVERHEAD = 64 * TILE_COST
_MAX_COST = 2**30  # budgets stay clear of int32's end
_CANDIDATES = 256
# Jobs are left whole if that costs at most 1/16 more. What SMs left idle cost is less than it seems: under the power
# limit, or with HBM busy, the others run faster. Measured on an H200, 128 requests of 8192 tokens, whole on 128 of 132
# SMs against cut on all: 439 against 467 us (128 heads), 282 against 323 (64), 277 against 284 (16).
_WHOLE_SHARE = 16

# CTAs claim their parts (kernels_cu/decode/claim.h) if some parts have no work and others this many tiles. It takes up
# to 1 us, and gains 2% where a part has 64 tiles or more, 145 us.
CLAIM_TILES = 48

# The end of a part is left unused rather than filled with fewer tiles of a longer job: a cut costs more than they gain.
# Measured on an H200, 128 real requests: 51.7 against 50.3 us (16 heads), 89.8 against 86.8 (128 heads).
_MIN_HEAD = 4  # tiles, but at most a quarter of what a part holds
_MIN_HEAD_SHARE = 4

# Packing is for jobs of which parts have one or two each. Fewer are cut into several parts each, in whatever order; of
# more, parts have several. A thread of the planner keeps a bit of each job.
_MAX_PACKED_JOBS = 256
_PACKED_PARTS_PER_JOB = 2  # at most
# To pack for one budget takes the planner some 20 us, so few are tried.
_PACKED_STEP = TILE_COST // 4

Int32Array = npt.NDArray[np.int32]
_Int64Array = npt.NDArray[np.int64]


def ceil_div(a: int, b: int) -> int:
    """The quotient of two non-negative integers, rounded up."""
    return -(-a // b)


@dataclass(frozen=True, slots=True)
class CostModel:
    """What a piece costs besides its tiles, in 1/16 of a tile's time.

    Attributes
    ----------
    piece_overhead
        Of a job computed whole: queries loaded, the first tile waited for, the result written.
    split_overhead
        Of each piece of a job that is cut; it also writes a partial result that is read again. Not below
        ``piece_overhead``.
    merge_overhead
        Of having any cut at all: the merge runs after the last part has ended. `make_schedule` adds a share of the
        budget to it.
    packs
        Whether packing jobs by length is worth the planner's time.
    """

    piece_overhead: int = 2 * TILE_COST
    split_overhead: int = 3 * TILE_COST
    merge_overhead: int = TILE_COST
    packs: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.piece_overhead <= self.split_overhead <= _MAX_OVERHEAD:
            raise InvalidArgumentError(
                "cost",
                f"1 <= piece_overhead <= split_overhead <= {_MAX_OVERHEAD}",
                f"{self.piece_overhead} and {self.split_overhead}",
            )
        if not 0 <= self.merge_overhead <= _MAX_OVERHEAD:
            raise InvalidArgumentError("cost", f"0 <= merge_overhead <= {_MAX_OVERHEAD}", str(self.merge_overhead))


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
    cost: CostModel = CostModel()

    def __post_init__(self) -> None:
        for name in ("num_parts", "blocks_per_job", "rows", "group_heads", "num_heads_kv"):
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
        cost = ceil_div(self.max_jobs, self.num_parts) * (self.max_tiles * TILE_COST + _MAX_OVERHEAD)
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


@dataclass(frozen=True, slots=True)
class _Piece:
    job: int
    tile_begin: int
    tile_end: int
    part: int


def piece_costs(items: Int32Array, cost: CostModel) -> _Int64Array:
    """What each item of `Schedule.items` costs, [n], in 1/16 tile: its tiles and its overhead."""
    overheads = np.where(items[:, 7] == WHOLE_JOB, cost.piece_overhead, cost.split_overhead)
    return (items[:, 3] - items[:, 2]).astype(np.int64) * TILE_COST + overheads


def make_schedule(
    shape: ScheduleShape,
    cache_seqlens: npt.ArrayLike,
    cu_seqlens_q: npt.ArrayLike | None = None,
) -> Schedule:
    """Divide the work of a batch among the parts.

    Jobs are walked in order of request, kv head and rows. Each part takes from them until its budget is used up; a job
    that does not fit is cut there if a few tiles fit. Where ``CostModel.packs`` says so, and parts have about one or
    two jobs each, they take the longest that fit instead, and what then remains of a part is filled from a longer job,
    which is cut, if that is a few tiles. The budget is the smallest with which the parts suffice (for packing, among
    those a quarter of a tile apart).
    If leaving all jobs whole needs hardly more (``CostModel.merge_overhead`` and 1/16), nothing is cut. Each job is
    covered once; a job without a visible key has one piece of no tiles.

    Parameters
    ----------
    shape
        Bounds and settings.
    cache_seqlens
        int [batch]: KV tokens of each request. Taken as 0 if negative, as ``shape.max_seqlen_k`` if larger.
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
    cost = shape.cost
    lengths = np.asarray(cache_seqlens, dtype=np.int64)
    _require("cache_seqlens", f"shape ({shape.batch},)", lengths.shape, lengths.shape == (shape.batch,))
    _require("cu_seqlens_q", "an array if and only if ragged", cu_seqlens_q, (cu_seqlens_q is not None) == shape.ragged)
    offsets = np.zeros(0, np.int64) if cu_seqlens_q is None else np.asarray(cu_seqlens_q, dtype=np.int64)
    if shape.ragged:
        _require("cu_seqlens_q", f"shape ({shape.batch + 1},)", offsets.shape, offsets.shape == (shape.batch + 1,))
    jobs = _list_jobs(shape, lengths, offsets)
    tiles = [job.tiles for job in jobs]
    if shape.fixed_split_tiles:
        cuts = [_fixed_cuts(count, shape.fixed_split_tiles) for count in tiles]
        budget = _fixed_budget(cuts, shape.num_parts, cost)
        pieces = _place_fixed(cuts, budget, cost)
    else:
        budget, may_cut = _budget(np.array(tiles, np.int64), shape.num_parts, cost)
        pieces = (
            _cut(tiles, budget, shape.num_parts, cost) if may_cut else _place_fixed([[n] for n in tiles], budget, cost)
        )
    return _number(shape, jobs, pieces, budget)


def _list_jobs(shape: ScheduleShape, lengths: _Int64Array, offsets: _Int64Array) -> list[_Job]:
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


def _place(tiles: list[int], budget: int, cost: CostModel) -> list[_Piece]:
    """Fill part after part with jobs in their order; they may be cut where a budget ends."""
    part, left = 0, budget
    min_head = _min_head((budget - cost.split_overhead) // TILE_COST)
    placed: list[_Piece] = []
    for job, count in enumerate(tiles):
        done, is_placed = 0, False
        while not is_placed or done < count:
            rest = count - done
            if done == 0 and rest * TILE_COST + cost.piece_overhead <= left:
                take, overhead = rest, cost.piece_overhead
            else:
                take, overhead = min(max((left - cost.split_overhead) // TILE_COST, 0), rest), cost.split_overhead
                if done == 0 and take < min_head and left < budget:
                    take = 0
            if (take == 0 and rest > 0) or overhead > left:
                part, left = part + 1, budget
                continue
            placed.append(_Piece(job, done, done + take, part))
            left -= take * TILE_COST + overhead
            done, is_placed = done + take, True
    return placed


def _pack(tiles: list[int], budget: int, cost: CostModel, max_parts: int) -> list[_Piece] | None:
    """Fill part after part; None if there are not enough.

    First what is left of the job that is being cut, or the longest job; then the longest that fit, one after another;
    then what remains is filled from the job that is being cut, or from the longest one left, if it is not too little.
    So few jobs are cut, and the long ones, which must be cut anyhow.
    """
    order = sorted(range(len(tiles)), key=lambda job: (tiles[job], job))
    lengths = [tiles[job] for job in order]
    tiles_per_part = max((budget - cost.split_overhead) // TILE_COST, 1)
    least = max(_min_head(tiles_per_part), 1)
    placed: list[_Piece] = []
    cut: tuple[int, int] | None = None  # a job, and how many of its tiles have a part

    def put_cut(open_job: tuple[int, int], part: int, most: int) -> tuple[int, tuple[int, int] | None]:
        job, done = open_job
        end = min(done + most, tiles[job])
        placed.append(_Piece(job, done, end, part))
        return (end - done) * TILE_COST + cost.split_overhead, (job, end) if end < tiles[job] else None

    part = 0
    while order or cut is not None:
        if part == max_parts:
            return None
        left = budget
        if cut is None and lengths[-1] * TILE_COST + cost.piece_overhead > budget:
            lengths.pop()
            cut = (order.pop(), 0)
        if cut is not None:
            price, cut = put_cut(cut, part, tiles_per_part)
            left -= price
            place = bisect.bisect_right(lengths, (left - cost.piece_overhead) // TILE_COST)
        else:
            place = len(order)
        while place > 0:
            count = lengths.pop(place - 1)
            placed.append(_Piece(order.pop(place - 1), 0, count, part))
            left -= count * TILE_COST + cost.piece_overhead
            place = bisect.bisect_right(lengths, (left - cost.piece_overhead) // TILE_COST)
        rest = (left - cost.split_overhead) // TILE_COST
        if rest >= least:
            if cut is None and order:
                lengths.pop()
                cut = (order.pop(), 0)
            if cut is not None:
                _, cut = put_cut(cut, part, rest)
        part += 1
    return placed


def _is_packed(num_jobs: int, num_parts: int, cost: CostModel) -> bool:
    return cost.packs and num_jobs <= _MAX_PACKED_JOBS and num_jobs * _PACKED_PARTS_PER_JOB >= num_parts


def _cut(tiles: list[int], budget: int, num_parts: int, cost: CostModel) -> list[_Piece]:
    if not _is_packed(len(tiles), num_parts, cost):
        return _place(tiles, budget, cost)
    pieces = _pack(tiles, budget, cost, num_parts)
    assert pieces is not None  # `_budget` has tried
    return pieces


def _min_head(tiles_per_part: int) -> int:
    return min(_MIN_HEAD, tiles_per_part // _MIN_HEAD_SHARE)


def _fixed_cuts(tiles: int, length: int) -> list[int]:
    """Tiles of each piece of a job."""
    return [min(length, tiles - begin) for begin in range(0, tiles, length)] or [0]


def _piece_cost(cuts: list[int], index: int, cost: CostModel) -> int:
    return cuts[index] * TILE_COST + (cost.piece_overhead if len(cuts) == 1 else cost.split_overhead)


def _place_fixed(cuts: list[list[int]], budget: int, cost: CostModel) -> list[_Piece]:
    """Fill part after part with pieces that are not cut further."""
    part, left = 0, budget
    placed: list[_Piece] = []
    for job, of_job in enumerate(cuts):
        begin = 0
        for index, count in enumerate(of_job):
            price = _piece_cost(of_job, index, cost)
            if price > left:
                part, left = part + 1, budget
            left -= price
            placed.append(_Piece(job, begin, begin + count, part))
            begin += count
    return placed


def _budget(tiles: _Int64Array, num_parts: int, cost: CostModel) -> tuple[int, bool]:
    """The smallest budget that num_parts parts suffice for, and whether jobs may be cut with it.

    Filling in order leaves less than ``_MIN_HEAD`` tiles and an overhead of each part unused, and a cut adds at most
    two overheads, so the budget with cuts lies in a short range above the mean load. All of it is searched: a larger
    budget may move a cut and need one part more.
    """
    whole_costs = tiles * TILE_COST + cost.piece_overhead
    mean = ceil_div(int(whole_costs.sum()), num_parts)
    packed = _is_packed(len(tiles), num_parts, cost)
    step = _PACKED_STEP if packed else 1
    span = np.arange(ceil_div(_MIN_HEAD * TILE_COST + 3 * cost.split_overhead + cost.merge_overhead, step) + 1) * step
    with_cuts = max(mean, TILE_COST + cost.split_overhead) + span
    if packed:
        whole = tiles.tolist()
        best_cut = next(int(budget) for budget in with_cuts if _pack(whole, int(budget), cost, num_parts) is not None)
    else:
        best_cut = int(with_cuts[_parts_with_cuts(tiles, with_cuts, cost) <= num_parts].min())
    lowest_whole = max(mean, int(whole_costs.max(initial=0)))
    highest_whole = best_cut + cost.merge_overhead + best_cut // _WHOLE_SHARE
    if lowest_whole <= highest_whole and _parts_whole(whole_costs, np.array([highest_whole]))[0] <= num_parts:
        return _smallest_whole(whole_costs, lowest_whole, highest_whole, num_parts), False
    return best_cut, True


def _parts_whole(costs: _Int64Array, budgets: _Int64Array) -> _Int64Array:
    """Parts that each budget needs, when costs[i] must each fit one part."""
    part = np.zeros_like(budgets)
    left = budgets.copy()
    for price in costs:
        fits = price <= left
        part += ~fits
        left = np.where(fits, left, budgets) - price
    return part + 1


def _parts_with_cuts(tiles: _Int64Array, budgets: _Int64Array, cost: CostModel) -> _Int64Array:
    """Parts that each budget needs, when jobs are cut where a budget ends: `_place`, a job at a time."""
    per_part = (budgets - cost.split_overhead) // TILE_COST
    min_head = np.minimum(_MIN_HEAD, per_part // _MIN_HEAD_SHARE)
    part = np.zeros_like(budgets)
    left = budgets.copy()
    for count in tiles:
        price = count * TILE_COST + cost.piece_overhead
        head = np.maximum((left - cost.split_overhead) // TILE_COST, 0)  # tiles that still go into the open part
        head = np.where((head < min_head) & (left < budgets), 0, head)
        fits_here = price <= left
        fits_next = (head == 0) & (price <= budgets)
        rest = count - head
        parts = -(-rest // per_part)
        last = rest - (parts - 1) * per_part
        part += np.where(fits_here, 0, np.where(fits_next, 1, parts))
        after_cut = budgets - (last * TILE_COST + cost.split_overhead)
        left = np.where(fits_here, left - price, np.where(fits_next, budgets - price, after_cut))
    return part + 1


def _fixed_budget(cuts: list[list[int]], num_parts: int, cost: CostModel) -> int:
    """The smallest budget that num_parts parts suffice for, with pieces that are not cut further."""
    costs = np.array([_piece_cost(of_job, i, cost) for of_job in cuts for i in range(len(of_job))], np.int64)
    mean = ceil_div(int(costs.sum()), num_parts)
    largest = int(costs.max(initial=0))
    # High enough: a part is left only when it is fuller than the mean.
    return _smallest_whole(costs, max(mean, largest), mean + largest, num_parts)


def _smallest_whole(costs: _Int64Array, low: int, high: int, num_parts: int) -> int:
    """The smallest budget from low to high that num_parts parts suffice for, when costs[i] must each fit one part.

    ``high`` suffices. A larger budget never needs more parts.
    """
    while low < high:
        step = ceil_div(high - low, _CANDIDATES)
        budgets = np.minimum(np.arange(low, high + step, step), high)
        high = int(budgets[_parts_whole(costs, budgets) <= num_parts].min())
        low = max(low, high - step + 1)
    return high


def _number(shape: ScheduleShape, jobs: list[_Job], pieces: list[_Piece], budget: int) -> Schedule:
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
