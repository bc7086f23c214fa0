"""quantise_cache and dequantise_cache against the layouts' own functions."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fake_gpu import FakeGpu, fake_gpu
from test_quantise import PAGE_SIZE, PAGES, SCALE, WRITTEN, empty_cache, ids, rows_types, scale_of, width_of

from cupy_mla import dequantise_cache, quantise_cache
from cupy_mla.errors import InvalidArgumentError
from cupy_mla.layouts import FP8_DS_MLA, FP8_E4M3, FP8_V41, CacheLayout

layouts = pytest.mark.parametrize("layout", WRITTEN, ids=ids)


def make_values(layout: CacheLayout, dtype: Any, pages: int = PAGES, heads: int = 1, seed: int = 0) -> Any:
    """Of all sizes, with what is hard to store among them."""
    rng = np.random.default_rng(seed)
    shape = (pages, PAGE_SIZE, heads, width_of(layout))
    values = rng.standard_normal(shape) * np.exp(rng.uniform(-12, 8, (*shape[:2], 1, 1)))
    values[0, 1], values[0, 2, 0, 5], values[0, 3, 0, 300], values[0, 4, ::2] = 0, np.nan, np.inf, -0.0
    return values.astype(dtype)


def quantised(layout: CacheLayout, values: Any) -> Any:
    return layout.dequantise(layout.quantise(values, scale_of(layout)), scale_of(layout))


@layouts
@rows_types
def test_a_whole_cache_there_and_back(layout: CacheLayout, dtype: Any) -> None:
    values, cache = make_values(layout, dtype), empty_cache(layout)
    quantise_cache(cache, values, kv_scale=scale_of(layout), layout=layout)
    expected = quantised(layout, values)
    np.testing.assert_array_equal(layout.dequantise(cache, scale_of(layout)), expected)
    back = np.zeros_like(values)
    dequantise_cache(cache, back, kv_scale=scale_of(layout), layout=layout)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(back.astype(np.float32), expected.astype(dtype).astype(np.float32))


@layouts
def test_chosen_pages(layout: CacheLayout) -> None:
    scale, chosen = scale_of(layout), np.array([3, -1, 0, PAGES, 1], np.int32)
    values, cache = make_values(layout, ml_dtypes.bfloat16, chosen.size), empty_cache(layout)
    expected = layout.dequantise(cache, scale)
    kept = [0, 2, 4]
    expected[chosen[kept]] = quantised(layout, values)[kept]
    quantise_cache(cache, values, pages=chosen, kv_scale=scale, layout=layout, validate=False)
    np.testing.assert_array_equal(layout.dequantise(cache, scale), expected)
    back = np.full_like(values, 7)
    dequantise_cache(cache, back, pages=chosen, kv_scale=scale, layout=layout, validate=False)
    rounded = expected[chosen[kept]].astype(values.dtype)
    np.testing.assert_array_equal(back[kept].astype(np.float32), rounded.astype(np.float32))
    assert (back[[1, 3]] == 7).all()


@pytest.mark.parametrize("cache_pair", [False, True])
@pytest.mark.parametrize("values_pair", [False, True])
def test_pairs_heads_and_strides(cache_pair: bool, values_pair: bool) -> None:
    def parts(array: Any, wanted: bool) -> Any:
        return (array[..., :512], array[..., 512:]) if wanted else array

    wide = make_values(FP8_E4M3, np.float16, 2 * PAGES, heads=3)
    values = wide[::2, :, 1:]  # other pages between, other heads around
    stored = np.zeros((PAGES, PAGE_SIZE, 2, 600), ml_dtypes.float8_e4m3fn)[..., 8:584]
    scale = np.array([SCALE], np.float32)
    quantise_cache(parts(stored, cache_pair), parts(values, values_pair), kv_scale=scale)
    expected = FP8_E4M3.dequantise(FP8_E4M3.quantise(values, SCALE), SCALE)
    np.testing.assert_array_equal(FP8_E4M3.dequantise(stored, SCALE), expected)
    untouched, back = wide[1::2].copy(), wide[::2, :, 1:]
    dequantise_cache(parts(stored, cache_pair), parts(back, values_pair), kv_scale=scale)
    np.testing.assert_array_equal(back, expected.astype(np.float16))
    np.testing.assert_array_equal(wide[1::2], untouched)


@pytest.mark.parametrize("in_array", [False, True])
def test_a_scale_for_each_part(in_array: bool) -> None:
    scales = SCALE, 3 * SCALE
    kv_scale = np.array(scales, np.float32) if in_array else scales
    values, stored = make_values(FP8_E4M3, np.float16), empty_cache(FP8_E4M3)
    parts = values[..., :512], values[..., 512:]
    quantise_cache(stored, parts, kv_scale=kv_scale)
    back = np.zeros_like(values)
    dequantise_cache((stored[..., :512], stored[..., 512:]), back, kv_scale=kv_scale)
    for columns, scale in zip((slice(0, 512), slice(512, None)), map(np.float32, scales), strict=True):
        codes = FP8_E4M3.quantise(values[..., columns], scale)
        np.testing.assert_array_equal(stored[..., columns].view(np.uint8), codes.view(np.uint8))
        expected = FP8_E4M3.dequantise(codes, scale)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(back[..., columns], expected.astype(np.float16))


def test_values_may_be_a_pair_beside_blocks() -> None:
    values, cache = make_values(FP8_DS_MLA, ml_dtypes.bfloat16), empty_cache(FP8_DS_MLA)
    quantise_cache(cache, (values[..., :512], values[..., 512:]))  # 656 bytes leave no doubt
    np.testing.assert_array_equal(FP8_DS_MLA.dequantise(cache), quantised(FP8_DS_MLA, values))
    back = np.zeros_like(values[..., :512]), np.zeros_like(values[..., 512:])
    dequantise_cache(cache, back)
    rounded = quantised(FP8_DS_MLA, values).astype(values.dtype)
    np.testing.assert_array_equal(np.concatenate(back, axis=-1).astype(np.float32), rounded.astype(np.float32))


def bad_calls() -> dict[str, tuple[str, dict[str, Any]]]:
    values, wide = make_values(FP8_V41, ml_dtypes.bfloat16), make_values(FP8_E4M3, ml_dtypes.bfloat16)
    good: dict[str, Any] = {"kv_cache": empty_cache(FP8_V41), "values": values, "layout": FP8_V41}
    scaled: dict[str, Any] = {"kv_cache": empty_cache(FP8_E4M3), "values": wide, "kv_scale": SCALE}
    dense = np.zeros((PAGES, PAGE_SIZE, 1, 576), ml_dtypes.bfloat16)
    pages = np.arange(PAGES, dtype=np.int32)
    return {
        "a layout in doubt": ("layout", good | {"layout": None}),
        "an unknown layout": ("layout", good | {"layout": "fp8"}),
        "another layout": ("kv_cache", good | {"layout": "fp8_ds_mla"}),
        "a cache of 16 bits": ("kv_cache", {"kv_cache": dense, "values": wide}),
        "values of float32": ("values", good | {"values": values.astype(np.float32)}),
        "values of one request": ("values", good | {"values": values[0]}),
        "values too wide": ("values", good | {"values": wide}),
        "fewer pages": ("values", good | {"values": values[:2]}),
        "smaller pages": ("values", good | {"values": values[:, :8]}),
        "two types": ("values", scaled | {"values": (wide[..., :512], wide[..., 512:].astype(np.float16))}),
        "no scale": ("kv_scale", scaled | {"kv_scale": None}),
        "a scale among blocks": ("kv_scale", good | {"kv_scale": SCALE}),
        "pages of int64": ("pages", good | {"pages": pages.astype(np.int64)}),
        "pages of fewer values": ("pages", good | {"pages": pages[:2]}),
        "a page past the end": ("pages[2]", good | {"pages": np.array([0, 1, PAGES, 2, 3], np.int32)}),
    }


@pytest.mark.parametrize("convert", [quantise_cache, dequantise_cache])
@pytest.mark.parametrize(("argument", "call"), bad_calls().values(), ids=bad_calls())
def test_a_bad_call_is_refused(convert: Any, argument: str, call: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        convert(**call)
    assert caught.value.argument.removesuffix("[1]") in (argument, f"{argument}[0]")


def test_what_cannot_be_written_is_refused() -> None:
    values, cache = make_values(FP8_DS_MLA, ml_dtypes.bfloat16), empty_cache(FP8_DS_MLA)
    for array, convert, name in ((cache, quantise_cache, "kv_cache"), (values, dequantise_cache, "values")):
        array.flags.writeable = False
        with pytest.raises(InvalidArgumentError, match=f"^{name}: "):
            convert(cache, values)
        array.flags.writeable = True
    with pytest.raises(InvalidArgumentError, match=r"^pages\[1\]: "):
        quantise_cache(cache, values[:2], pages=np.array([1, 1], np.int32))
    dequantise_cache(cache, values[:2], pages=np.array([1, 1], np.int32))  # read twice


# What the kernels are given ------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return fake_gpu(monkeypatch)


@pytest.mark.parametrize(("convert", "kernel"), [(quantise_cache, "quantise"), (dequantise_cache, "dequantise")])
def test_launches(gpu: FakeGpu, convert: Any, kernel: str) -> None:
    cache, values = gpu.array((9, 16, 1, 656), "uint8"), gpu.array((9, 16, 1, 576), strides=(20_000, 640, 640, 1))
    convert(cache, values)
    [launch] = gpu.take()
    [[params]] = launch.arguments
    assert (launch.kernel, launch.stream) == (kernel, 77)
    places = params["places"]
    assert places["block_table"] == places["positions"] == places["slot_mapping"] == 0
    assert (places["num_tokens"], places["max_pages_per_seq"], places["num_requests"]) == (144, 9, 1)
    assert params["rows_page_steps"].tolist() == [2 * (20_000 - 16 * 640)] * 2
    assert params["segments"][1]["rows"] == values.pointer + 2 * 512

    pages = gpu.array((4,), "int32")
    convert(cache, gpu.array((4, 16, 1, 576)), pages=pages, stream=5)
    [launch] = gpu.take()
    [[params]] = launch.arguments
    assert params["places"]["block_table"] == pages.pointer
    assert (params["places"]["max_pages_per_seq"], params["places"]["num_requests"], launch.stream) == (4, 1, 5)
    assert params["rows_page_steps"].tolist() == [0, 0]


def test_chunks_of_values_are_aligned(gpu: FakeGpu) -> None:
    cache = gpu.array((9, 16, 1, 656), "uint8")
    with pytest.raises(InvalidArgumentError, match=r"^values: expected step from page to page a multiple of 16 bytes"):
        quantise_cache(cache, gpu.array((9, 16, 1, 576), strides=(16 * 576 + 4, 576, 576, 1)))
    assert gpu.take() == []
