"""Dense decoding over an e4m3 cache on the GPU: every kernel against float64, also on data that is hard for FP8."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases_fp8 import E4M3, KINDS, LATENT, Fp8Case, relative_error

import cupy_mla.flash_mla as flash_mla
from cupy_mla import InvalidArgumentError, mla_decode, plan_decode
from cupy_mla.arrays.exchange import as_numpy
from cupy_mla.kernels.choose import FAMILIES
from cupy_mla.kernels.fp8 import Fp8Family

from . import gpu_arrays as gpu

pytestmark = pytest.mark.timeout(60)

KERNELS = ["auto", *(family.name for family in FAMILIES if isinstance(family, Fp8Family))]
MAX_ERROR = {"exact": 3e-3, "split": 3e-3, "fp8": 2.5e-3}
# Of an lse of up to LSE_UNIT, and in proportion of larger ones: sums in FP8 tensor cores have 13 fraction bits.
LSE_ERROR = {"exact": 2e-4, "split": 5e-2, "fp8": 5e-2}
LSE_UNIT = 100.0
NORMAL_LSE_ERROR = {"exact": 1e-5, "split": 2e-3, "fp8": 2e-3}
LENGTHS = (0, 1, 63, 64, 65, 140, 1000)


def upload(arrays: dict[str, Any]) -> dict[str, Any]:
    def one(array: np.ndarray) -> Any:
        if array.dtype == E4M3 and gpu.torch is not None:
            return gpu.upload(array.view(np.uint8)).view(gpu.torch.float8_e4m3fn)
        return gpu.upload(array)

    return {name: one(array) for name, array in arrays.items()}


def run(case: Fp8Case, kernel: str) -> tuple[float, float, Any]:
    """Errors of out and lse, and the results of three equal runs' first."""
    host = case.build()
    arrays = upload(host)
    options = options_of(case, kernel)
    plan = plan_decode(**arrays, **options, kernel=kernel)
    assert kernel in ("auto", plan.config.family.name)
    results = []
    for _ in range(3):
        out = gpu.empty((*host["q"].shape[:-1], LATENT), "bfloat16")
        lse = gpu.empty((len(case.lengths), case.heads, case.seqlen_q), "float32")
        mla_decode(**arrays, **options, plan=plan, out=out, lse=lse)
        results.append((as_numpy(out), as_numpy(lse)))
    for out, lse in results[1:]:
        assert out.tobytes() == results[0][0].tobytes()
        assert lse.tobytes() == results[0][1].tobytes()
    out, lse = results[0]
    exact, exact_lse = case.exact(host, way_of(kernel))
    unseen = np.isneginf(exact_lse)
    assert (np.isneginf(lse) == unseen).all()
    difference = np.abs(lse[~unseen] - exact_lse[~unseen]) / np.maximum(np.abs(exact_lse[~unseen]) / LSE_UNIT, 1)
    lse_error = float(difference.max(initial=0.0))
    return relative_error(out, exact), lse_error, results[0]


def way_of(kernel: str) -> str:
    """How it computes; what "auto" takes is split or exact."""
    computes = {family.name: family.compute for family in FAMILIES if isinstance(family, Fp8Family)}
    return computes.get(kernel, "split")


def options_of(case: Fp8Case, kernel: str) -> dict[str, Any]:
    compute = "auto" if kernel == "auto" else way_of(kernel)
    return {"causal": case.causal, "kv_scale": case.kv_scale, "compute": compute}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads", [1, 3, 8, 16, 17, 32, 64, 128])
def test_head_counts(kernel: str, heads: int) -> None:
    error, lse_error, _ = run(Fp8Case(LENGTHS, heads), kernel)
    assert error < MAX_ERROR[way_of(kernel)]
    assert lse_error < NORMAL_LSE_ERROR[way_of(kernel)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "case",
    [
        Fp8Case(LENGTHS, 16, page_size=16),
        Fp8Case(LENGTHS, 32, page_size=32),
        Fp8Case(LENGTHS, 16, page_size=128),
        Fp8Case(LENGTHS, 16, seqlen_q=2, causal=True),
        Fp8Case((2, 3, 700), 8, seqlen_q=7, causal=True),
        Fp8Case((4000, 70), 64, seqlen_q=3, causal=True),
        Fp8Case(LENGTHS, 16, seqlen_q=3),
        Fp8Case((30_000, 17), 16),
        Fp8Case((10_000,), 4),
        Fp8Case(tuple(range(1, 600, 3)), 16),
        Fp8Case(LENGTHS, 16, kv_scale=0.037),
    ],
    ids=str,
)
def test_shapes(kernel: str, case: Fp8Case) -> None:
    error, lse_error, _ = run(case, kernel)
    assert error < MAX_ERROR[way_of(kernel)]
    assert lse_error < NORMAL_LSE_ERROR[way_of(kernel)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scales", [(0.5, 0.037), (0.037, 0.5), (0.02, 0.5)], ids=str)
def test_each_part_has_a_scale(kernel: str, scales: tuple[float, float]) -> None:
    """Given as numbers, and as an array that the kernel reads; of a packed cache, and of a pair."""
    case = Fp8Case(LENGTHS, 20, kv_scale=scales)
    error, lse_error, (expected, _) = run(case, kernel)
    assert error < MAX_ERROR[way_of(kernel)]
    assert lse_error < LSE_ERROR[way_of(kernel)]
    arrays = upload(case.build())
    for name in ("q", "kv_cache"):
        arrays[name] = arrays[name][..., :LATENT], arrays[name][..., LATENT:]
    options = options_of(case, kernel) | {"kv_scale": gpu.upload(np.array(scales, np.float32))}
    plan = plan_decode(**arrays, **options, kernel=kernel)
    for _ in range(2):
        out, _ = mla_decode(**arrays, **options, plan=plan)
        assert as_numpy(out).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scales", [0.5, (0.5, 0.037)], ids=str)
def test_hard_data(kernel: str, kind: str, scales: float | tuple[float, float]) -> None:
    heads = int(kernel[-2:]) if kernel[-2:] in ("32", "64") else 16
    error, lse_error, _ = run(Fp8Case((8192, 8192), heads, kind=kind, kv_scale=scales), kernel)
    assert error < MAX_ERROR[way_of(kernel)]
    assert lse_error < LSE_ERROR[way_of(kernel)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_fixed_split_makes_results_independent_of_the_batch(kernel: str) -> None:
    case = Fp8Case((3000, 64, 1, 900), 16)
    host = case.build()

    def decode(requests: slice) -> tuple[np.ndarray, np.ndarray]:
        arrays = upload({name: array if name == "kv_cache" else array[requests] for name, array in host.items()})
        options = options_of(case, kernel)
        plan = plan_decode(**arrays, **options, kernel=kernel, fixed_split_tokens=512)
        out, lse = mla_decode(**arrays, **options, plan=plan)
        return as_numpy(out), as_numpy(lse)

    together = decode(slice(None))
    for request in range(len(case.lengths)):
        for ours, theirs in zip(decode(slice(request, request + 1)), together, strict=True):
            assert ours[0].tobytes() == theirs[request].tobytes()


def test_the_scale_may_be_on_the_device_and_the_parts_in_two_arrays() -> None:
    case = Fp8Case(LENGTHS, 16)
    _, _, (expected, _) = run(case, "auto")
    scale = gpu.upload(np.full((1,), case.kv_scale, np.float32))
    arrays = upload(case.build())
    for name in ("q", "kv_cache"):
        arrays[name] = arrays[name][..., :LATENT], arrays[name][..., LATENT:]
    out, _ = mla_decode(**arrays, kv_scale=scale)
    assert as_numpy(out).tobytes() == expected.tobytes()


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_e4m3_queries_of_flash_mla(heads: int) -> None:
    case = Fp8Case(LENGTHS, heads, seqlen_q=2, causal=True)
    host = case.build()
    host["q"] = host["q"].astype(E4M3)
    arrays = upload(host)
    meta, _ = flash_mla.get_mla_metadata_dense_fp8(arrays["cache_seqlens"], 2 * heads, 1)
    options = {"head_dim_v": LATENT, "tile_scheduler_metadata": meta, "num_splits": None, "causal": True}
    for _ in range(2):
        out, lse = flash_mla.flash_mla_with_kvcache_fp8(*arrays.values(), **options, descale_k=case.kv_scale)
        exact, exact_lse = case.exact(host)
        assert relative_error(as_numpy(out), exact) < MAX_ERROR["fp8"]
        seen = np.isfinite(exact_lse)
        assert np.isposinf(as_numpy(lse)[~seen]).all()
        assert np.abs(as_numpy(lse)[seen] - exact_lse[seen]).max() < NORMAL_LSE_ERROR["fp8"]


def test_pages_of_one_token_are_refused() -> None:
    arrays = upload(Fp8Case((3, 4), 16, page_size=1).build())
    with pytest.raises(InvalidArgumentError, match="page sizes that are multiples of 8, not 1"):
        mla_decode(**arrays, kv_scale=1.0)


@pytest.mark.skipif(gpu.torch is None, reason="torch is not installed")
def test_operators_and_graphs() -> None:
    import cupy_mla.torch_ops  # noqa: F401

    torch = gpu.torch
    case = Fp8Case(LENGTHS, 16)
    arrays = upload(case.build())
    scale = torch.full((1,), case.kv_scale, device="cuda")
    tensors = tuple(arrays.values())
    expected, _ = mla_decode(**arrays, kv_scale=case.kv_scale)
    for _ in range(3):
        plan = torch.ops.cupy_mla.plan_decode(*tensors, kv_scale=scale)
        out, _ = torch.ops.cupy_mla.mla_decode(*tensors, kv_scale=scale, plan=plan)
        assert torch.equal(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = torch.ops.cupy_mla.mla_decode(*tensors, kv_scale=scale)
    scale.mul_(2)
    arrays["cache_seqlens"][5] = 100
    graph.replay()
    torch.cuda.synchronize()
    again, _ = mla_decode(**arrays, kv_scale=2 * case.kv_scale)
    assert torch.equal(out, again)
