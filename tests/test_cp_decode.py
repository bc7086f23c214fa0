"""Context-parallel decode on gloo, in processes of their own, against the whole cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from cases_dense import DenseCase, frobenius_error
from gloo_ranks import Ranks

torch = pytest.importorskip("torch")

from cupy_mla import InvalidArgumentError, PlanMismatchError  # noqa: E402
from cupy_mla.lab.cases import Case  # noqa: E402
from cupy_mla.lab.libraries import TorchLibrary  # noqa: E402
from cupy_mla.lab.shards import shards_of  # noqa: E402
from cupy_mla.parallel import cp_decode, plan_cp_decode  # noqa: E402
from cupy_mla.parallel.group import TorchGroup  # noqa: E402

WORLDS = (2, 4)
LENGTHS = (300, 64, 3, 0, 1, 129)
SHORTER = (7, 64, 2, 0, 0, 128)
MAX_ERROR = {"bfloat16": 3e-3, "float16": 1e-3}
LSE_TOLERANCE = 1e-5  # relative, and absolute


@dataclass(frozen=True)
class Call:
    """A case and how it is called."""

    case: DenseCase
    interleave: int = 1
    gathered: bool = False
    exchange: str = "a2a"
    lengths: tuple[int, ...] | None = None  # that a plan made for the case's is updated with; None: no plan

    @property
    def options(self) -> dict[str, Any]:
        """Of `cp_decode`."""
        return {"cp_interleave": self.interleave, "gathered": self.gathered, "exchange": self.exchange}

    def host(self) -> Case:
        return self.case.build()


def with_lengths(arrays: Case, lengths: tuple[int, ...]) -> Case:
    """The same requests, with their first tokens only."""
    counts = np.array(lengths)
    return replace(arrays, cache_seqlens=counts.astype(np.int32), kv_lengths=counts)


def on_rank(rank: int, group: Any, call: Call) -> tuple[np.ndarray, np.ndarray]:
    """out and lse of a rank's heads."""
    world = group.size()
    arrays = call.host()
    (_, share), library = list(shards_of(arrays, world, call.interleave))[rank], TorchLibrary("cpu")
    heads = call.case.num_heads_q // world
    mine = slice(rank * heads, (rank + 1) * heads)
    local = share.on(library)
    q = local.q if call.gathered else local.q[..., mine, :]
    total = library.upload(arrays.cache_seqlens)
    inputs = (q, local.kv_cache, local.block_table, total)
    options = {**{name: value for name, value in local.options.items() if name not in UNUSED}, **call.options}
    if call.lengths is None:
        out, lse = cp_decode(*inputs, group=group, **options)
    else:
        of_plan = {name: value for name, value in options.items() if name != "softmax_scale"}
        plan = plan_cp_decode(*inputs, group=group, **of_plan)
        cp_decode(*inputs, group=group, plan=plan, **options)
        total.copy_(torch.tensor(call.lengths))
        plan.update(total, local.cu_seqlens_q)
        given = {"out": torch.full((*q.shape[:-2], heads, 512), torch.nan, dtype=q.dtype)}
        given["lse"] = torch.full((*q.shape[:-3], heads, q.shape[-3]), torch.nan)
        given = given if call.case.latent_dim == 512 else {}
        out, lse = cp_decode(*inputs, group=group, plan=plan, **options, **given)
        assert all(result is given[name] for name, result in (("out", out), ("lse", lse)) if given)
    return out.float().numpy(), lse.numpy()


UNUSED = ("empty_lse", "validate", "strict", "max_seqlen_q")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(WORLDS, tmp_path_factory.mktemp("ranks")) as started:
        yield started


def small(**changes: Any) -> DenseCase:
    sizes = {"lengths": LENGTHS, "num_heads_q": 8, "latent_dim": 64, "rope_dim": 64, "page_size": 16}
    return DenseCase(**{**sizes, **changes})


def calls() -> Iterator[Call]:
    for interleave in (1, 5, 16, 64):
        for seqlen_q in (1, 2, 3, 4):
            yield Call(small(seqlens_q=seqlen_q, causal=True), interleave)
        yield Call(small(seqlens_q=(2, 0, 3, 1, 2, 4), causal=True), interleave)
    for exchange in ("a2a", "ag_rs"):
        for gathered in (False, True):
            how = {"exchange": exchange, "gathered": gathered, "interleave": 16}
            yield Call(small(), **how)
            yield Call(small(seqlens_q=3), **how)
            yield Call(small(seqlens_q=2, causal=True, num_heads_kv=2), **how)
            yield Call(small(num_heads_kv=2), **how)
            yield Call(small(seqlens_q=2, causal=True, dtype="float16"), lengths=SHORTER, **how)
            yield Call(small(seqlens_q=(1, 4, 0, 2, 3, 1), causal=True), lengths=SHORTER, **how)
    for seqlens_q in (1, 2):
        yield Call(DenseCase(LENGTHS, num_heads_q=4, seqlens_q=seqlens_q, causal=True), lengths=SHORTER)
        for layout in ("fp8_e4m3", "fp8_ds_mla"):
            yield Call(DenseCase(LENGTHS, num_heads_q=4, seqlens_q=seqlens_q, causal=True, layout=layout), 16)
    for heads, seqlens_q in ((128, 2), (256, 3)):  # so many rows that ranks are requests
        yield Call(small(num_heads_q=heads, seqlens_q=seqlens_q, causal=True), 16)
        yield Call(small(num_heads_q=heads, seqlens_q=seqlens_q), 5, exchange="ag_rs", lengths=SHORTER)
        yield Call(small(num_heads_q=heads, seqlens_q=seqlens_q, causal=True, dtype="float16"), lengths=SHORTER)
    yield Call(small(num_heads_q=256, seqlens_q=2, causal=True), gathered=True, lengths=SHORTER)
    yield Call(small(lengths=(0, 0, 0), seqlens_q=2, causal=True))
    yield Call(small(lengths=(1,), seqlens_q=1))


def name_of(call: Call) -> str:
    """What differs from a plain call."""
    case = call.case
    facts = {
        f"by{call.interleave}": True,
        f"q{case.seqlens_q}": True,
        f"kv{case.num_heads_kv}": case.num_heads_kv > 1,
        f"{case.layout}": case.layout,
        "causal": case.causal,
        "gathered": call.gathered,
        call.exchange: True,
        "planned": call.lengths,
    }
    return "-".join(fact for fact, holds in facts.items() if holds).replace(" ", "")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("call", list(calls()), ids=name_of)
def test_ranks_together_give_the_whole(call: Call, world: int, ranks: Ranks) -> None:
    results = ranks.run(world, on_rank, call)
    out = np.concatenate([out for out, _ in results], axis=-2)
    lse = np.concatenate([lse for _, lse in results], axis=-2)
    arrays = call.host()
    exact_out, exact_lse = (arrays if call.lengths is None else with_lengths(arrays, call.lengths)).exact()
    assert frobenius_error(out, exact_out) < MAX_ERROR[call.case.dtype]
    np.testing.assert_allclose(lse, exact_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


# --- Without others


@pytest.fixture
def alone() -> Iterator[None]:
    """This process is the only one of its group."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def inputs_of(case: DenseCase) -> tuple[Any, ...]:
    return case.build().on(TorchLibrary("cpu")).tensors


GOOD = {"head_dim_v": 64}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("exchange", ["a2a", "ag_rs"])
@pytest.mark.parametrize("seqlens_q", [1, 2])
def test_a_group_of_one(seqlens_q: int, exchange: str) -> None:
    case = small(seqlens_q=seqlens_q, causal=True)
    out, lse = cp_decode(*inputs_of(case), **GOOD, causal=True, exchange=exchange)
    exact_out, exact_lse = case.build().exact()
    assert frobenius_error(out.float().numpy(), exact_out) < MAX_ERROR["bfloat16"]
    np.testing.assert_allclose(lse.numpy(), exact_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


@pytest.mark.parametrize("width", [64, 12, 3])
@pytest.mark.parametrize("begin", [0, 8, 1])
def test_copies_are_of_all_that_is_there(begin: int, width: int) -> None:
    """Whether rows are whole numbers of 16 bytes or not."""
    source = torch.randn(2, 3, 4, begin + width + 8).to(torch.bfloat16)[..., begin : begin + width]
    source[0, 1, 2, :2] = torch.tensor([torch.nan, -0.0])
    target = torch.zeros(4, 2, 3, width, dtype=torch.bfloat16)
    TorchGroup(None, 1, 0).copy(target.permute(1, 2, 0, 3), source)
    bits = target.permute(1, 2, 0, 3).contiguous().view(torch.int16)
    torch.testing.assert_close(bits, source.contiguous().view(torch.int16), rtol=0, atol=0)


def test_no_group() -> None:
    with pytest.raises(InvalidArgumentError, match="init_process_group") as caught:
        cp_decode(*inputs_of(small()), **GOOD)
    assert caught.value.argument == "group"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("argument", "expected", "changes"),
    [
        ("group", "a process group of torch", {"group": "world"}),
        ("exchange", "a2a or ag_rs", {"exchange": "ring"}),
        ("gathered", "True or False", {"gathered": "yes"}),
        ("causal", "True or False", {"causal": "yes"}),
        ("max_seqlen_q", "1 or more", {"max_seqlen_q": 0}),
        ("cp_interleave", "1 to 65535", {"cp_interleave": 0}),
        ("cp_interleave", "an integer", {"cp_interleave": 1.5}),
        ("head_dim_v", "1 to 128", {"head_dim_v": 129}),
        ("head_dim_v", "an integer", {"head_dim_v": "64"}),
        ("softmax_scale", "above 0", {"softmax_scale": -1.0}),
        ("kv_scale", "None", {"kv_scale": 1.0}),
        ("compute", "one of", {"compute": "fast"}),
        ("layout", "", {"layout": "fp5"}),
        ("plan", "a ContextParallelPlan", {"plan": 1}),
        ("out", "shape", {"out": torch.zeros(6, 1, 8, 128, dtype=torch.bfloat16)}),
        ("out", "bfloat16", {"out": torch.zeros(6, 1, 8, 64)}),
        ("lse", "shape", {"lse": torch.zeros(6, 1, 8)}),
        ("lse", "float32", {"lse": torch.zeros(6, 8, 1, dtype=torch.float64)}),
        ("q", "a tensor", {"q": np.zeros((6, 1, 8, 128), np.float16)}),
        ("q", "bfloat16", {"q": torch.zeros(6, 1, 8, 128)}),
        ("kv_cache", "4 dimensions", {"kv_cache": torch.zeros(3, 16, 128, dtype=torch.bfloat16)}),
        ("block_table", "an array", {"block_table": None}),
        ("total_seqlens", "a tensor [batch]", {"total_seqlens": 3}),
        ("total_seqlens", "int32 [6]", {"total_seqlens": torch.zeros(6, 1, dtype=torch.int32)}),
        ("total_seqlens", "int32 [6]", {"total_seqlens": torch.zeros(6, dtype=torch.int64)}),
        ("total_seqlens", "int32 [6]", {"total_seqlens": torch.zeros(5, dtype=torch.int32)}),
    ],
)  # fmt: skip
def test_wrong_arguments(argument: str, expected: str, changes: dict[str, Any]) -> None:
    given = dict(zip(("q", "kv_cache", "block_table", "total_seqlens"), inputs_of(small()), strict=True))
    with pytest.raises(InvalidArgumentError) as caught:
        cp_decode(**{**given, **GOOD, **changes})
    assert caught.value.argument == argument
    assert expected in str(caught.value)


@pytest.mark.usefixtures("alone")
def test_plans_are_for_calls_of_their_kind() -> None:
    inputs = inputs_of(small())
    plan = plan_cp_decode(*inputs, **GOOD, cp_interleave=16)
    cp_decode(*inputs, **GOOD, cp_interleave=16, plan=plan)
    with pytest.raises(PlanMismatchError, match="a plan for cp_interleave = 1, got one for cp_interleave = 16"):
        cp_decode(*inputs, **GOOD, plan=plan)
    with pytest.raises(PlanMismatchError, match="the process group that the plan was made for"):
        cp_decode(*inputs, **GOOD, cp_interleave=16, plan=plan, group=torch.distributed.new_group([0]))
    others = inputs_of(small(num_heads_q=4))
    with pytest.raises(PlanMismatchError, match="a plan for q"):
        cp_decode(*others, **GOOD, cp_interleave=16, plan=plan)
    with pytest.raises(InvalidArgumentError, match="total_seqlens"):
        plan.update(inputs[-1][:3])


def head_counts(rank: int, group: Any) -> str:
    """What is said of 6 heads for 4 ranks."""
    inputs = inputs_of(small(num_heads_q=6))
    try:
        cp_decode(*inputs, **GOOD, group=group, gathered=True)
    except InvalidArgumentError as error:
        return str(error)
    return ""


def test_heads_that_ranks_cannot_share(ranks: Ranks) -> None:
    for said in ranks.run(4, head_counts):
        assert "a number of heads that 4 ranks divide" in said
