"""The kernels by which ranks of one host store queries and results into each other's memory."""

from __future__ import annotations

from ..arrays.dtypes import KERNEL_TYPES
from ..gpu.jit.source import KernelSource
from ..gpu.launch import Geometry
from ..schedule.pieces import ceil_div

PUSH_SOURCE = KernelSource(entry="exchange/push.cu", function="mla_push")
EXCHANGE_THREADS = 512
CHUNK_BYTES, WORD_BYTES = 16, 4
PUSH_MERGE_TYPES = ("bfloat16", "float16")


def push_merge_source(dtype: str) -> KernelSource:
    """The kernel that hands out results of this type, and merges what comes."""
    return KernelSource("exchange/merge.cu", "mla_push_merge", (("MLA_DTYPE", KERNEL_TYPES[dtype]),))


def push_geometry(num_sms: int, chunks: int) -> Geometry:
    """How mla_push is launched for so many chunks to each rank, on SMs that others do not wait on."""
    return _geometry(num_sms, ceil_div(chunks, EXCHANGE_THREADS))


def push_merge_geometry(num_sms: int, rows: int) -> Geometry:
    """How mla_push_merge is launched for so many rows of one rank's heads."""
    return _geometry(num_sms, rows)


def _geometry(num_sms: int, most: int) -> Geometry:
    """At most one CTA on each SM: they wait for those of other ranks, so there must be room for all of them at once."""
    return Geometry((max(min(most, num_sms), 1), 1, 1), (EXCHANGE_THREADS, 1, 1))
