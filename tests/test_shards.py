"""Caches that are sharded along the sequence: which tokens lie where, plans, and decode of one shard at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from cases_dense import DenseCase, exact_decode, frobenius_error
from host_kernels import kernel_constant, needs_compiler, run_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule import dense

import cupy_mla
from cupy_mla import InvalidArgumentError, PlanMismatchError, merge_states, mla_decode, plan_decode
from cupy_mla.call import shard as shard_module
from cupy_mla.call.shard import Shard
from cupy_mla.kernels.choose import FAMILIES
from cupy_mla.lab.cases import Case
from cupy_mla.lab.shards import shards_of
from cupy_mla.parallel.lengths import local_lengths
from cupy_mla.schedule.make import make_schedule

SHARDS = [Shard(world, rank, interleave) for world, rank, interleave in ((2, 0, 1), (3, 2, 16), (4, 1, 64), (8, 7, 5))]
LENGTHS = (300, 64, 3, 0, 1, 129)
MAX_ERROR = 3e-3  # the contract's, bf16; results of shards are merged in bf16


def tokens_of(shard: Shard, length: int) -> list[int]:
    return [token for token in range(length) if token // shard.interleave % shard.world == shard.rank]


@pytest.mark.parametrize("shard", SHARDS)
def test_tokens_of_a_rank(shard: Shard) -> None:
    for length in range(200):
        assert shard.count(length) == len(tokens_of(shard, length))
    lengths = np.arange(200, dtype=np.int32)
    np.testing.assert_array_equal(shard.count(lengths), [len(tokens_of(shard, length)) for length in lengths])
    assert np.flatnonzero(shard.has(lengths)).tolist() == tokens_of(shard, 200)
    for tokens in range(50):
        assert shard.count(shard.longest_request(tokens)) == tokens
        assert shard.count(shard.longest_request(tokens) + 1) == tokens + 1


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("interleave", [1, 7, 64])
def test_local_lengths(world: int, interleave: int) -> None:
    lengths = np.array([0, 1, 63, 64, 65, 1000, 2**31 - 64], np.int32)
    shares = [local_lengths(lengths, world, rank, interleave) for rank in range(world)]
    assert all(share.dtype == np.int32 for share in shares)
    np.testing.assert_array_equal(np.sum(shares, axis=0, dtype=np.int64), lengths)
    assert [int(share[5]) for share in shares] == [local_lengths(1000, world, r, interleave) for r in range(world)]


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_local_lengths_of_other_frameworks(framework: str) -> None:
    array = pytest.importorskip(framework)
    numpy = array.numpy if framework == "jax" else array
    lengths = np.array([0, 5, 100, 1000], np.int32)
    found = local_lengths(numpy.asarray(lengths), 4, 1, 16)
    assert str(found.dtype).endswith("int32")
    np.testing.assert_array_equal(np.asarray(found), local_lengths(lengths, 4, 1, 16))


@pytest.mark.parametrize(
    ("numbers", "argument", "expected"),
    [
        ((0, 0, 1), "cp_world", "1 to 255"),
        ((256, 0, 1), "cp_world", "1 to 255"),
        ((2, 2, 1), "cp_rank", "0 to 1"),
        ((2, -1, 1), "cp_rank", "0 to 1"),
        ((2, 0, 0), "cp_interleave", "1 to 65535"),
        ((2, 0, 2**16), "cp_interleave", "1 to 65535"),
        ((2, 0, 1.5), "cp_interleave", "an integer"),
    ],
)
def test_numbers_out_of_range(numbers: tuple[Any, ...], argument: str, expected: str) -> None:
    with pytest.raises(InvalidArgumentError, match=expected) as caught:
        local_lengths(8, *numbers)
    assert caught.value.argument == argument
    case = DenseCase(seqlens_q=2, causal=True, num_heads_q=2).build()
    named = dict(zip(("cp_world", "cp_rank", "cp_interleave"), numbers, strict=True))
    for function in (mla_decode, plan_decode):
        with pytest.raises(InvalidArgumentError, match=expected) as caught:
            function(*case.tensors, causal=True, total_seqlens=case.cache_seqlens, **named)
        assert caught.value.argument == argument


# --- Plans


@needs_compiler
def test_constants_are_the_same_on_both_sides() -> None:
    assert kernel_constant("WHOLE_KEYS") == shard_module.WHOLE_KEYS
    assert kernel_constant("SHARD_RANK_SHIFT") == shard_module.RANK_SHIFT
    assert kernel_constant("SHARD_INTERLEAVE_SHIFT") == shard_module.INTERLEAVE_SHIFT


@needs_compiler
@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(SHARDS),
    st.lists(st.integers(-5, 6000), min_size=5, max_size=5),
    st.integers(1, 5),
    st.sampled_from([16, 128]),
    st.booleans(),
    st.sampled_from([None, 128]),
)
def test_planner_and_schedule_agree(
    shard: Shard, lengths: list[int], seqlen_q: int, group_heads: int, ragged: bool, split: int | None
) -> None:
    shape = dataclasses.replace(
        dense(5, seqlen_q=seqlen_q, group_heads=group_heads, fixed_split_tokens=split),
        causal=True, shard=shard, max_seqlen_k=1500, ragged=ragged, total_q=5 * seqlen_q if ragged else None,
    )  # fmt: skip
    offsets = np.linspace(0, 5 * seqlen_q, 6).astype(np.int32) if ragged else None
    found, expected = run_plan(shape, lengths, offsets), make_schedule(shape, lengths, offsets)
    for name in ("part_begin", "items", "merges"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    tiles = dict.fromkeys(range(5), 0)
    for request, head_block, begin, end, total, _, _, _ in found.items:
        assert total == min(max(lengths[request], 0), shard.longest_request(1500))
        if (head_block + shape.blocks_per_job) * shape.rows >= seqlen_q * group_heads:  # sees all
            tiles[int(request)] += end - begin
    for request, total in enumerate(lengths):
        keys = min(len(tokens_of(shard, max(total, 0))), 1500)
        assert tiles[request] == -(-keys // 64)


# --- One shard after the other


def merged(case: DenseCase, arrays: Case, world: int, interleave: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    results = []
    for shard, share in shards_of(arrays, world, interleave):
        named = {"cp_world": world, "cp_rank": shard.rank, "cp_interleave": interleave, **options}
        out, lse = mla_decode(*share.tensors, **share.options, total_seqlens=arrays.cache_seqlens, **named)
        assert not np.isnan(out.astype(np.float32)).any()
        results.append((out.astype(np.float32), lse))
    return merge_states(*(list(part) for part in zip(*results, strict=True)))


@pytest.mark.parametrize("interleave", [1, 5, 16, 64])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {"seqlens_q": 1},
        {"seqlens_q": 2, "causal": True},
        {"seqlens_q": 4, "causal": True, "num_heads_kv": 2},
        {"seqlens_q": 3},
        {"seqlens_q": (2, 0, 3, 1, 2, 4), "causal": True},
    ],
    ids=str,
)
def test_shards_merge_to_the_whole(changes: dict[str, Any], world: int, interleave: int) -> None:
    case = DenseCase(lengths=LENGTHS, num_heads_q=4, latent_dim=64, rope_dim=64, page_size=16, **changes)
    arrays = case.build()
    out, lse = merged(case, arrays, world, interleave)
    exact, exact_lse = exact_decode(case, arrays)
    assert frobenius_error(out, exact) < MAX_ERROR
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=1e-5)


def test_a_rank_without_a_visible_key_gives_the_neutral_element() -> None:
    case = DenseCase(lengths=(3, 1, 0), seqlens_q=4, causal=True, num_heads_q=2, latent_dim=64)
    arrays = case.build()
    for shard, share in shards_of(arrays, 4, 1):
        options = {"cp_world": 4, "cp_rank": shard.rank, "total_seqlens": arrays.cache_seqlens}
        out, lse = mla_decode(*share.tensors, **share.options, **options)
        for request, length in enumerate(case.lengths):
            for query in range(4):
                sees = any(token % 4 == shard.rank for token in range(length - 4 + query + 1))
                assert np.isneginf(lse[request, :, query]).all() != sees
                assert (out[request, query] != 0).any() == sees


def test_places_matter_only_where_a_mask_hides_something() -> None:
    case = DenseCase(lengths=LENGTHS, num_heads_q=2, latent_dim=64, seqlens_q=2)
    arrays = case.build()
    expected = mla_decode(*arrays.tensors, **arrays.options)
    found = mla_decode(*arrays.tensors, **arrays.options, cp_world=4, cp_rank=3, cp_interleave=16)
    for one, other in zip(found, expected, strict=True):
        assert one.tobytes() == other.tobytes()


def sharded(**changes: Any) -> tuple[Case, Case, dict[str, Any]]:
    arrays = DenseCase(lengths=LENGTHS, num_heads_q=2, latent_dim=64, seqlens_q=2, causal=True).build()
    _, share = list(shards_of(arrays, 2, 16))[1]
    named = {"cp_world": 2, "cp_rank": 1, "cp_interleave": 16, "total_seqlens": arrays.cache_seqlens, **changes}
    return arrays, share, {**share.options, **named}


def test_lengths_of_whole_requests_are_needed() -> None:
    _, share, options = sharded(total_seqlens=None)
    with pytest.raises(InvalidArgumentError, match="a causal mask goes by places in whole requests") as caught:
        mla_decode(*share.tensors, **options)
    assert caught.value.argument == "total_seqlens"


@pytest.mark.parametrize("total", [np.zeros(5, np.int32), np.zeros(6, np.int64)])
def test_lengths_of_whole_requests_are_checked(total: np.ndarray) -> None:
    _, share, options = sharded(total_seqlens=total)
    with pytest.raises(InvalidArgumentError) as caught:
        mla_decode(*share.tensors, **options)
    assert caught.value.argument == "total_seqlens"


def test_lengths_that_do_not_belong_together() -> None:
    arrays, share, options = sharded()
    share.cache_seqlens[5] += 1
    with pytest.raises(InvalidArgumentError, match=r"64, .* of rank 1 of 2 of total_seqlens\[5\] = 129, got 65"):
        mla_decode(*share.tensors, **options)
    arrays.cache_seqlens[3] = -1
    with pytest.raises(InvalidArgumentError, match=r"total_seqlens\[3\]"):
        mla_decode(*share.tensors, **options)


def test_a_plan_of_another_rank_is_refused() -> None:
    _, share, options = sharded()
    named = {name: options[name] for name in ("causal", "head_dim_v", "cp_world", "cp_interleave", "total_seqlens")}
    plan = plan_decode(*share.tensors, cp_rank=0, **named, validate=False)
    with pytest.raises(PlanMismatchError, match="cp_rank = 1"):
        mla_decode(*share.tensors, **options, plan=plan)
    plan = plan_decode(*share.tensors, cp_rank=1, **named)
    out, _ = mla_decode(*share.tensors, **options, plan=plan)
    assert out.tobytes() == mla_decode(*share.tensors, **options)[0].tobytes()


@pytest.mark.parametrize("face", ["torch", "jax", "flash_mla", "compile"])
def test_other_faces(face: str) -> None:
    _, share, options = sharded()
    expected = mla_decode(*share.tensors, **options)
    sharding = {name: options[name] for name in ("cp_world", "cp_rank", "cp_interleave")}
    total = options["total_seqlens"]
    if face == "jax":
        jax = pytest.importorskip("jax")
        from cupy_mla import jax_ops

        @jax.jit
        def call(*arrays: Any) -> Any:
            *tensors, total = arrays
            return jax_ops.mla_decode(*tensors, head_dim_v=64, causal=True, total_seqlens=total, **sharding)

        found = call(*map(jax.numpy.asarray, (*share.tensors, total)))
    else:
        torch = pytest.importorskip("torch")
        from cupy_mla import torch_ops  # noqa: F401

        def tensor(array: np.ndarray) -> Any:
            if array.dtype.kind == "i":
                return torch.from_numpy(array)
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)

        tensors, total = [tensor(array) for array in share.tensors], tensor(total)
        if face == "torch":
            found = torch.ops.cupy_mla.mla_decode(*tensors, 64, causal=True, total_seqlens=total, **sharding)
        elif face == "compile":
            decode = torch.compile(lambda *a, **named: mla_decode(*a, **named), fullgraph=True, backend="eager")
            found = decode(*tensors, head_dim_v=64, causal=True, total_seqlens=total, **sharding)
        else:
            meta, _ = cupy_mla.flash_mla.get_mla_metadata()
            decode = cupy_mla.flash_mla.flash_mla_with_kvcache
            found = decode(*tensors, 64, meta, causal=True, total_seqlens=total, **sharding)
            found[1][torch.isposinf(found[1])] = -np.inf
    for one, other in zip(found, expected, strict=True):
        found_values = one.float().numpy() if hasattr(one, "float") else np.asarray(one)
        np.testing.assert_allclose(np.asarray(found_values, np.float32), other.astype(np.float32), rtol=1e-6)


@pytest.mark.parametrize("seqlens_q", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_a_share_is_a_problem_of_its_own(seqlens_q: int, causal: bool) -> None:
    """Its results are merged once more, whether or not a mask goes by its places."""
    case = DenseCase(lengths=(200, 70), num_heads_q=8, seqlens_q=seqlens_q, causal=causal).build()
    tensors = *case.tensors[:3], local_lengths(case.cache_seqlens, 2, 0)
    sharding = {"cp_world": 2, "total_seqlens": case.cache_seqlens}
    of_share = plan_decode(*tensors, **case.plan_options, **sharding)
    assert of_share.problem.keys.cp_share
    assert (of_share.problem.keys.shard is not None) == (causal and seqlens_q > 1)
    mla_decode(*tensors, **case.options, **sharding, plan=of_share)
    whole = plan_decode(*tensors, **case.plan_options)
    assert not whole.problem.keys.cp_share
    with pytest.raises(PlanMismatchError, match="cp_"):
        mla_decode(*tensors, **case.options, **sharding, plan=whole)


def test_kernels_with_places_are_other_kernels() -> None:
    """What is compiled for whole caches does not change."""
    for family in FAMILIES:
        config = family.standard_configs()[-1]
        other = dataclasses.replace(config, causal=True, sharded=True)
        assert "_sharded" in other.name
        assert "_sharded" not in config.name
        assert ("MLA_SHARDED", "1") in other.source().defines
        assert all(name != "MLA_SHARDED" for name, _ in config.source().defines)
