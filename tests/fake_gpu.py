"""A GPU that only writes down what it is asked to launch: arrays without memory, a driver, kernels without code.

Everything between the caller and the driver runs as it does on a real one.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cupy_mla.arrays import frameworks, scratch
from cupy_mla.arrays import sketch as sketches
from cupy_mla.arrays import view as arrays
from cupy_mla.arrays.view import ArrayView, contiguous_strides
from cupy_mla.cache import append, append_call, segments
from cupy_mla.call.memo import forget
from cupy_mla.decode import blueprint, gathered, gathered_decode, plan, prefill, sparse, sparse_plan
from cupy_mla.decode import dense as decode
from cupy_mla.decode import prepared as decode_call
from cupy_mla.gpu import device, driver
from cupy_mla.gpu.device import DeviceInfo
from cupy_mla.gpu.jit import module as jit_module
from cupy_mla.gpu.jit.source import KernelSource
from cupy_mla.kernels.structs import (
    APPEND_PARAMS,
    BLOCKS_PARAMS,
    COMBINE_PARAMS,
    COPY_PAGES_PARAMS,
    DECODE_PARAMS,
    GATHER_COMBINE_PARAMS,
    GATHER_PARAMS,
    PLAN_PARAMS,
)
from cupy_mla.kernels.tensor_maps import TENSOR_MAP

BASE = 1 << 40
NUM_SMS = 132
HALF = np.array([0, 0, 2**32 - 1, 2**32 - 1, 3], np.uint32)  # half of the SMs: those from 64 to 129
MAP_WORDS = 16
# By-value arguments of the kernels, by the name of their functions without what tells them apart.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "combine_gathered": (GATHER_COMBINE_PARAMS,),  # the longer name first
    "gathered": (GATHER_PARAMS,),
    "decode": (TENSOR_MAP, TENSOR_MAP, DECODE_PARAMS),
    "combine": (COMBINE_PARAMS,),
    "plan": (np.uint64, np.uint64, np.uint64, np.uint64, PLAN_PARAMS),
    "append": (APPEND_PARAMS,),
    "dequantise": (BLOCKS_PARAMS,),
    "quantise": (BLOCKS_PARAMS,),
    "copy_pages": (COPY_PAGES_PARAMS,),
}


@dataclass
class FakeArray:
    """An array on the fake GPU: describes itself, has no memory."""

    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    strides: tuple[int, ...] = ()
    pointer: int = BASE
    device_id: int = 0
    __dlpack__ = None

    def __post_init__(self) -> None:
        self.strides = self.strides or contiguous_strides(self.shape)

    def read(self, name: str = "", stream: int | None = None) -> ArrayView:
        return ArrayView(self.pointer, self.shape, self.strides, self.dtype, "cuda", self.device_id, self)


@dataclass
class Launched:
    """One launch: the kernel's kind and source, its arguments as the driver sees them, geometry and stream."""

    kernel: str
    source: KernelSource
    arguments: tuple[np.ndarray, ...]
    grid: tuple[int, int, int]
    stream: int
    programmatic: bool
    cluster: tuple[int, int, int]


@dataclass
class FakeGpu:
    """What was launched, and where the next array lies."""

    launches: list[Launched] = field(default_factory=list)
    allocated: list[FakeArray] = field(default_factory=list)
    next_address: int = BASE
    maps_encoded: int = 0
    kernels: dict[int, tuple[str, KernelSource]] = field(default_factory=dict)
    capturing: bool = False
    pause: float | None = None  # seconds that the driver lets other threads run before it reads the arguments

    def array(self, shape: tuple[int, ...], dtype: str = "bfloat16", strides: tuple[int, ...] = ()) -> FakeArray:
        self.next_address += 1 << 24
        return FakeArray(shape, dtype, strides, self.next_address)

    def take(self) -> list[Launched]:
        """The launches since the last time."""
        launches, self.launches = self.launches, []
        return launches

    def load(self, source: KernelSource, device_id: int) -> Any:
        kind = next(kind for kind in ARGUMENTS if kind in source.function)
        handle = len(self.kernels) + 1
        self.kernels[handle] = kind, source
        return SimpleNamespace(handle=handle, device_id=device_id, source=source)

    def launch(self, config: Any, function: int, pointers: int, extra: int) -> tuple[int]:
        if self.pause is not None:
            time.sleep(self.pause)
        kind, source = self.kernels[function]
        addresses = np.frombuffer(ctypes.string_at(pointers, 8 * len(ARGUMENTS[kind])), np.uint64)
        arguments = tuple(
            np.frombuffer(ctypes.string_at(int(address), np.dtype(dtype).itemsize), dtype)
            for address, dtype in zip(addresses, ARGUMENTS[kind], strict=True)
        )
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        attributes = {attribute.id: attribute.value for attribute in getattr(config, "attrs", [])[: config.numAttrs]}
        programmatic = attributes.get("CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION")
        dimension = attributes.get("CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION")
        self.launches.append(
            Launched(
                kind,
                source,
                arguments,
                grid,
                config.hStream,
                programmatic is not None and programmatic.programmaticStreamSerializationAllowed == 1,
                (1, 1, 1)
                if dimension is None
                else (dimension.clusterDim.x, dimension.clusterDim.y, dimension.clusterDim.z),
            )
        )
        return (0,)

    def encode(self, data_type: str, rank: int, pointer: int, *description: Any) -> tuple[int, Any]:
        self.maps_encoded += 1
        words = [pointer, hash((data_type, rank, repr(description))) & (2**63 - 1)]
        return 0, SimpleNamespace(opaque=words + [0] * (MAP_WORDS - len(words)))

    def empty_like(self, owner: Any, shape: tuple[int, ...], dtype: str, stream: int | None = None) -> FakeArray:
        array = self.array(shape, dtype)
        self.allocated.append(array)
        return array


class _Names:
    """Any attribute is its own name: the driver's enumerations."""

    def __getattr__(self, name: str) -> str:
        return name


def fake_gpu(patch: pytest.MonkeyPatch) -> FakeGpu:
    """Put a fake GPU in the place of the real one, until ``patch`` is undone."""
    gpu = FakeGpu()
    config: Callable[[], Any] = SimpleNamespace
    fake_driver = SimpleNamespace(
        CUlaunchConfig=config,
        CUlaunchAttribute=lambda: SimpleNamespace(value=SimpleNamespace(clusterDim=SimpleNamespace())),
        CUlaunchAttributeID=_Names(),
        CUtensorMapDataType=_Names(),
        CUtensorMapInterleave=_Names(),
        CUtensorMapSwizzle=_Names(),
        CUtensorMapL2promotion=_Names(),
        CUtensorMapFloatOOBfill=_Names(),
        CUfunction=int,
        CUstream=int,
        cuuint64_t=int,
        cuuint32_t=int,
        cuLaunchKernelEx=gpu.launch,
        cuStreamIsCapturing=lambda stream: (0, int(gpu.capturing)),
        cuTensorMapEncodeTiled=gpu.encode,
    )
    patch.setattr(driver, "_driver", fake_driver)
    patch.setitem(arrays._READERS, FakeArray, FakeArray.read)
    expressions = "{a}.pointer", "{a}.shape, {a}.strides, {a}.dtype, {a}.device_id"
    patch.setitem(sketches._EXPRESSIONS, (FakeArray.__module__, FakeArray.__name__), expressions)
    patch.setattr(sketches, "_POINTERS", type(sketches._POINTERS)())
    patch.setitem(frameworks._FRAMEWORKS, FakeArray, "cupy")
    info = DeviceInfo(0, "fake", (9, 0), NUM_SMS, 2**36, 2**25, 232448)
    for module in (plan, sparse_plan, gathered):
        patch.setattr(module, "describe_device", lambda device_id: info)
    for module in (append_call, blueprint, gathered, jit_module):
        patch.setattr(module, "load", gpu.load)
    patch.setattr(device, "require_supported", lambda device_id: info)
    for module in (decode_call, gathered_decode):
        patch.setattr(module, "second_half", lambda device_id: HALF)
    for module in (blueprint, decode, prefill, scratch, sparse):
        patch.setattr(module, "empty_like", gpu.empty_like)
    for module in (append, segments, plan, sparse_plan, decode, prefill, sparse):
        patch.setattr(module, "current_stream", lambda array, device_id: 77)
    forget()
    return gpu


def fake_device(patch: pytest.MonkeyPatch) -> list[int]:
    """Take the place of CuPy's way to make a GPU current, until ``patch`` is undone; the GPUs it was done for."""
    used: list[int] = []

    class Device:
        def __init__(self, device_id: int) -> None:
            self.device_id = device_id

        def __enter__(self) -> Device:
            return self

        def __exit__(self, *error: Any) -> None:
            return None

        def use(self) -> None:
            used.append(self.device_id)

    cuda = SimpleNamespace(Device=Device)
    patch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    patch.setitem(sys.modules, "cupy.cuda", cuda)
    return used
