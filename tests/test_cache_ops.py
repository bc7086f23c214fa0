"""append_tokens against a loop over tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_mla.cache.append import append_tokens
from cupy_mla.errors import InvalidArgumentError
from cupy_mla.kernels.structs import (
    APPEND_PARAMS,
    APPEND_PLACES,
    APPEND_SEGMENT,
    BLOCKS_PARAMS,
    COPY_PAGES_PARAMS,
)

LATENT, ROPE = 12, 4
WIDTH = LATENT + ROPE
CACHE_SOURCES = Path(__file__).parents[1] / "kernels_cu" / "cache"
PAGES, PAGE_SIZE, HEADS, TOKENS = 5, 4, 2, 6
OUTSIDE = (-1, PAGES * PAGE_SIZE, 2**40, -(2**40))


def make_case(seed: int = 0, dtype: Any = np.float16, width: int = WIDTH, heads: int = HEADS) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    cache = rng.standard_normal((PAGES, PAGE_SIZE, heads, width)).astype(dtype)
    rows = rng.standard_normal((TOKENS, heads, width)).astype(dtype)
    slots = rng.choice(PAGES * PAGE_SIZE, TOKENS, replace=False).astype(np.int64)
    return cache, rows, slots


def expected_cache(cache: Any, rows: Any, slots: Any) -> Any:
    result = cache.copy()
    for row, slot in zip(rows, slots.tolist(), strict=True):
        if 0 <= slot < PAGES * PAGE_SIZE:
            result[slot // PAGE_SIZE, slot % PAGE_SIZE] = row
    return result


def split(array: Any) -> tuple[Any, Any]:
    return array[..., :LATENT].copy(), array[..., LATENT:].copy()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.uint8], ids=str)
def test_append_by_slot(dtype: Any) -> None:
    cache, rows, slots = make_case(1, dtype)
    expected = expected_cache(cache, rows, slots)
    append_tokens(cache, rows, slots)
    np.testing.assert_array_equal(cache, expected)


def test_slots_outside_the_cache_are_ignored() -> None:
    cache, rows, slots = make_case(2)
    slots[: len(OUTSIDE)] = OUTSIDE
    expected = expected_cache(cache, rows, slots)
    append_tokens(cache, rows, slots)
    np.testing.assert_array_equal(cache, expected)


@pytest.mark.parametrize("cache_pair", [False, True])
@pytest.mark.parametrize("rows_pair", [False, True])
def test_packed_and_pairs_mix(cache_pair: bool, rows_pair: bool) -> None:
    cache, rows, slots = make_case(3)
    expected = expected_cache(cache, rows, slots)
    target = split(cache) if cache_pair else cache
    append_tokens(target, split(rows) if rows_pair else rows, slots)
    got = np.concatenate(target, axis=-1) if isinstance(target, tuple) else target
    np.testing.assert_array_equal(got, expected)


def test_strided_cache_and_rows() -> None:
    pool, _, slots = make_case(4, width=3 * WIDTH)
    _, rows, _ = make_case(5, width=2 * WIDTH)
    view, part = pool[:, :, :, WIDTH : 2 * WIDTH], rows[:, :, 4 : 4 + WIDTH]
    expected = pool.copy()
    expected[:, :, :, WIDTH : 2 * WIDTH] = expected_cache(view, part, slots)
    append_tokens(view, part, slots)
    np.testing.assert_array_equal(pool, expected)


BLOCK_TABLE = np.array([[3, 1], [0, 4], [2, PAGES]], np.int32)


def table_slots(positions: Any, requests: Any) -> Any:
    slots = []
    for position, request in zip(positions.tolist(), requests.tolist(), strict=True):
        inside = 0 <= request < len(BLOCK_TABLE) and 0 <= position < BLOCK_TABLE.shape[1] * PAGE_SIZE
        page = int(BLOCK_TABLE[request, position // PAGE_SIZE]) if inside else -1
        slots.append(page * PAGE_SIZE + position % PAGE_SIZE if 0 <= page < PAGES else -1)
    return np.array(slots, np.int64)


TABLE_CASES = {
    "same number each": (np.array([0, 1, 3, 4, 5, 6], np.int32), None),
    "garbage page": (np.array([7, 0, 7, 0, 7, 0], np.int32), None),
    "outside": (np.array([-1, 8, 2**31 - 1, -(2**31), 0, 1], np.int32), None),
    "by request": (np.array([0, 1, 2, 3, 4, 5], np.int32), np.array([0, 0, 1, 0, 0, -1], np.int32)),
    "no such request": (np.array([0, 1, 2, 3, 4, 5], np.int32), np.array([3, 0, 1, 2**31 - 1, -5, 2], np.int32)),
}


@pytest.mark.parametrize(("positions", "requests"), TABLE_CASES.values(), ids=TABLE_CASES)
def test_append_by_block_table(positions: Any, requests: Any) -> None:
    cache, rows, _ = make_case(6)
    owners = np.repeat(np.arange(3), 2) if requests is None else requests
    expected = expected_cache(cache, rows, table_slots(positions, owners))
    append_tokens(cache, rows, block_table=BLOCK_TABLE, positions=positions, requests=requests)
    np.testing.assert_array_equal(cache, expected)


def test_no_tokens_is_fine() -> None:
    cache, rows, slots = make_case(7)
    before = cache.copy()
    append_tokens(cache, rows[:0], slots[:0])
    np.testing.assert_array_equal(cache, before)


def bad_append_calls() -> dict[str, tuple[str, dict[str, Any]]]:
    cache, rows, slots = make_case(8)
    read_only = cache.copy()
    read_only.flags.writeable = False
    one_page = np.lib.stride_tricks.as_strided(cache, strides=(0, *cache.strides[1:]))
    good: dict[str, Any] = {"kv_cache": cache, "kv_new": rows, "slot_mapping": slots}
    table = {"slot_mapping": None, "block_table": BLOCK_TABLE, "positions": slots.astype(np.int32)}
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        "cache rank": ("kv_cache", {"kv_cache": cache[0]}),
        "cache of three": ("kv_cache", {"kv_cache": (cache, cache, cache)}),
        "read-only cache": ("kv_cache", {"kv_cache": read_only}),
        "one page for all": ("kv_cache", {"kv_cache": one_page}),
        "cache stride": ("kv_cache", {"kv_cache": np.repeat(cache, 2, axis=-1)[..., ::2]}),
        "no array": ("kv_new", {"kv_new": "text"}),
        "rows rank": ("kv_new", {"kv_new": rows[0, 0]}),
        "rows type": ("kv_new", {"kv_new": rows.astype(np.float32)}),
        "rows heads": ("kv_new", {"kv_new": rows[:, :1]}),
        "rows width": ("kv_new", {"kv_new": rows[..., :8].copy()}),
        "slots type": ("slot_mapping", {"slot_mapping": slots.astype(np.int32)}),
        "slots length": ("slot_mapping", {"slot_mapping": slots[:-1]}),
        "no places": ("block_table", {"slot_mapping": None}),
        "no positions": ("positions", table | {"positions": None}),
        "both places": ("block_table", {"block_table": BLOCK_TABLE}),
        "table type": ("block_table", table | {"block_table": BLOCK_TABLE.astype(np.int64)}),
        "positions type": ("positions", table | {"positions": slots}),
        "tokens per request": ("positions", table | {"block_table": np.zeros((4, 2), np.int32)}),
    }
    return {name: (argument, good | change) for name, (argument, change) in changes.items()}


@pytest.mark.parametrize(("argument", "call"), bad_append_calls().values(), ids=bad_append_calls())
def test_a_bad_append_is_refused(argument: str, call: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^{argument}(\[\d\])?: "):
        append_tokens(call.pop("kv_cache"), call.pop("kv_new"), **call)


def test_params_have_the_sizes_of_the_kernel() -> None:
    names = "places.h", "append.cu", "blocks.h", "copy_pages.cu"
    sources = "".join((CACHE_SOURCES / name).read_text() for name in names)
    sizes = {name: int(size) for name, size in re.findall(r"sizeof\((\w+)\) == (\d+)", sources)}
    assert sizes == {
        "AppendSegment": APPEND_SEGMENT.itemsize,
        "AppendPlaces": APPEND_PLACES.itemsize,
        "AppendParams": APPEND_PARAMS.itemsize,
        "BlocksParams": BLOCKS_PARAMS.itemsize,
        "CopyPagesParams": COPY_PAGES_PARAMS.itemsize,
    }


# On the GPU -------------------------------------------------------------------------------------------------------


def to_device(array: Any) -> Any:
    """A NumPy array on the GPU (16-bit types travel as integers: no conversion anywhere)."""
    import cupy

    if isinstance(array, tuple):
        return tuple(to_device(part) for part in array)
    bits = array.view(np.uint16) if array.dtype.itemsize == 2 else array
    return cupy.asarray(np.ascontiguousarray(bits)).view(array.dtype)


def to_host(array: Any) -> Any:
    import cupy

    bits = array.view(np.uint16) if array.dtype.itemsize == 2 else array
    return cupy.asnumpy(bits).view(array.dtype)


GPU_WIDTHS = (512, 64)  # 16-byte rows; latent and rope of DeepSeek V3


def make_gpu_case(seed: int, dtype: Any, heads: int) -> tuple[Any, Any, Any]:
    cache, rows, slots = make_case(seed, dtype, sum(GPU_WIDTHS), heads)
    slots[:2] = OUTSIDE[:2]
    return cache, rows, slots


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("cache_pair", [False, True])
@pytest.mark.parametrize("rows_pair", [False, True])
def test_gpu_append_by_slot(dtype: Any, heads: int, cache_pair: bool, rows_pair: bool) -> None:
    cache, rows, slots = make_gpu_case(10, dtype, heads)
    expected = expected_cache(cache, rows, slots)

    def parts(array: Any) -> Any:
        return array[..., : GPU_WIDTHS[0]].copy(), array[..., GPU_WIDTHS[0] :].copy()

    target = to_device(parts(cache) if cache_pair else cache)
    append_tokens(target, to_device(parts(rows) if rows_pair else rows), to_device(slots))
    got = np.concatenate([to_host(part) for part in target], axis=-1) if cache_pair else to_host(target)
    np.testing.assert_array_equal(got.view(np.uint16), expected.view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize(("positions", "requests"), TABLE_CASES.values(), ids=TABLE_CASES)
def test_gpu_append_by_block_table(positions: Any, requests: Any) -> None:
    cache, rows, _ = make_gpu_case(11, ml_dtypes.bfloat16, 1)
    owners = np.repeat(np.arange(3), 2) if requests is None else requests
    expected = expected_cache(cache, rows, table_slots(positions, owners))
    target = to_device(cache)
    append_tokens(
        target,
        to_device(rows),
        block_table=to_device(BLOCK_TABLE),
        positions=to_device(positions),
        requests=None if requests is None else to_device(requests),
    )
    np.testing.assert_array_equal(to_host(target).view(np.uint16), expected.view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize("cache_pair", [False, True])
@pytest.mark.parametrize("by_table", [False, True])
def test_gpu_appends_made_again(cache_pair: bool, by_table: bool) -> None:
    """From the second on the call is known, and only addresses are written: each has arrays of its own, all alive."""
    alive = []
    for seed in range(20, 24):
        cache, rows, slots = make_gpu_case(seed, ml_dtypes.bfloat16, 1)
        positions, owners = np.array([0, 1, 3, 4, 5, 6], np.int32), np.repeat(np.arange(3), 2)
        places = {"slot_mapping": to_device(slots)}
        if by_table:
            slots = table_slots(positions, owners)
            places = {"block_table": to_device(BLOCK_TABLE), "positions": to_device(positions)}
        parts = (cache[..., : GPU_WIDTHS[0]].copy(), cache[..., GPU_WIDTHS[0] :].copy()) if cache_pair else cache
        target = to_device(parts)
        append_tokens(target, to_device(rows), **places)
        alive.append((target, places, expected_cache(cache, rows, slots)))
    for target, _, expected in alive:
        got = np.concatenate([to_host(part) for part in target], axis=-1) if cache_pair else to_host(target)
        np.testing.assert_array_equal(got.view(np.uint16), expected.view(np.uint16))


@pytest.mark.gpu
def test_gpu_strided_cache() -> None:
    pool, rows, slots = make_gpu_case(12, ml_dtypes.bfloat16, 2)
    wide = np.concatenate([pool, pool], axis=-1)
    expected = wide.copy()
    expected[..., sum(GPU_WIDTHS) :] = expected_cache(pool, rows, slots)
    target = to_device(wide)
    append_tokens(target[..., sum(GPU_WIDTHS) :], to_device(rows), to_device(slots))
    np.testing.assert_array_equal(to_host(target).view(np.uint16), expected.view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "change",
    [
        {"kv_new": "misaligned"},
        {"kv_new": "host"},
        {"slot_mapping": "host"},
    ],
    ids=lambda change: "-".join(f"{key} {value}" for key, value in change.items()),
)
def test_gpu_bad_append_is_refused(change: dict[str, str]) -> None:
    cache, rows, slots = make_gpu_case(13, np.float16, 1)
    wide = to_device(np.concatenate([rows, rows], axis=-1))
    kv_new = {"misaligned": wide[..., 1 : 1 + rows.shape[-1]], "host": rows}.get(
        change.get("kv_new", ""), to_device(rows)
    )
    slot_mapping = slots if "slot_mapping" in change else to_device(slots)
    target = to_device(cache)
    with pytest.raises(InvalidArgumentError, match=f"^{next(iter(change))}: "):
        append_tokens(target, kv_new, slot_mapping)
    np.testing.assert_array_equal(to_host(target), cache)
