"""PagedKVCache for all layers of a model: every framework and layout, steps, forks, and what compiles them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_mla import OutOfPagesError, PagedKVCache, mla_decode
from cupy_mla.arrays.exchange import as_numpy
from cupy_mla.errors import InvalidArgumentError
from cupy_mla.layouts import FP8_DS_MLA, FP8_E4M3, FP8_MODEL1, LAYOUTS, CacheLayout

LAYERS, PAGES, PAGE_SIZE = 3, 12, 16
SCALES = [0.01, (0.02, 0.05), 0.03]
FRAMEWORKS = ["numpy", "torch", "jax"]
WRITTEN = list(LAYOUTS.values())
layouts = pytest.mark.parametrize("layout", WRITTEN, ids=[layout.name for layout in WRITTEN])
frameworks = pytest.mark.parametrize("framework", FRAMEWORKS)


def rope_of(layout: CacheLayout) -> int:
    return 64 if layout.supports(512, 64) else 0


def make_cache(framework: str, layout: CacheLayout, **changes: Any) -> PagedKVCache:
    if framework != "numpy":
        pytest.importorskip(framework)
    options: dict[str, Any] = {
        "num_pages": PAGES,
        "page_size": PAGE_SIZE,
        "rope_dim": rope_of(layout),
        "max_pages_per_seq": 4,
        "num_layers": LAYERS,
        "layout": layout,
        "framework": framework,
        "kv_scale": SCALES if layout.needs_scale else None,
    }
    return PagedKVCache(**(options | changes))


def of_framework(framework: str, rows: Any) -> Any:
    if framework == "torch":
        torch = pytest.importorskip("torch")
        return torch.from_numpy(rows.view(np.int16)).view(getattr(torch, rows.dtype.name))
    if framework == "jax":
        return pytest.importorskip("jax").numpy.asarray(rows)
    return rows


def random_rows(layout: CacheLayout, num_tokens: int, seed: int) -> Any:
    """[layers, tokens, d]"""
    dtype = np.float16 if layout.dtype == "float16" else ml_dtypes.bfloat16
    random = np.random.default_rng(seed)
    return random.standard_normal((LAYERS, num_tokens, 512 + rope_of(layout)), np.float32).astype(dtype)


def by_parts(function: Any, values: Any, scale: Any) -> Any:
    """A layout's function of values [..., d] and a scale; latent and rope part apart where each has a scale."""
    if not isinstance(scale, tuple):
        return function(values, scale)
    return np.concatenate([function(values[..., :512], scale[0]), function(values[..., 512:], scale[1])], axis=-1)


def rounded(layout: CacheLayout, rows: Any) -> Any:
    """What a cache of the layout makes of rows [layers, tokens, d]."""
    scales = SCALES if layout.needs_scale else [None] * LAYERS
    stored = [by_parts(layout.quantise, row[:, None, None], scale) for row, scale in zip(rows, scales, strict=True)]
    read = [by_parts(layout.dequantise, page, scale) for page, scale in zip(stored, scales, strict=True)]
    return np.stack([page[:, 0, 0] for page in read])


def stored_tokens(cache: PagedKVCache, request: int) -> Any:
    """[layers, tokens, d], read through the block table as a kernel reads them."""
    table, length = as_numpy(cache.block_table([request]))[0], cache.length(request)
    pages = as_numpy(cache.pages)
    tokens = []
    for layer, scale in enumerate(cache.kv_scales):
        own = pages[layer * cache.num_pages : (layer + 1) * cache.num_pages]
        values = by_parts(cache.layout.dequantise, own, scale)
        tokens.append(values[table, :, 0].reshape(-1, values.shape[-1])[:length])
    return np.stack(tokens)


@frameworks
@layouts
def test_steps_and_appends_of_all_layers(framework: str, layout: CacheLayout) -> None:
    if framework == "jax" and layout is FP8_MODEL1:
        with pytest.raises(InvalidArgumentError, match=r"layout: .* without gaps between pages"):
            make_cache(framework, layout)
        return
    cache = make_cache(framework, layout)
    first, second = cache.allocate(), cache.allocate()
    prompts = random_rows(layout, 21, 0)
    cache.append([first, second], of_framework(framework, prompts), [20, 1])
    model = {first: prompts[:, :20], second: prompts[:, 20:]}
    fork = cache.fork(first)
    model[fork] = model[first]

    step = cache.step([second, fork])
    assert cache.num_free_pages == PAGES - 4  # the fork took a copy of the half-filled page
    for number in range(18):
        if number:
            step.advance()
        new = random_rows(layout, 2, 1 + number)
        for layer in range(LAYERS):
            step.append(layer, of_framework(framework, new[layer]))
        for index, request in enumerate([second, fork]):
            model[request] = np.concatenate([model[request], new[:, index : index + 1]], axis=1)
        assert as_numpy(step.cache_seqlens).tolist() == [model[second].shape[1], model[fork].shape[1]]
        assert as_numpy(step.positions).tolist() == [model[second].shape[1] - 1, model[fork].shape[1] - 1]
        np.testing.assert_array_equal(as_numpy(step.block_table), as_numpy(cache.block_table([second, fork])))
    for request, rows in model.items():
        np.testing.assert_array_equal(stored_tokens(cache, request), rounded(layout, rows))


@frameworks
def test_layers_decode_with_one_block_table(framework: str) -> None:
    cache = make_cache(framework, FP8_E4M3)
    requests = [cache.allocate(), cache.allocate()]
    prompts = random_rows(FP8_E4M3, 30, 3)
    cache.append(requests, of_framework(framework, prompts), [25, 5])
    step = cache.step(requests, [2, 1])
    new = random_rows(FP8_E4M3, 3, 4)
    q = np.random.default_rng(5).standard_normal((2, 1, 4, 576), np.float32).astype(ml_dtypes.bfloat16)
    for layer, scale in enumerate(SCALES):
        step.append(layer, of_framework(framework, new[layer]))
        block_table = step.block_table if framework != "jax" else step.block_table + layer * PAGES
        pages = cache.pages if framework == "jax" else cache.layers[layer]
        arrays = (of_framework(framework, q), pages, block_table, step.cache_seqlens)
        out, _ = mla_decode(*arrays, kv_scale=scale)
        values = [
            np.concatenate([prompts[layer, :25], new[layer, :2]]),
            np.concatenate([prompts[layer, 25:], new[layer, 2:]]),
        ]
        own = np.zeros((2, 32, 1, 576), np.float32)
        for index, rows in enumerate(values):
            own[index, : len(rows), 0] = rows
        kv_cache = by_parts(FP8_E4M3.quantise, own, scale)
        table, lengths = np.array([[0], [1]], np.int32), np.array([27, 6], np.int32)
        expected, _ = mla_decode(q, kv_cache, table, lengths, kv_scale=scale)
        np.testing.assert_array_equal(as_numpy(out), expected)


def test_arrays_of_a_step_stay_where_they_are() -> None:
    cache = make_cache("numpy", FP8_DS_MLA)
    request = cache.allocate()
    step = cache.step([request], [PAGE_SIZE - 1])
    arrays = [step.block_table, step.cache_seqlens, step.slot_mapping, step.positions]
    before = [array.ctypes.data for array in arrays]
    step.advance()
    assert [array.ctypes.data for array in arrays] == before
    assert step.cache_seqlens.tolist() == [2 * PAGE_SIZE - 2]
    assert step.positions.tolist() == list(range(PAGE_SIZE - 1, 2 * PAGE_SIZE - 2))
    assert step.block_table[0, :2].tolist() == cache.block_table([request])[0, :2].tolist() == [0, 1]
    assert repr(step) == "CacheStep(15 new tokens of 1 requests, 3 layers)"


def test_pages_that_came_from_elsewhere_reach_the_next_step() -> None:
    cache = make_cache("numpy", FP8_DS_MLA)
    request = cache.allocate()
    step = cache.step([request])
    cache.append([request], random_rows(FP8_DS_MLA, PAGE_SIZE, 6))  # takes the second page
    step.advance()
    assert step.block_table[0, :2].tolist() == [0, 1]
    assert step.slot_mapping.tolist() == [PAGE_SIZE + 1]


def test_a_step_without_pages_changes_nothing() -> None:
    cache = make_cache("numpy", FP8_DS_MLA, num_pages=1)
    request = cache.allocate()
    step = cache.step([request], [PAGE_SIZE])
    before = step.cache_seqlens.copy()
    with pytest.raises(OutOfPagesError):
        step.advance()
    assert cache.length(request) == PAGE_SIZE
    assert step.cache_seqlens.tolist() == before.tolist()


def test_rows_of_layers_in_a_list_and_as_pairs() -> None:
    cache = make_cache("numpy", FP8_DS_MLA)
    request = cache.allocate()
    rows = random_rows(FP8_DS_MLA, 4, 7)
    cache.append([request], [(row[:, :512], row[:, 512:]) for row in rows])
    np.testing.assert_array_equal(stored_tokens(cache, request), rounded(FP8_DS_MLA, rows))


def bad_calls() -> dict[str, tuple[str, Any]]:
    rows = random_rows(FP8_DS_MLA, 4, 8)

    def call(run: Any) -> Any:
        def on_a_cache() -> None:
            cache = make_cache("numpy", FP8_DS_MLA)
            run(cache, cache.allocate())

        return on_a_cache

    return {
        "layers too few": ("kv_new", call(lambda cache, request: cache.append([request], rows[:2]))),
        "list too short": ("kv_new", call(lambda cache, request: cache.append([request], list(rows[:2])))),
        "no layers": ("kv_new", call(lambda cache, request: cache.append([request], rows[0]))),
        "tokens differ": (
            "kv_new",
            call(lambda cache, request: cache.append([request], [rows[0], rows[1], rows[2, :3]])),
        ),
        "a layer too many": ("layer", call(lambda cache, request: cache.step([request]).append(3, rows[0, :1]))),
        "counts": ("counts", call(lambda cache, request: cache.step([request], [-1]))),
        "tokens of a step": ("slot_mapping", call(lambda cache, request: cache.step([request]).append(0, rows[0]))),
        "one array": ("kv_cache", call(lambda cache, request: cache.kv_cache)),
        "not of JAX": ("pages", call(lambda cache, request: setattr(cache, "pages", cache.pages))),
        "scales": ("kv_scale", lambda: make_cache("numpy", FP8_E4M3, kv_scale=SCALES[:2])),
        "no scale": ("kv_scale", lambda: make_cache("numpy", FP8_E4M3, kv_scale=None)),
    }


@pytest.mark.parametrize(("argument", "call"), bad_calls().values(), ids=bad_calls())
def test_a_bad_call_is_refused(argument: str, call: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{argument}: "):
        call()


# What each framework has of its own -----------------------------------------------------------------------------------


def test_types_and_devices_of_torch() -> None:
    torch = pytest.importorskip("torch")
    for options in ({"dtype": torch.float16}, {"device": torch.device("cpu"), "dtype": "float16"}):
        cache = PagedKVCache(num_pages=2, **options)
        assert (cache.framework, cache.device, cache.kv_cache.dtype) == ("torch", "cpu", torch.float16)
        assert isinstance(cache.block_table([cache.allocate()]), torch.Tensor)


def test_types_of_numpy_and_jax() -> None:
    assert PagedKVCache(num_pages=1, dtype=np.float16).dtype == "float16"
    assert PagedKVCache(num_pages=1, dtype=ml_dtypes.bfloat16).dtype == "bfloat16"
    jax = pytest.importorskip("jax")
    assert PagedKVCache(num_pages=1, dtype=jax.numpy.bfloat16).dtype == "bfloat16"
    with pytest.raises(InvalidArgumentError, match="dtype: "):
        PagedKVCache(num_pages=1, dtype=object())


def test_operators_of_torch_on_the_cpu() -> None:
    torch = pytest.importorskip("torch")
    import cupy_mla.torch_ops  # noqa: F401

    ops = torch.ops.cupy_mla
    cache = PagedKVCache(num_pages=8, num_layers=2, max_pages_per_seq=2, dtype=torch.bfloat16)
    requests = [cache.allocate(), cache.allocate()]
    cache.append(requests, torch.randn(2, 70, 576).bfloat16(), [60, 10])
    step = cache.step(requests)
    q = torch.randn(2, 1, 4, 576).bfloat16()
    plan = ops.plan_decode(q, cache.layers[0], step.block_table, step.cache_seqlens)
    for layer, kv_cache in enumerate(cache.layers):
        ops.append_tokens(kv_cache, torch.randn(2, 576).bfloat16(), step.slot_mapping)
        out, lse = ops.mla_decode(q, kv_cache, step.block_table, step.cache_seqlens, plan=plan)
        expected = mla_decode(q, cache.layers[layer], step.block_table, step.cache_seqlens)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


def test_layers_in_a_scan_of_jax() -> None:
    """The example of the docs: the cache is the carry of a scan over layers, and donated."""
    jax = pytest.importorskip("jax")
    from cupy_mla.jax_ops import append_tokens, plan_decode
    from cupy_mla.jax_ops import mla_decode as traced_decode

    layout = LAYOUTS["bf16"]
    cache = make_cache("jax", layout)
    requests = [cache.allocate(), cache.allocate()]
    prompts, new = random_rows(layout, 21, 9), random_rows(layout, 2, 10)
    cache.append(requests, jax.numpy.asarray(prompts), [20, 1])
    step = cache.step(requests)
    q = np.random.default_rng(11).standard_normal((LAYERS, 2, 1, 4, 576), np.float32).astype(ml_dtypes.bfloat16)

    def run(pages: Any, q: Any, rows: Any, slots: Any, block_table: Any, lengths: Any) -> Any:
        plan = plan_decode(q[0], pages, block_table, lengths)

        def layer(carry: Any, inputs: Any) -> Any:
            pages, first_page = carry
            q, rows = inputs
            pages = append_tokens(pages, rows, slots + first_page * PAGE_SIZE)
            out, _ = traced_decode(q, pages, block_table + first_page, lengths, plan=plan)
            return (pages, first_page + PAGES), out

        (pages, _), outs = jax.lax.scan(layer, (pages, 0), (q, rows))
        return pages, outs

    given = cache.pages
    arrays = (jax.numpy.asarray(q), jax.numpy.asarray(new), step.slot_mapping, step.block_table, step.cache_seqlens)
    cache.pages, outs = jax.jit(run, donate_argnums=0)(given, *arrays)
    assert given.is_deleted()
    expected = make_cache("numpy", layout)
    for _ in requests:
        expected.allocate()
    expected.append(requests, prompts, [20, 1])
    other = expected.step(requests)
    for layer in range(LAYERS):
        other.append(layer, new[layer])
        out, _ = mla_decode(q[layer], expected.layers[layer], other.block_table, other.cache_seqlens)
        np.testing.assert_array_equal(np.asarray(outs)[layer], out)
    for request in requests:
        np.testing.assert_array_equal(stored_tokens(cache, request), stored_tokens(expected, request))


def test_what_jax_cannot_do_is_said() -> None:
    jax = pytest.importorskip("jax")
    cache = make_cache("jax", LAYOUTS["bf16"])
    request = cache.allocate()
    with pytest.raises(InvalidArgumentError, match=r"layers: .* would be a copy"):
        _ = cache.layers
    with pytest.raises(InvalidArgumentError, match=r"pages: expected bfloat16 .* got float32"):
        cache.pages = cache.pages.astype(np.float32)
    with pytest.raises(InvalidArgumentError, match=r"pages: .* got ndarray"):
        cache.pages = np.asarray(cache.pages)
    with pytest.raises(InvalidArgumentError, match=r"out: .* JAX"):
        cache.block_table([request], out=jax.numpy.zeros((1, 4), "int32"))
