"""What the GPU can do at most: published figures by name, or measured on this one.

Read bandwidth: a kernel that only reads, over far more memory than the L2 holds. Matrix products: bfloat16 8192^3 by
the vendor's library, a few after a pause (burst) and for a while back to back, when the power limit acts (sustained).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..lab.work import Work

READ_BYTES = 4 << 30
READ_REPEATS = 7
MATMUL_SIZE = 8192
BURST_PRODUCTS = 4
BURST_REPEATS = 3
BURST_PAUSE_SECONDS = 0.3
SUSTAINED_SECONDS = 1.0

_READ_THREADS = 512
_READ_BLOCKS_PER_SM = 2  # all resident at once, with the registers that the loads in flight need
_READ_UNROLL = 8  # 16-byte loads in flight in each thread


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Ceilings of one GPU.

    Attributes
    ----------
    read_gigabytes_per_second
        10^9 bytes per second read from device memory.
    tflops
        10^12 floating-point operations per second of dense bfloat16 or float16 matrix products, in a burst.
    sustained_tflops
        The same back to back under the power limit; None when it was not measured.
    source
        ``measured`` or ``published``, with whose figures they are.
    """

    read_gigabytes_per_second: float
    tflops: float
    sustained_tflops: float | None
    source: str

    def least_seconds(self, work: Work) -> float:
        """The roofline: neither the operations nor the bytes can take less."""
        return max(work.flops / (self.tflops * 1e12), work.bytes / (self.read_gigabytes_per_second * 1e9))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# NVIDIA's data sheets: memory bandwidth in GB/s and dense bfloat16 TFLOPS. The first name found in the GPU's counts.
_PUBLISHED = (
    ("GH200 144G", 4900.0, 989.0),
    ("GH200", 4000.0, 989.0),
    ("H200 NVL", 4800.0, 836.0),
    ("H200", 4800.0, 989.0),
    ("H100 NVL", 3900.0, 835.0),
    ("H100 PCIe", 2000.0, 756.0),
    ("H100", 3350.0, 989.0),
    ("H800", 3350.0, 989.0),
    ("H20", 4000.0, 148.0),
)


def published_ceilings(device_name: str) -> Ceilings | None:
    """The maker's figures for a GPU by CUDA's name of it; None for one that is not known."""
    for name, bandwidth, tflops in _PUBLISHED:
        if name in device_name:
            return Ceilings(bandwidth, tflops, None, f"published for {name}")
    return None


def measure_ceilings() -> Ceilings:
    """Measure the current GPU; takes about 3 s and 4 GB of its memory.

    Raises
    ------
    ImportError, RuntimeError
        CuPy, or the library for matrix products (torch's, else CuPy's), is missing or fails.
    """
    import cupy

    bandwidth = _measure_read()
    cupy.get_default_memory_pool().free_all_blocks()
    product = _product()
    flops = 2.0 * MATMUL_SIZE**3
    product()  # loads the library
    bursts = []
    for _ in range(BURST_REPEATS):
        time.sleep(BURST_PAUSE_SECONDS)
        bursts.append(_seconds(product, BURST_PRODUCTS) / BURST_PRODUCTS)
    burst = min(bursts)
    count = math.ceil(SUSTAINED_SECONDS / burst)
    sustained = _seconds(product, count) / count
    return Ceilings(bandwidth / 1e9, flops / burst / 1e12, flops / sustained / 1e12, "measured")


# The compiler cannot drop the loads: their sum decides about a store that practically never happens.
_READ_ALL = r"""
extern "C" __global__ void read_all(const uint4* data, long long count, unsigned* sink) {
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    unsigned sum = 0;
    for (; i + (UNROLL - 1) * stride < count; i += UNROLL * stride) {
        uint4 values[UNROLL];
        #pragma unroll
        for (int j = 0; j < UNROLL; ++j) values[j] = __ldcs(data + i + j * stride);
        #pragma unroll
        for (int j = 0; j < UNROLL; ++j) sum += values[j].x ^ values[j].y ^ values[j].z ^ values[j].w;
    }
    for (; i < count; i += stride) {
        const uint4 value = __ldcs(data + i);
        sum += value.x ^ value.y ^ value.z ^ value.w;
    }
    if (sum == 0x9e3779b9u) *sink = sum;
}
"""


def _measure_read() -> float:
    """Bytes per second read."""
    import cupy

    data = cupy.full(READ_BYTES // 4, 0x5A5A5A5A, dtype=cupy.uint32)
    sink = cupy.zeros(1, dtype=cupy.uint32)
    kernel = cupy.RawKernel(_READ_ALL.replace("UNROLL", str(_READ_UNROLL)), "read_all")
    blocks = cupy.cuda.Device().attributes["MultiProcessorCount"] * _READ_BLOCKS_PER_SM

    def read() -> None:
        kernel((blocks,), (_READ_THREADS,), (data, cupy.int64(READ_BYTES // 16), sink))

    read()
    seconds = statistics.median(_seconds(read, 1) for _ in range(READ_REPEATS))
    return READ_BYTES / seconds


def _product() -> Callable[[], object]:
    """One matrix product of random normal values on CuPy's current stream."""
    shape = (MATMUL_SIZE, MATMUL_SIZE)
    try:
        import torch
    except ImportError:
        import cupy

        from ..lab.libraries import CUPY

        # float16 runs at the same rate, and CuPy's products of it are mature.
        left, right = (CUPY.normal(shape, "float16", seed) for seed in range(2))
        result = cupy.empty(shape, dtype=cupy.float16)
        return lambda: cupy.matmul(left, right, out=result)
    torch_left, torch_right = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    torch_result = torch.empty_like(torch_left)
    return lambda: torch.mm(torch_left, torch_right, out=torch_result)


def _seconds(work: Callable[[], object], count: int) -> float:
    """GPU seconds of ``count`` runs back to back. torch's default stream and CuPy's are the same one."""
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    cupy.cuda.Device().synchronize()
    start.record()
    for _ in range(count):
        work()
    end.record()
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3
