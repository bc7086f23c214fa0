"""Dense decoding over caches whose tokens hold their scales on the GPU, most of it of 656 bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_fp8 import LATENT, Fp8Case, relative_error

from cupy_mla import mla_decode, plan_decode
from cupy_mla.arrays.exchange import as_numpy
from cupy_mla.kernels.choose import FAMILIES
from cupy_mla.kernels.row_tiles import RowTilesFamily
from cupy_mla.kernels.token_pages import RowPagesFamily
from cupy_mla.lab.selftest import CheckCase, run_checks
from cupy_mla.layouts import LAYOUTS

from . import gpu_arrays as gpu

pytestmark = pytest.mark.timeout(60)

KERNELS = ["auto", *(family.name for family in FAMILIES if isinstance(family, RowPagesFamily))]
TILES = [family.name for family in FAMILIES if isinstance(family, RowTilesFamily)]
MAX_ERROR, LSE_ERROR = 3e-3, 1e-5
ROUNDED_LSE_ERROR = 1e-3  # where keys are rounded to fp16, as their scales are no powers of two
LENGTHS = (0, 1, 63, 64, 65, 140, 1000)


def case_of(lengths: tuple[int, ...], heads: int, **changes: Any) -> Fp8Case:
    return Fp8Case(lengths, heads, kv_scale=None, **changes)


def upload(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: gpu.upload(array) for name, array in arrays.items()}


def check(case: Fp8Case, kernel: str) -> None:
    check_results(case, case.build(), kernel)


def check_results(case: Fp8Case, host: dict[str, Any], kernel: str, lse_error: float = LSE_ERROR) -> None:
    arrays = upload(host)
    plan = plan_decode(**arrays, causal=case.causal, kernel=kernel)
    assert kernel in ("auto", plan.config.family.name)
    results = []
    for _ in range(3):
        out = gpu.empty((*host["q"].shape[:-1], LATENT), "bfloat16")
        lse = gpu.empty((len(case.lengths), case.heads, case.seqlen_q), "float32")
        mla_decode(**arrays, causal=case.causal, plan=plan, out=out, lse=lse)
        results.append((as_numpy(out), as_numpy(lse)))
    for out, lse in results[1:]:
        assert out.tobytes() == results[0][0].tobytes()
        assert lse.tobytes() == results[0][1].tobytes()
    out, lse = results[0]
    exact, exact_lse = case.exact(host)
    assert relative_error(out, exact) < MAX_ERROR
    np.testing.assert_allclose(lse, exact_lse, rtol=lse_error, atol=lse_error)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("heads", [1, 3, 16, 17, 32, 128])
def test_head_counts(kernel: str, heads: int) -> None:
    check(case_of(LENGTHS, heads), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "case",
    [
        *(case_of(LENGTHS, 16, page_size=page_size) for page_size in (1, 16, 32, 128)),
        case_of(LENGTHS, 16, seqlen_q=2, causal=True),
        case_of(LENGTHS, 8, seqlen_q=7, causal=True, page_size=1),
        case_of((4000, 70), 64, seqlen_q=3, causal=True),
        case_of(LENGTHS, 16, seqlen_q=3),
        case_of((30_000, 17), 16),
        case_of((10_000,), 4),
        case_of(tuple(range(1, 600, 3)), 16),
    ],
    ids=str,
)
def test_shapes(kernel: str, case: Fp8Case) -> None:
    if kernel in TILES and case.page_size == 1:
        case = replace(case, page_size=48)  # chunks of 16 tokens
    check(case, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["any", "tiny", "large", "mixed"])
@pytest.mark.parametrize("lengths", [LENGTHS, (9000, 17)])
def test_scales(kernel: str, kind: str, lengths: tuple[int, ...]) -> None:
    """Scales that fp16 does not hold, in all tokens or in some, and of any significand."""
    rng = np.random.default_rng(1)
    case = case_of(lengths, 16)
    host = case.build()
    largest = {"any": 1.0, "tiny": 2.0**-30}.get(kind, 2.0**20)
    rows = host["kv_cache"]
    scales = rows[..., LATENT : LATENT + 16].copy().view(np.float32)
    if kind == "any":
        scales *= rng.uniform(0.5, 1.5, scales.shape).astype(np.float32)
    elif kind == "mixed":
        scales *= rng.choice(np.float32([largest, 1, 2.0**-24]), scales.shape[:3])[..., None]
    else:
        scales *= np.float32(largest)
    rows[..., LATENT : LATENT + 16] = scales.view(np.uint8)
    host["q"][..., :LATENT] /= largest
    rounds = kind == "any" and kernel not in TILES
    check_results(case, host, kernel, ROUNDED_LSE_ERROR if rounds else LSE_ERROR)


@pytest.mark.parametrize("layout", list(LAYOUTS)[4:])
@pytest.mark.parametrize("heads", [3, 16, 32, 64])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_other_layouts(layout: str, heads: int, page_size: int) -> None:
    shape: dict[str, Any] = {"rope_dim": 0, "page_size": page_size, "layout": layout}
    cases = [
        CheckCase(LENGTHS, heads, **shape),
        CheckCase(LENGTHS, heads, seqlens_q=2, causal=True, **shape),
        CheckCase((5000, 17), heads, **shape),
    ]
    for result in run_checks("cuda", cases):
        assert result.passed, result


def test_a_page_outside_the_cache_is_one_of_zeros() -> None:
    case = case_of((200, 300), 16)
    host = case.build()
    host["block_table"][0, 1] = 2**31 - 1
    host["block_table"][1, 2] = -7
    results = mla_decode(**upload(host))
    for ours, theirs in zip(results, mla_decode(**host, validate=False), strict=True):
        assert relative_error(as_numpy(ours), theirs.astype(np.float64)) < MAX_ERROR


def test_pages_in_a_pool_and_queries_in_two_arrays() -> None:
    case = case_of(LENGTHS, 16)
    host = case.build()
    expected = mla_decode(**upload(host))
    pool = np.full((2, *host["kv_cache"].shape), 0xFF, np.uint8)
    pool[1] = host["kv_cache"]
    arrays = upload(host)
    arrays["kv_cache"] = gpu.upload(np.ascontiguousarray(pool.swapaxes(0, 1)))[:, 1]
    arrays["q"] = tuple(gpu.upload(host["q"][..., part]) for part in (slice(LATENT), slice(LATENT, None)))
    for ours, theirs in zip(mla_decode(**arrays), expected, strict=True):
        assert as_numpy(ours).tobytes() == as_numpy(theirs).tobytes()


@pytest.mark.skipif(gpu.torch is None, reason="torch is not installed")
def test_operators_and_graphs() -> None:
    import cupy_mla.torch_ops  # noqa: F401

    torch = gpu.torch
    arrays = upload(case_of(LENGTHS, 16).build())
    tensors = tuple(arrays.values())
    graph = torch.cuda.CUDAGraph()
    torch.ops.cupy_mla.mla_decode(*tensors)
    with torch.cuda.graph(graph):
        out, _ = torch.ops.cupy_mla.mla_decode(*tensors)
    arrays["cache_seqlens"][6] = 100
    graph.replay()
    torch.cuda.synchronize()
    again, _ = mla_decode(**arrays)
    assert torch.equal(out, again)
