"""The kernel that rounds new tokens to caches of e4m3 against NumPy, bit for bit in its meaning."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_cache_ops import to_device, to_host
from test_quantise import (
    PAGE_SIZE,
    PAGES,
    SCALE,
    WRITTEN,
    empty_cache,
    expected_parts,
    expected_values,
    ids,
    make_rows,
    rows_types,
    scale_of,
    width_of,
)

from cupy_mla import append_tokens, dequantise_cache, quantise_cache
from cupy_mla.layouts import FP8_E4M3, CacheLayout

FP8_E4M3_TYPE = np.dtype(ml_dtypes.float8_e4m3fn)


def cache_on_device(layout: CacheLayout) -> Any:
    """As `to_device`, with the gaps between pages that a layout may have."""
    import cupy

    cache = empty_cache(layout)
    page_bytes = layout.page_bytes(PAGE_SIZE, width_of(layout) - layout_rope(layout), layout_rope(layout))
    memory = cupy.zeros((PAGES, page_bytes), cupy.uint8)
    used = PAGE_SIZE * cache.shape[-1] * cache.itemsize
    memory[:, :used] = cupy.asarray(cache.reshape(PAGES, -1).view(np.uint8))
    return memory[:, :used].reshape(PAGES, PAGE_SIZE, 1, -1).view(cache.dtype)


def layout_rope(layout: CacheLayout) -> int:
    return width_of(layout) - 512


@pytest.mark.parametrize("layout", WRITTEN, ids=ids)
@rows_types
def test_gpu_stores_what_numpy_stores(layout: CacheLayout, dtype: Any) -> None:
    rows, slots = make_rows(layout, dtype, 4)
    cache = cache_on_device(layout)
    scale = scale_of(layout)
    append_tokens(cache, to_device(rows), to_device(slots), kv_scale=scale, layout=layout)
    bits = np.ascontiguousarray(to_host(cache.view(np.uint8).copy())).view(cache.dtype)
    stored = np.zeros((PAGES, layout.page_bytes(PAGE_SIZE, 512, layout_rope(layout))), np.uint8)
    stored[:, : bits[0].nbytes] = bits.view(np.uint8).reshape(PAGES, -1)
    got = stored[:, : bits[0].nbytes].reshape(PAGES, PAGE_SIZE, 1, -1).view(bits.dtype)
    np.testing.assert_array_equal(layout.dequantise(got, scale), expected_values(layout, rows, slots))


def test_gpu_scale_in_an_array_and_pairs() -> None:
    rows, slots = make_rows(FP8_E4M3, ml_dtypes.bfloat16, 5)
    cache = empty_cache(FP8_E4M3)
    parts = to_device((cache[..., :512].view(np.uint8), cache[..., 512:].view(np.uint8)))
    target = tuple(part.view(FP8_E4M3_TYPE) for part in parts)
    scale = to_device(np.array([SCALE], np.float32))
    append_tokens(target, to_device(rows), to_device(slots), kv_scale=scale)
    got = np.concatenate([to_host(part.view(np.uint8)) for part in target], axis=-1).view(FP8_E4M3_TYPE)
    expected = expected_values(FP8_E4M3, rows, slots)
    np.testing.assert_array_equal(FP8_E4M3.dequantise(got, np.float32(SCALE)), expected)


@pytest.mark.parametrize("in_array", [False, True])
def test_gpu_scales_of_latent_and_rope_part(in_array: bool) -> None:
    scales = SCALE, 4 * SCALE
    rows, slots = make_rows(FP8_E4M3, ml_dtypes.bfloat16, 7)
    kv_scale = to_device(np.array(scales, np.float32)) if in_array else scales
    cache = cache_on_device(FP8_E4M3)
    parts = np.ascontiguousarray(rows[:, :512]), np.ascontiguousarray(rows[:, 512:])
    append_tokens(cache, to_device(parts), to_device(slots), kv_scale=kv_scale)
    expected = expected_parts(rows, slots, scales)
    np.testing.assert_array_equal(values_of(cache, scales), values_of(expected, scales))

    values = to_device(np.zeros(expected.shape, ml_dtypes.bfloat16))
    split = cache[..., :512], cache[..., 512:]
    dequantise_cache(split, values, kv_scale=kv_scale)
    read = to_host(values)
    exact = values_of(expected, scales)
    np.testing.assert_array_equal(read.astype(np.float32), exact.astype(read.dtype).astype(np.float32))
    cache.view(np.uint8)[...] = 0
    quantise_cache(split, values, kv_scale=kv_scale)
    np.testing.assert_array_equal(values_of(cache, scales), exact)  # bf16 has moved no value to another code


def values_of(cache: Any, scales: tuple[float, float]) -> Any:
    """What the codes of a cache mean, on the host."""
    codes = np.ascontiguousarray(to_host(cache.view(np.uint8).copy())).view(FP8_E4M3_TYPE)
    parts = zip((codes[..., :512], codes[..., 512:]), scales, strict=True)
    return np.concatenate([FP8_E4M3.dequantise(part, np.float32(scale)) for part, scale in parts], axis=-1)
