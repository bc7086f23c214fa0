"""Dense MLA decoding: the operation users call."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ..arrays.exchange import as_numpy, empty_like, finish, keep_imported
from ..arrays.frameworks import CUDA, check_stream, current_stream
from ..arrays.sketch import pointer_of
from ..call.describe import describe_decode
from ..call.known import KnownCalls
from ..call.options import ARRAYS, DECODE, PARTS, ROPE_OF, DecodeArrays, DecodeOptions, option_names
from ..call.problem import LSE_DTYPE, Addresses, DecodeInputs, DecodeProblem
from ..call.values import validate_values
from ..errors import InvalidArgumentError
from ..gpu.device import require_backend
from ..settings import get_settings, wants_validation
from .blueprint import CallMemory, DenseBlueprint, PlanMemory
from .plan import DecodePlan, plan_kind
from .plan_arrays import check_plan_array
from .prepared import CallStrides, DecodeCall
from .reference import mla_decode_reference
from .token_pages import prepare

# Places in the tuples that calls are recognised by.
_VALIDATE = option_names(DECODE).index("validate")
_Q, _OUT, _LSE = (ARRAYS.index(name) for name in ("q", "out", "lse"))
# Prepared calls; for packed q and cache (0 else) the bytes from the latent to the rope columns.
_known: KnownCalls[tuple[DecodeCall, int, int]] = KnownCalls(PARTS, pairs=len(ROPE_OF))
_LENGTHS, _STARTS, _TOTALS, _PLAN = (
    Addresses._fields.index(name) for name in ("cache_seqlens", "cu_seqlens_q", "total_seqlens", "plan")
)


def mla_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    head_dim_v: int = 512,
    softmax_scale: float | None = None,
    causal: bool = False,
    cu_seqlens_q: Any = None,
    max_seqlen_q: int | None = None,
    kv_scale: Any = None,
    compute: str = "auto",
    layout: str | None = None,
    plan: DecodePlan | None = None,
    out: Any = None,
    lse: Any = None,
    empty_lse: float = -math.inf,
    stream: int | None = None,
    validate: bool | None = None,
    strict: bool = True,
    cp_world: int = 1,
    cp_rank: int = 0,
    cp_interleave: int = 1,
    total_seqlens: Any = None,
) -> tuple[Any, Any]:
    """Attention of queries over a paged latent cache: ``out = softmax(scale * q @ k^T) @ k[..., :head_dim_v]``.

    CUDA arrays run on the Hopper kernel, on the caller's current stream and without a host synchronisation; CPU arrays
    run on the NumPy reference backend.

    Parameters
    ----------
    q
        [batch, seqlen_q, num_heads_q, d_qk] bfloat16 or float16; with ``cu_seqlens_q`` [total_q, num_heads_q, d_qk];
        or a pair (latent, rope). Any strides with a contiguous last dimension. Without a request or a query token
        (an extent of 0) the results are empty, and nothing is launched.
    kv_cache
        [num_pages, page_size, num_heads_kv, d_qk] of q's type, or a pair (latent, rope). The first ``head_dim_v``
        columns are the latent part, which is key and value; the rest is the rope part of the key. With bfloat16 queries
        also float8_e4m3fn, the layout ``fp8_e4m3``: values are stored values times ``kv_scale``; or bytes (uint8 or
        float8_e4m3fn) [num_pages, page_size, 1, width] of a layout whose tokens hold their scales: 656 bytes are
        ``fp8_ds_mla``, 584 ``fp8_model1``, 528 ``fp8_ds_mla_no_rope`` or ``fp8_v41``, 288 ``fp4_v41``.
    block_table
        [batch, max_pages_per_seq] int32: pages of each request. Entries past its last page may hold anything.
    cache_seqlens
        [batch] int32: tokens of each request, at most max_pages_per_seq * page_size.
    head_dim_v
        Width of the latent part and of the output.
    softmax_scale
        Factor on the scores; None: ``d_qk ** -0.5``.
    causal
        Query i of s_q sees keys up to ``cache_seqlen - s_q + i`` only.
    cu_seqlens_q
        [batch + 1] int32: ragged queries; request r has queries cu_seqlens_q[r] to cu_seqlens_q[r + 1]. On a GPU, rows
        of q that belong to no request are not computed: their out and lse stay as they are.
    max_seqlen_q
        Largest number of query tokens of a request when ragged; None: that of the plan, or total_q. Not read back: on a
        GPU a request that has more gets an output for the first so many only, and a wrong one if causal.
    kv_scale
        Of an FP8 cache, and only of one: a number, or one float32 in an array [] or [1] on q's device, which is read
        when the call runs. Or two of them, for the latent and the rope part: a pair of numbers, or an array [2].
    compute
        How products with an FP8 cache are computed. ``"exact"``: K is converted to fp16, which holds every e4m3
        value. ``"split"``: q is the sum of two e4m3 parts, multiplied by FP8 tensor cores; rows of q with outliers are
        computed exactly. ``"auto"``: what should take less time of these two. ``"fp8"``: q is rounded to e4m3, with a
        power of two for each token and head, and multiplied by FP8 tensor cores. V is exact in all of them.
    layout
        Name of the cache's layout. None: what its type and width mean, where they leave no doubt.
    plan
        From `plan_decode`, for calls that share their lengths. None: the call plans by itself.
    out, lse
        Arrays to write to, of the shapes returned; None: new ones of q's framework.
    empty_lse
        The lse of a query with no visible key: -inf, the neutral element of a merge, or +inf, as FlashMLA has it.
    stream
        ``cudaStream_t`` to run on; None: the current stream of q's framework.
    validate
        Check lengths and pages; on a GPU they are read back for it (synchronises). None: on the CPU yes, on a GPU as
        the setting CUPY_MLA_VALIDATE says.
    strict
        Refuse on the CPU too what a GPU would refuse: widths, page sizes and strides that no kernel takes. False: the
        NumPy backend takes any.
    cp_world, cp_rank, cp_interleave
        Of a cache that is sharded along the sequence over ``cp_world`` ranks: which of them this one is, and how many
        tokens in a row lie on the same rank. Token t of a request is on rank ``t // cp_interleave % cp_world``
        (`cupy_mla.parallel`). They matter where ``causal`` hides anything: query i of s_q then sees the tokens of this
        cache up to place ``total_seqlen - s_q + i`` in the request.
    total_seqlens
        [batch] int32: tokens of each request on all ranks, where the mask goes by them; ``cache_seqlens`` is what the
        rank has of them (`local_lengths`), and a GPU reads this array alone.

    Returns
    -------
    out
        [batch, seqlen_q, num_heads_q, head_dim_v] of q's type, or [total_q, num_heads_q, head_dim_v].
    lse
        [batch, num_heads_q, seqlen_q] float32, or [num_heads_q, total_q]: natural logarithm of the sum of exponentials.
        A query with no visible key gives out = 0 and lse = ``empty_lse``.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value. Nothing was written.
    PlanMismatchError
        The plan was made for other shapes or settings.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    arrays = (q, kv_cache, block_table, cache_seqlens, cu_seqlens_q, total_seqlens, kv_scale, None, out, lse)
    options: tuple[Any, ...] = (head_dim_v, softmax_scale, causal, max_seqlen_q, empty_lse, validate, strict, compute)
    if layout is not None or cp_world != 1 or cp_rank or cp_interleave != 1:  # few calls pay for what few have
        options = (*options, layout, cp_world, cp_rank, cp_interleave)
    return run_decode(arrays, options, plan, stream)


def plan_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    head_dim_v: int = 512,
    causal: bool = False,
    cu_seqlens_q: Any = None,
    max_seqlen_q: int | None = None,
    kv_scale: Any = None,
    compute: str = "auto",
    layout: str | None = None,
    max_seqlen_k: int | None = None,
    fixed_split_tokens: int | None = None,
    kernel: str = "auto",
    stream: int | None = None,
    validate: bool | None = None,
    strict: bool = True,
    cp_world: int = 1,
    cp_rank: int = 0,
    cp_interleave: int = 1,
    total_seqlens: Any = None,
) -> DecodePlan:
    """Plan a decode step once, for all layers that share its shapes and lengths.

    Parameters
    ----------
    q, kv_cache, block_table, cache_seqlens, head_dim_v, causal, cu_seqlens_q, kv_scale, compute, layout, stream,
    validate, strict, cp_world, cp_rank, cp_interleave, total_seqlens
        As in `mla_decode`. Of q, kv_cache and kv_scale only shapes, types and strides count.
    max_seqlen_q
        Largest number of query tokens of a request when ragged; None: total_q.
    max_seqlen_k
        Largest length that a later `DecodePlan.update` may bring, in tokens; None: what the block table can hold. With
        ``fixed_split_tokens`` it bounds the workspace.
    fixed_split_tokens
        Cut each request after every so many tokens (a multiple of 64), whatever the batch: the same request then gives
        the same bits in any batch. None: cut where it balances the GPU best.
    kernel
        The decode kernel: "narrow16", "narrow32" or "wide64" (16, 32 or 64 query rows a CTA); for FP8 caches
        "fp8_split16", "fp8_split32", "fp8_split64", "fp8_exact16", "fp8_turns16" (exact, for long requests),
        "fp8_exact32", "fp8_exact64", for ``compute="fp8"`` "fp8_query16", "fp8_query32" or "fp8_query64", for tokens
        that hold their scales "row_pages16", "row_pages32" or "row_pages64", and of 656 or 528 bytes with float32
        scales "row_tiles16" or "row_tiles32"; for pages of one token also "token_pages16", "token_pages32" or
        "token_pages64"; or "auto", the one that should take the least time. On the CPU, where there is but one, the
        name is checked and changes nothing.

    Returns
    -------
    DecodePlan
        Updated with ``cache_seqlens``.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    arrays = DecodeArrays(q, kv_cache, block_table, cache_seqlens, cu_seqlens_q, total_seqlens, kv_scale)
    options = DecodeOptions(
        head_dim_v=head_dim_v,
        causal=causal,
        max_seqlen_q=max_seqlen_q,
        validate=validate,
        strict=strict,
        max_seqlen_k=max_seqlen_k,
        fixed_split_tokens=fixed_split_tokens,
        kernel=kernel,
        compute=compute,
        layout=layout,
        cp_world=cp_world,
        cp_rank=cp_rank,
        cp_interleave=cp_interleave,
    )
    problem, inputs, kind = describe_plan(arrays, options, stream)
    first_q = q[0] if isinstance(q, (tuple, list)) else q
    plan = DecodePlan(problem, inputs.location, first_q, kind, max_seqlen_k=options.max_seqlen_k, stream=stream)
    lengths = cache_seqlens if problem.keys.shard is None else total_seqlens
    plan.update(lengths, cu_seqlens_q, stream=stream)
    return plan


def describe_plan(
    arrays: DecodeArrays, options: DecodeOptions, stream: int | None = None
) -> tuple[DecodeProblem, DecodeInputs, DenseBlueprint | None]:
    """Check what a plan is to be made for.

    Returns
    -------
    problem, inputs
        As `describe_decode` returns them.
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
    problem, inputs = describe_decode(arrays, options, stream)
    on_gpu = require_backend(*inputs.location, "q")
    kind = plan_kind(problem, inputs.location, options)
    if wants_validation(options.validate, on_gpu):
        validate_values(problem, inputs, stream, options.max_seqlen_k)
    return problem, inputs, kind


def run_decode(
    arrays: tuple[Any, ...], options: tuple[Any, ...], plan: DecodePlan | None = None, stream: int | None = None
) -> tuple[Any, Any]:
    """`mla_decode` on what it was given, unchecked; on the way of every interface to the kernels but XLA's.

    Parameters
    ----------
    arrays
        One for each field of `DecodeArrays`, in their order.
    options
        One for each of the leading fields of `DecodeOptions`, in their order.
    plan, stream
        As in `mla_decode`.

    Returns
    -------
    out, lse
        As in `mla_decode`.

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
    kind = plan.blueprint if type(plan) is DecodePlan else None
    validate = options[_VALIDATE]
    found = None
    if (validate is False or (validate is None and not settings.validate)) and (plan is None or kind is not None):
        found = _known.find(arrays, options, kind, settings)
    if found is not None:
        key, addresses, known = found
        if known is not None:
            call, q_rope_offset, kv_rope_offset = known
            if q_rope_offset or kv_rope_offset:
                # By name, as a star takes three times as long.
                q, q_rope, kv, kv_rope, table, lengths, starts, totals, scale, made, out, lse = addresses
                q_rope, kv_rope = q_rope or q + q_rope_offset, kv_rope or kv + kv_rope_offset
                addresses = (q, q_rope, kv, kv_rope, table, lengths, starts, totals, scale, made, out, lse)
            return _launch(call, addresses, plan, arrays, stream)

    if plan is not None and not isinstance(plan, DecodePlan):
        expected = "a DecodePlan from plan_decode, or None (torch.ops.cupy_mla and cupy_mla.jax_ops have arrays)"
        raise InvalidArgumentError("plan", expected, type(plan).__name__)
    given, checked = DecodeArrays(*arrays), DecodeOptions(*options)
    if plan is not None and given.cu_seqlens_q is not None and checked.max_seqlen_q is None:
        planned = plan.problem.queries
        if planned.ragged and not planned.is_empty:
            checked = replace(checked, max_seqlen_q=planned.seqlen_q)
    problem, inputs = describe_decode(given, checked, stream)
    on_gpu = require_backend(*inputs.location, "q")
    most = checked.max_seqlen_k
    if plan is not None:
        plan.check(problem, inputs.location)
        most = plan.max_seqlen_k
    else:
        kind = plan_kind(problem, inputs.location, checked)
        if inputs.plan is not None:
            check_plan_array(inputs.plan.shape[0], problem, checked, kind)
    if wants_validation(checked.validate, on_gpu):
        validate_values(problem, inputs, stream, most)
    factor = problem.queries.default_softmax_scale if checked.softmax_scale is None else checked.softmax_scale
    if kind is None:
        return _without_kernels(problem, inputs, factor, checked.empty_lse, given, stream)
    call = prepare(kind, factor, checked.empty_lse, CallStrides.of(problem, inputs), inputs.kv_scale_values)
    if found is not None:
        q, q_rope, kv, kv_rope, *_ = addresses
        q_rope_offset = inputs.q_rope.pointer - q if inputs.q_rope is not None and not q_rope else 0
        kv_rope_offset = inputs.kv_rope.pointer - kv if inputs.kv_rope is not None and not kv_rope else 0
        _known.remember(key, (call, q_rope_offset, kv_rope_offset), settings)
    return _launch(call, inputs.addresses(), plan, arrays, stream, inputs)


def _without_kernels(
    problem: DecodeProblem,
    inputs: DecodeInputs,
    scale: float,
    empty_lse: float,
    given: DecodeArrays,
    stream: int | None,
) -> tuple[Any, Any]:
    """A call on the CPU, or one with nothing to compute."""
    q = given.q[0] if isinstance(given.q, (tuple, list)) else given.q
    queries = problem.queries
    out = empty_like(q, queries.out_shape, queries.dtype, stream) if given.out is None else given.out
    lse = empty_like(q, queries.lse_shape, LSE_DTYPE, stream) if given.lse is None else given.lse
    if inputs.location[0] != CUDA:
        mla_decode_reference(problem, inputs, scale, out=as_numpy(out), lse=as_numpy(lse), empty_lse=empty_lse)
    return (
        out if given.out is not None else finish(q, out, stream),
        lse if given.lse is not None else finish(q, lse, stream),
    )


def _launch(
    call: DecodeCall,
    addresses: tuple[int, ...],
    plan: DecodePlan | None,
    arrays: tuple[Any, ...],
    given_stream: int | None,
    inputs: DecodeInputs | None = None,
) -> tuple[Any, Any]:
    """Queue a prepared call; makes the outputs and the plan that were not given."""
    kind = call.kind
    q = arrays[_Q]
    if type(q) is tuple or type(q) is list:
        q = q[0]
    out = given_out = arrays[_OUT]
    lse = given_lse = arrays[_LSE]
    stream = current_stream(q, kind.location[1]) if given_stream is None else given_stream
    if out is None or lse is None:
        problem = kind.problem
        if out is None:
            out = empty_like(q, problem.queries.out_shape, problem.queries.dtype, given_stream)
        if lse is None:
            lse = empty_like(q, problem.queries.lse_shape, LSE_DTYPE, given_stream)
        addresses = (*addresses[:-2], pointer_of(out), pointer_of(lse))
    memory: PlanMemory | None = plan
    if memory is None:
        is_sharded = kind.problem.keys.cp_world > 1
        lengths, starts, made = addresses[_TOTALS if is_sharded else _LENGTHS], addresses[_STARTS], addresses[_PLAN]
        memory = CallMemory(kind, q, made, lengths, starts, stream)
    call(addresses, memory, stream)
    if inputs is None:  # recognised, which only arrays of torch and CuPy are
        return out, lse
    keep_imported(inputs.views(), stream)
    return (
        out if given_out is not None else finish(q, out, stream),
        lse if given_lse is not None else finish(q, lse, stream),
    )
