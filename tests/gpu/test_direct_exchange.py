"""The direct exchange on one GPU: ranks on streams of one process, and in processes of their own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases_chosen import attend_to_chosen, choose_tokens
from cases_dense import DenseCase, frobenius_error
from direct_ranks import LENGTHS, SHORTER, TOPK, Call, on_rank, planned_exchange
from gloo_ranks import Ranks

from cupy_mla.gpu.hopper import MAX_SMS
from cupy_mla.kernels.exchange import WORD_BYTES
from cupy_mla.lab.shards import shards_of
from cupy_mla.parallel import cp_decode, direct, plan_cp_decode
from cupy_mla.parallel.group import TorchGroup
from cupy_mla.parallel.host_memory import HostMemory

from . import gpu_arrays as gpu
from .test_cp_decode import LSE_TOLERANCE, MAX_ERROR, check, group_of

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.timeout(150)

COME = 2**30  # a meeting that nobody waits for


class SharedMemory:
    """What `share_memory` gives, of ranks of this process."""

    def __init__(self, world: int) -> None:
        self.world, self.memories = world, []

    def of(self, ranks: TorchGroup, size: int, like: Any) -> HostMemory:
        if not self.memories:
            self.memories = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(self.world)]
            pointers = [memory.data_ptr() for memory in self.memories]
            self.addresses = torch.tensor(pointers, dtype=torch.int64, device="cuda")
        num_sms = torch.cuda.get_device_properties(like.device).multi_processor_count // self.world
        return HostMemory(self.memories[ranks.rank], self.addresses, None, num_sms)

    def fill(self, meeting: int, places: direct._Places) -> None:
        """As if all had come to so many meetings; and this process to none."""
        for memory in self.memories:
            memory.zero_()
            for flags in (places.query_flags, places.result_flags):
                memory[flags:][: MAX_SMS * self.world * WORD_BYTES].view(torch.int32).fill_(meeting)
            memory[places.packets : places.outs].view(torch.int32).fill_(meeting)  # each with its mark
        torch.cuda.synchronize()


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads_q": 128},
        {"num_heads_q": 16, "lengths": LENGTHS[:2]},  # so few rows that they go in packets
        {"num_heads_q": 64, "lengths": LENGTHS[:1], "seqlens_q": 2, "causal": True},
        {"num_heads_q": 16, "seqlens_q": 3, "causal": True},
        {"num_heads_q": 64, "seqlens_q": (1, 2, 0, 4, 3, 2), "causal": True},
    ],
    ids=str,
)
def test_ranks_on_streams(
    changes: dict[str, Any], world: int, gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs that wait for each other, started in either order."""
    case = DenseCase(**{"lengths": LENGTHS, **changes})
    requests = len(case.lengths)
    arrays = case.build()
    total, shared = gpu.upload(arrays.cache_seqlens), SharedMemory(world)
    monkeypatch.setattr(direct, "share_memory", shared.of)
    ranks: list[Any] = []
    for shard, share in shards_of(arrays, world, 16):
        local, own = share.on(gpu.LIBRARY), case.num_heads_q // world
        q = local.q if gathered else local.q[..., shard.rank * own : (shard.rank + 1) * own, :].contiguous()
        named = {"causal": case.causal, "cu_seqlens_q": local.cu_seqlens_q, "cp_interleave": 16}
        named |= {"gathered": gathered, "exchange": "direct"}
        inputs = q, local.kv_cache, local.block_table, total
        with group_of(shard.rank, world):
            plan = plan_cp_decode(*inputs, **named)
        out_shape, lse_shape = plan._exchange.heads.result_shapes
        results = gpu.empty(out_shape, "bfloat16"), gpu.empty(lse_shape, "float32")

        def work(inputs: Any = inputs, named: Any = named, plan: Any = plan, results: Any = results) -> None:
            plan.update(total, named["cu_seqlens_q"])
            for _ in range(2):  # layers
                cp_decode(*inputs, **named, plan=plan, out=results[0], lse=results[1])

        ranks.append((work, results))
    places = plan._exchange._places
    shared.fill(COME, places)
    for work, _ in ranks:  # kernels are loaded while nobody waits for another
        work()
    torch.cuda.synchronize()
    graphs, streams = [torch.cuda.CUDAGraph() for _ in ranks], [torch.cuda.Stream() for _ in ranks]
    for graph, (work, _) in zip(graphs, ranks, strict=True):
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            work()
    shared.fill(0, places)
    for lengths in (LENGTHS[:requests], SHORTER[:requests], LENGTHS[:requests]):
        gpu.assign(total, gpu.upload(np.array(lengths, np.int32)))
        torch.cuda.synchronize()
        pairs = list(zip(graphs, streams, strict=True))
        for graph, stream in pairs if lengths == case.lengths else reversed(pairs):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        outs, lses = zip(*(results for _, results in ranks), strict=True)
        check(case, torch.cat(outs, -2), torch.cat(lses, -2), lengths)


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Ranks]]:
    """Ranks by their number, in processes that belong to no other group."""
    with contextlib.ExitStack() as started:
        yield functools.cache(lambda world: started.enter_context(Ranks((world,), tmp_path_factory.mktemp("ranks"))))


@pytest.mark.parametrize(
    ("world", "call"),
    [
        (2, Call(heads=128)),
        (2, Call(heads=16, seqlens_q=2, gathered=True)),
        (2, Call(heads=32, requests=2)),
        (2, Call(heads=16, seqlens_q=(1, 2, 0, 4, 3, 2))),
        (3, Call(heads=48)),
        (2, Call(heads=64, seqlens_q=2, sparse=True)),
    ],
    ids=str,
)
def test_ranks_in_processes(world: int, call: Call, ranks_of: Callable[[int], Ranks]) -> None:
    """Through torch's symmetric memory; without NCCL, which takes one process a GPU."""
    of_ranks = ranks_of(world).run(world, on_rank, call)
    for results, lengths in zip(zip(*of_ranks, strict=True), (LENGTHS, LENGTHS, SHORTER, LENGTHS), strict=True):
        out, lse = (np.concatenate(parts, axis=-2) for parts in zip(*results, strict=True))
        arrays = call.case.build()
        if call.sparse:
            tokens = choose_tokens(LENGTHS, call.seqlens_q, TOPK, TOPK if lengths == LENGTHS else 5)
            exact_out, exact_lse = attend_to_chosen(arrays, tokens)
        else:
            arrays.cache_seqlens[:] = arrays.kv_lengths[:] = lengths[: call.requests]
            exact_out, exact_lse = arrays.exact()
        assert frobenius_error(out.astype(np.float64), exact_out) < MAX_ERROR
        np.testing.assert_allclose(lse, exact_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


def test_ranks_of_a_second_group_that_not_all_come_to_alike(tmp_path: Path) -> None:
    """torch would have them wait for each other for ever."""
    with Ranks((2, 3), tmp_path) as ranks:
        assert ranks.run(2, planned_exchange) == ["direct"] * 2
        assert ranks.run(3, planned_exchange) == ["a2a"] * 3
        assert ranks.run(2, planned_exchange) == ["direct"] * 2
