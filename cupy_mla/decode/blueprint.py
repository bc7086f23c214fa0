"""What plans of dense and of sparse decoding have in common: blueprints, memory, the launch of the planner."""

from __future__ import annotations

import functools
import threading
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np

from ..arrays.dtypes import ITEM_SIZES
from ..arrays.exchange import empty_like
from ..arrays.frameworks import CUDA
from ..arrays.scratch import scratch_like
from ..arrays.sketch import pointer_of
from ..arrays.view import ArrayView, contiguous_strides
from ..call.arguments import settled_strides
from ..call.problem import INDEX_DTYPE, DecodeProblem
from ..call.sparse_problem import SparseProblem
from ..errors import InvalidArgumentError, PlanMismatchError
from ..gpu.jit.module import LoadedKernel, load
from ..gpu.jit.source import KernelSource
from ..gpu.launch import Launch
from ..kernels.family import KernelConfig
from ..kernels.planner import PLAN_SOURCE, plan_geometry, plan_params, plan_sections
from ..schedule.pieces import ceil_div
from ..schedule.shape import ScheduleShape
from ..shown.html import facts_table

_PARTIAL_ALIGNMENT = 256  # bytes; sections of the workspace
_NOTHING_NUMPY, _NOTHING_EMPTY = "the NumPy backend plans nothing", "there is no query token"
_WORD_BYTES = 4  # int32 of the plan, float32 of the lse

P = TypeVar("P", bound=DecodeProblem | SparseProblem)


class Blueprint(Generic[P]):
    """What all plans of one kind of call on one GPU have in common; made once. Holds no device memory.

    Attributes
    ----------
    problem : DecodeProblem or SparseProblem
        Shapes and settings.
    location : (str, int)
        Device and its number.
    num_sms : int
        Streaming multiprocessors of the GPU.
    config : KernelConfig
        The decode kernel.
    shape : ScheduleShape
        What the schedule depends on besides the lengths.
    merges_offset : int
        Where the merges lie in the plan, in ints.
    plan_bytes, partial_out_bytes, partial_bytes, workspace_bytes : int
        Sizes of the plan, of the room for partial outputs and for all partial results, and of all together; rounded up
        so that one may follow the other.

    Parameters
    ----------
    combine
        The kernel that merges partial results.
    """

    def __init__(
        self,
        problem: P,
        device_id: int,
        num_sms: int,
        config: KernelConfig,
        shape: ScheduleShape,
        combine: KernelSource,
    ) -> None:
        self.problem = problem
        self.location = (CUDA, device_id)
        self.num_sms = num_sms
        self.config = config
        self.shape = shape
        self._combine_source = combine
        sections = plan_sections(self.shape)
        self.merges_offset = sections.merges_offset
        rows = self.shape.max_slots * self.shape.rows_per_job
        self.plan_bytes = _section(sections.total_ints * _WORD_BYTES)
        self.partial_out_bytes = _section(rows * problem.queries.head_dim_v * ITEM_SIZES[self.config.partial_dtype])
        self.partial_bytes = self.partial_out_bytes + _section(rows * self.config.partial_lse_bytes)
        self.workspace_bytes = self.plan_bytes + self.partial_bytes
        self._lock = threading.Lock()
        self._pointers = np.zeros(4, np.uint64)  # cache_seqlens, cu_seqlens_q, extra_lengths, plan

    @functools.cached_property
    def decode_kernel(self) -> LoadedKernel:
        """Compiled and loaded when first needed, like the others."""
        return load(self.config.source(), self.location[1])

    @functools.cached_property
    def two_scales_kernel(self) -> LoadedKernel:
        """The same for a cache whose parts have a scale each: layers that share a plan may differ in that."""
        return load(self.config.family.for_two_scales(self.config).source(), self.location[1])

    @functools.cached_property
    def combine_kernel(self) -> LoadedKernel | None:
        """The kernel that merges partial results; None when no schedule of this shape has any."""
        return load(self._combine_source, self.location[1]) if self.shape.max_merges > 0 else None

    @functools.cached_property
    def _planner(self) -> Launch:
        geometry = plan_geometry(self.shape)
        return Launch(
            load(PLAN_SOURCE, self.location[1]),
            geometry.grid,
            geometry.block,
            geometry.shared_memory,
            (*(self._pointers[index : index + 1] for index in range(4)), plan_params(self.shape)),
        )

    def launch_planner(
        self, cache_seqlens: int, cu_seqlens_q: int, plan: int, stream: int, extra_lengths: int = 0
    ) -> None:
        """Queue the planner, given addresses; 0: all requests are the longest, no cu_seqlens_q."""
        planner = self._planner
        with self._lock:
            self._pointers[:] = cache_seqlens, cu_seqlens_q, extra_lengths, plan
            planner(stream)


def _section(size: int) -> int:
    return ceil_div(size, _PARTIAL_ALIGNMENT) * _PARTIAL_ALIGNMENT


DenseBlueprint: TypeAlias = Blueprint[DecodeProblem]
SparseBlueprint: TypeAlias = Blueprint[SparseProblem]


class PlanMemory:
    """Where a plan lies on a GPU, with the room for the partial results of its calls.

    Attributes
    ----------
    pointer, partial_out, partial_lse : int
        Addresses of the plan and of the room for partial results.
    is_settled : bool
        Whether a decode was queued since the plan was written: later ones may read it before their predecessor ends.
    updated_in_capture : bool or None
        Whether `DecodePlan.update` or `SparsePlan.update` was captured in a CUDA graph; None if the plan was written
        otherwise. Only a decode that runs, or is captured, as the update was settles the plan: what is captured does
        not run after what is not.
    pieces : numpy array or None
        None: a call merges partial results. Else they are left to another kernel: each call puts here, in place, what
        its own would be given (`structs.COMBINE_PARAMS`).

    Parameters
    ----------
    kind
        What all plans of this kind share.
    workspace
        Address of ``kind.workspace_bytes``, or without those of the plan where it lies elsewhere.
    plan
        Address of a plan that was made already, ``kind.plan_bytes`` or more; 0: there is room for one in the workspace.
    """

    __slots__ = ("is_settled", "partial_lse", "partial_out", "pieces", "pointer", "updated_in_capture")

    def __init__(self, kind: Blueprint[Any], workspace: int, plan: int = 0) -> None:
        self.pointer = plan or workspace
        self.partial_out = workspace if plan else workspace + kind.plan_bytes
        self.partial_lse = self.partial_out + kind.partial_out_bytes
        self.is_settled = False
        self.updated_in_capture: bool | None = None
        self.pieces: Any = None


class CallMemory(PlanMemory):
    """That of one call without a plan object: made by the call, planned by it too where no plan was made already.

    Parameters
    ----------
    kind
        What all plans of this kind share.
    q
        The array whose framework the memory comes from.
    plan
        Address of a plan that was made already, or 0.
    cache_seqlens, cu_seqlens_q, extra_lengths
        Addresses of what is planned for, as `Blueprint.launch_planner` takes them.
    stream
        The stream of the call.
    """

    __slots__ = ("_scratch",)

    def __init__(
        self,
        kind: Blueprint[Any],
        q: Any,
        plan: int,
        cache_seqlens: int,
        cu_seqlens_q: int,
        stream: int,
        extra_lengths: int = 0,
    ) -> None:
        size = kind.partial_bytes if plan else kind.workspace_bytes
        self._scratch = scratch_like(q, size, kind.location[1], stream)
        PlanMemory.__init__(self, kind, self._scratch.pointer, plan)  # super() takes longer
        if not plan:
            kind.launch_planner(cache_seqlens, cu_seqlens_q, self.pointer, stream, extra_lengths)


class Plan(PlanMemory, Generic[P]):
    """How the work of one kind of call is cut, on the device.

    A plan belongs to the shapes and settings it was made with, and to the lengths it was last updated with. It also
    owns the workspace for partial results, so that a call with a plan and given outputs allocates nothing, and a count
    of the CTAs that have claimed their part; calls that share a plan must therefore follow one another on one stream.

    Attributes
    ----------
    problem : DecodeProblem or SparseProblem
        Shapes and settings.
    location : (str, int)
        Device and its number.
    blueprint : Blueprint or None
        What all plans of this kind share; None where nothing is planned: on the CPU, and without a query token.

    Parameters
    ----------
    owner
        An array whose framework and device the workspace comes from.
    stream
        CUDA stream that the plan will be used on; None: the current one.
    """

    def __init__(
        self, problem: P, location: tuple[str, int], owner: Any, kind: Blueprint[P] | None, stream: int | None = None
    ) -> None:
        self.problem = problem
        self.location = location
        self.blueprint = kind
        if kind is not None:
            # From q's framework, whose allocator knows its streams and its graph captures.
            self._workspace = empty_like(owner, (kind.workspace_bytes,), "uint8", stream)
            super().__init__(kind, pointer_of(self._workspace))

    @property
    def config(self) -> KernelConfig | None:
        """The kernel; None on the CPU, where nothing is planned."""
        return None if self.blueprint is None else self.blueprint.config

    @property
    def shape(self) -> ScheduleShape | None:
        """What the schedule depends on besides the lengths; None on the CPU."""
        return None if self.blueprint is None else self.blueprint.shape

    def launch(self, cache_seqlens: int, cu_seqlens_q: int, stream: int, extra_lengths: int = 0) -> None:
        """Queue the planner, given addresses; 0: all requests are the longest, no cu_seqlens_q."""
        assert self.blueprint is not None  # a plan on a GPU has one
        self.is_settled = False
        self.updated_in_capture = None
        self.blueprint.launch_planner(cache_seqlens, cu_seqlens_q, self.pointer, stream, extra_lengths)

    def check(self, problem: P, location: tuple[str, int]) -> None:
        """Refuse a call that this plan was not made for.

        Raises
        ------
        PlanMismatchError
            Shapes or settings differ from the plan's.
        """
        if problem is not self.problem and problem != self.problem:
            made_for = self.problem.facts()
            name, came = next((name, came) for name, came in problem.facts().items() if came != made_for[name])
            raise PlanMismatchError("plan", f"a plan for {name} = {came}", f"one for {name} = {made_for[name]}")
        if location != self.location:
            raise PlanMismatchError("plan", f"a plan on {location}", f"one on {self.location}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.blueprint is not None:
            raise TypeError("a plan owns memory of its GPU and cannot be copied or pickled: make another (plan_decode)")
        return super().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        kind, start = self.blueprint, f"{type(self).__name__}(batch={self.problem.queries.batch}"
        if kind is None:
            return f"{start}, {_NOTHING_EMPTY if self.problem.queries.is_empty else _NOTHING_NUMPY})"
        return (
            f"{start}, kernel={kind.config.name}, parts={kind.shape.num_parts}, "
            f"blocks_per_job={kind.shape.blocks_per_job}, workspace={kind.workspace_bytes / 2**20:.1f} MiB)"
        )

    def _repr_html_(self) -> str:
        """Tables for notebooks: what the plan is, and what it is for."""
        device, number = self.location
        facts: dict[str, object] = {"device": f"{device}:{number}"}
        kind = self.blueprint
        if kind is None:
            facts["kernel"] = f"none: {_NOTHING_EMPTY if self.problem.queries.is_empty else _NOTHING_NUMPY}"
        else:
            facts |= {
                "kernel": kind.config.name,
                "SMs": kind.num_sms,
                "parts": f"{kind.shape.num_parts}, CTAs of each: {kind.shape.blocks_per_job}",
                "most pieces": kind.shape.max_items,
                "most partial results": kind.shape.max_slots,
                "fixed split, tokens": kind.shape.fixed_split_tokens or "none",
                "workspace": f"{kind.workspace_bytes / 2**20:.1f} MiB",
            }
        return facts_table(type(self).__name__, facts) + self.problem._repr_html_()


def check_index(array: ArrayView, name: str, shape: tuple[int, ...], location: tuple[str, int]) -> None:
    """Refuse lengths or offsets of queries that a planner cannot read.

    Raises
    ------
    InvalidArgumentError
        A wrong shape, type, device or alignment; ``argument`` is ``name``.
    """
    contiguous = 0 in shape or settled_strides(array) == contiguous_strides(array.shape)
    if array.shape != shape or not contiguous or array.dtype != INDEX_DTYPE:
        raise InvalidArgumentError(
            name, f"contiguous {INDEX_DTYPE} {list(shape)}", f"{array.dtype} {list(array.shape)}"
        )
    if array.location != location:
        raise InvalidArgumentError(name, f"an array on {location}", f"one on {array.location}")
    if array.device == CUDA and array.pointer % array.itemsize:
        raise InvalidArgumentError(name, f"an address that is a multiple of {array.itemsize} bytes", hex(array.pointer))
