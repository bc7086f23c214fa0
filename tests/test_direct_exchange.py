"""The direct exchange: its kernels run on the CPU, each rank in a thread, and what stands in where there is none."""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from host_kernels import library, needs_compiler, run_combine_push, run_merge_states, run_push, run_push_merge

from cupy_mla.arrays.dtypes import KERNEL_TYPES
from cupy_mla.kernels.exchange import PUSH_SOURCE, merges_packets

torch = pytest.importorskip("torch")

from cupy_mla.arrays.view import ArrayView, view  # noqa: E402
from cupy_mla.decode import merge  # noqa: E402
from cupy_mla.parallel import cp_decode, direct, host_memory, plan_cp_decode  # noqa: E402
from cupy_mla.parallel.group import TorchGroup  # noqa: E402
from cupy_mla.parallel.heads import Heads  # noqa: E402
from cupy_mla.parallel.host_memory import HostMemory, share_memory, sms_to_wait_on  # noqa: E402

pytestmark = pytest.mark.timeout(120)  # of ranks that wait for each other
WIDTH, HEAD_DIM_V = 128, 64
NUM_SMS = 3  # so few that CTAs have several rounds
MAX_PAUSE = 2e-3  # seconds
ASCENDING, DESCENDING = "ascending", "descending"


class HostLaunch:
    """As `launch.Launch`; in the place of a stream it is given a rank, in that of mla_combine_push its partial type."""

    def __init__(
        self, kernel: Any, grid: Any, block: Any, shared_memory: int, arguments: Any, *, programmatic: bool
    ) -> None:
        self.source, self.grid, self.block, self.arguments = kernel, grid[0], block[0], arguments

    def __call__(self, rank: int) -> None:
        launch = *self.arguments, self.grid, self.block, rank
        if self.source is PUSH_SOURCE:
            run_push(*launch)
        elif isinstance(self.source, str):
            run_combine_push(self.source, *launch)
        else:
            run_push_merge(tag_of(self.source), *launch)


def tag_of(source: Any) -> str:
    return dict(source.defines)["MLA_DTYPE"]


class Ranks:
    """Ranks of a group, each with memory on the CPU and a thread in which its kernels run."""

    def __init__(
        self,
        world: int,
        rows: tuple[int, ...],
        own: int,
        gathered: bool,
        dtype: Any,
        patch: pytest.MonkeyPatch,
        num_sms: int = NUM_SMS,
        *,
        mapped: str | None = None,  # in which order, if ranks may be query tokens
        in_packets: bool = False,  # queries and, of at most NUM_SMS rows, results
        head_dim_v: int = HEAD_DIM_V,
    ) -> None:
        self.of_thread, self.world, self.own, self.gathered, self.dtype = threading.local(), world, own, gathered, dtype
        patch.setattr(direct, "load", lambda source, device_id: source)
        patch.setattr(direct, "current_stream", lambda array, device_id: self.of_thread.rank)
        patch.setattr(direct, "Launch", HostLaunch)
        patch.setattr(direct, "goes_in_packets", lambda num_bytes: in_packets)
        patch.setattr(direct, "merges_packets", lambda *sizes: in_packets and merges_packets(*sizes))
        self.every, self.head_dim_v = (*rows, world * own), head_dim_v
        q = torch.zeros(*rows, world * own if gathered else own, WIDTH, dtype=dtype)
        heads = [
            Heads.of(q, TorchGroup(None, world, rank), gathered=gathered, head_dim_v=head_dim_v)
            for rank in range(world)
        ]
        self.memories = list(torch.zeros(world, direct._Places(heads[0]).total, dtype=torch.uint8))
        if mapped == DESCENDING:
            self.memories.reverse()
        pointers = [memory.data_ptr() for memory in self.memories]
        of_host = torch.tensor(pointers, dtype=torch.int64), None, num_sms
        self.exchanges = [
            direct.DirectExchange(q, of_rank, HostMemory(memory, *of_host), may_be_tokens=mapped is not None)
            for of_rank, memory in zip(heads, self.memories, strict=True)
        ]
        for rank in range(world):  # copies are made before threads ask for them
            library("Bf16", rank)
            library(KERNEL_TYPES[str(dtype).removeprefix("torch.")], rank)

    def own_heads(self, array: Any, rank: int) -> Any:
        return array[..., rank * self.own : (rank + 1) * self.own, :]

    def store_results(self, rank: int, out: Any, lse: Any) -> None:
        """What a decode does: results of all heads to where the exchange of a rank says."""
        exchange = self.exchanges[rank]
        if not exchange.as_tokens:
            exchange.out.copy_(out)
            exchange.lse.copy_(lse)
            return
        batch = len(out)
        store(exchange.out, out.view(batch, self.world, self.own, self.head_dim_v).view(torch.int16).numpy())
        store(exchange.lse, lse.view(batch, self.world, self.own).swapaxes(1, 2).numpy())

    def together(self, work: Callable[[int], Any]) -> list[Any]:
        """What a function of a rank returns, of all ranks at the same time."""

        def on_rank(rank: int) -> Any:
            self.of_thread.rank = rank
            return work(rank)

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(on_rank, range(self.world)))


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Any], tuple[Any, Any]]:
    """What `merge_states` gives of these on a GPU, by its kernel."""

    class Device:
        num_sms = NUM_SMS

    def launch(source: Any, grid: Any, block: Any, shared_memory: int, stream: Any, arguments: Any) -> None:
        run_merge_states(tag_of(source), arguments[0], grid[0], block[0])

    monkeypatch.setattr(merge, "require_supported", lambda device_id: Device)
    monkeypatch.setattr(merge, "load", lambda source, device_id: source)
    monkeypatch.setattr(merge, "launch_kernel", launch)

    def merge_states(outs: Any, lses: Any) -> tuple[Any, Any]:
        out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
        views = (view(array, "array") for array in (outs, lses, out, lse))
        merge.merge_views(*views, 0)
        return out, lse

    return merge_states


def store(view: ArrayView, values: np.ndarray) -> None:
    first = np.ctypeslib.as_array((ctypes.c_uint8 * view.itemsize).from_address(view.pointer)).view(values.dtype)
    assert view.shape == values.shape
    strides = [stride * view.itemsize for stride in view.strides]
    np.lib.stride_tricks.as_strided(first, view.shape, strides)[...] = values


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Any:
    return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("in_packets", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (5, 3), (7,), (40, 2), (0, 1)], ids=str)
@pytest.mark.parametrize(("world", "own"), [(1, 2), (2, 4), (3, 1)])
def test_queries_and_results_come_to_whom_they_are_for(
    world: int,
    own: int,
    rows: tuple[int, ...],
    gathered: bool,
    in_packets: bool,
    dtype: Any,
    merged: Callable[[Any, Any], tuple[Any, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = Ranks(world, rows, own, gathered, dtype, monkeypatch, in_packets=in_packets)
    check_calls(ranks, rows, merged)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "in_packets"), [(1, False), (2, True), (40, False)])
@pytest.mark.parametrize(("world", "own"), [(1, 2), (2, 4), (3, 2)])
@pytest.mark.parametrize("mapped", [ASCENDING, DESCENDING])
def test_the_decode_may_store_results_itself(
    mapped: str,
    world: int,
    own: int,
    batch: int,
    in_packets: bool,
    dtype: Any,
    merged: Callable[[Any, Any], tuple[Any, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the ranks of their heads, in whichever direction their memories are mapped."""
    ranks = Ranks(world, (batch, 1), own, False, dtype, monkeypatch, mapped=mapped, in_packets=in_packets)
    assert all(exchange.as_tokens for exchange in ranks.exchanges)
    check_calls(ranks, (batch, 1), merged)


@needs_compiler
@pytest.mark.parametrize("head_dim_v", [512, 520])  # a warp's whole row, and a little more
@pytest.mark.parametrize("batch", [23, 80])
def test_of_two_ranks_rows_that_the_decode_stores_are_merged_at_once(
    batch: int,
    head_dim_v: int,
    merged: Callable[[Any, Any], tuple[Any, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"mapped": DESCENDING, "head_dim_v": head_dim_v}
    check_calls(Ranks(2, (batch, 1), 3, False, torch.bfloat16, monkeypatch, **options), (batch, 1), merged)


@pytest.mark.parametrize(("gathered", "rows"), [(True, (4, 1)), (False, (4, 2)), (False, (4,))])
def test_of_other_queries_the_decode_stores_none_itself(
    gathered: bool, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(2, rows, 2, gathered, torch.bfloat16, monkeypatch, mapped=ASCENDING)
    assert not any(exchange.as_tokens for exchange in ranks.exchanges)


def check_calls(ranks: Ranks, rows: tuple[int, ...], merged: Callable[[Any, Any], tuple[Any, Any]]) -> None:
    """Calls one after the other, of which each has values of its own; ranks wait for nobody but each other."""
    world, gathered, dtype, calls = ranks.world, ranks.gathered, ranks.dtype, range(4)
    rng = np.random.default_rng(0)
    q = [normal(rng, (*ranks.every, WIDTH), dtype) for _ in calls]
    outs = normal(rng, (len(calls), world, *ranks.every, ranks.head_dim_v), dtype)
    lses = normal(rng, (len(calls), world, *rows[:-1], ranks.every[-1], rows[-1]), torch.float32)
    lses[:, 0] = torch.where(lses[:, 0] > 1, -torch.inf, lses[:, 0])  # nothing seen

    def work(rank: int) -> list[tuple[Any, Any]]:
        exchange, results = ranks.exchanges[rank], []
        pauses = random.Random(rank)
        for call in calls:
            time.sleep(pauses.choice([0, 1]) * MAX_PAUSE)
            queries = exchange.gather(q[call] if gathered else ranks.own_heads(q[call], rank))
            torch.testing.assert_close(queries.view(q[call].shape), q[call], rtol=0, atol=0)
            ranks.store_results(rank, outs[call, rank], lses[call, rank])
            time.sleep(pauses.choice([0, 1]) * MAX_PAUSE)
            out_shape, lse_shape = exchange.heads.result_shapes
            out, lse = torch.full(out_shape, torch.nan, dtype=dtype), torch.full(lse_shape, torch.nan)
            exchange.finish(out, lse)
            results.append((out, lse))
        return results

    for rank, results in enumerate(ranks.together(work)):
        for call, found in enumerate(results):
            of_rank = ranks.own_heads(outs[call], rank), ranks.own_heads(lses[call], rank)
            for one, wanted in zip(found, merged(*of_rank), strict=True):
                torch.testing.assert_close(one, wanted, rtol=0, atol=0)


@needs_compiler
@pytest.mark.parametrize(("batch", "own"), [(4, 2), (1, 1)])  # of one row, which may go in packets
@pytest.mark.parametrize(
    ("gathered", "mapped", "in_packets"),
    [
        (False, None, False),
        (False, None, True),
        (False, DESCENDING, False),
        (True, None, False),
        (True, None, True),
    ],
)
def test_a_quick_rank_spoils_nothing_that_a_slow_one_reads(
    gathered: bool, mapped: str | None, in_packets: bool, batch: int, own: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow one sees that all have come, and goes on only when the others have long gone on to the next call. Of one
    CTA each, as here one begins when the one before it has ended.
    """
    world, rows = 3, (batch, 1)
    options: dict[str, Any] = {"num_sms": 1, "mapped": mapped, "in_packets": in_packets}
    ranks = Ranks(world, rows, own, gathered, torch.bfloat16, monkeypatch, **options)
    slow = library("Bf16", 1)
    q = torch.zeros(*rows, world * own if gathered else own, WIDTH, dtype=torch.bfloat16)

    def work(rank: int) -> list[tuple[float, ...]]:
        exchange, found = ranks.exchanges[rank], []
        out_shape, lse_shape = exchange.heads.result_shapes
        out, lse = torch.empty(out_shape, dtype=q.dtype), torch.empty(lse_shape)
        no_lse = torch.zeros(rows[0], world * own, rows[1])
        for call in range(1, 9):
            queries = exchange.gather(torch.full_like(q, call)).view(*ranks.every, WIDTH)
            ranks.store_results(rank, queries[..., :HEAD_DIM_V], no_lse)
            exchange.finish(out, lse)
            found.append((call, *(float(value) for value in (out.min(), out.max(), lse.min(), lse.max()))))
        return found

    slow.host_wait_slowly(20_000)
    try:
        of_ranks = ranks.together(work)
    finally:
        slow.host_wait_slowly(0)
    for found in of_ranks:
        for call, least, most, *lses in found:
            assert least == most == call
            assert lses == pytest.approx([np.log(world)] * 2)


@needs_compiler
def test_results_go_where_the_caller_has_room(
    merged: Callable[[Any, Any], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into rows that begin anywhere, and lse of any strides."""
    ranks = Ranks(2, (4, 3), 3, True, torch.float16, monkeypatch)
    rng = np.random.default_rng(0)
    for exchange in ranks.exchanges:
        exchange.out.copy_(normal(rng, tuple(exchange.out.shape), torch.float16))
        exchange.lse.copy_(normal(rng, tuple(exchange.lse.shape), torch.float32))

    def work(rank: int) -> tuple[Any, Any]:
        out = torch.zeros(4, 3, 3, HEAD_DIM_V + 3, dtype=torch.float16)[..., 1:-2]
        lse = torch.zeros(4, 3, 3, 2)[..., 1].swapaxes(1, 2)
        ranks.exchanges[rank].finish(out, lse)
        return out, lse

    for rank, found in enumerate(ranks.together(work)):
        outs = torch.stack([ranks.own_heads(exchange.out, rank) for exchange in ranks.exchanges])
        lses = torch.stack([ranks.own_heads(exchange.lse, rank) for exchange in ranks.exchanges])
        for one, wanted in zip(found, merged(outs, lses), strict=True):
            torch.testing.assert_close(one, wanted, rtol=0, atol=0)


@needs_compiler
def test_queries_that_do_not_lie_in_whole_chunks_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(2, (4, 1), 3, False, torch.float16, monkeypatch)
    q = normal(np.random.default_rng(0), (*ranks.every, WIDTH), torch.float16)

    def work(rank: int) -> Any:
        padded = torch.zeros(4, 1, 3, WIDTH + 1, dtype=torch.float16)[..., :WIDTH]
        padded.copy_(ranks.own_heads(q, rank))
        return ranks.exchanges[rank].gather(padded)

    for queries in ranks.together(work):
        torch.testing.assert_close(queries, q, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (["a"], 132),
        (["a", "b"], 132),
        (["a", "small"], 114),
        (["a", "a"], 66),
        (["a", "b", "b", "b"], 44),
    ],
    ids=str,
)
def test_all_ranks_have_as_many_ctas_and_leave_others_on_their_gpu_some_sms(gpus: list[str], expected: int) -> None:
    assert sms_to_wait_on([("host", gpu, 114 if gpu == "small" else 132) for gpu in gpus]) == expected


def test_ranks_that_would_wait_for_ever_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts how often a process has shared memory, whatever the group; one rank was in another group before."""

    class Group(TorchGroup):
        def gather_objects(self, mine: Any) -> list[Any]:
            return [mine, mine + 1 if isinstance(mine, int) else mine]

    monkeypatch.setattr(host_memory, "_shared", 3)
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"))
    problem = share_memory(Group(None, 2, 0), 16, tensor)
    assert problem == "ranks have shared memory 3 to 4 times before, and torch wants all as often"


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
