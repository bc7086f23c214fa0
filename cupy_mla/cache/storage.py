"""The memory of a paged cache: the pages of all layers in one array of the user's framework, and what is done to it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays.capture import is_captured
from ..arrays.dtypes import ITEM_SIZES, dtype_of_numpy, numpy_dtype
from ..arrays.exchange import as_numpy, empty_like
from ..arrays.frameworks import CPU, CUDA, cupy_module, current_stream
from ..arrays.view import ArrayView, contiguous_strides, view
from ..call.arguments import as_integer, check_output
from ..errors import InvalidArgumentError, MissingDependencyError
from ..gpu.device import require_backend, require_cuda
from ..layouts import BF16, DENSE_LAYOUTS, CacheLayout, find_layout
from .copy_pages import copy_pages

NUMPY, CUPY, TORCH, JAX = "numpy", "cupy", "torch", "jax"
FRAMEWORKS = (NUMPY, CUPY, TORCH, JAX)
NUM_HEADS_KV = 1  # MLA keeps one latent vector per token, shared by all heads
_DEVICES = f"{CPU}, {CUDA}, {CUDA}:0 and so on, or a torch.device"


class Storage:
    """Pages in memory that is written in place: of NumPy, CuPy or torch.

    Attributes
    ----------
    pages
        [num_layers * num_pages, page_size, 1, width], uninitialised: layer by layer.
    layers
        Those of each layer, as views.
    location
        Device and its number.
    """

    def __init__(
        self,
        framework: str,
        location: tuple[str, int],
        layout: CacheLayout,
        num_layers: int,
        num_pages: int,
        page_size: int,
        page_bytes: int,
        width: int,
    ) -> None:
        self.location = location
        self._num_layers, self._num_pages = num_layers, num_pages
        total = num_layers * num_pages
        memory = _empty_bytes(framework, location, (total, page_bytes))
        token_bytes = width * ITEM_SIZES[layout.dtype]
        used = memory[:, : page_size * token_bytes].reshape(total, page_size, NUM_HEADS_KV, token_bytes)
        self.pages = typed(used, layout.dtype)
        self.layers = tuple(self.pages[i * num_pages : (i + 1) * num_pages] for i in range(num_layers))
        self._memory = memory

    def stream(self, stream: int | None) -> int | None:
        """The stream itself; for None the current one of the framework, and on the CPU none."""
        if stream is not None or self.location[0] == CPU:
            return stream
        return current_stream(self._memory, self.location[1])

    def copy_pages(self, old: Sequence[int], new: Sequence[int], stream: int | None) -> None:
        """Copy pages to others, in every layer.

        Raises
        ------
        InvalidArgumentError
            The stream is captured in a CUDA graph.
        """
        first = np.arange(self._num_layers, dtype=np.int32)[:, None] * self._num_pages
        pages = [(first + np.asarray(numbers, np.int32)).reshape(-1) for numbers in (old, new)]
        used = self.stream(stream)
        source, target = (self.upload(numbers, used) for numbers in pages)
        copy_pages(self.pages, source, target, validate=False, stream=used)

    def empty(self, num_bytes: int, stream: int | None) -> Any:
        """Uninitialised bytes on the device."""
        return empty_like(self._memory, (num_bytes,), "uint8", self.stream(stream))

    def write(self, target: Any, host: npt.NDArray[Any], stream: int | None) -> None:
        """Copy a NumPy array to a contiguous array of as many bytes on the device. The host array is read when this
        returns.

        Raises
        ------
        InvalidArgumentError
            The stream is captured in a CUDA graph.
        """
        seen = view(target, "out", stream)
        if self.location[0] == CPU:
            as_numpy(seen)[...] = host
            return
        used = self._uncaptured(stream)
        cuda = cupy_module().cuda
        with cuda.Device(self.location[1]):
            # From pageable memory the call returns when the source has been read, so the source may go away.
            if host.nbytes > 0:
                kind = cuda.runtime.memcpyHostToDevice
                cuda.runtime.memcpyAsync(seen.pointer, host.ctypes.data, host.nbytes, kind, used)

    def _uncaptured(self, stream: int | None) -> int:
        """The stream, or the current one of the framework."""
        used = self.stream(stream)
        assert used is not None  # on a GPU there is one
        if is_captured(used):  # a replay would copy what is worked out now, from memory that is gone
            expected = (
                "one that is not captured in a CUDA graph: pages and lengths are worked out on the host "
                "(step and advance before a replay, the step's append inside)"
            )
            raise InvalidArgumentError("stream", expected, "one that is")
        return used

    def upload(self, host: npt.NDArray[Any], stream: int | None) -> Any:
        """A NumPy array as an array of the framework."""
        host = np.ascontiguousarray(host)
        if self.location[0] == CPU and isinstance(self._memory, np.ndarray):
            return host
        result = empty_like(self._memory, host.shape, dtype_of_numpy(host.dtype, "out"), self.stream(stream))
        self.write(result, host, stream)
        return result

    def fill(self, out: Any, host: npt.NDArray[np.int32], stream: int | None) -> Any:
        """Write a NumPy array into one of the caller's.

        Raises
        ------
        InvalidArgumentError
            ``out`` has another shape, type or device, is not contiguous or cannot be written to.
        """
        seen = view(out, "out", stream)
        check_output(seen, "out", host.shape, "int32", self.location)
        check_contiguous(seen, host.shape)
        if stream is None and self.location[0] == CUDA:
            stream = current_stream(out, self.location[1])
        self.write(seen, np.ascontiguousarray(host), stream)
        return out


def check_contiguous(out: ArrayView, shape: tuple[int, ...]) -> None:
    """Refuse an output whose elements do not lie one after the other.

    Raises
    ------
    InvalidArgumentError
        It has other strides than a contiguous array.
    """
    expected = contiguous_strides(shape)
    if any(size > 1 and step != want for size, step, want in zip(shape, out.strides, expected, strict=True)):
        raise InvalidArgumentError("out", "a contiguous array", f"strides {out.strides}")


def typed(array: Any, dtype: str) -> Any:
    """Bytes of NumPy, CuPy or torch read as elements of a type."""
    torch = sys.modules.get(TORCH)
    if torch is not None and isinstance(array, torch.Tensor):
        return array.view(getattr(torch, dtype))
    return array.view(numpy_dtype(dtype))


def split_columns(array: Any, latent_dim: int) -> tuple[Any, Any]:
    """Latent and rope part of packed tokens."""
    return array[..., :latent_dim], array[..., latent_dim:]


def _empty_bytes(framework: str, location: tuple[str, int], shape: tuple[int, int]) -> Any:
    device, device_id = location
    if framework == TORCH:
        torch = sys.modules[TORCH]
        return torch.empty(shape, dtype=torch.uint8, device=CPU if device == CPU else f"{CUDA}:{device_id}")
    if framework == CUPY:
        cupy = cupy_module()
        with cupy.cuda.Device(device_id):
            return cupy.empty(shape, np.uint8)
    return np.empty(shape, np.uint8)


# What the arguments of a cache mean ----------------------------------------------------------------------------------


def settle_framework(framework: str | None, device: Any, dtype: Any) -> str:
    """The framework that is named, or that types and devices come from, or that suits the device.

    Raises
    ------
    InvalidArgumentError
        It is none of `FRAMEWORKS`, or has no arrays on that device.
    MissingDependencyError
        torch or JAX is not installed.
    """
    on_cpu = str(device).partition(":")[0] == CPU
    if framework is None:
        of_torch = any(type(value).__module__.partition(".")[0] == TORCH for value in (device, dtype))
        framework = TORCH if of_torch else NUMPY if on_cpu else CUPY
    if framework not in FRAMEWORKS:
        raise InvalidArgumentError("framework", "one of " + ", ".join(FRAMEWORKS), repr(framework))
    if framework == (CUPY if on_cpu else NUMPY):
        raise InvalidArgumentError("framework", f"one that has arrays on {device}", framework)
    if framework in (TORCH, JAX):
        try:
            __import__(framework)
        except ImportError as error:
            raise MissingDependencyError(framework, framework, f"a cache of framework={framework!r}") from error
    return framework


def settle_device(device: Any, framework: str) -> tuple[str, int]:
    """Device and its number; where none is given, the one that is current in the framework (in CuPy for JAX's arrays).

    Raises
    ------
    InvalidArgumentError
        It is no device.
    UnsupportedDeviceError
        It is not what the setting CUPY_MLA_BACKEND asks for, or there is no Hopper GPU.
    """
    kind, colon, number = str(device).partition(":")
    if kind not in (CPU, CUDA) or (colon and not number.isdecimal()) or (kind == CPU and number not in ("", "0")):
        raise InvalidArgumentError("device", _DEVICES, repr(device))
    if kind == CPU:
        require_backend(CPU, 0, "the cache")
        return CPU, 0
    require_cuda()
    if colon:
        device_id = int(number)
    elif framework == TORCH:
        device_id = int(sys.modules[TORCH].cuda.current_device())
    else:
        device_id = int(cupy_module().cuda.runtime.getDevice())
    count = int(cupy_module().cuda.runtime.getDeviceCount())
    if device_id >= count:
        raise InvalidArgumentError("device", f"{CUDA}:0 to {CUDA}:{count - 1}", str(device))
    require_backend(CUDA, device_id, "the cache")
    return CUDA, device_id


def _name_dtype(dtype: Any) -> Any:
    """The name of an element type, of any framework's making; what is none stays as it is."""
    if dtype is None or isinstance(dtype, str):
        return dtype
    if type(dtype).__module__.partition(".")[0] == TORCH:
        return str(dtype).removeprefix("torch.")
    try:
        return np.dtype(dtype).name
    except TypeError:
        return dtype


def settle_layout(dtype: Any, layout: CacheLayout | str | None) -> CacheLayout:
    """The layout that is named, or the dense one of a type.

    Raises
    ------
    InvalidArgumentError
        The type or the layout is unknown, or both are given.
    """
    dtype = _name_dtype(dtype)
    if layout is not None:
        if dtype is not None:
            raise InvalidArgumentError("layout", f"None beside dtype={dtype!r}", repr(layout))
        return find_layout(layout)
    if dtype is None:
        return BF16
    if not isinstance(dtype, str) or dtype not in DENSE_LAYOUTS:
        raise InvalidArgumentError("dtype", "one of " + ", ".join(DENSE_LAYOUTS), repr(dtype))
    return DENSE_LAYOUTS[dtype]


def spread(values: Any, num_layers: int, name: str) -> tuple[Any, ...]:
    """One value for each layer: those of a list, or the same for all.

    Raises
    ------
    InvalidArgumentError
        The list has another length.
    """
    if not isinstance(values, Sequence):
        return (values,) * num_layers
    if len(values) != num_layers:
        raise InvalidArgumentError(name, f"one value, or {num_layers}: one for each layer", f"{len(values)}")
    return tuple(values)


def size(value: Any, name: str, least: int = 1) -> int:
    """An integer.

    Raises
    ------
    InvalidArgumentError
        It is none, or less than the least.
    """
    number = as_integer(value, name)
    if number < least:
        raise InvalidArgumentError(name, f"at least {least}", str(number))
    return number
