"""Tensor maps: what the copy engine must know of a paged KV cache to load tiles from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .arrays import ArrayView
from .configs import BOX_COLUMNS, KernelConfig
from .driver import check, driver

TENSOR_MAP = np.dtype("V128")  # CUtensorMap, opaque
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


def kv_tensor_map(pages: ArrayView, config: KernelConfig, boxes_per_load: int) -> TensorMap:
    """The tensor map of one part (latent or rope) of a paged cache.

    It depends on nothing but what it describes (address, shape, strides, type), so one that is kept is right whatever
    became of the memory in between.

    Parameters
    ----------
    pages : ArrayView
        [num_pages, page_size, num_heads_kv, width], bf16 or fp16; any strides that are multiples of 16 bytes but the
        last, which is 1.
    config : KernelConfig
        Says how many tokens one load takes.
    boxes_per_load : int
        Boxes of 64 columns that one load takes.

    Returns
    -------
    TensorMap
        The map has five dimensions, innermost first: 64 columns, tokens of a page, boxes
        of 64 columns, kv heads, pages.

    Raises
    ------
    DriverError
        The driver refused the description.
    """
    return _encode(pages.pointer, pages.shape, pages.strides, pages.dtype, config.chunk_tokens, boxes_per_load)


@lru_cache(maxsize=_MAPS_KEPT)
def _encode(
    pointer: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: str,
    chunk_tokens: int,
    boxes_per_load: int,
) -> TensorMap:
    cuda = driver()
    num_pages, page_size, num_heads, width = shape
    item_bytes = 2
    data_type = {
        "bfloat16": cuda.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        "float16": cuda.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    }[dtype]
    sizes = (BOX_COLUMNS, page_size, width // BOX_COLUMNS, num_heads, num_pages)
    # A dimension of size one may come with any stride, 0 included; the driver wants multiples of 16 bytes that are
    # larger than nothing, and never uses them.
    box_bytes = BOX_COLUMNS * item_bytes
    byte_strides = tuple(
        step * item_bytes if size > 1 else box_bytes
        for step, size in zip((strides[1], BOX_COLUMNS, strides[2], strides[0]), sizes[1:], strict=True)
    )
    box = (BOX_COLUMNS, chunk_tokens, boxes_per_load, 1, 1)
    tensor_map = check(
        "cuTensorMapEncodeTiled",
        cuda.cuTensorMapEncodeTiled(
            data_type,
            len(sizes),
            pointer,
            [cuda.cuuint64_t(size) for size in sizes],
            [cuda.cuuint64_t(step) for step in byte_strides],
            [cuda.cuuint32_t(size) for size in box],
            [cuda.cuuint32_t(1)] * len(sizes),
            cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            cuda.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
    )
    words = np.array([int(word) for word in tensor_map.opaque], dtype=np.uint64).view(TENSOR_MAP)
    return TensorMap(words, words.ctypes.data)
