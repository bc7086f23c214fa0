"""A cache for all layers on the GPU: a captured decode step, forks, and JAX, each against the cache on the CPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_mla import InvalidArgumentError, PagedKVCache, mla_decode, plan_decode
from cupy_mla.arrays.exchange import as_numpy

from . import gpu_arrays as gpu

LAYERS, PAGES, HEADS = 4, 24, 16
SCALES = [0.01, (0.02, 0.05), 0.03, 0.04]
LAYOUT_NAMES = ["bf16", "fp8_e4m3"]


def make_caches(layout: str, framework: str) -> tuple[PagedKVCache, PagedKVCache]:
    """The same on the CPU and on the GPU."""
    scales = SCALES if layout == "fp8_e4m3" else None
    options: dict[str, Any] = {"num_layers": LAYERS, "layout": layout, "max_pages_per_seq": 8, "kv_scale": scales}
    return PagedKVCache(PAGES, **options), PagedKVCache(PAGES, **options, device="cuda", framework=framework)


def random_values(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)


def assert_same_tokens(host: PagedKVCache, device: PagedKVCache, requests: list[int]) -> None:
    """Bit for bit, of every layer, read through the block tables."""
    for request in requests:
        found = []
        for cache in (host, device):
            pages = np.ascontiguousarray(as_numpy(cache.pages)).view(np.uint8)
            table = as_numpy(cache.block_table([request]))[0]
            tokens = pages.reshape(LAYERS, PAGES, cache.page_size, -1)[:, table]
            found.append(tokens.reshape(LAYERS, -1, tokens.shape[-1])[:, : cache.length(request)])
        np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_a_captured_step_of_all_layers(layout: str) -> None:
    host, device = make_caches(layout, "torch" if gpu.torch is not None else "cupy")
    prompts = random_values(0, LAYERS, 150, 576)
    for cache, rows in ((host, prompts), (device, gpu.upload(prompts))):
        first = cache.allocate()
        cache.append([first], rows)
        assert (cache.fork(first), cache.fork(first, 100)) == (1, 2)
    requests = [0, 1, 2]
    steps = host.step(requests), device.step(requests)
    new, q = gpu.upload(random_values(1, LAYERS, 3, 576)), gpu.upload(random_values(2, LAYERS, 3, 1, HEADS, 576))
    outs = gpu.empty((LAYERS, 3, 1, HEADS, 512), "bfloat16")
    lses = gpu.empty((LAYERS, 3, HEADS, 1), "float32")
    shared = steps[1].block_table, steps[1].cache_seqlens
    plan = plan_decode(q[0], device.layers[0], *shared, kv_scale=device.kv_scales[0])

    def decode() -> None:
        plan.update(steps[1].cache_seqlens)
        for layer, pages in enumerate(device.layers):
            steps[1].append(layer, new[layer])
            options = {"out": outs[layer], "lse": lses[layer], "kv_scale": device.kv_scales[layer]}
            mla_decode(q[layer], pages, *shared, plan=plan, **options)

    replay = gpu.capture(decode)
    for number in range(70):  # past the end of a page
        if number:
            for step in steps:
                step.advance()
        rows = random_values(10 + number, LAYERS, 3, 576)
        gpu.assign(new, gpu.upload(rows))
        replay()
        for layer in range(LAYERS):
            steps[0].append(layer, rows[layer])
        if number in (0, 1, 69):
            for layer, pages in enumerate(host.layers):
                queries = np.asarray(random_values(2, LAYERS, 3, 1, HEADS, 576)[layer])
                table, lengths = steps[0].block_table, steps[0].cache_seqlens
                expected, _ = mla_decode(queries, pages, table, lengths, kv_scale=host.kv_scales[layer])
                got, want = gpu.download(outs[layer]), np.asarray(expected, np.float64)
                assert np.linalg.norm(got - want) < 5e-3 * np.linalg.norm(want)
    assert_same_tokens(host, device, requests)


def test_bookkeeping_is_refused_inside_a_capture() -> None:
    _, device = make_caches("bf16", "cupy")
    import cupy

    step = device.step([device.allocate()])
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(InvalidArgumentError, match="stream: "):
                step.advance()
        finally:
            stream.end_capture()


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_steps_in_jax(layout: str) -> None:
    import jax

    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU here")
    host, device = make_caches(layout, "jax")
    prompts = random_values(3, LAYERS, 90, 576)
    for cache, rows in ((host, prompts), (device, jax.numpy.asarray(prompts))):
        cache.append([cache.allocate()], rows)
        cache.fork(0)
        step = cache.step([0, 1])
        for number in range(3):
            if number:
                step.advance()
            new = random_values(4 + number, LAYERS, 2, 576)
            for layer in range(LAYERS):
                step.append(layer, new[layer] if cache is host else jax.numpy.asarray(new[layer]))
    assert_same_tokens(host, device, [0, 1])
