"""FlashMLA's sparse functions over ours, on the CPU: the order of its arguments, its corner values, its metadata."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_sparse import SparseArrays, SparseCase, exact_sparse
from test_sparse_decode import check as check_decode
from test_sparse_prefill import check as check_prefill

from cupy_mla import InvalidArgumentError, PlanMismatchError, SparsePlan, flash_mla, mla_sparse_prefill

CASE = SparseCase(batch=3, seqlen_q=2, page_size=64, num_pages=2, lengths="request", sinks=True)
PREFILL = SparseCase(batch=5, num_pages=60, page_size=1, lengths="request", sinks=True)


def decode(arrays: SparseArrays, meta: Any, **options: Any) -> tuple[Any, Any]:
    """As FlashMLA's own test calls it, but for FP8."""
    indices = options.pop("indices", arrays.indices[:, :, 0])
    lengths = options.pop("topk_length", arrays.lengths)
    return flash_mla.flash_mla_with_kvcache(
        arrays.q, arrays.kv, None, None, 512, meta, None, 576**-0.5, False, False, indices, arrays.sinks,
        None, None, lengths, None, **options,
    )  # fmt: skip


def in_flash_mla(exact: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """A row without a token has lse = +inf."""
    out, largest, lse = exact
    return out, largest, np.where(np.isneginf(lse), np.inf, lse)


def test_decode() -> None:
    meta, _ = flash_mla.get_mla_metadata()
    for seed in range(2):
        arrays = replace(CASE, seed=seed).build()
        arrays.lengths[:] = (0, 17, 40)
        arrays.kv[np.isnan(arrays.kv)] = 1
        check_decode(decode(arrays, meta), in_flash_mla(exact_sparse(arrays)), CASE.dtype)
    assert isinstance(meta.tile_scheduler_metadata, SparsePlan)
    assert meta.config == flash_mla.FlashMLASchedMeta.Config(
        b=3, s_q=2, h_q=16, page_block_size=64, h_k=1, causal=False, is_fp8_kvcache=False, topk=40,
        extra_page_block_size=None, extra_topk=None,
    )  # fmt: skip


def test_decode_into_a_given_output() -> None:
    arrays = CASE.build()
    given = np.zeros_like(arrays.q[..., :512])
    assert decode(arrays, flash_mla.get_mla_metadata()[0], out=given)[0] is given


def test_decode_with_metadata_tensors_of_an_older_flash_mla() -> None:
    arrays = CASE.build()
    metadata, splits = np.zeros((132, 8), np.int32), np.zeros(4, np.int32)
    results = flash_mla.flash_mla_with_kvcache(
        arrays.q, arrays.kv, None, None, 512, metadata, splits, indices=arrays.indices[:, :, 0],
        topk_length=arrays.lengths, attn_sink=arrays.sinks,
    )  # fmt: skip
    check_decode(results, in_flash_mla(exact_sparse(arrays)), CASE.dtype)


def test_metadata_of_other_calls_is_refused() -> None:
    arrays = CASE.build()
    meta, _ = flash_mla.get_mla_metadata()
    decode(arrays, meta)
    with pytest.raises(PlanMismatchError) as caught:
        decode(arrays, meta, indices=np.ascontiguousarray(arrays.indices[:, :, 0, :8]), topk_length=None)
    assert caught.value.argument == "tile_scheduler_metadata"
    table, lengths = np.zeros((3, 1), np.int32), np.ones(3, np.int32)
    with pytest.raises(PlanMismatchError, match="tile_scheduler_metadata: expected metadata that holds a DecodePlan"):
        flash_mla.flash_mla_with_kvcache(arrays.q, arrays.kv, table, lengths, 512, meta)


def test_a_refused_first_call_leaves_metadata_empty() -> None:
    meta, _ = flash_mla.get_mla_metadata()
    with pytest.raises(InvalidArgumentError, match="out"):
        decode(CASE.build(), meta, out=np.zeros(3, np.float16))
    assert meta == flash_mla.FlashMLASchedMeta()


def test_other_lengths_are_refused_where_values_are_validated(set_environment: Callable[..., Any]) -> None:
    set_environment(CUPY_MLA_VALIDATE="1")
    arrays = CASE.build()
    meta, _ = flash_mla.get_mla_metadata()
    decode(arrays, meta)
    decode(arrays, meta)
    planned = int(arrays.lengths[1])
    with pytest.raises(PlanMismatchError, match=rf"topk_length\[1\]: expected {planned}, .* got 3"):
        decode(arrays, meta, topk_length=np.array([arrays.lengths[0], 3, arrays.lengths[2]], np.int32))


def test_causal_is_refused() -> None:
    arrays = CASE.build()
    with pytest.raises(InvalidArgumentError, match="causal: expected False"):
        flash_mla.flash_mla_with_kvcache(
            arrays.q, arrays.kv, None, None, 512, flash_mla.get_mla_metadata()[0], causal=True,
            indices=arrays.indices[:, :, 0],
        )  # fmt: skip


def test_prefill() -> None:
    arrays = PREFILL.build()
    q, kv, indices = arrays.q[:, 0], arrays.kv[:, 0], arrays.indices[:, 0]
    results = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 576**-0.5, 512, arrays.sinks, arrays.lengths)
    check_prefill(results, in_flash_mla(exact_sparse(arrays)), PREFILL.dtype)
    assert np.isposinf(results[2][0]).all()
    assert np.isneginf(results[1][0]).all()
    given = np.zeros_like(results[0])
    out, _, lse = flash_mla.flash_mla_sparse_fwd(
        q, kv, indices, sm_scale=576**-0.5, attn_sink=arrays.sinks, topk_length=arrays.lengths, out=given,
        return_log2_lse=True,
    )  # fmt: skip
    assert out is given
    np.testing.assert_array_equal(out, results[0])
    np.testing.assert_allclose(lse, results[2] / np.log(2), rtol=1e-6)
    ours = mla_sparse_prefill(q, kv, indices, attn_sink=arrays.sinks, topk_length=arrays.lengths)
    np.testing.assert_array_equal(ours[0], results[0])


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("sm_scale", 0.0),
        ("d_v", 600),
        ("kv", np.zeros((60, 1, 576), np.float32)),
        ("indices", np.zeros((5, 1, 40), np.int64)),
        ("attn_sink", np.zeros(3, np.float32)),
        ("topk_length", np.zeros(3, np.int32)),
        ("out", np.zeros(3, np.float16)),
    ],
)
def test_bad_arguments_of_prefill_have_flash_mlas_names(argument: str, value: Any) -> None:
    arrays = PREFILL.build()
    good = {"q": arrays.q[:, 0], "kv": arrays.kv[:, 0], "indices": arrays.indices[:, 0], "sm_scale": 0.1}
    with pytest.raises(InvalidArgumentError) as caught:
        flash_mla.flash_mla_sparse_fwd(**{**good, argument: value})
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("k_cache", {"k_cache": np.zeros((2, 64, 1, 576), np.float32)}),
        ("indices", {"indices": np.zeros((3, 2, 40), np.int64)}),
        ("topk_length", {"topk_length": np.zeros(7, np.int32)}),
    ],
)
def test_bad_arguments_of_decode_have_flash_mlas_names(argument: str, options: dict[str, Any]) -> None:
    arrays = CASE.build()
    good = {"q": arrays.q, "k_cache": arrays.kv, "indices": arrays.indices[:, :, 0], "topk_length": arrays.lengths}
    meta, _ = flash_mla.get_mla_metadata()
    with pytest.raises(InvalidArgumentError) as caught:
        flash_mla.flash_mla_with_kvcache(
            **{**good, **options}, block_table=None, cache_seqlens=None, head_dim_v=512, tile_scheduler_metadata=meta
        )
    assert caught.value.argument == argument
