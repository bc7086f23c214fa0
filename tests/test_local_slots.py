"""local_slots against a loop over tokens: with NumPy, and its kernel run on the CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from host_kernels import needs_compiler, run_local_slots

from cupy_mla import InvalidArgumentError, slots_of
from cupy_mla.arrays.view import view
from cupy_mla.cache.local_slots import local_slots, pack_params
from cupy_mla.call.shard import Shard
from cupy_mla.kernels.slots import local_slots_geometry

TABLE = np.array([[4, 1, 0], [-1, 7, 2**31 - 1], [5, 5, 2]], np.int32)
SHARDS = [Shard(1, 0), Shard(2, 0), Shard(2, 1, 5), Shard(4, 3, 16), Shard(3, 1, 64)]
SHAPES = pytest.mark.parametrize("shape", [(3, 1), (3, 50), (3, 2, 300), (3, 2, 2, 700)])


def tokens(*shape: int) -> np.ndarray:
    """Some of them none, or past the end."""
    return np.random.default_rng(0).integers(-5, 250, shape, dtype=np.int32)


def by_loop(numbers: np.ndarray, page_size: int, shard: Shard, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    slots = np.full(numbers.shape, -1, np.int32)
    counts = np.zeros(numbers.shape[:-1], np.int32)
    for row in np.ndindex(numbers.shape[:-1]):
        for token in numbers[row].tolist():
            if token < 0 or token // shard.interleave % shard.world != shard.rank:
                continue
            place = sum(other // shard.interleave % shard.world == shard.rank for other in range(token))
            one = np.array([[place]], np.int32)
            [[slot]] = slots_of(one, TABLE, page_size, requests=requests[row[0]][None])
            if slot >= 0:
                slots[(*row, counts[row])] = slot
                counts[row] += 1
    return slots, counts


def options(shard: Shard) -> dict[str, int]:
    return {"cp_world": shard.world, "cp_rank": shard.rank, "cp_interleave": shard.interleave}


def by_kernel(
    numbers: np.ndarray, page_size: int, shard: Shard, requests: np.ndarray | None, reverse: bool
) -> tuple[np.ndarray, np.ndarray]:
    slots, counts = np.full(numbers.shape, 77, np.int32), np.full(numbers.shape[:-1], 77, np.int32)
    rows = None if requests is None else view(requests, "requests")
    arrays = view(numbers, "tokens"), view(TABLE, "table"), rows
    params = pack_params(*arrays, page_size, shard, view(slots, "slots"), view(counts, "counts"))
    geometry = local_slots_geometry(math.prod(numbers.shape[:-1]))
    run_local_slots(params, geometry.grid[0], geometry.block[0], reverse)
    return slots, counts


@pytest.mark.parametrize("shard", SHARDS, ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (3, 50), (3, 2, 60)])
@pytest.mark.parametrize("given", [False, True])
def test_tokens_of_a_rank(given: bool, shape: tuple[int, ...], shard: Shard) -> None:
    requests = np.array([2, 0, 1], np.int32) if given else np.arange(3, dtype=np.int32)
    numbers = tokens(*shape)
    found = local_slots(numbers, TABLE, 16, **options(shard), requests=requests if given else None)
    for one, other in zip(found, by_loop(numbers, 16, shard, requests), strict=True):
        assert one.dtype == np.int32
        np.testing.assert_array_equal(one, other)


@needs_compiler
@SHAPES
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shard", SHARDS, ids=str)
def test_the_kernel(shard: Shard, reverse: bool, shape: tuple[int, ...]) -> None:
    numbers = tokens(*shape)
    for requests in (None, np.array([2, -1, 0], np.int32)):
        found = by_kernel(numbers, 16, shard, requests, reverse)
        expected = local_slots(numbers, TABLE, 16, **options(shard), requests=requests)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_ranks_share_all_tokens() -> None:
    table = np.arange(60, dtype=np.int32).reshape(3, 20)
    numbers = np.arange(300, dtype=np.int32)[None, None].repeat(3, 0)
    counts = [local_slots(numbers, table, 16, cp_world=4, cp_rank=rank, cp_interleave=16)[1] for rank in range(4)]
    np.testing.assert_array_equal(sum(counts), 300)


def test_nothing() -> None:
    for shape in ((3, 0), (0, 5)):
        indices, counts = local_slots(tokens(*shape), TABLE[: shape[0]], 16, cp_world=2, cp_rank=0)
        assert (indices.shape, counts.tolist()) == (shape, [0] * shape[0])


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_results_come_back_in_the_framework_of_the_tokens(framework: str) -> None:
    module = pytest.importorskip(framework, reason=f"{framework} is not installed")
    convert = module.from_numpy if framework == "torch" else module.numpy.asarray
    numbers = tokens(3, 40)
    found = local_slots(convert(numbers), convert(TABLE), 16, cp_world=2, cp_rank=1)
    for one, other in zip(found, local_slots(numbers, TABLE, 16, cp_world=2, cp_rank=1), strict=True):
        assert type(one).__module__.startswith(framework[:3])
        np.testing.assert_array_equal(np.asarray(one), other)


@pytest.mark.parametrize(
    ("argument", "expected", "value"),
    [
        ("token_indices", "2 dimensions or more", tokens(3)),
        ("token_indices", "int32", tokens(3, 4).astype(np.int64)),
        ("block_table", "num_requests", TABLE[0]),
        ("page_size", "1 or more", 0),
        ("requests", "shape", np.zeros(2, np.int32)),
        ("cp_world", "1 to 255", 0),
        ("cp_rank", "0 to 1", 2),
        ("cp_interleave", "an integer", 1.5),
        ("stream", "an integer", "0"),
    ],
)
def test_bad_arguments(argument: str, expected: str, value: Any) -> None:
    good = {"token_indices": tokens(3, 40), "block_table": TABLE, "page_size": 16, "cp_world": 2, "cp_rank": 0}
    with pytest.raises(InvalidArgumentError, match=expected) as caught:
        local_slots(**{**good, argument: value})
    assert caught.value.argument == argument
