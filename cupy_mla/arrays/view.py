"""Arrays of any framework, described without copies.

`view` describes an array by what a kernel needs: address, shape, strides, type, device. NumPy, torch and CuPy arrays
are read through their own attributes (faster than DLPack, and NumPy cannot export bfloat16 through it); everything
else comes in through ``__dlpack__``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidArgumentError, MissingDependencyError
from .dtypes import ITEM_SIZES, dtype_of_numpy, known_dtype
from .frameworks import CPU, CUDA, current_stream, dlpack_location, framework_of, not_exportable

# The stream numbers of DLPack: 0 would be ambiguous, 1 is CUDA's legacy default stream.
_DLPACK_LEGACY_STREAM = 1

_TORCH_DTYPES: dict[Any, str] = {}


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


@dataclass(slots=True, eq=False)
class Shared:
    """Owner of memory that came through DLPack: the imported tensor, and the object it came from."""

    tensor: Any
    source: Any


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a C-contiguous array of that shape."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def source_of(array: ArrayView) -> Any:
    """The caller's own object behind a view."""
    return array.owner.source if isinstance(array.owner, Shared) else array.owner


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
        ``obj`` is no array, has no memory of its own (a tracer, a sparse or a meta tensor, a deleted array), has other
        values than its memory (a lazy sign), or an element type or device that nothing here can use.
    """
    reader = _READERS.get(type(obj))
    if reader is None:
        reader = _READERS[type(obj)] = _READER_OF_FRAMEWORK[framework_of(obj, name)]
    return reader(obj, name, stream)


def _read_torch(tensor: Any, name: str, stream: int | None) -> ArrayView:
    try:
        pointer = tensor.data_ptr()
        strides = tensor.stride()
        dtype = _TORCH_DTYPES[tensor.dtype]
    except KeyError:
        # The first tensor of its type: torch writes its types as "torch.bfloat16".
        dtype_name = str(tensor.dtype).removeprefix("torch.")
        _TORCH_DTYPES[tensor.dtype] = known_dtype(dtype_name, name)
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
    if tensor.is_neg():
        expected = "a tensor whose memory holds its values (tensor.resolve_neg() makes one)"
        raise InvalidArgumentError(name, expected, "one that is negated when it is read")
    return ArrayView(pointer, tuple(tensor.shape), strides, dtype, device, device_id, tensor)


def _read_numpy(array: Any, name: str, stream: int | None) -> ArrayView:
    dtype = dtype_of_numpy(array.dtype, name)
    return ArrayView(array.ctypes.data, array.shape, _element_strides(array.strides, dtype, name), dtype, CPU, 0, array)


def _read_cupy(array: Any, name: str, stream: int | None) -> ArrayView:
    dtype = dtype_of_numpy(array.dtype, name)
    memory = array.data
    return ArrayView(
        memory.ptr, array.shape, _element_strides(array.strides, dtype, name), dtype, CUDA, memory.device_id, array
    )


def _read_dlpack(obj: Any, name: str, stream: int | None) -> ArrayView:
    import tvm_ffi

    device, device_id = dlpack_location(obj, name)
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
        raise not_exportable(obj, name, error) from error
    dtype = known_dtype(str(tensor.dtype), name)
    return ArrayView(tensor.data_ptr(), tensor.shape, tensor.strides, dtype, device, device_id, Shared(tensor, obj))


def _element_strides(byte_strides: tuple[int, ...], dtype: str, name: str) -> tuple[int, ...]:
    itemsize = ITEM_SIZES[dtype]
    strides = tuple([step // itemsize for step in byte_strides])
    for step, byte_step in zip(strides, byte_strides, strict=True):
        if step * itemsize != byte_step:  # a field of a structured array
            raise InvalidArgumentError(
                name, f"strides of whole elements ({itemsize} bytes)", f"byte strides {byte_strides}"
            )
    return strides


_READER_OF_FRAMEWORK: dict[str, Callable[[Any, str, int | None], ArrayView]] = {
    "numpy": _read_numpy,
    "torch": _read_torch,
    "cupy": _read_cupy,
    "jax": _read_dlpack,
    "dlpack": _read_dlpack,
}
# By type, as each was found to be. A view is its own view: of arrays that a compiler has not made yet.
_READERS: dict[type, Callable[[Any, str, int | None], ArrayView]] = {ArrayView: lambda obj, name, stream: obj}
