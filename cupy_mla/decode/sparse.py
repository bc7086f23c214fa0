"""Sparse MLA decoding: each query token of a step attends to tokens of the cache that indices name."""

from __future__ import annotations

import math
from typing import Any

from ..arrays.exchange import as_numpy, empty_like, finish, keep_imported
from ..arrays.frameworks import check_stream, current_stream
from ..arrays.sketch import pointer_of
from ..call.known import KnownCalls
from ..call.problem import LSE_DTYPE
from ..call.sparse import describe_sparse_decode, validate_lengths
from ..call.sparse_options import (
    SPARSE_DECODE,
    SPARSE_DECODE_ARRAYS,
    SparseDecodeArrays,
    SparseOptions,
    sparse_option_names,
)
from ..call.sparse_problem import SparseInputs, SparseProblem
from ..errors import InvalidArgumentError
from ..gpu.device import require_backend
from ..settings import get_settings, wants_validation
from .blueprint import CallMemory, PlanMemory, SparseBlueprint
from .gathered import SparseStrides
from .gathered_decode import SparseDecodeCall, prepare_sparse_decode
from .plan_arrays import check_plan_array
from .reference_sparse import sparse_reference
from .sparse_plan import SparsePlan, sparse_plan_kind

# Places in the tuples that calls are recognised by.
_LENGTHS, _EXTRA_LENGTHS, _PLAN, _OUT, _LSE = (
    SPARSE_DECODE_ARRAYS.index(name) for name in ("topk_length", "extra_topk_length", "plan", "out", "lse")
)
# The same arrays as `SparseInputs` has them.
CALL_INPUTS = tuple(name.removesuffix("_cache") for name in SPARSE_DECODE_ARRAYS)
_VALIDATE = sparse_option_names(SPARSE_DECODE).index("validate")

_known: KnownCalls[SparseDecodeCall] = KnownCalls(SPARSE_DECODE_ARRAYS)


def mla_sparse_decode(
    q: Any,
    kv_cache: Any,
    indices: Any,
    *,
    topk_length: Any = None,
    attn_sink: Any = None,
    extra_kv_cache: Any = None,
    extra_indices: Any = None,
    extra_topk_length: Any = None,
    layout: str | None = None,
    extra_layout: str | None = None,
    kv_scale: Any = None,
    softmax_scale: float | None = None,
    head_dim_v: int = 512,
    cp_world: int = 1,
    plan: SparsePlan | None = None,
    out: Any = None,
    lse: Any = None,
    empty_lse: float = -math.inf,
    stream: int | None = None,
    validate: bool | None = None,
    strict: bool = True,
) -> tuple[Any, Any]:
    """Attention of queries to the tokens of a paged cache that indices name.

    ``out = softmax(scale * q @ k^T) @ k[..., :head_dim_v]`` over the keys ``k`` of these tokens. CUDA arrays run on the
    Hopper kernel, on the caller's current stream and without a host synchronisation; CPU arrays run on the NumPy
    reference backend.

    Parameters
    ----------
    q
        [batch, seqlen_q, num_heads_q, d_qk] bfloat16 or float16. Any strides with a contiguous last dimension. Without
        a request or a query token (an extent of 0) the results are empty, and nothing is launched.
    kv_cache
        [num_pages, page_size, num_heads_kv, d_qk] of q's type; any page size from 1. The first ``head_dim_v`` columns
        are also the value. Or a cache in another layout, of bytes (`cupy_mla.layouts`), beside queries of bfloat16.
    indices
        [batch, seqlen_q, topk] int32: slots of the cache, ``page * page_size + offset`` (`slots_of` makes them of token
        numbers), the same for all kv heads; or [batch, seqlen_q, num_heads_kv, topk]. -1 and every other number outside
        of the cache name no token. A slot named twice counts twice. topk may be any number, also 0.
    topk_length
        [batch] or [batch, seqlen_q] int32: so many leading indices of a query token count, the others are not read.
        None: all. With a plan on a GPU, those count that the plan was last updated with.
    attn_sink
        [num_heads_q] float32, natural logarithm: one more score of each head, of a key without a value. ``out`` is
        multiplied by exp(lse) / (exp(lse) + exp(sink)); lse is without it. -inf has no effect, +inf gives out = 0.
        None: no sinks.
    extra_kv_cache, extra_indices, extra_topk_length
        A second cache, e.g. the compressed one of DeepSeek V4, with the tokens of it that are attended to in the same
        softmax; all as their namesakes, with as many KV heads. Page size, number of indices and lengths are its own.
    layout, extra_layout
        Name of a cache's layout, e.g. ``"fp8_ds_mla"``. None: what its element type and last dimension mean, where they
        leave no doubt; of the second cache, ``layout`` if it may have that. A GPU takes two caches of one layout, or of
        two layouts that have codes for the same values.
    kv_scale
        What stored values are multiplied by, for layouts that have one scale for the whole cache (one for both): a
        number, or one float32 in an array, which is read when the call runs.
    softmax_scale
        Factor on the scores; None: ``d_qk ** -0.5``.
    head_dim_v
        Width of the output.
    cp_world
        Of a cache that is sharded along the sequence: over how many ranks (`cupy_mla.parallel.local_slots` finds the
        slots of one of them). Above 1 what a query token that is cut leaves for its merge keeps more bits where the
        cache is bfloat16, as the results of all ranks are merged once more.
    plan
        From `plan_sparse_decode`, for calls that share their topk_length. None: the call plans by itself.
    out, lse
        Arrays to write to, of the shapes returned; None: new ones of q's framework.
    empty_lse
        The lse of a query token without a token: -inf, the neutral element of a merge, or +inf, as FlashMLA has it.
    stream
        ``cudaStream_t`` to run on; None: the current stream of q's framework.
    validate
        Check topk_length; on a GPU it is read back for it (synchronises). None: on the CPU yes, on a GPU as the setting
        CUPY_MLA_VALIDATE says. Without it, a length is taken as clamped to 0 and topk.
    strict
        As in `cupy_mla.mla_decode`.

    Returns
    -------
    out
        [batch, seqlen_q, num_heads_q, head_dim_v] of q's type; 0 for a query token without a token.
    lse
        [batch, num_heads_q, seqlen_q] float32: natural logarithm of the sum of exponentials of the scaled scores.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value. Nothing was written.
    PlanMismatchError
        The plan was made for other shapes or settings.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    extra = extra_kv_cache, extra_indices, extra_topk_length
    arrays = (q, kv_cache, indices, topk_length, attn_sink, kv_scale, *extra, None, out, lse)
    options = head_dim_v, softmax_scale, empty_lse, validate, strict, layout, extra_layout, cp_world
    return run_sparse_decode(arrays, options, plan, stream)


def plan_sparse_decode(
    q: Any,
    kv_cache: Any,
    indices: Any,
    *,
    topk_length: Any = None,
    extra_kv_cache: Any = None,
    extra_indices: Any = None,
    extra_topk_length: Any = None,
    layout: str | None = None,
    extra_layout: str | None = None,
    kv_scale: Any = None,
    head_dim_v: int = 512,
    cp_world: int = 1,
    fixed_split_tokens: int | None = None,
    kernel: str = "auto",
    stream: int | None = None,
    validate: bool | None = None,
    strict: bool = True,
) -> SparsePlan:
    """Plan a sparse decode step once, for all layers that share its shapes, its topk_length and its extra_topk_length.

    Parameters
    ----------
    q, kv_cache, indices, topk_length, extra_kv_cache, extra_indices, extra_topk_length
        As in `mla_sparse_decode`. Of all but the lengths only shapes, types and strides count.
    layout, extra_layout, kv_scale, head_dim_v, cp_world, stream, validate, strict
        As in `mla_sparse_decode`.
    fixed_split_tokens
        Cut the tokens of each query token after every so many (a multiple of 64; those of a second cache begin at a
        multiple of 64), whatever the batch: the same query token then gives the same bits in any batch. None: cut where
        it balances the GPU best.
    kernel
        The decode kernel: "gathered_narrow16", "gathered_narrow32" or "gathered_wide64" (16, 32 or 64 query heads a
        CTA), for FP8 caches "gathered_fp8_narrow16", "gathered_fp8_narrow32" or "gathered_fp8_wide64", or "auto", the
        one that should take the least time. On the CPU the name is checked and changes nothing.

    Returns
    -------
    SparsePlan
        Updated with ``topk_length`` and ``extra_topk_length``.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    arrays = SparseDecodeArrays(
        q, kv_cache, indices, topk_length, kv_scale=kv_scale, extra_kv_cache=extra_kv_cache,
        extra_indices=extra_indices, extra_topk_length=extra_topk_length,
    )  # fmt: skip
    options = SparseOptions(
        head_dim_v=head_dim_v, validate=validate, strict=strict, layout=layout, extra_layout=extra_layout,
        cp_world=cp_world, fixed_split_tokens=fixed_split_tokens, kernel=kernel,
    )  # fmt: skip
    problem, inputs, kind = describe_sparse_plan(arrays, options, stream)
    plan = SparsePlan(problem, inputs.location, q, kind, stream)
    if kind is not None:
        stream = current_stream(q, inputs.location[1]) if stream is None else stream
        plan.plan_for(inputs.topk_length, inputs.extra_topk_length, stream)
    return plan


def describe_sparse_plan(
    arrays: SparseDecodeArrays, options: SparseOptions, stream: int | None = None
) -> tuple[SparseProblem, SparseInputs, SparseBlueprint | None]:
    """Check what a plan is to be made for.

    Returns
    -------
    problem, inputs
        As `describe_sparse_decode` returns them.
    kind
        What the plan is; None where nothing is planned.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    check_stream(stream)
    problem, inputs = describe_sparse_decode(arrays, options, stream)
    on_gpu = require_backend(*inputs.location, "q")
    kind = sparse_plan_kind(problem, inputs.location, options)
    if wants_validation(options.validate, on_gpu):
        validate_lengths(problem, inputs, stream)
    return problem, inputs, kind


def run_sparse_decode(
    arrays: tuple[Any, ...], options: tuple[Any, ...], plan: SparsePlan | None = None, stream: int | None = None
) -> tuple[Any, Any]:
    """`mla_sparse_decode` on what it was given, unchecked; on the way of every interface but XLA's.

    Parameters
    ----------
    arrays
        One for each field of `SparseDecodeArrays`, in their order.
    options
        One for each of the leading fields of `SparseOptions`, in their order.
    plan, stream
        As in `mla_sparse_decode`.

    Returns
    -------
    out, lse
        As in `mla_sparse_decode`.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value. Nothing was written.
    PlanMismatchError
        The plan was made for other shapes or settings.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    if stream is not None:
        check_stream(stream)
    settings = get_settings()
    kind = plan.blueprint if type(plan) is SparsePlan else None
    found = None
    unchecked = options[_VALIDATE] is False or (options[_VALIDATE] is None and not settings.validate)
    if unchecked and (plan is None or kind is not None):
        found = _known.find(arrays, options, kind, settings)
        if found is not None and found[2] is not None:
            return _launch(found[2], found[1], plan, arrays, stream)
    if plan is not None and not isinstance(plan, SparsePlan):
        expected = "a SparsePlan from plan_sparse_decode, or None (torch.ops.cupy_mla and cupy_mla.jax_ops have arrays)"
        raise InvalidArgumentError("plan", expected, type(plan).__name__)
    checked = SparseOptions(*options)
    problem, inputs = describe_sparse_decode(SparseDecodeArrays(*arrays), checked, stream)
    on_gpu = require_backend(*inputs.location, "q")
    if plan is not None:
        plan.check(problem, inputs.location)
    else:
        kind = sparse_plan_kind(problem, inputs.location, checked)
        if inputs.plan is not None:
            check_plan_array(inputs.plan.shape[0], problem, checked, kind)
    if wants_validation(checked.validate, on_gpu):
        validate_lengths(problem, inputs, stream)
    scale = problem.queries.default_softmax_scale if checked.softmax_scale is None else checked.softmax_scale
    if kind is None:  # the CPU, or nothing to compute
        out, lse = _outputs(problem, arrays, stream)
        if not on_gpu:
            sparse_reference(problem, inputs, scale, out=as_numpy(out), lse=as_numpy(lse), empty_lse=checked.empty_lse)
        return _finished(arrays, out, lse, stream)
    strides = SparseStrides.of(problem, inputs)
    call = prepare_sparse_decode(kind, scale, checked.empty_lse, strides, inputs.kv_scale_value)
    if found is not None:
        _known.remember(found[0], call, settings)
    addresses = inputs.addresses(*CALL_INPUTS)
    return _launch(call, addresses, plan, arrays, stream, inputs)


def _outputs(problem: SparseProblem, arrays: tuple[Any, ...], stream: int | None) -> tuple[Any, Any]:
    """out and lse as given, or new ones."""
    q, out, lse, queries = arrays[0], arrays[_OUT], arrays[_LSE], problem.queries
    out = empty_like(q, queries.out_shape, queries.dtype, stream) if out is None else out
    lse = empty_like(q, queries.lse_shape, LSE_DTYPE, stream) if lse is None else lse
    return out, lse


def _launch(
    call: SparseDecodeCall,
    addresses: tuple[int, ...],
    plan: SparsePlan | None,
    arrays: tuple[Any, ...],
    given_stream: int | None,
    inputs: SparseInputs | None = None,
) -> tuple[Any, Any]:
    """Queue a prepared call; makes the outputs and the plan that were not given."""
    kind, q, out, lse = call.kind, arrays[0], arrays[_OUT], arrays[_LSE]
    stream = current_stream(q, kind.location[1]) if given_stream is None else given_stream
    if out is None or lse is None:
        out, lse = _outputs(kind.problem, arrays, given_stream)
        addresses = (*addresses[:_OUT], pointer_of(out), pointer_of(lse))
    memory: PlanMemory | None = plan
    if memory is None:
        made, lengths, extra = addresses[_PLAN], addresses[_LENGTHS], addresses[_EXTRA_LENGTHS]
        memory = CallMemory(kind, q, made, lengths, 0, stream, extra)
    call(addresses, memory, stream)
    if inputs is None:  # recognised, which only arrays of torch and CuPy are
        return out, lse
    keep_imported(inputs.views(), stream)
    return _finished(arrays, out, lse, stream)


def _finished(arrays: tuple[Any, ...], out: Any, lse: Any, stream: int | None = None) -> tuple[Any, Any]:
    """Those that were not given in the framework of q."""
    q = arrays[0]
    return (
        out if arrays[_OUT] is not None else finish(q, out, stream),
        lse if arrays[_LSE] is not None else finish(q, lse, stream),
    )
