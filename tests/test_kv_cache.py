"""PagedKVCache against a dictionary of token lists, and append_tokens against a loop over tokens."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import cupy_mla.cache_ops as cache_ops
from cupy_mla.cache_ops import append_tokens
from cupy_mla.errors import InvalidArgumentError, MlaError
from cupy_mla.kv_cache import OutOfPagesError, OutOfRequestsError, PagedKVCache

LATENT, ROPE = 12, 4
WIDTH = LATENT + ROPE
APPEND_SOURCE = Path(__file__).parents[1] / "kernels_cu" / "cache_ops" / "append.cu"


def random_rows(rng: np.random.Generator, num_tokens: int, width: int = WIDTH, dtype: Any = np.float16) -> Any:
    return rng.standard_normal((num_tokens, width)).astype(dtype)


def small_cache(**changes: Any) -> PagedKVCache:
    options: dict[str, Any] = {"num_pages": 8, "page_size": 4, "latent_dim": LATENT, "rope_dim": ROPE}
    options |= {"dtype": "float16", "max_requests": 4, "max_pages_per_seq": 5}
    return PagedKVCache(**(options | changes))


def gather(cache: PagedKVCache, request: int) -> Any:
    """The tokens of a request, read through its block table as an attention kernel would."""
    table = cache.block_table([request])[0]
    length = int(cache.cache_seqlens([request])[0])
    pages = table[: -(-length // cache.page_size)]
    return cache.kv_cache[pages, :, 0].reshape(-1, cache.latent_dim + cache.rope_dim)[:length]


# The allocator ----------------------------------------------------------------------------------------------------


class CacheMachine(RuleBasedStateMachine):
    """Random histories; the model is a list of rows per request, with no pages in it."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = small_cache()
        self.model: dict[int, Any] = {}
        self.freed: list[int] = []
        self.rng = np.random.default_rng(0)

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.model)))

    @rule()
    def allocate(self) -> None:
        if len(self.model) == self.cache.max_requests:
            with pytest.raises(OutOfRequestsError):
                self.cache.allocate()
            return
        request = self.cache.allocate()
        assert request not in {*self.model, *self.freed}
        self.model[request] = np.zeros((0, WIDTH), np.float16)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        requests = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True, min_size=1))
        counts = [data.draw(st.integers(0, 9)) for _ in requests]
        rows = random_rows(self.rng, sum(counts))
        before = self.state()
        new_lengths = [len(self.model[request]) + count for request, count in zip(requests, counts, strict=True)]
        if max(new_lengths) > self.cache.max_pages_per_seq * self.cache.page_size:
            with pytest.raises(InvalidArgumentError, match="in request"):
                self.cache.append(requests, rows, counts)
            assert self.state() == before
            return
        needed = self.pages_needed(requests, counts)
        if needed > self.cache.num_free_pages:
            with pytest.raises(OutOfPagesError) as caught:
                self.cache.append(requests, rows, counts)
            assert (caught.value.needed, caught.value.free) == (needed, self.cache.num_free_pages)
            assert self.state() == before
            return
        self.cache.append(requests, rows, counts)
        assert self.cache.num_free_pages == len(before[2]) - needed
        begin = 0
        for request, count in zip(requests, counts, strict=True):
            self.model[request] = np.concatenate([self.model[request], rows[begin : begin + count]])
            begin += count

    def pages_needed(self, requests: list[int], counts: list[int]) -> int:
        """New pages, and a copy for every writer but the last holder of a shared, partly filled page."""
        needed = 0
        references = self.cache._references.tolist()
        for request, count in zip(requests, counts, strict=True):
            length = len(self.model[request])
            needed += -(-(length + count) // self.cache.page_size) - -(-length // self.cache.page_size)
            if count > 0 and length % self.cache.page_size != 0:
                page = self.cache.block_table([request])[0, length // self.cache.page_size]
                if references[page] > 1:
                    references[page] -= 1
                    needed += 1
        return needed

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = self.pick(data)
        num_tokens = data.draw(st.none() | st.integers(0, len(self.model[parent])))
        free = self.cache.num_free_pages
        if len(self.model) == self.cache.max_requests:
            with pytest.raises(OutOfRequestsError):
                self.cache.fork(parent, num_tokens)
            return
        child = self.cache.fork(parent, num_tokens)
        assert self.cache.num_free_pages == free
        self.model[child] = self.model[parent][:num_tokens].copy()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        request = self.pick(data)
        num_tokens = data.draw(st.integers(0, len(self.model[request])))
        self.cache.truncate(request, num_tokens)
        self.model[request] = self.model[request][:num_tokens]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        request = self.pick(data)
        self.cache.free(request)
        del self.model[request]
        self.freed.append(request)
        with pytest.raises(InvalidArgumentError):
            self.cache.length(request)

    def state(self) -> tuple[Any, ...]:
        cache = self.cache
        lengths = cache.cache_seqlens()
        tables = [
            table[: -(-int(length) // cache.page_size)].tolist()
            for table, length in zip(cache.block_table(), lengths, strict=True)
        ]
        return lengths.tolist(), tables, sorted(cache._free_pages), cache._references.tolist()

    @invariant()
    def tokens_are_right(self) -> None:
        assert self.cache.requests == tuple(self.model)
        for request, rows in self.model.items():
            assert self.cache.length(request) == len(rows)
            np.testing.assert_array_equal(gather(self.cache, request), rows)

    @invariant()
    def pages_are_counted(self) -> None:
        _, tables, free, references = self.state()
        held = np.bincount([page for table in tables for page in table], minlength=self.cache.num_pages)
        assert held.tolist() == references
        assert free == np.flatnonzero(held == 0).tolist()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)


def test_one_token_per_request_by_default() -> None:
    cache = small_cache(dtype="bfloat16")
    requests = [cache.allocate(), cache.allocate()]
    rows = random_rows(np.random.default_rng(1), 2, dtype=ml_dtypes.bfloat16)
    cache.append(requests, rows)
    assert cache.cache_seqlens().tolist() == [1, 1]
    np.testing.assert_array_equal(gather(cache, requests[1]), rows[1:])


def test_rows_may_be_a_pair() -> None:
    cache = small_cache()
    request = cache.allocate()
    rows = random_rows(np.random.default_rng(2), 5)
    cache.append([request], (rows[:, :LATENT], rows[:, None, LATENT:]))
    np.testing.assert_array_equal(gather(cache, request), rows)


def test_fork_copies_only_the_written_page() -> None:
    cache = small_cache()
    parent = cache.allocate()
    rng = np.random.default_rng(3)
    cache.append([parent], random_rows(rng, 6))
    child = cache.fork(parent)
    assert cache.num_free_pages == 6
    cache.append([child, parent], random_rows(rng, 2))
    parent_table, child_table = cache.block_table([parent, child])
    assert (parent_table[:2] == child_table[:2]).tolist() == [True, False]
    assert cache.num_free_pages == 5  # one copy for two writers: the last holder writes in place


def test_a_full_shared_page_is_never_copied() -> None:
    cache = small_cache()
    parent = cache.allocate()
    rng = np.random.default_rng(4)
    cache.append([parent], random_rows(rng, 4))
    child = cache.fork(parent)
    cache.append([child], random_rows(rng, 1))
    assert cache.num_free_pages == 6


def test_out_of_pages_says_what_is_missing() -> None:
    cache = small_cache(num_pages=2)
    request = cache.allocate()
    with pytest.raises(OutOfPagesError, match=r"needs 3 more pages, 2 of the cache's 2 are free") as caught:
        cache.append([request], random_rows(np.random.default_rng(5), 9))
    assert isinstance(caught.value, MlaError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert cache.num_free_pages == 2


def test_a_copy_needs_a_free_page_too() -> None:
    cache = small_cache(num_pages=1)
    parent = cache.allocate()
    rows = random_rows(np.random.default_rng(6), 3)
    cache.append([parent], rows[:2])
    child = cache.fork(parent)
    with pytest.raises(OutOfPagesError):
        cache.append([child], rows[2:])
    cache.free(parent)
    cache.append([child], rows[2:])
    np.testing.assert_array_equal(gather(cache, child), rows)


def test_outputs_are_written_in_place() -> None:
    cache = small_cache()
    requests = [cache.allocate(), cache.allocate()]
    cache.append(requests, random_rows(np.random.default_rng(7), 7), [5, 2])
    lengths = np.full(2, -1, np.int32)
    table = np.full((2, 5), -1, np.int32)
    assert cache.cache_seqlens(requests[::-1], out=lengths) is lengths
    cache.block_table(requests, out=table)
    assert lengths.tolist() == [2, 5]
    np.testing.assert_array_equal(table, cache.block_table(requests))


@pytest.mark.parametrize(
    "out", [np.zeros(3, np.int32), np.zeros(2, np.int64), np.zeros(4, np.int32)[::2]], ids=["shape", "type", "stride"]
)
def test_an_output_that_does_not_fit_is_refused(out: Any) -> None:
    cache = small_cache()
    with pytest.raises(InvalidArgumentError, match=r"^out: "):
        cache.cache_seqlens([cache.allocate(), cache.allocate()], out=out)


def test_an_output_that_must_not_be_written_is_refused() -> None:
    cache = small_cache()
    out = np.zeros(1, np.int32)
    out.flags.writeable = False
    with pytest.raises(InvalidArgumentError, match="a writable array"):
        cache.cache_seqlens([cache.allocate()], out=out)


def test_counts_of_a_narrow_type_do_not_wrap() -> None:
    cache = small_cache(num_pages=80, max_pages_per_seq=80)
    requests = [cache.allocate(), cache.allocate()]
    cache.append(requests, random_rows(np.random.default_rng(9), 300), np.array([200, 100], np.uint8))
    assert cache.cache_seqlens().tolist() == [200, 100]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_pages", 0),
        ("page_size", 0),
        ("latent_dim", -64),
        ("rope_dim", -1),
        ("max_requests", 0),
        ("max_pages_per_seq", 0),
        ("num_pages", 2.0),
        ("latent_dim", "12"),
        ("max_pages_per_seq", 2.5),
        ("dtype", "float64"),
        ("device", "tpu"),
    ],
)
def test_a_bad_setting_is_named(argument: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{argument}: "):
        small_cache(**{argument: value})


def test_bad_calls_change_nothing() -> None:
    cache = small_cache()
    first, second = cache.allocate(), cache.allocate()
    rows = random_rows(np.random.default_rng(8), 6)
    cache.append([first], rows)
    fork = cache.fork(first)
    bad_calls: list[tuple[str, Any]] = [
        ("requests", lambda: cache.append([99], rows)),
        ("requests", lambda: cache.append([first, first], rows)),
        ("counts", lambda: cache.append([first, second], rows, [3, 4])),
        ("counts", lambda: cache.append([first, second], rows, [-1, 7])),
        ("kv_new", lambda: cache.append([first, second], rows[:5])),
        ("kv_new", lambda: cache.append([fork], rows[:, :8].copy())),
        ("kv_new", lambda: cache.append([fork], rows.astype(np.float32))),
        ("kv_new", lambda: cache.append([fork], np.zeros((15, WIDTH), np.float16))),
        ("num_tokens", lambda: cache.fork(first, 7)),
        ("num_tokens", lambda: cache.truncate(first, -1)),
        ("num_tokens", lambda: cache.truncate(first, 5.0)),  # type: ignore[arg-type]
        ("num_tokens", lambda: cache.fork(first, 2.0)),  # type: ignore[arg-type]
        ("requests", lambda: cache.append([[first]], rows)),  # type: ignore[list-item]
        ("counts", lambda: cache.append([first], rows, [None])),  # type: ignore[list-item]
        ("counts", lambda: cache.append([first, second], rows, [1.5, 4.5])),  # type: ignore[list-item]
        (r"kv_new\[0\]", lambda: cache.append([fork], (rows[:, LATENT:].copy(), rows[:, :LATENT].copy()))),
        ("request", lambda: cache.free(99)),
    ]
    for argument, call in bad_calls:
        free = cache.num_free_pages
        with pytest.raises(InvalidArgumentError, match=rf"^{argument}: "):
            call()
        assert cache.num_free_pages == free
        assert cache.cache_seqlens().tolist() == [6, 0, 6]
        assert len(cache.requests) == 3
        np.testing.assert_array_equal(gather(cache, fork), rows)


# append_tokens ----------------------------------------------------------------------------------------------------

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
    sizes = dict(re.findall(r"sizeof\((Append\w+)\) == (\d+)", APPEND_SOURCE.read_text()))
    assert int(sizes["AppendSegment"]) == cache_ops.SEGMENT_DTYPE.itemsize
    assert int(sizes["AppendParams"]) == cache_ops.PARAMS_DTYPE.itemsize


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("side_stream", [False, True])
def test_gpu_cache_equals_cpu_cache(dtype: str, side_stream: bool) -> None:
    import cupy

    element = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    options: dict[str, Any] = {"num_pages": 40, "page_size": 16, "dtype": dtype, "max_requests": 8}
    host, device = PagedKVCache(**options), PagedKVCache(**options, device="cuda")
    rng = np.random.default_rng(14)
    stream = cupy.cuda.Stream(non_blocking=True) if side_stream else cupy.cuda.Stream.null

    def append(requests: list[int], counts: list[int] | None, num_tokens: int) -> None:
        rows = random_rows(rng, num_tokens, sum(GPU_WIDTHS), element)
        for cache, array in ((host, rows), (device, to_device(rows))):
            cache.append(requests, array, counts)

    with stream:
        for cache in (host, device):
            assert [cache.allocate(), cache.allocate()] == [0, 1]
        append([0, 1], [37, 16], 53)
        for cache in (host, device):
            assert [cache.fork(0), cache.fork(0, 20), cache.fork(1)] == [2, 3, 4]
        append([4, 3, 2, 0], None, 4)
        append([0, 2], [30, 1], 31)
        for cache in (host, device):
            cache.free(1)
            cache.truncate(0, 33)
        append([0, 3], None, 4)
        lengths, table = device.cache_seqlens(), device.block_table()
        out = cupy.full_like(table, -1)
        device.block_table(out=out)
        stream.synchronize()
        np.testing.assert_array_equal(to_host(lengths), host.cache_seqlens())
        np.testing.assert_array_equal(to_host(table), host.block_table())
        np.testing.assert_array_equal(to_host(out), host.block_table())
        pages = to_host(device.kv_cache)
    for length, row in zip(host.cache_seqlens(), host.block_table(), strict=True):
        for position in range(length):
            page, offset = row[position // 16], position % 16
            expected = host.kv_cache[page, offset].view(np.uint16)
            np.testing.assert_array_equal(pages[page, offset].view(np.uint16), expected)


@pytest.mark.gpu
def test_gpu_torch_rows() -> None:
    torch = pytest.importorskip("torch")
    cache = PagedKVCache(num_pages=4, device="cuda")
    request = cache.allocate()
    rows = torch.randn(70, sum(GPU_WIDTHS), dtype=torch.bfloat16, device="cuda")
    cache.append([request], (rows[:, : GPU_WIDTHS[0]], rows[:, GPU_WIDTHS[0] :]))
    lengths = torch.zeros(1, dtype=torch.int32, device="cuda")
    cache.cache_seqlens(out=lengths, stream=torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    assert lengths.tolist() == [70]
    expected = rows.view(torch.int16).cpu().numpy().view(np.uint16)
    got = to_host(cache.kv_cache).view(np.uint16).reshape(-1, sum(GPU_WIDTHS))[:70]
    np.testing.assert_array_equal(got, expected)
