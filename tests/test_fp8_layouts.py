"""The FP8 layouts: their bytes, where each byte lies, and what is lost."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_mla.errors import InvalidArgumentError
from cupy_mla.fp8_layouts import E4M3_MAX, FP8_DS_MLA, FP8_E4M3, FP8_LAYOUTS, FP8_MODEL1

# e4m3 has 3 bits behind the point: half a step of the largest mantissa is 1/16 of the value; below 2^-6 the steps are
# equal, 2^-9.
ROUNDING = 1 / 16
SUBNORMAL_HALF_STEP = 2.0**-10


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def round_trip(name: str, values: np.ndarray) -> np.ndarray:
    """Values as they come back from a cache; [num_pages, page_size, d]."""
    if name == FP8_E4M3.name:
        return FP8_E4M3.dequantise(*FP8_E4M3.quantise(values))
    if name == FP8_DS_MLA.name:
        return FP8_DS_MLA.dequantise(FP8_DS_MLA.quantise(values))
    return FP8_MODEL1.dequantise(FP8_MODEL1.quantise(values), values.shape[1])


WIDTHS = {"fp8_e4m3": (512, 64), "fp8_ds_mla": (512, 64), "fp8_model1": (448, 64)}


def test_bytes_per_token() -> None:
    per_token = {name: layout.bytes_per_token(*WIDTHS[name]) for name, layout in FP8_LAYOUTS.items()}
    assert per_token == {"fp8_e4m3": 576, "fp8_ds_mla": 656, "fp8_model1": 584}
    assert FP8_MODEL1.page_bytes(64) == 65 * 576  # 64 tokens of 584 bytes fill 64.9 times 576
    assert FP8_MODEL1.page_bytes(2) == 3 * 576


@pytest.mark.parametrize("name", FP8_LAYOUTS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_round_trip_loses_no_more_than_e4m3_does(name: str, scale: float) -> None:
    latent_dim, rope_dim = WIDTHS[name]
    values = normal(3, 64, latent_dim + rope_dim) * np.float32(scale)
    back = round_trip(name, values)
    assert back.dtype == np.float32
    assert back.shape == values.shape
    # A value keeps 1/16 of itself; a small one half a subnormal step of the largest that shares its scale (which is
    # at most twice as large where scales are powers of two).
    bound = np.abs(values) * ROUNDING + 2 * np.abs(values).max() / E4M3_MAX * SUBNORMAL_HALF_STEP
    assert (np.abs(back - values) <= bound).all()
    if name != FP8_E4M3.name:  # the position stays in bfloat16
        rope = values[..., latent_dim:]
        np.testing.assert_array_equal(back[..., latent_dim:], rope.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("name", FP8_LAYOUTS)
def test_zeros_and_the_largest_value_are_exact(name: str) -> None:
    values = np.zeros((1, 4, sum(WIDTHS[name])), np.float32)
    np.testing.assert_array_equal(round_trip(name, values), values)
    values[0, 1, 7] = -E4M3_MAX * 4
    values[0, 2, 9] = E4M3_MAX * 4
    np.testing.assert_array_equal(round_trip(name, values), values)


@pytest.mark.parametrize("name", FP8_LAYOUTS)
@pytest.mark.parametrize("tiny", [1e-45, 1e-38])
def test_values_too_small_for_a_scale_become_no_infinity(name: str, tiny: float) -> None:
    back = round_trip(name, np.full((1, 4, sum(WIDTHS[name])), tiny, np.float32))
    assert np.isfinite(back).all()
    assert np.abs(back).max() <= 1e-37


def test_a_scale_serves_its_own_values_only() -> None:
    """One outlier costs the whole cache its small values in fp8_e4m3, and one block in the others."""
    values = normal(1, 4, 576) * np.float32(1e-4)
    values[0, 0, 0] = 1000.0
    relative = {name: np.abs(round_trip(name, values) - values)[0, 1:] / 1e-4 for name in ("fp8_e4m3", "fp8_ds_mla")}
    assert relative["fp8_ds_mla"].mean() < 0.05 < 0.5 < relative["fp8_e4m3"].mean()


def test_bytes_of_ds_mla_lie_where_the_layout_says() -> None:
    values = normal(2, 576)
    token = FP8_DS_MLA.quantise(values)[1].tobytes()
    assert len(token) == 656
    scales = np.frombuffer(token[512:528], "<f4")
    for block in range(4):
        part = values[1, 128 * block : 128 * (block + 1)]
        assert scales[block] == np.float32(np.abs(part).max()) / np.float32(448)
        stored = np.frombuffer(token[128 * block : 128 * (block + 1)], ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(stored, (part / scales[block]).astype(ml_dtypes.float8_e4m3fn))
    rope = np.frombuffer(token[528:], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(rope, values[1, 512:].astype(ml_dtypes.bfloat16))


def test_bytes_of_model1_lie_where_the_layout_says() -> None:
    values = normal(2, 3, 512)
    pages = FP8_MODEL1.quantise(values)
    assert pages.shape == (2, 4 * 576)
    page = pages[1]
    scales = page[3 * 576 :].reshape(-1)[: 3 * 8].reshape(3, 8)
    assert not scales[:, 7].any()
    assert not page[3 * 584 :].any()
    for token in range(3):
        stored = page[576 * token : 576 * (token + 1)]
        np.testing.assert_array_equal(
            stored[448:].view(ml_dtypes.bfloat16), values[1, token, 448:].astype(ml_dtypes.bfloat16)
        )
        for block in range(7):
            part = values[1, token, 64 * block : 64 * (block + 1)]
            scale = 2.0 ** (int(scales[token, block]) - 127)
            assert E4M3_MAX / 2 < np.abs(part).max() / scale <= E4M3_MAX
            np.testing.assert_array_equal(
                stored[64 * block : 64 * (block + 1)].view(ml_dtypes.float8_e4m3fn),
                (part / np.float32(scale)).astype(ml_dtypes.float8_e4m3fn),
            )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FP8_DS_MLA.quantise(normal(2, 575)), "values: expected 576 as the last axis for fp8_ds_mla, got [2,"),
        (lambda: FP8_MODEL1.quantise(normal(2, 512)), "values: expected [num_pages, page_size, 512], got [2, 512]"),
        (lambda: FP8_MODEL1.quantise(normal(1, 2, 576)), "values: expected 512 as the last axis for fp8_model1"),
        (lambda: FP8_DS_MLA.dequantise(np.zeros((2, 576), np.uint8)), "stored: expected uint8 [..., 656], got uint8"),
        (lambda: FP8_DS_MLA.dequantise(np.zeros((2, 656), np.int8)), "stored: expected uint8 [..., 656], got int8"),
        (lambda: FP8_MODEL1.dequantise(np.zeros((2, 656), np.uint8), 64), "stored: expected uint8 [..., 37440]"),
        (
            lambda: FP8_MODEL1.dequantise(np.zeros(37440, np.uint8), 64),
            "stored: expected uint8 [num_pages, 37440], got",
        ),
        (lambda: FP8_E4M3.dequantise(np.zeros((2, 576), np.uint8), 1.0), "stored: expected float8_e4m3fn, got uint8"),
        (
            lambda: FP8_DS_MLA.bytes_per_token(448, 64),
            "latent_dim+rope_dim: expected 512+64 for fp8_ds_mla, got 448+64",
        ),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=re.escape(message)):
        call()
