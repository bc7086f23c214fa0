"""The direct exchange: its kernel run on the CPU, rank after rank, and what stands in for it where there is none."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from host_kernels import needs_compiler, run_push

torch = pytest.importorskip("torch")

from cupy_mla import merge_states  # noqa: E402
from cupy_mla.parallel import cp_decode, direct, plan_cp_decode  # noqa: E402
from cupy_mla.parallel.group import TorchGroup  # noqa: E402
from cupy_mla.parallel.heads import Heads  # noqa: E402
from cupy_mla.parallel.host_memory import HostMemory  # noqa: E402

WIDTH, HEAD_DIM_V = 128, 64
COME = 2**30  # a meeting that nobody waits for
NUM_SMS = 3  # so few that threads have several chunks


class Ranks:
    """Ranks of a group, each with memory on the CPU; a kernel runs before the next one's."""

    def __init__(self, world: int, rows: tuple[int, ...], own: int, gathered: bool, dtype: Any) -> None:
        rng = np.random.default_rng(0)
        self.dtype, every = dtype, (*rows, world * own)
        self.q = self.values(rng, (*every, WIDTH))
        self.given = [self.q if gathered else self.q[..., rank * own : (rank + 1) * own, :] for rank in range(world)]
        heads = [
            Heads.of(q, TorchGroup(None, world, rank), gathered=gathered, head_dim_v=HEAD_DIM_V)
            for rank, q in enumerate(self.given)
        ]
        size = direct._Places(heads[0]).total
        self.memories = [torch.zeros(size, dtype=torch.uint8) for _ in range(world)]
        addresses = torch.tensor([memory.data_ptr() for memory in self.memories], dtype=torch.int64)
        self.exchanges = [
            direct.DirectExchange(q, of_rank, HostMemory(memory, addresses, None))
            for q, of_rank, memory in zip(self.given, heads, self.memories, strict=True)
        ]
        for exchange in self.exchanges:
            exchange.out.copy_(self.values(rng, tuple(exchange.out.shape)))
            exchange.lse.copy_(torch.from_numpy(rng.standard_normal(tuple(exchange.lse.shape), np.float32)))

    def values(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
        return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(self.dtype)

    def words(self, rank: int) -> Any:
        """The last meeting of each rank, as this one knows it."""
        return self.memories[rank][: len(self.memories) * 4].view(torch.int32)

    def meet(self, run: Any, meeting: int) -> list[Any]:
        """What a function of an exchange and its rank returns on each rank, at a meeting of that number."""
        results = []
        for rank, exchange in enumerate(self.exchanges):
            self.words(rank)[:] = COME
            results.append(run(exchange, rank))
            assert {int(self.words(other)[rank]) for other in range(len(self.memories))} == {meeting}
        return results


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        num_sms = NUM_SMS

    def launch(kernel: Any, grid: Any, block: Any, shared_memory: int, stream: Any, arguments: Any) -> None:
        run_push(arguments[0], grid[0], block[0])

    monkeypatch.setattr(direct, "describe_device", lambda device_id: Device)
    monkeypatch.setattr(direct, "load", lambda source, device_id: None)
    monkeypatch.setattr(direct, "current_stream", lambda array, device_id: 0)
    monkeypatch.setattr(direct, "launch_kernel", launch)


@needs_compiler
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (5, 3), (7,)], ids=str)
@pytest.mark.parametrize(("world", "own"), [(1, 2), (2, 4), (3, 1)])
def test_queries_and_results_come_to_whom_they_are_for(
    world: int, own: int, rows: tuple[int, ...], gathered: bool, dtype: Any
) -> None:
    ranks = Ranks(world, rows, own, gathered, dtype)
    for call in range(2):
        for queries in ranks.meet(lambda exchange, rank: exchange.gather(ranks.given[rank]), 2 * call + 1):
            if gathered:
                torch.testing.assert_close(queries, ranks.q, rtol=0, atol=0)
        for exchange in ranks.exchanges:  # the last rank's have come by now
            torch.testing.assert_close(exchange.queries, ranks.q, rtol=0, atol=0)
        ranks.meet(lambda exchange, rank: exchange._push(exchange._send_results), 2 * call + 2)
        for rank, exchange in enumerate(ranks.exchanges):
            of_rank = slice(rank * own, (rank + 1) * own)
            outs = [other.out[..., of_rank, :] for other in ranks.exchanges]
            lses = [other.lse[..., of_rank, :] for other in ranks.exchanges]
            expected = merge_states(outs, lses)
            out, lse = torch.zeros_like(expected[0]), torch.zeros_like(expected[1])
            direct.merge_received(*exchange._received, out, lse)
            for found, wanted in zip((out, lse), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@needs_compiler
@pytest.mark.usefixtures("on_the_cpu")
def test_queries_that_do_not_lie_in_whole_chunks_are_copied() -> None:
    ranks = Ranks(2, (4, 1), 3, False, torch.float16)
    padded = torch.zeros(4, 1, 3, WIDTH + 1, dtype=torch.float16)[..., :WIDTH]
    padded.copy_(ranks.given[1])
    ranks.given[1] = padded
    ranks.meet(lambda exchange, rank: exchange.gather(ranks.given[rank]), 1)
    torch.testing.assert_close(ranks.exchanges[0].queries, ranks.q, rtol=0, atol=0)


def test_without_gpus_results_go_by_an_all_to_all() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        q = torch.randn(2, 1, 4, 576).to(torch.bfloat16)
        kv_cache = torch.from_numpy(np.ones((2, 16, 1, 576), ml_dtypes.bfloat16).view(np.int16)).view(torch.bfloat16)
        table, total = torch.tensor([[0], [1]], dtype=torch.int32), torch.tensor([16, 3], dtype=torch.int32)
        with pytest.warns(RuntimeWarning, match="no direct exchange: tensors are on cpu; results go by an all-to-all"):
            plan = plan_cp_decode(q, kv_cache, table, total, exchange="direct")
        assert plan.exchange == "a2a"
        found = cp_decode(q, kv_cache, table, total, exchange="direct", plan=plan)
        for one, other in zip(found, cp_decode(q, kv_cache, table, total), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    finally:
        torch.distributed.destroy_process_group()
