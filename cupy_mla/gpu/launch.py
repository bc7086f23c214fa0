"""A loaded kernel and its arguments to the driver; no policy.

CuPy's plain launch has no launch attributes, so ``cuLaunchKernelEx`` is called through cuda-bindings.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from .driver import check, driver, in_context

Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a kernel is launched: CTAs, threads of a CTA, bytes of dynamic shared memory."""

    grid: Grid
    block: Grid
    shared_memory: int = 0


class Launch:
    """A kernel launch whose arguments and geometry are packed once and queued any number of times.

    The driver copies the arguments while it queues a launch, so what is written to them (or to ``addresses``) in place
    holds from the next call on. Threads that share a launch must not write and queue at the same time.

    Parameters
    ----------
    kernel : jit.LoadedKernel
        The kernel: the driver's ``handle`` of it, and the ``device_id`` of its GPU.
    grid, block : tuple of int
        CTAs and threads, (x, y, z).
    shared_memory : int
        Bytes of dynamic shared memory.
    arguments : tuple
        NumPy arrays of one element (by-value structs), NumPy scalars, or ``numpy.uint64`` addresses. Arrays are
        referenced, not copied.
    programmatic : bool
        The kernel may start before the one ahead of it in the stream has ended; it waits by itself (griddepcontrol).
    cluster : int
        CTAs along x that start together on neighbouring SMs; 1: each where there is room.

    Attributes
    ----------
    addresses : memoryview
        Where each argument lies in host memory, uint64. An entry may be pointed at another argument of the same type,
        which the caller keeps alive until the launch is queued.
    """

    __slots__ = (
        "_arguments",
        "_config",
        "_device_id",
        "_function",
        "_launch",
        "_pointers_address",
        "_stream",
        "_stream_type",
        "addresses",
    )

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_memory: int,
        arguments: tuple[Any, ...],
        programmatic: bool = False,
        cluster: int = 1,
    ) -> None:
        cuda = driver()
        config = cuda.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes = shared_memory
        attributes = []
        if programmatic:
            attribute = cuda.CUlaunchAttribute()
            attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if cluster > 1:
            attribute = cuda.CUlaunchAttribute()
            attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            dimension = attribute.value.clusterDim
            dimension.x, dimension.y, dimension.z = cluster, 1, 1
            attributes.append(attribute)
        if attributes:
            config.attrs = attributes
        config.numAttrs = len(attributes)
        self._launch = cuda.cuLaunchKernelEx
        self._config = config
        self._function = cuda.CUfunction(kernel.handle)
        self._device_id = kernel.device_id
        self._stream_type = cuda.CUstream
        self._stream: int | None = None  # the one in the configuration
        self._arguments = [np.asarray(argument) for argument in arguments]
        pointers = np.array([argument.ctypes.data for argument in self._arguments], dtype=np.uint64)
        self._pointers_address = pointers.ctypes.data
        self.addresses = pointers.data

    def __call__(self, stream: int) -> None:
        """Queue the launch on a stream (``cudaStream_t`` as an integer; 0 is the legacy default stream).

        Raises
        ------
        DriverError
            The driver refused the launch.
        """
        if stream != self._stream:
            self._config.hStream = self._stream_type(stream)
            self._stream = stream
        result = self._launch(self._config, self._function, self._pointers_address, 0)
        if result[0]:  # CUDA_SUCCESS is 0
            again = functools.partial(self._launch, self._config, self._function, self._pointers_address, 0)
            check("cuLaunchKernelEx", in_context(self._device_id, again, result))


def is_capturing(stream: int) -> bool:
    """Whether what is queued on a stream goes into a CUDA graph; also where the driver cannot tell."""
    cuda = driver()
    result = cuda.cuStreamIsCapturing(cuda.CUstream(stream))
    return bool(int(result[0]) or int(result[1]))


def launch_kernel(
    loaded: Any,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_memory: int,
    stream: int,
    arguments: tuple[Any, ...],
) -> None:
    """Queue one ordinary launch of a `jit.LoadedKernel`; see `Launch` for the parameters."""
    Launch(loaded, grid, block, shared_memory, arguments)(stream)
