"""Context-parallel decode under jax.shard_map, on CPU devices of a process of its own, against the whole cache."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from cases_dense import DenseCase, frobenius_error
from jax_devices import padded, process_with_devices

from cupy_mla import InvalidArgumentError, PlanMismatchError
from cupy_mla.lab.shards import shards_of
from cupy_mla.parallel import jax_ops

jax = pytest.importorskip("jax", reason="JAX is not installed")
pytestmark = pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX is older than jax.shard_map")

WORLDS = (2, 4)
LENGTHS = (300, 64, 3, 0, 1, 129)
SHORTER = (7, 64, 2, 0, 0, 128)
MAX_ERROR, LSE_TOLERANCE = 3e-3, 1e-5
AXIS = "ranks"


@dataclass(frozen=True)
class Call:
    """A case and how it is called."""

    case: DenseCase
    interleave: int = 1
    gathered: bool = False
    exchange: str = "a2a"
    layers: int = 0  # that share a plan; 0: without one
    lengths: tuple[int, ...] = LENGTHS  # of a second run of the same program


def build(call: Call, lengths: tuple[int, ...]) -> Any:
    """The case, of which only so many tokens of each request count."""
    counts = np.array(lengths)
    return replace(call.case.build(), cache_seqlens=counts.astype(np.int32), kv_lengths=counts)


def in_shard_map(call: Call, world: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """out and lse of all heads, for both lengths."""
    arrays = call.case.build()
    shares = [share for _, share in shards_of(arrays, world, call.interleave)]
    spec = jax.sharding.PartitionSpec
    part, whole = spec(AXIS), spec()
    heads = spec(*[None] * (arrays.q.ndim - 2), AXIS)
    of_heads = spec(*[None] * (arrays.q.ndim - 3), AXIS)
    options = {"causal": call.case.causal, "layout": call.case.layout, "head_dim_v": call.case.latent_dim}
    options = {**options, "axis_name": AXIS, "cp_interleave": call.interleave, "gathered": call.gathered}
    if call.case.ragged:
        options["max_seqlen_q"] = int(arrays.q_lengths.max())
    named = {"cu_seqlens_q": arrays.cu_seqlens_q, "kv_scale": arrays.kv_scale}

    def program(q: Any, kv_cache: Any, table: Any, total: Any, named: dict[str, Any]) -> Any:
        inputs = q, kv_cache[0], table[0], total
        if not call.layers:
            return jax_ops.cp_decode(*inputs, **options, **named, exchange=call.exchange)
        plan = jax_ops.plan_cp_decode(*inputs, **options, **named)
        given = {**options, **named, "exchange": call.exchange, "plan": plan}
        first, *others = [jax_ops.cp_decode(*inputs, **given) for _ in range(call.layers)]
        for other in others:
            first = [jax.numpy.where((one == two).all(), one, np.nan) for one, two in zip(first, other, strict=True)]
        return tuple(first)

    specs = (whole if call.gathered else heads, part, part, whole, whole)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:world]), (AXIS,))
    compiled = jax.jit(
        jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=(heads, of_heads), check_vma=False)
    )
    caches = padded([share.kv_cache for share in shares])
    tables = padded([share.block_table for share in shares])
    found = []
    for lengths in (LENGTHS, call.lengths):
        out, lse = compiled(arrays.q, caches, tables, np.array(lengths, np.int32), named)
        found.append((np.asarray(out).astype(np.float64), np.asarray(lse)))
    return found


@pytest.fixture(scope="module")
def devices() -> Iterator[concurrent.futures.Executor]:
    with process_with_devices(max(WORLDS)) as process:
        yield process


def small(**changes: Any) -> DenseCase:
    sizes = {"lengths": LENGTHS, "num_heads_q": 8, "latent_dim": 64, "rope_dim": 64, "page_size": 16}
    return DenseCase(**{**sizes, **changes})


CALLS = [
    *(Call(small(seqlens_q=count, causal=True), by) for by in (1, 5, 64) for count in (1, 3)),
    *(Call(small(), exchange=how, gathered=gathered) for how in ("a2a", "ag_rs") for gathered in (False, True)),
    Call(small(seqlens_q=(2, 0, 3, 1, 2, 4), causal=True), 16),
    Call(small(seqlens_q=(2, 0, 3, 1, 2, 4)), exchange="ag_rs"),
    Call(small(seqlens_q=2, num_heads_kv=2, dtype="float16"), 16, exchange="ag_rs"),
    Call(small(seqlens_q=2, causal=True), layers=2, lengths=SHORTER),
    Call(small(), 16, gathered=True, layers=2, lengths=SHORTER),
    Call(small(), lengths=(0,) * 6),
    Call(DenseCase(LENGTHS, num_heads_q=4, seqlens_q=2, causal=True, layout="fp8_e4m3"), 16),
    Call(DenseCase(LENGTHS, num_heads_q=4, layout="fp8_ds_mla"), 16),
]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_devices_together_give_the_whole(call: Call, world: int, devices: concurrent.futures.Executor) -> None:
    results = devices.submit(in_shard_map, call, world).result(120)
    for lengths, (out, lse) in zip((LENGTHS, call.lengths), results, strict=True):
        exact_out, exact_lse = build(call, lengths).exact()
        if any(lengths):
            assert frobenius_error(out, exact_out) < MAX_ERROR
        else:
            assert not out.any()
        np.testing.assert_allclose(lse, exact_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


def said(changes: dict[str, Any], of_plan: dict[str, Any] | None = None) -> tuple[str, str]:
    """What is said of a call, perhaps with a plan of another: the argument, and the whole."""
    case = small(seqlens_q=2)
    arrays = case.build()
    given = {"q": arrays.q, "kv_cache": arrays.kv_cache, "block_table": arrays.block_table, "axis_name": AXIS}
    given = {**given, "total_seqlens": arrays.cache_seqlens, "head_dim_v": 64}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), (AXIS,))
    whole = jax.sharding.PartitionSpec()

    def program(total: Any) -> Any:
        inputs = {**given, "total_seqlens": total}
        plan = None if of_plan is None else jax_ops.plan_cp_decode(**{**inputs, **of_plan})
        return jax_ops.cp_decode(**{**inputs, "plan": plan, **changes})

    sharded = jax.shard_map(program, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    try:
        jax.jit(sharded)(arrays.cache_seqlens)
    except (InvalidArgumentError, PlanMismatchError) as error:
        return error.argument, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("argument", "expected", "changes"),
    [
        ("axis_name", "an axis of the mesh", {"axis_name": "rank"}),
        ("axis_name", "an axis of the mesh", {"axis_name": 1.5}),
        ("exchange", "a2a or ag_rs", {"exchange": "ring"}),
        ("gathered", "True or False", {"gathered": 2}),
        ("q", "that 2 devices divide", {"q": np.zeros((6, 2, 3, 128), np.float16), "gathered": True}),
        ("q", "an array", {"q": [1]}),
        ("q", "bfloat16", {"q": np.zeros((6, 2, 8, 128), np.float32)}),
        ("total_seqlens", "int32 [6]", {"total_seqlens": np.zeros(5, np.int32)}),
        ("total_seqlens", "int32 [6]", {"total_seqlens": np.zeros(6, np.int64)}),
        ("total_seqlens", "int32 [6]", {"total_seqlens": 3}),
        ("block_table", "an array", {"block_table": None}),
        ("cp_interleave", "1 to 65535", {"cp_interleave": 0}),
        ("causal", "True or False", {"causal": "yes"}),
        ("layout", "", {"layout": "fp5"}),
    ],
)  # fmt: skip
def test_wrong_arguments(
    argument: str, expected: str, changes: dict[str, Any], devices: concurrent.futures.Executor
) -> None:
    named, words = devices.submit(said, changes).result(60)
    assert named == argument
    assert expected in words


@pytest.mark.parametrize(
    ("of_call", "of_plan"),
    [
        ({"causal": True}, {"causal": False}),
        ({"causal": False}, {"causal": True}),
        ({"causal": True}, {"causal": True, "cp_interleave": 5}),
        ({}, {"head_dim_v": 128}),
    ],
)
def test_plans_are_for_calls_of_their_kind(
    of_call: dict[str, Any], of_plan: dict[str, Any], devices: concurrent.futures.Executor
) -> None:
    assert devices.submit(said, of_call, of_call).result(60) == ("", "")
    named, words = devices.submit(said, of_call, of_plan).result(60)
    assert named == "plan"
    assert "expected a plan" in words


def test_without_shard_map() -> None:
    arrays = small().build()
    inputs = arrays.q, arrays.kv_cache, arrays.block_table, arrays.cache_seqlens
    with pytest.raises(InvalidArgumentError, match="an axis of the mesh"):
        jax_ops.cp_decode(*inputs, axis_name=AXIS, head_dim_v=64)
    with pytest.raises(TypeError, match="unexpected keyword argument 'cp_rank'"):
        jax_ops.cp_decode(*inputs, axis_name=AXIS, head_dim_v=64, cp_rank=0)
