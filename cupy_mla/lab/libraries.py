"""Array libraries: the one place that makes, fills and moves the arrays of cases, with NumPy, CuPy or torch.

Values of 16 and of 8 bits are moved and filled as bits: conversions of bfloat16 are young in CuPy, and NumPy has it and
e4m3 only through ml_dtypes.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..arrays.dtypes import numpy_dtype
from ..arrays.view import view
from .random_values import Array, device_normal, host_normal

_BITS = {dtype.itemsize: dtype for dtype in (np.dtype(np.uint8), np.dtype(np.uint16))}  # by bytes of an element


class ArrayLibrary(Protocol):
    """What is needed of a library, all on one device."""

    name: str

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        """A contiguous array of normal values; the same seed gives the same values."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A contiguous array of anything; ``dtype`` has 16 or 8 bits."""

    def fill(self, target: Any, bits: int) -> None:
        """Set every element of an array of a type of 16 or 8 bits to these bits."""

    def assign(self, target: Any, source: Any) -> None:
        """``target[...] = source`` with broadcasting, of one type of 16 or 8 bits."""

    def upload(self, array: Array) -> Any:
        """A copy of a host array of any type, with its strides and with what lies between its elements."""

    def download(self, array: Any) -> Array:
        """The values of an array, on the host."""

    def take_pages(self, cache: Any, pages: npt.NDArray[np.int64]) -> Array:
        """Pages of a cache [num_pages, ...], in the order given, on the host."""

    def synchronize(self) -> None:
        """Wait until the device is done; raises what a kernel did wrong."""

    def release(self) -> None:
        """Give memory that no array uses back to the device, so that the next array finds room in one piece."""


class NumpyLibrary:
    """Arrays in host memory."""

    name = "numpy"

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> Array:
        return host_normal(shape, dtype, seed)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return np.empty(shape, numpy_dtype(dtype))

    def fill(self, target: Array, bits: int) -> None:
        _as_bits(target)[...] = bits

    def assign(self, target: Array, source: Array) -> None:
        target[...] = source

    def upload(self, array: Array) -> Array:
        return array

    def download(self, array: Array) -> Array:
        return array

    def take_pages(self, cache: Array, pages: npt.NDArray[np.int64]) -> Array:
        return cache[pages]

    def synchronize(self) -> None: ...

    def release(self) -> None: ...


class CupyLibrary:
    """CuPy arrays on its current device."""

    name = "cupy"

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        return device_normal(shape, dtype, seed)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        import cupy

        element = numpy_dtype(dtype)
        return cupy.empty(shape, _BITS[element.itemsize]).view(element)

    def fill(self, target: Any, bits: int) -> None:
        _as_bits(target)[...] = bits

    def assign(self, target: Any, source: Any) -> None:
        _as_bits(target)[...] = _as_bits(source)

    def upload(self, array: Array) -> Any:
        import cupy

        memory = cupy.asarray(_as_bits(_memory_of(array))).view(array.dtype)
        return cupy.lib.stride_tricks.as_strided(memory, array.shape, array.strides)

    def download(self, array: Any) -> Array:
        import cupy

        host: Array = cupy.asnumpy(_as_bits(array)).view(array.dtype)
        return host

    def take_pages(self, cache: Any, pages: npt.NDArray[np.int64]) -> Array:
        import cupy

        return self.download(_as_bits(cache)[cupy.asarray(pages)].view(cache.dtype))

    def synchronize(self) -> None:
        import cupy

        cupy.cuda.Device().synchronize()

    def release(self) -> None:
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()


class TorchLibrary:
    """torch tensors on its current CUDA device, or another one."""

    name = "torch"

    def __init__(self, device: str = "cuda") -> None:
        self._device = device

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        import torch

        generator = torch.Generator(self._device).manual_seed(seed)
        return self.empty(shape, dtype).normal_(generator=generator)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)

    def fill(self, target: Any, bits: int) -> None:
        import torch

        target.view(torch.int16 if target.element_size() > 1 else torch.uint8).fill_(bits)

    def assign(self, target: Any, source: Any) -> None:
        target.copy_(source)

    def upload(self, array: Array) -> Any:
        import torch

        # torch reads no array of ml_dtypes, and knows few operations on numbers without a sign of more than 8 bits.
        memory = _memory_of(array)
        if array.dtype.itemsize in _BITS:
            bits = np.uint8 if array.itemsize == 1 else np.int16
            tensor = torch.tensor(memory.view(bits), device=self._device).view(getattr(torch, array.dtype.name))
        else:
            tensor = torch.tensor(memory, device=self._device)
        return tensor.as_strided(array.shape, [stride // array.itemsize for stride in array.strides])

    def download(self, array: Any) -> Array:
        import torch

        size = array.element_size()
        if size not in _BITS:
            host: Array = array.cpu().numpy()
            return host
        bits: Array = array.view(torch.uint8 if size == 1 else torch.int16).cpu().numpy()
        return bits.view(numpy_dtype(str(array.dtype).removeprefix("torch.")))

    def take_pages(self, cache: Any, pages: npt.NDArray[np.int64]) -> Array:
        import torch

        bits = cache.view(torch.uint8) if cache.element_size() == 1 else cache  # it does not index every type
        host = self.download(bits[self.upload(pages)])
        return host.view(numpy_dtype(str(cache.dtype).removeprefix("torch.")))

    def synchronize(self) -> None:
        import torch

        if self._device != "cpu":
            torch.cuda.synchronize()

    def release(self) -> None:
        import torch

        torch.cuda.empty_cache()


def empty_cache_like(library: ArrayLibrary, cache: Any) -> Any:
    """A cache of the same shape and type, with its pages as far apart. Anything is in it."""
    given = view(cache, "cache")
    page = int(np.prod(given.shape[1:]))
    memory = library.empty((given.shape[0], max(given.strides[0], page)), given.dtype)
    return memory[:, :page].reshape(given.shape)


NUMPY = NumpyLibrary()
CUPY = CupyLibrary()
LIBRARY_OF_BACKEND: dict[str, ArrayLibrary] = {"numpy": NUMPY, "cuda": CUPY}


def _memory_of(array: Array) -> Array:
    """From an array's first element to its last, with what lies between them, as one row."""
    if array.size == 0:
        return np.empty(0, array.dtype)
    last = sum((extent - 1) * stride for extent, stride in zip(array.shape, array.strides, strict=True))
    return np.lib.stride_tricks.as_strided(array, (1 + last // array.itemsize,), (array.itemsize,))


def _as_bits(array: Any) -> Any:
    """An array of NumPy or CuPy as numbers without a sign; one of larger elements as it is."""
    return array.view(_BITS[array.dtype.itemsize]) if array.dtype.itemsize in _BITS else array
