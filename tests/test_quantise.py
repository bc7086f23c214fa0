"""Appending 16-bit rows to caches of e4m3 or e2m1 against the layouts' own quantisers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_mla import append_tokens
from cupy_mla.errors import InvalidArgumentError
from cupy_mla.layouts import FP4_V41, FP8_DS_MLA, FP8_DS_MLA_NO_ROPE, FP8_E4M3, FP8_MODEL1, FP8_V41, CacheLayout

WRITTEN = [FP8_E4M3, FP8_DS_MLA, FP8_DS_MLA_NO_ROPE, FP8_MODEL1, FP8_V41, FP4_V41]
PAGES, PAGE_SIZE, TOKENS = 5, 16, 40
SCALE = 0.0173
OUTSIDE = (-1, PAGES * PAGE_SIZE)
ids = [layout.name for layout in WRITTEN]
rows_types = pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])


def width_of(layout: CacheLayout) -> int:
    return 576 if layout.supports(512, 64) else 512


def scale_of(layout: CacheLayout) -> float | None:
    return SCALE if layout.needs_scale else None


def make_rows(layout: CacheLayout, dtype: Any, seed: int = 0) -> tuple[Any, Any]:
    """Rows of all sizes, with what is hard to store among them, and slots, two of which are outside of the cache."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((TOKENS, width_of(layout))) * np.exp(rng.uniform(-12, 8, (TOKENS, 1)))
    rows[3], rows[4, 5], rows[5, 300], rows[6, ::2] = 0, np.nan, np.inf, -0.0
    rows[7, :128] = 448 * 2.0**-6  # a scale that is a power of two by itself
    slots = rng.permutation(PAGES * PAGE_SIZE)[:TOKENS].astype(np.int64)
    slots[:2] = OUTSIDE
    return rows.astype(dtype), slots


def empty_cache(layout: CacheLayout) -> Any:
    values = np.ones((PAGES, PAGE_SIZE, 1, width_of(layout)), np.float32)
    return layout.quantise(values, scale_of(layout))


def expected_values(layout: CacheLayout, rows: Any, slots: Any) -> Any:
    """Through a cache that is quantised whole."""
    values = layout.dequantise(empty_cache(layout), scale_of(layout)).reshape(PAGES * PAGE_SIZE, -1)
    kept = (slots >= 0) & (slots < PAGES * PAGE_SIZE)
    values[slots[kept]] = rows[kept]
    pages = values.reshape(PAGES, PAGE_SIZE, 1, -1)
    return layout.dequantise(layout.quantise(pages, scale_of(layout)), scale_of(layout))


@pytest.mark.parametrize("layout", WRITTEN, ids=ids)
@rows_types
def test_rows_are_stored_as_the_layout_says(layout: CacheLayout, dtype: Any) -> None:
    cache = empty_cache(layout)
    rows, slots = make_rows(layout, dtype)
    append_tokens(cache, rows, slots, kv_scale=scale_of(layout), layout=layout)
    np.testing.assert_array_equal(layout.dequantise(cache, scale_of(layout)), expected_values(layout, rows, slots))


@pytest.mark.parametrize("layout", WRITTEN, ids=ids)
def test_rows_that_go_nowhere_change_nothing(layout: CacheLayout) -> None:
    cache, before = empty_cache(layout), empty_cache(layout)
    rows, _ = make_rows(layout, ml_dtypes.bfloat16)
    append_tokens(cache, rows[:2], np.array(OUTSIDE), kv_scale=scale_of(layout), layout=layout)
    assert cache.tobytes() == before.tobytes()


@pytest.mark.parametrize("cache_pair", [False, True])
@pytest.mark.parametrize("rows_pair", [False, True])
def test_pairs_with_one_scale(cache_pair: bool, rows_pair: bool) -> None:
    cache = empty_cache(FP8_E4M3)
    rows, slots = make_rows(FP8_E4M3, ml_dtypes.bfloat16, 1)
    target = (cache[..., :512].copy(), cache[..., 512:].copy()) if cache_pair else cache
    append_tokens(target, (rows[:, :512], rows[:, 512:]) if rows_pair else rows, slots, kv_scale=np.float32(SCALE))
    got = np.concatenate(target, axis=-1) if cache_pair else target
    np.testing.assert_array_equal(FP8_E4M3.dequantise(got, SCALE), expected_values(FP8_E4M3, rows, slots))


@pytest.mark.parametrize("in_array", [False, True])
@pytest.mark.parametrize("cache_pair", [False, True])
@pytest.mark.parametrize("rows_pair", [False, True])
def test_a_scale_for_each_part(cache_pair: bool, rows_pair: bool, in_array: bool) -> None:
    scales = SCALE, 4 * SCALE
    rows, slots = make_rows(FP8_E4M3, ml_dtypes.bfloat16, 6)
    cache = empty_cache(FP8_E4M3)
    expected = expected_parts(rows, slots, scales)
    target = (cache[..., :512].copy(), cache[..., 512:].copy()) if cache_pair else cache
    given = (rows[:, :512], rows[:, 512:]) if rows_pair else rows
    kv_scale = np.array(scales, np.float32) if in_array else scales
    if not cache_pair and not rows_pair:
        with pytest.raises(InvalidArgumentError, match=r"^kv_scale: expected a number, .* unless .* a pair"):
            append_tokens(target, given, slots, kv_scale=kv_scale)
        np.testing.assert_array_equal(target.view(np.uint8), empty_cache(FP8_E4M3).view(np.uint8))
        return
    append_tokens(target, given, slots, kv_scale=kv_scale)
    got = np.concatenate(target, axis=-1) if cache_pair else target
    np.testing.assert_array_equal(got.view(np.uint8), expected.view(np.uint8))


def expected_parts(rows: Any, slots: Any, scales: tuple[float, float]) -> Any:
    """`empty_cache` of e4m3 with rows whose latent and rope part have a scale each."""
    cache = empty_cache(FP8_E4M3)
    kept = (slots >= 0) & (slots < PAGES * PAGE_SIZE)
    for columns, scale in zip((slice(0, 512), slice(512, None)), scales, strict=True):
        codes = FP8_E4M3.quantise(rows[kept][:, None, None, columns].astype(np.float32), np.float32(scale))
        cache.reshape(PAGES * PAGE_SIZE, -1)[slots[kept], columns] = codes[:, 0, 0]
    return cache


def test_rows_may_be_a_pair_and_scales_an_array() -> None:
    rows, slots = make_rows(FP8_DS_MLA, np.float16, 2)
    cache = empty_cache(FP8_DS_MLA)
    append_tokens(cache, (rows[:, :512], rows[:, 512:]), slots)  # 656 bytes leave no doubt
    np.testing.assert_array_equal(FP8_DS_MLA.dequantise(cache), expected_values(FP8_DS_MLA, rows, slots))
    cache = empty_cache(FP8_E4M3)
    append_tokens(cache, rows, slots, kv_scale=np.array([SCALE], np.float32))
    expected = expected_values(FP8_E4M3, rows, slots)
    np.testing.assert_array_equal(FP8_E4M3.dequantise(cache, np.float32(SCALE)), expected)


def test_rows_of_the_caches_type_are_copied() -> None:
    cache = empty_cache(FP8_DS_MLA)
    rows = np.random.default_rng(3).integers(0, 256, (2, 656), np.uint8)
    append_tokens(cache, rows, np.array([0, 17]), layout=FP8_DS_MLA)
    np.testing.assert_array_equal(cache.reshape(-1, 656)[[0, 17]], rows)


def bad_calls() -> dict[str, tuple[str, dict[str, Any]]]:
    rows, slots = make_rows(FP8_DS_MLA_NO_ROPE, ml_dtypes.bfloat16)
    wide, _ = make_rows(FP8_E4M3, ml_dtypes.bfloat16)
    tensor_scaled = {"kv_cache": empty_cache(FP8_E4M3), "kv_new": wide, "kv_scale": SCALE}
    bytes_528 = {"kv_cache": empty_cache(FP8_V41), "kv_new": rows}
    named = bytes_528 | {"layout": FP8_V41}
    dense = {"kv_cache": np.zeros((PAGES, PAGE_SIZE, 1, 576), ml_dtypes.bfloat16), "kv_new": wide}
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "no scale": ("kv_scale", tensor_scaled | {"kv_scale": None}),
        "a scale of 0": ("kv_scale", tensor_scaled | {"kv_scale": 0.0}),
        "two scales": ("kv_scale", tensor_scaled | {"kv_scale": np.ones(2, np.float32)}),
        "a scale of float64": ("kv_scale", tensor_scaled | {"kv_scale": np.ones(1)}),
        "a scale among blocks": ("kv_scale", named | {"kv_scale": SCALE}),
        "a scale for copies": ("kv_scale", dense | {"kv_scale": SCALE}),
        "a layout in doubt": ("layout", bytes_528),
        "an unknown layout": ("layout", named | {"layout": "fp8"}),
        "another layout": ("kv_cache", named | {"layout": "bf16"}),
        "another width": ("kv_cache", named | {"layout": "fp8_ds_mla"}),
        "rows too wide": ("kv_new", named | {"kv_new": wide}),
        "rows of float32": ("kv_new", named | {"kv_new": rows.astype(np.float32)}),
        "fp16 for bf16": ("kv_new", dense | {"kv_new": wide.astype(np.float16)}),
        "a pair among blocks": ("kv_cache", named | {"kv_cache": (bytes_528["kv_cache"], bytes_528["kv_cache"])}),
    }
    return {name: (argument, call | {"slot_mapping": slots}) for name, (argument, call) in calls.items()}


@pytest.mark.parametrize(("argument", "call"), bad_calls().values(), ids=bad_calls())
def test_a_bad_call_is_refused(argument: str, call: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^{argument}(\[\d\])?: "):
        append_tokens(call.pop("kv_cache"), call.pop("kv_new"), **call)
