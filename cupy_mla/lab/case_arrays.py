"""Arrays of cases on either backend: random values made where they are used, moves, and gathered pages.

Values are normal with mean 0 and variance 1. Caches of several GB are made on the device, never copied there. CuPy's
own generators need the cuRAND library, which the package does not install, so a small counter-based one is here:
every value depends on the seed and its index only.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
# One array for latent and rope columns; one for each; a view into a larger pool.
STORAGES = ("packed", "split", "strided")

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


def random_normal(shape: tuple[int, ...], dtype: str, seed: int, backend: str) -> Any:
    """A C-contiguous array of normal values (mean 0, variance 1).

    Parameters
    ----------
    shape, dtype
        ``dtype`` is ``bfloat16`` or ``float16``.
    seed
        The same seed gives the same values on the same backend.
    backend
        ``numpy``, or ``cuda`` for a CuPy array on the current device.
    """
    if backend == "cuda":
        return _device_normal(shape, dtype, seed)
    values = np.empty(math.prod(shape), dtype=DTYPES[dtype])
    rng = np.random.default_rng(seed)
    for start in range(0, values.size, _CHUNK_VALUES):
        chunk = values[start : start + _CHUNK_VALUES]
        chunk[:] = rng.standard_normal(chunk.size, dtype=np.float32).astype(values.dtype)
    return values.reshape(shape)


def _device_normal(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    import cupy

    bits = cupy.empty(shape, dtype=np.uint16)
    arguments = (bits, np.int64(bits.size), np.uint64(seed), np.int32(dtype == "bfloat16"))
    _fill_normal_kernel()((_BLOCKS,), (_THREADS,), arguments)
    return bits.view(DTYPES[dtype])


@functools.cache
def _fill_normal_kernel() -> Any:
    import cupy

    return cupy.RawKernel(_FILL_NORMAL, "fill_normal")


def to_device(array: Array) -> Any:
    """A copy on the current CUDA device, as a CuPy array of the same type."""
    import cupy

    if array.dtype in DTYPES.values():  # moved as bits: CuPy's own bfloat16 conversions are young
        return cupy.asarray(np.ascontiguousarray(array).view(np.uint16)).view(array.dtype)
    return cupy.asarray(array)


def to_host(array: Any) -> Array:
    """A NumPy array with the values of a NumPy or CuPy array."""
    if isinstance(array, np.ndarray):
        return array
    import cupy

    if array.dtype in DTYPES.values():
        host: Array = cupy.asnumpy(array.view(np.uint16)).view(array.dtype)
        return host
    return np.asarray(cupy.asnumpy(array))


def take_pages(kv_cache: Any, pages: npt.NDArray[np.int64]) -> Array:
    """Pages of a cache [num_pages, page_size, h_kv, d], in the order given, on the host."""
    if isinstance(kv_cache, np.ndarray):
        return kv_cache[pages]
    import cupy

    return to_host(kv_cache.view(np.uint16)[cupy.asarray(pages)].view(kv_cache.dtype))
