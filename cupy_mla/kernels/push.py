"""The kernel by which ranks of one host store rows into each other's memory."""

from __future__ import annotations

from ..gpu.jit.source import KernelSource
from ..gpu.launch import Geometry
from ..schedule.pieces import ceil_div

PUSH_SOURCE = KernelSource(entry="exchange/push.cu", function="mla_push")
PUSH_THREADS = 256
VALUE_BYTES, WORD_BYTES = 16, 4  # of chunks
_CTAS_OF_SM = 2  # stores of theirs, on their way to another GPU, fill an NVLink


def push_geometry(num_sms: int, chunks: int) -> Geometry:
    """How mla_push is launched for so many chunks to each rank."""
    grid = max(min(ceil_div(chunks, PUSH_THREADS), _CTAS_OF_SM * num_sms), 1)
    return Geometry((grid, 1, 1), (PUSH_THREADS, 1, 1), WORD_BYTES)
