"""Caches that are sharded along the sequence, on one GPU: the shards' results merged are those of the whole cache."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from cases_dense import DenseCase, frobenius_error

from cupy_mla import merge_states, mla_decode, plan_decode
from cupy_mla.call.options import AUTO
from cupy_mla.call.shard import Shard
from cupy_mla.kernels.choose import FAMILIES
from cupy_mla.kernels.token_pages import RowPagesFamily
from cupy_mla.lab.cases import Case
from cupy_mla.lab.shards import shards_of
from cupy_mla.layouts import DENSE_LAYOUTS, FP8_DS_MLA, FP8_E4M3
from cupy_mla.parallel.lengths import local_lengths

from . import gpu_arrays as gpu

pytestmark = pytest.mark.timeout(60)

MAX_ERROR = {"bfloat16": 3e-3, "float16": 1e-3}
LSE_TOLERANCE, SPLIT_LSE_TOLERANCE = 1e-5, 1e-3  # relative, and absolute
LENGTHS = (0, 1, 3, 63, 130, 1000, 4096, 5003)
DENSE = [AUTO, *(family.name for family in FAMILIES if family.name.startswith(("narrow", "wide")))]
TOKEN_PAGES = [family.name for family in FAMILIES if family.name.startswith("token_pages")]
# With their smallest pages.
ROW_KERNELS = [
    (family.name, min(family.page_sizes)) for family in FAMILIES if isinstance(family, RowPagesFamily)
]
FP8 = [family.name for family in FAMILIES if family.name.startswith(("fp8_split", "fp8_exact"))]
SHARDINGS = [pytest.param((world, by), id=f"{world}x{by}") for world, by in ((2, 1), (4, 16), (8, 64), (3, 5))]


def decode_shard(case: Case, share: Case, rank: int, sharding: tuple[int, int], kernel: str) -> tuple[Any, Any]:
    """out and lse of one rank, by a plan; what no token is written to is not-a-number."""
    world, interleave = sharding
    total = gpu.upload(case.cache_seqlens)
    options = {"cp_world": world, "cp_rank": rank, "cp_interleave": interleave, "total_seqlens": total}
    on_gpu = share.on(gpu.LIBRARY)
    plan = plan_decode(*on_gpu.tensors, **on_gpu.plan_options, **options, kernel=kernel)
    out, lse = mla_decode(*on_gpu.tensors, **on_gpu.options, **options, plan=plan)
    again, _ = mla_decode(*on_gpu.tensors, **on_gpu.options, **options, plan=plan)
    assert gpu.bits_of(out).tobytes() == gpu.bits_of(again).tobytes()
    return out, lse


def check(case: DenseCase, sharding: tuple[int, int], kernel: str, lse_tolerance: float = LSE_TOLERANCE) -> None:
    arrays = case.build()
    results = [
        decode_shard(arrays, share, shard.rank, sharding, kernel) for shard, share in shards_of(arrays, *sharding)
    ]
    for (out, lse), (shard, _) in zip(results, shards_of(arrays, *sharding), strict=True):
        out, lse = gpu.download(out), gpu.download(lse)
        assert np.isfinite(out).all()
        if not case.ragged:  # sees nothing: the neutral element
            seen = shard.count(visible_tokens(case))
            np.testing.assert_array_equal(np.isneginf(lse), np.repeat(seen[:, None] == 0, case.num_heads_q, 1))
            assert not out[seen == 0].any()
    out, lse = merge_states(*(gpu.stack(list(part)) for part in zip(*results, strict=True)))
    out, lse = gpu.download(out), gpu.download(lse)
    exact_out, exact_lse = arrays.exact()
    rows = np.cumsum([0, *arrays.q_lengths])
    for request in range(arrays.batch):
        where = slice(rows[request], rows[request + 1]) if case.ragged else request
        assert frobenius_error(out[where], exact_out[where]) < MAX_ERROR[case.dtype], request
    np.testing.assert_allclose(lse, exact_lse, rtol=lse_tolerance, atol=lse_tolerance)


def visible_tokens(case: DenseCase) -> np.ndarray:
    """[batch, seqlen_q] tokens of the whole request that each query sees."""
    lengths = np.array(case.lengths)[:, None]
    if not case.causal:
        return np.repeat(lengths, case.seqlens_q, 1)
    return np.maximum(lengths - case.seqlens_q + np.arange(case.seqlens_q) + 1, 0)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("kernel", [*DENSE, *TOKEN_PAGES])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads_q": 16, "seqlens_q": 2},
        {"num_heads_q": 128, "seqlens_q": 4},
        {"num_heads_q": 4, "seqlens_q": (1, 2, 0, 4, 3, 2, 1, 4)},
    ],
    ids=str,
)
def test_causal(changes: dict[str, Any], kernel: str, sharding: tuple[int, int]) -> None:
    case = DenseCase(lengths=LENGTHS, causal=True, page_size=1 if kernel in TOKEN_PAGES else 64, **changes)
    check(case, sharding, kernel)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("seqlens_q", [1, 3])
@pytest.mark.parametrize("layout", [*DENSE_LAYOUTS.values(), FP8_E4M3, FP8_DS_MLA], ids=lambda layout: layout.name)
def test_without_a_mask(layout: Any, seqlens_q: int, sharding: tuple[int, int]) -> None:
    dtype = layout.dtype if layout in DENSE_LAYOUTS.values() else "bfloat16"
    case = DenseCase(lengths=LENGTHS, num_heads_q=16, dtype=dtype, layout=layout.name, seqlens_q=seqlens_q)
    check(case, sharding, AUTO, SPLIT_LSE_TOLERANCE if layout is FP8_E4M3 else LSE_TOLERANCE)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(
    ("kernel", "layout", "page_size"),
    [
        *((kernel, FP8_E4M3.name, 64) for kernel in FP8),
        *((kernel, FP8_DS_MLA.name, page_size) for kernel, smallest in ROW_KERNELS for page_size in (smallest, 64)),
    ],
)
def test_causal_over_fp8(kernel: str, layout: str, page_size: int, sharding: tuple[int, int]) -> None:
    heads = {"16": 4, "32": 16, "64": 64}[kernel[-2:]]
    compute = "exact" if "exact" in kernel else "split" if "split" in kernel else AUTO
    stored = {"layout": layout, "page_size": page_size, "compute": compute}
    case = DenseCase(lengths=LENGTHS, num_heads_q=heads, seqlens_q=3, causal=True, **stored)
    check(case, sharding, kernel, SPLIT_LSE_TOLERANCE if kernel in FP8 else LSE_TOLERANCE)


@pytest.mark.parametrize("page_size", [16, 32, 128])
def test_pages(page_size: int) -> None:
    check(DenseCase(lengths=LENGTHS, page_size=page_size, seqlens_q=2, causal=True), (4, 16), AUTO)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads_q": 16, "seqlens_q": 2},
        {"num_heads_q": 128},
        {"num_heads_q": 64, "seqlens_q": (4, 1, 3)},
        {"num_heads_q": 16, "seqlens_q": 4, "layout": FP8_E4M3.name},
        {"num_heads_q": 128, "seqlens_q": 3, "layout": FP8_DS_MLA.name},
    ],
    ids=str,
)
def test_a_graph_follows_the_lengths(changes: dict[str, Any], sharding: tuple[int, int]) -> None:
    """Planned in the graph: each replay is of the lengths that lie in place then."""
    world, interleave = sharding
    case = DenseCase(lengths=(4096, 3000, 900), causal=True, **changes)
    arrays = case.build()
    replays = []
    total = gpu.upload(arrays.cache_seqlens)
    for shard, share in shards_of(arrays, world, interleave):
        on_gpu = share.on(gpu.LIBRARY)
        options = {"cp_world": world, "cp_rank": shard.rank, "cp_interleave": interleave, "total_seqlens": total}
        plan = plan_decode(*on_gpu.tensors, **on_gpu.plan_options, **options)
        rows = on_gpu.q.shape[:-2]
        out = gpu.empty((*rows, case.num_heads_q, 512), "bfloat16")
        lse = gpu.empty((*rows[:-1], case.num_heads_q, rows[-1]), "float32")

        def work(shard: Shard, plan: Any, on_gpu: Case, options: Any) -> None:
            gpu.assign(on_gpu.cache_seqlens, local_lengths(total, world, shard.rank, interleave))
            # Of one query token a mask hides nothing, and lengths are the rank's own.
            plan.update(on_gpu.cache_seqlens if case.seqlens_q == 1 else total, on_gpu.cu_seqlens_q)
            mla_decode(*on_gpu.tensors, **options, plan=plan)

        options |= {**on_gpu.options, "out": out, "lse": lse}
        graph = gpu.capture(partial(work, shard, plan, on_gpu, options))
        replays.append((graph, out, lse, (plan, on_gpu)))  # the graph holds none of what it works on
    tolerance = SPLIT_LSE_TOLERANCE if case.layout == FP8_E4M3.name else LSE_TOLERANCE
    of_request = np.cumsum([0, *arrays.q_lengths])
    for lengths in ((4096, 3000, 900), (1, 33, 17), (0, 2, 900), (4000, 1, 64)):
        gpu.assign(total, gpu.upload(np.array(lengths, np.int32)))
        results = []
        for replay, out, lse, _ in replays:
            replay()
            results.append((out, lse))
        out, lse = merge_states(*(gpu.stack(list(part)) for part in zip(*results, strict=True)))
        out, lse = gpu.download(out), gpu.download(lse)
        exact_out, exact_lse = replace(arrays, cache_seqlens=np.array(lengths, np.int32)).exact()
        for request in range(arrays.batch):
            where = slice(of_request[request], of_request[request + 1]) if case.ragged else request
            assert frobenius_error(out[where], exact_out[where]) < MAX_ERROR["bfloat16"]
        np.testing.assert_allclose(lse, exact_lse, rtol=tolerance, atol=tolerance)
