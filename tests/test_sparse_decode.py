"""mla_sparse_decode on the CPU: values of every kind of call, against float64. Errors are in test_sparse_errors.py."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_dense import DTYPES, frobenius_error
from cases_sparse import SparseArrays, SparseCase, exact_sparse
from test_sparse_prefill import MAX_ERROR, strided

from cupy_mla import (
    InvalidArgumentError,
    PlanMismatchError,
    SparsePlan,
    merge_states,
    mla_decode,
    mla_sparse_decode,
    plan_sparse_decode,
)

CASE = SparseCase(batch=3, seqlen_q=2)
CASES = [
    CASE,
    replace(CASE, dtype="float16", rope_dim=0),
    replace(CASE, latent_dim=24, rope_dim=7, num_heads_q=3),
    replace(CASE, seqlen_q=1, num_heads_q=1, batch=1, topk=1, invalid=0.0),
    replace(CASE, num_heads_q=128, topk=130),
    replace(CASE, num_heads_kv=2, lengths="token", sinks=True),
    replace(CASE, num_heads_kv=4, lengths="request"),
    replace(CASE, lengths="token"),
    replace(CASE, lengths="request", sinks=True),
    replace(CASE, topk=0, lengths="request", sinks=True),
    replace(CASE, invalid=1.0, sinks=True),
    replace(CASE, invalid=0.9, topk=200),
    replace(CASE, page_size=1, num_pages=50),
    replace(CASE, page_size=61, num_pages=2, topk=300),
    replace(CASE, page_size=576, num_pages=1),
]


def arguments(arrays: SparseArrays) -> dict[str, Any]:
    """As decode takes them; without an axis of kv heads in the indices where there is one."""
    indices = arrays.indices
    return {
        "q": arrays.q,
        "kv_cache": arrays.kv,
        "indices": indices[:, :, 0] if arrays.case.num_heads_kv == 1 else indices,
        "topk_length": arrays.lengths,
        "attn_sink": arrays.sinks,
        "head_dim_v": arrays.case.latent_dim,
        "strict": False,
    }


def plan_arguments(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "attn_sink"}


def check(results: tuple[np.ndarray, np.ndarray], exact: tuple[np.ndarray, ...], dtype: str) -> None:
    out, lse = results
    assert out.dtype == DTYPES[dtype]
    assert lse.dtype == np.float32
    for place in np.ndindex(out.shape[:2]):
        assert frobenius_error(out[place], exact[0][place]) < MAX_ERROR[dtype]
    np.testing.assert_allclose(lse, exact[2].swapaxes(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: SparseCase) -> None:
    arrays = case.build()
    given = arguments(arrays)
    results = mla_sparse_decode(**given)
    check(results, exact_sparse(arrays), case.dtype)
    planned = mla_sparse_decode(**given, plan=plan_sparse_decode(**plan_arguments(given)))
    for ours, theirs in zip(planned, results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_softmax_scale() -> None:
    arrays = CASE.build()
    check(mla_sparse_decode(**arguments(arrays), softmax_scale=0.3), exact_sparse(arrays, 0.3), CASE.dtype)


def test_all_tokens_of_every_request_are_dense_decode() -> None:
    rng = np.random.default_rng(2)
    dtype = DTYPES["bfloat16"]
    q, kv_cache = rng.normal(size=(2, 1, 16, 576)).astype(dtype), rng.normal(size=(6, 16, 1, 576)).astype(dtype)
    table, lengths = np.array([[4, 1, 0], [5, 2, 3]], np.int32), np.array([40, 33], np.int32)
    tokens = np.arange(48)
    indices = table[:, None, tokens // 16] * 16 + tokens % 16
    indices = np.ascontiguousarray(indices, np.int32)
    sparse = mla_sparse_decode(q, kv_cache, indices, topk_length=lengths)
    for ours, theirs in zip(sparse, mla_decode(q, kv_cache, table, lengths), strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), rtol=1e-2, atol=1e-5)


def test_parts_of_the_tokens_merge() -> None:
    arrays = CASE.build()
    given = arguments(arrays)
    halves = np.split(given.pop("indices"), 2, axis=2)
    outs, lses = zip(*(mla_sparse_decode(**given, indices=np.ascontiguousarray(half)) for half in halves), strict=True)
    check(merge_states(np.stack(outs), np.stack(lses)), exact_sparse(arrays), CASE.dtype)


def test_empty_lse() -> None:
    arrays = replace(CASE, lengths="request").build()
    for empty_lse in (-np.inf, np.inf):
        out, lse = mla_sparse_decode(**arguments(arrays), empty_lse=empty_lse)
        assert not out[0].any()
        assert (lse[0] == empty_lse).all()
        assert np.isfinite(lse[2]).all()


def test_strides_and_given_outputs() -> None:
    arrays = replace(CASE, num_heads_kv=2, lengths="token").build()
    given = arguments(arrays)
    expected = mla_sparse_decode(**given)
    out = strided(np.full((3, 2, 16, 512), np.nan, DTYPES["bfloat16"]))
    lse = np.full((2, 3, 16), np.nan, np.float32).transpose(1, 2, 0)
    views = {name: strided(given[name]) for name in ("q", "kv_cache", "indices")}
    results = mla_sparse_decode(**{**given, **views}, out=out, lse=lse)
    assert results[0] is out
    assert results[1] is lse
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_plan_is_for_the_shapes_that_it_was_made_with() -> None:
    given = arguments(replace(CASE, lengths="token").build())
    plan = plan_sparse_decode(**plan_arguments(given))
    assert isinstance(plan, SparsePlan)
    plan.update(given["topk_length"])
    fewer = np.ascontiguousarray(given["indices"][..., :7])
    with pytest.raises(PlanMismatchError, match="a plan for topk = 7"):
        mla_sparse_decode(**{**given, "indices": fewer, "topk_length": given["topk_length"] * 0}, plan=plan)
    with pytest.raises(PlanMismatchError, match="tokens_per_length"):
        mla_sparse_decode(**{**given, "topk_length": None}, plan=plan)
    with pytest.raises(InvalidArgumentError, match="plan: expected a SparsePlan"):
        mla_sparse_decode(**given, plan="none")
    for wrong in (None, given["topk_length"][:2], given["topk_length"].astype(np.int64), given["topk_length"].T):
        with pytest.raises(InvalidArgumentError, match="topk_length"):
            plan.update(wrong)
    without = plan_sparse_decode(**plan_arguments({**given, "topk_length": None}))
    without.update()
    with pytest.raises(InvalidArgumentError, match="topk_length: expected None"):
        without.update(given["topk_length"])
    assert pickle.loads(pickle.dumps(copy.copy(plan))).problem == plan.problem
    assert "SparsePlan(batch=3" in repr(plan)
    assert "topk" in plan._repr_html_()


@pytest.mark.parametrize(
    ("option", "value"),
    [("fixed_split_tokens", 100), ("fixed_split_tokens", 64.0), ("kernel", "wide64"), ("kernel", 64)],
)
def test_options_of_plans(option: str, value: Any) -> None:
    given = plan_arguments(arguments(CASE.build()))
    with pytest.raises(InvalidArgumentError) as caught:
        plan_sparse_decode(**given, **{option: value})
    assert caught.value.argument == option


def test_lengths_out_of_range(set_environment: Callable[..., Any]) -> None:
    set_environment(CUPY_MLA_VALIDATE=None)
    given = arguments(replace(CASE, lengths="token").build())
    given["topk_length"][1, 1] = -3
    out, lse = mla_sparse_decode(**given, validate=False)
    assert not out[1, 1].any()
    assert np.isneginf(lse[1, :, 1]).all()
    for call in (
        lambda: mla_sparse_decode(**given),
        lambda: mla_sparse_decode(**given, validate=True),
        lambda: plan_sparse_decode(**plan_arguments(given)),
        lambda: plan_sparse_decode(**plan_arguments(given), validate=True),
    ):
        with pytest.raises(InvalidArgumentError, match=r"topk_length\[1, 1\]: expected 0 to 40.*got -3"):
            call()


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_results_come_back_in_the_framework_of_q(framework: str) -> None:
    module = pytest.importorskip(framework, reason=f"{framework} is not installed")
    given = arguments(replace(CASE, dtype="float16", lengths="token", sinks=True).build())
    expected = mla_sparse_decode(**given)
    convert = module.from_numpy if framework == "torch" else module.numpy.asarray
    there = {name: convert(value) if isinstance(value, np.ndarray) else value for name, value in given.items()}
    for ours, theirs in zip(mla_sparse_decode(**there), expected, strict=True):
        assert type(ours).__module__.startswith(framework[:3])
        np.testing.assert_array_equal(np.asarray(ours), theirs)
