"""`mla_decode` on the NumPy backend: what it adds to the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases_dense import DTYPES, DenseCase, exact_decode

from cupy_mla import InvalidArgumentError, append_tokens, merge_states, mla_decode, plan_decode

# Requests with no key, with fewer keys than queries, and with more.
CAUSAL = DenseCase(lengths=(0, 1, 3, 140), seqlens_q=4, num_heads_q=4, causal=True)
CASES = {
    "no mask": DenseCase(lengths=(0, 140, 0)),
    "causal": CAUSAL,
    "ragged": DenseCase(lengths=(2, 0, 140), seqlens_q=(4, 2, 3), num_heads_q=6, num_heads_kv=2, causal=True),
    "all empty": DenseCase(lengths=(0, 0), num_heads_q=2),
    "none empty": DenseCase(lengths=(65, 1), num_heads_q=2),
}


@pytest.mark.parametrize("given", [False, True], ids=["new outputs", "given outputs"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_empty_lse(case: DenseCase, given: bool) -> None:
    arrays = case.build()
    tensors = arrays.q, arrays.kv_cache, arrays.block_table, arrays.cache_seqlens
    exact_out, exact_lse = exact_decode(case, arrays)
    unseen = np.isneginf(exact_lse)
    results = {}
    for empty_lse in (-math.inf, math.inf):
        outputs: dict[str, Any] = {}
        if given:
            outputs["out"] = np.full(exact_out.shape, np.nan, DTYPES[case.dtype])
            outputs["lse"] = np.full(exact_lse.shape, np.nan, np.float32)
        out, lse = mla_decode(
            *tensors, cu_seqlens_q=arrays.cu_seqlens_q, **case.options, **outputs, empty_lse=empty_lse
        )
        if given:
            assert out is outputs["out"]
            assert lse is outputs["lse"]
        assert (lse[unseen] == empty_lse).all()
        assert np.isfinite(lse[~unseen]).all()
        assert (out[np.moveaxis(unseen, 0, -1) if case.ragged else unseen.swapaxes(1, 2)] == 0).all()
        results[empty_lse] = out, lse[~unseen]
    for neutral, flash_mla in zip(results[-math.inf], results[math.inf], strict=True):
        assert np.array_equal(neutral, flash_mla)


@pytest.mark.parametrize("value", [0.0, math.nan, 1e38, 1, None, "inf"], ids=repr)
def test_empty_lse_is_one_of_two_values(value: Any) -> None:
    arrays = CAUSAL.build()
    lse = np.full((4, 4, 4), np.nan, np.float32)
    with pytest.raises(InvalidArgumentError, match=r"empty_lse: expected -inf or \+inf, got ") as caught:
        mla_decode(arrays.q, arrays.kv_cache, arrays.block_table, arrays.cache_seqlens, lse=lse, empty_lse=value)
    assert caught.value.got == repr(value)
    assert np.isnan(lse).all()


BAD_PLAN_OPTIONS: dict[str, tuple[str, Any]] = {
    "a fraction": ("max_seqlen_k", 64.0),
    "below 0": ("max_seqlen_k", -1),
    "a truth value": ("max_seqlen_k", True),
    "no whole tile": ("fixed_split_tokens", 63),
    "nothing": ("fixed_split_tokens", 0),
    "a fraction of a split": ("fixed_split_tokens", 64.0),
    "an unknown kernel": ("kernel", "wide"),
    "a kernel that is no string": ("kernel", 64),
    "a stream that is no number": ("stream", object()),
}


@pytest.mark.parametrize("name", BAD_PLAN_OPTIONS)
def test_options_of_a_plan_are_checked_on_the_cpu_too(name: str) -> None:
    argument, value = BAD_PLAN_OPTIONS[name]
    arrays = CAUSAL.build()
    tensors = arrays.q, arrays.kv_cache, arrays.block_table, arrays.cache_seqlens
    with pytest.raises(InvalidArgumentError) as caught:
        plan_decode(*tensors, **{argument: value})
    assert caught.value.argument == argument


def test_an_output_in_the_place_of_the_query() -> None:
    arrays = CAUSAL.build()
    tensors = arrays.kv_cache, arrays.block_table, arrays.cache_seqlens
    expected, _ = mla_decode(arrays.q, *tensors, **CAUSAL.options)
    q = arrays.q.copy()
    out, _ = mla_decode(q, *tensors, **CAUSAL.options, out=q[..., : CAUSAL.latent_dim])
    assert np.shares_memory(out, q)
    np.testing.assert_array_equal(out, expected)


def test_validation_knows_the_maximum_of_the_plan(set_environment: Callable[..., Any]) -> None:
    arrays = CAUSAL.build()
    tensors = arrays.q, arrays.kv_cache, arrays.block_table, arrays.cache_seqlens
    arrays.cache_seqlens[:] = (0, 0, 0, 100)
    plan = plan_decode(*tensors, causal=True, head_dim_v=CAUSAL.latent_dim, max_seqlen_k=100)
    mla_decode(*tensors, **CAUSAL.options, plan=plan, validate=True)
    arrays.cache_seqlens[3] = 101
    with pytest.raises(InvalidArgumentError, match=r"0 to 100 .max_seqlen_k of the plan") as caught:
        mla_decode(*tensors, **CAUSAL.options, plan=plan, validate=True)
    assert caught.value.argument == "cache_seqlens[3]"
    set_environment(CUPY_MLA_VALIDATE="1")
    with pytest.raises(InvalidArgumentError, match="max_seqlen_k of the plan"):
        plan_decode(*tensors, causal=True, head_dim_v=CAUSAL.latent_dim, max_seqlen_k=100)


def test_updates_of_a_plan_are_checked_on_the_cpu_too() -> None:
    arrays = CAUSAL.build()
    plan = plan_decode(arrays.q, arrays.kv_cache, arrays.block_table, arrays.cache_seqlens)
    plan.update(arrays.cache_seqlens)
    for wrong in (None, arrays.cache_seqlens[:2], arrays.cache_seqlens.astype(np.int64)):
        with pytest.raises(InvalidArgumentError) as caught:
            plan.update(wrong)
        assert caught.value.argument == "cache_seqlens"
    with pytest.raises(InvalidArgumentError) as caught:
        plan.update(arrays.cache_seqlens, arrays.cache_seqlens)
    assert caught.value.argument == "cu_seqlens_q"


@pytest.mark.parametrize("stream", [object(), "0", 1.0])
def test_streams_of_merges_and_appends_are_numbers(stream: Any) -> None:
    outs, lses = np.zeros((2, 3, 4, 8), np.float32), np.zeros((2, 3, 4), np.float32)
    cache, rows, slots = np.zeros((2, 16, 1, 8), np.float16), np.ones((1, 8), np.float16), np.zeros(1, np.int64)
    with pytest.raises(InvalidArgumentError, match="stream: expected an integer"):
        merge_states(outs, lses, stream=stream)
    with pytest.raises(InvalidArgumentError, match="stream: expected an integer"):
        append_tokens(cache, rows, slots, stream=stream)
    assert not cache.any()
    append_tokens(cache, rows, slots)
    assert cache.any()


def test_a_stream_is_a_number() -> None:
    arrays = CAUSAL.build()
    with pytest.raises(InvalidArgumentError, match="stream: expected an integer"):
        mla_decode(arrays.q, arrays.kv_cache, arrays.block_table, arrays.cache_seqlens, stream=object())  # type: ignore[arg-type]


@pytest.mark.parametrize("ragged", [False, True])
def test_states_may_come_in_lists(ragged: bool) -> None:
    random = np.random.default_rng(0)
    out_shape, lse_shape = ((7, 4, 8), (4, 7)) if ragged else ((3, 2, 4, 8), (3, 4, 2))
    outs = random.standard_normal((5, *out_shape), np.float32).astype(DTYPES["bfloat16"])
    lses = random.standard_normal((5, *lse_shape), np.float32)
    expected = merge_states(outs, lses)
    for given in ((list(outs), list(lses)), (tuple(outs), lses), (outs, tuple(lses))):
        for found, array in zip(merge_states(*given), expected, strict=True):
            np.testing.assert_array_equal(found, array)


STATES = [np.zeros((3, 4, 8), np.float32)] * 2, [np.zeros((4, 3), np.float32)] * 2
WRONG_LISTS: dict[str, tuple[str, Any, Any]] = {
    "no states": ("outs", [], STATES[1]),
    "of another shape": ("outs[1]", [STATES[0][0], np.zeros((3, 4, 16), np.float32)], STATES[1]),
    "of another type": ("outs[1]", [STATES[0][0], STATES[0][1].astype(np.float16)], STATES[1]),
    "no array": ("lses[1]", STATES[0], [STATES[1][0], 3]),
    "one lse too few": ("lses", STATES[0], STATES[1][:1]),
    "nested": ("outs[0]", [STATES[0]], STATES[1]),
}


@pytest.mark.parametrize("name", WRONG_LISTS)
def test_wrong_lists_of_states_are_refused(name: str) -> None:
    argument, outs, lses = WRONG_LISTS[name]
    with pytest.raises(InvalidArgumentError) as caught:
        merge_states(outs, lses)
    assert caught.value.argument == argument


def test_states_of_two_frameworks_are_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(InvalidArgumentError, match=r"outs\[1\]: expected .*numpy.*torch"):
        merge_states([STATES[0][0], torch.zeros(3, 4, 8)], STATES[1])
