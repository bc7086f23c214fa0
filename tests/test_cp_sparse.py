"""Context-parallel sparse decode on gloo, in processes of their own, against the whole cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cases_chosen import attend_to_chosen, choose_tokens
from cases_dense import DenseCase, frobenius_error
from gloo_ranks import Ranks

torch = pytest.importorskip("torch")

from cupy_mla import InvalidArgumentError, PlanMismatchError  # noqa: E402
from cupy_mla.lab.libraries import TorchLibrary  # noqa: E402
from cupy_mla.lab.shards import shards_of  # noqa: E402
from cupy_mla.parallel import cp_sparse_decode, local_slots, plan_cp_sparse_decode  # noqa: E402

WORLDS = (2, 4)
LENGTHS = (300, 64, 3, 0, 1, 129)
TOPK = 70
MAX_ERROR, LSE_TOLERANCE = 3e-3, 1e-5


@dataclass(frozen=True)
class Call:
    """A case, whose query tokens choose at random, and how it is called."""

    layout: str | None = None
    seqlen_q: int = 1
    interleave: int = 1
    gathered: bool = False
    exchange: str = "a2a"
    planned: bool = False
    counted: bool = True  # whether ranks say how many tokens they have; else others are -1

    @property
    def case(self) -> DenseCase:
        return DenseCase(LENGTHS, num_heads_q=4, seqlens_q=self.seqlen_q, page_size=16, layout=self.layout)

    def chosen(self) -> np.ndarray:
        """[batch, seqlen_q, topk] token numbers; -1 where a request has fewer."""
        return choose_tokens(LENGTHS, self.seqlen_q, TOPK)


def on_rank(rank: int, group: Any, call: Call) -> tuple[np.ndarray, np.ndarray]:
    """out and lse of a rank's heads."""
    world = group.size()
    arrays = call.case.build()
    shard, share = list(shards_of(arrays, world, call.interleave))[rank]
    heads = call.case.num_heads_q // world
    local = share.on(TorchLibrary("cpu"))
    q = local.q if call.gathered else local.q[..., rank * heads : (rank + 1) * heads, :]
    sharding = {"cp_world": world, "cp_rank": rank, "cp_interleave": call.interleave}
    indices, counts = local_slots(torch.from_numpy(call.chosen()), local.block_table, 16, **sharding)
    assert int(counts.sum()) == int(shard.has(call.chosen()[call.chosen() >= 0]).sum())
    layout = {"layout": call.layout, "kv_scale": local.kv_scale}
    inputs = {**layout, "gathered": call.gathered, "exchange": call.exchange, "group": group}
    given = (q, local.kv_cache, indices)
    inputs["topk_length"] = counts if call.counted else None
    if call.planned:  # for lengths that are no more when it is used
        before = torch.full_like(counts, TOPK)
        inputs["plan"] = plan_cp_sparse_decode(*given, **{**inputs, "topk_length": before})
    out, lse = cp_sparse_decode(*given, **inputs)
    return out.float().numpy(), lse.numpy()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(WORLDS, tmp_path_factory.mktemp("ranks")) as started:
        yield started


CALLS = [
    *(Call(layout, interleave=16) for layout in (None, "fp8_e4m3", "fp8_ds_mla")),
    *(Call(interleave=interleave, seqlen_q=3) for interleave in (1, 5, 64)),
    *(Call(exchange=how, gathered=gathered) for how in ("a2a", "ag_rs") for gathered in (False, True)),
    Call(planned=True, seqlen_q=2),
    Call(counted=False, seqlen_q=2),
]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_ranks_together_give_the_whole(call: Call, world: int, ranks: Ranks) -> None:
    results = ranks.run(world, on_rank, call)
    out = np.concatenate([out for out, _ in results], axis=-2)
    lse = np.concatenate([lse for _, lse in results], axis=-2)
    exact_out, exact_lse = attend_to_chosen(call.case.build(), call.chosen())
    assert frobenius_error(out, exact_out) < MAX_ERROR
    np.testing.assert_allclose(lse, exact_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


@pytest.fixture
def alone() -> Iterator[None]:
    """This process is the only one of its group."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def good() -> dict[str, Any]:
    local = Call().case.build().on(TorchLibrary("cpu"))
    return {"q": local.q, "kv_cache": local.kv_cache, "indices": torch.zeros(6, 1, TOPK, dtype=torch.int32)}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("group", {"group": 3}),
        ("exchange", {"exchange": "ring"}),
        ("gathered", {"gathered": 2}),
        ("q", {"q": [1]}),
        ("indices", {"indices": torch.zeros(6, 1, TOPK)}),
        ("topk_length", {"topk_length": torch.zeros(5, dtype=torch.int32)}),
        ("layout", {"layout": "fp5"}),
        ("plan", {"plan": "plan"}),
        ("out", {"out": torch.zeros(6, 1, 4, 512)}),
    ],
)
def test_wrong_arguments(argument: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        cp_sparse_decode(**{**good(), **changes})
    assert caught.value.argument == argument


@pytest.mark.usefixtures("alone")
def test_plans_are_for_calls_of_their_kind() -> None:
    plan = plan_cp_sparse_decode(**good())
    cp_sparse_decode(**good(), plan=plan)
    with pytest.raises(PlanMismatchError, match="a plan for exchange = ag_rs"):
        cp_sparse_decode(**good(), plan=plan, exchange="ag_rs")
    other = good()
    other["indices"] = other["indices"][..., :64].contiguous()
    with pytest.raises(PlanMismatchError, match="topk"):
        cp_sparse_decode(**other, plan=plan)
