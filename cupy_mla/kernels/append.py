"""The kernels that move tokens to their places in a paged cache, as they are or rounded, and back."""

from __future__ import annotations

from ..arrays.dtypes import KERNEL_TYPES
from ..gpu.jit.source import KernelSource
from ..gpu.launch import Geometry
from ..layouts import CacheLayout
from ..layouts.block_scaled import BlockScaled
from ..layouts.codes import E2M1, E4M3, E8M0, Codes
from ..schedule.pieces import ceil_div

CHUNK_BYTES = 16  # the kernels read rows in units of this size
CHUNK_VALUES = 8  # of 16 bits
# Of the two segments of a token of 512 and 64 values: rows and cache are one array each, or one of them is a pair.
USUAL_CHUNKS = {"": (576 // CHUNK_VALUES, 0), "_parts": (512 // CHUNK_VALUES, 64 // CHUNK_VALUES)}

_LANES = 32
_WARP_TOKENS = 4  # kWarpTokens in kernels_cu/cache/places.h
_WARPS_PER_BLOCK = 4
_ENOUGH_TOKENS = 1 << 12  # the warps of so many occupy all SMs; of fewer, several share their tokens' rounds
_PARTS = 9  # the most rounds that a token of 576 values has
# Of kernels_cu/cache/blocks.h; None: float32.
_CODES = {E4M3: "kCodesE4m3", E2M1: "kCodesE2m1"}
_SCALES: dict[Codes | None, str] = {None: "kScalesFloat32", E8M0: "kScalesE8m0", E4M3: "kScalesE4m3"}


def chunks_of(layout: CacheLayout) -> dict[str, tuple[int, int]]:
    """Chunks of the two segments of a token, by what a kernel's name has at its end: those of a layout with widths of
    its own, or the usual ones."""
    if not isinstance(layout, BlockScaled):
        return USUAL_CHUNKS
    uncoded = layout.latent_dim + layout.rope_dim - layout.coded
    return {"": (layout.coded // CHUNK_VALUES, uncoded // CHUNK_VALUES)}


def append_source(chunks: tuple[int, int]) -> KernelSource:
    """The kernel that moves rows as they are, so many chunks of each segment; it takes a `structs.APPEND_PARAMS`."""
    return KernelSource("cache/append.cu", "mla_append", _chunks(chunks))


def quantise_source(dtype: str, layout: CacheLayout, chunks: tuple[int, int]) -> KernelSource:
    """The kernel that rounds rows of "bfloat16" or "float16" to a layout of fewer bits; it takes a
    `structs.BLOCKS_PARAMS`."""
    return KernelSource("cache/quantise.cu", "mla_quantise", _defines(dtype, layout, chunks))


def dequantise_source(dtype: str, layout: CacheLayout, chunks: tuple[int, int]) -> KernelSource:
    """The kernel of the other direction, with the same argument."""
    return KernelSource("cache/dequantise.cu", "mla_dequantise", _defines(dtype, layout, chunks))


def _chunks(chunks: tuple[int, int]) -> tuple[tuple[str, str], ...]:
    return ("MLA_CHUNKS", str(chunks[0])), ("MLA_SECOND_CHUNKS", str(chunks[1]))


def _defines(dtype: str, layout: CacheLayout, chunks: tuple[int, int]) -> tuple[tuple[str, str], ...]:
    codes, scales, block, scale_bytes = _CODES[E4M3], "kScalesGiven", 2 * CHUNK_VALUES, 0
    if isinstance(layout, BlockScaled):
        codes, scales, block = _CODES[layout.codes], _SCALES[layout.scales], layout.block
        scale_bytes = layout.scale_bytes - layout.page_end_bytes
    blocks = ("MLA_CODES", codes), ("MLA_SCALES", scales), ("MLA_BLOCK", str(block))
    return ("MLA_DTYPE", KERNEL_TYPES[dtype]), *blocks, ("MLA_ROW_SCALE_BYTES", str(scale_bytes)), *_chunks(chunks)


def append_geometry(num_tokens: int) -> Geometry:
    """How each is launched."""
    blocks = ceil_div(num_tokens, _WARP_TOKENS * _WARPS_PER_BLOCK)
    return Geometry((blocks, 1 if num_tokens >= _ENOUGH_TOKENS else _PARTS, 1), (_LANES, _WARPS_PER_BLOCK, 1))
