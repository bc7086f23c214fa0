"""The kernels that merge partial results: those of a plan (mla_combine), and states in ordinary arrays."""

from __future__ import annotations

from ..arrays.dtypes import KERNEL_TYPES
from ..gpu.jit.source import KernelSource
from ..gpu.launch import Geometry
from ..schedule.pieces import ceil_div
from ..schedule.shape import ScheduleShape
from .family import DecodeFamily, KernelConfig, scale_defines

MERGE_STATES_THREADS = 256
OCTET = 8  # columns that a lane merges: d_v is a multiple of this
STORE_ALIGNMENT = 16  # bytes; rows of the output that begin at multiples of it are stored faster

# Most of a thread, as a CTA of the 16-row kernel, of 144 registers a thread, leaves room for. Fewer would be spilled.
COMBINE_REGISTERS = 96


def combine_source(config: KernelConfig) -> KernelSource:
    """The kernel that merges partial results of a plan whose decode kernel is this one."""
    defines = (
        ("MLA_DTYPE", KERNEL_TYPES[config.dtype]),
        ("MLA_PARTIAL", KERNEL_TYPES[config.partial_dtype]),
        ("MLA_REGISTERS", str(COMBINE_REGISTERS)),
        *scale_defines(config.scale_parts),
    )
    return KernelSource("combine/combine.cu", "mla_combine", defines)


def gathered_combine_source(config: KernelConfig) -> KernelSource:
    """The same after a kernel of gathered tokens: its argument is a `structs.GATHER_COMBINE_PARAMS`."""
    return KernelSource("combine/gathered.cu", "mla_combine_gathered", combine_source(config).defines)


def merge_states_source(dtype: str) -> KernelSource:
    """The kernel that merges states in ordinary arrays, for "bfloat16", "float16" or "float32"."""
    return KernelSource("combine/merge_states.cu", "mla_merge_states", (("MLA_DTYPE", KERNEL_TYPES[dtype]),))


def combine_geometry(family: DecodeFamily, shape: ScheduleShape, num_sms: int) -> Geometry:
    """How mla_combine is launched after a kernel of this family, as that says.

    Not at all when ``shape.max_merges`` is 0.
    """
    rows = shape.max_merges * shape.rows_per_job
    ctas, threads = family.combine_shape(num_sms, rows, shape.pieces_of_job, shape.tiles_of_piece)
    return Geometry((ctas, 1, 1), (threads, 1, 1))


def merge_states_geometry(num_sms: int, num_rows: int, d_v: int) -> Geometry:
    """How mla_merge_states is launched: one CTA per SM, fewer when there is less than a warp's work for each."""
    narrowest_chunks = num_rows * ceil_div(d_v // OCTET, 2)
    return Geometry((max(min(num_sms, narrowest_chunks), 1), 1, 1), (MERGE_STATES_THREADS, 1, 1))
