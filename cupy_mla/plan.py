"""Decode plans: how the work of a batch is cut, made on the device once and used by every layer of a step."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import CUDA, ArrayView, current_stream, empty_like, view
from .configs import KernelConfig, choose_config
from .device import describe_device
from .errors import InvalidArgumentError, PlanMismatchError
from .jit.module import LoadedKernel, load
from .launch import launch_kernel
from .plan_layout import PLAN_SOURCE, combine_source, plan_geometry, plan_layout, plan_params
from .problem import DecodeInputs, DecodeProblem
from .schedule import ScheduleShape, ceil_div, choose_parts

_PARTIAL_ALIGNMENT = 256  # bytes; sections of the workspace
_ELEMENT_BYTES = 2
_WORD_BYTES = 4  # int32 of the plan, float32 of the lse


def schedule_shape(
    problem: DecodeProblem,
    config: KernelConfig,
    num_sms: int,
    max_seqlen_k: int | None = None,
    fixed_split_tokens: int | None = None,
) -> ScheduleShape:
    """What a schedule for a problem depends on besides the lengths."""
    tokens = 1 if problem.ragged else problem.seqlen_q
    blocks_per_job, num_parts = choose_parts(num_sms, ceil_div(tokens * problem.group_heads, config.rows))
    return ScheduleShape(
        num_parts=num_parts,
        blocks_per_job=blocks_per_job,
        rows=config.rows,
        group_heads=problem.group_heads,
        num_heads_kv=problem.num_heads_kv,
        batch=problem.batch,
        seqlen_q=problem.seqlen_q,
        max_seqlen_k=problem.max_seqlen_k if max_seqlen_k is None else min(max_seqlen_k, problem.max_seqlen_k),
        causal=problem.causal,
        ragged=problem.ragged,
        fixed_split_tokens=fixed_split_tokens,
        total_q=problem.total_q if problem.ragged else None,
    )


class DecodePlan:
    """How the work of one kind of call is cut, on the device; made by `cupy_mla.plan_decode`.

    A plan belongs to the shapes and settings it was made with, and to the lengths it was last updated with. It also
    owns the workspace for partial results, so that a call with a plan and given outputs allocates nothing; calls that
    share a plan must therefore follow one another on one stream.

    Attributes
    ----------
    problem : DecodeProblem
        Shapes and settings.
    config : KernelConfig or None
        The kernel; None on the CPU, where nothing is planned.
    shape : ScheduleShape or None
        What the schedule depends on besides the lengths; None on the CPU.
    """

    def __init__(
        self,
        problem: DecodeProblem,
        location: tuple[str, int],
        owner: Any,
        *,
        max_seqlen_k: int | None = None,
        fixed_split_tokens: int | None = None,
        stream: int | None = None,
    ) -> None:
        self.problem = problem
        self.location = location
        self.config: KernelConfig | None = None
        self.shape: ScheduleShape | None = None
        if location[0] != CUDA:
            return
        device_id = location[1]
        info = describe_device(device_id)
        config = choose_config(problem)
        shape = schedule_shape(problem, config, info.num_sms, max_seqlen_k, fixed_split_tokens)
        layout = plan_layout(shape)
        self.config, self.shape = config, shape
        self.decode_kernel = load(config.source(), device_id)
        self.combine_kernel: LoadedKernel | None = None
        if shape.max_merges > 0:
            self.combine_kernel = load(combine_source(problem.dtype), device_id)
        self.num_sms = info.num_sms
        self.merges_offset = layout.merges_offset
        self._plan_kernel = load(PLAN_SOURCE, device_id)
        self._params = plan_params(shape)
        self._geometry = plan_geometry(shape)
        rows = shape.max_slots * shape.rows_per_job
        sections = (layout.total_ints * _WORD_BYTES, rows * problem.head_dim_v * _ELEMENT_BYTES, rows * _WORD_BYTES)
        offsets = [0]
        for size in sections:
            offsets.append(offsets[-1] + ceil_div(size, _PARTIAL_ALIGNMENT) * _PARTIAL_ALIGNMENT)
        # From q's framework, whose allocator knows its streams and its graph captures.
        self._workspace = empty_like(owner, (offsets[-1],), "uint8", stream)
        base = view(self._workspace, "workspace").pointer
        self.pointer, self.partial_out, self.partial_lse = base, base + offsets[1], base + offsets[2]
        self.workspace_bytes = offsets[-1]

    def update(self, cache_seqlens: Any, cu_seqlens_q: Any = None, *, stream: int | None = None) -> None:
        """Plan again for new lengths: one small kernel, no host synchronisation; may be captured in a CUDA graph.

        Parameters
        ----------
        cache_seqlens
            [batch] int32 on the plan's device; lengths up to the plan's maximum (longer ones are cut to it).
        cu_seqlens_q
            [batch + 1] int32 for ragged queries, else None.
        stream
            CUDA stream; None: the current stream of the framework of ``cache_seqlens``.

        Raises
        ------
        InvalidArgumentError
            A wrong shape, type or device, or cu_seqlens_q given or missing against the plan.
        """
        if self.shape is None:
            return
        if stream is None:
            stream = current_stream(cache_seqlens, self.location[1])
        lengths = view(cache_seqlens, "cache_seqlens", stream)
        _check_index(lengths, "cache_seqlens", self.problem.batch, self.location)
        if (cu_seqlens_q is not None) != self.problem.ragged:
            expected = "an array, as the plan is ragged" if self.problem.ragged else "None, as the plan is not ragged"
            raise InvalidArgumentError("cu_seqlens_q", expected, type(cu_seqlens_q).__name__)
        starts = 0
        if cu_seqlens_q is not None:
            starts_view = view(cu_seqlens_q, "cu_seqlens_q", stream)
            _check_index(starts_view, "cu_seqlens_q", self.problem.batch + 1, self.location)
            starts = starts_view.pointer
        self.launch(lengths.pointer, starts, stream)

    def launch(self, cache_seqlens: int, cu_seqlens_q: int, stream: int) -> None:
        """Queue the planner, given addresses (0 for no cu_seqlens_q)."""
        launch_kernel(
            self._plan_kernel,
            self._geometry.grid,
            self._geometry.block,
            self._geometry.shared_memory,
            stream,
            (np.uint64(cache_seqlens), np.uint64(cu_seqlens_q), np.uint64(self.pointer), self._params),
        )

    def check(self, problem: DecodeProblem, inputs: DecodeInputs) -> None:
        """Refuse a call that this plan was not made for.

        Raises
        ------
        PlanMismatchError
            Shapes or settings differ from the plan's.
        """
        if problem is self.problem and inputs.location == self.location:
            return
        for field in DecodeProblem.__dataclass_fields__:
            if field == "num_pages":  # the pool may have grown since
                continue
            planned, came = getattr(self.problem, field), getattr(problem, field)
            if planned != came:
                raise PlanMismatchError("plan", f"a plan for {field} = {came}", f"one for {field} = {planned}")
        if inputs.location != self.location:
            raise PlanMismatchError("plan", f"a plan on {inputs.location}", f"one on {self.location}")

    def __repr__(self) -> str:
        if self.config is None or self.shape is None:
            return f"DecodePlan(batch={self.problem.batch}, NumPy backend)"
        return (
            f"DecodePlan(batch={self.problem.batch}, kernel={self.config.name}, parts={self.shape.num_parts}, "
            f"blocks_per_job={self.shape.blocks_per_job}, workspace={self.workspace_bytes / 2**20:.1f} MiB)"
        )


def _check_index(array: ArrayView, name: str, length: int, location: tuple[str, int]) -> None:
    if array.shape != (length,) or array.dtype != "int32" or (length > 1 and array.strides != (1,)):
        raise InvalidArgumentError(name, f"contiguous int32 [{length}]", f"{array.dtype} {list(array.shape)}")
    if array.location != location:
        raise InvalidArgumentError(name, f"an array on {location}", f"one on {array.location}")
