"""The dense layout: one vector of values of one 16-bit type per token and KV head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..arrays.dtypes import dtype_of_numpy, numpy_dtype
from ..arrays.events import unheeded
from ..errors import InvalidArgumentError
from .base import CacheLayout, Float32Array, Floats, Indices, Stored, cache_values


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseLayout(CacheLayout):
    """``bf16``, ``fp16``: latent and rope values of the query's type. Any widths, any number of KV heads."""

    one_head: ClassVar[bool] = False

    def supports(self, latent_dim: int, rope_dim: int) -> bool:
        """Any widths."""
        return True

    def fits(self, dtype: str, width: int) -> bool:
        """Every array of the type."""
        return dtype in self.dtypes

    def width(self, latent_dim: int, rope_dim: int) -> int:
        """``latent_dim + rope_dim``."""
        return latent_dim + rope_dim

    @unheeded
    def quantise(self, values: Floats, scale: float | np.floating[Any] | None = None) -> Stored:
        """Round the values to the type."""
        self._settled_scale(scale)
        return cache_values(values).astype(numpy_dtype(self.dtype))

    @unheeded
    def dequantise(self, stored: Stored, scale: float | np.floating[Any] | None = None) -> Float32Array:
        """The values as float32."""
        self._settled_scale(scale)
        if dtype_of_numpy(stored.dtype, "stored") not in self.dtypes:
            raise InvalidArgumentError("stored", self.dtype, str(stored.dtype))
        return cache_values(stored).astype(np.float32)

    @unheeded
    def dequantise_tokens(
        self, stored: Stored, slots: Indices, kv_head: int, scale: float | np.floating[Any] | None = None
    ) -> Float32Array:
        """The values as float32."""
        page_size = stored.shape[1]
        values: Float32Array = stored[slots // page_size, slots % page_size, kv_head].astype(np.float32)
        return values
