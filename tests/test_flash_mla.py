"""The functions that replace FlashMLA's: interface, values and corner values, on NumPy, torch, JAX and DLPack arrays.

The interface expected here was written down from FlashMLA's own, not read from the module under test.
"""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from cases_dense import DTYPES, DenseCase, exact_decode, frobenius_error

import cupy_mla
import cupy_mla.flash_mla as flash_mla
from cupy_mla import InvalidArgumentError, MlaError, PlanMismatchError, mla_decode
from cupy_mla.decode import flash_mla_dense
from cupy_mla.decode.plan import DecodePlan
from cupy_mla.lab.cases import Case

MAX_ERROR = {"bfloat16": 3e-3, "float16": 1e-3}
LSE_TOLERANCE = 1e-5
REQUIRED = inspect.Parameter.empty

SIGNATURES: dict[str, list[tuple[str, Any]]] = {
    "flash_mla_with_kvcache": [
        ("q", REQUIRED),
        ("k_cache", REQUIRED),
        ("block_table", REQUIRED),
        ("cache_seqlens", REQUIRED),
        ("head_dim_v", REQUIRED),
        ("tile_scheduler_metadata", REQUIRED),
        ("num_splits", None),
        ("softmax_scale", None),
        ("causal", False),
        ("is_fp8_kvcache", False),
        ("indices", None),
        ("attn_sink", None),
        ("extra_k_cache", None),
        ("extra_indices_in_kvcache", None),
        ("topk_length", None),
        ("extra_topk_length", None),
        ("out", None),
        ("enable_batch_invariant", False),
        ("use_legacy", False),
        ("kv_format", None),
        ("descale_q", None),
        ("descale_k", None),
    ],
    "flash_mla_with_kvcache_fp8": [
        ("q", REQUIRED),
        ("k_cache", REQUIRED),
        ("block_table", REQUIRED),
        ("cache_seqlens", REQUIRED),
        ("head_dim_v", REQUIRED),
        ("tile_scheduler_metadata", REQUIRED),
        ("num_splits", REQUIRED),
        ("softmax_scale", None),
        ("causal", False),
        ("descale_q", None),
        ("descale_k", None),
    ],
    "get_mla_metadata_dense_fp8": [
        ("cache_seqlens", REQUIRED),
        ("num_q_tokens_per_head_k", REQUIRED),
        ("num_heads_k", REQUIRED),
    ],
    "flash_mla_sparse_fwd": [
        ("q", REQUIRED),
        ("kv", REQUIRED),
        ("indices", REQUIRED),
        ("sm_scale", REQUIRED),
        ("d_v", 512),
        ("attn_sink", None),
        ("topk_length", None),
        ("out", None),
        ("return_log2_lse", False),
    ],
}
META_FIELDS = ["have_initialized", "config", "tile_scheduler_metadata", "num_splits"]
CONFIG_FIELDS = [
    "b",
    "s_q",
    "h_q",
    "page_block_size",
    "h_k",
    "causal",
    "is_fp8_kvcache",
    "topk",
    "extra_page_block_size",
    "extra_topk",
    "enable_batch_invariant",
]
# Rows without a visible key: an empty request, and, when causal, a request shorter than its queries.
SOME_EMPTY = DenseCase(lengths=(0, 1, 140, 64), seqlens_q=2, num_heads_q=4, causal=True)


def tensors_of(arrays: Case) -> tuple[Any, Any, Any, Any]:
    return arrays.q, arrays.kv_cache, arrays.block_table, arrays.cache_seqlens


def call(case: DenseCase, tensors: tuple[Any, ...], meta: Any, **options: Any) -> tuple[Any, Any]:
    return flash_mla.flash_mla_with_kvcache(
        *tensors, case.latent_dim, meta, softmax_scale=case.softmax_scale, causal=case.causal, **options
    )


def check(case: DenseCase, arrays: Case, out: Any, lse: Any) -> None:
    """Against the float64 formula, whose -inf are +inf in FlashMLA."""
    exact_out, exact_lse = exact_decode(case, arrays)
    exact_lse[np.isneginf(exact_lse)] = np.inf
    out = np.asarray(out, np.float64)
    assert out.shape == exact_out.shape
    assert lse.shape == exact_lse.shape
    assert frobenius_error(out, exact_out) < MAX_ERROR[case.dtype]
    np.testing.assert_allclose(np.asarray(lse), exact_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)
    empty = np.isposinf(exact_lse).swapaxes(1, 2)
    assert (out[empty] == 0).all()


# --- The interface


OUR_OWN = ("cp_world", "cp_rank", "cp_interleave", "total_seqlens")  # by name only, behind all that FlashMLA has


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_that_of_flash_mla(name: str):
    every = inspect.signature(getattr(flash_mla, name)).parameters.values()
    parameters = [parameter for parameter in every if parameter.name not in OUR_OWN]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in every if parameter.name in OUR_OWN)
    assert [(parameter.name, parameter.default) for parameter in parameters] == SIGNATURES[name]
    assert all(parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in parameters)


def test_metadata_has_the_fields_of_flash_mla():
    meta = flash_mla.FlashMLASchedMeta()
    assert [field.name for field in fields(meta) if not field.name.startswith("_")] == META_FIELDS
    assert [getattr(meta, name) for name in META_FIELDS] == [False, None, None, None]
    assert [field.name for field in fields(flash_mla.FlashMLASchedMeta.Config)] == CONFIG_FIELDS


@pytest.mark.parametrize("arguments", [(), (np.zeros(3, np.int32), 128, 1), (np.zeros(3, np.int32), 128, 1, 128, True)])
def test_metadata_needs_no_arguments_and_takes_any(arguments: tuple[Any, ...]):
    meta, num_splits = flash_mla.get_mla_metadata(*arguments)
    assert meta == flash_mla.FlashMLASchedMeta()
    assert num_splits is None
    keyword_meta, _ = flash_mla.get_mla_metadata(cache_seqlens=None, num_heads_k=1)
    assert keyword_meta is not meta


def test_all_names_are_there():
    for name in flash_mla.__all__:
        assert getattr(flash_mla, name).__doc__


# --- Values


@pytest.mark.parametrize(
    "case",
    [
        DenseCase(),
        DenseCase(dtype="float16", softmax_scale=0.05),
        DenseCase(num_heads_q=6, num_heads_kv=2, page_size=16),
        DenseCase(lengths=(140, 65), seqlens_q=3, num_heads_q=4),
        DenseCase(latent_dim=256, rope_dim=0, padded=True),
        SOME_EMPTY,
        DenseCase(lengths=(0, 0)),
    ],
    ids=lambda case: f"{case.lengths}-{case.dtype}-h{case.num_heads_q}-q{case.seqlens_q}",
)
def test_values(case: DenseCase):
    arrays = case.build()
    meta, num_splits = flash_mla.get_mla_metadata()
    out, lse = call(case, tensors_of(arrays), meta, num_splits=num_splits)
    assert (out.dtype, lse.dtype) == (DTYPES[case.dtype], np.float32)
    check(case, arrays, out, lse)


def test_only_empty_rows_differ_from_mla_decode():
    arrays = SOME_EMPTY.build()
    out, lse = call(SOME_EMPTY, tensors_of(arrays), flash_mla.get_mla_metadata()[0])
    our_out, our_lse = mla_decode(*tensors_of(arrays), **SOME_EMPTY.options)
    assert np.array_equal(out, our_out)
    unseen = np.isneginf(our_lse)
    assert np.isposinf(lse[unseen]).all()
    assert unseen.sum() == 3 * SOME_EMPTY.num_heads_q  # two queries of the empty request, one of the one with one token
    assert np.array_equal(lse[~unseen], our_lse[~unseen])


def test_positional_call_in_the_order_of_flash_mla():
    case = SOME_EMPTY
    arrays = case.build()
    meta, num_splits = flash_mla.get_mla_metadata(arrays.cache_seqlens, 2 * case.num_heads_q, 1)
    check(
        case,
        arrays,
        *flash_mla.flash_mla_with_kvcache(*tensors_of(arrays), 512, meta, num_splits, 576**-0.5, True, False),
    )


def test_given_out_is_written_and_returned():
    case = DenseCase()
    arrays = case.build()
    given = np.full((3, 1, 16, 512), np.nan, DTYPES["bfloat16"])
    out, lse = call(case, tensors_of(arrays), flash_mla.get_mla_metadata()[0], out=given)
    assert out is given
    check(case, arrays, out, lse)


def test_nan_scores_stay_nan():
    arrays = DenseCase(lengths=(3,)).build()
    q = arrays.q.copy()
    q[:, :, 1] = np.nan
    _, lse = flash_mla.flash_mla_with_kvcache(
        q, arrays.kv_cache, arrays.block_table, arrays.cache_seqlens, 512, flash_mla.get_mla_metadata()[0]
    )
    assert np.isnan(lse[0, 1]).all()
    assert np.isfinite(lse[0, [0, 2]]).all()


# --- Metadata


def test_metadata_is_filled_once_and_serves_every_layer(monkeypatch: pytest.MonkeyPatch):
    case = SOME_EMPTY
    meta, _ = flash_mla.get_mla_metadata()
    plans: list[DecodePlan] = []
    plan_decode = flash_mla_dense.plan_decode

    def counting_plan(*arguments: Any, **options: Any) -> DecodePlan:
        plans.append(plan_decode(*arguments, **options))
        return plans[-1]

    monkeypatch.setattr(flash_mla_dense, "plan_decode", counting_plan)
    for seed in range(3):
        arrays = DenseCase(**{**vars(case), "seed": seed}).build()
        check(case, arrays, *call(case, tensors_of(arrays), meta))
        assert meta.have_initialized
        assert [meta.tile_scheduler_metadata] == plans
    assert meta.config == flash_mla.FlashMLASchedMeta.Config(
        b=4,
        s_q=2,
        h_q=4,
        page_block_size=64,
        h_k=1,
        causal=True,
        is_fp8_kvcache=False,
        topk=None,
        extra_page_block_size=None,
        extra_topk=None,
    )


@pytest.mark.parametrize(
    "other",
    [
        DenseCase(lengths=(140, 64)),
        DenseCase(num_heads_q=8),
        DenseCase(num_heads_kv=2),
        DenseCase(seqlens_q=2),
        DenseCase(page_size=32),
        DenseCase(causal=True),
        DenseCase(dtype="float16"),
        DenseCase(rope_dim=128),
    ],
)
def test_metadata_of_other_calls_is_refused(other: DenseCase):
    meta, _ = flash_mla.get_mla_metadata()
    case = DenseCase()
    first = case.build()
    call(case, tensors_of(first), meta)
    with pytest.raises(PlanMismatchError) as caught:
        call(other, tensors_of(other.build()), meta)
    assert caught.value.argument == "tile_scheduler_metadata"
    check(case, first, *call(case, tensors_of(first), meta))  # still good for its own


def test_a_refused_first_call_leaves_metadata_empty():
    case = DenseCase()
    arrays = case.build()
    meta, _ = flash_mla.get_mla_metadata()
    with pytest.raises(InvalidArgumentError, match="out"):
        call(case, tensors_of(arrays), meta, out=np.zeros(3, DTYPES["bfloat16"]))
    assert meta == flash_mla.FlashMLASchedMeta()
    other = DenseCase(num_heads_q=8)
    other_arrays = other.build()
    check(other, other_arrays, *call(other, tensors_of(other_arrays), meta))


def test_other_lengths_are_refused_where_values_are_validated(set_environment: Callable[..., Any]):
    set_environment(CUPY_MLA_VALIDATE="1")
    case = DenseCase()
    arrays = case.build()
    meta, _ = flash_mla.get_mla_metadata()
    call(case, tensors_of(arrays), meta)
    check(case, arrays, *call(case, tensors_of(arrays), meta))
    arrays.cache_seqlens[1] -= 1
    with pytest.raises(PlanMismatchError, match=r"cache_seqlens\[1\]: expected 64, .* got 63"):
        call(case, tensors_of(arrays), meta)
    with pytest.raises(InvalidArgumentError, match="cache_seqlens"):
        call(case, (*tensors_of(arrays)[:3], arrays.cache_seqlens[:2]), meta)


def test_metadata_tensors_of_an_older_flash_mla():
    case = SOME_EMPTY
    arrays = case.build()
    metadata = np.full((132, 8), -7, np.int32)  # their contents do not count
    num_splits = np.full(5, -7, np.int32)
    check(case, arrays, *call(case, tensors_of(arrays), metadata, num_splits=num_splits))
    arrays.cache_seqlens[:] = (64, 0, 65, 1)
    shorter = DenseCase(**{**vars(case), "lengths": (64, 0, 65, 1)})
    arrays.block_table[:, :2] = np.arange(4, dtype=np.int32)[:, None] % arrays.kv_cache.shape[0]
    arrays.kv_cache[...] = np.random.default_rng(1).standard_normal(arrays.kv_cache.shape)
    check(shorter, arrays, *call(shorter, tensors_of(arrays), metadata, num_splits=num_splits))


@pytest.mark.parametrize(
    ("metadata", "num_splits", "argument"),
    [
        (None, None, "tile_scheduler_metadata"),
        (3, np.zeros(4, np.int32), "tile_scheduler_metadata"),
        (np.zeros((132, 8), np.int32), None, "num_splits"),
        (flash_mla.FlashMLASchedMeta(), np.zeros(4, np.int32), "num_splits"),
    ],
)
def test_metadata_that_is_none_is_refused(metadata: Any, num_splits: Any, argument: str):
    case = DenseCase()
    with pytest.raises(InvalidArgumentError) as caught:
        call(case, tensors_of(case.build()), metadata, num_splits=num_splits)
    assert caught.value.argument == argument


# --- Errors


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({0: np.zeros((3, 16, 576), DTYPES["bfloat16"])}, "q"),
        ({1: np.zeros((9, 64, 1, 576), np.float16)}, "k_cache"),
        ({1: (np.zeros((9, 64, 1, 512), DTYPES["bfloat16"]), 7)}, "k_cache[1]"),
        ({2: None}, "block_table"),
        ({3: None}, "cache_seqlens"),
        ({3: np.zeros(3, np.int64)}, "cache_seqlens"),
    ],
)
def test_errors_use_the_names_of_flash_mla(changes: dict[int, Any], argument: str):
    case = DenseCase()
    tensors = list(tensors_of(case.build()))
    for index, value in changes.items():
        tensors[index] = value
    with pytest.raises(InvalidArgumentError) as caught:
        call(case, tuple(tensors), flash_mla.get_mla_metadata()[0])
    assert caught.value.argument == argument
    assert str(caught.value).startswith(f"{argument}: expected ")


ANY_ARRAY = np.zeros(3, np.int32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attn_sink": ANY_ARRAY}, ["attn_sink"]),
        ({"extra_k_cache": ANY_ARRAY}, ["second cache", "extra_k_cache"]),
        ({"extra_indices_in_kvcache": ANY_ARRAY}, ["extra_indices_in_kvcache"]),
        ({"topk_length": ANY_ARRAY}, ["topk_length"]),
        ({"extra_topk_length": ANY_ARRAY}, ["extra_topk_length"]),
        (
            {"extra_k_cache": ANY_ARRAY, "attn_sink": ANY_ARRAY},
            ["attention sinks in dense attention (attn_sink), a second cache in dense attention (extra_k_cache)"],
        ),
    ],
)
def test_missing_features_are_named(options: dict[str, Any], words: list[str]):
    case = DenseCase()
    meta, _ = flash_mla.get_mla_metadata()
    with pytest.raises(NotImplementedError) as caught:
        call(case, (*tensors_of(case.build())[:2], None, None), meta, **options)
    assert isinstance(caught.value, MlaError)
    assert str(caught.value).startswith("flash_mla_with_kvcache: cupy_mla does not have ")
    for word in words:
        assert word in str(caught.value)
    named = [name for name, _ in SIGNATURES["flash_mla_with_kvcache"] if f"({name})" in str(caught.value)]
    assert named == [name for name, _ in SIGNATURES["flash_mla_with_kvcache"] if name in options.keys() - {"indices"}]
    assert not meta.have_initialized
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "feature"),
    [
        ("flash_attn_varlen_func", (ANY_ARRAY,) * 5, "multi-head attention"),
        ("flash_attn_varlen_qkvpacked_func", (ANY_ARRAY, ANY_ARRAY, 3, 192), "multi-head attention"),
        ("flash_attn_varlen_kvpacked_func", (), "multi-head attention"),
    ],
)
def test_missing_functions_are_named(name: str, arguments: tuple[Any, ...], feature: str):
    with pytest.raises(NotImplementedError, match=f"^{name}: cupy_mla does not have {feature}"):
        getattr(flash_mla, name)(*arguments)


# --- Frameworks


def test_numpy_calls_import_no_framework():
    script = """
import sys
import numpy as np
import cupy_mla.flash_mla as flash_mla

q, kv_cache = np.ones((1, 1, 2, 576), np.float16), np.ones((1, 64, 1, 576), np.float16)
meta, num_splits = flash_mla.get_mla_metadata()
table, lengths = np.zeros((1, 1), np.int32), np.full(1, 3, np.int32)
before = set(sys.modules)
flash_mla.flash_mla_with_kvcache(q, kv_cache, table, lengths, 512, meta, num_splits)
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert not {"torch", "jax", "cupy"} & set(output.split())


def test_names_stay_in_their_module():
    assert not set(flash_mla.__all__) & set(dir(cupy_mla))


def to_torch(array: np.ndarray) -> Any:
    torch = pytest.importorskip("torch")
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_torch(dtype: str):
    torch = pytest.importorskip("torch")
    case = DenseCase(**{**vars(SOME_EMPTY), "dtype": dtype})
    arrays = case.build()
    tensors = tuple(to_torch(array) for array in tensors_of(arrays))
    meta, num_splits = flash_mla.get_mla_metadata(tensors[3], 2 * case.num_heads_q, 1)
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            out, lse = call(case, tensors, meta, num_splits=num_splits)
        assert (out.dtype, lse.dtype) == (getattr(torch, dtype), torch.float32)
        check(case, arrays, out.double().numpy(), lse.numpy())
    metadata = torch.zeros(132, 8, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    out, lse = call(case, tensors, metadata[0], num_splits=metadata[1], out=torch.empty_like(out))
    check(case, arrays, out.double().numpy(), lse.numpy())


def test_jax():
    jax = pytest.importorskip("jax")
    arrays = SOME_EMPTY.build()
    tensors = tuple(jax.numpy.asarray(array) for array in tensors_of(arrays))
    out, lse = call(SOME_EMPTY, tensors, flash_mla.get_mla_metadata()[0])
    assert isinstance(out, jax.Array)
    assert isinstance(lse, jax.Array)
    check(SOME_EMPTY, arrays, out, lse)


def test_other_dlpack_arrays():
    tvm_ffi = pytest.importorskip("tvm_ffi")
    case = DenseCase(**{**vars(SOME_EMPTY), "dtype": "float16"})
    arrays = case.build()
    tensors = tuple(tvm_ffi.from_dlpack(np.ascontiguousarray(array)) for array in tensors_of(arrays))
    out, lse = call(case, tensors, flash_mla.get_mla_metadata()[0])
    assert isinstance(lse, tvm_ffi.Tensor)
    check(case, arrays, np.from_dlpack(out), np.from_dlpack(lse))
