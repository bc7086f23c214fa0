"""A loaded kernel and its arguments to the driver; no policy.

CuPy's plain launch has no launch attributes, so ``cuLaunchKernelEx`` is called through cuda-bindings.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .driver import check, driver


class Launch:
    """A kernel launch whose arguments and geometry are packed once and queued any number of times.

    Parameters
    ----------
    handle : int
        The driver's ``CUfunction``.
    grid, block : tuple of int
        CTAs and threads, (x, y, z).
    shared_memory : int
        Bytes of dynamic shared memory.
    arguments : tuple
        NumPy arrays of one element (by-value structs), NumPy scalars, or ``numpy.uint64`` addresses. Arrays are
        referenced, not copied: a change in place holds for the next launch.
    programmatic : bool
        The kernel may start before the one ahead of it in the stream has ended; it waits by itself (griddepcontrol).
    """

    __slots__ = ("_arguments", "_config", "_function", "_pointers", "_pointers_address")

    def __init__(
        self,
        handle: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_memory: int,
        arguments: tuple[Any, ...],
        programmatic: bool = False,
    ) -> None:
        cuda = driver()
        config = cuda.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes = shared_memory
        if programmatic:
            attribute = cuda.CUlaunchAttribute()
            attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        else:
            config.numAttrs = 0
        self._config = config
        self._function = cuda.CUfunction(handle)
        self._arguments = [np.asarray(argument) for argument in arguments]
        self._pointers = np.array([argument.ctypes.data for argument in self._arguments], dtype=np.uint64)
        self._pointers_address = self._pointers.ctypes.data

    def __call__(self, stream: int) -> None:
        """Queue the launch on a stream (``cudaStream_t`` as an integer; 0 is the legacy default stream).

        Raises
        ------
        DriverError
            The driver refused the launch.
        """
        cuda = driver()
        self._config.hStream = cuda.CUstream(stream)
        check("cuLaunchKernelEx", cuda.cuLaunchKernelEx(self._config, self._function, self._pointers_address, 0))


def launch_kernel(
    loaded: Any,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_memory: int,
    stream: int,
    arguments: tuple[Any, ...],
    programmatic: bool = False,
) -> None:
    """Queue one launch of a `jit.LoadedKernel`; see `Launch` for the parameters."""
    Launch(loaded.handle, grid, block, shared_memory, arguments, programmatic)(stream)
