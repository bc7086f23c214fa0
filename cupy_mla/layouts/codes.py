"""Numbers of 8 and 4 bits: to their codes and back, and the scales that bring values into their range."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from ..arrays.dtypes import numpy_dtype

Float32Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_SMALLEST_SCALE = 1e-4  # of DeepSeek's quantisers: blocks of tiny values are stored as if they were larger
_SMALLEST_E4M3, _LARGEST_E4M3 = 0x01, 0x7E  # codes: 2^-9 and 448


@dataclass(frozen=True, slots=True)
class Codes:
    """A number format of at most 8 bits.

    Attributes
    ----------
    dtype
        What ml_dtypes calls it.
    largest
        Its largest number.
    per_byte
        Numbers in a byte: 1, or 2 with the first in the low nibble.
    """

    dtype: str
    largest: float
    per_byte: int = 1

    def encode(self, values: Float32Array) -> Bytes:
        """[..., n] to [..., n / per_byte] bytes: rounded to nearest even, saturated, as the GPU's conversions do.

        NaN stays NaN in formats that have one.
        """
        limited = np.clip(values, -self.largest, self.largest)
        codes: Bytes = limited.astype(numpy_dtype(self.dtype)).view(np.uint8)
        return codes if self.per_byte == 1 else codes[..., ::2] | codes[..., 1::2] << np.uint8(4)

    def decode(self, stored: Bytes) -> Float32Array:
        """[..., n / per_byte] bytes to [..., n] values, exactly."""
        values = _numbers(self.dtype, self.per_byte)[stored]
        return values.reshape(*stored.shape[:-1], stored.shape[-1] * self.per_byte)


E4M3 = Codes("float8_e4m3fn", 448.0)
E2M1 = Codes("float4_e2m1fn", 6.0, per_byte=2)
E8M0 = Codes("float8_e8m0fnu", 2.0**127)  # 2 to the power of (byte - 127): no sign, no zero


def largest_magnitudes(blocks: Float32Array) -> Float32Array:
    """The largest finite magnitude of the last axis; 0 where there is none."""
    largest = np.abs(blocks).max(axis=-1, initial=0.0)
    if not np.isfinite(largest).all():
        largest = np.abs(blocks).max(axis=-1, initial=0.0, where=np.isfinite(blocks))
    return np.asarray(largest, np.float32)


def power_of_two_scales(largest: Float32Array) -> Float32Array:
    """DeepSeek's form for e4m3: 2^ceil(log2(max(largest / 448, 1e-4)))."""
    least = np.maximum(largest / np.float32(E4M3.largest), np.float32(_SMALLEST_SCALE))
    mantissas, exponents = np.frexp(least)  # mantissas from 1/2, for powers of two, to below 1
    scales: Float32Array = np.ldexp(np.float32(1), exponents - (mantissas == 0.5))
    return scales


def e4m3_scales(largest: Float32Array) -> Float32Array:
    """For e2m1: the smallest e4m3 number by which no value passes 6; 2^-9 at least, 448 at most."""
    least = largest / np.float32(E2M1.largest)
    codes = E4M3.encode(least)
    too_small = E4M3.decode(codes) < least
    return E4M3.decode(np.clip(codes + too_small, _SMALLEST_E4M3, _LARGEST_E4M3, dtype=np.uint8))


@cache
def _numbers(dtype: str, per_byte: int) -> Float32Array:
    """What each byte means: [256], or [256, 2] where it is two numbers."""
    codes = np.arange(256, dtype=np.uint8)
    if per_byte == 2:
        codes = np.stack([codes & 0xF, codes >> 4], axis=-1)
    return codes.view(numpy_dtype(dtype)).astype(np.float32)
