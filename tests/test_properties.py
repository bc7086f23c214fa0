"""What must hold for any input: merges of shards, stored tokens, slots. The planner's, the allocator's and the kernel
cache's properties are in their own files."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cupy_mla import append_tokens, merge_states, slots_of
from cupy_mla.layouts import FP8_E4M3, LAYOUTS

HEADS, WIDTH = 2, 8
LAYOUT_WIDTHS = {"fp8_e4m3": 576, "fp8_ds_mla": 576, "fp8_ds_mla_no_rope": 512, "fp8_model1": 512, "fp8_v41": 512}
E4M3_ROUNDING = 1 / 16  # of a value
BF16_ROUNDING = 2.0**-8

seeds = st.integers(0, 2**32 - 1)


def states(seed: int, count: int, unseen: float) -> tuple[np.ndarray, np.ndarray]:
    """Partial results in float32; of those that saw nothing, the output is no number."""
    rng = np.random.default_rng(seed)
    outs = rng.standard_normal((count, 1, 3, HEADS, WIDTH)).astype(np.float32)
    lses = (rng.standard_normal((count, 1, HEADS, 3)) * 5).astype(np.float32)
    nothing = rng.random(lses.shape) < unseen
    lses[nothing] = rng.choice(np.array([-np.inf, np.inf], np.float32), int(nothing.sum()))
    outs[nothing.swapaxes(-1, -2)] = np.nan
    return outs, lses


def assert_close(first: tuple[Any, Any], second: tuple[Any, Any]) -> None:
    np.testing.assert_allclose(first[0], second[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first[1], second[1], rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(seeds, st.integers(1, 7), st.sampled_from([0.0, 0.3, 1.0]), st.data())
def test_shards_may_be_merged_in_any_groups_and_order(seed: int, count: int, unseen: float, data: Any) -> None:
    outs, lses = states(seed, count, unseen)
    whole = merge_states(outs, lses)
    order = data.draw(st.permutations(range(count)))
    assert_close(merge_states(outs[order], lses[order]), whole)
    cut = data.draw(st.integers(1, count))
    parts = [merge_states(outs[part], lses[part]) for part in (slice(cut), slice(cut, None)) if len(outs[part])]
    assert_close(merge_states(*map(np.stack, zip(*parts, strict=True))), whole)


@settings(deadline=None)
@given(seeds, st.integers(1, 5))
def test_what_saw_nothing_changes_nothing(seed: int, count: int) -> None:
    outs, lses = states(seed, count, 0.0)
    nothing = np.full_like(outs[:1], np.nan), np.full_like(lses[:1], -np.inf)
    out, lse = merge_states(np.concatenate([outs, nothing[0]]), np.concatenate([lses, nothing[1]]))
    expected = merge_states(outs, lses)
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])


@settings(deadline=None)
@given(seeds, st.sampled_from(sorted(LAYOUT_WIDTHS)), st.integers(1, 4), st.floats(-6, 6))
def test_stored_tokens_are_within_a_step_and_stay_as_they_are(
    seed: int, name: str, tokens: int, magnitude: float
) -> None:
    layout = LAYOUTS[name]
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((1, tokens, 1, LAYOUT_WIDTHS[name])) * 10**magnitude).astype(np.float32)
    scale = FP8_E4M3.choose_scale(values) if layout is FP8_E4M3 else None
    read = layout.dequantise(layout.quantise(values, scale), scale)
    # Small values beside a large one, in a block or in the cache, are as coarse as 2^-9 of e4m3's scale.
    coarse = np.abs(values).max() / 448 * 2 * 2.0**-9 + 2.0**-22
    assert (np.abs(read - values) <= np.abs(values) * max(E4M3_ROUNDING, BF16_ROUNDING) + coarse).all()
    again = layout.dequantise(layout.quantise(read, scale), scale)
    np.testing.assert_allclose(again, read, rtol=E4M3_ROUNDING, atol=coarse)


@settings(deadline=None)
@given(seeds, st.integers(1, 40), st.integers(1, 5), st.integers(1, 6))
def test_appended_tokens_are_where_slots_say(seed: int, page_size: int, columns: int, requests: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.permutation(columns * requests + 2)[: columns * requests].reshape(requests, columns).astype(np.int32)
    count = int(rng.integers(1, columns * page_size + 1))
    tokens = np.stack([rng.permutation(columns * page_size)[:count] for _ in range(requests)]).astype(np.int32)
    slots = slots_of(tokens, table, page_size)
    assert np.unique(slots).size == slots.size  # tokens of different requests never share one
    rows = rng.integers(1, 1000, (requests * count, 1, WIDTH)).astype(np.float32)
    by_slots, by_table = (np.zeros((columns * requests + 2, page_size, 1, WIDTH), np.float32) for _ in range(2))
    append_tokens(by_slots, rows, slots.reshape(-1).astype(np.int64))
    owners = np.repeat(np.arange(requests, dtype=np.int32), count)
    append_tokens(by_table, rows, block_table=table, positions=tokens.reshape(-1), requests=owners)
    np.testing.assert_array_equal(by_slots, by_table)
    np.testing.assert_array_equal(by_slots.reshape(-1, WIDTH)[slots.reshape(-1)], rows[:, 0])
