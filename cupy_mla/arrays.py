"""Arrays of any framework, in and out, without copies.

`view` describes an array by what a kernel needs: address, shape, strides, type, device. NumPy, torch and CuPy arrays
are read through their own attributes (faster than DLPack, and NumPy cannot export bfloat16 through it); everything
else comes in through ``__dlpack__``. No framework is imported here unless an array of it was passed in, except CuPy,
which holds the results of CUDA calls of frameworks that have no allocator to ask.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from .errors import InvalidArgumentError, MissingDependencyError

CPU = "cpu"
CUDA = "cuda"
Layout = tuple[Any, ...]

# Bytes per element of every type that is taken in, by the name NumPy, torch and DLPack agree on.
ITEM_SIZES = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
}
# Types that NumPy has only through ml_dtypes.
_ML_DTYPES = frozenset({"bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"})

# The stream numbers of DLPack: 0 would be ambiguous, 1 is CUDA's legacy default stream.
_DLPACK_LEGACY_STREAM = 1


class _DLDevice(IntEnum):
    """DLPack's device types that memory of ours can have."""

    CPU = 1
    CUDA = 2
    CUDA_HOST = 3
    CUDA_MANAGED = 13


_DEVICE_OF_DLPACK = {
    _DLDevice.CPU: CPU,
    _DLDevice.CUDA: CUDA,
    _DLDevice.CUDA_HOST: CPU,  # pinned memory is read by the host
    _DLDevice.CUDA_MANAGED: CUDA,
}


@dataclass(slots=True, eq=False)
class ArrayView:
    """What a kernel needs to know of an array.

    Attributes
    ----------
    pointer
        Address of the first element.
    shape, strides
        Extents and strides; strides in elements, not bytes.
    dtype
        Name of the element type, e.g. ``"bfloat16"``.
    device
        ``"cpu"`` or ``"cuda"``.
    device_id
        Number of the CUDA device; 0 for the CPU.
    owner
        Object that keeps the memory alive.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: str
    device_id: int
    owner: Any

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEM_SIZES[self.dtype]

    @property
    def location(self) -> tuple[str, int]:
        """Device and its number, comparable between arrays."""
        return self.device, self.device_id


def view(obj: Any, name: str, stream: int | None = None) -> ArrayView:
    """Describe ``obj`` without copying it.

    Parameters
    ----------
    obj
        An array of NumPy, torch, CuPy or JAX, or any object with ``__dlpack__``. Any shape.
    name
        What the caller calls it; used in errors.
    stream
        CUDA stream (``cudaStream_t`` as an integer) that will use the array. Work that still produces the array is
        ordered before it, for frameworks that hand out arrays before they are computed (JAX). None: the framework's
        current stream.

    Returns
    -------
    ArrayView
        Description that keeps the memory of ``obj`` alive.

    Raises
    ------
    InvalidArgumentError
        ``obj`` is no array, has no memory of its own (a tracer, a sparse or a meta tensor), or has an element type
        or device that nothing here can use.
    """
    reader = _READERS.get(type(obj))
    if reader is None:
        array_type = type(obj)
        reader = _READERS[array_type] = _READER_OF_FRAMEWORK[framework_of(obj, name)]
        sketcher = _SKETCHER_OF_TYPE.get((array_type.__module__, array_type.__name__))
        if sketcher is not None:
            _SKETCHERS[array_type] = sketcher
            if sketcher is _sketch_torch:
                _TORCH_TYPES.add(array_type)
    return reader(obj, name, stream)


def sketch(arrays: Iterable[Any]) -> tuple[list[int], list[Any]] | None:
    """Addresses, and everything else that `view` would say, in a form that is only good for comparing.

    Takes half the time of `view`, and checks nothing: equal layouts of arrays whose views were found good are good.

    Parameters
    ----------
    arrays
        Arrays, or None for one that is not there.

    Returns
    -------
    (list of int, list) or None
        For each array its address (0 if not there), and the layouts of all, one behind the other. None when there is
        an array that only `view` can read, or that has no memory.
    """
    pointers: list[int] = []
    layouts: list[Any] = []
    try:
        for array in arrays:
            if array is None:
                pointers.append(0)
                layouts.append(None)
                continue
            pointer, layout = _SKETCHERS[type(array)](array)
            if not pointer:
                return None
            pointers.append(pointer)
            layouts += layout
    except Exception:  # not seen before, or a tensor without memory; `view` finds the words
        return None
    return pointers, layouts


def sketch_tensors(a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> tuple[tuple[int, ...], tuple[Any, ...]] | None:
    """`sketch` of six torch tensors: what decoding with given outputs takes, and so written out that it takes 2 us.

    Returns
    -------
    (tuple of int, tuple) or None
        Addresses and layouts as `sketch` gives them. None unless all are torch tensors with memory.
    """
    kind = type(a)
    if kind not in _TORCH_TYPES or not (kind is type(b) is type(c) is type(d) is type(e) is type(f)):
        return None
    try:
        pointers = a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr(), e.data_ptr(), f.data_ptr()
        if 0 in pointers:
            return None
        return pointers, (
            a.shape, a.is_contiguous() or a.stride(), a.dtype, a.device,
            b.shape, b.is_contiguous() or b.stride(), b.dtype, b.device,
            c.shape, c.is_contiguous() or c.stride(), c.dtype, c.device,
            d.shape, d.is_contiguous() or d.stride(), d.dtype, d.device,
            e.shape, e.is_contiguous() or e.stride(), e.dtype, e.device,
            f.shape, f.is_contiguous() or f.stride(), f.dtype, f.device,
        )  # fmt: skip
    except Exception:  # a tensor without memory; `view` finds the words
        return None


def pointer_of(array: Any) -> int:
    """Address of an array's first element.

    Raises
    ------
    InvalidArgumentError
        As in `view`.
    """
    sketcher = _SKETCHERS.get(type(array))
    return view(array, "array").pointer if sketcher is None else sketcher(array)[0]


def framework_of(obj: Any, name: str = "array") -> str:
    """Which framework an array belongs to, without importing that framework.

    Returns
    -------
    str
        ``"numpy"``, ``"torch"``, ``"cupy"``, ``"jax"``, or ``"dlpack"`` for another one that speaks DLPack.

    Raises
    ------
    InvalidArgumentError
        ``obj`` is no array; ``argument`` is ``name``.
    """
    array_type = type(obj)
    framework = _FRAMEWORKS.get(array_type)
    if framework is None:
        framework = _FRAMEWORKS[array_type] = _find_framework(array_type, name)
    return framework


def check_stream(stream: int | None) -> None:
    """Refuse a stream that is no number: the frameworks' own stream objects have it as an attribute.

    Raises
    ------
    InvalidArgumentError
        It is neither an integer nor None.
    """
    if stream is not None and type(stream) is not int:
        raise InvalidArgumentError(
            "stream", "an integer (torch: stream.cuda_stream, CuPy: stream.ptr) or None", type(stream).__name__
        )


def current_stream(obj: Any, device_id: int) -> int:
    """The stream that the framework of ``obj`` currently queues its work on.

    Parameters
    ----------
    obj
        An array on a CUDA device.
    device_id
        Number of that device.

    Returns
    -------
    int
        ``cudaStream_t``; 0 is the legacy default stream. Frameworks that have no notion of a current stream (JAX)
        get CuPy's.

    Raises
    ------
    MissingDependencyError
        CuPy is needed and not installed.
    """
    if framework_of(obj) == "torch":
        return int(sys.modules["torch"]._C._cuda_getCurrentRawStream(device_id))
    return int(_cupy().cuda.get_current_stream(device_id).ptr)


def empty_like(obj: Any, shape: tuple[int, ...], dtype: str, stream: int | None = None) -> Any:
    """An uninitialised C-contiguous array on the device of ``obj``, from the allocator of its framework.

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
        CuPy is needed and not installed.
    """
    framework = framework_of(obj)
    if framework == "torch":
        torch = sys.modules["torch"]
        if stream is None or not obj.is_cuda:
            return obj.new_empty(shape, dtype=getattr(torch, dtype))
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=obj.device)):
            return obj.new_empty(shape, dtype=getattr(torch, dtype))
    if framework == "numpy":
        return np.empty(shape, numpy_dtype(dtype))
    if framework == "cupy":
        device_id = obj.data.device_id
    else:
        device, device_id = _dlpack_location(obj, "array")
        if device == CPU:
            return np.empty(shape, numpy_dtype(dtype))
    with _on_stream(device_id, stream):
        return _cupy().empty(shape, numpy_dtype(dtype))


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
        with _on_stream(result.device.id, stream):
            return jax.dlpack.from_dlpack(result)
    if framework == "dlpack":
        module = sys.modules.get(type(obj).__module__.partition(".")[0])
        from_dlpack = getattr(module, "from_dlpack", None)
        if from_dlpack is not None:
            try:
                with nullcontext() if isinstance(result, np.ndarray) else _on_stream(result.device.id, stream):
                    return from_dlpack(result)
            except (BufferError, TypeError, ValueError):
                return result  # e.g. NumPy, which exports no bfloat16
    return result


def keep_imported(views: Iterable[ArrayView | None], stream: int) -> None:
    """Keep memory that came through DLPack alive until the work queued on ``stream`` so far is done.

    JAX frees memory as soon as the last reference goes and reuses it on a stream of its own; it does not know that a
    kernel on ``stream`` still reads. (torch and CuPy reuse memory in the order of the stream it was used on.)

    Parameters
    ----------
    views
        Of arrays on one CUDA device; None for one that is not there. Those of torch and CuPy need no keeping.
    stream
        ``cudaStream_t`` of that device.
    """
    imported = [array for array in views if array is not None and isinstance(array.owner, _Shared)]
    if not imported:
        return
    cupy = _cupy()
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
        As in `view`.
    MissingDependencyError
        A CUDA array came and CuPy is not installed.
    """
    if isinstance(array, np.ndarray):
        return array
    source = array if isinstance(array, ArrayView) else view(array, "array", stream)
    owner = source.owner
    if isinstance(owner, np.ndarray) and owner.shape == source.shape and owner.ctypes.data == source.pointer:
        return owner
    dtype = numpy_dtype(source.dtype)
    strides = tuple(step * source.itemsize for step in source.strides)
    if 0 in source.shape:
        return np.empty(source.shape, dtype)
    if source.device == CPU:
        return np.asarray(_HostMemory(source, strides)).view(dtype)
    cupy = _cupy()
    with cupy.cuda.Device(source.device_id):
        if stream is None:
            stream = current_stream(source_of(source), source.device_id)
        with cupy.cuda.ExternalStream(stream, source.device_id):
            spanned = sum((extent - 1) * step for extent, step in zip(source.shape, strides, strict=True))
            memory = cupy.cuda.UnownedMemory(source.pointer, spanned + source.itemsize, source.owner, source.device_id)
            # As unsigned integers: a strided array is packed by a CuPy kernel first, which needs a type it knows.
            words = cupy.ndarray(
                source.shape, f"u{source.itemsize}", cupy.cuda.MemoryPointer(memory, 0), strides=strides
            )
            return np.asarray(words.get()).view(dtype)


def source_of(array: ArrayView) -> Any:
    """The caller's own object behind a view."""
    return array.owner.source if isinstance(array.owner, _Shared) else array.owner


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy type of an element type name; bfloat16 and FP8 come from ml_dtypes."""
    dtype = _NUMPY_OF_NAME.get(name)
    if dtype is None:
        if name in _ML_DTYPES:
            import ml_dtypes

            dtype = np.dtype(getattr(ml_dtypes, name))
        else:
            dtype = np.dtype(name)
        _NUMPY_OF_NAME[name] = dtype
    return dtype


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a C-contiguous array of that shape."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


# ---------------------------------------------------------------------------------------------------------------------
# One reader per framework


def _read_torch(tensor: Any, name: str, stream: int | None) -> ArrayView:
    try:
        pointer = tensor.data_ptr()
        strides = tensor.stride()
        dtype = _TORCH_DTYPES[tensor.dtype]
    except KeyError:
        # The first tensor of its type: torch writes its types as "torch.bfloat16".
        dtype_name = str(tensor.dtype).removeprefix("torch.")
        _TORCH_DTYPES[tensor.dtype] = _known_dtype(dtype_name, name)
        return _read_torch(tensor, name, stream)
    except RuntimeError as error:  # sparse layouts, fake tensors, tensor subclasses without storage
        raise InvalidArgumentError(name, "a dense tensor with memory", f"{type(tensor).__name__} ({error})") from error
    if tensor.is_cuda:
        device = CUDA
        device_id = tensor.get_device()
    else:
        if not tensor.is_cpu:
            raise InvalidArgumentError(name, "a tensor on the CPU or a CUDA device", f"one on {tensor.device}")
        device = CPU
        device_id = 0
    if pointer == 0 and tensor.numel() > 0:
        raise InvalidArgumentError(name, "a tensor with memory", f"{type(tensor).__name__} without")
    return ArrayView(pointer, tuple(tensor.shape), strides, dtype, device, device_id, tensor)


def _read_numpy(array: Any, name: str, stream: int | None) -> ArrayView:
    dtype = _dtype_of_numpy(array.dtype, name)
    return ArrayView(array.ctypes.data, array.shape, _element_strides(array.strides, dtype, name), dtype, CPU, 0, array)


def _read_cupy(array: Any, name: str, stream: int | None) -> ArrayView:
    dtype = _dtype_of_numpy(array.dtype, name)
    memory = array.data
    return ArrayView(
        memory.ptr, array.shape, _element_strides(array.strides, dtype, name), dtype, CUDA, memory.device_id, array
    )


def _read_dlpack(obj: Any, name: str, stream: int | None) -> ArrayView:
    import tvm_ffi

    device, device_id = _dlpack_location(obj, name)
    try:
        if device == CUDA:
            if stream is None:
                stream = current_stream(obj, device_id)
            # Makes the producer's pending work come before ours on that stream, without the host waiting.
            capsule = obj.__dlpack__(stream=stream or _DLPACK_LEGACY_STREAM)
        else:
            capsule = obj.__dlpack__()
        tensor = tvm_ffi.from_dlpack(capsule)
    except (MissingDependencyError, MemoryError):
        raise
    except Exception as error:  # each framework has its own; all of them mean that this array has no memory to share
        raise _not_exportable(obj, name, error) from error
    dtype = _known_dtype(str(tensor.dtype), name)
    return ArrayView(tensor.data_ptr(), tensor.shape, tensor.strides, dtype, device, device_id, _Shared(tensor, obj))


def _sketch_torch(tensor: Any) -> tuple[int, Layout]:
    # Of contiguous tensors the strides follow from the shape, but for axes of one element, where they mean nothing.
    return tensor.data_ptr(), (tensor.shape, tensor.is_contiguous() or tensor.stride(), tensor.dtype, tensor.device)


def _sketch_cupy(array: Any) -> tuple[int, Layout]:
    memory = array.data
    return memory.ptr, (array.shape, array.strides, array.dtype, memory.device_id)


_READER_OF_FRAMEWORK: dict[str, Callable[[Any, str, int | None], ArrayView]] = {
    "numpy": _read_numpy,
    "torch": _read_torch,
    "cupy": _read_cupy,
    "jax": _read_dlpack,
    "dlpack": _read_dlpack,
}
# By module and name, as no framework is imported here. Subclasses may mean anything by their attributes: not these.
_SKETCHER_OF_TYPE: dict[tuple[str, str], Callable[[Any], tuple[int, Layout]]] = {
    ("torch", "Tensor"): _sketch_torch,
    ("torch.nn.parameter", "Parameter"): _sketch_torch,
    ("cupy", "ndarray"): _sketch_cupy,
}
_SKETCHERS: dict[type, Callable[[Any], tuple[int, Layout]]] = {}
_TORCH_TYPES: set[type] = set()
# What each type seen so far was found to be: looking it up costs 40 ns, finding out a microsecond.
# (A view is its own view: of arrays that a compiler has not made yet.)
_READERS: dict[type, Callable[[Any, str, int | None], ArrayView]] = {ArrayView: lambda obj, name, stream: obj}
_FRAMEWORKS: dict[type, str] = {}
_TORCH_DTYPES: dict[Any, str] = {}
_NUMPY_DTYPES: dict[np.dtype[Any], str] = {}
_NUMPY_OF_NAME: dict[str, np.dtype[Any]] = {}
_in_flight: deque[tuple[Any, list[Any]]] = deque()
_in_flight_lock = threading.Lock()


@dataclass(slots=True, eq=False)
class _Shared:
    """Owner of memory that came through DLPack: the imported tensor, and the object it came from."""

    tensor: Any
    source: Any


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


def _find_framework(array_type: type, name: str) -> str:
    for base in array_type.__mro__:  # a subclass defined by a user is still an array of its framework
        root = base.__module__.partition(".")[0]
        if root in ("numpy", "torch", "cupy", "jax"):
            # numpy.float32 and torch.dtype live in these modules too.
            if hasattr(array_type, "__dlpack__"):
                return root
        elif root == "jaxlib":
            return "jax"
    if hasattr(array_type, "__dlpack__"):
        return "dlpack"
    raise InvalidArgumentError(
        name, "an array (NumPy, torch, CuPy, JAX or any object with __dlpack__)", array_type.__name__
    )


def _dlpack_location(obj: Any, name: str) -> tuple[str, int]:
    try:
        device_type, device_id = obj.__dlpack_device__()
    except Exception as error:  # see _read_dlpack
        raise _not_exportable(obj, name, error) from error
    device = _DEVICE_OF_DLPACK.get(device_type)
    if device is None:
        raise InvalidArgumentError(name, "an array on the CPU or a CUDA device", f"DLPack device type {device_type}")
    return device, (int(device_id) if device == CUDA else 0)


def _not_exportable(obj: Any, name: str, error: Exception) -> InvalidArgumentError:
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(obj, jax.core.Tracer):
        return InvalidArgumentError(
            name, "an array (inside jax.jit, cupy_mla.jax_ops.mla_decode takes what is traced)", type(obj).__name__
        )
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InvalidArgumentError(name, "an array on one device with memory to share", f"{type(obj).__name__} ({reason})")


def _known_dtype(dtype_name: str, name: str) -> str:
    if dtype_name not in ITEM_SIZES:
        raise InvalidArgumentError(name, "an element type among " + ", ".join(ITEM_SIZES), dtype_name)
    return dtype_name


def _dtype_of_numpy(dtype: np.dtype[Any], name: str) -> str:
    dtype_name = _NUMPY_DTYPES.get(dtype)
    if dtype_name is None:
        if not dtype.isnative:
            raise InvalidArgumentError(name, "an element type in this machine's byte order", str(dtype))
        dtype_name = _NUMPY_DTYPES[dtype] = _known_dtype(dtype.name, name)
    return dtype_name


def _element_strides(byte_strides: tuple[int, ...], dtype: str, name: str) -> tuple[int, ...]:
    itemsize = ITEM_SIZES[dtype]
    strides = tuple([step // itemsize for step in byte_strides])
    for step, byte_step in zip(strides, byte_strides, strict=True):
        if step * itemsize != byte_step:  # a field of a structured array
            raise InvalidArgumentError(
                name, f"strides of whole elements ({itemsize} bytes)", f"byte strides {byte_strides}"
            )
    return strides


@contextmanager
def _on_stream(device_id: int, stream: int | None) -> Iterator[None]:
    """A GPU is current, and ``stream`` its current stream in CuPy: exports of CuPy arrays are ordered behind it."""
    cuda = _cupy().cuda
    with cuda.Device(device_id), nullcontext() if stream is None else cuda.ExternalStream(stream, device_id):
        yield


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise MissingDependencyError("cupy", "cuda12", "an array on a CUDA device") from error
    return cupy
