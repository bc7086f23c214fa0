"""What a cache layout says of itself, and how one is found."""

from __future__ import annotations

import pickle
import re

import ml_dtypes
import numpy as np
import pytest

from cupy_mla.arrays.view import ArrayView, contiguous_strides, view
from cupy_mla.errors import InvalidArgumentError
from cupy_mla.layouts import (
    BF16,
    DENSE_LAYOUTS,
    FP4_V41,
    FP8_DS_MLA,
    FP8_DS_MLA_NO_ROPE,
    FP8_E4M3,
    FP8_MODEL1,
    FP8_V41,
    FP16,
    LAYOUTS,
    CacheLayout,
    find_layout,
    infer_layout,
)

# Widths that each takes, and the bytes of such a token: the contract's table.
TOKENS = {
    "bf16": ((512, 64), 1152),
    "fp16": ((512, 64), 1152),
    "fp8_e4m3": ((512, 64), 576),
    "fp8_ds_mla": ((512, 64), 656),
    "fp8_ds_mla_no_rope": ((512, 0), 528),
    "fp8_model1": ((512, 0), 584),
    "fp8_v41": ((512, 0), 528),
    "fp4_v41": ((512, 0), 288),
}
IN_BYTES = list(TOKENS)[3:]


def test_bytes_of_a_token() -> None:
    assert {name: layout.token_bytes(*TOKENS[name][0]) for name, layout in LAYOUTS.items()} == {
        name: num_bytes for name, (_, num_bytes) in TOKENS.items()
    }
    assert BF16.token_bytes(256, 64, num_heads_kv=8) == 5120
    assert FP8_E4M3.token_bytes(256, 64) == 320


def test_bytes_of_a_page() -> None:
    assert FP8_MODEL1.page_bytes(64, 512, 0) == 65 * 576  # 64 tokens of 584 bytes fill 64.9 times 576
    assert FP8_MODEL1.page_bytes(2, 512, 0) == 3 * 576
    assert FP8_MODEL1.page_bytes(72, 512, 0) == 73 * 576 == 72 * 584
    assert BF16.page_bytes(64, 512, 64, num_heads_kv=2) == 64 * 2304
    for name in ("fp8_e4m3", "fp8_ds_mla", "fp8_ds_mla_no_rope", "fp8_v41", "fp4_v41"):
        widths, num_bytes = TOKENS[name]
        assert LAYOUTS[name].page_bytes(17, *widths) == 17 * num_bytes


@pytest.mark.parametrize("name", TOKENS)
def test_widths(name: str) -> None:
    layout = LAYOUTS[name]
    widths, _ = TOKENS[name]
    assert layout.supports(*widths)
    others = [(512, 64), (512, 0), (448, 64), (256, 64), (128, 0), (7, 3)]
    supported = [pair for pair in others if layout.supports(*pair)]
    assert supported == ([widths] if name in IN_BYTES else others)
    for pair in set(others) - set(supported):
        with pytest.raises(InvalidArgumentError, match="latent_dim"):
            layout.width(*pair)


@pytest.mark.parametrize("name", TOKENS)
def test_a_quantised_cache_is_one_of_the_layout(name: str) -> None:
    layout = LAYOUTS[name]
    widths, num_bytes = TOKENS[name]
    stored = layout.quantise(np.ones((3, 5, 1, sum(widths)), np.float32), 0.5 if layout.needs_scale else None)
    described = view(stored, "kv_cache")
    layout.check(described, "kv_cache", *widths)
    assert described.dtype == layout.dtype
    assert described.shape == (3, 5, 1, layout.width(*widths))
    assert stored.strides[0] == layout.page_bytes(5, *widths)
    assert stored.itemsize * stored.shape[-1] == num_bytes


def test_the_16_bit_layouts_take_the_queries_and_kernels_of_their_type() -> None:
    assert DENSE_LAYOUTS == {"bfloat16": BF16, "float16": FP16}
    assert (BF16.query_dtypes, FP16.query_dtypes) == (("bfloat16",), ("float16",))
    assert (BF16.defines, FP16.defines) == ((("MLA_DTYPE", "Bf16"),), (("MLA_DTYPE", "Fp16"),))
    assert [name for name, layout in LAYOUTS.items() if layout.kernel_type is not None] == ["bf16", "fp16", "fp8_e4m3"]
    assert [name for name, layout in LAYOUTS.items() if not layout.one_head] == ["bf16", "fp16"]
    assert [name for name, layout in LAYOUTS.items() if layout.needs_scale] == ["fp8_e4m3"]
    assert [name for name, layout in LAYOUTS.items() if layout.has_columns] == ["bf16", "fp16", "fp8_e4m3"]
    assert [name for name, layout in LAYOUTS.items() if layout.codec is None] == ["bf16", "fp16"]


@pytest.mark.parametrize(
    ("dtype", "width", "layout"),
    [
        ("bfloat16", 576, BF16),
        ("bfloat16", 36, BF16),
        ("float16", 656, FP16),
        ("float8_e4m3fn", 576, FP8_E4M3),
        ("float8_e4m3fn", 512, FP8_E4M3),
        ("float8_e4m3fn", 320, FP8_E4M3),
        ("float8_e4m3fn", 656, FP8_DS_MLA),
        ("uint8", 656, FP8_DS_MLA),
        ("uint8", 584, FP8_MODEL1),
        ("float8_e4m3fn", 584, FP8_MODEL1),
        ("uint8", 288, FP4_V41),
    ],
)
def test_a_layout_is_inferred(dtype: str, width: int, layout: CacheLayout) -> None:
    assert infer_layout(dtype, width) is layout


@pytest.mark.parametrize("dtype", ["uint8", "float8_e4m3fn"])
def test_528_bytes_are_ambiguous(dtype: str) -> None:
    message = "layout: expected fp8_ds_mla_no_rope or fp8_v41, got None, and kv_cache of "
    with pytest.raises(InvalidArgumentError, match=re.escape(f"{message}{dtype} [..., 528] may be either")):
        infer_layout(dtype, 528)
    shape = (4, 64, 1, 528)
    array = ArrayView(0, shape, contiguous_strides(shape), dtype, "cpu", 0, None)
    for layout in (FP8_DS_MLA_NO_ROPE, FP8_V41):
        layout.check(array, "kv_cache", 512, 0)


@pytest.mark.parametrize(("dtype", "width"), [("uint8", 576), ("float32", 576), ("float8_e4m3fn", 36), ("uint8", 600)])
def test_other_arrays_are_no_cache(dtype: str, width: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"extra: expected a cache in .*fp4_v41, got {dtype} with {width} "):
        infer_layout(dtype, width, "extra")


def test_a_layout_is_found_by_its_name() -> None:
    for name, layout in LAYOUTS.items():
        assert layout.name == name
        assert find_layout(name) is find_layout(layout) is layout
        assert pickle.loads(pickle.dumps(layout)) == layout
    for wrong in ("fp8", None, 3, ["bf16"]):
        with pytest.raises(InvalidArgumentError, match=r"layout: expected one of bf16, fp16, fp8_e4m3, .*, got "):
            find_layout(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TOKENS)
def test_check_names_what_it_wants(name: str) -> None:
    layout = LAYOUTS[name]
    widths, _ = TOKENS[name]
    shape = (2, 72, 1, layout.width(*widths))

    def cache(dtype: str = layout.dtype, shape: tuple[int, ...] = shape) -> ArrayView:
        return ArrayView(0, shape, contiguous_strides(shape), dtype, "cpu", 0, None)

    layout.check(cache(), "kv_cache", *widths)
    expected = rf"kv_cache: expected {layout.dtype}.* \[num_pages, .*, {shape[-1]}\] for the layout {name}, got"
    wrong = [cache("int32"), cache(shape=shape[1:]), cache(shape=(*shape[:3], shape[3] - 1))]
    if layout.one_head:
        wrong.append(cache(shape=(2, 72, 2, shape[-1])))
    for array in wrong:
        with pytest.raises(InvalidArgumentError, match=expected):
            layout.check(array, "kv_cache", *widths)


def test_bytes_in_e4m3_are_bytes() -> None:
    stored = FP8_DS_MLA.quantise(np.ones((2, 3, 1, 576), np.float32))
    FP8_DS_MLA.check(view(stored.view(ml_dtypes.float8_e4m3fn), "kv_cache"), "kv_cache", 512, 64)
