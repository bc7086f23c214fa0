"""CUDA graphs that CuPy captures: what a captured call allocates is its graph's, whatever is allocated afterwards."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases_dense import DTYPES, DenseCase, exact_decode
from cases_sparse import SparseCase, exact_sparse

import cupy_mla
from cupy_mla.arrays import capture
from cupy_mla.errors import InvalidArgumentError

cupy = pytest.importorskip("cupy")
CANARY = 0xA5
CASE = DenseCase(lengths=(3000, 70, 1), num_heads_q=16, seqlens_q=1)
SPARSE = SparseCase(batch=3, topk=900, num_pages=90, lengths="request")


class Graph:
    """What ``work`` launches, captured after one run of it. Of what it made, only what it returns is held."""

    def __init__(self, work: Callable[[], Any], warm: bool = True) -> None:
        self.stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        with self.stream:
            if warm:
                work()
                self.stream.synchronize()
            self.stream.begin_capture()
            try:
                self.results = work()
            finally:
                self.graph = self.stream.end_capture()

    def replay(self) -> None:
        cupy.cuda.Device().synchronize()
        self.graph.launch(self.stream)
        self.stream.synchronize()


def fill_pool() -> list[Any]:
    """Take what lies free in CuPy's pool and more, and write a canary to it."""
    gc.collect()
    blocks = []
    for size in [512 << shift for shift in range(16)] * 4:
        block = cupy.empty(size, np.uint8)
        block.fill(CANARY)
        blocks.append(block)
    free = cupy.get_default_memory_pool().free_bytes()
    while free >= 512 and len(blocks) < 500:
        blocks.append(cupy.full(min(free, 1 << 22), CANARY, np.uint8))
        free = cupy.get_default_memory_pool().free_bytes()
    cupy.cuda.Device().synchronize()
    return blocks


def assert_untouched(blocks: list[Any]) -> None:
    for block in blocks:
        assert bool((block == CANARY).all())


def as_cupy(array: np.ndarray) -> Any:
    words = cupy.asarray(np.ascontiguousarray(array).view(f"u{array.itemsize}"))
    return words.view(array.dtype)


def download(array: Any) -> np.ndarray:
    return cupy.asnumpy(array.view(f"u{array.dtype.itemsize}")).view(array.dtype)


def dense_inputs() -> tuple[list[Any], np.ndarray, np.ndarray]:
    host = CASE.build()
    exact_out, exact_lse = exact_decode(CASE, host)
    return [as_cupy(array) for array in host.tensors], exact_out, exact_lse


def check(out: Any, exact: np.ndarray, bound: float = 3e-3) -> None:
    got = download(out).astype(np.float64)
    assert np.linalg.norm(got - exact) <= bound * np.linalg.norm(exact)


@pytest.mark.parametrize("planned", [False, True])
def test_dense(planned: bool) -> None:
    arrays, exact, _ = dense_inputs()

    def work() -> Any:
        plan = cupy_mla.plan_decode(*arrays, fixed_split_tokens=128) if planned else None
        return cupy_mla.mla_decode(*arrays, plan=plan)[0]  # lse, plan and workspace are nobody's

    graph = Graph(work)
    blocks = fill_pool()
    for _ in range(3):
        graph.results.view(np.uint16).fill(0)
        graph.replay()
        check(graph.results, exact)
    assert_untouched(blocks)


def test_outputs_that_nobody_holds() -> None:
    arrays, _, _ = dense_inputs()
    graph = Graph(lambda: cupy_mla.mla_decode(*arrays) and None)
    blocks = fill_pool()
    graph.replay()
    assert_untouched(blocks)


def test_several_calls_and_operations_in_one_graph() -> None:
    arrays, exact, exact_lse = dense_inputs()
    sparse = SPARSE.build()
    q, kv, indices, lengths = map(as_cupy, (sparse.q, sparse.kv, sparse.indices, sparse.lengths))
    sparse_exact = exact_sparse(sparse)
    table, tokens = arrays[2], cupy.zeros((len(CASE.lengths), 1, 40), np.int32)

    def work() -> tuple[Any, ...]:
        out, lse = cupy_mla.mla_decode(*arrays)
        other, _ = cupy_mla.mla_decode(*arrays, empty_lse=math.inf)
        merged, merged_lse = cupy_mla.merge_states([out, other], [lse, lse])
        chosen, _ = cupy_mla.mla_sparse_decode(q, kv, indices, topk_length=lengths)
        filled, _, _ = cupy_mla.mla_sparse_prefill(q[:, 0], kv, indices[:, 0])
        return merged, merged_lse, chosen, cupy_mla.slots_of(tokens, table, CASE.page_size), filled

    graph = Graph(work)
    first = [download(result) for result in graph.results]
    blocks = fill_pool()
    for _ in range(3):
        graph.replay()
        check(graph.results[0], exact)
        np.testing.assert_allclose(download(graph.results[1]), exact_lse + np.log(2), rtol=1e-5, atol=1e-5)
        check(graph.results[2], sparse_exact[0])
    assert_untouched(blocks)
    assert len(first) == len(graph.results)


def test_the_first_call_of_a_kind_may_be_captured() -> None:
    """Kernels are compiled and loaded during the capture."""
    case = DenseCase(lengths=(900, 3), num_heads_q=7, dtype="float16")
    host = case.build()
    exact, _ = exact_decode(case, host)
    arrays = [as_cupy(array) for array in host.tensors]
    graph = Graph(lambda: cupy_mla.mla_decode(*arrays)[0], warm=False)
    blocks = fill_pool()
    graph.replay()
    check(graph.results, exact, 1e-3)
    assert_untouched(blocks)


def test_padding_rows_of_a_graph_see_nothing() -> None:
    """An engine captures for a batch and replays for fewer requests: lengths 0, pages -1; lengths change in place."""
    arrays, exact, _ = dense_inputs()
    q, cache, table, lengths = arrays
    graph = Graph(lambda: cupy_mla.mla_decode(q, cache, table, lengths))
    blocks = fill_pool()
    table[1:] = -1
    lengths[1:] = 0
    graph.replay()
    out, lse = (download(result).astype(np.float64) for result in graph.results)
    assert np.linalg.norm(out[0] - exact[0]) <= 3e-3 * np.linalg.norm(exact[0])
    assert not out[1:].any()
    assert np.isneginf(lse[1:]).all()
    assert_untouched(blocks)


def test_memory_is_given_back_with_the_graph() -> None:
    arrays, _, _ = dense_inputs()
    capture.release_kept()
    before = len(capture._kept)
    graph = Graph(lambda: cupy_mla.mla_decode(*arrays)[0])
    assert len(capture._kept) > before
    graph.replay()
    del graph
    gc.collect()
    cupy.cuda.Device().synchronize()
    for _ in range(1000):  # CUDA posts it from a thread of its own
        capture.release_kept()
        if len(capture._kept) <= before:
            break
        cupy.cuda.Device().synchronize()
    assert len(capture._kept) <= before


# Tensors of torch, which has memory of its own for a graph that it captures, and not for one of CuPy's --------------


def torch_inputs(torch: Any) -> list[Any]:
    return [torch.from_numpy(array.view(f"i{array.itemsize}")).cuda().view(getattr(torch, str(array.dtype)))
            for array in CASE.build().tensors]  # fmt: skip


def fill_torch(torch: Any) -> list[Any]:
    """Take what lies free in torch's memory and more, and write a canary to it."""
    gc.collect()
    blocks = []
    for size in [512 << shift for shift in range(16)] * 8:
        blocks.append(torch.full((size,), CANARY, dtype=torch.uint8, device="cuda"))
    torch.cuda.synchronize()
    return blocks


@pytest.mark.parametrize("planned", [False, True])
def test_tensors_of_torch(planned: bool) -> None:
    torch = pytest.importorskip("torch")
    arrays, exact = torch_inputs(torch), exact_decode(CASE, CASE.build())[0]
    stream = cupy.cuda.Stream(non_blocking=True)

    def work() -> Any:
        split = {"fixed_split_tokens": 128}
        plan = cupy_mla.plan_decode(*arrays, **split, stream=stream.ptr) if planned else None
        return cupy_mla.mla_decode(*arrays, plan=plan, stream=stream.ptr)[0]

    work()
    cupy.cuda.Device().synchronize()
    stream.begin_capture()
    try:
        result = work()
    finally:
        graph = stream.end_capture()
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):  # where the memory would be free again
        blocks = fill_torch(torch)
    for _ in range(3):
        result.zero_()
        torch.cuda.synchronize()
        graph.launch(stream)
        stream.synchronize()
        got = result.double().cpu().numpy()
        assert np.linalg.norm(got - exact) <= 3e-3 * np.linalg.norm(exact)
    for block in blocks:
        assert bool((block == CANARY).all())


def test_torch_keeps_the_memory_of_its_own_graphs() -> None:
    torch = pytest.importorskip("torch")
    arrays, exact = torch_inputs(torch), exact_decode(CASE, CASE.build())[0]
    cupy_mla.mla_decode(*arrays)
    torch.cuda.synchronize()
    before = len(capture._kept)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = cupy_mla.mla_decode(*arrays)[0]
    assert len(capture._kept) <= before
    blocks = fill_torch(torch)
    graph.replay()
    torch.cuda.synchronize()
    assert np.linalg.norm(result.double().cpu().numpy() - exact) <= 3e-3 * np.linalg.norm(exact)
    for block in blocks:
        assert bool((block == CANARY).all())


def test_what_cannot_be_captured_is_refused() -> None:
    arrays, _, _ = dense_inputs()
    paged = cupy_mla.PagedKVCache(num_pages=4, device="cuda")
    request = paged.allocate()
    rows = cupy.zeros((3, 576), np.uint16).view(DTYPES["bfloat16"])
    stored, values = cupy.zeros((2, 64, 1, 656), np.uint8), cupy.zeros((2, 64, 1, 576), np.float16)
    pages = cupy.arange(2, dtype=np.int32)
    refusals = []

    def work() -> None:
        for attempt in (
            lambda: paged.append([request], rows),
            lambda: paged.block_table([request]),
            lambda: cupy_mla.mla_decode(*arrays, validate=True),
            lambda: cupy_mla.copy_pages(values, pages, pages, validate=True),
            lambda: cupy_mla.quantise_cache(stored, values, pages=pages, validate=True),
        ):
            with pytest.raises(InvalidArgumentError) as caught:
                attempt()
            refusals.append(caught.value)

    Graph(work, warm=False).replay()
    assert [refusal.argument for refusal in refusals] == ["stream", "stream", *["validate"] * 3]
    assert paged.length(request) == 0
