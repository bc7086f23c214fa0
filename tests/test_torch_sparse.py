"""The sparse operators of torch.ops.cupy_mla on the CPU: values, errors, opcheck, torch.compile."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
from cases_sparse import SparseCase
from test_sparse_decode import arguments as decode_arguments
from test_sparse_prefill import arguments as prefill_arguments

from cupy_mla import InvalidArgumentError, PlanMismatchError, mla_sparse_decode, mla_sparse_prefill, slots_of
from cupy_mla.parallel import local_slots

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("cupy_mla.torch_ops")
from torch.library import opcheck  # noqa: E402

OPS = torch.ops.cupy_mla
BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
CASE = SparseCase(batch=3, seqlen_q=2, dtype="float16", lengths="token", sinks=True)
Tensors = dict[str, Any]


@pytest.fixture(autouse=True)
def _graphs_of_this_code() -> Iterator[None]:
    """A graph that Inductor kept from another state of the code has the size of that code's plans in it."""
    inductor, functorch = (import_module(f"torch.{name}.config") for name in ("_inductor", "_functorch"))
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        yield


def tensors_of(given: dict[str, Any]) -> Tensors:
    options = ("head_dim_v", "strict")
    arrays = {name: value for name, value in given.items() if value is not None and name not in options}
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def decode_tensors(seqlen_q: int = 2) -> Tensors:
    return tensors_of(decode_arguments(replace(CASE, seqlen_q=seqlen_q).build()))


def prefill_tensors() -> Tensors:
    return tensors_of(prefill_arguments(replace(CASE, seqlen_q=1).build()))


def plan_tensors(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != "attn_sink"}


def same(results: Any, expected: Any) -> None:
    assert len(results) == len(expected)
    for result, value in zip(results, expected, strict=True):
        assert type(result) is torch.Tensor
        assert result.dtype == value.dtype
        assert torch.equal(result, value)


@pytest.mark.parametrize("options", [{}, {"softmax_scale": 0.1}, {"empty_lse": math.inf}], ids=str)
def test_values(options: dict[str, Any]) -> None:
    tensors = decode_tensors()
    expected = mla_sparse_decode(**tensors, **options)
    same(OPS.mla_sparse_decode(**tensors, **options), expected)
    plan = OPS.plan_sparse_decode(**plan_tensors(tensors))
    same(OPS.mla_sparse_decode(**tensors, **options, plan=plan), expected)
    tensors = prefill_tensors()
    same(OPS.mla_sparse_prefill(**tensors, **options), mla_sparse_prefill(**tensors, **options))


def test_positional_arguments() -> None:
    tensors = decode_tensors()
    order = [tensors.pop(name) for name in ("q", "kv_cache", "indices")]
    expected = mla_sparse_decode(*order, softmax_scale=0.1, **tensors)
    same(OPS.mla_sparse_decode(*order, 512, 0.1, tensors["topk_length"], tensors["attn_sink"]), expected)
    tensors = prefill_tensors()
    order = [tensors.pop(name) for name in ("q", "kv", "indices")]
    expected = mla_sparse_prefill(*order, softmax_scale=0.1, **tensors)
    same(OPS.mla_sparse_prefill(*order, 512, 0.1, tensors["topk_length"], tensors["attn_sink"]), expected)


def decode_outputs() -> Tensors:
    out = torch.full((3, 2, 16, 512), torch.nan, dtype=torch.float16)
    return {"out": out, "lse": torch.full((3, 16, 2), torch.nan)}


def prefill_outputs() -> Tensors:
    out = torch.full((3, 16, 512), torch.nan, dtype=torch.float16)
    return {"out": out, "max_logits": torch.full((3, 16), torch.nan), "lse": torch.full((3, 16), torch.nan)}


def test_given_outputs() -> None:
    tensors, given = decode_tensors(), decode_outputs()
    assert OPS.mla_sparse_decode_out(**tensors, **given) is None
    same(tuple(given.values()), mla_sparse_decode(**tensors))
    tensors, given = prefill_tensors(), prefill_outputs()
    assert OPS.mla_sparse_prefill_out(**tensors, **given) is None
    same(tuple(given.values()), mla_sparse_prefill(**tensors))


def test_slots_of() -> None:
    tokens = torch.randint(-3, 50, (3, 2, 40), dtype=torch.int32)
    table = torch.tensor([[4, 1, 0], [2, 3, 5], [6, 6, 1]], dtype=torch.int32)
    same([OPS.slots_of(tokens, table, 16)], [slots_of(tokens, table, 16)])
    requests = torch.tensor([1, 1, 0], dtype=torch.int32)
    same([OPS.slots_of(tokens, table, 16, requests=requests)], [slots_of(tokens, table, 16, requests=requests)])


def test_local_slots() -> None:
    tokens = torch.randint(-3, 99, (3, 2, 40), dtype=torch.int32)
    table = torch.tensor([[4, 1, 0], [2, 3, 5], [6, 6, 1]], dtype=torch.int32)
    for options in ({"cp_interleave": 16}, {"requests": torch.tensor([1, 1, 0], dtype=torch.int32)}):
        sharding = {"cp_world": 2, "cp_rank": 1, **options}
        same(OPS.local_slots(tokens, table, 16, **sharding), local_slots(tokens, table, 16, **sharding))


@pytest.mark.parametrize(
    "other",
    [{"cp_world": 2}, {"fixed_split_tokens": 64}, {"decode_kernel": "gathered_wide64"}, {"head_dim_v": 448}],
    ids=str,
)
def test_a_plan_of_other_settings_is_refused(other: dict[str, Any]) -> None:
    tensors = decode_tensors()
    plan = OPS.plan_sparse_decode(**plan_tensors(tensors))
    with pytest.raises(PlanMismatchError, match="plan"):
        OPS.mla_sparse_decode(**tensors, plan=plan, **other)
    with pytest.raises(PlanMismatchError, match="plan"):
        OPS.mla_sparse_decode(**{**tensors, "indices": tensors["indices"][..., :8]}, plan=plan)
    again = OPS.plan_sparse_decode(**plan_tensors(tensors), **other)
    options = {"head_dim_v": 448} if "head_dim_v" in other else {}
    same(OPS.mla_sparse_decode(**tensors, plan=again, **other), mla_sparse_decode(**tensors, **options))


def test_errors_keep_their_type() -> None:
    tensors = decode_tensors()
    with pytest.raises(InvalidArgumentError) as caught:
        OPS.mla_sparse_decode(**{**tensors, "indices": tensors["indices"].long()})
    assert caught.value.argument == "indices"
    tensors, given = prefill_tensors(), prefill_outputs()
    with pytest.raises(InvalidArgumentError) as caught:
        OPS.mla_sparse_prefill_out(**tensors, **{**given, "lse": given["lse"][:2]})
    assert caught.value.argument == "lse"
    assert given["out"].isnan().all()


def samples() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    tensors = decode_tensors()
    plan = OPS.plan_sparse_decode(**plan_tensors(tensors))
    table = torch.zeros((3, 5), dtype=torch.int32)
    return {
        "decode": (OPS.mla_sparse_decode, (), tensors),
        "with plan": (OPS.mla_sparse_decode, (), {**tensors, "plan": plan}),
        "plan": (OPS.plan_sparse_decode, (), plan_tensors(tensors)),
        "given outputs": (OPS.mla_sparse_decode_out, (), {**tensors, **decode_outputs()}),
        "prefill": (OPS.mla_sparse_prefill, (), prefill_tensors()),
        "prefill to outputs": (OPS.mla_sparse_prefill_out, (), {**prefill_tensors(), **prefill_outputs()}),
        "slots": (OPS.slots_of, (torch.zeros((3, 4), dtype=torch.int32), table, 16), {}),
        "local slots": (
            OPS.local_slots, (torch.zeros((3, 4), dtype=torch.int32), table, 16), {"cp_world": 2, "cp_rank": 1}
        ),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    op, arguments, options = samples()[name]
    # A NaN of a slot that nobody chose is no result.
    options = {key: value.nan_to_num() if key in ("kv", "kv_cache") else value for key, value in options.items()}
    for overload in op.overloads():
        assert set(opcheck(getattr(op, overload), arguments, options).values()) == {"SUCCESS"}


def step(tensors: Tensors, tokens: Any, table: Any) -> Any:
    """A step of two layers as an engine compiles it."""
    plan = OPS.plan_sparse_decode(**plan_tensors(tensors))
    first, first_lse = OPS.mla_sparse_decode(**tensors, plan=plan)
    q = torch.nn.functional.pad(first, (0, 64)) + tensors["q"]
    slots = OPS.slots_of(tokens, table, 16)
    second, second_lse = OPS.mla_sparse_decode(**{**tensors, "q": q, "indices": slots}, plan=plan)
    return second.float() * 2, first_lse + second_lse


@BACKENDS
def test_compile(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    table = torch.tensor([[4, 1, 0], [2, 3, 5], [6, 6, 1]], dtype=torch.int32)
    for seqlen_q in (1, 2, 5):
        tensors = decode_tensors(seqlen_q)
        tensors["kv_cache"] = tensors["kv_cache"].nan_to_num()
        tokens = torch.randint(-3, 50, tensors["indices"].shape, dtype=torch.int32)
        same(compiled(tensors, tokens, table), step(tensors, tokens, table))


@BACKENDS
def test_compile_prefill(backend: str) -> None:
    torch._dynamo.reset()
    tensors = prefill_tensors()
    compiled = torch.compile(lambda tensors: OPS.mla_sparse_prefill(**tensors), fullgraph=True, backend=backend)
    same(compiled(tensors), mla_sparse_prefill(**tensors))
