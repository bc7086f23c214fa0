"""Which SMs belong to which half of the chip, found by how long they take to reach memory.

A Hopper GPU is two halves, each with its SMs and its part of the L2 cache; how SMs are numbered across them differs
from one GPU to the next, and no call of the driver tells. Each half carries half of the memory's bandwidth, so CTAs
that are fewer than the SMs should be as many in one half as in the other: kernels_cu/decode/claim.h.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from ..gpu import hopper
from ..gpu.device import require_supported
from ..gpu.driver import check, driver
from ..gpu.jit.module import load
from ..gpu.jit.source import KernelSource
from ..gpu.launch import launch_kernel

PROBE_SOURCE = KernelSource(entry="probe/latency.cu", function="mla_probe_latency")

_NUM_LINES = 32
_LINE_STRIDE = 1056  # words: kLineStride
_THREADS = 32  # a warp, of which one thread works
_ATTEMPTS = 3  # an SM that others keep busy gets no CTA
_WAIT_SECONDS = 0.2  # the probe takes 0.2 ms; a GPU that is busy with something else is not waited for
_CLEAR = 2.0  # the largest singular value over the next; an H200 shows 5.9
_LEAST_SHARE = 4  # a half has a quarter of the SMs at least


@functools.cache
def second_half(device_id: int) -> npt.NDArray[np.uint32]:
    """The SMs of one half of a GPU, a bit for each: bit s % 32 of word s // 32.

    All zero when the halves cannot be told apart, as on a GPU that shares its SMs with others. Measured once in a
    process, on a stream of its own, which the host waits for.

    Raises
    ------
    UnsupportedDeviceError, CompilationError, DriverError, MissingDependencyError
        The probe cannot be compiled or loaded.
    """
    num_sms = require_supported(device_id).num_sms
    is_second = np.zeros(hopper.MAX_SMS, bool)
    for _ in range(_ATTEMPTS if num_sms <= hopper.MAX_SMS else 0):
        clocks = _measure(device_id, num_sms)
        if clocks is None:
            break
        if clocks[:num_sms].all():
            is_second[:num_sms] = split_halves(clocks[:num_sms])
            break
    return np.packbits(is_second, bitorder="little").view("<u4")


def split_halves(clocks: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """Which rows are not of the half of the first, [SMs]; none of them when there are no two clear groups.

    Parameters
    ----------
    clocks
        [SMs, lines]: what each SM takes to reach each line. A line is nearer to all SMs of one half, so besides what is
        common to a row or to a column the matrix is almost of rank 1.
    """
    centred = clocks - clocks.mean(axis=1, keepdims=True)
    centred -= centred.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    is_second: npt.NDArray[np.bool_] = (left[:, 0] > 0) != (left[0, 0] > 0)
    least = min(is_second.sum(), (~is_second).sum())
    if singular[0] < _CLEAR * singular[1] or least < len(clocks) // _LEAST_SHARE:
        return np.zeros(len(clocks), bool)
    return is_second


def _measure(device_id: int, num_sms: int) -> npt.NDArray[np.uint32] | None:
    """Clocks of each SM and line, [MAX_SMS, lines], 0 for SMs without a CTA; None if there was no memory or no time."""
    import cupy

    kernel = load(PROBE_SOURCE, device_id)
    with cupy.cuda.Device(device_id), _during_capture(), cupy.cuda.Stream(non_blocking=True) as stream:
        try:
            lines = cupy.zeros(_NUM_LINES * _LINE_STRIDE, np.uint32)
            clocks = cupy.zeros((hopper.MAX_SMS, _NUM_LINES), np.uint32)
        except cupy.cuda.memory.OutOfMemoryError:
            return None
        arguments = (
            np.uint64(lines.data.ptr),
            np.uint64(clocks.data.ptr),
            np.int32(_NUM_LINES),
            np.int32(hopper.MAX_SMS),
        )
        launch_kernel(kernel, (num_sms, 1, 1), (_THREADS, 1, 1), kernel.max_dynamic_smem, stream.ptr, arguments)
        deadline = time.perf_counter() + _WAIT_SECONDS
        while not stream.done:
            if time.perf_counter() > deadline:
                return None
        found: npt.NDArray[np.uint32] = clocks.get(stream=stream)
        return found


@contextmanager
def _during_capture() -> Iterator[None]:
    """Lets this thread allocate and wait while one of its streams is captured in a CUDA graph; the probe is not."""
    cuda = driver()
    relaxed = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = check("cuThreadExchangeStreamCaptureMode", cuda.cuThreadExchangeStreamCaptureMode(relaxed))
    try:
        yield
    finally:
        check("cuThreadExchangeStreamCaptureMode", cuda.cuThreadExchangeStreamCaptureMode(before))
