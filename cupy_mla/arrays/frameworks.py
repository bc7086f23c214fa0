"""Which framework an array belongs to, where it lies, and on which stream the framework works.

No framework is imported here unless an array of it was passed in, except CuPy, which serves those that have no streams
or no allocator to ask.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import IntEnum
from typing import Any

from ..errors import InvalidArgumentError, MissingDependencyError

CPU = "cpu"
CUDA = "cuda"


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

# 0 and cudaStreamLegacy.
_LEGACY_STREAMS = (0, 1)

# What each type seen so far was found to be: looking it up costs 40 ns, finding out a microsecond.
_FRAMEWORKS: dict[type, str] = {}


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


def dlpack_location(obj: Any, name: str) -> tuple[str, int]:
    """Device and its number of an object with ``__dlpack_device__``.

    Raises
    ------
    InvalidArgumentError
        It has none, or one that nothing here can use; ``argument`` is ``name``.
    """
    try:
        device_type, device_id = obj.__dlpack_device__()
    except Exception as error:  # each framework has its own
        raise not_exportable(obj, name, error) from error
    device = _DEVICE_OF_DLPACK.get(device_type)
    if device is None:
        raise InvalidArgumentError(name, "an array on the CPU or a CUDA device", f"DLPack device type {device_type}")
    return device, (int(device_id) if device == CUDA else 0)


def not_exportable(obj: Any, name: str, error: Exception) -> InvalidArgumentError:
    """What to raise for an object whose DLPack methods raised ``error``."""
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(obj, jax.core.Tracer):
        return InvalidArgumentError(
            name, "an array (inside jax.jit, cupy_mla.jax_ops.mla_decode takes what is traced)", type(obj).__name__
        )
    if getattr(obj, "is_deleted", bool)() is True:
        expected = "an array that is still there"
        return InvalidArgumentError(name, expected, f"a {type(obj).__name__} that was deleted, or donated to a program")
    if jax is not None and isinstance(obj, jax.Array) and len(obj.devices()) > 1:
        expected = "an array on one device (cupy_mla.jax_ops inside jax.shard_map takes each device's part)"
        return InvalidArgumentError(name, expected, f"a JAX array on {len(obj.devices())} devices")
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return InvalidArgumentError(name, "an array on one device with memory to share", f"{type(obj).__name__} ({reason})")


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
    if (_FRAMEWORKS.get(type(obj)) or framework_of(obj)) == "torch":
        stream: int = sys.modules["torch"]._C._cuda_getCurrentRawStream(device_id)
        return stream
    return int(cupy_module().cuda.get_current_stream(device_id).ptr)


def torch_stream(stream: int, device: Any) -> Any:
    """torch's context in which ``stream`` is its current one. The legacy default stream, which torch knows by 0 only,
    may also have its other number."""
    torch = sys.modules["torch"]
    if stream in _LEGACY_STREAMS:
        return torch.cuda.stream(torch.cuda.default_stream(device))
    return torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device))


@contextmanager
def on_stream(device_id: int, stream: int | None) -> Iterator[None]:
    """A GPU is current, and ``stream`` its current stream in CuPy: exports of CuPy arrays are ordered behind it."""
    cuda = cupy_module().cuda
    with cuda.Device(device_id), nullcontext() if stream is None else cuda.ExternalStream(stream, device_id):
        yield


def torch_module(feature: str) -> Any:
    """torch, imported now, for what needs it.

    Raises
    ------
    MissingDependencyError
        It is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError("torch", "torch", feature) from error
    return torch


def cupy_module() -> Any:
    """CuPy, imported now.

    Raises
    ------
    MissingDependencyError
        It is not installed.
    """
    try:
        import cupy
    except ImportError as error:
        raise MissingDependencyError("cupy", "cuda12", "an array on a CUDA device") from error
    return cupy
