"""PagedKVCache against a dictionary of token lists."""

from __future__ import annotations

import pickle
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from test_cache_ops import GPU_WIDTHS, LATENT, ROPE, WIDTH, to_device, to_host

from cupy_mla.cache.allocator import OutOfPagesError, OutOfRequestsError
from cupy_mla.cache.paged import PagedKVCache
from cupy_mla.errors import InvalidArgumentError, MlaError
from cupy_mla.layouts import BF16


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
        references = self.cache._allocator.references.tolist()
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
        return lengths.tolist(), tables, sorted(cache._allocator.free_pages), cache._allocator.references.tolist()

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
        ("layout", "fp8"),
        ("framework", "tensorflow"),
        ("framework", "cupy"),  # which has nothing on the CPU
        ("num_layers", 0),
        ("kv_scale", 1.0),  # beside a type that has none
        ("device", "cuda:x"),
        ("device", "cpu:1"),
        ("layout", "fp16"),  # beside the type that is given
        ("device", "tpu"),
    ],
)
def test_a_bad_setting_is_named(argument: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{argument}: "):
        small_cache(**{argument: value})


@pytest.mark.parametrize(("layout", "dtype"), [("fp16", "float16"), (BF16, "bfloat16"), (None, "bfloat16")])
def test_a_layout_says_the_type(layout: Any, dtype: str) -> None:
    cache = PagedKVCache(num_pages=2, page_size=4, layout=layout)
    assert (cache.dtype, cache.kv_cache.dtype.name, cache.layout.dtype) == (dtype, dtype, dtype)
    assert cache.kv_cache.shape == (2, 4, 1, 576)


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


# On the GPU -------------------------------------------------------------------------------------------------------


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
