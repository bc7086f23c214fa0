"""The FP8 layout with one scale for a whole cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..arrays.dtypes import dtype_of_numpy, numpy_dtype
from ..arrays.events import unheeded
from ..errors import InvalidArgumentError
from .base import CacheLayout, Float32Array, Floats, Indices, Stored, cache_values
from .codes import E4M3, largest_magnitudes

_WIDTH_MULTIPLE = 64  # of what is taken for this layout unasked; the layouts in bytes have other widths


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorScaled(CacheLayout):
    """``fp8_e4m3``: all values in e4m3, one float32 scale for the whole cache, kept apart from it. Any widths."""

    needs_scale: ClassVar[bool] = True

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        """The stored type, beside that of the queries."""
        return () if self.kernel_type is None else (("MLA_STORED", self.kernel_type),)

    def supports(self, latent_dim: int, rope_dim: int) -> bool:
        """Any widths."""
        return True

    def fits(self, dtype: str, width: int) -> bool:
        """Arrays of the type whose last dimension is a multiple of 64."""
        return dtype in self.dtypes and width % _WIDTH_MULTIPLE == 0

    def width(self, latent_dim: int, rope_dim: int) -> int:
        """``latent_dim + rope_dim``."""
        return latent_dim + rope_dim

    @unheeded
    def choose_scale(self, values: Floats) -> np.float32:
        """The scale with which the largest finite magnitude of the values is stored as 448; 1 if they are all 0, or too
        small for a float32 scale."""
        scale = np.float32(largest_magnitudes(np.asarray(values, np.float32).reshape(-1)) / np.float32(E4M3.largest))
        return scale if scale >= np.finfo(np.float32).tiny else np.float32(1)

    @unheeded
    def quantise(self, values: Floats, scale: float | np.floating[Any] | None = None) -> Stored:
        """Divide the values by the scale and round them to e4m3."""
        divided = np.asarray(cache_values(values), np.float32) / self._settled_scale(scale)
        return E4M3.encode(divided).view(numpy_dtype(self.dtype))

    @unheeded
    def dequantise(self, stored: Stored, scale: float | np.floating[Any] | None = None) -> Float32Array:
        """The e4m3 values times the scale."""
        factor = self._settled_scale(scale)
        if dtype_of_numpy(stored.dtype, "stored") not in self.dtypes:
            raise InvalidArgumentError("stored", self.dtype, str(stored.dtype))
        return E4M3.decode(np.ascontiguousarray(cache_values(stored)).view(np.uint8)) * factor

    @unheeded
    def dequantise_tokens(
        self, stored: Stored, slots: Indices, kv_head: int, scale: float | np.floating[Any] | None = None
    ) -> Float32Array:
        """The e4m3 values times the scale."""
        page_size = stored.shape[1]
        codes = stored[slots // page_size, slots % page_size, kv_head].view(np.uint8)
        return E4M3.decode(codes) * self._settled_scale(scale)
