"""All cache layouts, and how one is found by its name or by an array."""

from __future__ import annotations

from dataclasses import replace

from ..arrays.dtypes import KERNEL_TYPES
from ..errors import InvalidArgumentError
from .base import CacheLayout
from .block_scaled import BlockScaled
from .codes import E2M1, E4M3, E8M0
from .dense import DenseLayout
from .tensor_scaled import TensorScaled

BF16 = DenseLayout(
    name="bf16",
    dtypes=("bfloat16",),
    query_dtypes=("bfloat16",),
    tma_type="BFLOAT16",
    kernel_type=KERNEL_TYPES["bfloat16"],
)
FP16 = DenseLayout(
    name="fp16",
    dtypes=("float16",),
    query_dtypes=("float16",),
    tma_type="FLOAT16",
    kernel_type=KERNEL_TYPES["float16"],
)
FP8_E4M3 = TensorScaled(
    name="fp8_e4m3", dtypes=("float8_e4m3fn",), query_dtypes=("bfloat16",), kernel_type="E4m3", codec="CachedE4m3"
)
# DeepSeek V3.2: 512 e4m3, 4 float32 scales, 64 bfloat16 with the position: 656 bytes.
FP8_DS_MLA = BlockScaled(
    name="fp8_ds_mla",
    latent_dim=512,
    rope_dim=64,
    coded=512,
    codes=E4M3,
    block=128,
    scales=None,
    scale_bytes=16,
    codec="DsMla",
)
# The same for models without a part of its own for the position: 528 bytes.
FP8_DS_MLA_NO_ROPE = replace(FP8_DS_MLA, name="fp8_ds_mla_no_rope", rope_dim=0, codec="DsMlaNoRope")
# DeepSeek V4: 448 e4m3 and 64 bfloat16; at the end of a page 8 bytes for each token, of which 7 are scales: 584 bytes.
FP8_MODEL1 = BlockScaled(
    name="fp8_model1",
    latent_dim=512,
    rope_dim=0,
    coded=448,
    codes=E4M3,
    block=64,
    scales=E8M0,
    scale_bytes=8,
    scales_end_page=True,
    page_multiple=576,
    codec="Model1",
)
# DeepSeek V4.1: 512 e4m3, 16 scales: 528 bytes.
FP8_V41 = BlockScaled(
    name="fp8_v41",
    latent_dim=512,
    rope_dim=0,
    coded=512,
    codes=E4M3,
    block=32,
    scales=E8M0,
    scale_bytes=16,
    codec="V41",
)
# Its compressed cache: 512 e2m1, 32 scales: 288 bytes.
FP4_V41 = replace(FP8_V41, name="fp4_v41", codes=E2M1, block=16, scales=E4M3, scale_bytes=32, codec="Fp4V41")

LAYOUTS: dict[str, CacheLayout] = {
    layout.name: layout
    for layout in (BF16, FP16, FP8_E4M3, FP8_DS_MLA, FP8_DS_MLA_NO_ROPE, FP8_MODEL1, FP8_V41, FP4_V41)
}
# By element type: a dense cache needs no other description.
DENSE_LAYOUTS: dict[str, CacheLayout] = {layout.dtype: layout for layout in (BF16, FP16)}
# Those that sparse attention takes.
SPARSE_LAYOUTS: tuple[CacheLayout, ...] = tuple(
    layout for layout in LAYOUTS.values() if layout in DENSE_LAYOUTS.values() or layout.codec is not None
)


def find_layout(layout: CacheLayout | str, name: str = "layout") -> CacheLayout:
    """The layout itself, or the one of that name.

    Raises
    ------
    InvalidArgumentError
        There is none of that name; the error calls the argument ``name``.
    """
    if isinstance(layout, CacheLayout):
        return layout
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise InvalidArgumentError(name, "one of " + ", ".join(LAYOUTS), repr(layout))
    return LAYOUTS[layout]


def infer_layout(dtype: str, width: int, name: str = "kv_cache", layout: str = "layout") -> CacheLayout:
    """The layout of a cache whose element type and last dimension leave no doubt.

    Raises
    ------
    InvalidArgumentError
        No layout has such arrays (of ``name``), or several have; the argument that the error names is then the one that
        says which, ``layout``.
    """
    fitting = _fitting(dtype, width)
    if not fitting:
        expected = "a cache in one of the layouts " + ", ".join(LAYOUTS)
        raise InvalidArgumentError(name, expected, f"{dtype} with {width} as the last dimension")
    if len(fitting) > 1:
        expected = " or ".join(layout.name for layout in fitting)
        raise InvalidArgumentError(layout, expected, f"None, and {name} of {dtype} [..., {width}] may be either")
    return fitting[0]


def _fitting(dtype: str, width: int) -> list[CacheLayout]:
    return [layout for layout in LAYOUTS.values() if layout.fits(dtype, width)]
