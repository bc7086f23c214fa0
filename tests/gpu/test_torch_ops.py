"""torch.ops.cupy_mla on the GPU: against float64, compiled, in CUDA graphs, on streams."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from cases_dense import DenseCase

from cupy_mla import InvalidArgumentError, PlanMismatchError, mla_decode

from . import gpu_arrays as gpu
from .test_decode import OnGpu

torch = pytest.importorskip("torch", reason="torch is not installed")
torch_ops = pytest.importorskip("cupy_mla.torch_ops")
from torch.library import opcheck  # noqa: E402

pytestmark = pytest.mark.timeout(300)  # Inductor compiles
OPS = torch.ops.cupy_mla
BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
LENGTHS = (0, 140, 4096, 1000)


def case(**changes: Any) -> OnGpu:
    return OnGpu(DenseCase(**{"lengths": LENGTHS, "num_heads_q": 16, "seqlens_q": 2, "causal": True, **changes}))


def op_options(on_gpu: OnGpu) -> dict[str, Any]:
    return {name: value for name, value in on_gpu.options.items() if value is not None}


def plan_options(on_gpu: OnGpu) -> dict[str, Any]:
    return {name: value for name, value in op_options(on_gpu).items() if name != "softmax_scale"}


def decode(on_gpu: OnGpu, plan: Any = None) -> tuple[Any, Any]:
    return OPS.mla_decode(*on_gpu.tensors, **op_options(on_gpu), plan=plan)


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("ragged", [False, True])
def test_values(heads: int, ragged: bool) -> None:
    on_gpu = case(num_heads_q=heads, seqlens_q=(1, 4, 0, 3)) if ragged else case(num_heads_q=heads)
    on_gpu.check(*decode(on_gpu))
    plan = OPS.plan_decode(*on_gpu.tensors, **plan_options(on_gpu))
    for _ in range(3):
        on_gpu.check(*decode(on_gpu, plan))
    on_gpu.check(*decode(on_gpu, plan.clone()))  # compilers copy


def test_given_outputs_and_fixed_splits() -> None:
    on_gpu = case()
    out, lse = gpu.empty(on_gpu.out_shape, "bfloat16"), gpu.empty(on_gpu.lse_shape, "float32")
    for options in ({}, {"fixed_split_tokens": 256}, {"max_seqlen_k": 4096}, {"decode_kernel": "wide64"}):
        for plan in (None, OPS.plan_decode(*on_gpu.tensors, **plan_options(on_gpu), **options)):
            out.fill_(torch.nan)
            OPS.mla_decode_out(*on_gpu.tensors, **op_options(on_gpu), **options, plan=plan, out=out, lse=lse)
            on_gpu.check(out, lse)


def test_errors_keep_their_type_and_nothing_is_written() -> None:
    on_gpu = case()
    out, lse = gpu.empty(on_gpu.out_shape, "bfloat16"), gpu.empty(on_gpu.lse_shape, "float32")
    q, kv_cache, table, lengths = on_gpu.tensors
    with pytest.raises(InvalidArgumentError) as caught:
        OPS.mla_decode_out(q, kv_cache, table.long(), lengths, out=out, lse=lse)
    assert caught.value.argument == "block_table"
    with pytest.raises(PlanMismatchError):
        OPS.mla_decode_out(
            q, kv_cache, table, lengths, plan=OPS.plan_decode(*on_gpu.tensors, causal=True), out=out, lse=lse
        )
    with pytest.raises(InvalidArgumentError) as caught:
        OPS.mla_decode(q, kv_cache, table, lengths, plan=OPS.plan_decode(*on_gpu.tensors).cpu())
    assert caught.value.argument == "plan"
    gpu.synchronize()
    assert out.isnan().all()
    assert lse.isnan().all()


@pytest.mark.parametrize("name", ["decode", "with plan", "given outputs", "plan"])
def test_opcheck(name: str) -> None:
    on_gpu = case()
    options = op_options(on_gpu)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    op = OPS.mla_decode
    if name == "with plan":
        options["plan"] = OPS.plan_decode(*on_gpu.tensors, **plan_options(on_gpu))
    elif name == "given outputs":
        op = OPS.mla_decode_out
        options["out"] = gpu.empty(on_gpu.out_shape, "bfloat16")
        options["lse"] = gpu.empty(on_gpu.lse_shape, "float32")
    elif name == "plan":
        op, options = OPS.plan_decode, plan_options(on_gpu)
        checks.remove("test_aot_dispatch_dynamic")  # compares contents, of which some mean nothing
    results = opcheck(op.default, on_gpu.tensors, options, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}


def step(q: Any, kv_cache: Any, table: Any, lengths: Any, rows: Any, slots: Any, options: dict[str, Any]) -> Any:
    """A step of two layers as an engine compiles it."""
    OPS.append_tokens(kv_cache, rows, slots)
    plan = OPS.plan_decode(q, kv_cache, table, lengths, causal=True)
    first = OPS.mla_decode(q + 0, kv_cache, table, lengths, **options, plan=plan)
    second = OPS.mla_decode(-q, kv_cache, table, lengths, **options, plan=plan)
    return first, second


@BACKENDS
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compile(backend: str, mode: str | None) -> None:
    if mode is not None and backend != "inductor":
        pytest.skip("a mode of Inductor's")
    torch._dynamo.reset()
    on_gpu = case()
    kv_cache, options = on_gpu.kv_cache.clone(), op_options(on_gpu)
    # Slots outside the cache are not stored: the cache stays as the reference has it.
    rows = torch.zeros(2, 1, kv_cache.shape[-1], dtype=kv_cache.dtype, device="cuda")
    slots = torch.tensor([-1, -1], device="cuda")
    compiled = torch.compile(step, fullgraph=True, backend=backend, **({} if mode is None else {"mode": mode}))
    negative = -on_gpu.q
    for _ in range(4):  # with reduce-overhead the later ones replay a CUDA graph
        first, second = compiled(on_gpu.q, kv_cache, on_gpu.block_table, on_gpu.cache_seqlens, rows, slots, options)
        on_gpu.check(*(tensor.clone() for tensor in first))
        expected = mla_decode(negative, *on_gpu.tensors[1:], **on_gpu.options)
        gpu.synchronize()
        assert torch.equal(second[0], expected[0])
        assert torch.equal(second[1], expected[1])


@pytest.mark.parametrize("planned", ["not", "outside", "inside"])
@pytest.mark.parametrize("operator", [False, True])
def test_graph_capture(operator: bool, planned: str) -> None:
    """The captured call's own allocations live in the graph's pool; lengths may change before a replay."""
    on_gpu = case()
    results: list[Any] = []
    plans: list[Any] = []

    def make_plan() -> Any:
        if operator:
            return OPS.plan_decode(*on_gpu.tensors, **plan_options(on_gpu))
        from cupy_mla import plan_decode

        return plan_decode(*on_gpu.tensors, **on_gpu.plan_options)

    if planned == "outside":
        plans.append(make_plan())

    def work() -> None:
        plan = make_plan() if planned == "inside" else plans[0] if plans else None
        results[:] = decode(on_gpu, plan) if operator else on_gpu.decode(plan=plan)

    replay = gpu.capture(work)
    out, lse = results
    changes = (LENGTHS,) if planned == "outside" else (LENGTHS, (0, 0, 0, 0), (1, 140, 2000, 64), LENGTHS)
    for lengths in changes:
        gpu.assign(on_gpu.cache_seqlens, gpu.upload(np.array(lengths, np.int32)))
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        replay()
        garbage = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(8)]
        on_gpu.check(out, lse, lengths)
        del garbage


def test_streams() -> None:
    """On the current stream: behind what it has queued, ahead of what it queues next."""
    on_gpu = case()
    zeros = torch.zeros_like(on_gpu.q)
    for _ in range(3):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            q = zeros.clone()
            torch.cuda._sleep(gpu.DELAY_CYCLES)
            q.copy_(on_gpu.q)
            out, lse = OPS.mla_decode(q, *on_gpu.tensors[1:], **op_options(on_gpu))
            q.zero_()
        stream.synchronize()
        on_gpu.check(out, lse)


def test_a_thread_without_a_context() -> None:
    """A new thread has no current CUDA context; the launch makes one current."""
    import threading

    on_gpu = case()
    out, lse = gpu.empty(on_gpu.out_shape, "bfloat16"), gpu.empty(on_gpu.lse_shape, "float32")
    from cupy_mla import plan_decode

    plan = plan_decode(*on_gpu.tensors, **on_gpu.plan_options)
    gpu.synchronize()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            on_gpu.decode(plan=plan, out=out, lse=lse)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
    on_gpu.check(out, lse)


@pytest.mark.parametrize("empty_lse", [-math.inf, math.inf])
def test_empty_lse(empty_lse: float) -> None:
    on_gpu = case()
    plan = OPS.plan_decode(*on_gpu.tensors, **plan_options(on_gpu))
    for _ in range(2):  # checked, recognised
        _, lse = OPS.mla_decode(*on_gpu.tensors, **op_options(on_gpu), plan=plan, empty_lse=empty_lse)
        assert (lse[0] == empty_lse).all()
        assert lse[2:].isfinite().all()


def test_states_in_lists() -> None:
    outs = torch.randn(3, 5, 2, 16, 512, device="cuda").bfloat16()
    lses = torch.randn(3, 5, 16, 2, device="cuda")
    expected = OPS.merge_states(outs, lses)
    for found, array in zip(OPS.merge_states(list(outs), list(lses)), expected, strict=True):
        assert torch.equal(found, array)
