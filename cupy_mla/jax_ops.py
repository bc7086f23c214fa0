"""`mla_decode` for programs that JAX compiles: usable inside ``jax.jit``, and outside.

Inside ``jax.jit`` there are no arrays yet, only their shapes. The checks run on those while the program is traced; the
kernels are queued on XLA's stream when it runs, through jax-tvm-ffi, which registers a function as an XLA custom call
and hands it XLA's buffers. Memory for the plan and for partial results is a result of that call, so XLA allocates it.
On the CPU the NumPy backend runs in the same way, or through ``jax.pure_callback`` where jax-tvm-ffi is not installed;
on a GPU a callback would carry the whole cache to the host, so there jax-tvm-ffi is needed.
"""

from __future__ import annotations

import functools
from typing import Any

from .arrays.frameworks import CPU, CUDA
from .arrays.view import ArrayView, contiguous_strides
from .call.arguments import COPY_ALIGNMENT
from .call.problem import LSE_DTYPE, DecodeProblem
from .decode.jax_calls import DECODE_TARGET, PLAN_TARGET, CallOptions, decode_in_callback, register_calls
from .decode.plan_arrays import check_plan_array, plan_array_bytes, plan_kind
from .errors import InvalidArgumentError, MissingDependencyError, UnsupportedDeviceError
from .gpu.device import require_backend


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
    plan: Any = None,
    max_seqlen_k: int | None = None,
    fixed_split_tokens: int | None = None,
    platform: str | None = None,
) -> tuple[Any, Any]:
    """`cupy_mla.mla_decode` for JAX arrays and tracers.

    Parameters
    ----------
    q, kv_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal, cu_seqlens_q, max_seqlen_q
        As in `cupy_mla.mla_decode`. All but the arrays are static: Python numbers, no tracers.
    plan
        From `plan_decode`, made with the same options; None: the call plans by itself.
    max_seqlen_k, fixed_split_tokens
        As in `plan_decode`.
    platform
        ``"cpu"`` or ``"cuda"``: what a program that is being traced will run on. None: JAX's default backend.

    Returns
    -------
    out, lse
        As `cupy_mla.mla_decode` returns them, as JAX arrays.

    Raises
    ------
    InvalidArgumentError, PlanMismatchError
        An argument is wrong; raised while tracing.
    UnsupportedDeviceError
        The GPU is not Hopper, the platform is neither CPU nor CUDA, or the settings ask for the other backend.
    MissingDependencyError
        The platform is CUDA and jax-tvm-ffi is not installed.
    """
    arrays, options, location, problem = _trace(
        q, kv_cache, block_table, cache_seqlens, cu_seqlens_q, platform,
        head_dim_v=head_dim_v, softmax_scale=softmax_scale, causal=causal, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, fixed_split_tokens=fixed_split_tokens, planned=plan is not None,
    )  # fmt: skip
    arguments = options.plan_arguments(problem, location)
    kind = plan_kind(*arguments)
    if plan is not None:
        given = _view_of_shape(plan, "plan", location)
        if given.dtype != "uint8" or given.ndim != 1:
            raise InvalidArgumentError(
                "plan", "an array from cupy_mla.jax_ops.plan_decode", f"{given.dtype} {given.shape}"
            )
        check_plan_array(given.shape[0], plan_array_bytes(*arguments))
        arrays.append(plan)
    jax = _jax()
    results = [
        jax.ShapeDtypeStruct(problem.out_shape, arrays[0].dtype),
        jax.ShapeDtypeStruct(problem.lse_shape, LSE_DTYPE),
    ]
    if kind is not None:
        size = kind.workspace_bytes - (kind.plan_bytes if options.planned else 0)
        results.append(jax.ShapeDtypeStruct((size,), "uint8"))
    if not register_calls(location[0]):
        return tuple(jax.pure_callback(functools.partial(decode_in_callback, options), tuple(results), *arrays))
    out, lse, *_ = jax.ffi.ffi_call(DECODE_TARGET, results)(*arrays, **options.attributes())
    return out, lse


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
    platform: str | None = None,
) -> Any:
    """The plan of a decode step as a uint8 array, for all layers of a compiled program.

    Arguments and errors are those of `cupy_mla.plan_decode` and of `mla_decode`. On the CPU it holds nothing.
    """
    arrays, options, location, problem = _trace(
        q, kv_cache, block_table, cache_seqlens, cu_seqlens_q, platform,
        head_dim_v=head_dim_v, softmax_scale=None, causal=causal, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, fixed_split_tokens=fixed_split_tokens, planned=False,
    )  # fmt: skip
    jax = _jax()
    size = plan_array_bytes(*options.plan_arguments(problem, location))
    if location[0] == CPU:
        return jax.numpy.zeros((size,), "uint8")
    register_calls(location[0])
    return jax.ffi.ffi_call(PLAN_TARGET, jax.ShapeDtypeStruct((size,), "uint8"))(*arrays, **options.attributes())


# While a program is traced --------------------------------------------------------------------------------------------


def _trace(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    cu_seqlens_q: Any,
    platform: str | None,
    *,
    softmax_scale: float | None,
    **given: Any,
) -> tuple[list[Any], CallOptions, tuple[str, int], DecodeProblem]:
    """Check a call by the shapes of its arrays."""
    q_parts, kv_parts = _parts(q, "q"), _parts(kv_cache, "kv_cache")
    named = [*q_parts, *kv_parts, ("block_table", block_table), ("cache_seqlens", cache_seqlens)]
    if cu_seqlens_q is not None:
        named.append(("cu_seqlens_q", cu_seqlens_q))
    location = _location([array for _, array in named], platform)
    views = [_view_of_shape(array, name, location) for name, array in named]

    def options(scale: Any) -> CallOptions:
        return CallOptions(
            softmax_scale=scale,
            q_parts=len(q_parts),
            kv_parts=len(kv_parts),
            ragged=cu_seqlens_q is not None,
            **given,
        )

    problem, inputs = options(softmax_scale).describe(views)
    require_backend(*inputs.location, "q")
    scale = problem.default_softmax_scale if softmax_scale is None else float(softmax_scale)
    return [array for _, array in named], options(scale), location, problem


def _parts(argument: Any, name: str) -> list[tuple[str, Any]]:
    if not isinstance(argument, (tuple, list)):
        return [(name, argument)]
    if len(argument) != 2:
        raise InvalidArgumentError(name, "an array or a pair (latent, rope)", f"{len(argument)} items")
    return [(f"{name}[{index}]", part) for index, part in enumerate(argument)]


def _location(arrays: list[Any], platform: str | None) -> tuple[str, int]:
    """Where the program will run."""
    jax = _jax()
    if platform is None:
        concrete = [
            array for array in arrays if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
        ]
        platform = next(iter(concrete[0].devices())).platform if concrete else jax.default_backend()
    if platform == CPU:
        return CPU, 0
    if platform not in (CUDA, "gpu"):
        raise UnsupportedDeviceError(f"JAX runs on {platform}; the kernels need CUDA, the NumPy backend the CPU")
    return CUDA, 0  # all GPUs of a program are of one kind


def _view_of_shape(array: Any, name: str, location: tuple[str, int]) -> ArrayView:
    """A view of an array that may not exist yet; XLA's arrays are contiguous and aligned."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise InvalidArgumentError(name, "a JAX array", type(array).__name__)
    shape = tuple(array.shape)
    return ArrayView(COPY_ALIGNMENT, shape, contiguous_strides(shape), str(array.dtype), *location, None)


def _jax() -> Any:
    try:
        import jax
    except ImportError as error:
        raise MissingDependencyError("jax", "jax", "cupy_mla.jax_ops") from error
    return jax
