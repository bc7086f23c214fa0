"""The planner's kernel, run on the CPU: the same lists as the NumPy schedule, to the bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from host_kernels import kernel_constant, needs_compiler, run_plan, struct_layout
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule import Case, cases, dense

from cupy_mla.call.shard import MAX_WORLD
from cupy_mla.errors import InvalidArgumentError
from cupy_mla.gpu import hopper
from cupy_mla.kernels import combine, exchange, planner, structs
from cupy_mla.schedule import make as schedule
from cupy_mla.schedule import pieces
from cupy_mla.schedule.make import Schedule, make_schedule
from cupy_mla.schedule.pieces import PieceCosts

pytestmark = needs_compiler

MANY_JOBS = 3000  # more than the job table in shared memory holds


def assert_same(found: Schedule, expected: Schedule) -> None:
    for name in ("part_begin", "items", "merges"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    for name in ("num_slots", "budget", "num_jobs", "claimed_parts"):
        assert getattr(found, name) == getattr(expected, name), name


@settings(deadline=None, max_examples=200)
@given(cases(), st.booleans())
def test_lists_are_equal(case: Case, reverse: bool) -> None:
    """In either order of the threads: a missing barrier shows in one of them."""
    found = run_plan(case.shape, case.lengths, case.offsets, reverse)
    assert_same(found, case.make())


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("fixed_split_tokens", [None, 2048])
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("batch", [1, 20, 66, 128, 256, 257, 1024, MANY_JOBS])
def test_lists_are_equal_at_full_size(batch: int, packs: bool, fixed_split_tokens: int | None, reverse: bool) -> None:
    shape = dense(batch, fixed_split_tokens=fixed_split_tokens, cost=PieceCosts(packs=packs))
    lengths = np.random.default_rng(batch).integers(0, 32768, batch)
    assert_same(run_plan(shape, lengths, reverse=reverse), make_schedule(shape, lengths))


@pytest.mark.parametrize("requests_per_length", [1, 3, 20])
@pytest.mark.parametrize("packs", [False, True])
def test_lengths_that_requests_share(packs: bool, requests_per_length: int) -> None:
    shape = dense(60, cost=PieceCosts(packs=packs))
    shape = dataclasses.replace(shape, requests_per_length=requests_per_length, max_seqlen_k=4096)
    lengths = np.random.default_rng(7).integers(0, 5000, 60 // requests_per_length)
    found = run_plan(shape, lengths)
    assert_same(found, make_schedule(shape, lengths))
    for request, seqlen_k in found.items[:, [0, 4]]:
        assert seqlen_k == min(lengths[request // requests_per_length], 4096)


@pytest.mark.parametrize("shared", [(1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("fixed_split_tokens", [None, 128])
def test_two_lists_of_keys(fixed_split_tokens: int | None, given: tuple[bool, bool], shared: tuple[int, int]) -> None:
    """The second begins with a tile of its own; an item says how many keys the first has."""
    shape = dataclasses.replace(
        dense(60, fixed_split_tokens=fixed_split_tokens), max_seqlen_k=700, max_extra_k=300,
        requests_per_length=shared[0], requests_per_extra_length=shared[1],
    )  # fmt: skip
    rng = np.random.default_rng(3)
    first = rng.integers(-5, 800, 60 // shared[0]) if given[0] else None
    extra = rng.integers(-5, 400, 60 // shared[1]) if given[1] else None
    found = run_plan(shape, first, extra_lengths=extra)
    assert_same(found, make_schedule(shape, first, extra_lengths=extra))
    assert len(found.items) <= shape.max_items
    for request, _, _, end, seqlen_k, _, length, slot in found.items:
        expected = 700 if first is None else min(max(first[request // shared[0]], 0), 700)
        expected_extra = 300 if extra is None else min(max(extra[request // shared[1]], 0), 300)
        assert (length, seqlen_k) == (expected, -(-expected // 64) * 64 + expected_extra)
        if slot == schedule.WHOLE_JOB:
            assert end == -(-expected // 64) + -(-expected_extra // 64)
    assert not found.merges[:, 3].any()


def test_a_second_list_has_no_mask() -> None:
    for other in ({"causal": True}, {"ragged": True, "total_q": 4}):
        with pytest.raises(InvalidArgumentError, match="max_extra_k"):
            dataclasses.replace(dense(4), max_extra_k=64, **other)


def test_no_lengths_are_the_longest() -> None:
    shape = dataclasses.replace(dense(60), max_seqlen_k=2000)
    found = run_plan(shape, None)
    assert_same(found, make_schedule(shape, None))
    assert_same(found, make_schedule(shape, [2000] * 60))


def test_long_requests_and_large_overheads() -> None:
    """More candidates than threads, and fixed pieces so long that the search takes several rounds."""
    cost = PieceCosts(piece_overhead=300, split_overhead=900, merge_overhead=1000)
    lengths = [2**20, 77, 300_000, 0, 2**19]
    packing = dense(5, num_parts=3, cost=dataclasses.replace(cost, packs=True))
    assert_same(run_plan(packing, lengths), make_schedule(packing, lengths))
    for fixed_split_tokens in (None, 2**18):
        shape = dense(5, num_parts=11, fixed_split_tokens=fixed_split_tokens, cost=cost)
        assert_same(run_plan(shape, lengths), make_schedule(shape, lengths))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=11, max_size=11), st.booleans())
def test_arrays_may_hold_anything(values: list[int], fixed: bool) -> None:
    """Garbage gives a useless plan, but one within its bounds."""
    shape = dense(5, seqlen_q=40, ragged=True, total_q=50, fixed_split_tokens=4096 if fixed else None)
    shape = dataclasses.replace(shape, max_seqlen_k=5000, num_parts=3)
    lengths, offsets = values[:5], values[5:]
    found = run_plan(shape, lengths, offsets)
    assert_same(found, make_schedule(shape, lengths, offsets))
    assert len(found.items) <= shape.max_items
    assert (found.items[:, 5] + found.items[:, 6] <= 50).all()


@pytest.mark.parametrize(
    "name",
    [
        "PLAN_HEADER",
        "WORK_ITEM",
        "MERGE_ITEM",
        "PLAN_PARAMS",
        "SLOTS_PARAMS",
        "LOCAL_SLOTS_PARAMS",
        "DECODE_PARAMS",
        "FP8_PARAMS",
        "GATHER_PARAMS",
        "COMBINE_PARAMS",
        "GATHER_COMBINE_PARAMS",
        "MERGE_STATES_PARAMS",
        "MEETINGS",
        "PUSH_PARAMS",
        "PUSH_MERGE_PARAMS",
    ],
)
def test_structs_are_the_same_on_both_sides(name: str) -> None:
    dtype: np.dtype = getattr(structs, name)
    assert dtype.fields is not None
    offsets = tuple(dtype.fields[field][1] for field in dtype.names or ())
    assert (dtype.itemsize, *offsets) == struct_layout(name, len(offsets))


def test_offsets_that_ask_for_more_jobs_than_an_int_counts_stay_within_the_plan() -> None:
    batch, total_q = 16384, 65536
    shape = schedule.ScheduleShape(132, 1, 64, 64, 8, batch, total_q, 8192, ragged=True, total_q=total_q)
    offsets = np.zeros(batch + 1, np.int32)
    offsets[1::2] = total_q  # 2^32 jobs
    assert run_plan(shape, np.full(batch, 64, np.int32), offsets).num_jobs == shape.max_jobs


def test_constants_are_the_same_on_both_sides() -> None:
    rules = (
        "_WHOLE_SHARE",
        "_MIN_HEAD",
        "_MIN_HEAD_SHARE",
        "_MAX_PACKED_JOBS",
        "_PACKED_PARTS_PER_JOB",
        "_PACKED_STEP",
    )
    for name in ("TILE_TOKENS", "TILE_COST", *rules):
        assert getattr(pieces, name) == kernel_constant(name), name
    for name in ("WHOLE_JOB", "CLAIM_TILES"):
        assert getattr(schedule, name) == kernel_constant(name), name
    for name in ("MAX_SMS", "WARP_THREADS", "WARPGROUP_THREADS", "MAX_SHARED_BYTES", "CTA_SHARED_BYTES"):
        assert getattr(hopper, name) == kernel_constant(name), name
    for name in ("SM_WORDS", "HALF_SHARE_UNIT"):
        assert getattr(structs, name) == kernel_constant(name), name
    for name in ("MERGE_STATES_THREADS", "OCTET"):
        assert getattr(combine, name) == kernel_constant(name), name
    for name in ("EXCHANGE_THREADS", "_UNIT_OCTETS"):
        assert getattr(exchange, name) == kernel_constant(name), name
    assert exchange.EXCHANGE_THREADS // 2 > MAX_WORLD  # as few there may be
    for name in ("PLAN_THREADS", "_JOB_COLUMNS", "_SCRATCH_BYTES", "_SECTION_INTS"):
        assert getattr(planner, name) == kernel_constant(name), name


def test_the_planner_needs_no_more_shared_memory_than_every_kernel_may_have() -> None:
    for batch in (1, 128, 1024, 1025, 65536):
        assert planner.plan_geometry(dense(batch)).shared_memory <= hopper.FREE_SHARED_BYTES


def test_a_plan_too_large_to_address_is_refused() -> None:
    shape = dense(4096, fixed_split_tokens=64, max_seqlen_k=2**23)
    with pytest.raises(InvalidArgumentError, match="fixed_split_tokens"):
        planner.plan_sections(shape)
