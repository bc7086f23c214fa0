"""The kernels that move tokens to their places in a paged cache, as they are or rounded, and back."""

from __future__ import annotations

from ..arrays.dtypes import KERNEL_TYPES
from ..gpu.jit.source import KernelSource
from ..gpu.launch import Geometry
from ..layouts import CacheLayout
from ..layouts.block_scaled import BlockScaled
from ..layouts.codes import E2M1, E4M3, E8M0, Codes
from ..schedule.pieces import ceil_div

APPEND_SOURCE = KernelSource(entry="cache/append.cu", function="mla_append")
CHUNK_BYTES = 16  # the kernels read rows in units of this size
CHUNK_VALUES = 8  # of 16 bits

_LANES = 32
_WARPS_PER_BLOCK = 4  # 128 tokens of a decode step, one per warp, are spread over 32 SMs
_MAX_TOKENS_PER_WARP = 8
_ENOUGH_WARPS = 1 << 14  # twice what fits on a GPU: with more tokens a warp takes several
# Of kernels_cu/cache/blocks.h; None: float32.
_CODES = {E4M3: "kCodesE4m3", E2M1: "kCodesE2m1"}
_SCALES: dict[Codes | None, str] = {None: "kScalesFloat32", E8M0: "kScalesE8m0", E4M3: "kScalesE4m3"}


def quantise_source(dtype: str, layout: CacheLayout) -> KernelSource:
    """The kernel that rounds rows of "bfloat16" or "float16" to a layout of fewer bits; it takes a
    `structs.BLOCKS_PARAMS`."""
    return KernelSource("cache/quantise.cu", "mla_quantise", _defines(dtype, layout))


def dequantise_source(dtype: str, layout: CacheLayout) -> KernelSource:
    """The kernel of the other direction, with the same argument."""
    return KernelSource("cache/dequantise.cu", "mla_dequantise", _defines(dtype, layout))


def _defines(dtype: str, layout: CacheLayout) -> tuple[tuple[str, str], ...]:
    codes, scales, lanes = _CODES[E4M3], "kScalesGiven", 1
    if isinstance(layout, BlockScaled):
        codes, scales, lanes = _CODES[layout.codes], _SCALES[layout.scales], layout.block // CHUNK_VALUES
    blocks = ("MLA_CODES", codes), ("MLA_SCALES", scales), ("MLA_BLOCK_LANES", str(lanes))
    return ("MLA_DTYPE", KERNEL_TYPES[dtype]), *blocks


def tokens_per_warp(num_tokens: int, rounds: bool) -> int:
    """How many tokens each warp takes, one behind the other: several only where it has to compute, and has enough."""
    return max(1, min(_MAX_TOKENS_PER_WARP, num_tokens // _ENOUGH_WARPS)) if rounds else 1


def append_geometry(num_tokens: int, per_warp: int) -> Geometry:
    """How each is launched."""
    warps = ceil_div(num_tokens, per_warp)
    return Geometry((ceil_div(warps, _WARPS_PER_BLOCK), 1, 1), (_LANES, _WARPS_PER_BLOCK, 1))
