"""Dense decoding over caches of 656 bytes a token on the NumPy backend, and how its arguments are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_fp8 import BF16, E4M3, LATENT, Fp8Case, relative_error

from cupy_mla import InvalidArgumentError, PlanMismatchError, is_supported, mla_decode, plan_decode
from cupy_mla.lab.selftest import CheckCase, run_checks
from cupy_mla.layouts import FP8_DS_MLA_NO_ROPE, FP8_V41, LAYOUTS

ROW_LAYOUTS = list(LAYOUTS)[3:]  # whose tokens hold their scales
CASE = Fp8Case((0, 1, 63, 140, 200), heads=6, seqlen_q=2, causal=True, page_size=16, kv_scale=None)


def check(case: Fp8Case, arrays: dict[str, Any], results: tuple[Any, Any]) -> None:
    exact, exact_lse = case.exact(arrays)
    assert relative_error(results[0], exact) < 3e-3
    np.testing.assert_allclose(results[1], exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("stored", [np.dtype(np.uint8), E4M3])
@pytest.mark.parametrize("planned", [False, True])
def test_against_float64(page_size: int, stored: np.dtype[Any], planned: bool) -> None:
    case = replace(CASE, page_size=page_size)
    arrays = case.build()
    given = {**arrays, "kv_cache": arrays["kv_cache"].view(stored)}
    plan = plan_decode(**given, causal=True) if planned else None
    check(case, arrays, mla_decode(**given, causal=True, plan=plan))


def test_pages_may_lie_in_a_larger_pool_and_queries_in_two_arrays() -> None:
    arrays = CASE.build()
    pool = np.full((2, *arrays["kv_cache"].shape), 0xFF, np.uint8).swapaxes(0, 1)
    pool[:, 1] = arrays["kv_cache"]
    q = arrays["q"][..., :LATENT].copy(), arrays["q"][..., LATENT:].copy()
    check(CASE, arrays, mla_decode(**{**arrays, "q": q, "kv_cache": pool[:, 1]}, causal=True))


def test_a_page_outside_the_cache_is_one_of_zeros() -> None:
    arrays = CASE.build()
    arrays["block_table"][3, 0] = 10_000
    out, lse = mla_decode(**arrays, causal=True, validate=False)
    assert np.isfinite(out.astype(np.float32)).all()
    assert np.isfinite(lse[3]).all()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a scale": ("kv_scale", {"kv_scale": 1.0}, "the layout fp8_ds_mla has no scale"),
    "another way to compute": ("compute", {"compute": "split"}, "auto or exact"),
    "queries rounded to e4m3": ("compute", {"compute": "fp8"}, "auto or exact"),
    "another latent width": ("head_dim_v", {"head_dim_v": 600}, "1 to 576"),
    "widths that rows do not have": ("kv_cache", {"head_dim_v": 256}, "fp8_ds_mla"),
    "an unknown kernel": ("kernel", {"kernel": "row_pages128"}, "row_pages32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_options_are_refused(name: str) -> None:
    argument, options, text = REFUSED[name]
    with pytest.raises(InvalidArgumentError, match=text) as caught:
        plan_decode(**CASE.build(), **options)
    assert argument in (caught.value.argument, "kv_cache")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"q": np.zeros((5, 2, 6, 576), np.float16)}, "q: expected bfloat16"),
        ({"q": np.zeros((5, 2, 6, 512), BF16)}, "fp8_ds_mla"),
        ({"kv_cache": np.zeros((40, 16, 2, 656), np.uint8)}, r"\[num_pages, page_size, 1, 656\]"),
        ({"kv_cache": np.zeros((40, 16, 1, 528), np.uint8)}, "layout: expected fp8_ds_mla_no_rope or fp8_v41, got"),
        ({"layout": "fp8_model1"}, "latent_dim.rope_dim: expected 512.0 for fp8_model1, got 512.64"),
        ({"layout": "fp8_e4m3"}, "kv_cache: expected float8_e4m3fn for the layout fp8_e4m3, got uint8"),
        ({"layout": "bf16"}, "kv_cache: expected bfloat16, the type of q"),
        ({"layout": "fp8"}, "layout: expected one of bf16"),
        ({"kv_cache": (np.zeros((40, 16, 1, 9), np.uint8),) * 2, "layout": "fp8_v41"}, "kv_cache: expected one array"),
        ({"kv_cache": (np.zeros((40, 16, 1, 656), np.uint8), np.zeros((40, 16, 1, 64), BF16))}, "the type of q"),
    ],
)
def test_other_arrays_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        mla_decode(**{**CASE.build(), **changes})


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 16, 64, 128])
@pytest.mark.parametrize("heads", [1, 16, 17, 128])
def test_a_hopper_gpu_takes_them(layout: str, heads: int, page_size: int) -> None:
    rope_dim = 64 if layout == "fp8_ds_mla" else 0
    support = is_supported(num_heads_q=heads, rope_dim=rope_dim, layout=layout, page_size=page_size)
    assert str(support).startswith("supported: kernel row_")
    assert layout in str(support)
    assert not is_supported(num_heads_q=heads, rope_dim=rope_dim, layout=layout, page_size=24)
    # Tiles as they are stored, where that is faster.
    large = is_supported(batch=128, num_heads_q=heads, rope_dim=rope_dim, layout=layout, page_size=page_size)
    has_tiles = heads <= 32 and page_size > 1 and layout in ("fp8_ds_mla", "fp8_ds_mla_no_rope")
    assert str(large).startswith(f"supported: kernel row_{'tiles' if has_tiles else 'pages'}")


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_every_layout_against_float64(layout: str, page_size: int) -> None:
    rope_dim = 64 if layout == "fp8_ds_mla" else 0
    lengths = (0, 1, 63, 140, 200)
    case = CheckCase(lengths, 6, seqlens_q=2, causal=True, rope_dim=rope_dim, page_size=page_size, layout=layout)
    [result] = run_checks("numpy", [case])
    assert result.passed, result


def test_the_layout_that_is_named_is_read() -> None:
    """528 bytes mean one thing or another."""
    rng = np.random.default_rng(0)
    arrays = {
        "q": rng.standard_normal((1, 1, 4, 512)).astype(BF16),
        "block_table": np.array([[1, 0]], np.int32),
        "cache_seqlens": np.array([30], np.int32),
    }
    values = rng.standard_normal((2, 16, 1, 512))
    outs = []
    for layout in (FP8_DS_MLA_NO_ROPE, FP8_V41):
        stored = layout.quantise(values)
        plan = plan_decode(**arrays, kv_cache=stored, layout=layout.name)
        outs.append(mla_decode(**arrays, kv_cache=stored, layout=layout.name, plan=plan)[0])
        other = FP8_V41 if layout is FP8_DS_MLA_NO_ROPE else FP8_DS_MLA_NO_ROPE
        with pytest.raises(PlanMismatchError, match="layout"):
            mla_decode(**arrays, kv_cache=stored, layout=other.name, plan=plan)
    np.testing.assert_allclose(*(out.astype(np.float32) for out in outs), atol=0.1)
