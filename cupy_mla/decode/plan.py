"""Decode plans: how the work of a batch is cut, made on the device once and used by every layer of a step."""

from __future__ import annotations

from typing import Any

from ..arrays.exchange import keep_imported
from ..arrays.frameworks import CUDA, check_stream, current_stream
from ..arrays.view import view
from ..call.memo import remembered
from ..call.options import DecodeOptions
from ..call.problem import DecodeProblem
from ..errors import InvalidArgumentError
from ..gpu.device import describe_device
from ..gpu.launch import is_capturing
from ..kernels.combine import combine_source
from ..kernels.family import KernelConfig
from ..schedule.pieces import ceil_div
from ..schedule.shape import ScheduleShape, check_fixed_split, choose_parts
from .blueprint import Blueprint, DenseBlueprint, Plan, check_index

_BLUEPRINTS_KEPT = 1024  # ragged batches may bring a new one every step


def schedule_shape(
    problem: DecodeProblem,
    config: KernelConfig,
    num_sms: int,
    max_seqlen_k: int | None = None,
    fixed_split_tokens: int | None = None,
) -> ScheduleShape:
    """What a schedule for a problem depends on besides the lengths."""
    queries = problem.queries
    tokens = 1 if queries.ragged else queries.seqlen_q
    blocks_per_job, num_parts = choose_parts(num_sms, ceil_div(tokens * queries.group_heads, config.rows))
    return ScheduleShape(
        num_parts=num_parts,
        blocks_per_job=blocks_per_job,
        rows=config.rows,
        group_heads=queries.group_heads,
        num_heads_kv=queries.num_heads_kv,
        batch=queries.batch,
        seqlen_q=queries.seqlen_q,
        max_seqlen_k=problem.keys.bound(max_seqlen_k),
        causal=queries.causal,
        ragged=queries.ragged,
        fixed_split_tokens=fixed_split_tokens,
        total_q=queries.total_q if queries.ragged else None,
        cost=config.family.cost.pieces,
        shard=problem.keys.shard,
    )


def plan_kind(problem: DecodeProblem, location: tuple[str, int], options: DecodeOptions) -> DenseBlueprint | None:
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
    # It imports all families, which importing the package need not wait for.
    from ..kernels.choose import check_kernel, check_named

    check_kernel(options.kernel)
    check_fixed_split(options.fixed_split_tokens)
    device, device_id = location
    if device != CUDA or problem.queries.is_empty:
        if options.strict:
            check_named(options.kernel, problem)
        return None
    return blueprint(problem, device_id, options.max_seqlen_k, options.fixed_split_tokens, options.kernel)


@remembered(_BLUEPRINTS_KEPT)
def blueprint(
    problem: DecodeProblem, device_id: int, max_seqlen_k: int | None, fixed_split_tokens: int | None, kernel: str
) -> DenseBlueprint:
    """The blueprint of a kind of call; the same object whenever it is asked for again.

    Raises
    ------
    InvalidArgumentError
        The plan would be too large, ``fixed_split_tokens`` is no multiple of a tile, or ``kernel`` is the name of no
        kernel or of one that cannot serve the call.
    UnsupportedDeviceError
        There is no such GPU.
    """
    from ..kernels.choose import choose_config

    num_sms = describe_device(device_id).num_sms
    config = choose_config(problem, num_sms, max_seqlen_k, fixed_split_tokens, kernel)
    shape = schedule_shape(problem, config, num_sms, max_seqlen_k, fixed_split_tokens)
    return Blueprint(problem, device_id, num_sms, config, shape, combine_source(config))


class DecodePlan(Plan[DecodeProblem]):
    """How the work of one kind of call is cut, on the device; made by `cupy_mla.plan_decode`.

    Compiled programs have the same in an array: ``torch.ops.cupy_mla.plan_decode`` and `cupy_mla.jax_ops.plan_decode`.
    `SparsePlan` is that of sparse calls, and `cupy_mla.flash_mla` keeps one inside of FlashMLA's metadata.

    A plan belongs to the shapes and settings it was made with, and to the lengths it was last updated with. Calls that
    share a plan must follow one another on one stream, as they share its workspace.

    Attributes
    ----------
    max_seqlen_k : int
        Largest length of a request, in tokens.

    Parameters
    ----------
    problem, location, owner, kind, stream
        As in `Plan`.
    max_seqlen_k
        Largest length that updates may bring, in tokens, where ``kind`` does not say so; None: what the block table can
        hold.
    """

    def __init__(
        self,
        problem: DecodeProblem,
        location: tuple[str, int],
        owner: Any,
        kind: DenseBlueprint | None,
        *,
        max_seqlen_k: int | None = None,
        stream: int | None = None,
    ) -> None:
        super().__init__(problem, location, owner, kind, stream)
        self.max_seqlen_k = problem.keys.bound(max_seqlen_k) if kind is None else kind.shape.max_seqlen_k

    def update(self, cache_seqlens: Any, cu_seqlens_q: Any = None, *, stream: int | None = None) -> None:
        """Plan again for new lengths: one small kernel, no host synchronisation; may be captured in a CUDA graph.

        Parameters
        ----------
        cache_seqlens
            [batch] int32 on the plan's device; lengths up to the plan's maximum (longer ones are cut to it). Of a plan
            for a shard (``cp_world``) with a causal mask over several query tokens: ``total_seqlens``.
        cu_seqlens_q
            [batch + 1] int32 for ragged queries, else None.
        stream
            CUDA stream; None: the current stream of the framework of ``cache_seqlens``.

        Raises
        ------
        InvalidArgumentError
            A wrong shape, type, device or alignment, or cu_seqlens_q given or missing against the plan.
        """
        check_stream(stream)
        queries = self.problem.queries
        lengths = view(cache_seqlens, "cache_seqlens", stream)
        check_index(lengths, "cache_seqlens", (queries.batch,), self.location)
        if (cu_seqlens_q is not None) != queries.ragged:
            expected = "an array, as the plan is ragged" if queries.ragged else "None, as the plan is not ragged"
            raise InvalidArgumentError("cu_seqlens_q", expected, type(cu_seqlens_q).__name__)
        if stream is None and self.blueprint is not None:
            stream = current_stream(cache_seqlens, self.location[1])
        starts = None
        if cu_seqlens_q is not None:
            starts = view(cu_seqlens_q, "cu_seqlens_q", stream)
            check_index(starts, "cu_seqlens_q", (queries.batch + 1,), self.location)
        if stream is None or self.blueprint is None:
            return  # nothing is planned
        self.launch(lengths.pointer, 0 if starts is None else starts.pointer, stream)
        self.updated_in_capture = is_capturing(stream)
        keep_imported((lengths, starts), stream)
