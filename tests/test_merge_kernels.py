"""The merging kernels, run on the CPU, against the formula in float64."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from host_kernels import (
    HALF_COLUMNS,
    HALVES,
    MARKED,
    SCALE_COLUMNS,
    SCALE_PARTS,
    SCALED,
    mark_for,
    needs_compiler,
    power_in_lse,
    run_combine,
    run_combine_gathered,
    run_merge_states,
    run_plan,
)
from test_schedule import dense

from cupy_mla.kernels.combine import OCTET, merge_states_geometry
from cupy_mla.kernels.planner import plan_sections
from cupy_mla.kernels.structs import COMBINE_PARAMS, GATHER_COMBINE_PARAMS, MERGE_STATES_PARAMS
from cupy_mla.schedule.make import make_schedule
from cupy_mla.schedule.shape import ScheduleShape

pytestmark = needs_compiler

BLOCK = 64  # two warps: fibers are slow, and nothing depends on the number
TYPES = {"Bf16": (np.dtype(ml_dtypes.bfloat16), 8e-3), "Fp32": (np.dtype(np.float32), 3e-6)}


def merge_exactly(outs: np.ndarray, lses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """lse = log sum exp(lse_i), out = sum exp(lse_i - lse) out_i, over axis 0; nothing seen gives 0 and -inf."""
    outs, lses = outs.astype(np.float64), lses.astype(np.float64)
    largest = lses.max(axis=0)
    reference = np.where(np.isfinite(largest), largest, 0.0)
    weights = np.exp(lses - reference)
    total = weights.sum(axis=0)
    seen = weights[..., None] > 0
    sums = (np.where(seen, outs, 0.0) * weights[..., None]).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total[..., None] > 0, sums / total[..., None], 0.0), reference + np.log(total)


def random_states(rng: np.random.Generator, dtype: np.dtype, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """States of [n, ..., d]; some have seen nothing, and hold NaN."""
    outs = rng.standard_normal(shape).astype(dtype)
    lses = (rng.standard_normal(shape[:-1]) * 6 + 3).astype(np.float32)
    nothing = rng.random(lses.shape) < 0.2
    nothing.reshape(len(nothing), -1)[:, 0] = True  # one row has nothing at all
    lses[nothing] = -np.inf
    outs[nothing] = np.nan
    return outs, lses


def with_flash_mla_lses(lses: np.ndarray) -> np.ndarray:
    """Every other state that has seen nothing says so with +inf."""
    mixed = lses.copy()
    mixed[::2][np.isneginf(mixed[::2])] = np.inf
    assert np.isposinf(mixed).any()
    return mixed


def width_for(tag: str) -> int:
    """Columns of a row: few, as they are slow, but as many as the form is for."""
    return 2 * HALF_COLUMNS if tag == HALVES else 8 * OCTET


def random_partials(
    rng: np.random.Generator, tag: str, *shape: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Partial results [slots, rows, d_v] and their lse as a decode kernel leaves them, and what they stand for."""
    if tag in TYPES:
        states = random_states(rng, TYPES[tag][0], *shape)
        return *states, *states
    outs, lses = random_states(rng, np.dtype(np.float16), *shape)
    if tag == MARKED:
        marks = rng.integers(5, 12, shape[:2], dtype=np.uint32)  # of 2^-47 to 2^49
        bits = lses.view(np.uint32)
        bits[:] = np.where(np.isfinite(lses), bits & ~np.uint32(15) | marks, bits)
        powers = 16 * marks[..., None].astype(int) - 127
        return outs, lses, np.ldexp(outs.astype(np.float64), powers), lses
    if tag == HALVES:
        marks = rng.integers(5, 12, (shape[0], 2, shape[1]), dtype=np.uint32)  # of a slot, each half has its rows'
        words = np.repeat(lses[:, None], 2, axis=1)
        bits = words.view(np.uint32)
        bits[:] = np.where(np.isfinite(words), bits & ~np.uint32(15) | marks, bits)
        powers = 16 * marks.swapaxes(1, 2)[..., np.arange(shape[2]) // HALF_COLUMNS].astype(int) - 128
        return outs, words, np.ldexp(outs.astype(np.float64), powers), lses
    exponents = rng.integers(60, 190, (*shape[:2], SCALE_PARTS), dtype=np.uint8)
    is_scaled = (rng.random(shape[:2]) < 0.5) & np.isfinite(lses)
    bits = lses.view(np.uint32) & np.where(np.isfinite(lses), ~np.uint32(1), ~np.uint32(0)) | is_scaled
    words = np.full((shape[0], 2, shape[1]), np.nan, np.float32)  # of rows that are not scaled nobody asks
    words[:, 0] = bits.view(np.float32)
    of_rows = np.zeros((*shape[:2], 4), np.uint8)
    of_rows[..., :SCALE_PARTS] = exponents
    words[:, 1][is_scaled] = of_rows.view(np.float32)[..., 0][is_scaled]
    parts = np.arange(shape[-1]) // SCALE_COLUMNS % SCALE_PARTS
    powers = np.where(is_scaled[..., None], exponents[..., parts].astype(int) - 127, 0)
    return outs, words, np.ldexp(outs.astype(np.float64), powers), lses


def element_strides(array: np.ndarray) -> tuple[int, ...]:
    return tuple(stride // array.itemsize for stride in array.strides)


def merge_states(
    outs: np.ndarray, lses: np.ndarray, out: np.ndarray, lse: np.ndarray, aligned: bool, grid: int, tag: str
) -> None:
    """Run the kernel on [n, a, b, c, d]; lses and lse are [n, a, b, c], in any layout."""
    params = np.zeros(1, MERGE_STATES_PARAMS)
    params["outs"], params["lses"] = outs.ctypes.data, lses.ctypes.data
    params["out"], params["lse"] = out.ctypes.data, lse.ctypes.data
    params["outs_strides"], params["lses_strides"] = element_strides(outs)[:4], element_strides(lses)
    params["out_strides"], params["lse_strides"] = element_strides(out)[:3], element_strides(lse)
    params["num_states"], params["sizes"] = len(outs), outs.shape[1:4]
    params["d_v"], params["aligned"] = outs.shape[-1], aligned
    run_merge_states(tag, params, grid, BLOCK)


@pytest.mark.parametrize("tag", TYPES)
@pytest.mark.parametrize("num_states", [1, 2, 3, 8, 9, 33, 130])
def test_merge_states(tag: str, num_states: int) -> None:
    dtype, tolerance = TYPES[tag]
    rng = np.random.default_rng(num_states)
    for sizes, d_v in (((2, 3, 2), 72), ((1, 1, 3), 320)):
        outs, lses = random_states(rng, dtype, num_states, *sizes, d_v)
        out, lse = np.full((*sizes, d_v), 99, dtype), np.full(sizes, 99, np.float32)
        merge_states(outs, with_flash_mla_lses(lses), out, lse, True, 3, tag)
        expected_out, expected_lse = merge_exactly(outs, lses)
        np.testing.assert_allclose(out.astype(np.float64), expected_out, tolerance, tolerance)
        np.testing.assert_allclose(lse, expected_lse, 1e-6, 1e-6)


@pytest.mark.parametrize("tag", TYPES)
def test_merge_states_of_any_layout(tag: str) -> None:
    """Heads before tokens in lse, as mla_decode returns it; outs in the middle of a wider array, at odd addresses."""
    dtype, tolerance = TYPES[tag]
    rng = np.random.default_rng(5)
    n, batch, tokens, heads, d_v = 4, 2, 3, 2, 64
    outs, lses = random_states(rng, dtype, n, batch, tokens, heads, d_v)
    wide = np.zeros((n, batch, tokens, heads, d_v + 5), dtype)
    wide[..., 1:-4] = outs
    swapped = np.ascontiguousarray(lses.swapaxes(2, 3))
    out_wide = np.full((batch, tokens, heads, d_v + 7), 99, dtype)
    lse_swapped = np.full((batch, heads, tokens), 99, np.float32)
    out, lse = out_wide[..., 3:-4], lse_swapped.swapaxes(1, 2)
    merge_states(wide[..., 1:-4], swapped.swapaxes(2, 3), out, lse, False, 2, tag)
    expected_out, expected_lse = merge_exactly(outs, lses)
    np.testing.assert_allclose(out.astype(np.float64), expected_out, tolerance, tolerance)
    np.testing.assert_allclose(lse, expected_lse, 1e-6, 1e-6)
    assert (out_wide[..., :3] == 99).all()
    assert (out_wide[..., -4:] == 99).all()


def test_bits_do_not_depend_on_the_grid_or_on_other_rows() -> None:
    """Columns are cut more finely when there is less to do; sums keep their order."""
    rng = np.random.default_rng(1)
    outs, lses = random_states(rng, TYPES["Fp32"][0], 40, 6, 1, 1, 512)

    def merge(rows: slice, grid: int) -> tuple[bytes, bytes]:
        some_outs, some_lses = np.ascontiguousarray(outs[:, rows]), np.ascontiguousarray(lses[:, rows])
        out, lse = np.zeros(some_outs.shape[1:], np.float32), np.zeros(some_lses.shape[1:], np.float32)
        merge_states(some_outs, some_lses, out, lse, True, grid, "Fp32")
        return out[-1].tobytes(), lse[-1].tobytes()

    assert merge(slice(0, 6), 1) == merge(slice(5, 6), 1) == merge(slice(5, 6), 7) == merge(slice(2, 6), 2)


def test_a_mark_says_by_what_values_were_divided() -> None:
    """Whatever the lse; and fp16 holds what is stored, with eleven bits where float32 has them."""
    for exponent in range(255):
        mark, factor = mark_for(exponent)
        for lse in (0.0, 1.0, -3.7, 88.25, 1e4, -1e-30):
            bits = np.float32(lse).view(np.uint32) & ~np.uint32(15) | np.uint32(mark)
            assert power_in_lse(float(bits.view(np.float32))) * factor == 1
            assert bits.view(np.float32) == pytest.approx(lse, rel=2e-6, abs=1e-37)
        largest = np.ldexp(1.0, min(exponent - 125, 128)) * factor  # no float32 reaches 2^128
        assert largest <= 2**15
        assert largest > 0.5 or exponent < 14
        assert (mark == 8) == (126 <= exponent <= 141)
        assert mark_for(exponent, HALVES) == (mark, 2 * factor)  # of values, not of half of them
    assert mark_for(255)[0] == 15  # of sums that are infinite


COMBINE_SHAPES = {
    "one request": dense(1, num_parts=40),
    "rows past the end": ScheduleShape(12, 2, 16, 12, 1, 3, 3, 4096),
    "kv heads": ScheduleShape(30, 1, 16, 3, 2, 2, 2, 4096, causal=True),
    "fixed": ScheduleShape(5, 1, 16, 16, 1, 4, 1, 4096, fixed_split_tokens=320),
    "ragged": ScheduleShape(20, 2, 16, 12, 1, 4, 4, 4096, ragged=True, total_q=7),
    "whole": dense(3, num_parts=1),
}


@pytest.mark.parametrize("name", COMBINE_SHAPES)
@pytest.mark.parametrize("out_padding", [0, 1])
@pytest.mark.parametrize("tag", [*TYPES, SCALED, MARKED, HALVES])
def test_combine(name: str, out_padding: int, tag: str) -> None:
    shape = dataclasses.replace(COMBINE_SHAPES[name], max_seqlen_k=4096)
    d_v = width_for(tag)
    rng = np.random.default_rng(len(name))
    lengths = rng.integers(1000, 4097, shape.batch)
    offsets = np.array([0, 3, 3, 4, 7]) if shape.ragged else None
    heads = shape.num_heads_kv * shape.group_heads
    bf16 = np.dtype(ml_dtypes.bfloat16)
    plan = make_schedule(shape, lengths, offsets)
    assert (len(plan.merges) == 0) == (name == "whole")

    # What the decode kernel leaves: rows past a request's end are never written, so they hold anything.
    states = random_partials(rng, tag, max(plan.num_slots, 1), shape.rows_per_job, d_v)
    partial_out, partial_lse, exact_out, exact_lse = states
    tokens = shape.total_q if shape.ragged else shape.seqlen_q
    out_shape = (1 if shape.ragged else shape.batch, tokens, heads)
    wide_out = np.full((*out_shape, d_v + out_padding), 99, bf16)
    lse = np.full((out_shape[0], heads, tokens), 99, np.float32)
    out = wide_out[..., :d_v]
    expected_out, expected_lse = np.full(out.shape, 99.0), np.full(lse.shape, 99.0)
    for request, head_block, seqlen_q, q_begin, begin, count, *_ in plan.merges.tolist():
        merged_out, merged_lse = merge_exactly(exact_out[begin : begin + count], exact_lse[begin : begin + count])
        for row_in_slot in range(shape.rows_per_job):
            token, head = divmod((head_block & 0xFFFF) * shape.rows + row_in_slot, shape.group_heads)
            if token < seqlen_q:
                place = (0 if shape.ragged else request, q_begin + token)
                head += (head_block >> 16) * shape.group_heads
                expected_out[(*place, head)] = merged_out[row_in_slot]
                expected_lse[place[0], head, place[1]] = merged_lse[row_in_slot]

    buffer = device_plan(shape, lengths, offsets)
    params = np.zeros(1, COMBINE_PARAMS)
    params["partial_out"], params["partial_lse"] = partial_out.ctypes.data, partial_lse.ctypes.data
    params["plan"], params["out"], params["lse"] = buffer.ctypes.data, out.ctypes.data, lse.ctypes.data
    out_strides, lse_strides = element_strides(out), element_strides(lse)
    batch_stride = 0 if shape.ragged else 1
    params["out_strides"] = (out_strides[0] * batch_stride, *out_strides[1:3])
    params["lse_strides"] = (lse_strides[0] * batch_stride, lse_strides[2], lse_strides[1])
    params["merges_offset"] = plan_sections(shape).merges_offset
    params["slot_rows"], params["rows"], params["group_heads"] = shape.rows_per_job, shape.rows, shape.group_heads
    params["d_v"], params["aligned"] = d_v, out_padding == 0
    params["empty_lse"] = np.inf
    run_combine(tag, params, 5, BLOCK)
    np.testing.assert_allclose(out.astype(np.float64), expected_out, 8e-3, 8e-3)
    expected_lse[np.isneginf(expected_lse)] = np.inf
    np.testing.assert_allclose(lse, expected_lse, 1e-6, 1e-6)
    assert (wide_out[..., d_v:] == 99).all()


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("tag", [*TYPES, SCALED, MARKED, HALVES])
def test_combine_of_gathered_tokens(tag: str, has_sinks: bool) -> None:
    """Requests are query tokens, two of a batch entry; a sink divides the output and is not in the lse."""
    batch, seqlen_q, d_v = 3, 2, width_for(tag)
    shape = ScheduleShape(40, 2, 16, 20, 1, batch * seqlen_q, 1, 4096)
    rng = np.random.default_rng(11)
    lengths = rng.integers(1000, 4097, shape.batch)
    plan = make_schedule(shape, lengths)
    assert len(plan.merges) > 0
    states = random_partials(rng, tag, plan.num_slots, shape.rows_per_job, d_v)
    partial_out, partial_lse, exact_out, exact_lse = states
    sinks = (rng.standard_normal(shape.group_heads) * 6 + 3).astype(np.float32)
    sinks[:2] = -np.inf, np.inf
    out = np.full((batch, seqlen_q, shape.group_heads, d_v), 99, ml_dtypes.bfloat16)
    lse = np.full((batch, shape.group_heads, seqlen_q), 99, np.float32)
    expected_out, expected_lse = np.full(out.shape, 99.0), np.full(lse.shape, 99.0)
    for request, _, _, _, begin, count, *_ in plan.merges.tolist():
        merged_out, merged_lse = merge_exactly(exact_out[begin : begin + count], exact_lse[begin : begin + count])
        place = divmod(request, seqlen_q)
        for head in range(shape.group_heads):
            with np.errstate(over="ignore", invalid="ignore"):
                share = 1 / (1 + np.exp(np.float64(sinks[head]) - merged_lse[head])) if has_sinks else 1.0
            expected_out[(*place, head)] = merged_out[head] * (share if np.isfinite(merged_lse[head]) else 0.0)
            expected_lse[place[0], head, place[1]] = merged_lse[head]

    params = np.zeros(1, GATHER_COMBINE_PARAMS)
    buffer = device_plan(shape, lengths, None)
    params["partial_out"], params["partial_lse"] = partial_out.ctypes.data, partial_lse.ctypes.data
    params["plan"], params["out"], params["lse"] = buffer.ctypes.data, out.ctypes.data, lse.ctypes.data
    params["out_strides"] = element_strides(out)[:3]
    lse_strides = element_strides(lse)
    params["lse_strides"] = (lse_strides[0], lse_strides[2], lse_strides[1])
    params["merges_offset"] = plan_sections(shape).merges_offset
    params["slot_rows"], params["rows"], params["group_heads"] = shape.rows_per_job, shape.rows, shape.group_heads
    params["d_v"], params["aligned"], params["empty_lse"], params["seqlen_q"] = d_v, 1, -np.inf, seqlen_q
    params["attn_sink"] = sinks.ctypes.data if has_sinks else 0
    run_combine_gathered(tag, params, 5, BLOCK)
    np.testing.assert_allclose(out.astype(np.float64), expected_out, 8e-3, 8e-3)
    np.testing.assert_allclose(lse, expected_lse, 1e-6, 1e-6)


def device_plan(shape: ScheduleShape, lengths: np.ndarray, offsets: np.ndarray | None) -> np.ndarray:
    """The plan as it lies in device memory."""
    buffer = np.zeros(plan_sections(shape).total_ints, np.int32)
    run_plan(shape, lengths, offsets, into=buffer)
    return buffer


def test_merge_states_grid() -> None:
    assert merge_states_geometry(132, 100_000, 512).grid == (132, 1, 1)
    assert merge_states_geometry(132, 2, 64).grid == (8, 1, 1)
    assert merge_states_geometry(132, 0, 64).grid == (1, 1, 1)


@pytest.mark.parametrize("tag", TYPES)
@pytest.mark.parametrize("num_states", [1, 2, 3, 5, 7, 13, 40, 130])
def test_a_row_has_the_same_bits_in_any_grid_and_batch(tag: str, num_states: int) -> None:
    """Columns are dealt to lanes and warps by how many rows and warps there are; the sums must not depend on it."""
    dtype = TYPES[tag][0]
    outs, lses = random_states(np.random.default_rng(num_states), dtype, num_states, 1, 1, 40, 512)
    results = []
    for rows, grid in ((40, 1), (40, 400), (3, 1), (3, 400)):  # whole rows to 2 octets a warp
        out, lse = np.full((1, 1, rows, 512), 99, dtype), np.full((1, 1, rows), 99, np.float32)
        merge_states(outs[:, :, :, :rows], lses[:, :, :, :rows], out, lse, True, grid, tag)
        results.append((out[:, :, :3].tobytes(), lse[:, :, :3].tobytes()))
    assert len(set(results)) == 1
