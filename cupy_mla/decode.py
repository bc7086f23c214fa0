"""Dense MLA decoding: the operation users call."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .arrays import CUDA, ArrayView, as_numpy, current_stream, empty_like, finish, framework_of, keep_until_done, view
from .configs import KernelConfig
from .decode_params import DECODE_PARAMS
from .device import require_supported
from .errors import InvalidArgumentError, UnsupportedDeviceError
from .launch import launch_kernel
from .plan import DecodePlan
from .plan_layout import COMBINE_PARAMS, STORE_ALIGNMENT, combine_geometry
from .problem import DecodeInputs, DecodeProblem, check_output, describe_decode, validate_values
from .reference import mla_decode_reference
from .settings import get_settings
from .tensor_maps import kv_tensor_map

_LOG2_E = math.log2(math.e)


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
    plan: DecodePlan | None = None,
    out: Any = None,
    lse: Any = None,
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
        [batch + 1] int32: ragged queries; request r has queries cu_seqlens_q[r] to cu_seqlens_q[r + 1].
    plan
        From `plan_decode`, for calls that share their lengths. None: the call plans by itself.
    out, lse
        Arrays to write to, of the shapes returned; None: new ones of q's framework.
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
        A query with no visible key gives out = 0 and lse = -inf.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value. Nothing was written.
    PlanMismatchError
        The plan was made for other shapes or settings.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    problem, inputs = describe_decode(
        q,
        kv_cache,
        block_table,
        cache_seqlens,
        head_dim_v=head_dim_v,
        softmax_scale=softmax_scale,
        causal=causal,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=plan.problem.seqlen_q if plan is not None and cu_seqlens_q is not None else None,
        stream=stream,
    )
    first_q = q[0] if isinstance(q, (tuple, list)) else q
    on_gpu = _require_backend(inputs)
    if plan is not None:
        if not isinstance(plan, DecodePlan):
            raise InvalidArgumentError("plan", "a DecodePlan from plan_decode, or None", type(plan).__name__)
        plan.check(problem, inputs)
    out_view = _given_output(out, "out", problem.out_shape, problem.dtype, inputs, stream)
    lse_view = _given_output(lse, "lse", problem.lse_shape, "float32", inputs, stream)
    if get_settings().validate if validate is None else validate:
        validate_values(problem, inputs, stream)
    scale = problem.default_softmax_scale if softmax_scale is None else float(softmax_scale)
    if not on_gpu:
        return _decode_on_cpu(problem, inputs, scale, first_q, out, lse)

    given_stream = stream
    if stream is None:
        stream = current_stream(first_q, inputs.location[1])
    out_array = empty_like(first_q, problem.out_shape, problem.dtype, given_stream) if out is None else out
    lse_array = empty_like(first_q, problem.lse_shape, "float32", given_stream) if lse is None else lse
    out_view = out_view or view(out_array, "out", stream)
    lse_view = lse_view or view(lse_array, "lse", stream)
    if 0 not in problem.out_shape:
        if plan is None:
            plan = DecodePlan(problem, inputs.location, first_q, stream=given_stream)
            starts = 0 if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q.pointer
            plan.launch(inputs.cache_seqlens.pointer, starts, stream)
        _launch(problem, inputs, plan, scale, out_view, lse_view, stream)
        if framework_of(first_q) not in ("torch", "cupy"):
            keep_until_done((inputs, plan), stream)
    return (
        out if out is not None else finish(first_q, out_array, stream),
        lse if lse is not None else finish(first_q, lse_array, stream),
    )


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
    _require_backend(inputs)
    first_q = q[0] if isinstance(q, (tuple, list)) else q
    plan = DecodePlan(
        problem,
        inputs.location,
        first_q,
        max_seqlen_k=max_seqlen_k,
        fixed_split_tokens=fixed_split_tokens,
        stream=stream,
    )
    plan.update(cache_seqlens, cu_seqlens_q, stream=stream)
    return plan


def _require_backend(inputs: DecodeInputs) -> bool:
    """Whether the call runs on the GPU; refuses what the settings or the GPU do not allow."""
    device, device_id = inputs.location
    backend = get_settings().backend
    if device == CUDA:
        if backend == "numpy":
            raise UnsupportedDeviceError("CUPY_MLA_BACKEND=numpy takes CPU arrays; q is on a CUDA device")
        require_supported(device_id)
        return True
    if backend == "cuda":
        raise UnsupportedDeviceError("CUPY_MLA_BACKEND=cuda takes CUDA arrays; q is on the CPU")
    return False


def _given_output(
    array: Any, name: str, shape: tuple[int, ...], dtype: str, inputs: DecodeInputs, stream: int | None
) -> ArrayView | None:
    if array is None:
        return None
    array_view = view(array, name, stream)
    check_output(array_view, name, shape, dtype, inputs.location, contiguous_rows=name == "out")
    return array_view


def _decode_on_cpu(
    problem: DecodeProblem, inputs: DecodeInputs, scale: float, q: Any, out: Any, lse: Any
) -> tuple[Any, Any]:
    out_array = empty_like(q, problem.out_shape, problem.dtype) if out is None else out
    lse_array = empty_like(q, problem.lse_shape, "float32") if lse is None else lse
    mla_decode_reference(problem, inputs, scale, out=as_numpy(out_array), lse=as_numpy(lse_array))
    return (out if out is not None else finish(q, out_array), lse if lse is not None else finish(q, lse_array))


def _launch(
    problem: DecodeProblem,
    inputs: DecodeInputs,
    plan: DecodePlan,
    scale: float,
    out: ArrayView,
    lse: ArrayView,
    stream: int,
) -> None:
    config, shape = plan.config, plan.shape
    assert config is not None  # a plan on a GPU has both
    assert shape is not None
    kv_latent = kv_tensor_map(inputs.kv_latent, config, config.boxes_per_load)
    kv_rope = kv_latent if inputs.kv_rope is None else kv_tensor_map(inputs.kv_rope, config, 1)
    params = np.zeros(1, DECODE_PARAMS)
    params["q_latent"], params["q_latent_strides"] = inputs.q_latent.pointer, _query_strides(inputs.q_latent, problem)
    if inputs.q_rope is not None:
        params["q_rope"], params["q_rope_strides"] = inputs.q_rope.pointer, _query_strides(inputs.q_rope, problem)
    params["block_table"], params["block_table_stride"] = inputs.block_table.pointer, inputs.block_table.strides[0]
    out_strides, lse_strides = _query_strides(out, problem), _lse_strides(lse, problem)
    params["out"], params["out_strides"] = out.pointer, out_strides
    params["lse"], params["lse_strides"] = lse.pointer, lse_strides
    params["partial_out"], params["partial_lse"] = plan.partial_out, plan.partial_lse
    params["plan"] = plan.pointer
    params["num_parts"], params["blocks_per_job"] = shape.num_parts, shape.blocks_per_job
    params["group_heads"], params["scale_log2"] = problem.group_heads, scale * _LOG2_E
    launch_kernel(
        plan.decode_kernel,
        (shape.blocks_per_job, shape.num_parts, 1),
        (config.threads, 1, 1),
        config.shared_memory,
        stream,
        (kv_latent, kv_rope, params),
        programmatic=True,
    )
    if plan.combine_kernel is not None:
        _launch_combine(problem, config, plan, out, out_strides, lse, lse_strides, stream)


def _launch_combine(
    problem: DecodeProblem,
    config: KernelConfig,
    plan: DecodePlan,
    out: ArrayView,
    out_strides: tuple[int, int, int],
    lse: ArrayView,
    lse_strides: tuple[int, int, int],
    stream: int,
) -> None:
    assert plan.combine_kernel is not None
    assert plan.shape is not None
    params = np.zeros(1, COMBINE_PARAMS)
    params["partial_out"], params["partial_lse"], params["plan"] = plan.partial_out, plan.partial_lse, plan.pointer
    params["out"], params["out_strides"] = out.pointer, out_strides
    params["lse"], params["lse_strides"] = lse.pointer, lse_strides
    params["merges_offset"], params["slot_rows"] = plan.merges_offset, plan.shape.rows_per_job
    params["rows"], params["group_heads"], params["d_v"] = config.rows, problem.group_heads, problem.head_dim_v
    params["aligned"] = all(offset * 2 % STORE_ALIGNMENT == 0 for offset in (*out_strides, out.pointer // 2))
    geometry = combine_geometry(plan.num_sms)
    launch_kernel(
        plan.combine_kernel, geometry.grid, geometry.block, geometry.shared_memory, stream, (params,), programmatic=True
    )


def _query_strides(array: ArrayView, problem: DecodeProblem) -> tuple[int, int, int]:
    """Batch, token and head strides in elements of q or out; a ragged array's batch stride is 0."""
    if problem.ragged:
        return 0, array.strides[0], array.strides[1]
    return array.strides[0], array.strides[1], array.strides[2]


def _lse_strides(array: ArrayView, problem: DecodeProblem) -> tuple[int, int, int]:
    """Batch, token and head strides in elements of lse [batch, heads, tokens] or [heads, tokens]."""
    if problem.ragged:
        return 0, array.strides[1], array.strides[0]
    return array.strides[0], array.strides[2], array.strides[1]
