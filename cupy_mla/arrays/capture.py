"""Memory that a CUDA graph uses whenever it is replayed: kept until the graph is gone.

torch keeps a pool of memory for each graph that it captures. CuPy does not, nor does torch when another captures:
what is allocated then, and not held by the program afterwards, goes back to the allocator, and replays write to
whatever lies there next. CUDA lets a graph own objects ("user objects", CUDA C++ Programming Guide): here the object is
a semaphore, which CUDA posts when the graph and all that was instantiated from it are gone. It does so in a thread of
its own that must not call CUDA, so the memory is given back at the next chance.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Sequence
from typing import Any

from ..errors import DriverError, MissingDependencyError
from .frameworks import cupy_module

_SEMAPHORE_BYTES = 64  # sem_t takes 32 with glibc on 64-bit Linux
_CAPTURE, _GRAPH = 2, 3  # places of the capture's number and of the graph in what cuStreamGetCaptureInfo returns
_CAPTURES_KNOWN = 64


class _Kept:
    """Objects of one allocation, and the semaphore that says that their graph is gone."""

    def __init__(self, objects: Sequence[Any]) -> None:
        self.objects = objects
        self.semaphore = ctypes.create_string_buffer(_SEMAPHORE_BYTES)
        _libc().sem_init(self.semaphore, 0, 0)

    def is_released(self) -> bool:
        return bool(_libc().sem_trywait(self.semaphore) == 0)


_kept: list[_Kept] = []
_of_torch: dict[int, bool] = {}  # captures by number: whether torch has a pool for them
_lock = threading.Lock()


def is_captured(stream: int) -> bool:
    """Whether what is queued on a stream goes into a CUDA graph."""
    runtime = _runtime()
    try:
        return bool(runtime.streamIsCapturing(stream))
    except (RuntimeError, runtime.CUDARuntimeError):  # a capture that has failed, or the legacy stream during another's
        return False


def keep_for_graph(objects: Sequence[Any], stream: int) -> None:
    """Keep objects alive until the graph that is being captured on a stream, and its instances, are gone.

    Raises
    ------
    DriverError
        CUDA refused to tie them to the graph.
    MissingDependencyError
        cuda-bindings is not installed.
    """
    driver = _driver()
    release_kept()
    info = _capture_info(driver, stream)
    kept = _Kept(objects)
    post = driver.CUhostFn(ctypes.cast(_libc().sem_post, ctypes.c_void_p).value)
    flag = driver.CUuserObject_flags.CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
    status, user_object = driver.cuUserObjectCreate(ctypes.addressof(kept.semaphore), post, 1, int(flag))
    _check(driver, "cuUserObjectCreate", status)
    with _lock:  # before CUDA may post it
        _kept.append(kept)
    move = driver.CUuserObjectRetain_flags.CU_GRAPH_USER_OBJECT_MOVE
    (status,) = driver.cuGraphRetainUserObject(info[_GRAPH], user_object, 1, int(move))
    if int(status) != 0:
        driver.cuUserObjectRelease(user_object, 1)
    _check(driver, "cuGraphRetainUserObject", status)


def keep_tensor(tensor: Any, stream: int) -> None:
    """Keep a tensor that torch has just allocated alive for the graph that is captured on a stream, if there is one.

    One that torch captures is left alone: it has the memory of all its tensors, and may use that of one again for the
    next.

    Raises
    ------
    DriverError
        CUDA refused to tie it to the graph.
    MissingDependencyError
        cuda-bindings is not installed.
    """
    if not is_captured(stream) or tensor.numel() == 0:
        return
    number = int(_capture_info(_driver(), stream)[_CAPTURE])
    of_torch = _of_torch.get(number)
    if of_torch is None:  # looking takes milliseconds
        if len(_of_torch) >= _CAPTURES_KNOWN:
            _of_torch.clear()
        of_torch = _of_torch[number] = _is_of_a_graph(tensor)
    if not of_torch:
        keep_for_graph([tensor], stream)


def _is_of_a_graph(tensor: Any) -> bool:
    """Whether the memory is from torch's pool for a graph, or of an allocator that makes it a part of the graph."""
    address = tensor.data_ptr()
    try:
        segments = sys.modules["torch"].cuda.memory_snapshot()
    except RuntimeError:  # of cudaMallocAsync, whose memory is the graph's
        return True
    for segment in segments:
        if segment["address"] <= address < segment["address"] + segment["total_size"]:
            return any(segment["segment_pool_id"])
    return True


def release_kept() -> None:
    """Let go of what was kept for graphs that are gone."""
    if not _kept:
        return
    with _lock:
        _kept[:] = [kept for kept in _kept if not kept.is_released()]


def _capture_info(driver: Any, stream: int) -> Any:
    info = driver.cuStreamGetCaptureInfo(driver.CUstream(stream))
    _check(driver, "cuStreamGetCaptureInfo", info[0])
    return info


def _check(driver: Any, action: str, status: Any) -> None:
    if int(status) != 0:
        raise DriverError(action, int(status), str(getattr(status, "name", status)))


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingDependencyError("cuda-bindings", "cuda12", "capturing a CUDA graph") from error
    return driver


@functools.cache  # an import statement takes a third of a microsecond even of what is imported
def _runtime() -> Any:
    return cupy_module().cuda.runtime


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None)
