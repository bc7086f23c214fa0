"""Appends and conversions of so many tokens that a warp takes all of four: every byte as NumPy has it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_quantise import WRITTEN, scale_of, width_of

from cupy_mla import append_tokens, dequantise_cache, quantise_cache
from cupy_mla.kernels.append import append_geometry
from cupy_mla.layouts import BF16, FP8_DS_MLA, FP8_E4M3, CacheLayout

from .test_pages import download, memory_of, upload

PAGE_SIZE, TOKENS = 16, 4101  # of the last warp one token, of the last block two warps
PAGES = TOKENS // PAGE_SIZE + 3
SLOTS = PAGES * PAGE_SIZE
layouts = pytest.mark.parametrize("layout", [BF16, *WRITTEN], ids=lambda layout: layout.name)
rng = np.random.default_rng(11)
ORDERS = {
    "neighbours": np.arange(TOKENS) + 7,  # from page to page within warps
    "scattered": rng.permutation(SLOTS)[:TOKENS],
    "pairs": (2 * rng.permutation(SLOTS // 2)[: TOKENS // 2 + 1, None] + np.arange(2)).reshape(-1)[:TOKENS],
}


def rows_of(layout: CacheLayout, dtype: Any = ml_dtypes.bfloat16) -> Any:
    sizes = np.exp(rng.uniform(-8, 8, (TOKENS, 1)))
    rows = (rng.standard_normal((TOKENS, width_of(layout))) * sizes).astype(np.float32).astype(dtype)
    rows[rows == 0] = 0  # of one sign: the quotient of -0 and a given scale is stored as 0
    return rows


def caches_of(layout: CacheLayout, gap: int, start: int) -> tuple[Any, Any]:
    """A cache on the host and its copy on the GPU, ``gap`` bytes between tokens, the first at a byte ``start``."""
    rope = width_of(layout) - 512
    token, dtype = layout.token_bytes(512, rope), np.dtype(getattr(ml_dtypes, layout.dtype, layout.dtype))
    page = layout.page_bytes(PAGE_SIZE, 512, rope) + PAGE_SIZE * gap
    memory = rng.integers(0, 256, PAGES * page + 32, np.uint8)
    memory = memory[-memory.ctypes.data % 16 :][: PAGES * page + 16]
    strides = page, token + gap, token + gap, dtype.itemsize
    cache = np.ndarray((PAGES, PAGE_SIZE, 1, token // dtype.itemsize), dtype, memory, start, strides)
    return cache, upload(cache)


def options_of(layout: CacheLayout) -> dict[str, Any]:
    return {"kv_scale": scale_of(layout), "layout": layout}


def test_a_warp_takes_all_of_its_tokens() -> None:
    assert append_geometry(TOKENS).grid[1] == 1 < append_geometry(128).grid[1]


@layouts
@pytest.mark.parametrize("order", ORDERS)
def test_appended(layout: CacheLayout, order: str) -> None:
    slots = ORDERS[order].astype(np.int64)
    slots[[1, 100, 4100]] = -1, SLOTS, -5
    rows, (host, cache) = rows_of(layout), caches_of(layout, 0, 0)
    append_tokens(host, rows, slots, **options_of(layout))
    append_tokens(cache, upload(rows), upload(slots), **options_of(layout))
    np.testing.assert_array_equal(memory_of(cache), host_memory(host))


# Bytes between tokens and before the first one. Values of bfloat16 begin at multiples of 16, codes at those of 8.
PLACES = [
    (layout, gap, start)
    for layout in WRITTEN
    if not layout.page_end_bytes
    for gap, start in ((16, 0), (16, 16), (8, 0), (0, 8))
    if layout is not FP8_DS_MLA or (gap % 16, start % 16) == (0, 0)
]


@pytest.mark.parametrize(("layout", "gap", "start"), PLACES, ids=lambda value: getattr(value, "name", str(value)))
def test_appended_where_rows_lie_otherwise(layout: CacheLayout, gap: int, start: int) -> None:
    rows, (host, cache) = rows_of(layout, np.float16), caches_of(layout, gap, start)
    slots = ORDERS["neighbours"].astype(np.int64)
    append_tokens(host, rows, slots, **options_of(layout))
    append_tokens(cache, upload(rows), upload(slots), **options_of(layout))
    np.testing.assert_array_equal(memory_of(cache), host_memory(host))


@pytest.mark.parametrize("cache_pair", [False, True])
@pytest.mark.parametrize("kv_scale", [None, 0.03, 1e-30], ids=["bfloat16", "e4m3", "e4m3, divided in full"])
def test_parts_and_heads(cache_pair: bool, kv_scale: float | None) -> None:
    heads, dtype = 2, ml_dtypes.bfloat16 if kv_scale is None else ml_dtypes.float8_e4m3fn
    rows = (rng.standard_normal((TOKENS, heads, 576)) * 3).astype(np.float32).astype(ml_dtypes.bfloat16)
    host = rng.integers(0, 100, (PAGES, PAGE_SIZE, heads, 576 * np.dtype(dtype).itemsize), np.uint8).view(dtype)
    cache, slots = upload(host), ORDERS["scattered"].astype(np.int64)
    for target, source, where in ((host, rows, slots), (cache, upload(rows), upload(slots))):
        parts = (target[..., :512], target[..., 512:]) if cache_pair else target
        append_tokens(parts, (source[..., :512], source[..., 512:]), where, kv_scale=kv_scale)
    np.testing.assert_array_equal(memory_of(cache), host_memory(host))


@pytest.mark.parametrize("layout", WRITTEN, ids=lambda layout: layout.name)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_whole_caches(layout: CacheLayout, dtype: Any) -> None:
    values = rng.standard_normal((PAGES, PAGE_SIZE, 1, width_of(layout))).astype(np.float32).astype(dtype)
    host, cache = caches_of(layout, 0, 0)
    quantise_cache(host, values, **options_of(layout))
    quantise_cache(cache, upload(values), **options_of(layout))
    np.testing.assert_array_equal(memory_of(cache), host_memory(host))
    wanted = np.zeros_like(values)
    got = upload(wanted)
    dequantise_cache(host, wanted, **options_of(layout))
    dequantise_cache(cache, got, **options_of(layout))
    np.testing.assert_array_equal(download(got).view(np.uint16), wanted.view(np.uint16))


def test_chosen_pages_into_parts() -> None:
    values = rng.standard_normal((PAGES, PAGE_SIZE, 1, 576)).astype(np.float32).astype(ml_dtypes.bfloat16)
    host, cache = caches_of(FP8_E4M3, 0, 0)
    host[...] = FP8_E4M3.quantise(values, np.float32(0.02))
    cache = upload(host)
    pages = rng.permutation(PAGES).astype(np.int32)
    pages[[2, 9]] = -1
    wanted = np.zeros_like(values)
    got = upload(wanted)
    dequantise_cache(host, (wanted[..., :512], wanted[..., 512:]), pages=pages, kv_scale=0.02)
    dequantise_cache(cache, (got[..., :512], got[..., 512:]), pages=upload(pages), kv_scale=0.02)
    np.testing.assert_array_equal(download(got).view(np.uint16), wanted.view(np.uint16))


def host_memory(cache: Any) -> Any:
    """As `memory_of`."""
    size = sum((extent - 1) * step for extent, step in zip(cache.shape, cache.strides, strict=True)) + cache.itemsize
    base = cache
    while isinstance(base.base, np.ndarray):
        base = base.base
    offset = cache.ctypes.data - base.ctypes.data
    return base.reshape(-1).view(np.uint8)[offset : offset + size]
