"""The module that stands for FlashMLA, over e4m3 caches as vLLM's and SGLang's copies have them. NumPy backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases_fp8 import E4M3, LATENT, Fp8Case, relative_error

import cupy_mla.flash_mla as flash_mla
from cupy_mla import InvalidArgumentError, PlanMismatchError

MAX_ERROR, LSE_TOLERANCE = 3e-3, 1e-5
CASE = Fp8Case((140, 0, 64), heads=4, seqlen_q=2, causal=True)


def call(arrays: dict[str, Any], meta: Any, **options: Any) -> tuple[Any, Any]:
    return flash_mla.flash_mla_with_kvcache_fp8(*arrays.values(), LATENT, meta, None, causal=CASE.causal, **options)


def check(case: Fp8Case, arrays: dict[str, Any], out: Any, lse: Any) -> None:
    exact, exact_lse = case.exact(arrays)
    exact_lse[np.isneginf(exact_lse)] = np.inf
    assert relative_error(out, exact) < MAX_ERROR
    np.testing.assert_allclose(lse, exact_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


@pytest.mark.parametrize("make", ["array", "number"])
def test_vllms_name_decodes(make: str) -> None:
    arrays = CASE.build()
    meta, num_splits = flash_mla.get_mla_metadata_dense_fp8(arrays["cache_seqlens"], 2 * CASE.heads, 1)
    assert num_splits is None
    scale: Any = CASE.kv_scale if make == "number" else np.full(1, CASE.kv_scale, np.float32)
    for _ in range(2):  # the first call fills the metadata
        check(CASE, arrays, *call(arrays, meta, descale_k=scale))
    assert meta.config is not None
    assert meta.config.is_fp8_kvcache


def test_sglangs_form_decodes() -> None:
    arrays = CASE.build()
    meta = flash_mla.FlashMLASchedMeta()
    lengths = arrays["cache_seqlens"]
    made = flash_mla.get_mla_decoding_metadata(lengths, 8, 1, is_fp8_kvcache=True, use_legacy=True)
    meta.tile_scheduler_metadata, meta.num_splits = made
    options: dict[str, Any] = {"is_fp8_kvcache": True, "use_legacy": True, "descale_k": CASE.kv_scale}
    out, lse = flash_mla.flash_mla_with_kvcache(*arrays.values(), LATENT, meta, causal=True, **options)
    check(CASE, arrays, out, lse)


@pytest.mark.parametrize("descale_q", [0.25, np.float32(0.25), np.full(1, 0.25, np.float32)])
@pytest.mark.parametrize("softmax_scale", [None, 0.1])
def test_descale_q_is_a_factor_on_the_scores(descale_q: Any, softmax_scale: float | None) -> None:
    arrays = CASE.build()
    out, lse = call(
        arrays,
        flash_mla.get_mla_metadata()[0],
        descale_q=descale_q,
        descale_k=CASE.kv_scale,
        softmax_scale=softmax_scale,
    )
    scaled = {**arrays, "q": (arrays["q"].astype(np.float32) * 0.25).astype(arrays["q"].dtype)}
    expected = call(
        scaled, flash_mla.get_mla_metadata()[0], descale_k=CASE.kv_scale, softmax_scale=softmax_scale
    )
    np.testing.assert_allclose(lse, expected[1], rtol=1e-6)
    assert relative_error(out, expected[0].astype(np.float64)) < MAX_ERROR


def test_without_a_scale_values_are_as_stored() -> None:
    case = Fp8Case((140, 64), heads=4, seqlen_q=2, causal=True, kv_scale=1.0)
    arrays = case.build()
    check(case, arrays, *call(arrays, flash_mla.get_mla_metadata()[0]))


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_e4m3_queries_are_taken_as_they_are(framework: str) -> None:
    arrays = CASE.build()
    rounded = arrays["q"].astype(E4M3)
    given = {**arrays, "q": rounded}
    if framework == "torch":
        torch = pytest.importorskip("torch")
        given = {
            name: torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
            if array.dtype == E4M3
            else torch.from_numpy(array)
            for name, array in given.items()
        }
    if framework == "jax":
        jax = pytest.importorskip("jax")
        given = {name: jax.numpy.asarray(array) for name, array in given.items()}
    meta, _ = flash_mla.get_mla_metadata()
    for _ in range(2):
        out, lse = call(given, meta, descale_k=CASE.kv_scale)
        assert str(out.dtype).endswith("bfloat16")
        values = out.float().numpy() if framework == "torch" else np.asarray(out)
        check(CASE, {**arrays, "q": rounded}, values, np.asarray(lse))
    bf16, _ = flash_mla.get_mla_metadata()
    call(arrays, bf16, descale_k=CASE.kv_scale)
    with pytest.raises(PlanMismatchError, match="compute"):  # metadata is for one type of queries
        call(given, bf16, descale_k=CASE.kv_scale)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"descale_q": np.ones(3, np.float32)}, "descale_q"),
        ({"descale_q": "1"}, "descale_q"),
        ({"descale_k": np.ones(3, np.float32)}, "descale_k"),
        ({"descale_k": -1.0}, "descale_k"),
    ],
)
def test_a_wrong_scale_is_refused_by_its_name(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        call(CASE.build(), flash_mla.get_mla_metadata()[0], **options)
    assert caught.value.argument == argument


def test_what_belongs_to_other_caches_is_refused() -> None:
    arrays = CASE.build()
    dense = {**arrays, "kv_cache": np.zeros(arrays["kv_cache"].shape, arrays["q"].dtype)}
    for given, options, argument in (
        (dense, {"is_fp8_kvcache": True}, "is_fp8_kvcache"),
        (dense, {"descale_q": 1.0}, "descale_q"),
        (dense, {"descale_k": 1.0}, "descale_k"),
        (dense, {"kv_format": "v41"}, "kv_format"),
        (arrays, {}, "descale_k"),  # without is_fp8_kvcache
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            flash_mla.flash_mla_with_kvcache(*given.values(), LATENT, flash_mla.get_mla_metadata()[0], **options)
        assert caught.value.argument == argument


def test_metadata_is_batch_invariant_or_not() -> None:
    arrays = CASE.build()
    options: dict[str, Any] = {"is_fp8_kvcache": True, "descale_k": CASE.kv_scale, "causal": True}
    meta, _ = flash_mla.get_mla_metadata()
    for _ in range(2):
        out, lse = flash_mla.flash_mla_with_kvcache(
            *arrays.values(), LATENT, meta, enable_batch_invariant=True, **options
        )
        check(CASE, arrays, out, lse)
    assert meta.config is not None
    assert meta.config.enable_batch_invariant
    with pytest.raises(PlanMismatchError, match="enable_batch_invariant: expected True"):
        flash_mla.flash_mla_with_kvcache(*arrays.values(), LATENT, meta, **options)
