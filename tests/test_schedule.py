"""The schedule: every tile of every job once, no part over budget, no budget larger than needed."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupy_mla.errors import InvalidArgumentError
from cupy_mla.kernels import family
from cupy_mla.kernels.narrow import NARROW16
from cupy_mla.lab.lengths import mid_decode_lengths, read_lengths, shipped_lengths
from cupy_mla.schedule import make as schedule
from cupy_mla.schedule import pieces
from cupy_mla.schedule.make import Schedule, make_schedule
from cupy_mla.schedule.pieces import TILE_COST, TILE_TOKENS, PieceCosts
from cupy_mla.schedule.shape import ScheduleShape, choose_parts
from cupy_mla.schedule.text import draw_schedule

WHOLE = schedule.WHOLE_JOB


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape with lengths to schedule."""

    shape: ScheduleShape
    lengths: list[int]
    offsets: list[int] | None

    @property
    def cost(self) -> PieceCosts:
        return self.shape.cost

    def make(self) -> Schedule:
        return make_schedule(self.shape, self.lengths, self.offsets)


@st.composite
def cases(draw: st.DrawFn, fixed: bool | None = None) -> Case:
    batch = draw(st.integers(0, 8))
    ragged = draw(st.booleans())
    seqlen_q = draw(st.integers(1, 5))
    offsets = None
    if ragged:
        tokens = draw(st.lists(st.integers(0, seqlen_q), min_size=batch, max_size=batch))
        offsets = np.concatenate([[0], np.cumsum(tokens)]).astype(int).tolist()
    use_fixed = draw(st.booleans()) if fixed is None else fixed
    max_seqlen_k = draw(st.sampled_from([0, 1, 64, 1000, 5000]))
    piece = draw(st.integers(1, 60))
    shape = ScheduleShape(
        num_parts=draw(st.integers(1, 40)),
        blocks_per_job=draw(st.integers(1, 4)),
        rows=draw(st.sampled_from([16, 32, 64])),
        group_heads=draw(st.sampled_from([1, 3, 16, 40, 128])),
        num_heads_kv=draw(st.integers(1, 3)),
        batch=batch,
        seqlen_q=seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=draw(st.booleans()),
        ragged=ragged,
        fixed_split_tokens=draw(st.sampled_from([64, 192, 2048])) if use_fixed else None,
        total_q=None if offsets is None else offsets[-1],
        cost=PieceCosts(piece, piece + draw(st.integers(0, 60)), draw(st.integers(0, 40)), draw(st.booleans())),
    )
    lengths = draw(st.lists(st.integers(-2, max_seqlen_k + 70), min_size=batch, max_size=batch))
    return Case(shape, lengths, offsets)


def visible_tiles(case: Case, request: int, first_row: int) -> int:
    """Tiles that the last query token of a job sees, one token at a time."""
    shape = case.shape
    seqlen_k = min(max(case.lengths[request], 0), shape.max_seqlen_k)
    seqlen_q = shape.seqlen_q
    if case.offsets is not None:
        seqlen_q = case.offsets[request + 1] - case.offsets[request]
    rows = range(first_row, min(first_row + shape.rows_per_job, seqlen_q * shape.group_heads))
    keys = [
        key
        for token in {row // shape.group_heads for row in rows}
        for key in range(seqlen_k)
        if not shape.causal or key <= seqlen_k - seqlen_q + token
    ]
    return (max(keys) // TILE_TOKENS + 1) if keys else 0


def part_costs(plan: Schedule, cost: PieceCosts) -> list[int]:
    costs = []
    for begin, end in zip(plan.part_begin[:-1], plan.part_begin[1:], strict=True):
        items = plan.items[begin:end]
        tiles = int((items[:, 3] - items[:, 2]).sum())
        overheads = sum(cost.piece_overhead if slot == WHOLE else cost.split_overhead for slot in items[:, 7])
        costs.append(tiles * TILE_COST + int(overheads))
    return costs


@settings(deadline=None)
@given(cases())
def test_every_job_is_covered_once_and_in_order(case: Case) -> None:
    shape, plan = case.shape, case.make()
    found: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
    for request, head_block, begin, end, seqlen_k, seqlen_q, q_begin, slot in plan.items.tolist():
        found[request, head_block].append((begin, end, slot))
        assert seqlen_k == min(max(case.lengths[request], 0), shape.max_seqlen_k)
        if case.offsets is None:
            assert (seqlen_q, q_begin) == (shape.seqlen_q, 0)
        else:
            assert (seqlen_q, q_begin) == (case.offsets[request + 1] - case.offsets[request], case.offsets[request])
    expected = []
    for request in range(shape.batch):
        tokens = shape.seqlen_q if case.offsets is None else case.offsets[request + 1] - case.offsets[request]
        for kv_head in range(shape.num_heads_kv):
            for first_row in range(0, tokens * shape.group_heads, shape.rows_per_job):
                expected.append((request, kv_head << 16 | first_row // shape.rows))
    assert sorted(found) == sorted(expected)
    assert plan.num_jobs == len(expected)
    for (request, head_block), of_job in found.items():
        tiles = visible_tiles(case, request, (head_block & 0xFFFF) * shape.rows)
        assert of_job[0][0] == 0
        assert of_job[-1][1] == tiles
        for before, after in itertools.pairwise(of_job):
            assert before[1] == after[0]
        if len(of_job) > 1:
            assert all(end > begin for begin, end, _ in of_job)
            assert [slot for _, _, slot in of_job] == list(range(of_job[0][2], of_job[0][2] + len(of_job)))
        else:
            assert of_job[0][2] == WHOLE


@settings(deadline=None)
@given(cases())
def test_slots_are_numbered_in_order_and_merged_once(case: Case) -> None:
    plan = case.make()
    slots = plan.items[:, 7][plan.items[:, 7] != WHOLE]
    np.testing.assert_array_equal(np.sort(slots), np.arange(plan.num_slots))
    merged = [
        (request, head_block, slot)
        for request, head_block, _, _, begin, count, _, _ in plan.merges.tolist()
        for slot in range(begin, begin + count)
    ]
    split = plan.items[plan.items[:, 7] != WHOLE]
    assert merged == sorted(((row[0], row[1], row[7]) for row in split.tolist()), key=lambda row: row[2])
    assert (plan.merges[:, 5] > 1).all()
    for request, head_block, seqlen_q, q_begin, *_ in plan.merges.tolist():
        item = next(row for row in split.tolist() if row[:2] == [request, head_block])
        assert (seqlen_q, q_begin) == (item[5], item[6])


@settings(deadline=None)
@given(cases())
def test_parts_keep_the_budget_and_the_shape_its_bounds(case: Case) -> None:
    shape, plan = case.shape, case.make()
    assert plan.part_begin.shape == (shape.num_parts + 1,)
    assert plan.part_begin[0] == 0
    assert plan.part_begin[-1] == len(plan.items)
    assert (np.diff(plan.part_begin) >= 0).all()
    assert max(part_costs(plan, case.cost), default=0) <= plan.budget
    assert plan.num_jobs <= shape.max_jobs
    assert len(plan.items) <= shape.max_items
    assert len(plan.merges) <= shape.max_merges
    assert plan.num_slots <= shape.max_slots


def parts_needed(placed: list[pieces.Piece]) -> int:
    return max((piece.part for piece in placed), default=-1) + 1


@settings(deadline=None)
@given(cases())
def test_no_smaller_budget_suffices(case: Case) -> None:
    """Tries every budget from the least that can hold a piece, step by step as the text of make_schedule says."""
    shape, cost, plan = case.shape, case.cost, case.make()
    lengths = np.clip(np.array(case.lengths, np.int64), 0, shape.max_seqlen_k)
    jobs = schedule._list_jobs(shape, lengths, np.array(case.offsets or [], np.int64), np.zeros_like(lengths))
    tiles = [job.tiles for job in jobs]
    if not jobs:
        assert plan.budget == 0
        return

    def smallest_whole(cuts: list[list[int]]) -> int:
        budget = max(pieces._piece_cost(of_job, i, cost) for of_job in cuts for i in range(len(of_job)))
        while parts_needed(pieces._place_fixed(cuts, budget, cost)) > shape.num_parts:
            budget += 1
        return budget

    if shape.fixed_split_tiles:
        cuts = [pieces._fixed_cuts(count, shape.fixed_split_tiles) for count in tiles]
        assert plan.budget == smallest_whole(cuts)
        return
    packed = pieces._is_packed(len(jobs), shape.num_parts, cost)
    with_cuts, step = TILE_COST + cost.split_overhead, 1
    if packed:  # in steps, from the mean
        total = sum(count * TILE_COST + cost.piece_overhead for count in tiles)
        with_cuts, step = max(with_cuts, -(-total // shape.num_parts)), pieces._PACKED_STEP

    def suffices(budget: int) -> bool:
        if packed:
            return pieces._pack(tiles, budget, cost, shape.num_parts) is not None
        return parts_needed(pieces._place(tiles, budget, cost)) <= shape.num_parts

    while not suffices(with_cuts):
        with_cuts += step
    whole = smallest_whole([[count] for count in tiles])
    if whole <= with_cuts + cost.merge_overhead + with_cuts // pieces._WHOLE_SHARE:
        assert (plan.budget, plan.num_slots) == (whole, 0)
    else:
        assert plan.budget == with_cuts


@settings(deadline=None)
@given(cases(fixed=True), st.randoms(use_true_random=False))
def test_a_fixed_split_cuts_a_request_the_same_way_in_any_batch(case: Case, random: object) -> None:
    shape = case.shape

    def cuts_of(plan: Schedule, request: int) -> list[list[int]]:
        rows = plan.items[plan.items[:, 0] == request]
        return [[*row[1:4], row[7] == WHOLE] for row in rows.tolist()]

    plan = case.make()
    for request in range(shape.batch):
        tokens = None if case.offsets is None else case.offsets[request + 1] - case.offsets[request]
        alone = dataclasses.replace(shape, batch=1, num_parts=7, total_q=tokens)
        single = make_schedule(alone, [case.lengths[request]], None if tokens is None else [0, tokens])
        assert cuts_of(plan, request) == cuts_of(single, 0)


def dense(batch: int, num_parts: int = 132, **changes: object) -> ScheduleShape:
    """16 heads, one query token, a row block of 16 rows: one job a request."""
    shape = ScheduleShape(num_parts, 1, 16, 16, 1, batch, 1, 2**20)
    return dataclasses.replace(shape, **changes)


@pytest.mark.parametrize(
    ("batch", "tiles", "items", "tiles_of_piece"),
    [
        (1, 512, 128, 4),  # 132 parts of 3.9 tiles would be 132 parts of 4
        (1, 64, 64, 1),  # a tile is not cut
        (1, 3, 1, 3),  # three pieces of a tile, and a merge, are no faster
        (4, 128, 128, 4),
        (128, 128, 128, 128),  # 3% idle parts cost less than cutting 128 requests
        (132, 128, 132, 128),
        (66, 128, 132, 64),
    ],
)
def test_equal_lengths(batch: int, tiles: int, items: int, tiles_of_piece: int) -> None:
    plan = make_schedule(dense(batch), [tiles * TILE_TOKENS] * batch)
    assert len(plan.items) == items
    assert set((plan.items[:, 3] - plan.items[:, 2]).tolist()) == {tiles_of_piece}


@settings(deadline=None)
@given(
    *(st.integers(0, 70), st.integers(0, 70), st.integers(1, 40)),
    *(st.integers(1, 60), st.integers(0, 60), st.integers(0, 40), st.booleans()),
)
def test_where_no_length_varies_a_shape_knows_that_nothing_is_cut(
    batch: int, tiles: int, num_parts: int, piece: int, more: int, merge: int, packs: bool
) -> None:
    cost = PieceCosts(piece, piece + more, merge, packs)
    shape = ScheduleShape(num_parts, 1, 16, 16, 1, batch, 1, tiles * TILE_TOKENS, cost=cost, lengths_vary=False)
    plan = make_schedule(shape, None)
    assert len(plan.merges) <= shape.max_merges
    assert len(plan.items) <= shape.max_items
    assert plan.num_slots <= shape.max_slots


@pytest.mark.parametrize("batch", [0, 1, 126, 128, 131, 132, 250, 256, 1024])
def test_shapes_that_know_that_nothing_is_cut(batch: int) -> None:
    tiles = 1 if batch == 1 else 32
    known = dense(batch, max_seqlen_k=tiles * TILE_TOKENS, lengths_vary=False)
    assert (known.max_merges, known.max_items, known.max_slots) == (0, batch, 0)
    assert len(make_schedule(known, None).items) == batch
    varying = dense(batch, max_seqlen_k=32 * TILE_TOKENS)
    assert (varying.max_merges > 0) == (batch > 0)


def test_half_as_many_requests_as_parts_may_be_cut_though_no_length_varies() -> None:
    shape = dense(64, max_seqlen_k=32 * TILE_TOKENS, lengths_vary=False)
    assert len(make_schedule(shape, None).merges) == 64
    assert shape.max_merges == 64


@pytest.mark.parametrize(("batch", "tiles", "items"), [(1, 2, 1), (1, 3, 3), (32, 3, 96), (64, 2, 64), (64, 3, 64)])
def test_short_requests_are_cut_for_16_rows_where_that_is_faster(batch: int, tiles: int, items: int) -> None:
    """Measured; kernels_cu/TRIED.md has the times."""
    assert len(make_schedule(dense(batch, cost=NARROW16.cost.pieces), [tiles * TILE_TOKENS] * batch).items) == items


def test_real_lengths_are_balanced() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 16384, 128)
    plan = make_schedule(dense(128), lengths)
    mean = np.ceil(lengths / TILE_TOKENS).sum() / 132
    assert plan.budget / TILE_COST < mean + 2 * 3 + 2  # two overheads of a cut part, and a bit
    assert len(plan.merges) < 132


@pytest.mark.parametrize("batch", [96, 128, 192])
def test_packing_cuts_fewer_jobs_and_balances_better(batch: int) -> None:
    """Of real lengths, on 66 parts as with 128 heads."""
    lengths = mid_decode_lengths(read_lengths(shipped_lengths()), batch, 0)
    in_order, packed = (
        make_schedule(dense(batch, num_parts=66, cost=PieceCosts(4 * TILE_COST, 5 * TILE_COST, packs=packs)), lengths)
        for packs in (False, True)
    )
    assert len(packed.merges) < len(in_order.merges) / 2
    assert packed.budget < in_order.budget


def test_nothing_to_do() -> None:
    empty = make_schedule(dense(0), [])
    assert (empty.num_jobs, len(empty.items), empty.part_begin.tolist()) == (0, 0, [0] * 133)
    no_keys = make_schedule(dense(3), [0, -5, 0])
    assert no_keys.items[:, 2:5].tolist() == [[0, 0, 0]] * 3
    no_queries = make_schedule(dense(2, ragged=True, total_q=0), [100, 100], [0, 0, 0])
    assert len(no_queries.items) == 0


def test_a_causal_request_with_more_queries_than_keys_has_jobs_without_keys() -> None:
    shape = ScheduleShape(4, 1, 16, 16, 1, 1, 4, 1024, causal=True)
    plan = make_schedule(shape, [2])
    assert plan.items[:, 1:4].tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 1], [3, 0, 1]]


def test_offsets_that_do_not_rise_stay_within_the_bounds() -> None:
    shape = dense(4, seqlen_q=100, ragged=True, total_q=100)
    plan = make_schedule(shape, [500] * 4, [0, 100, 0, 100, 0])
    assert plan.num_jobs <= shape.max_jobs
    assert (plan.items[:, 5] + plan.items[:, 6] <= 100).all()


@pytest.mark.parametrize(
    ("row_blocks", "expected"),
    [(1, (1, 132)), (2, (2, 66)), (3, (3, 44)), (4, (4, 33)), (8, (4, 33)), (9, (3, 44)), (5, (1, 132))],
)
def test_choose_parts(row_blocks: int, expected: tuple[int, int]) -> None:
    assert choose_parts(132, row_blocks) == expected


@given(st.integers(1, 200), st.integers(0, 40))
def test_choose_parts_leaves_the_fewest_idle(num_sms: int, row_blocks: int) -> None:
    def busy(blocks: int) -> float:
        jobs = -(-max(row_blocks, 1) // blocks)
        return max(row_blocks, 1) / (jobs * blocks) * (num_sms // blocks * blocks) / num_sms

    blocks, parts = choose_parts(num_sms, row_blocks)
    assert parts == num_sms // blocks > 0
    assert busy(blocks) >= max(busy(other) for other in range(1, min(8, num_sms) + 1)) - 1e-9


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"num_parts": 0}, "num_parts"),
        ({"rows": 0}, "rows"),
        ({"batch": -1}, "batch"),
        ({"fixed_split_tokens": 0}, "fixed_split_tokens"),
        ({"fixed_split_tokens": 100}, "fixed_split_tokens"),
        ({"ragged": True}, "total_q"),
        ({"seqlen_q": 70_000}, "q"),
        ({"num_heads_kv": 40_000}, "num_heads_kv"),
        ({"max_seqlen_k": 2**31, "num_parts": 1, "batch": 64}, "max_seqlen_k"),
    ],
)
def test_bad_shapes_are_refused(changes: dict[str, object], argument: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        dataclasses.replace(dense(1), **changes)
    assert error.value.argument == argument


def test_bad_arrays_and_costs_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="cache_seqlens"):
        make_schedule(dense(2), [1])
    with pytest.raises(InvalidArgumentError, match="cu_seqlens_q"):
        make_schedule(dense(2), [1, 1], [0, 1, 2])
    with pytest.raises(InvalidArgumentError, match="cu_seqlens_q"):
        make_schedule(dense(2, ragged=True, total_q=2), [1, 1], [0, 1])
    with pytest.raises(InvalidArgumentError, match="cost"):
        PieceCosts(piece_overhead=5, split_overhead=4)
    with pytest.raises(InvalidArgumentError, match="num_sms"):
        choose_parts(0, 1)


def test_tiles_are_the_kernels_tiles() -> None:
    assert schedule.TILE_TOKENS == family.TILE_TOKENS


def test_picture_of_a_schedule() -> None:
    shape = dense(3, num_parts=4)
    plan = make_schedule(shape, [640, 640, 5000])
    text = draw_schedule(plan, shape, width=80)
    lines = text.splitlines()
    assert "3 jobs" in lines[0]
    assert all(len(line) <= 80 for line in lines if "|" in line)
    bars = [line for line in lines if line.endswith("|")]
    assert [sum(f"[{request}" in bar for bar in bars) for request in range(2)] == [1, 1]
    assert "merges" in lines


def test_a_picture_counts_what_pieces_cost_in_its_shape() -> None:
    """Parts that are all as full as the fullest are drawn over the whole width, whatever the overheads."""
    for cost in (PieceCosts(), PieceCosts(64, 80, 16)):
        shape = dense(4, num_parts=4, cost=cost)
        text = draw_schedule(make_schedule(shape, [640] * 4), shape, width=80)
        bars = [line for line in text.splitlines() if line.endswith("|")]
        assert len(bars) == 4
        assert all(bar.endswith("=|") for bar in bars)
        assert "the mean is 100% of that" in text


def test_a_long_picture_is_shortened_and_equal_parts_share_a_line() -> None:
    shape = dense(128)
    text = draw_schedule(make_schedule(shape, range(1000, 1128)), shape, max_lines=10)
    assert sum(line.endswith("|") for line in text.splitlines()) == 10
    assert "more lines" in text
    one = dense(1)
    assert "0-127" in draw_schedule(make_schedule(one, [512 * TILE_TOKENS]), one)
    empty = dense(0)
    assert "0 jobs" in draw_schedule(make_schedule(empty, []), empty)
