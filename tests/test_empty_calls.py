"""No request, or no query token: an idle data-parallel rank calls all the same, and gets empty results."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fake_gpu import FakeGpu, fake_gpu

import cupy_mla
from cupy_mla import flash_mla
from cupy_mla.cli import main
from cupy_mla.errors import InvalidArgumentError
from cupy_mla.parallel import local_lengths

HEADS, PAGE_SIZE, PAGES, COLUMNS, TOPK = 16, 64, 3, 2, 8
Make = Callable[..., Any]
SHAPES = pytest.mark.parametrize(("batch", "seqlen_q"), [(0, 1), (0, 3), (0, 0), (2, 0)])


def numpy_array(shape: tuple[int, ...], dtype: str = "float16") -> np.ndarray:
    return np.zeros(shape, dtype)


def torch_array(shape: tuple[int, ...], dtype: str = "float16") -> Any:
    torch = pytest.importorskip("torch")
    return torch.zeros(shape, dtype=getattr(torch, dtype))


def jax_array(shape: tuple[int, ...], dtype: str = "float16") -> Any:
    jax = pytest.importorskip("jax")
    return jax.numpy.zeros(shape, dtype)


MAKERS = pytest.mark.parametrize("make", [numpy_array, torch_array, jax_array])


def dense(make: Make, batch: int, seqlen_q: int, pages: int = PAGES, columns: int = COLUMNS) -> tuple[Any, ...]:
    return (
        make((batch, seqlen_q, HEADS, 576)),
        make((pages, PAGE_SIZE, 1, 576)),
        make((batch, columns), "int32"),
        make((batch,), "int32"),
    )


def sparse(make: Make, batch: int, seqlen_q: int, pages: int = PAGES) -> tuple[Any, ...]:
    shape = (batch, seqlen_q, TOPK)
    return make((batch, seqlen_q, HEADS, 576)), make((pages, PAGE_SIZE, 1, 576)), make(shape, "int32")


def assert_results(results: Any, *shapes: tuple[int, ...]) -> None:
    for result, shape in zip(results, shapes, strict=True):
        assert tuple(result.shape) == shape


@MAKERS
@SHAPES
def test_dense(make: Make, batch: int, seqlen_q: int) -> None:
    shapes = (batch, seqlen_q, HEADS, 512), (batch, HEADS, seqlen_q)
    arrays = dense(make, batch, seqlen_q)
    plan = cupy_mla.plan_decode(*arrays)
    plan.update(arrays[3])
    for results in (
        cupy_mla.mla_decode(*arrays),
        cupy_mla.mla_decode(*arrays, plan=plan, causal=False),
        cupy_mla.mla_decode(*dense(make, batch, seqlen_q, pages=0, columns=0)),
        flash_mla.flash_mla_with_kvcache(*arrays, 512, flash_mla.get_mla_metadata()[0]),
    ):
        assert_results(results, *shapes)


@MAKERS
def test_ragged(make: Make) -> None:
    q, *arrays = dense(make, 0, 1)
    assert_results(cupy_mla.mla_decode(q[:, 0], *arrays, cu_seqlens_q=make((1,), "int32")), (0, HEADS, 512), (HEADS, 0))
    _, *arrays = dense(make, 2, 1)
    no_tokens = make((0, HEADS, 576))
    assert_results(
        cupy_mla.mla_decode(no_tokens, *arrays, cu_seqlens_q=make((3,), "int32")), (0, HEADS, 512), (HEADS, 0)
    )


@MAKERS
@SHAPES
def test_sparse(make: Make, batch: int, seqlen_q: int) -> None:
    shapes = (batch, seqlen_q, HEADS, 512), (batch, HEADS, seqlen_q)
    arrays = sparse(make, batch, seqlen_q)
    lengths = make((batch,), "int32")
    plan = cupy_mla.plan_sparse_decode(*arrays, topk_length=lengths)
    plan.update(lengths)
    for results in (
        cupy_mla.mla_sparse_decode(*arrays, topk_length=lengths, plan=plan),
        cupy_mla.mla_sparse_decode(*arrays),
        cupy_mla.mla_sparse_decode(*sparse(make, batch, seqlen_q, pages=0)),
        flash_mla.flash_mla_with_kvcache(
            *arrays[:2], None, None, 512, flash_mla.get_mla_metadata()[0], indices=arrays[2]
        ),
    ):
        assert_results(results, *shapes)


@MAKERS
@pytest.mark.parametrize("tokens", [0, 3])
def test_prefill(make: Make, tokens: int) -> None:
    arrays = make((0, HEADS, 576)), make((tokens, 1, 576)), make((0, 1, TOPK), "int32")
    shapes = (0, HEADS, 512), (0, HEADS), (0, HEADS)
    assert_results(cupy_mla.mla_sparse_prefill(*arrays), *shapes)
    assert_results(flash_mla.flash_mla_sparse_fwd(*arrays, 0.1), *shapes)


@MAKERS
@SHAPES
def test_merges_and_slots(make: Make, batch: int, seqlen_q: int) -> None:
    outs, lses = make((2, batch, seqlen_q, HEADS, 512)), make((2, batch, HEADS, seqlen_q), "float32")
    assert_results(cupy_mla.merge_states(outs, lses), (batch, seqlen_q, HEADS, 512), (batch, HEADS, seqlen_q))
    tokens = make((batch, seqlen_q, TOPK), "int32")
    for columns in (0, COLUMNS):
        assert_results([cupy_mla.slots_of(tokens, make((batch, columns), "int32"), PAGE_SIZE)], tokens.shape)


@pytest.mark.parametrize("make", [numpy_array, torch_array])
def test_appends(make: Make) -> None:
    cache, rows = make((PAGES, PAGE_SIZE, 1, 576)), make((0, 576))
    cupy_mla.append_tokens(cache, rows, make((0,), "int64"))
    cupy_mla.append_tokens(cache, rows, block_table=make((0, 0), "int32"), positions=make((0,), "int32"))
    paged = cupy_mla.PagedKVCache(num_pages=4, dtype="float16")
    paged.append([], rows)
    request = paged.allocate()
    paged.append([request], rows)
    assert paged.length(request) == 0
    assert paged.block_table([]).shape == (0, 4)
    assert paged.cache_seqlens([]).shape == (0,)


@pytest.mark.parametrize("make", [numpy_array, torch_array])
@pytest.mark.parametrize("pages", [0, PAGES])
def test_copies_and_conversions(make: Make, pages: int) -> None:
    """No page is named, or the cache has none."""
    none, values = make((0,), "int32"), make((0, PAGE_SIZE, 1, 576))
    cache, stored = make((pages, PAGE_SIZE, 1, 576)), make((pages, PAGE_SIZE, 1, 656), "uint8")
    cupy_mla.copy_pages(cache, none, none)
    cupy_mla.copy_pages(values, none, source=cache)
    for convert in (cupy_mla.quantise_cache, cupy_mla.dequantise_cache):
        convert(stored, values, pages=none, layout="fp8_ds_mla")
    cupy_mla.quantise_cache(stored[:0], values, layout="fp8_ds_mla")


@MAKERS
@SHAPES
def test_shards(make: Make, batch: int, seqlen_q: int) -> None:
    arrays = dense(make, batch, seqlen_q)
    assert local_lengths(arrays[3], 2, 0).shape == (batch,)
    of_rank = {"causal": True, "cp_world": 2, "cp_rank": 1, "total_seqlens": make((batch,), "int32")}
    shapes = (batch, seqlen_q, HEADS, 512), (batch, HEADS, seqlen_q)
    assert_results(cupy_mla.mla_decode(*arrays, **of_rank), *shapes)
    assert_results(cupy_mla.mla_decode(*arrays, **of_rank, plan=cupy_mla.plan_decode(*arrays, **of_rank)), *shapes)


@SHAPES
def test_torch_operators(batch: int, seqlen_q: int) -> None:
    torch = pytest.importorskip("torch")
    import cupy_mla.torch_ops  # noqa: F401

    shapes = (batch, seqlen_q, HEADS, 512), (batch, HEADS, seqlen_q)
    ops = torch.ops.cupy_mla
    arrays = dense(torch_array, batch, seqlen_q)
    assert_results(ops.mla_decode(*arrays), *shapes)
    assert_results(ops.mla_decode(*arrays, plan=ops.plan_decode(*arrays)), *shapes)
    arrays = sparse(torch_array, batch, seqlen_q)
    assert_results(ops.mla_sparse_decode(*arrays), *shapes)
    assert_results(ops.mla_sparse_decode(*arrays, plan=ops.plan_sparse_decode(*arrays)), *shapes)


@SHAPES
@pytest.mark.parametrize("jitted", [False, True])
def test_jax_programs(batch: int, seqlen_q: int, jitted: bool) -> None:
    jax = pytest.importorskip("jax")
    from cupy_mla import jax_ops

    in_program = jax.jit if jitted else lambda function: function
    shapes = (batch, seqlen_q, HEADS, 512), (batch, HEADS, seqlen_q)

    def dense_step(*arrays: Any) -> Any:
        return jax_ops.mla_decode(*arrays, plan=jax_ops.plan_decode(*arrays, platform="cpu"), platform="cpu")

    def sparse_step(*arrays: Any) -> Any:
        plan = jax_ops.plan_sparse_decode(*arrays, platform="cpu")
        return jax_ops.mla_sparse_decode(*arrays, plan=plan, platform="cpu")

    assert_results(in_program(dense_step)(*dense(jax_array, batch, seqlen_q)), *shapes)
    assert_results(in_program(sparse_step)(*sparse(jax_array, batch, seqlen_q)), *shapes)
    outs, lses = jax_array((2, batch, seqlen_q, HEADS, 512)), jax_array((2, batch, HEADS, seqlen_q), "float32")
    assert_results(in_program(jax_ops.merge_states)(outs, lses), *shapes)


@SHAPES
def test_nothing_is_launched_on_a_gpu(monkeypatch: pytest.MonkeyPatch, batch: int, seqlen_q: int) -> None:
    gpu: FakeGpu = fake_gpu(monkeypatch)
    arrays = dense(lambda shape, dtype="bfloat16": gpu.array(shape, dtype), batch, seqlen_q)
    out, lse = cupy_mla.mla_decode(*arrays, plan=cupy_mla.plan_decode(*arrays))
    assert (out.shape, lse.shape) == ((batch, seqlen_q, HEADS, 512), (batch, HEADS, seqlen_q))
    assert "no query token" in repr(cupy_mla.plan_decode(*arrays))
    chosen = sparse(lambda shape, dtype="bfloat16": gpu.array(shape, dtype), batch, seqlen_q)
    out, lse = cupy_mla.mla_sparse_decode(*chosen, plan=cupy_mla.plan_sparse_decode(*chosen))
    assert (out.shape, lse.shape) == ((batch, seqlen_q, HEADS, 512), (batch, HEADS, seqlen_q))
    none, values = gpu.array((0,), "int32"), gpu.array((0, PAGE_SIZE, 1, 576))
    cupy_mla.copy_pages(arrays[1], none, none)
    cupy_mla.quantise_cache(gpu.array((PAGES, PAGE_SIZE, 1, 656), "uint8"), values, pages=none)
    assert gpu.take() == []


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({1: (0, PAGE_SIZE, 1, 576)}, "kv_cache"),  # no pages, or no columns, for queries that are there
        ({2: (2, 0)}, "block_table"),
        ({0: (2, 1, 0, 576)}, "q"),
        ({0: (0, 1, HEADS, 576)}, "cache_seqlens"),  # a batch of 0 for lengths of 2
        ({3: (0,)}, "cache_seqlens"),
    ],
)
def test_what_is_missing_is_still_refused(changes: dict[int, tuple[int, ...]], argument: str) -> None:
    arrays = list(dense(numpy_array, 2, 1))
    for place, shape in changes.items():
        arrays[place] = numpy_array(shape, str(arrays[place].dtype))
    with pytest.raises(InvalidArgumentError) as caught:
        cupy_mla.mla_decode(*arrays)
    assert caught.value.argument == argument


def test_a_plan_for_no_request_serves_no_other_call() -> None:
    plan = cupy_mla.plan_decode(*dense(numpy_array, 0, 1))
    with pytest.raises(cupy_mla.PlanMismatchError):
        cupy_mla.mla_decode(*dense(numpy_array, 2, 1), plan=plan)


def test_outputs_that_were_given_come_back() -> None:
    out, lse = numpy_array((0, 1, HEADS, 512)), numpy_array((0, HEADS, 1), "float32")
    results = cupy_mla.mla_decode(*dense(numpy_array, 0, 1), out=out, lse=lse, empty_lse=math.inf)
    assert results[0] is out
    assert results[1] is lse


def test_the_command_takes_a_case_of_no_request(tmp_path: Path) -> None:
    path = tmp_path / "idle.npz"
    names = ("q", "kv_cache", "block_table", "cache_seqlens")
    np.savez(path, **dict(zip(names, dense(numpy_array, 0, 1), strict=True)))
    result = CliRunner().invoke(main, ["decode", "--backend", "numpy", "--input", str(path)])
    assert result.exit_code == 0, result.output
    assert "no requests" in result.output
