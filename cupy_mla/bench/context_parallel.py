"""How long a context-parallel decode takes: measured where it can be, else put together from what can be measured and a
model of the rest (parallel/model.py)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arrays.frameworks import CUDA, current_stream
from ..arrays.view import view
from ..call.shard import Shard
from ..decode.dense import mla_decode
from ..decode.merge import merge_views
from ..errors import InvalidArgumentError
from ..lab.build import build_case
from ..lab.cases import Case
from ..lab.launched import library_of
from ..lab.libraries import NUMPY, ArrayLibrary
from ..lab.sharded_check import of_shard
from ..lab.timing import CALLS_PER_GRAPH, CPU_REPEATS, WallClock, make_timer, time_decode, time_replays
from ..parallel import cp_decode, plan_cp_decode
from ..parallel.model import CallSize, StepTimes, model_times
from ..shown.tables import print_lines, print_table
from .grid import DECODE, BenchCase

_PARTS = ("gather", "decode", "copies", "exchange", "merge")
TITLES = ("case", "ranks", "one GPU us", *_PARTS, "total us", "times as fast")
NOTES = (
    "~: by the model. Collectives as between two H200 of one host (NCCL 2.28, CUDA graphs), by the bytes that a rank",
    "receives: over more ranks they take longer. Decode: the cost model by which kernels are chosen, on an H200.",
)
_US = 1e6
# Processes begin a replay up to 50 us after one another, of which each of 4 calls would have 12.
_REPLAYS_TOGETHER = 8


@dataclass(frozen=True, slots=True)
class ShardedRow:
    """A case on so many ranks; microseconds.

    Attributes
    ----------
    name, world
        Of the case, and ranks.
    whole
        A decode of the whole cache on one GPU.
    times
        The parts; None where only the whole call was timed.
    total
        The call on the slowest rank.
    measured
        What was measured: names of the others, and of the parts. All else is the model's.
    """

    name: str
    world: int
    whole: float
    times: StepTimes | None
    total: float
    measured: frozenset[str]

    def texts(self) -> list[str]:
        """A line of the table."""

        def text(name: str, value: float) -> str:
            return f"{'' if name in self.measured else '~'}{value:,.1f}"

        times = ["" if self.times is None else text(name, getattr(self.times, name)) for name in _PARTS]
        is_measured = {"whole", "total"} <= self.measured
        faster = f"{'' if is_measured else '~'}{self.whole / self.total:.2f}"
        whole, total = text("whole", self.whole), text("total", self.total)
        return [self.name, str(self.world), whole, *times, total, faster]


def size_of(case: BenchCase) -> CallSize:
    """What the model looks at.

    Raises
    ------
    InvalidArgumentError
        The case is not dense, or its requests are not all alike.
    """
    if case.function != DECODE or case.ragged is not None or not isinstance(case.lengths, int):
        raise InvalidArgumentError("--context-parallel", "dense decoding of requests that are alike", case.name)
    return CallSize(
        case.batch,
        case.lengths,
        case.num_heads_q,
        seqlen_q=case.seqlen_q,
        causal=case.causal,
        page_size=case.page_size,
        dtype=case.dtype,
        latent_dim=case.latent_dim,
        rope_dim=case.rope_dim,
        layout=case.layout,
    )


def model_rows(case: BenchCase, worlds: Sequence[int]) -> Iterator[ShardedRow]:
    """A case by the model alone, which needs no GPU."""
    size = size_of(case)
    _require_heads(case, worlds)
    whole = model_times(size, 1).total
    for world in worlds:
        times = model_times(size, world, case.page_size)
        yield ShardedRow(case.name, world, whole, times, times.total, frozenset())


def shard_rows(case: BenchCase, worlds: Sequence[int], library: ArrayLibrary) -> Iterator[ShardedRow]:
    """A case with what one GPU can show: the decode of the largest shard, and the merge of all ranks' results."""
    size = size_of(case)
    _require_heads(case, worlds)
    whole = time_decode(build_case(case.spec, library)).seconds * _US
    library.release()
    for world in worlds:
        shard = Shard(world, 0, case.page_size)
        share = _share(case, shard, library)
        decode = time_decode(share, _decode_call(share, shard, case)).seconds * _US
        merge = _merge_seconds(case, world, library) * _US
        times = replace(model_times(size, world, case.page_size), decode=decode, merge=merge)
        yield ShardedRow(case.name, world, whole, times, times.total, frozenset({"whole", "decode", "merge"}))
        library.release()


def group_row(case: BenchCase, group: Any, backend: str, *, exchange: str) -> ShardedRow:
    """A case as it is, on the processes of a torch process group, each of which calls this and gets the same row."""
    import torch

    size_of(case)
    world, rank = group.size(), group.rank()
    _require_heads(case, (world,))
    whole_library = NUMPY if backend == "numpy" else library_of(backend)
    whole = time_decode(build_case(case.spec, whole_library)).seconds
    whole_library.release()
    # All have as many tokens as the first may have, so that all make graphs of as many calls.
    library = library_of(backend)
    share, heads = _share(case, Shard(world, 0, case.page_size), library), case.num_heads_q // world
    q = share.q[..., rank * heads : (rank + 1) * heads, :].contiguous()
    table, total = share.block_table, library.upload(case.kv_lengths.astype(np.int32))
    options = {**share.options, "cp_interleave": case.page_size, "group": group, "exchange": exchange}
    of_plan = {name: value for name, value in options.items() if name != "softmax_scale"}
    plan = plan_cp_decode(q, share.kv_cache, table, total, **of_plan)
    out, lse = cp_decode(q, share.kv_cache, table, total, **options, plan=plan)

    def call(cache: Any) -> object:
        return cp_decode(q, cache, table, total, **options, plan=plan, out=out, lse=lse)

    if backend == "numpy":  # by no limit of time, as each process has to make as many calls
        clock = WallClock(call, [share.kv_cache], 1)
        seconds = statistics.median(clock.seconds() for _ in range(CPU_REPEATS))
    else:
        seconds = time_decode(share, call, _REPLAYS_TOGETHER).seconds
    slowest = torch.tensor([whole, seconds], dtype=torch.float64, device=q.device)
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX, group=group)
    whole_us, total_us = (slowest * _US).tolist()
    return ShardedRow(case.name, world, whole_us, None, total_us, frozenset({"whole", "total"}))


def print_rows(rows: Sequence[ShardedRow]) -> None:
    """The table, and what is by the model in it."""
    print_table([title.replace(" ", "\n") for title in TITLES], [row.texts() for row in rows])
    if any(row.times is not None for row in rows):
        print_lines(NOTES)


def _require_heads(case: BenchCase, worlds: Sequence[int]) -> None:
    for world in worlds:
        if case.num_heads_q % world:
            expected = f"a number of ranks that share out {case.num_heads_q} heads equally"
            raise InvalidArgumentError("--context-parallel", expected, str(world))


def _share(case: BenchCase, shard: Shard, library: ArrayLibrary) -> Case:
    """All queries, and as many tokens as a rank has."""
    lengths = tuple(int(count) for count in shard.count(case.kv_lengths))
    share = build_case(replace(case.spec, lengths=lengths), library)
    assert isinstance(share, Case)
    return share


def _decode_call(share: Case, shard: Shard, case: BenchCase) -> Callable[[Any], object]:
    """A decode of all heads over a shard, as every layer of a step but the first makes it."""
    sharded = of_shard(shard, share.library.upload(case.kv_lengths.astype(np.int32)))
    plan = share.plan(**sharded)
    named: dict[str, Any] = {**share.options, **sharded, "plan": plan}
    q, cache, table, lengths = share.tensors
    out, lse = mla_decode(q, cache, table, lengths, **named)
    return lambda cache: mla_decode(q, cache, table, lengths, **named, out=out, lse=lse, validate=False)


def _merge_seconds(case: BenchCase, world: int, library: ArrayLibrary) -> float:
    heads = case.num_heads_q // world
    of_out = case.batch, case.seqlen_q, heads, case.latent_dim
    of_lse = case.batch, heads, case.seqlen_q
    outs = library.normal((world, *of_out), case.dtype, 0)
    lses = library.normal((world, *of_lse), "float32", 1)
    out, lse = library.empty(of_out, case.dtype), library.empty(of_lse, "float32")
    states = view(outs, "outs"), view(lses, "lses")
    merged = view(out, "out"), view(lse, "lse")
    location = states[0].location

    def merge(_: Any) -> None:
        merge_views(*states, *merged, current_stream(outs, location[1]) if location[0] == CUDA else None)

    return time_replays(make_timer(library, merge, [None], CALLS_PER_GRAPH), CALLS_PER_GRAPH, 1).seconds
