"""Dense decoding over an e4m3 cache on the NumPy backend, and how its arguments are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_fp8 import LATENT, Fp8Case, relative_error

from cupy_mla import InvalidArgumentError, PlanMismatchError, mla_decode, plan_decode

CASE = Fp8Case((0, 1, 63, 140, 200), heads=6, seqlen_q=2, causal=True, page_size=16)


@pytest.mark.parametrize("compute", ["auto", "exact", "split", "fp8"])
@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize("planned", [False, True])
def test_against_float64(compute: str, as_array: bool, planned: bool) -> None:
    arrays = CASE.build()
    scale: Any = np.full((1,), CASE.kv_scale, np.float32) if as_array else CASE.kv_scale
    options = {"causal": True, "kv_scale": scale, "compute": compute}
    plan = plan_decode(**arrays, **options) if planned else None
    out, lse = mla_decode(**arrays, **options, plan=plan)
    exact, exact_lse = CASE.exact(arrays, compute)
    assert out.dtype == arrays["q"].dtype
    assert relative_error(out, exact) < 3e-3
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=1e-5)


def test_pairs() -> None:
    arrays = CASE.build()
    options = {"causal": True, "kv_scale": CASE.kv_scale}
    expected = mla_decode(**arrays, **options)
    for name in ("q", "kv_cache"):
        arrays[name] = arrays[name][..., :LATENT].copy(), arrays[name][..., LATENT:].copy()
    for ours, theirs in zip(mla_decode(**arrays, **options), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("compute", ["exact", "split", "fp8"])
@pytest.mark.parametrize("form", [tuple, list, lambda pair: np.array(pair, np.float32)], ids=["tuple", "list", "array"])
@pytest.mark.parametrize("pairs", [False, True])
def test_each_part_has_a_scale(compute: str, form: Any, pairs: bool) -> None:
    case = replace(CASE, kv_scale=(0.5, 0.0375))
    arrays = case.build()
    exact, exact_lse = case.exact(arrays, compute)
    if pairs:
        for name in ("q", "kv_cache"):
            arrays[name] = arrays[name][..., :LATENT].copy(), arrays[name][..., LATENT:].copy()
    options = {"causal": True, "kv_scale": form(case.kv_scale), "compute": compute}
    out, lse = mla_decode(**arrays, **options, plan=plan_decode(**arrays, **options))
    assert relative_error(out, exact) < 3e-3
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=1e-5)


def test_a_plan_is_for_one_way_to_compute() -> None:
    arrays = CASE.build()
    plan = plan_decode(**arrays, causal=True, kv_scale=1.0, compute="exact")
    with pytest.raises(PlanMismatchError, match="compute = split"):
        mla_decode(**arrays, causal=True, kv_scale=1.0, compute="split", plan=plan)


def test_a_plan_is_for_layers_with_one_scale_and_with_two() -> None:
    arrays = CASE.build()
    plan = plan_decode(**arrays, causal=True, kv_scale=0.3)
    for kv_scale in (1.0, (0.3, 0.15), (0.3, 0.2), np.array([0.3, 0.2], np.float32)):
        out, lse = mla_decode(**arrays, causal=True, kv_scale=kv_scale, plan=plan)
        expected, expected_lse = mla_decode(**arrays, causal=True, kv_scale=kv_scale)
        assert out.tobytes() == expected.tobytes()
        assert lse.tobytes() == expected_lse.tobytes()


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "no scale": ("kv_scale", {"kv_scale": None}),
    "a scale of zero": ("kv_scale", {"kv_scale": 0.0}),
    "a negative scale": ("kv_scale", {"kv_scale": -1}),
    "an infinite scale": ("kv_scale", {"kv_scale": math.inf}),
    "no number": ("kv_scale", {"kv_scale": math.nan}),
    "a text": ("kv_scale", {"kv_scale": "1"}),
    "a truth value": ("kv_scale", {"kv_scale": True}),
    "a scale of another type": ("kv_scale", {"kv_scale": np.ones(1)}),
    "three scales": ("kv_scale", {"kv_scale": np.ones(3, np.float32)}),
    "two scales with a gap": ("kv_scale", {"kv_scale": np.ones(4, np.float32)[::2]}),
    "a pair with a zero": ("kv_scale", {"kv_scale": (1.0, 0.0)}),
    "a pair of texts": ("kv_scale", {"kv_scale": ("1", "2")}),
    "three numbers": ("kv_scale", {"kv_scale": (1.0, 1.0, 1.0)}),
    "an unknown way to compute": ("compute", {"compute": "fast"}),
    "a way to compute that is no text": ("compute", {"compute": 1}),
}


@pytest.mark.parametrize("function", [mla_decode, plan_decode])
@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused(name: str, function: Any) -> None:
    argument, changes = REFUSED[name]
    with pytest.raises(InvalidArgumentError) as caught:
        function(**CASE.build(), **{"kv_scale": 1.0, **changes})
    assert caught.value.argument == argument


def test_what_belongs_to_fp8_caches_is_refused_for_others() -> None:
    arrays = CASE.build()
    arrays["kv_cache"] = np.zeros(arrays["kv_cache"].shape, arrays["q"].dtype)
    for argument, value in (("kv_scale", 1.0), ("kv_scale", np.ones(1, np.float32)), ("compute", "split")):
        with pytest.raises(InvalidArgumentError) as caught:
            mla_decode(**arrays, **{argument: value})
        assert caught.value.argument == argument
    mla_decode(**arrays, compute="exact")


def test_other_queries_and_other_bytes_are_refused() -> None:
    arrays = CASE.build()
    with pytest.raises(InvalidArgumentError, match="q: expected bfloat16 for a cache of float8_e4m3fn, got float16"):
        mla_decode(**{**arrays, "q": arrays["q"].astype(np.float16)}, kv_scale=1.0)
    rows = np.zeros((4, 16, 1, 584), np.uint8)
    with pytest.raises(InvalidArgumentError, match=r"latent_dim\+rope_dim: expected 512\+0 for fp8_model1"):
        mla_decode(**{**arrays, "kv_cache": rows})
    pair = arrays["kv_cache"][..., :LATENT], arrays["q"][:1, :1, :1, LATENT:]
    with pytest.raises(InvalidArgumentError, match="float8_e4m3fn, as the latent part"):
        mla_decode(**{**arrays, "kv_cache": pair}, kv_scale=1.0)
