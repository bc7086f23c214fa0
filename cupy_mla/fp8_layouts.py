"""The FP8 layouts under their former address: see `cupy_mla.layouts`."""

from .layouts import FP8_DS_MLA, FP8_E4M3, FP8_MODEL1, CacheLayout
from .layouts.codes import E4M3

__all__ = ["E4M3_MAX", "FP8_DS_MLA", "FP8_E4M3", "FP8_LAYOUTS", "FP8_MODEL1"]

E4M3_MAX = E4M3.largest
FP8_LAYOUTS: dict[str, CacheLayout] = {layout.name: layout for layout in (FP8_E4M3, FP8_DS_MLA, FP8_MODEL1)}
