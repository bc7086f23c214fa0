"""Calls on whole pages in programs that JAX compiles, against the same calls outside."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cupy_mla
from cupy_mla.cache import jax_in_place
from cupy_mla.errors import InvalidArgumentError
from cupy_mla.layouts import FP8_DS_MLA, FP8_E4M3, FP8_V41, CacheLayout

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

from cupy_mla import jax_ops  # noqa: E402

PAGES, PAGE_SIZE = 6, 16
CHOSEN = np.array([4, 1], np.int32)


@pytest.fixture(params=["custom calls", "callbacks"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "custom calls":
        pytest.importorskip("jax_tvm_ffi")
    else:
        monkeypatch.setattr(jax_in_place, "register_calls", lambda call, device: False)


def make_values(pages: int, width: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((pages, PAGE_SIZE, 1, width)).astype(ml_dtypes.bfloat16)


def split(array: Any) -> Any:
    return array[..., :512], array[..., 512:]


def same(found: Any, expected: Any) -> None:
    found = np.concatenate([np.asarray(part) for part in found], -1) if isinstance(found, tuple) else np.asarray(found)
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("parts", [False, True])
def test_copies(parts: bool) -> None:
    cache, other = make_values(PAGES, 576), make_values(PAGES, 576, 1)
    given, source = (jax.tree.map(jnp.asarray, split(array) if parts else array) for array in (cache, other))
    moved, copied = cache.copy(), cache.copy()
    cupy_mla.copy_pages(moved, CHOSEN, CHOSEN + 1)
    cupy_mla.copy_pages(copied, CHOSEN, CHOSEN + 1, source=other)
    same(jax.jit(jax_ops.copy_pages, donate_argnums=0)(jax.tree.map(jnp.copy, given), CHOSEN, CHOSEN + 1), moved)
    same(jax_ops.copy_pages(given, CHOSEN, CHOSEN + 1), moved)
    program = jax.jit(lambda cache, source: jax_ops.copy_pages(cache, CHOSEN, CHOSEN + 1, source=source))
    same(program(given, source), copied)
    gather = jax.jit(lambda target, source: jax_ops.copy_pages(target, CHOSEN, source=source))
    same(gather(jax.tree.map(lambda array: jnp.zeros_like(array[:2]), given), source), other[CHOSEN])
    same(given, cache)


@pytest.mark.parametrize("layout", [FP8_E4M3, FP8_DS_MLA, FP8_V41], ids=lambda layout: layout.name)
@pytest.mark.parametrize("chosen", [False, True])
def test_conversions(layout: CacheLayout, chosen: bool) -> None:
    width = 576 if layout.supports(512, 64) else 512
    pages, scale = CHOSEN if chosen else None, 0.02 if layout.needs_scale else None
    stored, values = layout.quantise(np.ones((PAGES, PAGE_SIZE, 1, width)), scale), make_values(PAGES, width)
    values = values[: CHOSEN.size] if chosen else values
    expected, back = stored.copy(), np.zeros_like(values)
    cupy_mla.quantise_cache(expected, values, pages=pages, kv_scale=scale, layout=layout)
    cupy_mla.dequantise_cache(expected, back, pages=pages, kv_scale=scale, layout=layout)

    def there_and_back(cache: Any, values: Any, zeros: Any, scale: Any) -> Any:
        cache = jax_ops.quantise_cache(cache, values, pages=pages, kv_scale=scale, layout=layout.name)
        return cache, jax_ops.dequantise_cache(cache, zeros, pages=pages, kv_scale=scale, layout=layout)

    arrays = jnp.asarray(stored), jnp.asarray(values), jnp.zeros_like(values)
    for function in (there_and_back, jax.jit(there_and_back)):
        found, read = function(*arrays, scale)
        same(found, expected)
        same(read, back)
    same(arrays[0], stored)


def test_what_is_wrong_is_said_while_tracing() -> None:
    cache = jnp.zeros((PAGES, PAGE_SIZE, 1, 528), jnp.uint8)
    values = jnp.zeros((PAGES, PAGE_SIZE, 1, 512), jnp.bfloat16)
    for function, arguments, named, argument in (
        (jax_ops.copy_pages, (cache, CHOSEN), {}, "target_pages"),
        (jax_ops.copy_pages, (cache, CHOSEN, CHOSEN), {"source": values}, "source"),
        (jax_ops.quantise_cache, (cache, values), {}, "layout"),
        (jax_ops.dequantise_cache, (cache, values[:2]), {"layout": "fp8_v41"}, "values"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            jax.eval_shape(lambda *given, call=function, named=named: call(*given, **named), *arguments)
        assert caught.value.argument == argument


def test_what_validation_finds_is_raised_when_the_program_runs() -> None:
    cache = jnp.zeros((PAGES, PAGE_SIZE, 1, 528), jnp.uint8)
    program = jax.jit(lambda cache, pages: jax_ops.copy_pages(cache, pages, pages, validate=True))
    with pytest.raises(Exception, match=r"source_pages\[1\]|target_pages\[1\]"):
        jax.block_until_ready(program(cache, np.array([0, PAGES], np.int32)))
