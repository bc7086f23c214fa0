"""Dense MLA decoding: the operation users call."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..arrays.exchange import as_numpy, empty_like, finish, keep_imported
from ..arrays.frameworks import check_stream, current_stream
from ..arrays.sketch import pointer_of
from ..arrays.view import ArrayView, contiguous_strides, view
from ..call.arguments import as_boolean, check_output, validate_values
from ..call.describe import describe_decode
from ..call.problem import LSE_DTYPE, DecodeInputs, DecodeProblem
from ..errors import InvalidArgumentError
from ..gpu.device import require_backend
from ..settings import get_settings
from .known import Addresses, identify, recall, remember
from .plan import DecodePlan, blueprint, check_plan_options
from .prepared import CallLayout, DecodeCall, prepare
from .reference import mla_decode_reference


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
    plan: DecodePlan | None = None,
    out: Any = None,
    lse: Any = None,
    empty_lse: float = -math.inf,
    stream: int | None = None,
    validate: bool | None = None,
) -> tuple[Any, Any]:
    """Attention of queries over a paged latent cache: ``out = softmax(scale * q @ k^T) @ k[..., :head_dim_v]``.

    CUDA arrays run on the Hopper kernel, on the caller's current stream and without a host synchronisation; CPU arrays
    run on the NumPy reference backend.

    Parameters
    ----------
    q
        [batch, seqlen_q, num_heads_q, d_qk] bfloat16 or float16; with ``cu_seqlens_q`` [total_q, num_heads_q, d_qk];
        or a pair (latent, rope). Any strides with a contiguous last dimension.
    kv_cache
        [num_pages, page_size, num_heads_kv, d_qk] of q's type, or a pair (latent, rope). The first ``head_dim_v``
        columns are the latent part, which is key and value; the rest is the rope part of the key.
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
    plan
        From `plan_decode`, for calls that share their lengths. None: the call plans by itself.
    out, lse
        Arrays to write to, of the shapes returned; None: new ones of q's framework.
    empty_lse
        The lse of a query with no visible key: -inf, the neutral element of a merge, or +inf, as FlashMLA has it.
    stream
        ``cudaStream_t`` to run on; None: the current stream of q's framework.
    validate
        Read lengths and pages back and check them (synchronises). None: the setting CUPY_MLA_VALIDATE.

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
    check_stream(stream)
    settings = get_settings()
    validate = settings.validate if validate is None else as_boolean(validate, "validate")
    first_q = q[0] if isinstance(q, (tuple, list)) and q else q
    identity = None
    if not validate:
        kind = plan.blueprint if type(plan) is DecodePlan else None
        if kind is not None or plan is None:
            others = block_table, cache_seqlens, cu_seqlens_q, out, lse
            identity = identify(q, kv_cache, others, kind, head_dim_v, softmax_scale, causal, max_seqlen_q, empty_lse)
    if identity is not None:
        key, pointers = identity
        known = recall(key, pointers, settings)
        if known is not None:
            return _launch(*known, first_q, plan, out, lse, stream)

    if not (isinstance(empty_lse, float) and math.isinf(empty_lse)):
        raise InvalidArgumentError("empty_lse", "-inf or +inf", repr(empty_lse))
    if plan is not None and not isinstance(plan, DecodePlan):
        raise InvalidArgumentError("plan", "a DecodePlan from plan_decode, or None", type(plan).__name__)
    if plan is not None and plan.problem.ragged and cu_seqlens_q is not None and max_seqlen_q is None:
        max_seqlen_q = plan.problem.seqlen_q
    problem, inputs = describe_decode(
        q,
        kv_cache,
        block_table,
        cache_seqlens,
        head_dim_v=head_dim_v,
        softmax_scale=softmax_scale,
        causal=causal,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        stream=stream,
    )
    on_gpu = require_backend(*inputs.location, "q")
    if plan is not None:
        plan.check(problem, inputs)
    out_view = _given_output(out, "out", problem.out_shape, problem.dtype, inputs, stream)
    lse_view = _given_output(lse, "lse", problem.lse_shape, LSE_DTYPE, inputs, stream)
    if validate:
        validate_values(problem, inputs, stream, None if plan is None else plan.max_seqlen_k)
    scale = problem.default_softmax_scale if softmax_scale is None else float(softmax_scale)
    if not on_gpu:
        return _decode_on_cpu(problem, inputs, scale, empty_lse, first_q, out, lse)

    kind = blueprint(problem, inputs.location[1]) if plan is None else plan.blueprint
    assert kind is not None  # a plan on a GPU has one
    layout = CallLayout.of(
        problem,
        inputs,
        contiguous_strides(problem.out_shape) if out_view is None else out_view.strides,
        contiguous_strides(problem.lse_shape) if lse_view is None else lse_view.strides,
    )
    call = prepare(kind, scale, empty_lse, layout)
    if identity is not None:
        remember(key, call, settings, inputs, pointers)
    addresses = (
        inputs.q_latent.pointer,
        0 if inputs.q_rope is None else inputs.q_rope.pointer,
        inputs.kv_latent.pointer,
        0 if inputs.kv_rope is None else inputs.kv_rope.pointer,
        inputs.block_table.pointer,
        inputs.cache_seqlens.pointer,
        0 if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q.pointer,
        0 if out_view is None else out_view.pointer,
        0 if lse_view is None else lse_view.pointer,
    )
    return _launch(call, addresses, first_q, plan, out, lse, stream, inputs)


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
    max_seqlen_k: int | None = None,
    fixed_split_tokens: int | None = None,
    stream: int | None = None,
) -> DecodePlan:
    """Plan a decode step once, for all layers that share its shapes and lengths.

    Parameters
    ----------
    q, kv_cache, block_table, cache_seqlens, head_dim_v, causal, cu_seqlens_q, stream
        As in `mla_decode`. Of q and kv_cache only shapes, types and strides count.
    max_seqlen_q
        Largest number of query tokens of a request when ragged; None: total_q.
    max_seqlen_k
        Largest length that a later `DecodePlan.update` may bring, in tokens; None: what the block table can hold. With
        ``fixed_split_tokens`` it bounds the workspace.
    fixed_split_tokens
        Cut each request after every so many tokens (a multiple of 64), whatever the batch: the same request then gives
        the same bits in any batch. None: cut where it balances the GPU best.

    Returns
    -------
    DecodePlan
        Updated with ``cache_seqlens``.

    Raises
    ------
    InvalidArgumentError, UnsupportedDeviceError
        As in `mla_decode`.
    """
    check_stream(stream)
    max_seqlen_k, fixed_split_tokens = check_plan_options(max_seqlen_k, fixed_split_tokens)
    problem, inputs = describe_decode(
        q,
        kv_cache,
        block_table,
        cache_seqlens,
        head_dim_v=head_dim_v,
        causal=causal,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        stream=stream,
    )
    on_gpu = require_backend(*inputs.location, "q")
    if get_settings().validate:
        validate_values(problem, inputs, stream, max_seqlen_k)
    first_q = q[0] if isinstance(q, (tuple, list)) else q
    kind = blueprint(problem, inputs.location[1], max_seqlen_k, fixed_split_tokens) if on_gpu else None
    plan = DecodePlan(problem, inputs.location, first_q, kind, max_seqlen_k=max_seqlen_k, stream=stream)
    plan.update(cache_seqlens, cu_seqlens_q, stream=stream)
    return plan


def _given_output(
    array: Any, name: str, shape: tuple[int, ...], dtype: str, inputs: DecodeInputs, stream: int | None
) -> ArrayView | None:
    if array is None:
        return None
    array_view = view(array, name, stream)
    check_output(array_view, name, shape, dtype, inputs.location, contiguous_rows=name == "out")
    return array_view


def _decode_on_cpu(
    problem: DecodeProblem, inputs: DecodeInputs, scale: float, empty_lse: float, q: Any, out: Any, lse: Any
) -> tuple[Any, Any]:
    out_array = empty_like(q, problem.out_shape, problem.dtype) if out is None else out
    lse_array = empty_like(q, problem.lse_shape, "float32") if lse is None else lse
    lse_values = as_numpy(lse_array)
    mla_decode_reference(problem, inputs, scale, out=as_numpy(out_array), lse=lse_values)
    lse_values[np.isneginf(lse_values)] = empty_lse
    return (out if out is not None else finish(q, out_array), lse if lse is not None else finish(q, lse_array))


def _launch(
    call: DecodeCall,
    addresses: Addresses,
    q: Any,
    plan: DecodePlan | None,
    out: Any,
    lse: Any,
    given_stream: int | None,
    inputs: DecodeInputs | None = None,
) -> tuple[Any, Any]:
    """Queue a prepared call; makes the outputs and the plan that were not given."""
    q_latent, q_rope, kv_latent, kv_rope, block_table, cache_seqlens, cu_seqlens_q, out_address, lse_address = addresses
    kind = call.kind
    problem = kind.problem
    stream = current_stream(q, kind.location[1]) if given_stream is None else given_stream
    out_array, lse_array = out, lse
    if out is None:
        out_array = empty_like(q, problem.out_shape, problem.dtype, given_stream)
        out_address = pointer_of(out_array)
    if lse is None:
        lse_array = empty_like(q, problem.lse_shape, LSE_DTYPE, given_stream)
        lse_address = pointer_of(lse_array)
    if plan is None:
        plan = DecodePlan(problem, kind.location, q, kind, stream=given_stream)
        plan.launch(cache_seqlens, cu_seqlens_q, stream)
    call(q_latent, q_rope, kv_latent, kv_rope, block_table, out_address, lse_address, plan, stream)
    if inputs is None:  # recognised, which only arrays of torch and CuPy are
        return out_array, lse_array
    keep_imported(inputs.views(), stream)
    return (
        out if out is not None else finish(q, out_array, stream),
        lse if lse is not None else finish(q, lse_array, stream),
    )
