"""What the quantised layouts store: every code, where each byte lies, and what is lost."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_mla.errors import InvalidArgumentError
from cupy_mla.layouts import (
    BF16,
    FP4_V41,
    FP8_DS_MLA,
    FP8_DS_MLA_NO_ROPE,
    FP8_E4M3,
    FP8_MODEL1,
    FP8_V41,
    FP16,
    LAYOUTS,
)

E4M3_MAX, E2M1_MAX = 448.0, 6.0
# e4m3 has 3 bits behind the point: half a step of the largest mantissa is 1/16 of the value; below 2^-6 the steps are
# equal, 2^-9.
ROUNDING = 1 / 16
SUBNORMAL_HALF_STEP = 2.0**-10
SMALLEST_SCALE = 2.0**-13  # 2^ceil(log2(1e-4))
E2M1_NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])

WIDTHS = {
    "fp8_e4m3": 576,
    "fp8_ds_mla": 576,
    "fp8_ds_mla_no_rope": 512,
    "fp8_model1": 512,
    "fp8_v41": 512,
    "fp4_v41": 512,
}
IN_BLOCKS = {  # coded values, values that share a scale
    "fp8_ds_mla": (512, 128),
    "fp8_ds_mla_no_rope": (512, 128),
    "fp8_model1": (448, 64),
    "fp8_v41": (512, 32),
    "fp4_v41": (512, 16),
}
E4M3_IN_BLOCKS = sorted(set(IN_BLOCKS) - {"fp4_v41"})


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def store(name: str, values: np.ndarray) -> tuple[np.ndarray, np.float32 | None]:
    layout = LAYOUTS[name]
    scale = FP8_E4M3.choose_scale(values) if layout is FP8_E4M3 else None
    return layout.quantise(values, scale), scale


def round_trip(name: str, values: np.ndarray) -> np.ndarray:
    """Values as they come back from a cache; [num_pages, page_size, 1, d]."""
    stored, scale = store(name, values)
    return LAYOUTS[name].dequantise(stored, scale)


def e4m3_number(code: int) -> float:
    """By the format's definition: sign, 4 bits of exponent (bias 7), 3 bits of mantissa."""
    sign, exponent, mantissa = (-1.0) ** (code >> 7), code >> 3 & 0xF, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3_NUMBERS = np.array([e4m3_number(code) for code in range(256)])


def test_the_16_bit_layouts_only_round() -> None:
    values = normal(2, 3, 4, 80)
    for layout, dtype in ((BF16, ml_dtypes.bfloat16), (FP16, np.float16)):
        stored = layout.quantise(values)
        assert stored.dtype == dtype
        np.testing.assert_array_equal(stored, values.astype(dtype))
        np.testing.assert_array_equal(layout.dequantise(stored), values.astype(dtype).astype(np.float32))
    assert np.isposinf(FP16.quantise(np.full((1, 1, 1, 8), 1e5, np.float32))).all()


@pytest.mark.parametrize(
    ("name", "scale"), [(name, scale) for name in WIDTHS for scale in (1e-6, 1.0, 200.0 if name == "fp4_v41" else 3e4)]
)
def test_round_trip_loses_no_more_than_the_codes_do(name: str, scale: float) -> None:
    values = normal(3, 64, 1, WIDTHS[name]) * np.float32(scale)
    back = round_trip(name, values)
    assert back.dtype == np.float32
    assert back.shape == values.shape
    coded, block = IN_BLOCKS.get(name, (WIDTHS[name], WIDTHS[name]))
    error = np.abs(back - values)[..., :coded].astype(np.float64)
    exact = np.abs(values[..., :coded]).astype(np.float64)
    largest = exact.reshape(3, 64, 1, -1, block).max(axis=-1).repeat(block, axis=-1)
    if name == "fp4_v41":
        # The widest gap of e2m1 is from 4 to 6, a third of 6; an e4m3 scale is at most an eighth larger than needed,
        # or one of its smallest steps.
        needed = np.maximum(largest / E2M1_MAX * (1 + 1 / 8), largest / E2M1_MAX + 2.0**-9)
        assert (error <= needed).all()
        return
    # A value keeps 1/16 of itself; a small one half a subnormal step of the scale, which is at most twice what the
    # largest needs where it is a power of two.
    scales = exact.max() / E4M3_MAX if name == "fp8_e4m3" else np.maximum(2 * largest / E4M3_MAX, SMALLEST_SCALE)
    assert (error <= exact * ROUNDING * (1 + 1e-6) + scales * SUBNORMAL_HALF_STEP).all()
    rope = values[..., coded:]  # what has no code stays in bfloat16
    np.testing.assert_array_equal(back[..., coded:], rope.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_fp4_holds_no_more_than_6_times_448() -> None:
    values = np.full((1, 1, 1, 512), 6.0 * 448, np.float32)
    np.testing.assert_array_equal(round_trip("fp4_v41", values), values)
    np.testing.assert_array_equal(round_trip("fp4_v41", -100 * values), -values)


@pytest.mark.parametrize("name", WIDTHS)
def test_zeros_and_the_largest_value_are_exact(name: str) -> None:
    values = np.zeros((1, 4, 1, WIDTHS[name]), np.float32)
    np.testing.assert_array_equal(round_trip(name, values), values)
    largest = E2M1_MAX if name == "fp4_v41" else E4M3_MAX
    values[0, 1, 0, 7] = -largest * 4
    values[0, 2, 0, 9] = largest * 4
    np.testing.assert_array_equal(round_trip(name, values), values)


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("tiny", [1e-45, 1e-38])
def test_values_too_small_for_a_scale_become_no_infinity(name: str, tiny: float) -> None:
    back = round_trip(name, np.full((1, 4, 1, WIDTHS[name]), tiny, np.float32))
    assert np.isfinite(back).all()
    assert np.abs(back).max() <= 1e-37


def test_a_scale_serves_its_own_values_only() -> None:
    """One outlier costs the whole cache its small values in fp8_e4m3, and one block in the others."""
    values = normal(1, 4, 1, 576) * np.float32(1e-2)
    values[0, 0, 0, 0] = 1e5
    relative = {name: np.abs(round_trip(name, values) - values)[0, 1:] / 1e-2 for name in ("fp8_e4m3", "fp8_ds_mla")}
    assert relative["fp8_ds_mla"].mean() < 0.05 < 0.5 < relative["fp8_e4m3"].mean()


@pytest.mark.parametrize("exponent", [-3, 0, 5])
@pytest.mark.parametrize("name", E4M3_IN_BLOCKS)
def test_scales_are_the_smallest_powers_of_two_that_suffice(name: str, exponent: int) -> None:
    """2^ceil(log2(amax / 448)), also just beside a power of two, where a logarithm in float32 would be rounded."""
    edge = np.float32(E4M3_MAX * 2.0**exponent)
    for largest, expected in (
        (np.nextafter(edge, np.float32(0)), exponent),
        (edge, exponent),
        (edge * np.float32(1.001), exponent + 1),
    ):
        values = np.full((1, 1, 1, WIDTHS[name]), largest, np.float32)
        _, scales, _ = LAYOUTS[name].fields(LAYOUTS[name].quantise(values))
        blocks = IN_BLOCKS[name][0] // IN_BLOCKS[name][1]
        if name.startswith("fp8_ds_mla"):
            np.testing.assert_array_equal(scales[0, 0].view("<f4"), np.full(4, 2.0**expected))
        else:
            np.testing.assert_array_equal(scales[0, 0, :blocks], np.full(blocks, 127 + expected))


def test_bytes_of_e4m3_are_values_over_the_scale() -> None:
    values = normal(2, 3, 1, 320)
    scale = FP8_E4M3.choose_scale(values)
    assert scale == np.float32(np.abs(values).max()) / np.float32(448)
    stored = FP8_E4M3.quantise(values, 0.37)
    assert stored.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(stored, (values / np.float32(0.37)).astype(ml_dtypes.float8_e4m3fn))
    np.testing.assert_array_equal(FP8_E4M3.dequantise(stored, 0.37), stored.astype(np.float32) * np.float32(0.37))
    # A scale that was chosen for other values: what is too large is the largest.
    back = FP8_E4M3.dequantise(FP8_E4M3.quantise(values, 2.0**-12), 2.0**-12)
    assert np.abs(back).max() == 448 * 2.0**-12


@pytest.mark.parametrize(("layout", "rope"), [(FP8_DS_MLA, 64), (FP8_DS_MLA_NO_ROPE, 0)])
def test_bytes_of_ds_mla_lie_where_the_layout_says(layout: Any, rope: int) -> None:
    values = normal(1, 2, 1, 512 + rope)
    token = layout.quantise(values)[0, 1, 0].tobytes()
    assert len(token) == 528 + 2 * rope
    scales = np.frombuffer(token[512:528], "<f4")
    for block in range(4):
        part = values[0, 1, 0, 128 * block : 128 * (block + 1)]
        assert scales[block] == 2.0 ** math.ceil(math.log2(np.abs(part).max() / 448))
        stored = np.frombuffer(token[128 * block : 128 * (block + 1)], ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(stored, (part / scales[block]).astype(ml_dtypes.float8_e4m3fn))
    found = np.frombuffer(token[528:], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found, values[0, 1, 0, 512:].astype(ml_dtypes.bfloat16))


def page_memory(stored: np.ndarray) -> np.ndarray:
    """The bytes of a cache [num_pages, page stride], with those behind the last token of a page."""
    shape = (stored.shape[0], stored.strides[0])
    return np.lib.stride_tricks.as_strided(stored, shape, (stored.strides[0], 1), writeable=False)


def test_bytes_of_model1_lie_where_the_layout_says() -> None:
    values = normal(2, 3, 1, 512)
    stored = FP8_MODEL1.quantise(values)
    assert stored.shape == (2, 3, 1, 584)
    assert stored.strides[0] == 4 * 576
    page = page_memory(stored)[1]
    scales = page[3 * 576 :].reshape(-1)[: 3 * 8].reshape(3, 8)
    assert not scales[:, 7].any()
    assert not page[3 * 584 :].any()
    for token in range(3):
        codes = page[576 * token : 576 * (token + 1)]
        np.testing.assert_array_equal(
            codes[448:].view(ml_dtypes.bfloat16), values[1, token, 0, 448:].astype(ml_dtypes.bfloat16)
        )
        for block in range(7):
            part = values[1, token, 0, 64 * block : 64 * (block + 1)]
            scale = 2.0 ** (int(scales[token, block]) - 127)
            assert E4M3_MAX / 2 < np.abs(part).max() / scale <= E4M3_MAX
            np.testing.assert_array_equal(
                codes[64 * block : 64 * (block + 1)].view(ml_dtypes.float8_e4m3fn),
                (part / np.float32(scale)).astype(ml_dtypes.float8_e4m3fn),
            )


def test_bytes_of_v41_lie_where_the_layout_says() -> None:
    values = normal(2, 3, 1, 512)
    token = FP8_V41.quantise(values)[1, 2, 0]
    assert token.shape == (528,)
    for block in range(16):
        part = values[1, 2, 0, 32 * block : 32 * (block + 1)]
        scale = 2.0 ** (int(token[512 + block]) - 127)
        assert E4M3_MAX / 2 < np.abs(part).max() / scale <= E4M3_MAX
        codes = token[32 * block : 32 * (block + 1)].view(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(codes, (part / np.float32(scale)).astype(ml_dtypes.float8_e4m3fn))


def test_bytes_of_fp4_lie_where_the_layout_says() -> None:
    values = normal(2, 3, 1, 512)
    token = FP4_V41.quantise(values)[1, 2, 0]
    assert token.shape == (288,)
    numbers = np.concatenate([E2M1_NUMBERS, -E2M1_NUMBERS])
    for block in range(32):
        part = values[1, 2, 0, 16 * block : 16 * (block + 1)]
        scale = E4M3_NUMBERS[token[256 + block]]
        needed = np.abs(part).max() / 6
        assert E4M3_NUMBERS[token[256 + block] - 1] < needed <= scale
        for index, value in enumerate(part):
            byte = token[8 * block + index // 2]
            found = numbers[byte & 15 if index % 2 == 0 else byte >> 4]
            assert abs(found - value / scale) == np.abs(numbers - value / scale).min()


@pytest.mark.parametrize("scale", [1.0, 0.3, 1e-30, 2.0**100])
def test_every_code_of_a_scaled_tensor(scale: float) -> None:
    stored = np.arange(256, dtype=np.uint8).reshape(1, 2, 1, 128).view(ml_dtypes.float8_e4m3fn)
    expected = E4M3_NUMBERS.astype(np.float32) * np.float32(scale)
    back = FP8_E4M3.dequantise(stored, scale)
    np.testing.assert_array_equal(back.reshape(-1), expected)
    again = FP8_E4M3.quantise(back, scale)
    same = ~np.isnan(E4M3_NUMBERS)
    np.testing.assert_array_equal(again.view(np.uint8).reshape(-1)[same], np.flatnonzero(same))
    assert np.isnan(again.astype(np.float32).reshape(-1)[~same]).all()


def scale_bytes_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Every scale that a format of 8 bits has, or a choice of float32: their bytes [n, bytes], and what they mean."""
    if name.startswith("fp8_ds_mla"):
        scales = np.array([1, 0.3, 1 / 3, 1e-30, -1.7, 0, 3e38, 2.0**-140, np.nan, np.inf], "<f4")
        return scales.view(np.uint8).reshape(-1, 4), scales.astype(np.float64)
    codes = np.arange(256, dtype=np.uint8)
    numbers = E4M3_NUMBERS if name == "fp4_v41" else 2.0 ** (codes.astype(np.float64) - 127)
    if name != "fp4_v41":
        numbers[255] = np.nan
    return codes[:, None], numbers


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_every_code_with_every_scale(name: str) -> None:
    """Stored value times scale, in float64 and rounded once; NaN where either is."""
    layout = LAYOUTS[name]
    coded, block = IN_BLOCKS[name]
    scale_bytes, scales = scale_bytes_of(name)
    numbers = E4M3_NUMBERS
    if name == "fp4_v41":
        pairs = np.concatenate([E2M1_NUMBERS, -E2M1_NUMBERS])
        numbers = np.stack([np.tile(pairs, 16), np.repeat(pairs, 16)], axis=-1).reshape(-1)
    # A token has too few values for all codes: 256 bytes are spread over as many tokens as they take, for each scale.
    codes_per_token = coded // (2 if name == "fp4_v41" else 1)
    tokens = math.ceil(256 / codes_per_token)
    stored = layout.quantise(np.zeros((scales.size, tokens, 1, WIDTHS[name]), np.float32))
    codes, scale_field, uncoded = layout.fields(stored)
    order = np.resize(np.arange(256, dtype=np.uint8), tokens * codes_per_token)
    codes[...] = order.reshape(1, tokens, codes_per_token)
    blocks = coded // block
    scale_field[..., : blocks * scale_bytes.shape[1]] = np.tile(scale_bytes[:, None], (1, tokens, blocks))
    uncoded[...] = np.frombuffer(np.float32(-1.5).astype(ml_dtypes.bfloat16).tobytes() * (uncoded.shape[-1] // 2), "u1")
    back = layout.dequantise(stored)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (scales[:, None] * np.resize(numbers, tokens * coded)).astype(np.float32)
    np.testing.assert_array_equal(back[..., 0, :coded].reshape(scales.size, -1), expected)
    np.testing.assert_array_equal(back[..., coded:], np.float32(-1.5))


@pytest.mark.parametrize("name", E4M3_IN_BLOCKS)
def test_a_second_round_trip_loses_nothing(name: str) -> None:
    """(The bytes may differ: a block whose largest code was rounded to 224 gets half the scale.)"""
    once = round_trip(name, normal(2, 5, 1, WIDTHS[name]))
    np.testing.assert_array_equal(round_trip(name, once), once)


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize(("poison", "expected"), [(np.nan, np.nan), (np.inf, 1), (-np.inf, -1)])
def test_nan_stays_and_infinity_is_the_largest(name: str, poison: float, expected: float) -> None:
    values = normal(1, 3, 1, WIDTHS[name])
    clean = round_trip(name, values)
    poisoned = values.copy()
    poisoned[0, 1, 0, 5] = poison
    back = round_trip(name, poisoned)
    if np.isnan(expected):
        assert np.isnan(back[0, 1, 0, 5])
    else:
        assert np.sign(back[0, 1, 0, 5]) == expected
        assert np.isfinite(back[0, 1, 0, 5])
    harmed = np.zeros(values.shape, bool)
    harmed[0, 1, 0, : 16 if name == "fp4_v41" else 128] = True  # the values that share the scale
    np.testing.assert_array_equal(back[~harmed], clean[~harmed])
    if name != "fp4_v41":
        assert np.isnan(back).sum() == np.isnan(expected)
    else:
        assert np.isnan(back).sum() == 16 * np.isnan(expected)


def test_bytes_without_meaning_do_not_reach_a_value() -> None:
    """Every eighth scale byte of fp8_model1, and what pads its pages; scales outside of them are another matter."""
    values = normal(3, 5, 1, 512)
    stored = FP8_MODEL1.quantise(values)
    clean = FP8_MODEL1.dequantise(stored)
    memory = np.full((3, FP8_MODEL1.page_bytes(5, 512, 0)), 0xFF, np.uint8)
    poisoned = memory[:, : 5 * 584].reshape(3, 5, 1, 584)
    poisoned[...] = stored
    scales = FP8_MODEL1.fields(poisoned)[1]
    scales[..., 7] = 0xFF
    np.testing.assert_array_equal(FP8_MODEL1.dequantise(poisoned), clean)
    scales[1, 2, 0] = 0xFF
    assert np.isnan(FP8_MODEL1.dequantise(poisoned)).sum() == 64


@pytest.mark.parametrize("name", WIDTHS)
def test_strided_caches_are_read(name: str) -> None:
    """A view into a larger pool, and bytes that come as e4m3."""
    values = normal(4, 6, 1, WIDTHS[name])
    stored, scale = store(name, values)
    layout = LAYOUTS[name]
    pool = np.full((4, 3, stored.strides[0]), 0xFF, np.uint8)
    inside = pool[:, 1, : 6 * stored.shape[-1]].reshape(stored.shape).view(stored.dtype)
    inside[...] = stored
    expected = layout.dequantise(stored, scale)
    np.testing.assert_array_equal(layout.dequantise(inside, scale), expected)
    np.testing.assert_array_equal(layout.dequantise(inside.view(ml_dtypes.float8_e4m3fn), scale), expected)
    np.testing.assert_array_equal(layout.dequantise(inside[::2], scale), expected[::2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: FP8_DS_MLA.quantise(normal(1, 2, 1, 575)),
            "values: expected [num_pages, page_size, 1, 576] for fp8_ds_mla, got [1, 2, 1, 575]",
        ),
        (lambda: FP8_MODEL1.quantise(normal(2, 512)), "values: expected [num_pages, page_size, num_heads_kv, d], got"),
        (lambda: FP8_MODEL1.quantise(normal(1, 2, 1, 576)), "values: expected [num_pages, page_size, 1, 512] for fp8_"),
        (lambda: FP8_V41.quantise(normal(1, 2, 2, 512)), "[num_pages, page_size, 1, 512] for fp8_v41, got [1, 2, 2,"),
        (
            lambda: FP8_DS_MLA.dequantise(np.zeros((1, 2, 1, 576), np.uint8)),
            "stored: expected uint8 or float8_e4m3fn [num_pages, page_size, 1, 656] for the layout fp8_ds_mla, got u",
        ),
        (lambda: FP8_DS_MLA.dequantise(np.zeros((1, 2, 1, 656), np.int8)), "stored: expected uint8 or float8_e4m3fn ["),
        (lambda: FP8_MODEL1.dequantise(np.zeros((2, 656), np.uint8)), "[num_pages, page_size, 1, 584]"),
        (
            lambda: FP8_MODEL1.dequantise(np.zeros((2, 64, 1, 584), np.uint8)),
            "stored: expected a page stride that is a multiple of 576 bytes, got 37376 bytes",
        ),
        (
            lambda: FP8_MODEL1.dequantise(np.zeros((2, 72, 1, 592), np.uint8)[..., :584]),
            "stored: expected pages without gaps for the layout fp8_model1",
        ),
        (
            lambda: FP8_E4M3.dequantise(np.zeros((1, 2, 1, 576), np.uint8), 1.0),
            "stored: expected float8_e4m3fn, got uint8",
        ),
        (lambda: BF16.dequantise(np.zeros((1, 2, 1, 576), np.float16)), "stored: expected bfloat16, got float16"),
        (lambda: FP8_E4M3.quantise(normal(1, 2, 1, 64)), "scale: expected a finite number above 0 for fp8_e4m3, got N"),
        (lambda: FP8_E4M3.quantise(normal(1, 2, 1, 64), -1.0), "scale: expected a finite number above 0 for fp8_e4m3"),
        (lambda: FP8_E4M3.quantise(normal(1, 2, 1, 64), np.inf), "scale: expected a finite number above 0 for fp8_e"),
        (lambda: FP8_V41.quantise(normal(1, 2, 1, 512), 1.0), "scale: expected None: fp8_v41 has none beside the cac"),
        (
            lambda: FP8_DS_MLA.token_bytes(448, 64),
            "latent_dim+rope_dim: expected 512+64 for fp8_ds_mla, got 448+64",
        ),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=re.escape(message)):
        call()


def test_the_former_address_has_the_same_layouts() -> None:
    from cupy_mla import fp8_layouts

    assert [*fp8_layouts.FP8_LAYOUTS] == ["fp8_e4m3", "fp8_ds_mla", "fp8_model1"]
    assert all(layout is LAYOUTS[name] for name, layout in fp8_layouts.FP8_LAYOUTS.items())
    assert fp8_layouts.FP8_DS_MLA is FP8_DS_MLA
    assert fp8_layouts.E4M3_MAX == E4M3_MAX
