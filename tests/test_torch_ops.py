"""torch.ops.cupy_mla on the CPU: values, errors, opcheck, torch.compile. tests/gpu/test_torch_ops.py has the GPU's."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from cupy_mla import (
    InvalidArgumentError,
    PlanMismatchError,
    append_tokens,
    copy_pages,
    dequantise_cache,
    merge_states,
    mla_decode,
    quantise_cache,
)
from cupy_mla.call.options import ARRAYS, DECODE, DECODE_FORM, OPTIONS, OUTPUTS, PARTS, PLAN, Option

torch = pytest.importorskip("torch", reason="torch is not installed")
torch_ops = pytest.importorskip("cupy_mla.torch_ops")
from torch.library import opcheck  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

OPS = torch.ops.cupy_mla
BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
Tensors = dict[str, Any]


def make(dtype: Any = torch.bfloat16, ragged: bool = False, seqlen_q: int = 2) -> Tensors:
    """3 requests on 8 pages."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {
        "q": normal(7, 16, 576) if ragged else normal(3, seqlen_q, 16, 576),
        "kv_cache": normal(8, 64, 1, 576),
        "block_table": torch.tensor([[0, 1], [2, 7], [3, 5]], dtype=torch.int32),
        "cache_seqlens": torch.tensor([100, 0, 128], dtype=torch.int32),
    }
    if ragged:
        tensors["cu_seqlens_q"] = torch.tensor([0, 2, 3, 7], dtype=torch.int32)
    return tensors


def outputs(tensors: Tensors) -> Tensors:
    batch, seqlen_q, heads, _ = tensors["q"].shape
    return {
        "out": torch.full((batch, seqlen_q, heads, 512), torch.nan, dtype=tensors["q"].dtype),
        "lse": torch.full((batch, heads, seqlen_q), torch.nan),
    }


def same(results: Any, expected: Any) -> None:
    assert len(results) == len(expected)
    for result, value in zip(results, expected, strict=True):
        assert type(result) is torch.Tensor
        assert result.dtype == value.dtype
        assert torch.equal(result, value)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softmax_scale": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_values(dtype: Any, ragged: bool, options: dict[str, Any]) -> None:
    tensors = make(dtype, ragged)
    expected = mla_decode(**tensors, **options)
    same(OPS.mla_decode(**tensors, **options), expected)
    plan_options = {name: value for name, value in options.items() if name != "softmax_scale"}
    same(OPS.mla_decode(**tensors, **options, plan=OPS.plan_decode(**tensors, **plan_options)), expected)


def test_positional_arguments() -> None:
    tensors = make(ragged=True)
    starts = tensors.pop("cu_seqlens_q")
    same(
        OPS.mla_decode(*tensors.values(), 512, 0.1, True, starts, 4),
        mla_decode(**tensors, cu_seqlens_q=starts, softmax_scale=0.1, causal=True, max_seqlen_q=4),
    )


def test_given_outputs() -> None:
    tensors = make()
    given = outputs(tensors)
    assert OPS.mla_decode_out(**tensors, **given) is None
    same(tuple(given.values()), mla_decode(**tensors))


def test_pairs() -> None:
    tensors = make()
    expected = mla_decode(**tensors)
    ropes = {"q_rope": tensors["q"][..., 512:], "kv_rope": tensors["kv_cache"][..., 512:]}
    latents = {"q": tensors["q"][..., :512], "kv_cache": tensors["kv_cache"][..., :512]}
    same(OPS.mla_decode(**{**tensors, **latents}, **ropes), expected)
    plan = OPS.plan_decode(**{**tensors, **latents}, **ropes)
    same(OPS.mla_decode(**{**tensors, **latents}, **ropes, plan=plan), expected)


@pytest.mark.parametrize("empty_lse", [-math.inf, math.inf])
def test_empty_lse(empty_lse: float) -> None:
    tensors = make()
    expected = mla_decode(**tensors, empty_lse=empty_lse)
    assert (expected[1][1] == empty_lse).all()
    plan = OPS.plan_decode(**tensors)
    same(OPS.mla_decode(**tensors, empty_lse=empty_lse), expected)
    same(OPS.mla_decode(**tensors, empty_lse=empty_lse, plan=plan), expected)
    given = outputs(tensors)
    OPS.mla_decode_out(**tensors, **given, empty_lse=empty_lse)
    same(tuple(given.values()), expected)
    with pytest.raises(InvalidArgumentError, match="empty_lse"):
        OPS.mla_decode(**tensors, empty_lse=0.0)


def test_values_are_validated_on_the_cpu(set_environment: Callable[..., Any]) -> None:
    tensors = make()
    tensors["block_table"][2, 1] = 8
    set_environment(CUPY_MLA_VALIDATE=None)
    for name in ("mla_decode", "plan_decode"):
        getattr(OPS, name)(**tensors, validate=False)
        with pytest.raises(InvalidArgumentError, match=r"block_table\[2, 1\]"):
            getattr(OPS, name)(**tensors)
        with pytest.raises(InvalidArgumentError, match=r"block_table\[2, 1\]"):
            getattr(OPS, name)(**tensors, validate=True)
    set_environment(CUPY_MLA_VALIDATE="1")
    with pytest.raises(InvalidArgumentError, match=r"block_table\[2, 1\]"):
        OPS.mla_decode(**tensors)
    OPS.mla_decode(**tensors, validate=False)


def test_a_plan_serves_a_pool_that_has_grown() -> None:
    tensors = make()
    plan = OPS.plan_decode(**tensors)
    expected = OPS.mla_decode(**tensors, plan=plan)
    grown = torch.cat((tensors["kv_cache"], torch.full((3, 64, 1, 576), torch.nan, dtype=torch.bfloat16)))
    same(OPS.mla_decode(**{**tensors, "kv_cache": grown}, plan=plan), expected)


def operator_name(option: Option) -> str:
    return {"kernel": "decode_kernel", "layout": "cache_layout"}.get(option.name, option.name)


def test_every_option_is_in_the_schemas() -> None:
    for name, function in (("plan_decode", PLAN), ("mla_decode", DECODE), ("mla_decode_out", DECODE)):
        arguments = {argument.name: argument for argument in getattr(OPS, name).default._schema.arguments}
        described = {operator_name(option) for option in OPTIONS if function == DECODE or PLAN in option.functions}
        assert described <= arguments.keys()
        assert {argument for argument in arguments if argument not in described} <= set(PARTS)
        for option in OPTIONS:
            if operator_name(option) in described:
                default = arguments[operator_name(option)].default_value
                assert default == (None if option.name == "empty_lse" else option.default)
        positional = [argument for argument in arguments.values() if not argument.kwarg_only]
        order = (*ARRAYS[:4], *OUTPUTS, *DECODE_FORM.positional[4:], "plan")
        assert [argument.name for argument in positional] == [word for word in order if word in arguments]
        assert positional[-1].name == ("max_seqlen_q" if function == PLAN else "plan")


@pytest.mark.parametrize("name", ["mla_decode", "mla_decode_out", "mla_sparse_decode", "mla_sparse_decode_out"])
def test_usual_calls_have_a_shorter_schema(name: str) -> None:
    """All but the options that have to be named, in the same order."""
    op = getattr(OPS, name)
    assert op.overloads() == ["usual", "default"]
    usual, whole = op.usual._schema, op.default._schema
    usual_names = {argument.name for argument in usual.arguments}
    left_out = [argument for argument in whole.arguments if argument.name not in usual_names]
    assert all(argument.kwarg_only and "Tensor" not in str(argument.type) for argument in left_out)
    assert {"empty_lse", "validate", "strict", "cache_layout", "fixed_split_tokens"} < {one.name for one in left_out}

    def facts(argument: Any) -> tuple[Any, ...]:
        alias = argument.alias_info is not None and argument.alias_info.is_write
        return argument.name, str(argument.type), argument.default_value, argument.kwarg_only, alias

    assert list(map(facts, usual.arguments)) == [facts(one) for one in whole.arguments if one.name in usual_names]
    assert list(map(facts, usual.returns)) == list(map(facts, whole.returns))


class Called(TorchDispatchMode):
    """The operators of ours that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.overloads: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.namespace == "cupy_mla":
            self.overloads.append(function)
        return function(*arguments, **(options or {}))


def test_calls_reach_the_overload_that_knows_their_options() -> None:
    tensors = make()
    plan = OPS.plan_decode(**tensors)
    ropes = {"q_rope": tensors["q"][..., 512:], "kv_rope": tensors["kv_cache"][..., 512:]}
    pairs = {**tensors, "q": tensors["q"][..., :512], "kv_cache": tensors["kv_cache"][..., :512], **ropes}
    usual, default = OPS.mla_decode.usual, OPS.mla_decode.default
    for arguments, overload in (
        (tensors, usual),
        ({**tensors, "plan": plan, "causal": False, "softmax_scale": None, "head_dim_v": 512}, usual),
        (pairs, usual),
        ({**tensors, "validate": True}, default),
        ({**tensors, "plan": plan, "strict": False}, default),
    ):
        expected = mla_decode(**tensors)
        with Called() as called:
            same(OPS.mla_decode(**arguments), expected)
        assert called.overloads == [overload]
    with Called() as called:
        OPS.mla_decode_out(**tensors, **outputs(tensors))
        OPS.mla_decode_out(**tensors, **outputs(tensors), compute="exact")
    assert called.overloads == [OPS.mla_decode_out.usual, OPS.mla_decode_out.default]


def test_append_tokens() -> None:
    cache, rows, slots = make()["kv_cache"], torch.randn(3, 1, 576).bfloat16(), torch.tensor([70, -1, 3])
    expected = cache.clone()
    append_tokens(expected, rows, slots)
    latent, rope = cache[..., :512].clone(), cache[..., 512:].clone()
    OPS.append_tokens(cache, rows, slots)
    assert torch.equal(cache, expected)
    OPS.append_tokens(latent, rows[..., :512], slots, kv_rope=rope, kv_new_rope=rows[..., 512:])
    assert torch.equal(torch.cat((latent, rope), -1), expected)


def test_append_to_fewer_bits() -> None:
    rows, slots = torch.randn(3, 512).bfloat16(), torch.tensor([17, -1, 63])
    cache = torch.zeros(4, 16, 1, 528, dtype=torch.uint8)
    expected = cache.clone()
    append_tokens(expected, rows, slots, layout="fp8_v41")
    OPS.append_tokens(cache, rows, slots, layout="fp8_v41")
    assert torch.equal(cache, expected)
    assert cache.any()
    cache = torch.zeros(4, 16, 1, 512, dtype=torch.float8_e4m3fn)
    expected = cache.clone()
    append_tokens(expected, rows, slots, kv_scale=0.02)
    OPS.append_tokens(cache, rows, slots, kv_scale=torch.tensor(0.02))
    assert torch.equal(cache.view(torch.uint8), expected.view(torch.uint8))
    append_tokens(expected, (rows[:, :448], rows[:, 448:]), slots, kv_scale=(0.02, 0.03))
    assert not torch.equal(cache.view(torch.uint8), expected.view(torch.uint8))
    OPS.append_tokens(cache, rows[:, :448], slots, kv_new_rope=rows[:, 448:], kv_scale=torch.tensor([0.02, 0.03]))
    assert torch.equal(cache.view(torch.uint8), expected.view(torch.uint8))
    assert cache.view(torch.uint8).any()


def test_merge_states() -> None:
    outs, lses = torch.randn(4, 3, 2, 16, 512), torch.randn(4, 3, 16, 2)
    expected = merge_states(outs, lses)
    same(OPS.merge_states(outs, lses), expected)
    same(OPS.merge_states(list(outs), list(lses)), expected)
    same(merge_states(tuple(outs), list(lses)), expected)


@pytest.mark.parametrize(
    "other", [{"causal": True}, {"fixed_split_tokens": 64}, {"max_seqlen_k": 64}, {"decode_kernel": "wide64"}], ids=str
)
def test_a_plan_of_other_settings_is_refused(other: dict[str, Any]) -> None:
    tensors, other = make(), dict(other)
    plan = OPS.plan_decode(**tensors)
    with pytest.raises(PlanMismatchError, match="plan"):
        OPS.mla_decode(**tensors, plan=plan, **other)
    with pytest.raises(PlanMismatchError, match="plan"):
        OPS.mla_decode(**{**tensors, "q": tensors["q"][:, :1]}, plan=plan)
    other["validate"] = False  # a request is longer than 64
    same(
        OPS.mla_decode(**tensors, plan=OPS.plan_decode(**tensors, **other), **other),
        mla_decode(**tensors, **({"causal": True} if "causal" in other else {})),
    )


BAD: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "q of rank 2": ("q", lambda t: {"q": t["q"][0, 0]}),
    "q of float32": ("q", lambda t: {"q": t["q"].float()}),
    "table of int64": ("block_table", lambda t: {"block_table": t["block_table"].long()}),
    "lengths of another batch": ("cache_seqlens", lambda t: {"cache_seqlens": t["cache_seqlens"][:2]}),
    "scale of 0": ("softmax_scale", lambda t: {"softmax_scale": 0.0}),
    "value width beyond the key": ("head_dim_v", lambda t: {"head_dim_v": 600}),
    "plan of another type": ("plan", lambda t: {"plan": torch.zeros(8, dtype=torch.int32)}),
    "plan of rank 2": ("plan", lambda t: {"plan": OPS.plan_decode(**t)[None]}),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_keep_their_type(name: str) -> None:
    argument, change = BAD[name]
    tensors = make()
    with pytest.raises(InvalidArgumentError) as caught:
        OPS.mla_decode(**{**tensors, **change(tensors)})
    assert caught.value.argument == argument


def test_bad_outputs_are_refused_and_not_written() -> None:
    tensors = make()
    given = outputs(tensors)
    with pytest.raises(InvalidArgumentError) as caught:
        OPS.mla_decode_out(**tensors, out=given["out"], lse=given["lse"][:2])
    assert caught.value.argument == "lse"
    assert given["out"].isnan().all()


def test_calls_on_pages() -> None:
    values = torch.randn(4, 16, 1, 576).bfloat16()
    scale, pages = torch.tensor(0.02), torch.tensor([2, 0], dtype=torch.int32)
    cache = torch.zeros(4, 16, 1, 576, dtype=torch.float8_e4m3fn)
    expected = cache.clone()
    quantise_cache(expected, values[:2], pages=pages, kv_scale=0.02)
    latent, rope = cache[..., :512].clone(), cache[..., 512:].clone()
    OPS.quantise_cache(latent, values[:2, ..., :512], kv_rope=rope, values_rope=values[:2, ..., 512:], pages=pages,
                       kv_scale=scale)  # fmt: skip
    stored = torch.cat((latent.view(torch.uint8), rope.view(torch.uint8)), -1)
    assert torch.equal(stored, expected.view(torch.uint8))
    OPS.quantise_cache(latent, values[:2, ..., :512], kv_rope=rope, values_rope=values[:2, ..., 512:], pages=pages,
                       kv_scale=torch.tensor([0.02, 0.04]))  # fmt: skip
    quantise_cache(rope, values[:2, ..., 512:], pages=pages, kv_scale=0.04)
    assert torch.equal(latent.view(torch.uint8), expected[..., :512].view(torch.uint8))
    assert not torch.equal(rope.view(torch.uint8), expected[..., 512:].view(torch.uint8))

    back, expected_back = torch.zeros_like(values[:2]), torch.zeros_like(values[:2])
    dequantise_cache(expected, expected_back, pages=pages, kv_scale=0.02)
    OPS.dequantise_cache(expected, back, pages=pages, kv_scale=scale)
    assert torch.equal(back, expected_back)
    assert (back - values[:2]).abs().max() < 0.2

    moved = values.clone()
    copy_pages(moved, pages, pages + 1)
    OPS.copy_pages(values, pages, pages + 1)
    assert torch.equal(values, moved)
    gathered = torch.empty_like(values[:2])
    OPS.copy_pages(gathered, pages, source=values)
    assert torch.equal(gathered, values[pages.long()])
    with pytest.raises(InvalidArgumentError, match=r"^target_pages\[1\]: "):
        OPS.copy_pages(values, pages, torch.tensor([1, 4], dtype=torch.int32), validate=True)


def samples() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    tensors = make()
    ragged = make(ragged=True)
    rows, slots = torch.randn(2, 1, 576).bfloat16(), torch.tensor([5, -1])
    return {
        "decode": (OPS.mla_decode, (), {**tensors, "causal": True}),
        "ragged": (OPS.mla_decode, (), ragged),
        "with plan": (OPS.mla_decode, (), {**tensors, "plan": OPS.plan_decode(**tensors)}),
        "plan": (OPS.plan_decode, (), tensors),
        "given outputs": (OPS.mla_decode_out, (), {**tensors, **outputs(tensors)}),
        "append": (OPS.append_tokens, (tensors["kv_cache"].clone(), rows, slots), {}),
        "append to fewer bits": (
            OPS.append_tokens,
            (torch.zeros(4, 16, 1, 528, dtype=torch.uint8), torch.randn(2, 512).bfloat16(), slots),
            {"layout": "fp8_v41"},
        ),
        "copied pages": (OPS.copy_pages, (tensors["kv_cache"].clone(), slots.int(), slots.int() + 1), {}),
        "gathered pages": (
            OPS.copy_pages,
            (torch.empty(2, 16, 1, 8), torch.tensor([3, 0], dtype=torch.int32)),
            {"source": torch.randn(4, 16, 1, 8)},
        ),
        "quantise": (
            OPS.quantise_cache,
            (torch.zeros(4, 16, 1, 528, dtype=torch.uint8), torch.randn(4, 16, 1, 512).bfloat16()),
            {"layout": "fp8_v41"},
        ),
        "dequantise": (
            OPS.dequantise_cache,
            (torch.zeros(4, 16, 1, 656, dtype=torch.uint8), torch.zeros(4, 16, 1, 576).bfloat16()),
            {},
        ),
        "merge": (OPS.merge_states, (torch.randn(4, 3, 2, 16, 512), torch.randn(4, 3, 16, 2)), {}),
        "merge lists": (
            OPS.merge_states,
            (list(torch.randn(4, 3, 2, 16, 512)), list(torch.randn(4, 3, 16, 2))),
            {},
        ),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    op, arguments, options = samples()[name]
    for overload in ["list"] if name == "merge lists" else {*op.overloads()} - {"list"}:
        assert set(opcheck(getattr(op, overload), arguments, options).values()) == {"SUCCESS"}


def step(tensors: Tensors, rows: Any, slots: Any) -> Any:
    """A step of two layers as an engine compiles it."""
    OPS.append_tokens(tensors["kv_cache"], rows, slots)
    plan = OPS.plan_decode(**tensors, causal=True)
    first, first_lse = OPS.mla_decode(**tensors, causal=True, plan=plan)
    q = torch.nn.functional.pad(first, (0, 64)) + tensors["q"]
    second, second_lse = OPS.mla_decode(**{**tensors, "q": q}, causal=True, plan=plan)
    merged = OPS.merge_states([first, second], [first_lse, second_lse])[0]
    stacked = OPS.merge_states(torch.stack((first, second)), torch.stack((first_lse, second_lse)))
    return second.float() * 2, stacked[1], merged


@BACKENDS
def test_compile(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    rows, slots = torch.randn(2, 1, 576).bfloat16(), torch.tensor([5, 64])
    for seqlen_q in (1, 2, 5, 6):  # from the second size on with symbols for it
        plain, other = make(seqlen_q=seqlen_q), make(seqlen_q=seqlen_q)
        same(compiled(plain, rows, slots), step(other, rows, slots))
        assert torch.equal(plain["kv_cache"], other["kv_cache"])


@BACKENDS
def test_compile_with_a_plan_from_outside(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda plan, tensors: OPS.mla_decode(**tensors, plan=plan), fullgraph=True, backend=backend
    )
    tensors = make()
    same(compiled(OPS.plan_decode(**tensors), tensors), mla_decode(**tensors))
    with pytest.raises(PlanMismatchError):
        compiled(OPS.plan_decode(**tensors, causal=True), tensors)


@BACKENDS
def test_compile_of_pairs_that_are_views(backend: str) -> None:
    """Strides are the caller's: views of packed tensors must arrive as views."""
    torch._dynamo.reset()

    def program(tensors: Tensors) -> Any:
        q, cache = tensors["q"], tensors["kv_cache"]
        parts = {"q": q[..., :512], "q_rope": q[..., 512:], "kv_cache": cache[..., :512], "kv_rope": cache[..., 512:]}
        return OPS.mla_decode(**{**tensors, **parts})

    tensors = make()
    same(torch.compile(program, fullgraph=True, backend=backend)(tensors), mla_decode(**tensors))


def test_torch_is_imported_only_by_who_asks() -> None:
    script = (
        "import sys, cupy_mla; assert 'torch' not in sys.modules; "
        "import cupy_mla.torch_ops; cupy_mla.torch_ops.register(); import torch; "
        "print(torch.ops.cupy_mla.mla_decode.default)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "cupy_mla.mla_decode.default"
