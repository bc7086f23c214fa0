"""Tensor maps: what TMA must know of a paged KV cache to load tiles from it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arrays.dtypes import ITEM_SIZES
from ..arrays.view import ArrayView
from ..call.memo import remembered
from ..errors import InvalidArgumentError
from ..gpu.driver import check, driver, in_context
from ..layouts import LAYOUTS
from .family import BOX_COLUMNS, KernelConfig

TENSOR_MAP = np.dtype("V128")  # CUtensorMap, opaque
_BOX_ROW_BYTES = 128
_TMA_TYPES = {layout.dtype: layout.tma_type for layout in LAYOUTS.values()}
_MAX_STEPS = 2**31  # coordinates are int32
_MAPS_KEPT = 1024  # layers * caches of a large model; 128 bytes each


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A tensor map in host memory.

    Attributes
    ----------
    words : numpy.ndarray
        One element of 128 bytes, as a kernel takes it by value.
    address : int
        Where it lies; valid while ``words`` lives.
    """

    words: np.ndarray[Any, Any]
    address: int


@dataclass(frozen=True, slots=True)
class PageSteps:
    """Where the kv heads of the pages lie: head h of page p begins ``p * page + h * head`` steps into the cache.

    Attributes
    ----------
    stride : int
        Elements of a step.
    page, head : int
        Steps between pages and between kv heads.
    count : int
        Steps that there are.
    """

    stride: int
    page: int
    head: int
    count: int

    @staticmethod
    def of(shape: tuple[int, ...], strides: tuple[int, ...]) -> PageSteps:
        """Of pages of this shape and these strides, [num_pages, page_size, num_heads_kv, width].

        Raises
        ------
        InvalidArgumentError
            The strides have so small a divisor in common that steps cannot be counted in 32 bits.
        """
        (num_pages, _, num_heads, _), (page, _, head, _) = shape, strides
        if num_heads == 1:
            return PageSteps(page, 1, 0, num_pages)
        stride = math.gcd(page, head) or BOX_COLUMNS  # strides of 0: all is one
        steps = PageSteps(stride, page // stride, head // stride, 0)
        count = (num_pages - 1) * steps.page + (num_heads - 1) * steps.head + 1
        if count > _MAX_STEPS:
            raise InvalidArgumentError(
                "kv_cache",
                f"strides of pages and of kv heads that are multiples of a larger number than {stride} elements",
                f"strides {strides} of shape {shape}",
            )
        return replace(steps, count=count)


def kv_tensor_map(pages: ArrayView, config: KernelConfig) -> TensorMap:
    """The tensor map of one part (latent or rope) of a paged cache.

    It depends on nothing but what it describes (address, shape, strides, type), so one that is kept is right whatever
    became of the memory in between.

    Parameters
    ----------
    pages : ArrayView
        [num_pages, page_size, num_heads_kv, width], bf16, fp16 or e4m3; any strides that are multiples of 16 bytes but
        the last, which is 1. Rows are multiples of 128 bytes, or 64 bytes.
    config : KernelConfig
        Says how many tokens and columns one copy takes.

    Returns
    -------
    TensorMap
        The map has five dimensions, innermost first: the columns of a box (128 bytes, or a whole row of 64), tokens of
        a group, boxes, groups of a page, `PageSteps`. A copy writes them in this order: boxes side by side for each
        group of tokens.

    Raises
    ------
    InvalidArgumentError
        The strides have so small a divisor in common that steps cannot be counted in 32 bits.
    DriverError
        The driver refused the description.
    """
    boxes = pages.shape[-1] // _box_columns(pages.shape, pages.dtype) if config.copies_whole_tokens else 1
    if boxes > 1:
        boxes //= config.family.tile_parts
    groups = config.chunk_tokens // config.group_tokens
    described = pages.pointer, pages.shape, pages.strides, pages.dtype
    return _encode(*described, pages.device_id, config.group_tokens, boxes, groups)


def _box_columns(shape: tuple[int, ...], dtype: str) -> int:
    """Columns of a box of rows of this shape and type."""
    return min(_BOX_ROW_BYTES // ITEM_SIZES[dtype], shape[-1])


@remembered(_MAPS_KEPT)
def _encode(
    pointer: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: str,
    device_id: int,
    group_tokens: int,
    boxes: int,
    groups: int,
) -> TensorMap:
    cuda = driver()
    _, page_size, _, width = shape
    item_bytes = ITEM_SIZES[dtype]
    box_columns = _box_columns(shape, dtype)
    box_bytes = box_columns * item_bytes
    data_type = getattr(cuda.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{_TMA_TYPES[dtype]}")
    swizzle = getattr(cuda.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{box_bytes}B")
    steps = PageSteps.of(shape, strides)
    sizes = (box_columns, group_tokens, width // box_columns, page_size // group_tokens, steps.count)
    # A dimension of size one may come with any stride, 0 included; the driver wants multiples of 16 bytes that are
    # larger than nothing, and never uses them.
    byte_strides = tuple(
        step * item_bytes if size > 1 else box_bytes
        for step, size in zip(
            (strides[1], box_columns, group_tokens * strides[1], steps.stride), sizes[1:], strict=True
        )
    )
    box = (box_columns, group_tokens, boxes, groups, 1)
    encode = functools.partial(
        cuda.cuTensorMapEncodeTiled,
        data_type,
        len(sizes),
        pointer,
        [cuda.cuuint64_t(size) for size in sizes],
        [cuda.cuuint64_t(step) for step in byte_strides],
        [cuda.cuuint32_t(size) for size in box],
        [cuda.cuuint32_t(1)] * len(sizes),
        cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle,
        cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    tensor_map = check("cuTensorMapEncodeTiled", in_context(device_id, encode, encode()))
    words = np.array([int(word) for word in tensor_map.opaque], dtype=np.uint64).view(TENSOR_MAP)
    return TensorMap(words, words.ctypes.data)
