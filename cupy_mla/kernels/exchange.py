"""The kernels by which ranks of one host store queries and results into each other's memory."""

from __future__ import annotations

from dataclasses import replace

from ..arrays.dtypes import KERNEL_TYPES
from ..gpu.hopper import WARP_THREADS
from ..gpu.jit.source import KernelSource
from ..gpu.launch import Geometry
from ..schedule.pieces import ceil_div
from .combine import OCTET, combine_source
from .family import ELEMENT_BYTES, KernelConfig

PUSH_SOURCE = KernelSource(entry="exchange/push.cu", function="mla_push")
EXCHANGE_THREADS = 512
CHUNK_BYTES, WORD_BYTES, PACKET_BYTES = 16, 4, 32
# Bytes to a rank that take no longer over NVLink than a flag that sets out behind them.
_MOST_IN_PACKETS = 2**18
_MOST_SHARED = 48 * 1024  # bytes that a CTA gets without asking
_UNIT_OCTETS = 8  # that a warp of mla_combine_push merges
PUSH_MERGE_TYPES = ("bfloat16", "float16")


def push_merge_source(dtype: str) -> KernelSource:
    """The kernel that hands out results of this type, and merges what comes."""
    return KernelSource("exchange/merge.cu", "mla_push_merge", (("MLA_DTYPE", KERNEL_TYPES[dtype]),))


def combine_push_source(config: KernelConfig) -> KernelSource:
    """The kernel that merges partial results of a decode kernel, hands rows out in packets, and merges what comes."""
    source = combine_source(config)
    return replace(source, entry="exchange/combine.cu", function="mla_combine_push")


def push_geometry(num_sms: int, chunks: int) -> Geometry:
    """How mla_push is launched for so many chunks to each rank, on SMs that others do not wait on."""
    return _geometry(num_sms, ceil_div(chunks, EXCHANGE_THREADS))


def goes_in_packets(num_bytes: int) -> bool:
    """Whether mla_push had better send so many bytes to each rank in packets, which take twice as many."""
    return num_bytes <= _MOST_IN_PACKETS


def packets_of_row(row_bytes: int) -> int:
    """Packets in which mla_push_merge sends a row and its lse."""
    return row_bytes // CHUNK_BYTES + 1


def merges_packets(num_sms: int, rows: int, world: int, row_bytes: int) -> bool:
    """Whether mla_push_merge had better send so many rows to each rank in packets: of one row a CTA, which has room for
    that of each rank.
    """
    return 0 < rows <= num_sms and world * (row_bytes + WORD_BYTES) <= _MOST_SHARED


def push_merge_geometry(num_sms: int, rows: int, shared_memory: int = 0) -> Geometry:
    """How mla_push_merge is launched for so many rows of one rank's heads.

    Of a row a CTA half as many threads do, for which there is room beside a CTA of the merge ahead: so it is in place.

    Parameters
    ----------
    shared_memory
        Of results in packets, ``world * (row_bytes + WORD_BYTES)``.
    """
    geometry = replace(_geometry(num_sms, rows), shared_memory=shared_memory)
    return replace(geometry, block=(EXCHANGE_THREADS // 2, 1, 1)) if rows <= num_sms else geometry


def combine_push_geometry(num_sms: int, world: int) -> Geometry | None:
    """How mla_combine_push is launched; None for more ranks than a CTA's shared memory holds without asking."""
    of_rank = _UNIT_OCTETS * OCTET * ELEMENT_BYTES + WORD_BYTES
    shared_memory = EXCHANGE_THREADS // WARP_THREADS * world * of_rank
    return Geometry((num_sms, 1, 1), (EXCHANGE_THREADS, 1, 1), shared_memory) if shared_memory <= _MOST_SHARED else None


def _geometry(num_sms: int, most: int) -> Geometry:
    """At most one CTA on each SM: they wait for those of other ranks, so there must be room for all of them at once."""
    return Geometry((max(min(most, num_sms), 1), 1, 1), (EXCHANGE_THREADS, 1, 1))
