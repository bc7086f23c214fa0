"""Sparse attention to FP8 caches on the CPU, through every interface: values against float64, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_dense import DTYPES, frobenius_error
from cases_sparse import exact_sparse
from cases_sparse_fp8 import KINDS, NAN_BYTE, Fp8SparseCase
from test_flash_mla_sparse import in_flash_mla

from cupy_mla import (
    InvalidArgumentError,
    PlanMismatchError,
    flash_mla,
    mla_sparse_decode,
    mla_sparse_prefill,
    plan_sparse_decode,
)
from cupy_mla.layouts import LAYOUTS, SPARSE_LAYOUTS

CASE = Fp8SparseCase(batch=3, seqlen_q=2)
WIDTHS = {layout.name: (512, 64 if layout.supports(512, 64) else 0) for layout in SPARSE_LAYOUTS if layout.codec}
MAX_ERROR = 3e-3


def case_of(layout: str, **changes: Any) -> Fp8SparseCase:
    latent_dim, rope_dim = WIDTHS[layout]
    return replace(CASE, layout=layout, latent_dim=latent_dim, rope_dim=rope_dim, **changes)


def check(results: tuple[Any, Any], exact: tuple[np.ndarray, ...]) -> None:
    out, lse = (np.asarray(result) for result in results)
    assert out.dtype == DTYPES["bfloat16"]
    for place in np.ndindex(out.shape[:2]):
        assert frobenius_error(out[place], exact[0][place]) < MAX_ERROR
    np.testing.assert_allclose(lse, exact[2].swapaxes(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_scales(layout: str, kind: str) -> None:
    arrays = case_of(layout, kind=kind, sinks=True).build_fp8()
    check(mla_sparse_decode(**arrays.arguments()), exact_sparse(arrays.exact))


@pytest.mark.parametrize("layout", WIDTHS)
@pytest.mark.parametrize(
    "changes",
    [
        {"page_size": 1, "num_pages": 50},
        {"page_size": 61, "num_pages": 2, "topk": 300},
        {"page_size": 576, "num_pages": 1},
        {"lengths": "token", "sinks": True},
        {"lengths": "request", "num_heads_q": 128},
        {"invalid": 1.0},
        {"topk": 0},
    ],
    ids=str,
)
def test_against_float64(layout: str, changes: dict[str, Any]) -> None:
    arrays = case_of(layout, **changes).build_fp8()
    given = arrays.arguments()
    results = mla_sparse_decode(**given)
    check(results, exact_sparse(arrays.exact))
    plan = plan_sparse_decode(**{name: value for name, value in given.items() if name != "attn_sink"})
    for ours, theirs in zip(mla_sparse_decode(**given, plan=plan), results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("layout", WIDTHS)
def test_prefill(layout: str) -> None:
    arrays = case_of(layout, seqlen_q=1, lengths="token", sinks=True, kind="any").build_fp8()
    exact = exact_sparse(arrays.exact)
    given = arrays.arguments()
    given = {
        **given,
        "q": given["q"][:, 0],
        "indices": given["indices"][:, 0],
        "topk_length": given["topk_length"][:, 0],
    }
    pages = given.pop("kv_cache")
    out, largest, lse = mla_sparse_prefill(kv=pages, **given)
    check((out[:, None], lse[:, :, None]), exact)
    np.testing.assert_allclose(largest[:, None], exact[1], rtol=1e-5, atol=1e-5)
    flat = pages.reshape(-1, *pages.shape[2:])
    if LAYOUTS[layout].page_end_bytes:
        with pytest.raises(InvalidArgumentError, match="multiple of 576 bytes"):
            mla_sparse_prefill(kv=flat, **given)
        return
    for ours, theirs in zip(mla_sparse_prefill(kv=flat, **given), (out, largest, lse), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_layout_is_inferred_where_type_and_width_leave_no_doubt() -> None:
    arrays = CASE.build_fp8()
    given = {name: value for name, value in arrays.arguments().items() if name != "layout"}
    expected = mla_sparse_decode(**arrays.arguments())
    for dtype in ("uint8", "float8_e4m3fn"):
        given["kv_cache"] = arrays.stored.view(DTYPES[dtype] if dtype in DTYPES else _dtype(dtype))
        for ours, theirs in zip(mla_sparse_decode(**given), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def _dtype(name: str) -> np.dtype:
    if name == "uint8":
        return np.dtype(np.uint8)
    return np.dtype(getattr(pytest.importorskip("ml_dtypes"), name))


@pytest.mark.parametrize(
    ("changes", "argument", "words"),
    [
        ({"layout": None, "kv_cache": np.zeros((7, 16, 1, 528), np.uint8)}, "layout", "fp8_ds_mla_no_rope or fp8_v41"),
        ({"layout": "fp8"}, "layout", "one of bf16"),
        ({"layout": "bf16"}, "kv_cache", "width 576 as in q, got 656"),
        ({"layout": "fp8_ds_mla_no_rope"}, "q", "a width that the layout fp8_ds_mla_no_rope has"),
        ({"layout": "fp4_v41"}, "q", "a width that the layout fp4_v41 has"),
        ({"layout": 3}, "layout", "a string"),
        ({"head_dim_v": 448}, "q", "a width that the layout fp8_ds_mla has, .* got 576, with head_dim_v 448"),
        ({"kv_cache": np.zeros((7, 16, 1, 640), np.uint8)}, "kv_cache", r"\[num_pages, page_size, 1, 656\]"),
        ({"kv_cache": np.zeros((7, 16, 2, 656), np.uint8)}, "kv_cache", r"\[num_pages, page_size, 1, 656\]"),
        ({"kv_cache": np.zeros((7, 16, 1, 656), np.int8)}, "kv_cache", "uint8 or float8_e4m3fn"),
        ({"kv_scale": 1.0}, "kv_scale", "None: the layout fp8_ds_mla has no scale"),
        ({"kv_scale": np.ones(2, np.float32)}, "kv_scale", "a number, or one float32"),
        ({"kv_cache": np.zeros((7, 16, 1, 664), np.uint8)[..., :656]}, "kv_cache", "multiples of 16 elements"),
    ],
    ids=str,
)
def test_wrong_arguments(changes: dict[str, Any], argument: str, words: str) -> None:
    given = {**CASE.build_fp8().arguments(), **changes}
    for function in (mla_sparse_decode, plan_sparse_decode):
        with pytest.raises(InvalidArgumentError, match=words) as caught:
            function(**{name: value for name, value in given.items() if name != "attn_sink"})
        assert caught.value.argument == argument


def test_queries_of_fp16_are_refused() -> None:
    given = CASE.build_fp8().arguments()
    with pytest.raises(InvalidArgumentError, match=r"q: expected bfloat16 .*for a cache in the layout fp8_ds_mla"):
        mla_sparse_decode(**{**given, "q": given["q"].astype(np.float16)})


def test_layouts_without_a_kernel_are_read_on_the_cpu_if_asked_for() -> None:
    case = replace(CASE, rope_dim=0)
    exact = case.build()
    layout = LAYOUTS["fp4_v41"]
    stored = layout.quantise(np.nan_to_num(exact.kv.astype(np.float32)))
    values = replace(exact, kv=layout.dequantise(stored))
    given = {"q": exact.q, "kv_cache": stored, "indices": exact.indices[:, :, 0], "layout": "fp4_v41"}
    check(mla_sparse_decode(**given, strict=False), exact_sparse(values))


def test_plans_of_other_layouts_are_refused() -> None:
    arrays = CASE.build_fp8()
    of_fp8 = plan_sparse_decode(**{k: v for k, v in arrays.arguments().items() if k != "attn_sink"})
    with pytest.raises(PlanMismatchError, match="layout"):
        mla_sparse_decode(
            arrays.exact.q, arrays.exact.kv.astype(arrays.exact.q.dtype), arrays.exact.indices, plan=of_fp8
        )


def test_torch_operators() -> None:
    torch = pytest.importorskip("torch")
    from cupy_mla import torch_ops  # noqa: F401

    def convert(array: np.ndarray) -> Any:
        if array.dtype == DTYPES["bfloat16"]:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    arrays = replace(CASE, lengths="token", sinks=True).build_fp8()
    given = arrays.arguments(convert)
    given["cache_layout"] = given.pop("layout")
    of_plan = {name: value for name, value in given.items() if name != "attn_sink"}
    plan = torch.ops.cupy_mla.plan_sparse_decode(**of_plan)
    out, lse = torch.ops.cupy_mla.mla_sparse_decode(**given, plan=plan)
    check((out.view(torch.int16).numpy().view(DTYPES["bfloat16"]), lse.numpy()), exact_sparse(arrays.exact))
    compiled = torch.compile(lambda **call: torch.ops.cupy_mla.mla_sparse_decode(**call), backend="aot_eager")
    assert torch.equal(compiled(**given)[0], out)
    whole = CASE.build_fp8().arguments(convert)
    arguments = tuple(whole[name] for name in ("q", "kv_cache", "indices"))
    torch.library.opcheck(torch.ops.cupy_mla.mla_sparse_decode.default, arguments, {"cache_layout": "fp8_ds_mla"})


def test_jax() -> None:
    jax = pytest.importorskip("jax")
    from cupy_mla import jax_ops

    arrays = replace(CASE, lengths="token", sinks=True, kind="any").build_fp8()
    given = arrays.arguments(jax.numpy.asarray)
    options = {"layout": given.pop("layout"), "head_dim_v": given.pop("head_dim_v")}
    results = jax.jit(lambda call: jax_ops.mla_sparse_decode(**call, **options))(given)
    check(results, exact_sparse(arrays.exact))
    inferred = jax.jit(lambda call: jax_ops.mla_sparse_decode(**call))(given)
    np.testing.assert_array_equal(np.asarray(inferred[1]), np.asarray(results[1]))


def test_flash_mla() -> None:
    arrays = replace(CASE, page_size=64, num_pages=2, lengths="request", sinks=True).build_fp8()
    exact = arrays.exact
    given = (exact.q, arrays.stored, None, None, 512)
    more = {"indices": exact.indices[:, :, 0], "topk_length": exact.lengths, "attn_sink": exact.sinks}
    meta, _ = flash_mla.get_mla_metadata()
    for _ in range(2):
        results = flash_mla.flash_mla_with_kvcache(*given, meta, is_fp8_kvcache=True, **more)
        check(results, in_flash_mla(exact_sparse(exact)))
    assert meta.config.is_fp8_kvcache
    older = np.zeros((132, 8), np.int32), np.zeros(4, np.int32)
    results = flash_mla.flash_mla_with_kvcache(*given, *older, is_fp8_kvcache=True, **more)
    check(results, in_flash_mla(exact_sparse(exact)))
    with pytest.raises(InvalidArgumentError, match="is_fp8_kvcache: expected True for a cache of fp8_ds_mla"):
        flash_mla.flash_mla_with_kvcache(*given, meta, is_fp8_kvcache=False, **more)
    cache = np.zeros((2, 64, 1, 576), exact.q.dtype)
    with pytest.raises(InvalidArgumentError, match="is_fp8_kvcache: expected False for a cache of bf16"):
        flash_mla.flash_mla_with_kvcache(
            exact.q, cache, None, None, 512, flash_mla.get_mla_metadata()[0], is_fp8_kvcache=True, **more
        )


def test_unused_bytes_are_nan() -> None:
    """What the cases rest on."""
    arrays = CASE.build_fp8()
    stored = arrays.stored.reshape(CASE.num_slots, -1)
    unused = np.isnan(arrays.exact.kv.reshape(CASE.num_slots, -1)).all(axis=1)
    assert unused.any()
    assert (stored[unused] == NAN_BYTE).all()
    assert np.isnan(LAYOUTS["fp8_ds_mla"].dequantise(arrays.stored).reshape(CASE.num_slots, -1)[unused]).all()
