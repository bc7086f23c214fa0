"""The kernels that move tokens to their places in a paged cache, as they are or rounded, and back."""

from __future__ import annotations

from ..arrays.dtypes import KERNEL_TYPES
from ..gpu.jit.source import KernelSource
from ..gpu.launch import Geometry
from ..schedule.pieces import ceil_div

APPEND_SOURCE = KernelSource(entry="cache/append.cu", function="mla_append")
CHUNK_BYTES = 16  # the kernels read rows in units of this size
CHUNK_VALUES = 8  # of 16 bits

_LANES = 32
_WARPS_PER_BLOCK = 4  # one token per warp: 128 tokens of a decode step are spread over 32 SMs


def quantise_source(dtype: str) -> KernelSource:
    """The kernel that rounds rows of "bfloat16" or "float16" to fewer bits; it takes a `structs.BLOCKS_PARAMS`."""
    return KernelSource("cache/quantise.cu", "mla_quantise", (("MLA_DTYPE", KERNEL_TYPES[dtype]),))


def dequantise_source(dtype: str) -> KernelSource:
    """The kernel of the other direction, with the same argument."""
    return KernelSource("cache/dequantise.cu", "mla_dequantise", (("MLA_DTYPE", KERNEL_TYPES[dtype]),))


def append_geometry(num_tokens: int) -> Geometry:
    """How each is launched."""
    return Geometry((ceil_div(num_tokens, _WARPS_PER_BLOCK), 1, 1), (_LANES, _WARPS_PER_BLOCK, 1))
