"""The functions that replace FlashMLA's, on the GPU: against float64, in CUDA graphs, and without a host wait."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_dense import DTYPES, DenseCase, frobenius_error

import cupy_mla.flash_mla as flash_mla
from cupy_mla import PlanMismatchError, mla_decode
from cupy_mla.decode.plan import Blueprint
from cupy_mla.lab.cases import Case

from . import gpu_arrays as gpu

pytestmark = pytest.mark.timeout(60)

MAX_ERROR = {"bfloat16": 3e-3, "float16": 1e-3}
LSE_TOLERANCE = 1e-5  # relative, and absolute
LENGTHS = (0, 1, 2, 63, 64, 65, 140, 4096)


def upload(arrays: Case) -> tuple[Any, Any, Any, Any]:
    """q, k_cache, block_table, cache_seqlens on the GPU."""
    return arrays.on(gpu.LIBRARY).tensors


def call(case: DenseCase, tensors: tuple[Any, ...], meta: Any, **options: Any) -> tuple[Any, Any]:
    return flash_mla.flash_mla_with_kvcache(
        *tensors, case.latent_dim, meta, softmax_scale=case.softmax_scale, causal=case.causal, **options
    )


def check(case: DenseCase, arrays: Case, result: tuple[Any, Any], lengths: tuple[int, ...] | None = None) -> None:
    """Out and lse of every request against float64; rows that see nothing have out = 0 and lse = +inf."""
    gpu.synchronize()
    outs, lses = gpu.download(result[0]), gpu.download(result[1])
    exact = gpu.expected(case, arrays, lengths)
    assert outs.shape == (*arrays.q.shape[:-1], case.latent_dim)
    assert lses.shape == (len(case.lengths), case.num_heads_q, case.seqlens_q)
    for request, (exact_out, exact_lse) in enumerate(exact):
        out, lse = outs[request], lses[request].T
        error = frobenius_error(out, exact_out)
        assert error < MAX_ERROR[case.dtype], f"request {request}: relative error {error:.2e}"
        unseen = np.isneginf(exact_lse)
        assert (out[unseen] == 0).all(), f"request {request}"
        assert np.array_equal(np.isposinf(lse), unseen), f"request {request}: lse is +inf at other rows than it should"
        np.testing.assert_allclose(lse[~unseen], exact_lse[~unseen], rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


@pytest.fixture
def plan_launches(monkeypatch: pytest.MonkeyPatch) -> list[Blueprint]:
    """What was planned, one entry for each launch of a planner."""
    launches: list[Blueprint] = []
    launch = Blueprint.launch_planner

    def counted(self: Blueprint, *arguments: Any) -> None:
        launches.append(self)
        launch(self, *arguments)

    monkeypatch.setattr(Blueprint, "launch_planner", counted)
    return launches


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 2])
@pytest.mark.parametrize("heads", [16, 96, 128])
def test_values(heads: int, seqlen_q: int, causal: bool) -> None:
    case = DenseCase(lengths=LENGTHS, num_heads_q=heads, seqlens_q=seqlen_q, causal=causal)
    arrays = case.build()
    meta, num_splits = flash_mla.get_mla_metadata()
    check(case, arrays, call(case, upload(arrays), meta, num_splits=num_splits))


@pytest.mark.parametrize(
    "case",
    [
        DenseCase(lengths=LENGTHS, dtype="float16", num_heads_q=64),
        DenseCase(lengths=LENGTHS, num_heads_q=16, num_heads_kv=2, seqlens_q=2, causal=True),
        DenseCase(lengths=LENGTHS, page_size=16),
        DenseCase(lengths=LENGTHS, latent_dim=512, rope_dim=0, num_heads_q=128),
        DenseCase(lengths=LENGTHS, padded=True),
        DenseCase(lengths=(0, 0, 0), seqlens_q=2),
        DenseCase(lengths=(0,), num_heads_q=128),
    ],
    ids=["fp16", "kv heads", "page size 16", "no rope", "padded", "all empty", "one empty"],
)
def test_other_calls(case: DenseCase) -> None:
    arrays = case.build()
    check(case, arrays, call(case, upload(arrays), flash_mla.get_mla_metadata()[0]))


def test_metadata_plans_once_for_all_layers(plan_launches: list[Blueprint]) -> None:
    case = DenseCase(lengths=LENGTHS, num_heads_q=128, seqlens_q=2, causal=True)
    meta, num_splits = flash_mla.get_mla_metadata()
    for layer in range(3):
        arrays = replace(case, seed=layer).build()
        out = gpu.empty((*arrays.q.shape[:-1], 512), "bfloat16")
        result = call(case, upload(arrays), meta, num_splits=num_splits, out=out)
        assert result[0] is out
        check(case, arrays, result)
    assert plan_launches == [meta.tile_scheduler_metadata.blueprint]


def test_metadata_of_other_shapes_is_refused() -> None:
    meta, _ = flash_mla.get_mla_metadata()
    case = DenseCase(num_heads_q=16)
    arrays = case.build()
    check(case, arrays, call(case, upload(arrays), meta))
    other = DenseCase(num_heads_q=64)
    with pytest.raises(PlanMismatchError, match="tile_scheduler_metadata: expected a plan for num_heads_q = 64"):
        call(other, upload(other.build()), meta)


def test_metadata_tensors_of_an_older_flash_mla(plan_launches: list[Blueprint]) -> None:
    case = DenseCase(lengths=LENGTHS, num_heads_q=128)
    arrays = case.build()
    tensors = upload(arrays)
    metadata, num_splits = gpu.upload(np.zeros((132, 8), np.int32)), gpu.upload(np.zeros(9, np.int32))
    for _ in range(2):
        check(case, arrays, call(case, tensors, metadata, num_splits=num_splits))
    assert len(plan_launches) == 2


@pytest.mark.parametrize("tensors_instead", [False, True])
@pytest.mark.parametrize("heads", [16, 128])
def test_graph_replayed_after_lengths_changed(
    heads: int, tensors_instead: bool, plan_launches: list[Blueprint]
) -> None:
    most = (4096, 300, 2000, 64)
    case = DenseCase(lengths=most, num_heads_q=heads, seqlens_q=2, causal=True)
    arrays = case.build()
    tensors = upload(arrays)
    layers = 3
    outs = [gpu.empty((4, 2, heads, 512), "bfloat16") for _ in range(layers)]
    lses = [gpu.empty((4, heads, 2), "float32") for _ in range(layers)]
    metadata, num_splits = gpu.upload(np.zeros((132, 8), np.int32)), gpu.upload(np.zeros(5, np.int32))

    def step() -> None:
        meta: tuple[Any, Any] = (metadata, num_splits) if tensors_instead else flash_mla.get_mla_metadata()
        for out, lse in zip(outs, lses, strict=True):
            _, step_lse = call(case, tensors, meta[0], num_splits=meta[1], out=out)
            lse[...] = step_lse

    replay = gpu.capture(step)  # runs it once before
    assert len(plan_launches) == 2 * (layers if tensors_instead else 1)
    for lengths in (most, (0, 0, 0, 0), (1, 300, 0, 63), (4096, 0, 0, 0), (65, 140, 1999, 64), most):
        gpu.assign(tensors[3], gpu.upload(np.array(lengths, np.int32)))
        for out, lse in zip(outs, lses, strict=True):
            gpu.assign(out, gpu.empty((4, 2, heads, 512), "bfloat16"))
            gpu.assign(lse, gpu.empty((4, heads, 2), "float32"))
        replay()
        for result in zip(outs, lses, strict=True):
            check(case, arrays, result, lengths)


def test_graph_that_reuses_metadata_captures_no_planner(plan_launches: list[Blueprint]) -> None:
    case = DenseCase(lengths=(4096, 0, 140), num_heads_q=16)
    arrays = case.build()
    tensors = upload(arrays)
    meta, num_splits = flash_mla.get_mla_metadata()
    results: list[tuple[Any, Any]] = []
    replay = gpu.capture(lambda: results.append(call(case, tensors, meta, num_splits=num_splits)))
    assert len(plan_launches) == 1
    replay()
    check(case, arrays, results[-1])


def test_no_call_waits_for_the_gpu() -> None:
    """Torch raises where it would wait."""
    torch = pytest.importorskip("torch")
    case = DenseCase(lengths=LENGTHS, num_heads_q=128)
    arrays = case.build()
    tensors = upload(arrays)
    call(case, tensors, flash_mla.get_mla_metadata()[0])  # loads the kernels
    gpu.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        meta, num_splits = flash_mla.get_mla_metadata()
        results = [call(case, tensors, meta, num_splits=num_splits) for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for result in results:
        check(case, arrays, result)


def test_current_stream_of_torch() -> None:
    torch = pytest.importorskip("torch")
    case = DenseCase(lengths=LENGTHS, num_heads_q=16, dtype="float16")
    arrays = case.build()
    tensors = upload(arrays)
    stand_in = torch.zeros_like(tensors[0])
    call(case, tensors, flash_mla.get_mla_metadata()[0])  # loads the kernels
    gpu.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(gpu.DELAY_CYCLES)
        stand_in.copy_(tensors[0])
        result = call(case, (stand_in, *tensors[1:]), flash_mla.get_mla_metadata()[0])
    stream.synchronize()
    check(case, arrays, result)


def test_cupy() -> None:
    cupy = pytest.importorskip("cupy")
    case = DenseCase(lengths=LENGTHS, num_heads_q=16, dtype="float16", seqlens_q=2, causal=True)
    arrays = case.build()
    tensors = tuple(
        cupy.asarray(array) for array in (arrays.q, arrays.kv_cache, arrays.block_table, arrays.cache_seqlens)
    )
    out, lse = call(case, tensors, flash_mla.get_mla_metadata()[0])
    assert isinstance(out, cupy.ndarray)
    assert isinstance(lse, cupy.ndarray)
    our_out, our_lse = mla_decode(*tensors, **case.options)
    assert cupy.array_equal(out.view(cupy.uint16), our_out.view(cupy.uint16))
    expected = cupy.where(our_lse == -np.inf, np.inf, our_lse)
    assert int(cupy.isposinf(expected).sum()) > 0
    assert cupy.array_equal(lse, expected)


def test_other_dlpack_arrays() -> None:
    cupy = pytest.importorskip("cupy")
    tvm_ffi = pytest.importorskip("tvm_ffi")
    case = DenseCase(lengths=(0, 140, 1), num_heads_q=16, dtype="float16", seqlens_q=2, causal=True)
    arrays = case.build()
    assert arrays.q.dtype == DTYPES["float16"]
    tensors = tuple(
        tvm_ffi.from_dlpack(cupy.asarray(array))
        for array in (arrays.q, arrays.kv_cache, arrays.block_table, arrays.cache_seqlens)
    )
    out, lse = call(case, tensors, flash_mla.get_mla_metadata()[0])
    exact = gpu.expected(case, arrays)
    host_out, host_lse = cupy.asnumpy(cupy.from_dlpack(out)), cupy.asnumpy(cupy.from_dlpack(lse))
    for request, (exact_out, exact_lse) in enumerate(exact):
        assert frobenius_error(host_out[request], exact_out) < MAX_ERROR["float16"]
        exact_lse[np.isneginf(exact_lse)] = np.inf
        np.testing.assert_allclose(host_lse[request].T, exact_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)
