"""Memory that the kernels of one call work in: asked for before they are queued, given back right after."""

from __future__ import annotations

import sys
from typing import Any

from .capture import is_captured
from .exchange import empty_like
from .frameworks import framework_of
from .sketch import pointer_of


class Scratch:
    """Uninitialised device memory, given back when this object goes; that of a captured graph with the graph.

    Allocators reuse memory in the order of the stream it was asked for on: it need not outlive the last launch that
    uses it.

    Attributes
    ----------
    pointer : int
        Its address.
    """

    __slots__ = ("_array", "pointer")

    def __init__(self, obj: Any, size: int, stream: int) -> None:
        self._array = empty_like(obj, (size,), "uint8", stream)
        self.pointer = pointer_of(self._array)


class _TorchScratch:
    """The same from torch's allocator, without a tensor around it: to make one takes as long as a launch."""

    __slots__ = ("_free", "pointer")

    def __init__(self, size: int, stream: int, allocate: Any, free: Any) -> None:
        self.pointer: int = allocate(size, stream)
        self._free = free

    def __del__(self) -> None:
        self._free(self.pointer)


def scratch_like(obj: Any, size: int, device_id: int, stream: int) -> Scratch | _TorchScratch:
    """Memory from the allocator of an array's framework.

    Parameters
    ----------
    obj
        An array on a GPU.
    size
        In bytes; more than 0.
    device_id
        The GPU's number.
    stream
        CUDA stream that the memory is used on.

    Raises
    ------
    MissingDependencyError
        CuPy or cuda-bindings is needed and not installed.
    DriverError
        CUDA refused to tie the memory to the graph that is captured.
    """
    if framework_of(obj) == "torch":
        cuda = sys.modules["torch"]._C
        # Memory of the current GPU is given, and what is captured must be tied to its graph.
        if cuda._cuda_getDevice() == device_id and not is_captured(stream):
            allocate, free = cuda._cuda_cudaCachingAllocator_raw_alloc, cuda._cuda_cudaCachingAllocator_raw_delete
            return _TorchScratch(size, stream, allocate, free)
    return Scratch(obj, size, stream)
