"""copy_pages against NumPy's indexing: gathers, scatters, moves within a cache; and what the kernel is given."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fake_gpu import FakeGpu, fake_gpu

from cupy_mla import copy_pages
from cupy_mla.errors import InvalidArgumentError
from cupy_mla.kernels.copy_pages import copy_pages_geometry
from cupy_mla.layouts import FP8_MODEL1

PAGES, PAGE_SIZE, HEADS, WIDTH = 6, 4, 2, 24
TYPES = [np.uint8, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float32]


def make_cache(dtype: Any = np.uint8, pages: int = PAGES, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    itemsize = np.dtype(dtype).itemsize
    return rng.integers(0, 256, (pages, PAGE_SIZE, HEADS, WIDTH * itemsize), np.uint8).view(dtype)


def numbers(*pages: int) -> Any:
    return np.array(pages, np.int32)


def bits(array: Any) -> Any:
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_moves_gathers_and_scatters(dtype: Any) -> None:
    cache = make_cache(dtype)
    expected = cache.copy()
    expected[[0, 5]] = cache[[3, 2]]
    copy_pages(cache, numbers(3, 2), numbers(0, 5))
    np.testing.assert_array_equal(bits(cache), bits(expected))

    gathered = np.zeros_like(cache[:3])
    copy_pages(gathered, numbers(4, 4, 1), source=cache)
    np.testing.assert_array_equal(bits(gathered), bits(cache[[4, 4, 1]]))

    expected[[2, 0, 4]] = gathered
    copy_pages(cache, target_pages=numbers(2, 0, 4), source=gathered)
    np.testing.assert_array_equal(bits(cache), bits(expected))

    whole = np.zeros_like(cache)
    copy_pages(whole, source=cache)
    np.testing.assert_array_equal(bits(whole), bits(cache))
    picked = np.zeros_like(cache)
    copy_pages(picked, numbers(1, 0), numbers(5, 3), source=cache)
    np.testing.assert_array_equal(bits(picked[[5, 3]]), bits(cache[[1, 0]]))
    assert not bits(picked[[0, 1, 2, 4]]).any()


def test_pairs_and_strides() -> None:
    pool = make_cache(np.float16, 2 * PAGES)
    layer, others = pool[::2], pool[1::2].copy()
    latent, rope = layer[..., :16], layer[..., 16:]
    target = latent[:3].copy(), np.zeros((3, PAGE_SIZE, HEADS, 2 * rope.shape[-1]), np.float16)[..., : rope.shape[-1]]
    copy_pages(target, numbers(5, 0, 2), source=(latent, rope))
    np.testing.assert_array_equal(bits(np.concatenate(target, axis=-1)), bits(layer[[5, 0, 2]]))
    expected = layer.copy()
    expected[1] = layer[4]
    copy_pages((latent, rope), numbers(4), numbers(1))
    np.testing.assert_array_equal(bits(layer), bits(expected))
    np.testing.assert_array_equal(bits(pool[1::2]), bits(others))


def test_scales_at_a_pages_end_move_with_it() -> None:
    values = np.random.default_rng(1).standard_normal((3, 2, 1, 512))
    cache = FP8_MODEL1.quantise(values)
    expected = FP8_MODEL1.dequantise(cache)[[2, 1, 2]]
    copy_pages(cache, numbers(2), numbers(0))
    np.testing.assert_array_equal(FP8_MODEL1.dequantise(cache), expected)


def test_what_is_no_page_is_left_out() -> None:
    cache = make_cache()
    expected = cache.copy()
    expected[1] = cache[0]
    pages = numbers(0, -1, 2, PAGES, 3, -7, 2**31 - 1), numbers(1, 2, -1, 3, PAGES, 4, 5)
    copy_pages(cache, *pages, validate=False)
    np.testing.assert_array_equal(cache, expected)
    copy_pages(cache, numbers(-1, -1), numbers(-1, 3))  # twice on purpose
    np.testing.assert_array_equal(cache, expected)


def test_no_copies_are_fine() -> None:
    cache = make_cache()
    before = cache.copy()
    copy_pages(cache, numbers(), numbers())
    copy_pages(cache[:0], source=cache[:0])
    copy_pages(cache[:0], numbers(), source=cache)
    np.testing.assert_array_equal(cache, before)


def bad_calls() -> dict[str, tuple[str, dict[str, Any]]]:
    cache, other = make_cache(), make_cache(seed=2)
    read_only = cache.copy()
    read_only.flags.writeable = False
    good: dict[str, Any] = {"kv_cache": cache, "source_pages": numbers(0, 1), "target_pages": numbers(2, 3)}
    pair = {"kv_cache": (cache, cache)}
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        "no source": ("source_pages", {"source_pages": None}),
        "no target": ("target_pages", {"target_pages": None}),
        "neither": ("source_pages", {"source_pages": None, "target_pages": None}),
        "read-only cache": ("kv_cache", {"kv_cache": read_only}),
        "cache rank": ("kv_cache", {"kv_cache": cache[0]}),
        "no array": ("kv_cache", {"kv_cache": 3}),
        "source rank": ("source", {"source": other[0]}),
        "source type": ("source", {"source": other.view(np.int8)}),
        "page size": ("source", {"source": other[:, :2]}),
        "a pair from one": ("source", pair | {"source": other}),
        "one from a pair": ("source", {"source": (other, other)}),
        "numbers' type": ("source_pages", {"source_pages": np.array([0, 1])}),
        "numbers' shape": ("target_pages", {"target_pages": numbers(2)}),
        "gathered into more": ("kv_cache", {"target_pages": None, "source": other}),
        "scattered from more": ("source", {"source_pages": None, "source": other}),
        "all of more": ("source", {"source_pages": None, "target_pages": None, "source": other[:2]}),
        "a page past the end": ("source_pages[1]", {"source_pages": numbers(0, PAGES)}),
        "a page below": ("target_pages[0]", {"target_pages": numbers(-2, 1)}),
        "two to one": ("target_pages[1]", {"target_pages": numbers(3, 3)}),
        "from one that is written": ("source_pages[0]", {"target_pages": numbers(1, 0)}),
    }
    return {name: (argument, good | change) for name, (argument, change) in changes.items()}


@pytest.mark.parametrize(("argument", "call"), bad_calls().values(), ids=bad_calls())
def test_a_bad_call_is_refused(argument: str, call: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        copy_pages(call.pop("kv_cache"), **call)
    assert caught.value.argument == argument


# What the kernel is given --------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return fake_gpu(monkeypatch)


def launched(gpu: FakeGpu, count: int = 1) -> list[Any]:
    launches = gpu.take()
    assert len(launches) == count
    return [(launch, launch.arguments[0][0]) for launch in launches]


def test_pages_without_gaps_are_one_row(gpu: FakeGpu) -> None:
    cache, source = gpu.array((9, 64, 1, 576)), gpu.array((5, 64, 1, 576))
    pages = gpu.array((3,), "int32")
    copy_pages(cache, pages, gpu.array((3,), "int32"), source=source)
    [(launch, params)] = launched(gpu)
    page_bytes = 64 * 576 * 2
    assert params["page_units"] == params["row_units"] == page_bytes // 16
    assert (params["source"]["num_pages"], params["target"]["num_pages"]) == (5, 9)
    assert params["source"]["pages"] == source.pointer
    assert params["source"]["numbers"] == pages.pointer
    assert params["source"]["page_stride"] == params["target"]["page_stride"] == page_bytes
    assert launch.grid == copy_pages_geometry(3, page_bytes // 16).grid
    assert launch.grid[0] == 3 * params["blocks_per_page"]
    assert launch.stream == 77


def test_gaps_on_one_side_are_rows(gpu: FakeGpu) -> None:
    cache = gpu.array((4, 16, 2, 64), strides=(16 * 200, 200, 72, 1))
    copy_pages(cache, gpu.array((4,), "int32"), source=gpu.array((4, 16, 2, 64)))
    [(_, params)] = launched(gpu)
    assert (params["row_units"], params["page_units"], params["num_heads_kv"]) == (8, 16 * 2 * 8, 2)
    assert (params["target"]["token_stride"], params["target"]["head_stride"]) == (400, 144)
    assert params["target"]["numbers"] == 0


@pytest.mark.parametrize(("width", "unit"), [(584, 8), (36, 4), (6, 2), (7, 1)])
def test_units_are_what_pages_are_multiples_of(gpu: FakeGpu, width: int, unit: int) -> None:
    cache = gpu.array((4, 1, 1, width), "uint8")
    copy_pages(cache, gpu.array((2,), "int32"), gpu.array((2,), "int32"))
    [(_, params)] = launched(gpu)
    assert params["page_units"] == width // unit


def test_each_part_of_a_pair_is_a_launch(gpu: FakeGpu) -> None:
    cache = gpu.array((4, 16, 1, 512)), gpu.array((4, 16, 1, 64))
    copy_pages(cache, gpu.array((2,), "int32"), gpu.array((2,), "int32"), stream=5)
    assert [launch.stream for launch, _ in launched(gpu, 2)] == [5, 5]
    empty = gpu.array((0,), "int32")
    copy_pages(cache, empty, empty)
    assert gpu.take() == []
