"""Context-parallel sparse decode under jax.shard_map, on CPU devices of a process of its own, against float64."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cases_chosen import attend_to_chosen, choose_tokens
from cases_dense import DenseCase, frobenius_error
from jax_devices import padded, process_with_devices

from cupy_mla import InvalidArgumentError, PlanMismatchError
from cupy_mla.lab.shards import shards_of
from cupy_mla.parallel import jax_ops, local_slots

jax = pytest.importorskip("jax", reason="JAX is not installed")
pytestmark = pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX is older than jax.shard_map")

WORLDS = (2, 4)
LENGTHS = (300, 64, 3, 0, 1, 129)
TOPK = 70
MAX_ERROR, LSE_TOLERANCE = 3e-3, 1e-5
AXIS = "ranks"


@dataclass(frozen=True)
class Call:
    """A case, whose query tokens choose at random, and how it is called."""

    layout: str | None = None
    seqlen_q: int = 1
    interleave: int = 1
    gathered: bool = False
    exchange: str = "a2a"
    planned: bool = False

    @property
    def case(self) -> DenseCase:
        return DenseCase(LENGTHS, num_heads_q=4, seqlens_q=self.seqlen_q, page_size=16, layout=self.layout)


def mesh_of(world: int) -> Any:
    return jax.sharding.Mesh(np.array(jax.devices()[:world]), (AXIS,))


def in_shard_map(call: Call, world: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """out and lse of all heads, of three choices of the same program."""
    arrays = call.case.build()
    shares = [share for _, share in shards_of(arrays, world, call.interleave)]
    named = {"layout": call.layout, "axis_name": AXIS, "gathered": call.gathered}
    slots = {"axis_name": AXIS, "cp_interleave": call.interleave}

    def program(q: Any, kv_cache: Any, table: Any, tokens: Any, kv_scale: Any) -> Any:
        indices, counts = jax_ops.local_slots(tokens, table[0], 16, **slots)
        inputs, given = (q, kv_cache[0], indices), {**named, "topk_length": counts, "kv_scale": kv_scale}
        plan = jax_ops.plan_cp_sparse_decode(*inputs, **given) if call.planned else None
        return jax_ops.cp_sparse_decode(*inputs, **given, exchange=call.exchange, plan=plan)

    spec = jax.sharding.PartitionSpec
    part, whole, heads, of_heads = spec(AXIS), spec(), spec(None, None, AXIS), spec(None, AXIS)
    specs = (whole if call.gathered else heads, part, part, whole, whole)
    sharded = jax.shard_map(
        program, mesh=mesh_of(world), in_specs=specs, out_specs=(heads, of_heads), check_vma=False
    )
    compiled = jax.jit(sharded)
    caches, tables = padded([share.kv_cache for share in shares]), padded([share.block_table for share in shares])
    found = []
    for most in (TOPK, 5, 0):
        tokens = choose_tokens(LENGTHS, call.seqlen_q, TOPK, most)
        out, lse = compiled(arrays.q, caches, tables, tokens, arrays.kv_scale)
        found.append((np.asarray(out).astype(np.float64), np.asarray(lse)))
    return found


@pytest.fixture(scope="module")
def devices() -> Iterator[concurrent.futures.Executor]:
    with process_with_devices(max(WORLDS)) as process:
        yield process


CALLS = [
    *(Call(layout, interleave=16) for layout in (None, "fp8_e4m3", "fp8_ds_mla")),
    *(Call(interleave=interleave, seqlen_q=3) for interleave in (1, 64)),
    *(Call(exchange=how, gathered=gathered) for how in ("a2a", "ag_rs") for gathered in (False, True)),
    Call(planned=True, seqlen_q=2),
]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_devices_together_give_the_whole(call: Call, world: int, devices: concurrent.futures.Executor) -> None:
    results = devices.submit(in_shard_map, call, world).result(120)
    arrays = call.case.build()
    for most, (out, lse) in zip((TOPK, 5, 0), results, strict=True):
        exact_out, exact_lse = attend_to_chosen(arrays, choose_tokens(LENGTHS, call.seqlen_q, TOPK, most))
        if most:
            assert frobenius_error(out, exact_out) < MAX_ERROR
        else:
            assert not out.any()
        np.testing.assert_allclose(lse, exact_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


TABLE = np.array([[4, 1, 0], [-1, 7, 2**31 - 1], [5, 5, 2]], np.int32)


def slots_on_devices(shape: tuple[int, ...], interleave: int, requests: np.ndarray | None) -> Any:
    """indices and counts of each of two devices; some tokens are none, or past the end."""
    tokens = np.random.default_rng(0).integers(-5, 250, shape, dtype=np.int32)

    def program(tokens: Any) -> Any:
        options = {"axis_name": AXIS, "cp_interleave": interleave, "requests": requests}
        return tuple(found[None] for found in jax_ops.local_slots(tokens, TABLE, 16, **options))

    spec = jax.sharding.PartitionSpec
    sharded = jax.shard_map(
        program, mesh=mesh_of(2), in_specs=spec(), out_specs=(spec(AXIS), spec(AXIS)), check_vma=False
    )
    return tokens, [np.asarray(found) for found in jax.jit(sharded)(tokens)]


@pytest.mark.parametrize("requests", [None, np.array([2, -1, 0], np.int32)], ids=["in_turn", "named"])
@pytest.mark.parametrize("interleave", [1, 5, 64])
@pytest.mark.parametrize("shape", [(3, 1), (3, 300), (3, 2, 2, 60), (3, 0)])
def test_local_slots(
    shape: tuple[int, ...], interleave: int, requests: Any, devices: concurrent.futures.Executor
) -> None:
    tokens, (indices, counts) = devices.submit(slots_on_devices, shape, interleave, requests).result(60)
    for rank in range(2):
        sharding = {"cp_world": 2, "cp_rank": rank, "cp_interleave": interleave}
        expected = local_slots(tokens, TABLE, 16, **sharding, requests=requests)
        for one, other in zip((indices[rank], counts[rank]), expected, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


def said(changes: dict[str, Any], of_plan: dict[str, Any] | None = None) -> tuple[str, str]:
    """What is said of a call, perhaps with a plan of another: the argument, and the whole."""
    arrays = Call().case.build()
    given = {"q": arrays.q, "kv_cache": arrays.kv_cache, "axis_name": AXIS}
    whole = jax.sharding.PartitionSpec()

    def program(tokens: Any) -> Any:
        of_slots = {name: changes[name] for name in ("page_size", "cp_interleave", "block_table") if name in changes}
        slots = {"block_table": arrays.block_table, "page_size": 16, "axis_name": AXIS, **of_slots}
        indices, counts = jax_ops.local_slots(tokens, **slots)
        inputs = {**given, "indices": indices, "topk_length": counts}
        plan = None if of_plan is None else jax_ops.plan_cp_sparse_decode(**{**inputs, **of_plan})
        others = {name: value for name, value in changes.items() if name not in of_slots}
        return jax_ops.cp_sparse_decode(**{**inputs, "plan": plan, **others})

    sharded = jax.shard_map(program, mesh=mesh_of(2), in_specs=whole, out_specs=whole, check_vma=False)
    try:
        jax.jit(sharded)(choose_tokens(LENGTHS, 1, TOPK))
    except (InvalidArgumentError, PlanMismatchError) as error:
        return error.argument, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("argument", "expected", "changes"),
    [
        ("axis_name", "an axis of the mesh", {"axis_name": "rank"}),
        ("exchange", "a2a or ag_rs", {"exchange": "ring"}),
        ("gathered", "True or False", {"gathered": 2}),
        ("q", "an array", {"q": [1]}),
        ("indices", "int32", {"indices": np.zeros((6, 1, 5), np.float32)}),
        ("block_table", "num_requests", {"block_table": TABLE[0]}),
        ("page_size", "1 or more", {"page_size": 0}),
        ("cp_interleave", "1 to 65535", {"cp_interleave": 0}),
    ],
)  # fmt: skip
def test_wrong_arguments(
    argument: str, expected: str, changes: dict[str, Any], devices: concurrent.futures.Executor
) -> None:
    named, words = devices.submit(said, changes).result(60)
    assert named == argument
    assert expected in words


def test_plans_are_for_calls_of_their_kind(devices: concurrent.futures.Executor) -> None:
    assert devices.submit(said, {}, {}).result(60) == ("", "")
    named, words = devices.submit(said, {}, {"head_dim_v": 128}).result(60)
    assert named == "plan"
    assert "expected a plan" in words


def test_what_is_not_of_one_cache_is_not_taken() -> None:
    arrays = Call().case.build()
    with pytest.raises(TypeError, match="unexpected keyword argument 'attn_sink'"):
        jax_ops.cp_sparse_decode(arrays.q, arrays.kv_cache, None, axis_name=AXIS, attn_sink=np.zeros(4, np.float32))
