"""The kernels that find the slots of token numbers."""

from __future__ import annotations

from ..gpu.jit.source import KernelSource
from ..gpu.launch import Geometry
from ..schedule.pieces import ceil_div

SLOTS_SOURCE = KernelSource(entry="cache/slots.cu", function="mla_slots")
SLOTS_THREADS = 256
LOCAL_SLOTS_SOURCE = KernelSource(entry="cache/local_slots.cu", function="mla_local_slots")
LOCAL_SLOTS_THREADS = 1024  # so many that each looks at few tokens: one load waits for another
_INT_BYTES = 4


def slots_blocks(row_tokens: int) -> int:
    """CTAs of a row."""
    return ceil_div(row_tokens, SLOTS_THREADS)


def slots_geometry(num_rows: int, row_tokens: int) -> Geometry:
    """How mla_slots is launched."""
    return Geometry((num_rows * slots_blocks(row_tokens), 1, 1), (SLOTS_THREADS, 1, 1))


def local_slots_geometry(num_rows: int) -> Geometry:
    """How mla_local_slots is launched."""
    return Geometry((num_rows, 1, 1), (LOCAL_SLOTS_THREADS, 1, 1), 2 * LOCAL_SLOTS_THREADS * _INT_BYTES)
