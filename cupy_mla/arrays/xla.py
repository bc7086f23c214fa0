"""XLA's side of programs that JAX compiles: custom calls, their buffers, and its stream; through jax-tvm-ffi."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import MissingDependencyError
from .frameworks import CPU, CUDA
from .view import ArrayView, contiguous_strides

_DLPACK_CPU = 1  # DLPack's device type


@dataclass(frozen=True, slots=True)
class CustomCall:
    """A function that XLA calls.

    Attributes
    ----------
    run
        Takes the attributes, then the buffers of inputs and results.
    attributes
        Their names, in their order.
    """

    run: Callable[..., None]
    attributes: Sequence[str]


def register(calls: Mapping[str, CustomCall], device: str) -> bool:
    """Register custom calls, by their targets, for a device; False where jax-tvm-ffi is missing and not needed.

    Raises
    ------
    MissingDependencyError
        It is missing, and the device is a GPU.
    """
    try:
        bridge = importlib.import_module("jax_tvm_ffi")
    except ImportError as error:
        if device == CPU:
            return False
        raise MissingDependencyError("jax-tvm-ffi", "jax", "cupy_mla.jax_ops inside jax.jit on a GPU") from error
    import tvm_ffi

    for target, call in calls.items():
        bridge.register_ffi_target(
            target,
            tvm_ffi.convert(call.run),
            [*(f"attrs.{name}" for name in call.attributes), "args", "rets"],
            platform="cpu" if device == CPU else "gpu",
            pass_owned_tensor=True,
        )
    return True


def view_buffer(buffer: Any) -> ArrayView:
    """A view of what XLA hands a custom call."""
    device_type, device_id = buffer.__dlpack_device__()
    device = CPU if device_type == _DLPACK_CPU else CUDA
    return ArrayView(
        buffer.data_ptr(), tuple(buffer.shape), tuple(buffer.strides), str(buffer.dtype), device,
        device_id if device == CUDA else 0, buffer,
    )  # fmt: skip


def view_hosts(arrays: Sequence[Any]) -> list[ArrayView]:
    """Views of what ``jax.pure_callback`` brings."""
    hosts = [np.ascontiguousarray(array) for array in arrays]
    return [
        ArrayView(host.ctypes.data, host.shape, contiguous_strides(host.shape), str(host.dtype), CPU, 0, host)
        for host in hosts
    ]


def start(location: tuple[str, int]) -> int | None:
    """XLA's stream, after its GPU was made current (the driver is called from a thread of XLA's); None on the CPU."""
    device, device_id = location
    if device == CPU:
        return None
    import cupy
    import tvm_ffi

    cupy.cuda.Device(device_id).use()
    return int(tvm_ffi.get_raw_stream(tvm_ffi.device("cuda", device_id)))
