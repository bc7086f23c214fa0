"""Context-parallel decode on one GPU: rank after rank, which a stand-in for their group lets be many; and NCCL with one
rank, in CUDA graphs too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cases_chosen import attend_to_chosen, choose_tokens
from cases_dense import DenseCase, frobenius_error

from cupy_mla.lab.libraries import CUPY, ArrayLibrary
from cupy_mla.lab.shards import shards_of
from cupy_mla.parallel import (
    ContextParallelPlan,
    cp_decode,
    cp_sparse_decode,
    local_slots,
    plan_cp_decode,
    plan_cp_sparse_decode,
)
from cupy_mla.parallel.group import TorchGroup

from . import gpu_arrays as gpu

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.timeout(60)

MAX_ERROR, LSE_TOLERANCE = 3e-3, 1e-5
FP8_LSE_TOLERANCE = 2e-4  # of an FP8 cache, computed exactly
LENGTHS = (0, 1, 3, 63, 130, 1000, 4096, 5003)


def check(
    case: DenseCase,
    out: Any,
    lse: Any,
    lengths: tuple[int, ...] | None = None,
    library: ArrayLibrary = gpu.LIBRARY,
) -> None:
    arrays = case.build()
    if lengths is not None:
        arrays.cache_seqlens[:] = lengths
    exact_out, exact_lse = arrays.exact()
    out, lse = library.download(out).astype(np.float64), library.download(lse)
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


@contextlib.contextmanager
def group_of(rank: int, world: int) -> Iterator[None]:
    """A group whose other ranks there are not; nothing can be sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    yield
    torch.distributed.destroy_process_group()


def merge(plans: list[Any]) -> tuple[Any, Any]:
    """What each rank gets of what all of them wrote, put together: out and lse of all heads."""
    for plan in plans:
        plan._exchange.send()
    all_to_all(plans)
    results = []
    for plan in plans:
        out_shape, lse_shape = plan._exchange.heads.result_shapes
        out = plan._exchange.queries.new_full(out_shape, torch.nan)
        lse = plan._exchange.queries.new_full(lse_shape, torch.nan, dtype=torch.float32)
        plan._exchange.merge(out, lse)
        results.append((out, lse))
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, -2), torch.cat(lses, -2)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(("world", "interleave"), [(2, 16), (4, 1), (8, 64)])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads_q": 128},
        {"num_heads_q": 16},
        {"num_heads_q": 64, "seqlens_q": 3, "causal": True},
        {"num_heads_q": 128, "seqlens_q": 3, "causal": True},
        {"num_heads_q": 16, "seqlens_q": (1, 2, 0, 4, 3, 2, 1, 4), "causal": True},
    ],
    ids=str,
)
def test_ranks_one_after_the_other(
    changes: dict[str, Any], world: int, interleave: int, gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = DenseCase(lengths=LENGTHS, **changes)
    arrays = case.build()
    heads = case.num_heads_q // world
    total = gpu.upload(arrays.cache_seqlens)
    plans = []
    for shard, share in shards_of(arrays, world, interleave):
        local = share.on(gpu.LIBRARY)
        q = local.q if gathered else local.q[..., shard.rank * heads : (shard.rank + 1) * heads, :].contiguous()
        options = {"causal": case.causal, "cu_seqlens_q": local.cu_seqlens_q, "cp_interleave": interleave}
        with group_of(shard.rank, world):
            plan = plan_cp_decode(q, local.kv_cache, local.block_table, total, **options, gathered=gathered)
        by_rank = local.q.unflatten(-2, (world, heads)).movedim(-3, 0)
        monkeypatch.setattr(TorchGroup, "all_gather", lambda self, gathering, mine, q=by_rank: gathering.copy_(q))
        plan.decode((q, local.kv_cache, local.block_table, total, local.cu_seqlens_q, None), None)
        plans.append(plan)
    check(case, *merge(plans))


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


@pytest.fixture
def communicator() -> Any:
    """NCCL through CuPy, of one rank; without the server by which cupyx.distributed has ranks find each other."""
    nccl = pytest.importorskip("cupy.cuda.nccl")
    if not nccl.available:
        pytest.skip("CuPy finds no NCCL")
    from cupyx.distributed import NCCLBackend

    class OneRank(NCCLBackend):
        def __init__(self) -> None:
            self._n_devices, self.rank, self._use_mpi = 1, 0, False
            self._comm = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)

        def stop(self) -> None:
            self._comm.destroy()

    communicator = OneRank()
    yield communicator
    communicator.stop()


@pytest.mark.parametrize("seqlens_q", [1, 2])
def test_cupy_arrays_in_a_graph(seqlens_q: int, communicator: Any) -> None:
    """As above, with CuPy's arrays, streams, graphs and NCCL."""
    import cupy

    case = DenseCase(lengths=(4096, 3000, 900), num_heads_q=16, seqlens_q=seqlens_q, causal=True)
    inputs, options = case.build().on(CUPY).tensors, {"causal": True, "group": communicator}
    out = CUPY.empty((3, seqlens_q, 16, 512), "bfloat16")
    lse = CUPY.upload(np.full((3, 16, seqlens_q), np.nan, np.float32))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        plan = plan_cp_decode(*inputs, **options)

        def work() -> None:
            plan.update(inputs[-1])
            cp_decode(*inputs, **options, plan=plan, out=out, lse=lse)

        work()
        stream.synchronize()
        stream.begin_capture()
        work()
        graph = stream.end_capture()
        for lengths in ((4096, 3000, 900), (1, 33, 17), (0, 2, 900), (4000, 1, 64)):
            inputs[-1].set(np.array(lengths, np.int32))
            graph.launch(stream)
            stream.synchronize()
            check(case, out, lse, lengths, CUPY)


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


TOPK = 512


def check_chosen(arrays: Any, tokens: np.ndarray, out: Any, lse: Any) -> None:
    """Against the whole cache, in float64."""
    exact_out, exact_lse = attend_to_chosen(arrays, tokens)
    out, lse = gpu.download(out), gpu.download(lse)
    for request in range(arrays.batch):
        assert frobenius_error(out[request], exact_out[request]) < MAX_ERROR, request
    tolerance = LSE_TOLERANCE if arrays.layout is None else FP8_LSE_TOLERANCE
    np.testing.assert_allclose(lse, exact_lse, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", [None, "fp8_e4m3", "fp8_ds_mla"])
@pytest.mark.parametrize(("world", "interleave"), [(2, 16), (4, 1), (8, 64)])
@pytest.mark.parametrize(("heads", "seqlen_q"), [(128, 1), (16, 2), (32, 2), (64, 4)])
def test_sparse_ranks_in_a_graph(
    heads: int, seqlen_q: int, world: int, interleave: int, layout: str | None
) -> None:
    """All ranks one after the other in one graph: slots, decodes, merges; each replay has other tokens."""
    case = DenseCase(lengths=LENGTHS, num_heads_q=heads, seqlens_q=seqlen_q, layout=layout)
    arrays = case.build()
    tokens = gpu.upload(np.full((len(LENGTHS), seqlen_q, TOPK), -1, np.int32))
    ranks = []
    for shard, share in shards_of(arrays, world, interleave):
        local = share.on(gpu.LIBRARY)
        sharding = {"cp_world": world, "cp_rank": shard.rank, "cp_interleave": interleave}
        indices, counts = local_slots(tokens, local.block_table, 64, **sharding)
        options = {"layout": layout, "kv_scale": local.kv_scale, "topk_length": counts, "gathered": True}
        with group_of(shard.rank, world):
            ranks.append((local, sharding, plan_cp_sparse_decode(local.q, local.kv_cache, indices, **options)))

    def work() -> None:
        for local, sharding, plan in ranks:
            indices, counts = local_slots(tokens, local.block_table, 64, **sharding)
            plan.decode((local.q, local.kv_cache, indices, counts, local.kv_scale), None)
        results[:] = merge([plan for *_, plan in ranks])

    results: list[Any] = []
    replay = gpu.capture(work)
    for most in (TOPK, 1, 100):
        chosen = choose_tokens(LENGTHS, seqlen_q, TOPK, most)
        gpu.assign(tokens, gpu.upload(chosen))
        replay()
        check_chosen(arrays, chosen, *results)


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("way", ["a2a", "ag_rs"])
@pytest.mark.parametrize("layout", [None, "fp8_ds_mla"])
def test_sparse_over_nccl_in_a_graph(layout: str | None, way: str) -> None:
    """Slots are found, queries gathered, results exchanged and merged in the graph; each replay has other tokens."""
    lengths = (4096, 3000, 900)
    arrays = DenseCase(lengths=lengths, num_heads_q=16, seqlens_q=2, layout=layout).build()
    local = arrays.on(gpu.LIBRARY)
    tokens = gpu.upload(np.zeros((3, 2, TOPK), np.int32))
    given, named = (local.q, local.kv_cache), {"layout": layout, "kv_scale": local.kv_scale, "exchange": way}
    indices, counts = local_slots(tokens, local.block_table, 64, cp_world=1, cp_rank=0)
    plan = plan_cp_sparse_decode(*given, indices, topk_length=counts, **named)
    out, lse = gpu.empty((3, 2, 16, 512), "bfloat16"), gpu.empty((3, 16, 2), "float32")

    def work() -> None:
        indices, counts = local_slots(tokens, local.block_table, 64, cp_world=1, cp_rank=0)
        cp_sparse_decode(*given, indices, topk_length=counts, plan=plan, out=out, lse=lse, **named)

    replay = gpu.capture(work)
    for most in (TOPK, 100, 1, 0):
        chosen = choose_tokens(lengths, 2, TOPK, most)
        gpu.assign(tokens, gpu.upload(chosen))
        replay()
        check_chosen(arrays, chosen, out, lse)
