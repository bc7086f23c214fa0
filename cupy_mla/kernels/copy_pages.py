"""The kernel that copies pages of a cache."""

from __future__ import annotations

from ..gpu.jit.source import KernelSource
from ..gpu.launch import Geometry
from ..schedule.pieces import ceil_div

# What it moves at a time, by bytes: the largest that addresses, strides and widths are multiples of.
UNIT_TYPES = {16: "uint4", 8: "uint2", 4: "u32", 2: "u16", 1: "u8"}

_THREADS = 256
_UNITS_IN_FLIGHT = 4  # of a thread: kUnitsInFlight in kernels_cu/cache/copy_pages.cu


def copy_pages_source(unit_bytes: int) -> KernelSource:
    """The kernel for units of so many bytes; its argument is a `structs.COPY_PAGES_PARAMS`."""
    return KernelSource("cache/copy_pages.cu", "mla_copy_pages", (("MLA_UNIT", UNIT_TYPES[unit_bytes]),))


def copy_pages_blocks(page_units: int) -> int:
    """CTAs of a page."""
    return ceil_div(page_units, _THREADS * _UNITS_IN_FLIGHT)


def copy_pages_geometry(num_copies: int, page_units: int) -> Geometry:
    """How it is launched."""
    return Geometry((num_copies * copy_pages_blocks(page_units), 1, 1), (_THREADS, 1, 1))
