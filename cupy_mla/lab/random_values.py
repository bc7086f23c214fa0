"""Random normal values, mean 0 and variance 1, made where they are used: caches of several GB are never copied.

CuPy's own generators need the cuRAND library, which the package does not install, so a small counter-based one is here:
every value depends on the seed and its index only.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays.dtypes import numpy_dtype

Array = npt.NDArray[Any]

_CHUNK_VALUES = 1 << 24  # values made at a time on the host: 64 MB of float32
_THREADS = 256
_BLOCKS = 2048  # enough to fill any GPU; each thread loops

# splitmix64 (Steele, Lea, Flood 2014) gives 64 bits per index, Box-Muller turns them into a normal value. The float32
# value is rounded to nearest even by hand, which needs no header; half-precision subnormals become 0.
_FILL_NORMAL = r"""
__device__ unsigned long long mix(unsigned long long z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}
__device__ unsigned round_even(unsigned bits, int dropped) {
    return (bits + (1u << (dropped - 1)) - 1 + ((bits >> dropped) & 1)) >> dropped;
}
extern "C" __global__ void fill_normal(unsigned short* out, long long count, unsigned long long seed, int bfloat16) {
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        const unsigned long long bits = mix(mix(seed) + (i + 1) * 0x9e3779b97f4a7c15ull);
        const float uniform = (static_cast<unsigned>(bits >> 40) + 1) * (1.0f / (1 << 24));  // (0, 1]
        const float angle = static_cast<unsigned>(bits & 0xffffff) * (6.2831853f / (1 << 24));
        const float value = sqrtf(-2.0f * logf(uniform)) * cosf(angle);
        const unsigned raw = __float_as_uint(value);
        const unsigned magnitude = raw & 0x7fffffffu;
        const unsigned half = magnitude < 0x38800000u ? 0 : round_even(magnitude - 0x38000000u, 13);
        out[i] = bfloat16 ? round_even(raw, 16) : ((raw >> 16) & 0x8000u) | half;
    }
}
"""


def host_normal(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    """A C-contiguous NumPy array of ``bfloat16`` or ``float16``; the same seed gives the same values."""
    values = np.empty(math.prod(shape), dtype=numpy_dtype(dtype))
    rng = np.random.default_rng(seed)
    for start in range(0, values.size, _CHUNK_VALUES):
        chunk = values[start : start + _CHUNK_VALUES]
        chunk[:] = rng.standard_normal(chunk.size, dtype=np.float32).astype(values.dtype)
    return values.reshape(shape)


def device_normal(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    """The same as a CuPy array on the current device; its values are others than those of `host_normal`."""
    import cupy

    bits = cupy.empty(shape, dtype=np.uint16)
    arguments = (bits, np.int64(bits.size), np.uint64(seed), np.int32(dtype == "bfloat16"))
    _fill_normal_kernel()((_BLOCKS,), (_THREADS,), arguments)
    return bits.view(numpy_dtype(dtype))


@functools.cache
def _fill_normal_kernel() -> Any:
    import cupy

    return cupy.RawKernel(_FILL_NORMAL, "fill_normal")
