"""The plan in device memory and the kernels that write and read it, as the host sees them.

Mirrors kernels_cu/core/plan_format.h, plan/params.h and combine/params.h; tests compare the two sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError
from ..gpu.jit.source import KernelSource
from ..schedule.make import Schedule, ScheduleShape
from ..schedule.pieces import ceil_div
from . import configs

PLAN_SOURCE = KernelSource(entry="plan/plan.cu", function="mla_plan")
DTYPE_TAGS = {**configs.DTYPE_TAGS, "float32": "Fp32"}

PLAN_THREADS = 256
MERGE_STATES_THREADS = 256
OCTET = 8  # columns that a lane merges: d_v is a multiple of this
STORE_ALIGNMENT = 16  # bytes; rows of the output that begin at multiples of it are stored faster

_SECTION_INTS = 8
_ITEM_INTS = 8
_HEADER_INTS = 8
_JOB_COLUMNS = 7
_INT_BYTES = 4
_SCRATCH_BYTES = 16_400  # PlanScratch
# More jobs than this are tabled in global memory: the table and the scratch stay below the 48 KB that need no opt-in.
_MAX_SHARED_JOBS = 1024
_WARP_LANES = 32

_POINTER = np.uint64

PLAN_HEADER = np.dtype(
    [
        ("num_items", np.int32),
        ("num_merges", np.int32),
        ("num_slots", np.int32),
        ("budget", np.int32),
        ("num_jobs", np.int32),
        ("claimed_parts", np.int32),
        ("claims", np.uint32),
        ("reserved", np.int32),
    ]
)
WORK_ITEM = np.dtype(
    [
        ("request", np.int32),
        ("head_block", np.int32),
        ("tile_begin", np.int32),
        ("tile_end", np.int32),
        ("seqlen_k", np.int32),
        ("seqlen_q", np.int32),
        ("q_begin", np.int32),
        ("slot", np.int32),
    ]
)
MERGE_ITEM = np.dtype(
    [
        ("request", np.int32),
        ("head_block", np.int32),
        ("seqlen_q", np.int32),
        ("q_begin", np.int32),
        ("slot_begin", np.int32),
        ("slot_count", np.int32),
        ("reserved", np.int32, 2),
    ]
)
PLAN_PARAMS = np.dtype(
    [
        ("batch", np.int32),
        ("num_parts", np.int32),
        ("blocks_per_job", np.int32),
        ("rows", np.int32),
        ("group_heads", np.int32),
        ("num_heads_kv", np.int32),
        ("seqlen_q", np.int32),
        ("total_q", np.int32),
        ("max_seqlen_k", np.int32),
        ("causal", np.int32),
        ("fixed_split_tiles", np.int32),
        ("piece_overhead", np.int32),
        ("split_overhead", np.int32),
        ("merge_overhead", np.int32),
        ("packs", np.int32),
        ("max_jobs", np.int32),
        ("merges_offset", np.int32),
        ("workspace_offset", np.int32),
        ("table_in_shared", np.int32),
    ]
)
# Strides in elements, here and below.
COMBINE_PARAMS = np.dtype(
    [
        ("partial_out", _POINTER),
        ("partial_lse", _POINTER),
        ("plan", _POINTER),
        ("out", _POINTER),
        ("out_strides", np.int64, 3),  # batch (0 when ragged), seq, head
        ("lse", _POINTER),
        ("lse_strides", np.int64, 3),  # batch (0 when ragged), seq, head
        ("merges_offset", np.int32),
        ("slot_rows", np.int32),
        ("rows", np.int32),
        ("group_heads", np.int32),
        ("d_v", np.int32),
        ("aligned", np.int32),
        ("empty_lse", np.float32),
        ("reserved", np.int32),
    ]
)
MERGE_STATES_PARAMS = np.dtype(
    [
        ("outs", _POINTER),
        ("outs_strides", np.int64, 4),  # state, then the three row indices
        ("lses", _POINTER),
        ("lses_strides", np.int64, 4),
        ("out", _POINTER),
        ("out_strides", np.int64, 3),
        ("lse", _POINTER),
        ("lse_strides", np.int64, 3),
        ("num_states", np.int32),
        ("sizes", np.int32, 3),
        ("d_v", np.int32),
        ("aligned", np.int32),
    ]
)

Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a kernel is launched: CTAs, threads of a CTA, bytes of dynamic shared memory."""

    grid: Grid
    block: Grid
    shared_memory: int = 0


def combine_source(config: configs.KernelConfig) -> KernelSource:
    """The kernel that merges partial results of a plan whose decode kernel is this one."""
    defines = (
        ("MLA_DTYPE", DTYPE_TAGS[config.dtype]),
        ("MLA_PARTIAL", DTYPE_TAGS[config.partial_dtype]),
        ("MLA_REGISTERS", str(config.combine_registers)),
    )
    return KernelSource("combine/combine.cu", "mla_combine", defines)


def merge_states_source(dtype: str) -> KernelSource:
    """The kernel that merges states in ordinary arrays, for "bfloat16", "float16" or "float32"."""
    return KernelSource("combine/merge_states.cu", "mla_merge_states", (("MLA_DTYPE", DTYPE_TAGS[dtype]),))


@dataclass(frozen=True, slots=True)
class PlanLayout:
    """Where things lie in the plan, one int32 array; every section begins at a multiple of 32 bytes.

    Attributes
    ----------
    part_begin_offset, items_offset, merges_offset, workspace_offset
        In ints.
    total_ints
        Size of the array.
    table_in_shared
        Whether the planner's job table fits shared memory; if not, the workspace holds it.
    """

    part_begin_offset: int
    items_offset: int
    merges_offset: int
    workspace_offset: int
    total_ints: int
    table_in_shared: bool


def plan_layout(shape: ScheduleShape) -> PlanLayout:
    """The layout of the plan of a shape.

    Raises
    ------
    InvalidArgumentError
        The plan would have 2**31 ints or more.
    """
    items_offset = _align(_HEADER_INTS + shape.num_parts + 1)
    merges_offset = items_offset + shape.max_items * _ITEM_INTS
    workspace_offset = merges_offset + shape.max_merges * _ITEM_INTS
    table_in_shared = shape.max_jobs <= _MAX_SHARED_JOBS
    total = workspace_offset + (0 if table_in_shared else _align(shape.max_jobs * _JOB_COLUMNS))
    if total > np.iinfo(np.int32).max:
        raise InvalidArgumentError(
            "fixed_split_tokens" if shape.fixed_split_tokens else "batch", "a plan of less than 8 GB", f"{total} ints"
        )
    return PlanLayout(_HEADER_INTS, items_offset, merges_offset, workspace_offset, total, table_in_shared)


def _align(ints: int) -> int:
    return ceil_div(ints, _SECTION_INTS) * _SECTION_INTS


def plan_params(shape: ScheduleShape) -> npt.NDArray[Any]:
    """The planner's by-value argument: one element of PLAN_PARAMS."""
    layout = plan_layout(shape)
    params = np.zeros(1, PLAN_PARAMS)
    for name in ("batch", "num_parts", "blocks_per_job", "rows", "group_heads", "num_heads_kv", "seqlen_q"):
        params[name] = getattr(shape, name)
    params["total_q"] = shape.batch * shape.seqlen_q if shape.total_q is None else shape.total_q
    params["max_seqlen_k"] = shape.max_seqlen_k
    params["causal"] = shape.causal
    params["fixed_split_tiles"] = shape.fixed_split_tiles
    for name in ("piece_overhead", "split_overhead", "merge_overhead", "packs"):
        params[name] = getattr(shape.cost, name)
    params["max_jobs"] = shape.max_jobs
    params["merges_offset"] = layout.merges_offset
    params["workspace_offset"] = layout.workspace_offset
    params["table_in_shared"] = layout.table_in_shared
    return params


def plan_geometry(shape: ScheduleShape) -> Geometry:
    """How mla_plan is launched."""
    jobs = shape.max_jobs if plan_layout(shape).table_in_shared else 0
    return Geometry((1, 1, 1), (PLAN_THREADS, 1, 1), _SCRATCH_BYTES + jobs * _JOB_COLUMNS * _INT_BYTES)


def combine_geometry(num_sms: int, threads: int) -> Geometry:
    """How mla_combine is launched: one CTA per SM, of ``KernelConfig.combine_threads``.

    Not at all when ``shape.max_merges`` is 0.
    """
    return Geometry((num_sms, 1, 1), (threads, 1, 1))


def merge_states_geometry(num_sms: int, num_rows: int, d_v: int) -> Geometry:
    """How mla_merge_states is launched: one CTA per SM, fewer when there is less than a warp's work for each."""
    narrowest_chunks = num_rows * ceil_div(d_v // OCTET, 2)
    return Geometry((max(min(num_sms, narrowest_chunks), 1), 1, 1), (MERGE_STATES_THREADS, 1, 1))


def read_plan(plan: npt.NDArray[np.int32], shape: ScheduleShape) -> Schedule:
    """The lists in a plan that has been copied to the host.

    Parameters
    ----------
    plan
        int32 [plan_layout(shape).total_ints].
    shape
        The shape it was made for.
    """
    layout = plan_layout(shape)
    header = plan[:_HEADER_INTS].view(PLAN_HEADER)[0]

    def rows(offset: int, count: int) -> npt.NDArray[np.int32]:
        return plan[offset : offset + count * _ITEM_INTS].reshape(count, _ITEM_INTS).copy()

    return Schedule(
        part_begin=plan[layout.part_begin_offset : layout.part_begin_offset + shape.num_parts + 1].copy(),
        items=rows(layout.items_offset, int(header["num_items"])),
        merges=rows(layout.merges_offset, int(header["num_merges"])),
        num_slots=int(header["num_slots"]),
        budget=int(header["budget"]),
        num_jobs=int(header["num_jobs"]),
        claimed_parts=int(header["claimed_parts"]),
    )
