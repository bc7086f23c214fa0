"""Kernels that copy, quantise and dequantise pages of a cache against NumPy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_convert import layouts, make_values, quantised
from test_quantise import PAGE_SIZE, PAGES, SCALE, empty_cache, rows_types, scale_of, width_of

from cupy_mla import InvalidArgumentError, append_tokens, copy_pages, dequantise_cache, quantise_cache
from cupy_mla.layouts import FP4_V41, FP8_DS_MLA, FP8_E4M3, LAYOUTS, CacheLayout

cupy = pytest.importorskip("cupy")

OUTSIDE = (-1, -(2**31), 2**31 - 1)


def upload(array: Any) -> Any:
    """As it lies in memory, so that gaps stay; CuPy's own kernels do not know every type."""
    base = array if array.base is None else array.base
    while isinstance(base.base, np.ndarray):
        base = base.base
    memory = cupy.asarray(np.frombuffer(np.ascontiguousarray(base).tobytes(), np.uint8))
    offset = array.ctypes.data - base.ctypes.data
    return cupy.ndarray(array.shape, array.dtype, memory.data + offset, strides=array.strides)


def download(array: Any) -> Any:
    bits = np.dtype(f"u{array.itemsize}")
    return cupy.asnumpy(array.view(bits)).view(array.dtype)


def numbers(*pages: int) -> Any:
    return cupy.asarray(np.array(pages, np.int32))


def memory_of(array: Any) -> Any:
    """All bytes from an array's first to its last, with what lies between."""
    size = sum((extent - 1) * step for extent, step in zip(array.shape, array.strides, strict=True)) + array.itemsize
    return cupy.asnumpy(cupy.ndarray(size, np.uint8, array.data))


SHAPES = {
    "latent and rope": ((9, 64, 1, 1152), None),
    "odd pages": ((9, 3, 1, 1152), None),
    "584 bytes": ((9, 1, 1, 584), None),
    "7 bytes": ((9, 5, 3, 7), None),
    "a part of rows": ((9, 16, 2, 512), (16 * 2 * 800 + 32, 2 * 800, 800, 1)),
    "every other page": ((9, 64, 1, 656), (2 * 64 * 656, 656, 656, 1)),
    "large pages": ((3, 1000, 1, 1152), None),
}


def make_pages(shape: tuple[int, ...], strides: tuple[int, ...] | None, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    if strides is None:
        return rng.integers(0, 256, shape, np.uint8)
    memory = rng.integers(0, 256, shape[0] * strides[0], np.uint8)
    return np.ndarray(shape, np.uint8, memory, strides=strides)


@pytest.mark.parametrize(("shape", "strides"), SHAPES.values(), ids=SHAPES)
def test_copies(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> None:
    cache, other = make_pages(shape, strides, 0), make_pages(shape, None, 1)
    target, source = upload(cache), upload(other)
    pages = (1, 0, *OUTSIDE, 2, shape[0]), (0, 2, 1, 1, 1, -1, 1)
    copy_pages(target, *(numbers(*side) for side in pages), source=source)
    expected = cache.copy()
    expected[[0, 2]] = other[[1, 0]]
    np.testing.assert_array_equal(download(target), expected)
    if strides is not None:  # what lies between is as it was
        fresh = upload(cache)
        copy_pages(fresh, *(numbers(*side) for side in pages), source=source)
        changed = memory_of(fresh) != memory_of(upload(cache))
        assert changed.sum() == (expected != cache).sum()
    gathered = upload(np.zeros((2, *shape[1:]), np.uint8))
    copy_pages(gathered, numbers(2, 1), source=target)
    np.testing.assert_array_equal(download(gathered), expected[[2, 1]])
    copy_pages(target, numbers(2), numbers(1))
    expected[1] = expected[2]
    np.testing.assert_array_equal(download(target), expected)


def test_copies_of_a_pair_in_a_graph() -> None:
    rng = np.random.default_rng(3)
    parts = [rng.standard_normal((8, 16, 1, width)).astype(ml_dtypes.bfloat16) for width in (512, 64)]
    cache, source_pages, target_pages = tuple(map(upload, parts)), numbers(0, 1), numbers(5, 6)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        copy_pages(cache, numbers(7), numbers(7))
        stream.synchronize()
        stream.begin_capture()
        copy_pages(cache, source_pages, target_pages)
        graph = stream.end_capture()
    target_pages[:] = numbers(2, -1)
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    for part, expected in zip(cache, parts, strict=True):
        expected[2] = expected[0]
        np.testing.assert_array_equal(download(part), expected)


def test_validation_names_a_page() -> None:
    cache = upload(make_pages((4, 16, 1, 64), None, 0))
    before = download(cache)
    with pytest.raises(InvalidArgumentError, match=r"^target_pages\[1\]: "):
        copy_pages(cache, numbers(0, 1), numbers(2, 4), validate=True)
    np.testing.assert_array_equal(download(cache), before)


def test_copies_beyond_2_to_the_31_bytes() -> None:
    page_bytes = 64 * 1152
    num_pages = 2**32 // page_bytes + 3
    cache = cupy.zeros((num_pages, 64, 1, 1152), np.uint8)
    page = cupy.asarray(make_pages((1, 64, 1, 1152), None, 5))
    cache[num_pages - 1] = page[0]
    copy_pages(cache, numbers(num_pages - 1), numbers(num_pages - 2))
    assert bool((cache[num_pages - 2] == page[0]).all())
    assert not bool(cache[: num_pages - 2].any())


def cache_on_device(layout: CacheLayout) -> Any:
    """With the gaps between pages that a layout may have."""
    return upload(layout.with_page_starts(empty_cache(layout)))


def values_of(layout: CacheLayout, cache: Any) -> Any:
    return layout.dequantise(layout.with_page_starts(download(cache)), scale_of(layout))


@layouts
@rows_types
def test_there_and_back(layout: CacheLayout, dtype: Any) -> None:
    values, cache = make_values(layout, dtype), cache_on_device(layout)
    quantise_cache(cache, upload(values), kv_scale=scale_of(layout), layout=layout)
    expected = quantised(layout, values)
    np.testing.assert_array_equal(values_of(layout, cache), expected)
    back = upload(np.zeros_like(values))
    dequantise_cache(cache, back, kv_scale=scale_of(layout), layout=layout)
    with np.errstate(over="ignore"):
        rounded = expected.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(download(back).astype(np.float32), rounded)


@layouts
def test_chosen_pages(layout: CacheLayout) -> None:
    scale, chosen, kept = scale_of(layout), (3, *OUTSIDE, 0, PAGES), [0, 4]
    values, cache = make_values(layout, ml_dtypes.bfloat16, len(chosen)), cache_on_device(layout)
    expected = values_of(layout, cache)
    expected[[3, 0]] = quantised(layout, values)[kept]
    quantise_cache(cache, upload(values), pages=numbers(*chosen), kv_scale=scale, layout=layout)
    np.testing.assert_array_equal(values_of(layout, cache), expected)
    back = upload(np.full_like(values, 7))
    dequantise_cache(cache, back, pages=numbers(*chosen), kv_scale=scale, layout=layout)
    found = download(back).astype(np.float32)
    np.testing.assert_array_equal(found[kept], expected[[3, 0]].astype(values.dtype).astype(np.float32))
    assert (np.delete(found, kept, axis=0) == 7).all()


@pytest.mark.parametrize("scale", [SCALE, 1e-30, 3e38, 0.5])
def test_pairs_heads_strides_and_scales(scale: float) -> None:
    wide = make_values(FP8_E4M3, np.float16, 2 * PAGES, heads=3)
    values = wide[::2, :, 1:]
    stored = np.zeros((PAGES, PAGE_SIZE, 2, 608), ml_dtypes.float8_e4m3fn)[..., 16:592]
    cache, given = upload(stored), upload(values)
    factor = cupy.full(1, scale, np.float32)
    quantise_cache((cache[..., :512], cache[..., 512:]), given, kv_scale=factor)
    with np.errstate(over="ignore"):
        expected = FP8_E4M3.dequantise(FP8_E4M3.quantise(values, scale), scale)
        np.testing.assert_array_equal(FP8_E4M3.dequantise(download(cache), scale), expected)
        back = upload(np.zeros_like(wide)[::2, :, 1:])
        dequantise_cache((cache[..., :512], cache[..., 512:]), (back[..., :512], back[..., 512:]), kv_scale=factor)
        np.testing.assert_array_equal(download(back), expected.astype(np.float16))


def test_every_quotient_is_rounded_as_by_numpy() -> None:
    """All fp16 values by scales of which most quotients are near the middle of two e4m3 values."""
    rows = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(-1, 16, 1, 64)
    for scale in (1 / 3, 0.1, 1.1, 7e-3, np.float32(2) ** -14 / 3, 99.0):
        cache = upload(np.zeros(rows.shape, ml_dtypes.float8_e4m3fn))
        quantise_cache(cache, upload(rows), kv_scale=scale)
        got = FP8_E4M3.dequantise(download(cache), scale)
        np.testing.assert_array_equal(got, FP8_E4M3.dequantise(FP8_E4M3.quantise(rows, scale), scale))


@pytest.mark.parametrize("code", [0x01, 0x03, 0x07, *range(0x38, 0x40), 0x7E])
def test_every_quotient_of_e2m1_is_rounded_as_by_numpy(code: int) -> None:
    """All fp16 values that an e4m3 scale allows, in blocks whose first value leads to that scale."""
    largest = 6 * np.array(code, np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    allowed = every[np.abs(every) <= largest]
    tokens = -(-allowed.size // (15 * 32) // PAGE_SIZE) * PAGE_SIZE
    rows = np.full((tokens // PAGE_SIZE, PAGE_SIZE, 1, 32, 16), largest, np.float16)
    rows[..., 1:] = np.resize(allowed, rows[..., 1:].shape)
    rows = rows.reshape(*rows.shape[:3], 512)
    cache = upload(np.zeros((*rows.shape[:3], 288), np.uint8))
    quantise_cache(cache, upload(rows), layout=FP4_V41)
    np.testing.assert_array_equal(download(cache), FP4_V41.quantise(rows))


def test_a_dequantised_cache_is_what_was_appended() -> None:
    rows = make_values(FP8_DS_MLA, ml_dtypes.bfloat16)
    caches = [cache_on_device(FP8_DS_MLA) for _ in range(2)]
    slots = cupy.arange(PAGES * PAGE_SIZE)
    append_tokens(caches[0], upload(rows.reshape(-1, rows.shape[-1])), slots)
    quantise_cache(caches[1], upload(rows))
    np.testing.assert_array_equal(*map(download, caches))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_pages_of_every_layout_move(layout: CacheLayout) -> None:
    values = np.random.default_rng(6).standard_normal((4, 2, 1, width_of(layout)))
    stored = layout.with_page_starts(layout.quantise(values, scale_of(layout)))
    cache = upload(stored)
    copy_pages(cache, numbers(3, 0), numbers(1, 2))
    expected = layout.dequantise(stored, scale_of(layout))[[0, 3, 0, 3]]
    got = layout.dequantise(layout.with_page_starts(download(cache)), scale_of(layout))
    np.testing.assert_array_equal(got, expected)
