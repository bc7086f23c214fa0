"""Memory for results, handed back in the framework of the caller; and the values of any array as NumPy sees them."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np

from ..errors import InvalidArgumentError
from .capture import is_captured, keep_for_graph, keep_tensor, release_kept
from .dtypes import numpy_dtype
from .frameworks import CPU, cupy_module, current_stream, dlpack_location, framework_of, on_stream, torch_stream
from .view import ArrayView, Shared, source_of, view

_in_flight: deque[tuple[Any, list[Any]]] = deque()
_in_flight_lock = threading.Lock()


def empty_like(obj: Any, shape: tuple[int, ...], dtype: str, stream: int | None = None) -> Any:
    """An uninitialised C-contiguous array on the device of ``obj``, from the allocator of its framework.

    One that is made while a CUDA graph is captured lives at least as long as the graph.

    Parameters
    ----------
    obj
        The array whose framework and device count.
    shape
        Extents of the new array.
    dtype
        Name of its element type.
    stream
        CUDA stream that the array will be used on: allocators reuse memory in the order of the stream it was asked for
        on. None: the current stream.

    Returns
    -------
    object
        A torch tensor, a CuPy array or a NumPy array. JAX and unknown frameworks have no allocator to ask: they get
        a CuPy array (CUDA) or a NumPy array (CPU), which `finish` converts once it is filled.

    Raises
    ------
    MissingDependencyError
        CuPy or cuda-bindings is needed and not installed.
    DriverError
        CUDA refused to tie the array to the graph that is captured.
    """
    framework = framework_of(obj)
    if framework == "torch":
        torch = sys.modules["torch"]
        torch_dtype = getattr(torch, dtype)
        size = shape if len(shape) != 1 else shape[0]  # torch reads a number in a third of the time of a tuple
        if not obj.is_cuda:
            return obj.new_empty(size, dtype=torch_dtype)
        with nullcontext() if stream is None else torch_stream(stream, obj.device):
            tensor = obj.new_empty(size, dtype=torch_dtype)
        keep_tensor(tensor, current_stream(obj, obj.get_device()) if stream is None else stream)
        return tensor
    if framework == "numpy":
        return np.empty(shape, numpy_dtype(dtype))
    if framework == "cupy":
        device_id = obj.data.device_id
    else:
        device, device_id = dlpack_location(obj, "array")
        if device == CPU:
            return np.empty(shape, numpy_dtype(dtype))
    return _empty_cupy(shape, dtype, device_id, stream)


def _empty_cupy(shape: tuple[int, ...], dtype: str, device_id: int, stream: int | None) -> Any:
    cupy = cupy_module()
    release_kept()
    with on_stream(device_id, stream):
        array = cupy.empty(shape, numpy_dtype(dtype))
        used = cupy.cuda.get_current_stream().ptr if stream is None else stream
        if is_captured(used):
            keep_for_graph([array], used)
    return array


def finish(obj: Any, result: Any, stream: int | None = None) -> Any:
    """Hand a filled result of `empty_like` back in the framework of ``obj``.

    Parameters
    ----------
    obj
        The array that `empty_like` was asked with.
    result
        What `empty_like` returned.
    stream
        Stream that fills ``result``; the framework's own work is ordered behind it. None: CuPy's current stream.

    Returns
    -------
    object
        ``result`` itself, or an array of the framework over the same memory. An unknown framework whose module has
        no ``from_dlpack``, or cannot take this type, gets ``result`` itself.
    """
    framework = framework_of(obj)
    if framework == "jax":
        jax = sys.modules["jax"]
        if isinstance(result, np.ndarray):
            return jax.device_put(result, next(iter(obj.devices())))
        with on_stream(result.device.id, stream):
            return jax.dlpack.from_dlpack(result)
    if framework == "dlpack":
        module = sys.modules.get(type(obj).__module__.partition(".")[0])
        from_dlpack = getattr(module, "from_dlpack", None)
        if from_dlpack is not None:
            try:
                with nullcontext() if isinstance(result, np.ndarray) else on_stream(result.device.id, stream):
                    return from_dlpack(result)
            except (BufferError, TypeError, ValueError):
                return result  # e.g. NumPy, which exports no bfloat16
    return result


def stacked(arrays: Any, name: str, stream: int | None = None) -> Any:
    """A list or tuple of arrays as one array with an axis more, the first; an array stays as it is.

    Parameters
    ----------
    arrays
        Arrays of one framework, shape, type and device.
    name
        What the caller calls them; used in errors.
    stream
        CUDA stream to copy on. None: the current one of their framework.

    Raises
    ------
    InvalidArgumentError
        There is none, they differ, or their framework is none of NumPy, torch, CuPy and JAX.
    """
    if not isinstance(arrays, (list, tuple)):
        return arrays
    if not arrays:
        raise InvalidArgumentError(name, "at least one array", "none")
    said = []
    for index, array in enumerate(arrays):
        seen = view(array, f"{name}[{index}]", stream)
        said.append((seen.dtype, seen.shape, seen.location, framework_of(array)))
    for index, words in enumerate(said):
        if words != said[0]:
            expected, got = (" ".join(map(str, (*w[:2], "on", *w[2], "of", w[3]))) for w in (said[0], words))
            raise InvalidArgumentError(f"{name}[{index}]", f"{expected}, as {name}[0]", got)
    dtype, _, (device, device_id), framework = said[0]
    if framework == "numpy":
        return np.stack(arrays)
    if framework == "jax":
        return sys.modules["jax"].numpy.stack(arrays)
    if framework == "torch":
        torch = sys.modules["torch"]
        if stream is None or device == CPU:
            return torch.stack(list(arrays))
        with torch_stream(stream, arrays[0].device):
            return torch.stack(list(arrays))
    if framework == "cupy":
        result = _empty_cupy((len(arrays), *arrays[0].shape), dtype, device_id, stream)
        bits = f"u{result.itemsize}"  # CuPy's own kernels do not know every type
        with on_stream(device_id, stream):
            for index, array in enumerate(arrays):
                result.view(bits)[index] = array.view(bits)
        return result
    raise InvalidArgumentError(name, "one array (a list only of NumPy, torch, CuPy or JAX)", f"a list of {framework}")


def keep_imported(views: Iterable[ArrayView | None], stream: int) -> None:
    """Keep memory that came through DLPack alive until the work queued on ``stream`` so far is done.

    JAX frees memory as soon as the last reference goes and reuses it on a stream of its own; it does not know that a
    kernel on ``stream`` still reads. (torch and CuPy reuse memory in the order of the stream it was used on.) What is
    captured in a CUDA graph is read whenever it is replayed: that keeps the memory.

    Parameters
    ----------
    views
        Of arrays on one CUDA device; None for one that is not there. Those of torch and CuPy need no keeping.
    stream
        ``cudaStream_t`` of that device.
    """
    imported = [array for array in views if array is not None and isinstance(array.owner, Shared)]
    if not imported:
        return
    cupy = cupy_module()
    if is_captured(stream):
        keep_for_graph([array.owner for array in imported], stream)
        return
    device_id = imported[0].device_id
    with cupy.cuda.Device(device_id):  # an event belongs to the GPU that is current
        event = cupy.cuda.Event(disable_timing=True)
        event.record(cupy.cuda.ExternalStream(stream, device_id))
    with _in_flight_lock:
        while _in_flight and _in_flight[0][0].done:
            _in_flight.popleft()
        _in_flight.append((event, [array.owner for array in imported]))


def as_numpy(array: Any, stream: int | None = None) -> np.ndarray:
    """The array's values as NumPy sees them.

    Parameters
    ----------
    array
        An `ArrayView` or an array; any shape and element type (bfloat16 and FP8 as ml_dtypes).
    stream
        For CUDA arrays, the stream that produces the values. None: the current stream of the array's framework.

    Returns
    -------
    numpy.ndarray
        CPU arrays: the same memory, with the same strides. CUDA arrays: a copy, after a synchronisation.

    Raises
    ------
    InvalidArgumentError
        The object cannot be read as an array, for the reasons that `view` names; or the stream is captured in a CUDA
        graph, when ``argument`` is "validate", for which values are read.
    MissingDependencyError
        A CUDA array came and CuPy is not installed.
    """
    if isinstance(array, np.ndarray):
        return np.asarray(array)  # a plain one: subclasses may mean anything by an index
    source = array if isinstance(array, ArrayView) else view(array, "array", stream)
    owner = source.owner
    if isinstance(owner, np.ndarray) and owner.shape == source.shape and owner.ctypes.data == source.pointer:
        return np.asarray(owner)
    dtype = numpy_dtype(source.dtype)
    strides = tuple(step * source.itemsize for step in source.strides)
    if 0 in source.shape:
        return np.empty(source.shape, dtype)
    if source.device == CPU:
        return np.asarray(_HostMemory(source, strides)).view(dtype)
    cupy = cupy_module()
    with cupy.cuda.Device(source.device_id):
        if stream is None:
            stream = current_stream(source_of(source), source.device_id)
        if is_captured(stream):
            expected = "False, or CUPY_MLA_VALIDATE off, while a CUDA graph is captured (no value can be read then)"
            raise InvalidArgumentError("validate", expected, "values to be checked")
        with cupy.cuda.ExternalStream(stream, source.device_id):
            spans = [(extent - 1) * step for extent, step in zip(source.shape, strides, strict=True)]
            before = -sum(span for span in spans if span < 0)  # bytes ahead of the first element
            size = sum(map(abs, spans)) + source.itemsize
            memory = cupy.cuda.UnownedMemory(source.pointer - before, size, source.owner, source.device_id)
            # As unsigned integers: a strided array is packed by a CuPy kernel first, which needs a type it knows.
            words = cupy.ndarray(
                source.shape, f"u{source.itemsize}", cupy.cuda.MemoryPointer(memory, before), strides=strides
            )
            return np.asarray(words.get()).view(dtype)


class _HostMemory:
    """CPU memory of another framework, as NumPy's array interface describes it; NumPy keeps a reference to this."""

    def __init__(self, source: ArrayView, strides: tuple[int, ...]) -> None:
        self.owner = source.owner
        self.__array_interface__ = {
            "version": 3,
            "data": (source.pointer, False),
            "shape": source.shape,
            "strides": strides,
            "typestr": np.dtype(f"u{source.itemsize}").str,
        }
