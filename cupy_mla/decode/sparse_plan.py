"""Plans of sparse decoding: to the planner every query token is a request, and its chosen tokens are the keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..arrays.exchange import keep_imported
from ..arrays.frameworks import CUDA, check_stream, current_stream
from ..arrays.view import ArrayView, view
from ..call.memo import remembered
from ..call.sparse_options import SparseOptions
from ..call.sparse_problem import SparseProblem
from ..errors import InvalidArgumentError
from ..gpu.device import describe_device
from ..gpu.launch import is_capturing
from ..kernels.choose import GATHERED_FAMILIES, check_kernel, check_named, choose_gathered_config
from ..kernels.combine import gathered_combine_source
from ..kernels.family import KernelConfig
from ..schedule.pieces import ceil_div
from ..schedule.shape import ScheduleShape, check_fixed_split, choose_parts
from .blueprint import Blueprint, Plan, SparseBlueprint, check_index

_BLUEPRINTS_KEPT = 1024


def sparse_schedule_shape(
    problem: SparseProblem, config: KernelConfig, num_sms: int, fixed_split_tokens: int | None = None
) -> ScheduleShape:
    """What a schedule for a problem depends on besides the lengths."""
    queries, keys, cost = problem.queries, problem.keys, config.family.cost.pieces
    if keys.cp_share:
        # Each layer chooses other tokens and plans anew: to pack takes longer than it saves.
        cost = replace(cost, packs=False)
    blocks_per_job, num_parts = choose_parts(num_sms, ceil_div(queries.group_heads, config.rows))
    return ScheduleShape(
        num_parts=num_parts,
        blocks_per_job=blocks_per_job,
        rows=config.rows,
        group_heads=queries.group_heads,
        num_heads_kv=queries.num_heads_kv,
        batch=queries.total_q,
        seqlen_q=1,
        max_seqlen_k=keys.topk,
        fixed_split_tokens=fixed_split_tokens,
        cost=cost,
        requests_per_length=keys.tokens_per_length or 1,
        max_extra_k=keys.extra_topk,
        requests_per_extra_length=keys.extra_tokens_per_length or 1,
        lengths_vary=keys.tokens_per_length is not None or keys.extra_tokens_per_length is not None,
    )


def sparse_plan_kind(
    problem: SparseProblem, location: tuple[str, int], options: SparseOptions
) -> SparseBlueprint | None:
    """What a plan for a call is; None where nothing is planned but the same options are refused.

    That is on the CPU, and without a query token.

    Raises
    ------
    InvalidArgumentError
        The plan would be too large, ``fixed_split_tokens`` is no multiple of a tile, or ``kernel`` is the name of no
        kernel or of one that cannot serve the call.
    UnsupportedDeviceError
        There is no such GPU.
    """
    check_kernel(options.kernel, GATHERED_FAMILIES)
    check_fixed_split(options.fixed_split_tokens)
    device, device_id = location
    if device != CUDA or problem.queries.is_empty:
        if options.strict:
            check_named(options.kernel, problem, GATHERED_FAMILIES)
        return None
    return sparse_blueprint(problem, device_id, options.fixed_split_tokens, options.kernel)


@remembered(_BLUEPRINTS_KEPT)
def sparse_blueprint(
    problem: SparseProblem, device_id: int, fixed_split_tokens: int | None, kernel: str
) -> SparseBlueprint:
    """The blueprint of a kind of call; the same object whenever it is asked for again.

    Raises
    ------
    InvalidArgumentError
        The plan would be too large, ``fixed_split_tokens`` is no multiple of a tile, or ``kernel`` is the name of no
        kernel or of one that cannot serve the call.
    UnsupportedDeviceError
        There is no such GPU.
    """
    num_sms = describe_device(device_id).num_sms
    config = choose_gathered_config(
        problem, num_sms, planned=True, fixed_split_tokens=fixed_split_tokens, kernel=kernel
    )
    shape = sparse_schedule_shape(problem, config, num_sms, fixed_split_tokens)
    return Blueprint(problem, device_id, num_sms, config, shape, gathered_combine_source(config))


class SparsePlan(Plan[SparseProblem]):
    """How the work of one kind of sparse call is cut, on the device; made by `cupy_mla.plan_sparse_decode`.

    A plan belongs to the shapes and settings it was made with, and to the topk_length and extra_topk_length it was last
    updated with; not to the indices, which may differ from call to call. Calls that share a plan must follow one
    another on one stream, as they share its workspace. Compiled programs have the same in an array:
    ``torch.ops.cupy_mla.plan_sparse_decode`` and `cupy_mla.jax_ops.plan_sparse_decode`; `DecodePlan` is that of dense
    calls.
    """

    def update(self, topk_length: Any = None, extra_topk_length: Any = None, *, stream: int | None = None) -> None:
        """Plan again for new lengths: one small kernel, no host synchronisation; may be captured in a CUDA graph.

        Parameters
        ----------
        topk_length, extra_topk_length
            int32 on the plan's device, each of the shape that the plan was made with; None if it was made without: then
            there is nothing that could change.
        stream
            CUDA stream; None: the current stream of the framework of the first array that is given.

        Raises
        ------
        InvalidArgumentError
            A wrong shape, type, device or alignment, or lengths given or missing against the plan.
        """
        check_stream(stream)
        keys = self.problem.keys
        views = (
            self._view_lengths(topk_length, "topk_length", keys.tokens_per_length, stream),
            self._view_lengths(extra_topk_length, "extra_topk_length", keys.extra_tokens_per_length, stream),
        )
        given = extra_topk_length if topk_length is None else topk_length
        if given is None or self.blueprint is None:
            return  # nothing is planned
        self.plan_for(*views, current_stream(given, self.location[1]) if stream is None else stream)

    def _view_lengths(self, given: Any, name: str, tokens: int | None, stream: int | None) -> ArrayView | None:
        """The lengths, of which so many query tokens share one."""
        if (given is None) != (tokens is None):
            expected = "None, as the plan is for all indices" if tokens is None else "an array, as the plan has lengths"
            raise InvalidArgumentError(name, expected, type(given).__name__)
        if given is None or tokens is None:
            return None
        lengths = view(given, name, stream)
        queries = self.problem.queries
        by_token = tokens == 1 and lengths.ndim > 1
        num_lengths = queries.total_q // tokens if tokens else queries.batch  # no query tokens share a length
        shape = (queries.batch, queries.seqlen_q) if by_token else (num_lengths,)
        check_index(lengths, name, shape, self.location)
        return lengths

    def plan_for(self, topk_length: ArrayView | None, extra_topk_length: ArrayView | None, stream: int) -> None:
        """Queue the planner."""
        lengths, extra = (
            0 if array is None else array.pointer for array in (topk_length, extra_topk_length)
        )
        self.launch(lengths, 0, stream, extra)
        self.updated_in_capture = is_capturing(stream)
        keep_imported((topk_length, extra_topk_length), stream)
