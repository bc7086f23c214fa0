"""The kernel that writes new tokens to their places in a paged cache."""

from __future__ import annotations

from ..gpu.jit.source import KernelSource
from ..gpu.launch import Geometry
from ..schedule.pieces import ceil_div

APPEND_SOURCE = KernelSource(entry="cache/append.cu", function="mla_append")
CHUNK_BYTES = 16  # the kernel copies in units of this size

_LANES = 32
_WARPS_PER_BLOCK = 4  # one token per warp: 128 tokens of a decode step are spread over 32 SMs


def append_geometry(num_tokens: int) -> Geometry:
    """How mla_append is launched."""
    return Geometry((ceil_div(num_tokens, _WARPS_PER_BLOCK), 1, 1), (_LANES, _WARPS_PER_BLOCK, 1))
