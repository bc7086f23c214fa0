"""mla_sparse_prefill on the CPU: values of every kind of call, against float64. Errors are in test_sparse_errors.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_dense import DTYPES, frobenius_error
from cases_sparse import SparseArrays, SparseCase, exact_sparse

from cupy_mla import InvalidArgumentError, mla_sparse_prefill

CASE = SparseCase(batch=5, num_pages=60, page_size=1)
MAX_ERROR = {"bfloat16": 3e-3, "float16": 1e-3}
CASES = [
    CASE,
    replace(CASE, dtype="float16"),
    replace(CASE, rope_dim=0),
    replace(CASE, latent_dim=24, rope_dim=7, num_heads_q=3),
    replace(CASE, num_heads_q=1, topk=1),
    replace(CASE, num_heads_q=128, topk=130),
    replace(CASE, num_heads_kv=2),
    replace(CASE, num_heads_kv=2, lengths="token", sinks=True),
    replace(CASE, lengths="token"),
    replace(CASE, lengths="request", sinks=True),
    replace(CASE, sinks=True),
    replace(CASE, topk=0),
    replace(CASE, topk=0, lengths="token", sinks=True),
    replace(CASE, invalid=1.0, sinks=True),
    replace(CASE, invalid=0.9, topk=200),
    replace(CASE, num_pages=3, topk=200),  # every token many times over
    replace(CASE, page_size=16, num_pages=4),
    replace(CASE, page_size=61, num_pages=3, num_heads_kv=2),
]


def arguments(arrays: SparseArrays) -> dict[str, Any]:
    """As prefill takes them: no batch, and a flat kv where pages hold one token."""
    case = arrays.case
    return {
        "q": arrays.q[:, 0],
        "kv": arrays.kv[:, 0] if case.page_size == 1 else arrays.kv,
        "indices": arrays.indices[:, 0],
        "topk_length": None if arrays.lengths is None else arrays.lengths.reshape(-1),
        "attn_sink": arrays.sinks,
        "head_dim_v": case.latent_dim,
        "strict": False,
    }


def without_poison(kv: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(kv), kv.dtype.type(0.5), kv)


def check(results: tuple[np.ndarray, ...], exact: tuple[np.ndarray, ...], dtype: str) -> None:
    out, max_logits, lse = results
    assert out.dtype == DTYPES[dtype]
    assert max_logits.dtype == lse.dtype == np.float32
    for row in range(len(out)):
        assert frobenius_error(out[row], exact[0][row, 0]) < MAX_ERROR[dtype]
    np.testing.assert_allclose(max_logits, exact[1][:, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, exact[2][:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: SparseCase) -> None:
    arrays = case.build()
    check(mla_sparse_prefill(**arguments(arrays)), exact_sparse(arrays), case.dtype)


def test_softmax_scale() -> None:
    arrays = CASE.build()
    check(mla_sparse_prefill(**arguments(arrays), softmax_scale=0.3), exact_sparse(arrays, 0.3), CASE.dtype)


def test_indices_of_all_kv_heads() -> None:
    arrays = replace(CASE, num_heads_kv=2).build()
    given = arguments(arrays)
    given["kv"] = without_poison(given["kv"])  # a head's tokens are not the other's
    shared = given["indices"][:, 0]
    expected = mla_sparse_prefill(**{**given, "indices": np.stack([shared, shared], axis=1)})
    for ours, theirs in zip(mla_sparse_prefill(**{**given, "indices": shared}), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_token_without_tokens() -> None:
    arrays = replace(CASE, lengths="token").build()
    given = arguments(arrays)
    assert given["topk_length"][0] == 0
    for empty_lse in (-np.inf, np.inf):
        out, max_logits, lse = mla_sparse_prefill(**given, empty_lse=empty_lse)
        assert not out[0].any()
        assert (max_logits[0] == -np.inf).all()
        assert (lse[0] == empty_lse).all()
        assert np.isfinite(lse[-1]).all()


def test_no_query_tokens() -> None:
    given = arguments(replace(CASE, lengths="token", sinks=True).build())
    none = {name: given[name][:0] for name in ("q", "indices", "topk_length")}
    out, max_logits, lse = mla_sparse_prefill(**{**given, **none})
    assert out.shape == (0, 16, 512)
    assert max_logits.shape == lse.shape == (0, 16)


def strided(array: np.ndarray) -> np.ndarray:
    """The same values in a larger array of something else, the last dimension contiguous."""
    filler = np.array(7, array.dtype) if array.dtype.kind == "i" else np.array(np.nan, array.dtype)
    larger = np.full((*(2 * extent for extent in array.shape[:-1]), array.shape[-1] + 16), filler)
    view = larger[(*(slice(None, None, 2) for _ in array.shape[:-1]), slice(8, 8 + array.shape[-1]))]
    view[...] = array
    return view


@pytest.mark.parametrize("page_size", [1, 16])
def test_strides(page_size: int) -> None:
    arrays = replace(CASE, page_size=page_size, num_pages=10, num_heads_kv=2, lengths="token").build()
    given = arguments(arrays)
    expected = mla_sparse_prefill(**given)
    out = strided(np.full((5, 16, 512), np.nan, DTYPES["bfloat16"]))
    max_logits, lse = (np.full((16, 5), np.nan, np.float32).T for _ in range(2))
    results = mla_sparse_prefill(
        **{**given, **{name: strided(given[name]) for name in ("q", "kv", "indices")}},
        out=out, max_logits=max_logits, lse=lse,
    )  # fmt: skip
    assert results[0] is out
    assert results[1] is max_logits
    assert results[2] is lse
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_out_in_the_place_of_q() -> None:
    arrays = replace(CASE, rope_dim=0).build()
    given = arguments(arrays)
    expected, *_ = mla_sparse_prefill(**given)
    out, *_ = mla_sparse_prefill(**given, out=given["q"])
    np.testing.assert_array_equal(out, expected)


def test_nan_of_a_chosen_token_shows_where_it_is_chosen() -> None:
    arrays = replace(CASE, invalid=0.0).build()
    slot = int(arrays.indices[2, 0, 0, 5])
    arrays.kv[slot] = np.nan
    choosing = (arrays.indices[:, 0, 0] == slot).any(axis=1)
    out, _, lse = mla_sparse_prefill(**arguments(arrays))
    assert (np.isnan(out).any(axis=(1, 2)) == choosing).all()
    assert (np.isnan(lse).any(axis=1) == choosing).all()


@pytest.mark.parametrize(("length", "counted"), [(-5, 0), (10_000, 40)])
def test_lengths_out_of_range(length: int, counted: int, set_environment: Callable[..., Any]) -> None:
    set_environment(CUPY_MLA_VALIDATE=None)
    arrays = replace(CASE, lengths="token").build()
    given = arguments(arrays)
    given["kv"] = without_poison(given["kv"])
    given["topk_length"][2] = counted
    expected = mla_sparse_prefill(**given)
    given["topk_length"][2] = length
    for ours, theirs in zip(mla_sparse_prefill(**given, validate=False), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for validate in (None, True):
        with pytest.raises(InvalidArgumentError, match=r"topk_length\[2\]: expected 0 to 40"):
            mla_sparse_prefill(**given, validate=validate)
    set_environment(CUPY_MLA_VALIDATE="1")
    with pytest.raises(InvalidArgumentError, match=rf"topk_length\[2\].*got {length}"):
        mla_sparse_prefill(**given)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_results_come_back_in_the_framework_of_q(framework: str) -> None:
    module = pytest.importorskip(framework, reason=f"{framework} is not installed")
    arrays = replace(CASE, dtype="float16", lengths="token", sinks=True).build()
    given = arguments(arrays)
    expected = mla_sparse_prefill(**given)
    convert = module.from_numpy if framework == "torch" else module.numpy.asarray
    there = {name: convert(value) if isinstance(value, np.ndarray) else value for name, value in given.items()}
    for ours, theirs in zip(mla_sparse_prefill(**there), expected, strict=True):
        assert type(ours).__module__.startswith(framework[:3])
        np.testing.assert_array_equal(np.asarray(ours), theirs)
