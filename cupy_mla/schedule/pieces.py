"""How jobs are cut into pieces, and pieces put into parts: the arithmetic behind `schedule`, whose words these are.

``kernels_cu/plan`` has the same in ``pieces.h``, ``packing.h`` and ``search.h``; tests compare the lists to the bit.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError

TILE_TOKENS = 64  # KV tokens of a tile, the unit of a split: kTileTokens in kernels_cu/core/plan_format.h
TILE_COST = 16  # costs are counted in 1/16 tile
MAX_OVERHEAD = 64 * TILE_COST
_CANDIDATES = 256
# Jobs are left whole if that costs at most 1/16 more. What SMs left idle cost is less than it seems: under the power
# limit, or with HBM busy, the others run faster. Measured on an H200, 128 requests of 8192 tokens, whole on 128 of 132
# SMs against cut on all: 439 against 467 us (128 heads), 282 against 323 (64), 277 against 284 (16).
_WHOLE_SHARE = 16

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

Int64Array = npt.NDArray[np.int64]


@overload
def ceil_div(a: int, b: int) -> int: ...
@overload
def ceil_div(a: Int64Array, b: int | Int64Array) -> Int64Array: ...
def ceil_div(a: int | Int64Array, b: int | Int64Array) -> int | Int64Array:
    """The quotient of two integers, or of each of two arrays', rounded up."""
    return -(-a // b)


@dataclass(frozen=True, slots=True)
class PieceCosts:
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

    Raises
    ------
    InvalidArgumentError
        An overhead is out of its range: none may pass `MAX_OVERHEAD`, ``piece_overhead`` is at least 1,
        ``split_overhead`` at least that, ``merge_overhead`` at least 0.
    """

    piece_overhead: int = 2 * TILE_COST
    split_overhead: int = 3 * TILE_COST
    merge_overhead: int = TILE_COST
    packs: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.piece_overhead <= self.split_overhead <= MAX_OVERHEAD:
            raise InvalidArgumentError(
                "cost",
                f"1 <= piece_overhead <= split_overhead <= {MAX_OVERHEAD}",
                f"{self.piece_overhead} and {self.split_overhead}",
            )
        if not 0 <= self.merge_overhead <= MAX_OVERHEAD:
            raise InvalidArgumentError("cost", f"0 <= merge_overhead <= {MAX_OVERHEAD}", str(self.merge_overhead))


@dataclass(frozen=True, slots=True)
class Piece:
    job: int
    tile_begin: int
    tile_end: int
    part: int


def divide(tiles: list[int], fixed_tiles: int, num_parts: int, cost: PieceCosts) -> tuple[list[Piece], int]:
    """The pieces of jobs of so many tiles, parts in order, and the budget that no part exceeds.

    `make_schedule` says how. ``fixed_tiles``: cut every job after each so many tiles and nowhere else; 0: where the
    load asks for it.
    """
    if fixed_tiles:
        cuts = [_fixed_cuts(count, fixed_tiles) for count in tiles]
        budget = _fixed_budget(cuts, num_parts, cost)
        return _place_fixed(cuts, budget, cost), budget
    budget, may_cut = _budget(np.array(tiles, np.int64), num_parts, cost)
    if may_cut:
        return _cut(tiles, budget, num_parts, cost), budget
    return _place_fixed([[count] for count in tiles], budget, cost), budget


def stay_whole(num_jobs: int, tiles: int, num_parts: int, cost: PieceCosts) -> bool:
    """Whether `divide` surely cuts none of so many jobs of so many tiles each: even if cuts left every part equally
    full, whole jobs would not be much worse. Found without a search, so it may cut none where this is False.
    """
    whole = tiles * TILE_COST + cost.piece_overhead
    return ceil_div(num_jobs, num_parts) * whole <= _most_whole(ceil_div(num_jobs * whole, num_parts), cost)


def _most_whole(best_cut: int, cost: PieceCosts) -> int:
    """The largest budget with which jobs are left whole, if with cuts they would need this one."""
    return best_cut + cost.merge_overhead + best_cut // _WHOLE_SHARE


def _place(tiles: list[int], budget: int, cost: PieceCosts) -> list[Piece]:
    """Fill part after part with jobs in their order; they may be cut where a budget ends."""
    part, left = 0, budget
    min_head = _min_head((budget - cost.split_overhead) // TILE_COST)
    placed: list[Piece] = []
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
            placed.append(Piece(job, done, done + take, part))
            left -= take * TILE_COST + overhead
            done, is_placed = done + take, True
    return placed


def _pack(tiles: list[int], budget: int, cost: PieceCosts, max_parts: int) -> list[Piece] | None:
    """Fill part after part; None if there are not enough.

    First what is left of the job that is being cut, or the longest job; then the longest that fit, one after another;
    then what remains is filled from the job that is being cut, or from the longest one left, if it is not too little.
    So few jobs are cut, and the long ones, which must be cut anyhow.
    """
    order = sorted(range(len(tiles)), key=lambda job: (tiles[job], job))
    lengths = [tiles[job] for job in order]
    tiles_per_part = max((budget - cost.split_overhead) // TILE_COST, 1)
    least = max(_min_head(tiles_per_part), 1)
    placed: list[Piece] = []
    cut: tuple[int, int] | None = None  # a job, and how many of its tiles have a part

    def put_cut(open_job: tuple[int, int], part: int, most: int) -> tuple[int, tuple[int, int] | None]:
        job, done = open_job
        end = min(done + most, tiles[job])
        placed.append(Piece(job, done, end, part))
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
            placed.append(Piece(order.pop(place - 1), 0, count, part))
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


def _is_packed(num_jobs: int, num_parts: int, cost: PieceCosts) -> bool:
    return cost.packs and num_jobs <= _MAX_PACKED_JOBS and num_jobs * _PACKED_PARTS_PER_JOB >= num_parts


def _cut(tiles: list[int], budget: int, num_parts: int, cost: PieceCosts) -> list[Piece]:
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


def _piece_cost(cuts: list[int], index: int, cost: PieceCosts) -> int:
    return cuts[index] * TILE_COST + (cost.piece_overhead if len(cuts) == 1 else cost.split_overhead)


def _place_fixed(cuts: list[list[int]], budget: int, cost: PieceCosts) -> list[Piece]:
    """Fill part after part with pieces that are not cut further."""
    part, left = 0, budget
    placed: list[Piece] = []
    for job, of_job in enumerate(cuts):
        begin = 0
        for index, count in enumerate(of_job):
            price = _piece_cost(of_job, index, cost)
            if price > left:
                part, left = part + 1, budget
            left -= price
            placed.append(Piece(job, begin, begin + count, part))
            begin += count
    return placed


def _budget(tiles: Int64Array, num_parts: int, cost: PieceCosts) -> tuple[int, bool]:
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
    highest_whole = _most_whole(best_cut, cost)
    if lowest_whole <= highest_whole and _parts_whole(whole_costs, np.array([highest_whole]))[0] <= num_parts:
        return _smallest_whole(whole_costs, lowest_whole, highest_whole, num_parts), False
    return best_cut, True


def _parts_whole(costs: Int64Array, budgets: Int64Array) -> Int64Array:
    """Parts that each budget needs, when costs[i] must each fit one part."""
    part = np.zeros_like(budgets)
    left = budgets.copy()
    for price in costs:
        fits = price <= left
        part += ~fits
        left = np.where(fits, left, budgets) - price
    return part + 1


def _parts_with_cuts(tiles: Int64Array, budgets: Int64Array, cost: PieceCosts) -> Int64Array:
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
        parts = ceil_div(rest, per_part)
        last = rest - (parts - 1) * per_part
        part += np.where(fits_here, 0, np.where(fits_next, 1, parts))
        after_cut = budgets - (last * TILE_COST + cost.split_overhead)
        left = np.where(fits_here, left - price, np.where(fits_next, budgets - price, after_cut))
    return part + 1


def _fixed_budget(cuts: list[list[int]], num_parts: int, cost: PieceCosts) -> int:
    """The smallest budget that num_parts parts suffice for, with pieces that are not cut further."""
    costs = np.array([_piece_cost(of_job, i, cost) for of_job in cuts for i in range(len(of_job))], np.int64)
    mean = ceil_div(int(costs.sum()), num_parts)
    largest = int(costs.max(initial=0))
    # High enough: a part is left only when it is fuller than the mean.
    return _smallest_whole(costs, max(mean, largest), mean + largest, num_parts)


def _smallest_whole(costs: Int64Array, low: int, high: int, num_parts: int) -> int:
    """The smallest budget from low to high that num_parts parts suffice for, when costs[i] must each fit one part.

    ``high`` suffices. A larger budget never needs more parts.
    """
    while low < high:
        step = ceil_div(high - low, _CANDIDATES)
        budgets = np.minimum(np.arange(low, high + step, step), high)
        high = int(budgets[_parts_whole(costs, budgets) <= num_parts].min())
        low = max(low, high - step + 1)
    return high
