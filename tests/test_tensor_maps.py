"""Tensor maps: the copies that kernels ask for bring the tokens they mean, to where they look for them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_gpu import fake_device, fake_gpu
from hypothesis import given
from hypothesis import strategies as st

from cupy_mla import InvalidArgumentError
from cupy_mla.arrays.view import ArrayView, contiguous_strides
from cupy_mla.gpu import driver
from cupy_mla.kernels import tensor_maps
from cupy_mla.kernels.family import KernelConfig
from cupy_mla.kernels.fp8 import FP8_EXACT16, FP8_SPLIT16, FP8_TURNS16, Fp8Family
from cupy_mla.kernels.narrow import NARROW16
from cupy_mla.kernels.tensor_maps import PageSteps, kv_tensor_map
from cupy_mla.kernels.wide import WIDE64

COLUMNS, TILE_TOKENS, ATOM_ROWS, CHUNK_COLUMNS = 64, 64, 8, 8
LATENT = 128


@dataclass
class Description:
    """What the driver is asked to encode: sizes and a copy's box in elements, strides in bytes; innermost first."""

    sizes: list[int]
    strides: list[int]
    box: list[int]

    def copy(self, cache: np.ndarray, origin: tuple[int, ...]) -> np.ndarray:
        """What a copy writes, in the order in which it does, before the swizzle: zeros outside of the tensor."""
        copied = []
        for offset in itertools.product(*map(range, reversed(self.box))):
            place = [start + step for start, step in zip(origin, reversed(offset), strict=True)]
            inside = all(0 <= at < size for at, size in zip(place, self.sizes, strict=True))
            bytes_in = 2 * place[0] + sum(at * step for at, step in zip(place[1:], self.strides, strict=True))
            copied.append(cache[bytes_in // 2] if inside else 0)
        return np.array(copied)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[Description]:
    """Descriptions that the driver was given."""
    descriptions: list[Description] = []

    def encode(data_type: Any, rank: int, pointer: int, sizes: Any, strides: Any, box: Any, *rest: Any) -> Any:
        assert rank == len(sizes) == len(strides) + 1 == len(box) == 5
        assert all(step % 16 == 0 and step > 0 for step in strides)
        assert all(0 < extent <= 256 for extent in box)
        descriptions.append(Description(list(sizes), list(strides), list(box)))
        return 0, SimpleNamespace(opaque=[0] * 16)

    names = SimpleNamespace
    fake = SimpleNamespace(
        CUtensorMapDataType=names(
            CU_TENSOR_MAP_DATA_TYPE_BFLOAT16="bfloat16",
            CU_TENSOR_MAP_DATA_TYPE_FLOAT16="float16",
            CU_TENSOR_MAP_DATA_TYPE_UINT8="uint8",
        ),
        CUtensorMapInterleave=names(CU_TENSOR_MAP_INTERLEAVE_NONE=0),
        CUtensorMapSwizzle=names(CU_TENSOR_MAP_SWIZZLE_64B=2, CU_TENSOR_MAP_SWIZZLE_128B=3),
        CUtensorMapL2promotion=names(CU_TENSOR_MAP_L2_PROMOTION_L2_128B=2),
        CUtensorMapFloatOOBfill=names(CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE=0),
        cuuint64_t=int,
        cuuint32_t=int,
        cuTensorMapEncodeTiled=encode,
    )
    monkeypatch.setattr(driver, "_driver", fake)
    tensor_maps._encode.cache_clear()
    yield descriptions
    tensor_maps._encode.cache_clear()


def swizzled(memory: np.ndarray) -> np.ndarray:
    """Shared memory as TMA writes it: 16-byte chunks of a row of 128 bytes trade places by row modulo 8."""
    rows = memory.reshape(-1, ATOM_ROWS, COLUMNS // CHUNK_COLUMNS, CHUNK_COLUMNS)
    result = np.empty_like(rows)
    for row, chunk in itertools.product(range(ATOM_ROWS), range(COLUMNS // CHUNK_COLUMNS)):
        result[:, row, chunk ^ row] = rows[:, row, chunk]
    return result.reshape(-1)


def strides_of(shape: tuple[int, ...], padding: int) -> tuple[int, ...]:
    """Of pages whose tokens, heads and pages lie further apart than they must."""
    _, page_size, num_heads, width = shape
    head = width + padding
    token = num_heads * head + padding
    return (page_size * token + padding, token, head, 1)


@pytest.mark.parametrize("padding", [0, 24])
@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("page_size", [1, 2, 12, 8, 16, 24, 32, 64, 128])
@pytest.mark.parametrize("kernel", ["wide", "narrow"])
def test_a_chunk_comes_to_where_the_kernel_looks_for_it(
    described: list[Description], kernel: str, page_size: int, num_heads: int, padding: int
) -> None:
    config = KernelConfig(WIDE64 if kernel == "wide" else NARROW16, LATENT, 64, "bfloat16", page_size, False)
    shape = (5, page_size, num_heads, LATENT)
    strides = strides_of(shape, padding)
    kv_tensor_map(ArrayView(0, shape, strides, "bfloat16", "cuda", 0, None), config)
    [description] = described
    cache = np.random.default_rng(1).permutation(5 * strides[0]) + 1
    pages = np.lib.stride_tricks.as_strided(cache, shape, tuple(step * cache.itemsize for step in strides))

    steps = PageSteps.of(shape, strides)
    unit, chunk = config.group_tokens, config.chunk_tokens
    boxes, copy_boxes = LATENT // COLUMNS, description.box[2]
    page, head, first = 3, num_heads - 1, (page_size - chunk) // unit
    # The chunk is the tile's second where it has several.
    at_token = chunk % TILE_TOKENS
    tile = np.zeros(TILE_TOKENS * LATENT, np.int64)
    for box in range(0, boxes, copy_boxes):
        # source/paged.h says where it is read, decode/wide/smem.h and narrow/smem.h where it is written.
        copied = description.copy(cache, (0, 0, box, first, page * steps.page + head * steps.head))
        row, row_box = (at_token, 0) if kernel == "narrow" else (at_token % ATOM_ROWS, at_token // ATOM_ROWS * boxes)
        place = (box * TILE_TOKENS if kernel == "narrow" else (row_box + box) * ATOM_ROWS) + row
        tile[place * COLUMNS : place * COLUMNS + copied.size] = copied
    tile = swizzled(tile)
    for token in range(at_token, at_token + chunk):
        expected = pages[page, page_size - chunk + token - at_token, head]
        for box in range(boxes):
            if kernel == "narrow":
                row_begin = (box * TILE_TOKENS + token) * COLUMNS
            else:
                row_begin = (token // ATOM_ROWS * boxes + box) * ATOM_ROWS * COLUMNS + token % ATOM_ROWS * COLUMNS
            found = tile[row_begin : row_begin + COLUMNS].reshape(-1, CHUNK_COLUMNS)
            order = np.arange(COLUMNS // CHUNK_COLUMNS) ^ token % ATOM_ROWS
            np.testing.assert_array_equal(found[order].reshape(-1), expected[box * COLUMNS : (box + 1) * COLUMNS])


@pytest.mark.parametrize(("page_size", "copies"), [(4, 8), (8, 1), (16, 1), (48, 1), (64, 1), (128, 1)])
def test_one_copy_brings_whole_tokens_where_pages_hold_swizzle_atoms(
    described: list[Description], page_size: int, copies: int
) -> None:
    config = KernelConfig(WIDE64, 512, 64, "float16", page_size, False)
    shape = (2, page_size, 1, 512)
    kv_tensor_map(ArrayView(0, shape, contiguous_strides(shape), "float16", "cuda", 0, None), config)
    columns, tokens, boxes, groups, _ = described[0].box
    assert tokens * groups == config.chunk_tokens
    assert columns * boxes * copies == 512


@pytest.mark.parametrize(("family", "copies"), [(FP8_EXACT16, 2), (FP8_TURNS16, 1), (FP8_SPLIT16, 1)])
@pytest.mark.parametrize("latent_dim", [256, 512])
def test_a_tile_of_an_e4m3_cache_comes_in_two_parts_where_calls_are_short(
    described: list[Description], family: Fp8Family, copies: int, latent_dim: int
) -> None:
    config = KernelConfig(family, latent_dim, 64, "bfloat16", 64, False)
    for width, expected in ((latent_dim, copies), (64, 1)):  # the rope part has one box
        shape = (2, 64, 1, width)
        kv_tensor_map(ArrayView(0, shape, contiguous_strides(shape), "float8_e4m3fn", "cuda", 0, None), config)
        columns, tokens, boxes, groups, _ = described[-1].box
        assert tokens * groups == 64
        assert columns * boxes * expected == width


@given(
    num_pages=st.integers(1, 9),
    num_heads=st.integers(1, 5),
    page=st.integers(0, 40).map(lambda n: 8 * n),
    head=st.integers(0, 40).map(lambda n: 8 * n),
)
def test_steps_lead_to_each_head_of_each_page(num_pages: int, num_heads: int, page: int, head: int) -> None:
    steps = PageSteps.of((num_pages, 64, num_heads, 64), (page, 64, head, 1))
    last = 0
    for p, h in itertools.product(range(num_pages), range(num_heads)):
        place = p * steps.page + h * steps.head
        assert place * steps.stride == p * page + h * head
        last = max(last, place)
    assert last == steps.count - 1
    assert steps.stride % 8 == 0


def test_steps_that_32_bits_cannot_count_are_refused() -> None:
    shape, strides = (2**24, 64, 2, 576), (64 * 2 * 576 + 8, 1152, 576, 1)
    with pytest.raises(InvalidArgumentError, match=r"kv_cache: .*larger number than 8 elements"):
        PageSteps.of(shape, strides)


def test_a_thread_without_a_context_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = fake_gpu(monkeypatch)
    used = fake_device(monkeypatch)
    invalid_context = 201

    def encode(*description: Any) -> Any:
        return gpu.encode(*description) if used else (invalid_context, None)

    monkeypatch.setattr(driver._driver, "cuTensorMapEncodeTiled", encode)
    shape = (3, 64, 1, LATENT)
    pages = ArrayView(1 << 50, shape, contiguous_strides(shape), "bfloat16", "cuda", 3, None)
    encoded = kv_tensor_map(pages, KernelConfig(NARROW16, LATENT, 0, "bfloat16", 64, False))
    assert used == [3]
    assert encoded.words.view(np.uint64)[0] == pages.pointer
