"""The kernels that write new tokens to their places in a paged cache: as they are, or rounded to e4m3."""

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
    """The kernel that rounds rows of "bfloat16" or "float16" to e4m3; its argument is a `structs.QUANTISE_PARAMS`."""
    return KernelSource("cache/quantise.cu", "mla_quantise", (("MLA_DTYPE", KERNEL_TYPES[dtype]),))


def append_geometry(num_tokens: int) -> Geometry:
    """How either is launched."""
    return Geometry((ceil_div(num_tokens, _WARPS_PER_BLOCK), 1, 1), (_LANES, _WARPS_PER_BLOCK, 1))
