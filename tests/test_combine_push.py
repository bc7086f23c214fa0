"""Pieces that are merged and handed to the ranks of their heads by one kernel: on the CPU, each rank in a thread."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from host_kernels import MARKED, SCALED, library, needs_compiler, run_combine
from test_merge_kernels import device_plan, random_partials

from cupy_mla.gpu.hopper import WARP_THREADS
from cupy_mla.kernels import exchange as kernels
from cupy_mla.kernels.combine import OCTET
from cupy_mla.kernels.exchange import combine_push_geometry
from cupy_mla.kernels.planner import plan_sections
from cupy_mla.kernels.structs import COMBINE_PARAMS
from cupy_mla.schedule.make import make_schedule
from cupy_mla.schedule.shape import ScheduleShape

torch = pytest.importorskip("torch")

from test_direct_exchange import MAX_PAUSE, WIDTH, Ranks, merged  # noqa: E402, F401  (a fixture)

from cupy_mla.parallel import direct  # noqa: E402

pytestmark = [needs_compiler, pytest.mark.timeout(120)]
NUM_SMS = 36
CALLS = range(4)


@dataclass(frozen=True)
class Case:
    """A schedule for all heads; its requests' lengths, and what the ranks have of a request's rows."""

    shape: ScheduleShape
    lengths: tuple[int, ...]
    offsets: tuple[int, ...] | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        shape = self.shape
        return (self.offsets[-1],) if self.offsets else (shape.batch, shape.seqlen_q)

    @property
    def heads(self) -> int:
        return self.shape.num_heads_kv * self.shape.group_heads


CASES = {
    "one request": Case(ScheduleShape(40, 1, 16, 12, 1, 1, 1, 4096), (4000,)),
    "some are whole": Case(ScheduleShape(5, 1, 16, 6, 1, 4, 1, 4096, fixed_split_tokens=320), (3000, 100, 0, 2000)),
    "kv heads": Case(ScheduleShape(30, 1, 16, 3, 2, 2, 2, 4096, causal=True), (4000, 3000)),
    "row blocks": Case(ScheduleShape(40, 2, 16, 36, 1, 1, 1, 4096), (4000,)),
    "ragged": Case(
        ScheduleShape(20, 2, 16, 6, 1, 4, 3, 4096, ragged=True, total_q=4), (4000, 9, 3000, 70), (0, 2, 2, 3, 4)
    ),
    "all are whole": Case(ScheduleShape(5, 1, 16, 6, 1, 2, 1, 4096, fixed_split_tokens=4096), (300, 100)),
}


class RankOfPieces:
    """What the decode of a rank leaves for each call."""

    def __init__(self, case: Case, rank: int, tag: str, d_v: int) -> None:
        rng, shape = np.random.default_rng(rank), case.shape
        lengths, offsets = np.array(case.lengths), None if case.offsets is None else np.array(case.offsets)
        schedule = make_schedule(shape, lengths, offsets)
        self.tag, self.has_merges = tag, len(schedule.merges) > 0
        partials = [random_partials(rng, tag, max(schedule.num_slots, 1), shape.rows_per_job, d_v) for _ in CALLS]
        self.partials, self.plan = [two[:2] for two in partials], device_plan(shape, lengths, offsets)
        shape_of_all = (*case.rows, case.heads)
        outs = rng.standard_normal((len(CALLS), *shape_of_all, d_v), np.float32)
        self.outs = torch.from_numpy(outs).to(torch.bfloat16)  # of whole jobs; pieces are merged over the others
        lses = rng.standard_normal((len(CALLS), *case.rows[:-1], case.heads, case.rows[-1]), np.float32)
        self.lses = torch.from_numpy(lses)
        params = self.params = np.zeros(1, COMBINE_PARAMS)
        params["plan"], params["merges_offset"] = self.plan.ctypes.data, plan_sections(shape).merges_offset
        params["slot_rows"], params["rows"], params["group_heads"] = shape.rows_per_job, shape.rows, shape.group_heads
        params["d_v"], params["aligned"], params["empty_lse"] = d_v, 1, -np.inf

    def point_at(self, call: int) -> None:
        out, lse = self.partials[call]
        self.params["partial_out"], self.params["partial_lse"] = out.ctypes.data, lse.ctypes.data

    def merged(self, call: int) -> tuple[Any, Any]:
        """Results as mla_combine makes them."""
        self.point_at(call)
        out, lse, params = self.outs[call].clone(), self.lses[call].clone(), self.params.copy()
        params["out"], params["lse"] = out.data_ptr(), lse.data_ptr()
        *of_batch, of_token, of_head, _ = out.stride()
        params["out_strides"] = (*(of_batch or [0]), of_token, of_head)
        *of_batch, of_head, of_token = lse.stride()
        params["lse_strides"] = (*(of_batch or [0]), of_token, of_head)
        run_combine(self.tag, params, 3, 2 * WARP_THREADS)
        return out, lse


@pytest.mark.parametrize(
    ("world", "gathered", "tag"),
    [(1, False, "Bf16"), (2, False, SCALED), (2, True, "Fp32"), (3, True, MARKED), (3, False, "Bf16")],
)
@pytest.mark.parametrize("name", CASES)
def test_pieces_come_merged_to_the_ranks_of_their_heads(
    name: str,
    world: int,
    gathered: bool,
    tag: str,
    merged: Callable[[Any, Any], tuple[Any, Any]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same bits as by the kernels one after the other; ranks wait for nobody but each other."""
    d_v = {1: 8, 2: 12, 3: 5}[world] * OCTET  # a warp's share of a row, one and a half, and less
    ranks = RanksOfPieces(CASES[name], world, gathered, tag, d_v, monkeypatch)
    assert all(of_rank.has_merges == (name != "all are whole") for of_rank in ranks.pieces)
    ranks.check_calls(merged)


@pytest.mark.parametrize("gathered", [False, True])
def test_a_quick_rank_spoils_nothing_that_a_slow_one_merges(
    gathered: bool,
    merged: Callable[[Any, Any], tuple[Any, Any]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The slow one's first thread sees that a packet has come, and the others look at theirs when the quick ranks have
    long gone on. Of one CTA each, as in test_direct_exchange.
    """
    case = Case(ScheduleShape(40, 1, 16, 3, 1, 1, 1, 4096), (4000,))
    ranks = RanksOfPieces(case, 3, gathered, "Bf16", 8 * OCTET, monkeypatch, num_sms=1)
    slow = library("Bf16", 2)  # its threads are not gone through in reverse
    slow.host_wait_slowly(20_000)
    try:
        ranks.check_calls(merged)
    finally:
        slow.host_wait_slowly(0)


class RanksOfPieces:
    """Ranks, and what the decode of each leaves."""

    def __init__(
        self,
        case: Case,
        world: int,
        gathered: bool,
        tag: str,
        d_v: int,
        patch: pytest.MonkeyPatch,
        num_sms: int = NUM_SMS,
    ) -> None:
        patch.setattr(kernels, "EXCHANGE_THREADS", 2 * WARP_THREADS)  # fibers are slow, and nothing depends on it
        patch.setattr(direct, "combine_push_source", lambda tag: tag)
        own, self.rows = case.heads // world, case.rows
        options: dict[str, Any] = {"num_sms": num_sms, "in_packets": True, "head_dim_v": d_v}
        self.ranks = Ranks(world, case.rows, own, gathered, torch.bfloat16, patch, **options)
        self.pieces = [RankOfPieces(case, rank, tag, d_v) for rank in range(world)]
        self.handed_over = []
        for rank, exchange in enumerate(self.ranks.exchanges):
            kind = SimpleNamespace(shape=SimpleNamespace(max_merges=1), config=tag)
            plan = SimpleNamespace(blueprint=kind, pieces=None)
            exchange.merges_pieces(plan)
            assert exchange._combine_push is not None
            self.handed_over.append(plan.pieces)
            library(tag, rank)  # a copy is made before threads ask for it

    def check_calls(self, merged: Callable[[Any, Any], tuple[Any, Any]]) -> None:  # noqa: F811
        """Calls one after the other, of which each has pieces of its own."""
        found = self.ranks.together(self._calls)
        for call in CALLS:
            outs, lses = zip(*(of_rank.merged(call) for of_rank in self.pieces), strict=True)
            for rank, of_rank in enumerate(found):
                of_heads = (torch.stack([self.ranks.own_heads(one, rank) for one in all]) for all in (outs, lses))
                for one, wanted in zip(of_rank[call], merged(*of_heads), strict=True):
                    torch.testing.assert_close(one, wanted, rtol=0, atol=0)

    def _calls(self, rank: int) -> list[tuple[Any, Any]]:
        exchange, of_rank, results = self.ranks.exchanges[rank], self.pieces[rank], []
        pauses, heads = random.Random(rank), self.ranks.own * (self.ranks.world if self.ranks.gathered else 1)
        q = torch.zeros(*self.rows, heads, WIDTH, dtype=torch.bfloat16)
        for call in CALLS:
            time.sleep(pauses.choice([0, 1]) * MAX_PAUSE)
            exchange.gather(q)
            exchange.out.copy_(of_rank.outs[call])
            exchange.lse.copy_(of_rank.lses[call])
            of_rank.point_at(call)
            self.handed_over[rank][...] = of_rank.params
            time.sleep(pauses.choice([0, 1]) * MAX_PAUSE)
            out_shape, lse_shape = exchange.heads.result_shapes
            out, lse = torch.full(out_shape, torch.nan, dtype=torch.bfloat16), torch.full(lse_shape, torch.nan)
            exchange.finish(out, lse)
            results.append((out, lse))
        return results


def test_of_more_ranks_than_shared_memory_holds_there_is_none() -> None:
    assert combine_push_geometry(132, 2) is not None
    assert combine_push_geometry(132, 64) is None
