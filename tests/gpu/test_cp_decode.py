"""Context-parallel decode on one GPU: rank after rank, which a stand-in for their group lets be many; and NCCL with one
rank, in CUDA graphs too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cases_dense import DenseCase, frobenius_error

from cupy_mla import mla_sparse_decode, slots_of
from cupy_mla.lab.shards import shards_of
from cupy_mla.parallel import (
    ContextParallelPlan,
    cp_decode,
    cp_sparse_decode,
    exchange,
    local_slots,
    plan_cp_decode,
    plan_cp_sparse_decode,
)

from . import gpu_arrays as gpu

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.timeout(60)

MAX_ERROR, LSE_TOLERANCE = 3e-3, 1e-5
LENGTHS = (0, 1, 3, 63, 130, 1000, 4096, 5003)


def check(case: DenseCase, out: Any, lse: Any, lengths: tuple[int, ...] | None = None) -> None:
    arrays = case.build()
    if lengths is not None:
        arrays.cache_seqlens[:] = lengths
    exact_out, exact_lse = arrays.exact()
    out, lse = gpu.download(out), gpu.download(lse)
    rows = np.cumsum([0, *arrays.q_lengths])
    for request in range(arrays.batch):
        where = slice(rows[request], rows[request + 1]) if case.ragged else request
        assert frobenius_error(out[where], exact_out[where]) < MAX_ERROR, request
    np.testing.assert_allclose(lse, exact_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


def all_to_all(plans: list[ContextParallelPlan]) -> None:
    """What the collective does."""
    for rank, receiver in enumerate(plans):
        for other, sender in enumerate(plans):
            receiver._exchange._received[0][other].copy_(sender._exchange._sent[rank])


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(("world", "interleave"), [(2, 16), (4, 1), (8, 64)])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads_q": 128},
        {"num_heads_q": 16},
        {"num_heads_q": 64, "seqlens_q": 3, "causal": True},
        {"num_heads_q": 16, "seqlens_q": (1, 2, 0, 4, 3, 2, 1, 4), "causal": True},
    ],
    ids=str,
)
def test_ranks_one_after_the_other(
    changes: dict[str, Any], world: int, interleave: int, gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    case = DenseCase(lengths=LENGTHS, **changes)
    arrays = case.build()
    heads = case.num_heads_q // world
    total = gpu.upload(arrays.cache_seqlens)
    plans = []
    for shard, share in shards_of(arrays, world, interleave):
        local = share.on(gpu.LIBRARY)
        q = local.q if gathered else local.q[..., shard.rank * heads : (shard.rank + 1) * heads, :].contiguous()
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=shard.rank, world_size=world)
        options = {"causal": case.causal, "cu_seqlens_q": local.cu_seqlens_q, "cp_interleave": interleave}
        plan = plan_cp_decode(q, local.kv_cache, local.block_table, total, **options, gathered=gathered)
        by_rank = local.q.unflatten(-2, (world, heads)).movedim(-3, 0)
        monkeypatch.setattr(exchange, "all_gather", lambda gathering, mine, group, q=by_rank: gathering.copy_(q))
        plan.decode((q, local.kv_cache, local.block_table, total, local.cu_seqlens_q, None), None)
        plan._exchange.send()
        plans.append(plan)
        torch.distributed.destroy_process_group()
    all_to_all(plans)
    results = []
    for plan in plans:
        out_shape, lse_shape = plan._exchange.result_shapes
        out, lse = gpu.empty(out_shape, "bfloat16"), gpu.empty(lse_shape, "float32")
        plan._exchange.merge(out, lse)
        results.append((out, lse))
    out, lse = (torch.cat(list(part), axis) for part, axis in zip(zip(*results, strict=True), (-2, -2), strict=True))
    check(case, out, lse)


@pytest.fixture
def nccl() -> Iterator[None]:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.distributed.init_process_group(
        "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1, device_id=device
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("way", ["a2a", "ag_rs"])
@pytest.mark.parametrize("seqlens_q", [1, 2])
def test_nccl_in_a_graph(seqlens_q: int, way: str) -> None:
    """The graph plans, gathers, decodes, exchanges and merges; replays are of the lengths that lie in place then."""
    case = DenseCase(lengths=(4096, 3000, 900), num_heads_q=16, seqlens_q=seqlens_q, causal=True)
    local = case.build().on(gpu.LIBRARY)
    inputs, options = local.tensors, {"causal": True, "exchange": way}
    plan = plan_cp_decode(*inputs, **options)
    out, lse = gpu.empty((3, seqlens_q, 16, 512), "bfloat16"), gpu.empty((3, 16, seqlens_q), "float32")

    def work() -> None:
        plan.update(inputs[-1])
        cp_decode(*inputs, **options, plan=plan, out=out, lse=lse)

    replay = gpu.capture(work)
    for lengths in ((4096, 3000, 900), (1, 33, 17), (0, 2, 900), (4000, 1, 64)):
        gpu.assign(inputs[-1], gpu.upload(np.array(lengths, np.int32)))
        replay()
        check(case, out, lse, lengths)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 300), (64, 2048), (5, 1, 2500)])
@pytest.mark.parametrize(("world", "interleave"), [(1, 1), (2, 1), (8, 64)])
def test_local_slots(world: int, interleave: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(-9, 9000, shape, dtype=np.int32)
    table = rng.integers(-2, 500, (shape[0], 100), dtype=np.int32)
    for rank in range(world):
        sharding = {"cp_world": world, "cp_rank": rank, "cp_interleave": interleave}
        expected = local_slots(tokens, table, 64, **sharding)
        found = local_slots(gpu.upload(tokens), gpu.upload(table), 64, **sharding)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(gpu.LIBRARY.download(one), other)


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("layout", [None, "fp8_ds_mla"])
def test_sparse_in_a_graph(layout: str | None) -> None:
    """Slots are found, queries gathered, results exchanged and merged in the graph; each replay has other tokens."""
    arrays = DenseCase(lengths=(4096, 3000, 900), num_heads_q=16, seqlens_q=2, layout=layout).build()
    local = arrays.on(gpu.LIBRARY)
    rng = np.random.default_rng(0)
    tokens = gpu.upload(np.zeros((3, 2, 512), np.int32))
    given = (local.q, local.kv_cache)
    named = {"layout": layout, "kv_scale": local.kv_scale}
    indices, counts = local_slots(tokens, local.block_table, 64, cp_world=1, cp_rank=0)
    plan = plan_cp_sparse_decode(*given, indices, topk_length=counts, **named)
    out, lse = gpu.empty((3, 2, 16, 512), "bfloat16"), gpu.empty((3, 16, 2), "float32")

    def work() -> None:
        indices, counts = local_slots(tokens, local.block_table, 64, cp_world=1, cp_rank=0)
        cp_sparse_decode(*given, indices, topk_length=counts, plan=plan, out=out, lse=lse, **named)

    replay = gpu.capture(work)
    for most in (512, 100, 1):
        chosen = np.full((3, 2, 512), -1, np.int32)
        for row in np.ndindex(3, 2):
            chosen[row][:most] = rng.choice(900, most, replace=False)
        gpu.assign(tokens, gpu.upload(chosen))
        replay()
        slots = slots_of(chosen, arrays.block_table, 64)
        expected, expected_lse = mla_sparse_decode(arrays.q, arrays.kv_cache, slots, **named)
        assert frobenius_error(gpu.download(out), expected.astype(np.float64)) < 2 * MAX_ERROR
        np.testing.assert_allclose(gpu.download(lse), expected_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)
