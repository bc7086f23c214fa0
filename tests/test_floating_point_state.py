"""What ``numpy.seterr`` asks for about overflow, underflow, invalid values and divisions by zero changes no result and
raises nothing: it is the caller's state, for the caller's arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cases_dense import DTYPES

import cupy_mla
from cupy_mla import flash_mla
from cupy_mla.arrays.dtypes import dtype_of_numpy
from cupy_mla.layouts import DENSE_LAYOUTS, LAYOUTS

BATCH, SEQLEN_Q, HEADS, PAGE_SIZE = 3, 2, 4, 16
MAGNITUDES = (1e-38, 1e-6, 1.0, 30.0, 3e4, 1e38)
WRITTEN = [name for name in LAYOUTS if not name.startswith("fp4")]  # the others by `quantise` alone
SINKS = np.array([np.inf, -np.inf, -1e4, 1e4], np.float32)
Call = Callable[[], Any]


def values(rng: np.random.Generator, dtype: str, magnitude: float, *shape: int) -> np.ndarray:
    with np.errstate(all="ignore"):
        return (rng.standard_normal(shape) * magnitude).astype(DTYPES.get(dtype, np.float32))


def attention_calls(dtype: str, magnitude: float) -> Iterator[tuple[str, Call]]:
    rng = np.random.default_rng(1)
    q = values(rng, dtype, magnitude, BATCH, SEQLEN_Q, HEADS, 576)
    cache = values(rng, dtype, magnitude, 6, PAGE_SIZE, 1, 576)
    table, lengths = np.arange(6, dtype=np.int32).reshape(BATCH, 2), np.array([32, 3, 0], np.int32)
    dense = q, cache, table, lengths
    yield "mla_decode", lambda: cupy_mla.mla_decode(*dense, causal=True)
    yield "with a plan", lambda: cupy_mla.mla_decode(*dense, plan=cupy_mla.plan_decode(*dense))
    yield "flash_mla", lambda: flash_mla.flash_mla_with_kvcache(
        *(q, cache, table, lengths, 512, *flash_mla.get_mla_metadata(lengths, SEQLEN_Q * HEADS, 1))
    )
    indices = rng.integers(-1, 6 * PAGE_SIZE + 1, (BATCH, SEQLEN_Q, 20), dtype=np.int32)
    yield "mla_sparse_decode", lambda: cupy_mla.mla_sparse_decode(q, cache, indices, attn_sink=SINKS)
    tokens = cache.reshape(-1, 1, 576)
    yield "mla_sparse_prefill", lambda: cupy_mla.mla_sparse_prefill(q[:, 0], tokens, indices[:, :1], attn_sink=SINKS)


def state_calls(dtype: str, magnitude: float) -> Iterator[tuple[str, Call]]:
    rng = np.random.default_rng(2)
    outs = values(rng, dtype, magnitude, 3, BATCH, SEQLEN_Q, HEADS, 64)
    lses = values(rng, "float32", magnitude, 3, BATCH, HEADS, SEQLEN_Q)
    lses[0, 0], lses[1, 0], lses[:, 1, 1] = -np.inf, np.inf, -np.inf
    yield "merge_states", lambda: cupy_mla.merge_states(outs, lses)
    yield "lists", lambda: cupy_mla.merge_states(list(outs), list(lses))


def layout_calls(name: str, magnitude: float) -> Iterator[tuple[str, Call]]:
    rng, layout = np.random.default_rng(3), LAYOUTS[name]
    scale = 0.5 if layout.needs_scale else None
    width = layout.latent_dim + layout.rope_dim if hasattr(layout, "latent_dim") else 576
    exact = values(rng, "float32", magnitude, 2, PAGE_SIZE, 1, width)
    exact[0, 0], exact[0, 1, 0, 5], exact[0, 2, 0, 5] = 0, np.inf, np.nan
    yield "quantise", lambda: layout.quantise(exact, scale)
    with np.errstate(all="ignore"):
        stored = layout.quantise(exact, scale)
    yield "dequantise", lambda: layout.dequantise(stored, scale)
    slots = np.arange(PAGE_SIZE)
    yield "dequantise_tokens", lambda: layout.dequantise_tokens(stored, slots, 0, scale)


def bits(result: Any) -> list[bytes]:
    return [np.ascontiguousarray(part).tobytes() for part in (result if isinstance(result, tuple) else (result,))]


def check(calls: Iterator[tuple[str, Call]]) -> None:
    for name, call in calls:
        with np.errstate(all="ignore"):
            expected = bits(call())
        with np.errstate(all="raise"):
            try:
                assert bits(call()) == expected, name
            except FloatingPointError as error:
                pytest.fail(f"{name}: {error}")


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("dtype", DENSE_LAYOUTS)
def test_attention(dtype: str, magnitude: float) -> None:
    check(attention_calls(dtype, magnitude))


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("dtype", [*DENSE_LAYOUTS, "float32"])
def test_merges(dtype: str, magnitude: float) -> None:
    check(state_calls(dtype, magnitude))


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, magnitude: float) -> None:
    check(layout_calls(name, magnitude))


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("name", WRITTEN)
def test_appended_tokens(name: str, magnitude: float) -> None:
    layout = LAYOUTS[name]
    rng = np.random.default_rng(4)
    width = layout.latent_dim + layout.rope_dim if hasattr(layout, "latent_dim") else 576
    with np.errstate(all="ignore"):
        empty = layout.quantise(np.zeros((2, PAGE_SIZE, 1, width), np.float32), 0.5 if layout.needs_scale else None)
    stored = dtype_of_numpy(empty.dtype, "cache")
    tokens = values(rng, stored if layout in DENSE_LAYOUTS.values() else "bfloat16", magnitude, 4, 1, width)
    options = {} if layout in DENSE_LAYOUTS.values() else {"layout": name}
    options |= {"kv_scale": 0.5} if layout.needs_scale else {}

    def append() -> Any:
        cache = layout.with_page_starts(empty.copy())
        cupy_mla.append_tokens(cache, tokens, np.arange(4, dtype=np.int64), **options)
        return cache

    check(iter([("append_tokens", append)]))
