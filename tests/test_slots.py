"""slots_of against a loop over tokens: with NumPy, and its kernel run on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeArray
from host_kernels import needs_compiler, run_slots

from cupy_mla import InvalidArgumentError, slots_of
from cupy_mla.arrays.view import view
from cupy_mla.cache.slots import pack_slots_params
from cupy_mla.kernels.slots import slots_geometry

MAX = 2**31 - 1
TABLE = np.array([[4, 1, 0], [-1, 7, MAX], [5, 5, 2]], np.int32)


def tokens(*shape: int) -> np.ndarray:
    """Some of them none, or past the end."""
    return np.random.default_rng(0).integers(-5, 60, shape, dtype=np.int32)


def by_loop(numbers: np.ndarray, table: np.ndarray, page_size: int, requests: np.ndarray) -> np.ndarray:
    slots = np.full(numbers.shape, -1, np.int32)
    for place in np.ndindex(numbers.shape):
        token, request = int(numbers[place]), int(requests[place[0]])
        page_index = token // page_size
        if token < 0 or not 0 <= request < len(table) or page_index >= table.shape[1]:
            continue
        page = int(table[request, page_index])
        slot = page * page_size + token % page_size
        if page >= 0 and slot <= MAX:
            slots[place] = slot
    return slots


def by_kernel(numbers: np.ndarray, table: np.ndarray, page_size: int, requests: np.ndarray | None) -> np.ndarray:
    slots = np.full(numbers.shape, 77, np.int32)
    rows = None if requests is None else view(requests, "requests")
    params = pack_slots_params(view(numbers, "tokens"), view(table, "table"), rows, page_size, view(slots, "out"))
    geometry = slots_geometry(numbers.shape[0], int(params["row_tokens"][0]))
    run_slots(params, geometry.grid[0], geometry.block[0])
    return slots


CASES = pytest.mark.parametrize("page_size", [1, 16, 61])
SHAPES = pytest.mark.parametrize("shape", [(3,), (3, 50), (3, 2, 300)])


@CASES
@SHAPES
def test_slots(shape: Any, page_size: int) -> None:
    numbers = tokens(*shape)
    expected = by_loop(numbers, TABLE, page_size, np.arange(3))
    np.testing.assert_array_equal(slots_of(numbers, TABLE, page_size), expected)
    assert numbers.size == 3 or (expected >= 0).any()


@needs_compiler
@CASES
@SHAPES
def test_the_kernel(shape: Any, page_size: int) -> None:
    numbers = tokens(*shape)
    wider = np.full((3, 5), 9, np.int32)
    wider[:, :3] = TABLE
    np.testing.assert_array_equal(
        by_kernel(numbers, wider[:, :3], page_size, None), slots_of(numbers, TABLE, page_size)
    )
    requests = np.array([2, -1, 0], np.int32)
    np.testing.assert_array_equal(
        by_kernel(numbers, TABLE, page_size, requests), slots_of(numbers, TABLE, page_size, requests=requests)
    )


def test_requests() -> None:
    numbers = tokens(7, 40)
    requests = np.array([2, 0, 0, 3, -1, 1, 2], np.int32)
    np.testing.assert_array_equal(
        slots_of(numbers, TABLE, 16, requests=requests), by_loop(numbers, TABLE, 16, requests)
    )


def test_in_place() -> None:
    numbers = tokens(3, 40)
    expected = slots_of(numbers, TABLE, 16)
    assert slots_of(numbers, TABLE, 16, out=numbers) is numbers
    np.testing.assert_array_equal(numbers, expected)


def test_nothing() -> None:
    assert slots_of(tokens(3, 0), TABLE, 16).shape == (3, 0)
    assert slots_of(tokens(0, 5), TABLE, 16, requests=np.zeros(0, np.int32)).shape == (0, 5)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_results_come_back_in_the_framework_of_the_tokens(framework: str) -> None:
    module = pytest.importorskip(framework, reason=f"{framework} is not installed")
    convert = module.from_numpy if framework == "torch" else module.numpy.asarray
    numbers = tokens(3, 40)
    slots = slots_of(convert(numbers), convert(TABLE), 16)
    assert type(slots).__module__.startswith(framework[:3])
    np.testing.assert_array_equal(np.asarray(slots), slots_of(numbers, TABLE, 16))


GOOD: dict[str, Any] = {"token_indices": tokens(3, 40), "block_table": TABLE, "page_size": 16}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("token_indices", np.int32(3)),
        ("token_indices", tokens(2, 40)),
        ("token_indices", tokens(3, 40).astype(np.int64)),
        ("token_indices", tokens(3, 80)[:, ::2]),
        ("token_indices", "none"),
        ("block_table", TABLE[0]),
        ("block_table", TABLE[:, :0]),
        ("block_table", TABLE.astype(np.int64)),
        ("block_table", TABLE[:, ::2]),
        ("block_table", FakeArray((3, 3), "int32")),
        ("page_size", 0),
        ("page_size", 16.0),
        ("requests", np.zeros(2, np.int32)),
        ("requests", np.zeros(3, np.int64)),
        ("requests", np.zeros(6, np.int32)[::2]),
        ("out", np.zeros((3, 41), np.int32)),
        ("out", np.zeros((3, 40), np.int64)),
        ("out", np.zeros((3, 80), np.int32)[:, ::2]),
        ("stream", "0"),
    ],
)
def test_bad_arguments(argument: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        slots_of(**{**GOOD, argument: value})
    named = "block_table" if argument == "token_indices" and np.shape(value) == (2, 40) else argument
    assert caught.value.argument == named
