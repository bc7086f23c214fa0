"""Operators for torch.compile: ``torch.ops.cupy_mla.*``, registered when this module is imported.

They do what the functions of the package do, for CUDA and CPU tensors, and tell torch.compile what comes out. They are
registered with ``torch.library.Library`` and not as ``custom_op``: a function is called as it is, without a layer of
Python that handles its arguments first.

A plan is a tensor here: a compiled program can hold tensors across its parts, and a Python object cannot be in it. See
`cupy_mla.plan_arrays`.
"""

from __future__ import annotations

from typing import Any

from .arrays.frameworks import CPU, CUDA, current_stream
from .arrays.sketch import pointer_of
from .arrays.view import ArrayView
from .cache import append as cache_ops
from .call.arguments import COPY_ALIGNMENT
from .call.describe import describe_decode
from .decode import dense as decode
from .decode import merge
from .decode.plan import Blueprint, DecodePlan
from .decode.plan_arrays import check_plan_array, plan_array_bytes, plan_kind
from .errors import InvalidArgumentError, MissingDependencyError
from .gpu.device import require_backend

NAMESPACE = "cupy_mla"
_PLAN_ALIGNMENT = 32  # bytes; sections of a plan
_KINDS_KEPT = 4096

_PLAN_OPTIONS = "int? max_seqlen_k=None, int? fixed_split_tokens=None, Tensor? q_rope=None, Tensor? kv_rope=None"
_INPUTS = "Tensor q, Tensor kv_cache, Tensor block_table, Tensor cache_seqlens, int head_dim_v=512"
_DECODE = (
    f"{_INPUTS}, float? softmax_scale=None, bool causal=False, Tensor? cu_seqlens_q=None, int? max_seqlen_q=None, *, "
    f"Tensor? plan=None, {_PLAN_OPTIONS}"
)
_SCHEMAS = {
    "plan_decode": (
        f"({_INPUTS}, bool causal=False, Tensor? cu_seqlens_q=None, int? max_seqlen_q=None, *, {_PLAN_OPTIONS}) "
        "-> Tensor"
    ),
    "mla_decode": f"({_DECODE}) -> (Tensor out, Tensor lse)",
    "mla_decode_out": f"({_DECODE}, Tensor(a!) out, Tensor(b!) lse) -> ()",
    "append_tokens": (
        "(Tensor(a!) kv_cache, Tensor kv_new, Tensor? slot_mapping=None, *, Tensor? block_table=None, "
        "Tensor? positions=None, Tensor? requests=None, Tensor(b!)? kv_rope=None, Tensor? kv_new_rope=None) -> ()"
    ),
    "merge_states": "(Tensor outs, Tensor lses) -> (Tensor out, Tensor lse)",
}

_kinds: dict[tuple[Any, ...], tuple[int, Blueprint | None]] = {}


def plan_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: int = 512,
    causal: bool = False,
    cu_seqlens_q: Any = None,
    max_seqlen_q: int | None = None,
    *,
    max_seqlen_k: int | None = None,
    fixed_split_tokens: int | None = None,
    q_rope: Any = None,
    kv_rope: Any = None,
) -> Any:
    """The plan of a decode step as a uint8 tensor; arguments as in `cupy_mla.plan_decode`.

    The size of the tensor says what it is for. On the CPU it holds nothing. Calls that share it follow one another on
    one stream: a decode counts its CTAs in it.
    """
    problem, inputs = describe_decode(
        _pair(q, q_rope),
        _pair(kv_cache, kv_rope),
        block_table,
        cache_seqlens,
        head_dim_v=head_dim_v,
        causal=causal,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
    )
    on_gpu = require_backend(*inputs.location, "q")
    size = plan_array_bytes(problem, inputs.location, max_seqlen_k, fixed_split_tokens)
    if not on_gpu:
        return q.new_zeros((size,), dtype=_torch().uint8)
    plan = q.new_empty((size,), dtype=_torch().uint8)
    kind = plan_kind(problem, inputs.location, max_seqlen_k, fixed_split_tokens)
    assert kind is not None  # on a GPU there is one
    starts = 0 if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q.pointer
    stream = current_stream(q, inputs.location[1])
    kind.launch_planner(inputs.cache_seqlens.pointer, starts, pointer_of(plan), stream)
    return plan


def mla_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: int = 512,
    softmax_scale: float | None = None,
    causal: bool = False,
    cu_seqlens_q: Any = None,
    max_seqlen_q: int | None = None,
    *,
    plan: Any = None,
    max_seqlen_k: int | None = None,
    fixed_split_tokens: int | None = None,
    q_rope: Any = None,
    kv_rope: Any = None,
    out: Any = None,
    lse: Any = None,
) -> tuple[Any, Any]:
    """`cupy_mla.mla_decode` with a plan tensor.

    ``max_seqlen_q``, ``max_seqlen_k`` and ``fixed_split_tokens`` are those that the plan was made with. Without a plan
    the call plans by itself, by the same options.
    """
    q_pair, kv_pair = _pair(q, q_rope), _pair(kv_cache, kv_rope)
    made: DecodePlan | None = None
    if plan is not None or max_seqlen_k is not None or fixed_split_tokens is not None:
        shapes = (q.shape, q.dtype, q.device, kv_cache.shape, block_table.shape, max_seqlen_q)
        options = (head_dim_v, causal, cu_seqlens_q is None, max_seqlen_k, fixed_split_tokens)
        rope_shapes = (None if q_rope is None else q_rope.shape, None if kv_rope is None else kv_rope.shape)
        key = (shapes, options, rope_shapes)
        found = _kinds.get(key)
        if found is None:
            problem, inputs = describe_decode(
                q_pair,
                kv_pair,
                block_table,
                cache_seqlens,
                head_dim_v=head_dim_v,
                causal=causal,
                cu_seqlens_q=cu_seqlens_q,
                max_seqlen_q=max_seqlen_q,
            )
            require_backend(*inputs.location, "q")
            arguments = problem, inputs.location, max_seqlen_k, fixed_split_tokens
            if len(_kinds) >= _KINDS_KEPT:
                _kinds.clear()
            found = _kinds[key] = plan_array_bytes(*arguments), plan_kind(*arguments)
        size, kind = found
        if plan is not None:
            _check_plan(plan, size, q)
        if kind is not None:
            made = DecodePlan(kind.problem, kind.location, q, kind, made=plan)
            if plan is None:
                made.update(cache_seqlens, cu_seqlens_q)
    return decode.mla_decode(
        q_pair,
        kv_pair,
        block_table,
        cache_seqlens,
        head_dim_v=head_dim_v,
        softmax_scale=softmax_scale,
        causal=causal,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        plan=made,
        out=out,
        lse=lse,
    )


def mla_decode_out(*arguments: Any, out: Any, lse: Any, **options: Any) -> None:
    """`mla_decode` into given tensors."""
    mla_decode(*arguments, out=out, lse=lse, **options)


def append_tokens(
    kv_cache: Any,
    kv_new: Any,
    slot_mapping: Any = None,
    *,
    block_table: Any = None,
    positions: Any = None,
    requests: Any = None,
    kv_rope: Any = None,
    kv_new_rope: Any = None,
) -> None:
    """`cupy_mla.append_tokens`; writes to kv_cache (and kv_rope, the rope part of a cache in two tensors)."""
    cache_ops.append_tokens(
        _pair(kv_cache, kv_rope),
        _pair(kv_new, kv_new_rope),
        slot_mapping,
        block_table=block_table,
        positions=positions,
        requests=requests,
    )


def merge_states(outs: Any, lses: Any) -> tuple[Any, Any]:
    """`cupy_mla.merge_states`."""
    return merge.merge_states(outs, lses)


def register() -> None:
    """Register the operators with torch, once.

    Raises
    ------
    MissingDependencyError
        torch is not installed.
    """
    global _library
    if _library is not None:
        return
    torch = _torch()
    library = torch.library.Library(NAMESPACE, "DEF")
    # Strides are part of a call: a compiler must hand tensors over as the program made them.
    strides = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
    for name, schema in _SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, strides))
        for key in ("CPU", "CUDA"):
            library.impl(name, _IMPLEMENTATIONS[name], key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", _FAKES[name], lib=library)
    _library = library  # torch forgets operators whose library is gone


# What comes out, for a compiler: shapes and types only ----------------------------------------------------------------


def _fake_decode(
    q: Any, kv_cache: Any, block_table: Any, cache_seqlens: Any, head_dim_v: int = 512, *_: Any, **options: Any
) -> tuple[Any, Any]:
    if q.dim() not in (3, 4):
        raise InvalidArgumentError("q", "[batch, seqlen_q, heads, width] or [total_q, heads, width]", f"{q.dim()} dims")
    *batch, tokens, heads, _width = q.shape
    out = q.new_empty((*batch, tokens, heads, head_dim_v))
    return out, q.new_empty((*batch, heads, tokens), dtype=_torch().float32)


def _fake_plan(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: int = 512,
    causal: bool = False,
    cu_seqlens_q: Any = None,
    max_seqlen_q: int | None = None,
    *,
    max_seqlen_k: int | None = None,
    fixed_split_tokens: int | None = None,
    q_rope: Any = None,
    kv_rope: Any = None,
) -> Any:
    tensors = (q, q_rope, kv_cache, kv_rope, block_table, cache_seqlens, cu_seqlens_q)
    sizes = [size for tensor in tensors if tensor is not None for size in (*tensor.shape, *tensor.stride())]
    if all(type(size) is int for size in sizes):
        views = [None if tensor is None else _view_of_fake(tensor) for tensor in tensors]
        problem, inputs = describe_decode(
            _pair(views[0], views[1]),
            _pair(views[2], views[3]),
            *views[4:6],
            head_dim_v=head_dim_v,
            causal=causal,
            cu_seqlens_q=views[6],
            max_seqlen_q=max_seqlen_q,
        )
        size = plan_array_bytes(problem, inputs.location, max_seqlen_k, fixed_split_tokens)
    else:  # dynamic shapes: known when it runs
        size = _torch().library.get_ctx().new_dynamic_size()
    return q.new_empty((size,), dtype=_torch().uint8)


def _fake_nothing(*arguments: Any, **options: Any) -> None:
    return None


def _fake_merge(outs: Any, lses: Any) -> tuple[Any, Any]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


_IMPLEMENTATIONS = {
    function.__name__: function for function in (plan_decode, mla_decode, mla_decode_out, append_tokens, merge_states)
}
_FAKES = {
    "plan_decode": _fake_plan,
    "mla_decode": _fake_decode,
    "mla_decode_out": _fake_nothing,
    "append_tokens": _fake_nothing,
    "merge_states": _fake_merge,
}


def _view_of_fake(tensor: Any) -> ArrayView:
    """A view of a tensor without memory; its address is as aligned as any."""
    device = CUDA if tensor.is_cuda else CPU
    dtype = str(tensor.dtype).removeprefix("torch.")
    device_id = (tensor.device.index or 0) if device == CUDA else 0
    return ArrayView(COPY_ALIGNMENT, tuple(tensor.shape), tuple(tensor.stride()), dtype, device, device_id, tensor)


def _check_plan(plan: Any, size: int, q: Any) -> None:
    if plan.dtype != _torch().uint8 or plan.dim() != 1 or plan.device != q.device or not plan.is_contiguous():
        raise InvalidArgumentError(
            "plan",
            f"a tensor from torch.ops.{NAMESPACE}.plan_decode on {q.device}",
            f"{plan.dtype} {list(plan.shape)} on {plan.device}",
        )
    check_plan_array(plan.shape[0], size)
    if q.is_cuda and plan.data_ptr() % _PLAN_ALIGNMENT:
        raise InvalidArgumentError("plan", f"an address that is a multiple of {_PLAN_ALIGNMENT}", hex(plan.data_ptr()))


def _pair(latent: Any, rope: Any) -> Any:
    return latent if rope is None else (latent, rope)


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError("torch", "torch", "torch.ops.cupy_mla") from error
    return torch


_library: Any = None
register()
