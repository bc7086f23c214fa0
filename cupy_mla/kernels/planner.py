"""The planner's kernel, and the plan that it writes in device memory, as the host sees them.

The records of a plan are in `structs`; kernels_cu/core/plan_format.h has the same sections, and tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..call.shard import WHOLE_KEYS
from ..errors import InvalidArgumentError
from ..gpu.jit.source import KernelSource
from ..gpu.launch import Geometry
from ..schedule.make import Schedule
from ..schedule.pieces import ceil_div
from ..schedule.shape import ScheduleShape
from .structs import PLAN_HEADER, PLAN_PARAMS

PLAN_SOURCE = KernelSource(entry="plan/plan.cu", function="mla_plan")
PLAN_THREADS = 256

_SECTION_INTS = 8
_ITEM_INTS = 8
_HEADER_INTS = 8
_JOB_COLUMNS = 7
_INT_BYTES = 4
_ONE_LIST = -1  # kOneList of plan/jobs.h
_SCRATCH_BYTES = 16_400  # PlanScratch
# More jobs than this are tabled in global memory: the table and the scratch stay within `hopper.FREE_SHARED_BYTES`.
_MAX_SHARED_JOBS = 1024


@dataclass(frozen=True, slots=True)
class PlanSections:
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


def plan_sections(shape: ScheduleShape) -> PlanSections:
    """The sections of the plan of a shape.

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
    return PlanSections(_HEADER_INTS, items_offset, merges_offset, workspace_offset, total, table_in_shared)


def _align(ints: int) -> int:
    return ceil_div(ints, _SECTION_INTS) * _SECTION_INTS


def plan_params(shape: ScheduleShape) -> npt.NDArray[Any]:
    """The planner's by-value argument: one element of PLAN_PARAMS."""
    sections = plan_sections(shape)
    params = np.zeros(1, PLAN_PARAMS)
    for name in ("batch", "num_parts", "blocks_per_job", "rows", "group_heads", "num_heads_kv", "seqlen_q"):
        params[name] = getattr(shape, name)
    params["total_q"] = shape.batch * shape.seqlen_q if shape.total_q is None else shape.total_q
    params["max_seqlen_k"] = shape.max_length
    params["max_extra_k"] = _ONE_LIST if shape.max_extra_k is None else shape.max_extra_k
    params["requests_per_length"] = shape.requests_per_length
    params["requests_per_extra_length"] = shape.requests_per_extra_length
    params["causal"] = shape.causal
    params["shard"] = WHOLE_KEYS if shape.shard is None else shape.shard.word
    params["fixed_split_tiles"] = shape.fixed_split_tiles
    for name in ("piece_overhead", "split_overhead", "merge_overhead", "packs"):
        params[name] = getattr(shape.cost, name)
    params["max_jobs"] = shape.max_jobs
    params["merges_offset"] = sections.merges_offset
    params["workspace_offset"] = sections.workspace_offset
    params["table_in_shared"] = sections.table_in_shared
    return params


def plan_geometry(shape: ScheduleShape) -> Geometry:
    """How mla_plan is launched."""
    jobs = shape.max_jobs if plan_sections(shape).table_in_shared else 0
    return Geometry((1, 1, 1), (PLAN_THREADS, 1, 1), _SCRATCH_BYTES + jobs * _JOB_COLUMNS * _INT_BYTES)


def read_plan(plan: npt.NDArray[np.int32], shape: ScheduleShape) -> Schedule:
    """The lists in a plan that has been copied to the host.

    Parameters
    ----------
    plan
        int32 [plan_sections(shape).total_ints].
    shape
        The shape it was made for.
    """
    sections = plan_sections(shape)
    header = plan[:_HEADER_INTS].view(PLAN_HEADER)[0]

    def rows(offset: int, count: int) -> npt.NDArray[np.int32]:
        return plan[offset : offset + count * _ITEM_INTS].reshape(count, _ITEM_INTS).copy()

    return Schedule(
        part_begin=plan[sections.part_begin_offset : sections.part_begin_offset + shape.num_parts + 1].copy(),
        items=rows(sections.items_offset, int(header["num_items"])),
        merges=rows(sections.merges_offset, int(header["num_merges"])),
        num_slots=int(header["num_slots"]),
        budget=int(header["budget"]),
        num_jobs=int(header["num_jobs"]),
        claimed_parts=int(header["claimed_parts"]),
    )
