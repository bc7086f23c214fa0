"""The NumPy backend against an independent float64 formula, on poisoned caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_dense import DTYPES, DenseCase, exact_decode, frobenius_error
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cupy_mla.call.describe import describe_decode
from cupy_mla.call.options import read_call
from cupy_mla.decode import reference
from cupy_mla.decode.reference import merge_states_reference, mla_decode_reference
from cupy_mla.lab.cases import Case

# Half a unit in the last place of the output type, and what float32 arithmetic loses.
OUT_ERROR = {"bfloat16": 2.0e-3, "float16": 3e-4, "float32": 2e-6, "float64": 1e-13}
LSE_ERROR = {"float32": 1e-5, "float64": 1e-13}


def run(case: DenseCase, arrays: Case, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    described, inputs = describe_decode(
        *read_call(
            arrays.q,
            arrays.kv_cache,
            arrays.block_table,
            arrays.cache_seqlens,
            cu_seqlens_q=arrays.cu_seqlens_q,
            **case.options,
            strict=False,
        )
    )
    return mla_decode_reference(described, inputs, case.scale, **options)


def check(case: DenseCase, **options: Any) -> None:
    arrays = case.build()
    exact_out, exact_lse = exact_decode(case, arrays)
    out, lse = run(case, arrays, **options)
    double = options.get("dtype") == np.float64
    out_dtype = "float64" if double else case.dtype
    lse_dtype = "float64" if double else "float32"
    assert (out.shape, out.dtype.name) == (exact_out.shape, out_dtype)
    assert (lse.shape, lse.dtype.name) == (exact_lse.shape, lse_dtype)
    assert frobenius_error(out, exact_out) < OUT_ERROR[out_dtype]
    np.testing.assert_allclose(lse, exact_lse, LSE_ERROR[lse_dtype], LSE_ERROR[lse_dtype])
    empty = np.isneginf(exact_lse)
    assert np.array_equal(np.isneginf(lse), empty)
    rows = np.moveaxis(empty, 0, -1) if case.ragged else empty.swapaxes(1, 2)
    assert np.all(out[rows] == 0)


SMALL = DenseCase(lengths=(70, 0, 33), num_heads_q=6, latent_dim=24, rope_dim=8, page_size=16)

CASES = {
    "model shape": DenseCase(),
    "many lengths": DenseCase(lengths=(0, 1, 63, 64, 65, 140), num_heads_q=8),
    "all empty": replace(SMALL, lengths=(0, 0)),
    "all empty, causal": replace(SMALL, lengths=(0, 0), seqlens_q=2, causal=True),
    "two queries": replace(SMALL, seqlens_q=2),
    "causal": replace(SMALL, seqlens_q=4, causal=True),
    "causal, some rows see nothing": replace(SMALL, lengths=(1, 2, 3, 0), seqlens_q=3, causal=True),
    "ragged": replace(SMALL, seqlens_q=(3, 1, 2)),
    "ragged causal": replace(SMALL, seqlens_q=(3, 1, 2), causal=True),
    "ragged with an empty request": replace(SMALL, seqlens_q=(2, 0, 5), causal=True),
    "kv heads": replace(SMALL, num_heads_kv=2),
    "kv heads, causal": replace(SMALL, num_heads_kv=3, seqlens_q=3, causal=True),
    "kv heads, ragged": replace(SMALL, num_heads_kv=6, seqlens_q=(1, 2, 3), causal=True),
    "one head": replace(SMALL, num_heads_q=1),
    "no rope": replace(SMALL, rope_dim=0),
    "pages of one": replace(SMALL, page_size=1),
    "pages of 128": replace(SMALL, page_size=128),
    "padded": replace(SMALL, padded=True, seqlens_q=2),
    "padded ragged": replace(SMALL, padded=True, seqlens_q=(2, 1, 1)),
    "scale": replace(SMALL, softmax_scale=0.7),
    "float16": replace(SMALL, dtype="float16", num_heads_kv=2, seqlens_q=2),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_the_formula(case: DenseCase, dtype: type):
    check(case, dtype=dtype)


@pytest.mark.parametrize("tokens_per_step", [1, 7, 16, 33])
def test_long_sequences_in_steps(tokens_per_step: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "TOKENS_PER_STEP", tokens_per_step)
    check(replace(SMALL, seqlens_q=4, causal=True), dtype=np.float64)
    check(replace(SMALL, num_heads_kv=2, softmax_scale=5.0), dtype=np.float32)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    group_heads=st.integers(1, 3),
    num_heads_kv=st.integers(1, 3),
    rope_dim=st.sampled_from([0, 3, 8]),
    page_size=st.sampled_from([1, 5, 16, 64]),
    causal=st.booleans(),
    ragged=st.booleans(),
    padded=st.booleans(),
    storage=st.sampled_from(["packed", "strided"]),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 2**16),
)
def test_any_case(data: Any, lengths: list[int], group_heads: int, num_heads_kv: int, ragged: bool, **fields: Any):
    seqlens_q: Any = data.draw(st.integers(1, 4))
    if ragged:
        counts = st.lists(st.integers(0, 4), min_size=len(lengths), max_size=len(lengths))
        seqlens_q = tuple(data.draw(counts.filter(any)))
    check(
        DenseCase(
            lengths=tuple(lengths),
            seqlens_q=seqlens_q,
            num_heads_q=group_heads * num_heads_kv,
            num_heads_kv=num_heads_kv,
            latent_dim=12,
            **fields,
        ),
        dtype=np.float64,
    )


def test_given_outputs_are_written():
    case = replace(SMALL, seqlens_q=2)
    arrays = case.build()
    expected_out, expected_lse = run(case, arrays)
    out_pool = np.full((3, 2, 6, 32), np.nan, expected_out.dtype)
    out = out_pool[..., :24]
    lse = np.full((3, 2, 6), np.nan, np.float32).swapaxes(1, 2)
    result = run(case, arrays, out=out, lse=lse)
    assert result[0] is out
    assert result[1] is lse
    assert np.array_equal(out, expected_out)
    assert np.array_equal(lse, expected_lse)
    assert np.all(np.isnan(out_pool[..., 24:].astype(np.float32)))


def test_pairs_give_the_same_as_packed_arrays():
    arrays = SMALL.build()
    described, inputs = describe_decode(
        *read_call(
            (arrays.q[..., :24].copy(), arrays.q[..., 24:].copy()),
            (arrays.kv_cache[..., :24].copy(), arrays.kv_cache[..., 24:].copy()),
            arrays.block_table,
            arrays.cache_seqlens,
            **SMALL.options,
            strict=False,
        )
    )
    out, lse = mla_decode_reference(described, inputs, SMALL.scale)
    expected_out, expected_lse = run(SMALL, arrays)
    assert np.array_equal(out, expected_out)
    assert np.array_equal(lse, expected_lse)


def test_inputs_are_not_changed():
    arrays = SMALL.build()
    q, cache = arrays.q.copy(), arrays.kv_cache.copy()
    run(SMALL, arrays)
    assert arrays.q.tobytes() == q.tobytes()
    assert arrays.kv_cache.tobytes() == cache.tobytes()


def test_large_scores_do_not_overflow():
    check(replace(SMALL, softmax_scale=300.0), dtype=np.float64)
    out, lse = run(case := replace(SMALL, softmax_scale=300.0), case.build())
    assert np.all(np.isfinite(out.astype(np.float32)))
    assert not np.any(np.isnan(lse))


def test_lengths_are_clamped_and_foreign_pages_are_zeros():
    case = replace(SMALL, lengths=(32, 32), poison=False)
    arrays = case.build()
    arrays.cache_seqlens[0] = 10**6  # as long as the table: 32
    arrays.cache_seqlens[1] = -5
    out, lse = run(case, arrays)
    exact_out, _ = exact_decode(case, case.build())
    assert frobenius_error(out[0], exact_out[0]) < OUT_ERROR["bfloat16"]
    assert np.all(out[1] == 0)
    assert np.all(np.isneginf(lse[1]))
    arrays.block_table[0] = [-1, 10**6]
    out, lse = run(case, arrays)
    assert np.all(out[0] == 0)  # the mean of 32 zero values
    np.testing.assert_allclose(lse[0], np.log(32), rtol=1e-6)


def test_queries_of_no_request_get_nothing():
    case = replace(SMALL, seqlens_q=(1, 1, 4))
    arrays = case.build()
    arrays.cu_seqlens_q[:] = [0, 1, 2, 4]
    out, lse = run(case, arrays)
    assert np.all(out[4:] == 0)
    assert np.all(np.isneginf(lse[:, 4:]))
    assert np.all(np.isfinite(lse[:, 2:4]))


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_arrays_of_frameworks(framework: str):
    module = pytest.importorskip(framework)
    arrays = SMALL.build()
    values = arrays.q, arrays.kv_cache, arrays.block_table, arrays.cache_seqlens
    if framework == "torch":
        converted = [
            module.from_numpy(value if value.dtype == np.int32 else value.astype(np.float32)) for value in values
        ]
        converted[:2] = [tensor.bfloat16() for tensor in converted[:2]]
    else:
        converted = [module.device_put(value, module.devices("cpu")[0]) for value in values]
    described, inputs = describe_decode(*read_call(*converted, **SMALL.options, strict=False))
    out, lse = mla_decode_reference(described, inputs, SMALL.scale)
    expected_out, expected_lse = run(SMALL, arrays)
    assert np.array_equal(out, expected_out)
    assert np.array_equal(lse, expected_lse)


# --- merging


def split_states(parts: int, dtype: type) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Partial out and lse per part and row, and the whole ones, by the formula."""
    random = np.random.default_rng(parts)
    scores = random.standard_normal((5, parts, 7)) * 4  # [rows, parts, keys]
    values = random.standard_normal((5, parts, 7, 12))
    weights = np.exp(scores)
    outs = np.einsum("rpk,rpkd->prd", weights, values) / weights.sum(2).T[..., None]
    lses = np.log(weights.sum(2)).T
    whole = np.einsum("rpk,rpkd->rd", weights, values) / weights.sum((1, 2))[:, None]
    return outs.astype(dtype), lses.astype(dtype), whole, np.log(weights.sum((1, 2)))


@pytest.mark.parametrize("parts", [1, 2, 9])
@pytest.mark.parametrize(("dtype", "error"), [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_merging_parts_gives_the_whole(parts: int, dtype: type, error: float):
    outs, lses, whole_out, whole_lse = split_states(parts, dtype)
    out, lse = merge_states_reference(outs, lses, dtype=dtype)
    assert (out.dtype, lse.dtype) == (dtype, dtype)
    np.testing.assert_allclose(out, whole_out, error, error)
    np.testing.assert_allclose(lse, whole_lse, error, error)


@pytest.mark.parametrize("nothing", [-np.inf, np.inf])
def test_parts_that_saw_nothing_are_neutral(nothing: float):
    outs, lses, whole_out, whole_lse = split_states(2, np.float64)
    outs = np.concatenate([outs, np.full_like(outs[:1], np.nan)])
    lses = np.concatenate([lses, np.full_like(lses[:1], nothing)])
    out, lse = merge_states_reference(outs, lses, dtype=np.float64)
    np.testing.assert_allclose(out, whole_out, 1e-13, 1e-13)
    np.testing.assert_allclose(lse, whole_lse, 1e-13)
    out, lse = merge_states_reference(outs[2:], lses[2:])
    assert np.all(out == 0)
    assert np.all(np.isneginf(lse))


def test_merging_keeps_the_type_of_the_parts():
    outs, lses, whole_out, _ = split_states(3, np.float32)
    out, lse = merge_states_reference(outs.astype(DTYPES["bfloat16"]), lses)
    assert (out.dtype, lse.dtype) == (DTYPES["bfloat16"], np.float32)
    assert frobenius_error(out, whole_out) < 4e-3


def test_splitting_a_cache_and_merging():
    case = replace(SMALL, lengths=(64, 32))
    arrays = case.build()
    whole_out, whole_lse = run(case, arrays, dtype=np.float64)
    outs, lses = [], []
    for columns in (slice(0, 1), slice(1, 4)):
        first = columns.start * case.page_size
        tokens = np.clip(arrays.cache_seqlens - first, 0, (columns.stop - columns.start) * case.page_size)
        part = replace(
            arrays,
            block_table=np.ascontiguousarray(arrays.block_table[:, columns]),
            cache_seqlens=tokens.astype(np.int32),
        )
        out, lse = run(case, part, dtype=np.float64)
        outs.append(out)
        lses.append(lse.swapaxes(1, 2))
    out, lse = merge_states_reference(np.stack(outs), np.stack(lses), dtype=np.float64)
    np.testing.assert_allclose(out, whole_out, 1e-12, 1e-12)
    np.testing.assert_allclose(lse.swapaxes(1, 2), whole_lse, 1e-12)
