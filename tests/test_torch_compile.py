"""The package's functions inside programs that torch.compile traces: operators, or a quiet end of the graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import cupy_mla  # noqa: E402
from cupy_mla import flash_mla  # noqa: E402
from cupy_mla.parallel import local_slots  # noqa: E402

HEADS, PAGES, PAGE_SIZE = 4, 6, 16
BATCH = 2


def make_dense() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(BATCH, 1, HEADS, 576, generator=generator).to(torch.bfloat16)
    cache = torch.randn(PAGES, PAGE_SIZE, 1, 576, generator=generator).to(torch.bfloat16)
    table = torch.arange(PAGES, dtype=torch.int32).view(BATCH, -1)
    return q, cache, table, torch.tensor([40, 3], dtype=torch.int32)


DENSE = make_dense()
SPARSE = (*DENSE[:2], torch.arange(BATCH * 20, dtype=torch.int32).view(BATCH, 1, 20) - 3)
PREFILL = (SPARSE[0][:, 0], SPARSE[1].flatten(0, 1), SPARSE[2])
SLOTS, POSITIONS = torch.tensor([3, 70]), torch.tensor([1, 5], dtype=torch.int32)


def pair(array: Any) -> tuple[Any, Any]:
    return array[..., :512].contiguous(), array[..., 512:].contiguous()


def run_append(*, by_table: bool) -> Any:
    cache = torch.zeros(PAGES, PAGE_SIZE, 1, 576, dtype=torch.bfloat16)
    rows = DENSE[0][:, 0, :1]
    if by_table:
        places = {"block_table": DENSE[2], "positions": POSITIONS}
        cupy_mla.append_tokens(cache, rows, **places)
    else:
        cupy_mla.append_tokens(cache, rows, SLOTS)
    return (cache,)


def run_pages() -> Any:
    """All three calls on pages: quantised, copied, and some of them read again."""
    cache = torch.zeros(PAGES, PAGE_SIZE, 1, 656, dtype=torch.uint8)
    cupy_mla.quantise_cache(cache, pair(DENSE[1]), layout="fp8_ds_mla")
    cupy_mla.copy_pages(cache, DENSE[2][0, :1], DENSE[2][0, 1:2])
    values = torch.zeros_like(DENSE[1][:2])
    cupy_mla.dequantise_cache(cache, values, pages=DENSE[2][0, :2].contiguous())
    return cache, values


def with_outputs(arrays: tuple[Any, ...]) -> Any:
    out, lse = torch.empty(BATCH, 1, HEADS, 512, dtype=torch.bfloat16), torch.empty(BATCH, HEADS, 1)
    return cupy_mla.mla_decode(*arrays, out=out, lse=lse)


def chosen_into_outputs() -> Any:
    rows = PREFILL[0].shape[:2]
    out, max_logits, lse = torch.empty(*rows, 512, dtype=torch.bfloat16), torch.empty(rows), torch.empty(rows)
    return cupy_mla.mla_sparse_prefill(*PREFILL, out=out, max_logits=max_logits, lse=lse)


def quantised(layout: Any, stored: Any, **scale: float) -> Any:
    cache = torch.zeros(PAGES, PAGE_SIZE, 1, 656 if stored is torch.uint8 else 576, dtype=stored)
    rows = DENSE[1].flatten(0, 1)
    cupy_mla.append_tokens(cache, rows, torch.arange(len(rows)), layout=layout, **scale)
    return cache


FP8_DS_MLA = quantised("fp8_ds_mla", torch.uint8)
FP8_E4M3 = quantised("fp8_e4m3", torch.float8_e4m3fn, kv_scale=0.1)


def merged(arrays: tuple[Any, ...], *, listed: bool) -> Any:
    out, lse = cupy_mla.mla_decode(*arrays)
    outs, lses = [out, out * 2], [lse, lse + 1]
    return cupy_mla.merge_states(outs, lses) if listed else cupy_mla.merge_states(torch.stack(outs), torch.stack(lses))


DENSE_META, CAUSAL_META, SPARSE_META, EXTRA_META = (flash_mla.get_mla_metadata()[0] for _ in range(4))
# Each becomes one graph: (name, function of no arguments).
IN_GRAPHS: list[tuple[str, Callable[[], Any]]] = [
    ("mla_decode", lambda: cupy_mla.mla_decode(*DENSE, causal=True, softmax_scale=0.1)),
    ("of pairs", lambda: cupy_mla.mla_decode(*map(pair, DENSE[:2]), *DENSE[2:])),
    ("into outputs", lambda: with_outputs(DENSE)),
    ("merge_states", lambda: merged(DENSE, listed=False)),
    ("merge_states of lists", lambda: merged(DENSE, listed=True)),
    ("mla_sparse_decode", lambda: cupy_mla.mla_sparse_decode(*SPARSE)),
    (
        "mla_sparse_decode, the layout named",
        lambda: cupy_mla.mla_sparse_decode(SPARSE[0], FP8_DS_MLA, SPARSE[2], layout="fp8_ds_mla", head_dim_v=512),
    ),
    ("mla_sparse_prefill into outputs", chosen_into_outputs),
    ("of an FP8 cache", lambda: cupy_mla.mla_decode(DENSE[0], FP8_E4M3, *DENSE[2:], kv_scale=torch.tensor(0.1))),
    (
        "of an FP8 cache, the layout named",
        lambda: cupy_mla.mla_decode(DENSE[0], FP8_DS_MLA, *DENSE[2:], layout="fp8_ds_mla"),
    ),
    (
        "of an FP8 cache of two scales",
        lambda: cupy_mla.mla_decode(DENSE[0], pair(FP8_E4M3), *DENSE[2:], kv_scale=torch.tensor([0.1, 0.2])),
    ),
    ("mla_sparse_prefill", lambda: cupy_mla.mla_sparse_prefill(*PREFILL)),
    ("slots_of", lambda: (cupy_mla.slots_of(SPARSE[2], DENSE[2], PAGE_SIZE),)),
    ("local_slots", lambda: local_slots(SPARSE[2], DENSE[2], PAGE_SIZE, cp_world=2, cp_rank=1)),
    ("append_tokens", lambda: run_append(by_table=False)),
    ("append_tokens by table", lambda: run_append(by_table=True)),
    ("pages", run_pages),
    ("FlashMLA", lambda: flash_mla.flash_mla_with_kvcache(*DENSE, 512, DENSE_META)),
    ("FlashMLA, causal", lambda: flash_mla.flash_mla_with_kvcache(*DENSE, 512, CAUSAL_META, None, 0.1, True)),
    (
        "FlashMLA, sparse",
        lambda: flash_mla.flash_mla_with_kvcache(*SPARSE[:2], None, None, 512, SPARSE_META, indices=SPARSE[2]),
    ),
    ("two caches", lambda: cupy_mla.mla_sparse_decode(*SPARSE, extra_kv_cache=SPARSE[1], extra_indices=SPARSE[2])),
    (
        "FlashMLA, two caches",
        lambda: flash_mla.flash_mla_with_kvcache(
            *SPARSE[:2],
            *(None, None, 512, EXTRA_META),
            indices=SPARSE[2],
            extra_k_cache=SPARSE[1],
            extra_indices_in_kvcache=SPARSE[2],
        ),
    ),
    (
        "FlashMLA, prefill",
        lambda: flash_mla.flash_mla_sparse_fwd(*PREFILL[:2], PREFILL[2][:, None, 0], 0.05, return_log2_lse=True),
    ),
]


def planned() -> Any:
    arrays = DENSE
    return cupy_mla.mla_decode(*arrays, plan=cupy_mla.plan_decode(*arrays))


def planned_sparse() -> Any:
    arrays = SPARSE
    return cupy_mla.mla_sparse_decode(*arrays, plan=cupy_mla.plan_sparse_decode(*arrays))


def one_output() -> Any:
    return cupy_mla.mla_decode(*DENSE, out=torch.empty(BATCH, 1, HEADS, 512, dtype=torch.bfloat16))


# Each ends the graph.
BETWEEN_GRAPHS: list[tuple[str, Callable[[], Any]]] = [
    ("plans", planned),
    ("sparse plans", planned_sparse),
    ("one output", one_output),
    ("a scale as a number", lambda: cupy_mla.mla_decode(DENSE[0], FP8_E4M3, *DENSE[2:], kv_scale=0.1)),
    ("two scales as numbers", lambda: cupy_mla.mla_decode(DENSE[0], FP8_E4M3, *DENSE[2:], kv_scale=(0.1, 0.2))),
    (
        "a layout as an object",
        lambda: (quantised(cupy_mla.layouts.FP8_DS_MLA, torch.uint8),),
    ),
    (
        "FlashMLA into an output",
        lambda: flash_mla.flash_mla_with_kvcache(
            *DENSE, 512, flash_mla.get_mla_metadata()[0], out=torch.empty(BATCH, 1, HEADS, 512, dtype=torch.bfloat16)
        ),
    ),
]


def assert_same(results: Any, expected: Any) -> None:
    for got, wanted in zip(results, expected, strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_array_equal(got.float().numpy(), wanted.float().numpy())


def compiled(function: Callable[[], Any], **options: Any) -> Any:
    """The results of a compiled program that does more before and after; it must not warn."""

    def program(one: Any) -> Any:
        scaled = [result * one for result in function()]
        return tuple(result.clone() for result in scaled)

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return torch.compile(program, backend="aot_eager", **options)(torch.ones(()))


@pytest.mark.parametrize("function", [function for _, function in IN_GRAPHS], ids=[name for name, _ in IN_GRAPHS])
def test_operators_are_in_one_graph(function: Callable[[], Any]) -> None:
    assert_same(compiled(function, fullgraph=True), function())


@pytest.mark.parametrize("function", [f for _, f in BETWEEN_GRAPHS], ids=[name for name, _ in BETWEEN_GRAPHS])
def test_what_no_operator_takes_ends_the_graph(function: Callable[[], Any], capfd: pytest.CaptureFixture[str]) -> None:
    assert_same(compiled(function), function())
    assert capfd.readouterr().err == ""


def test_errors_are_ours() -> None:
    def program() -> Any:
        q, *others = DENSE
        return cupy_mla.mla_decode(q.to(torch.float32), *others)

    torch._dynamo.reset()
    with pytest.raises(cupy_mla.InvalidArgumentError, match="q: expected"):
        torch.compile(program, backend="aot_eager")()


@pytest.mark.parametrize(
    "call",
    [
        lambda: cupy_mla.mla_decode(*DENSE, scale=1.0),
        lambda: cupy_mla.mla_decode(*DENSE[:3]),
        lambda: cupy_mla.mla_decode(*DENSE, 512),
        lambda: cupy_mla.mla_decode(*DENSE, q=DENSE[0]),
    ],
    ids=["unknown", "missing", "too many", "twice"],
)
def test_arguments_that_the_function_does_not_take_are_its_own_error(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"mla_decode\(\)"):
        call()
    torch._dynamo.reset()
    with pytest.raises(TypeError, match=r"mla_decode\(\)"):
        torch.compile(call, backend="aot_eager")()


def test_every_function_that_takes_tensors_has_a_stand_in() -> None:
    without_tensors = {"is_supported"}
    functions = [getattr(cupy_mla, name) for name in {*cupy_mla.__all__} - without_tensors if not name[0].isupper()]
    functions += [flash_mla.get_mla_metadata, flash_mla.flash_mla_with_kvcache, flash_mla.flash_mla_sparse_fwd]
    assert all(hasattr(function, "_torchdynamo_inline") for function in functions)
