"""The functions of the package for programs that JAX compiles: usable inside ``jax.jit``, and outside.

Inside ``jax.jit`` there are no arrays yet, only their shapes. The checks run on those while the program is traced; the
kernels are queued on XLA's stream when it runs, through jax-tvm-ffi, which registers a function as an XLA custom call
and hands it XLA's buffers. Memory for the plan and for partial results is a result of that call, so XLA allocates it.
On the CPU the NumPy backend runs in the same way, or through ``jax.pure_callback`` where jax-tvm-ffi is not installed;
on a GPU a callback would carry the whole cache to the host, so there jax-tvm-ffi is needed.
"""

from __future__ import annotations

import functools
from typing import Any

from .arrays import xla
from .arrays.frameworks import CPU
from .cache.jax_append import append_tokens
from .cache.jax_pages import copy_pages, dequantise_cache, quantise_cache
from .call.describe import describe_decode
from .call.options import PARTS, DecodeArrays, DecodeOptions, read_call
from .call.problem import LSE_DTYPE, PLAN_DTYPE, DecodeInputs, DecodeProblem
from .call.traced import jax_module, like, scale_as_array, two_parts, views_of_parts
from .decode import dense
from .decode.jax_calls import (
    CALLS,
    DECODE_TARGET,
    MERGE_TARGET,
    PLAN_TARGET,
    TracedCall,
    decode_in_callback,
    merge_in_callback,
)
from .decode.jax_sparse import mla_sparse_decode, mla_sparse_prefill, plan_sparse_decode
from .decode.merge import check_states
from .decode.plan import plan_kind
from .decode.plan_arrays import check_plan_array, plan_array_bytes
from .errors import InvalidArgumentError
from .gpu.device import require_backend

__all__ = [
    "append_tokens",
    "copy_pages",
    "dequantise_cache",
    "merge_states",
    "mla_decode",
    "mla_sparse_decode",
    "mla_sparse_prefill",
    "plan_decode",
    "plan_sparse_decode",
    "quantise_cache",
]


@like(dense.mla_decode, dense.plan_decode)
def mla_decode(
    q: Any, kv_cache: Any, block_table: Any, cache_seqlens: Any, *, platform: str | None = None, **named: Any
) -> tuple[Any, Any]:
    """`cupy_mla.mla_decode` for JAX arrays and tracers.

    Parameters
    ----------
    q, kv_cache, block_table, cache_seqlens
        As in `cupy_mla.mla_decode`.
    platform
        ``"cpu"`` or ``"cuda"``: what a program that is being traced will run on. None: JAX's default backend.
    **named
        Other arrays and options, as in `cupy_mla.mla_decode`, and ``max_seqlen_k``, ``fixed_split_tokens`` and
        ``kernel`` as in `cupy_mla.plan_decode`. ``plan`` is one from `plan_decode`, made with the same options. Options
        are static: numbers and strings of Python, no tracers. What ``validate`` finds is raised when the program runs.

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
    call, arrays, problem, inputs = _trace(*read_call(q, kv_cache, block_table, cache_seqlens, **named), platform)
    kind = plan_kind(problem, inputs.location, call.options)
    if inputs.plan is not None:
        check_plan_array(inputs.plan.shape[0], problem, call.options, kind)
    jax = jax_module()
    queries = problem.queries
    if queries.is_empty:
        out = jax.numpy.zeros(queries.out_shape, queries.dtype)
        return out, jax.numpy.full(queries.lse_shape, call.options.empty_lse, LSE_DTYPE)
    results = [
        jax.ShapeDtypeStruct(problem.queries.out_shape, problem.queries.dtype),
        jax.ShapeDtypeStruct(problem.queries.lse_shape, LSE_DTYPE),
    ]
    if kind is not None:
        size = kind.workspace_bytes if inputs.plan is None else kind.partial_bytes
        results.append(jax.ShapeDtypeStruct((size,), PLAN_DTYPE))
    if not register_calls(inputs.location[0]):
        return tuple(jax.pure_callback(functools.partial(decode_in_callback, call), tuple(results), *arrays))
    out, lse, *_ = jax.ffi.ffi_call(DECODE_TARGET, results)(*arrays, **call.attributes())
    return out, lse


@like(dense.plan_decode)
def plan_decode(
    q: Any, kv_cache: Any, block_table: Any, cache_seqlens: Any, *, platform: str | None = None, **named: Any
) -> Any:
    """The plan of a decode step as a uint8 array, for all layers of a compiled program.

    Arguments and errors are those of `cupy_mla.plan_decode` and of `mla_decode`. On the CPU it holds nothing.
    """
    call, arrays, problem, inputs = _trace(*read_call(q, kv_cache, block_table, cache_seqlens, **named), platform)
    jax = jax_module()
    size = plan_array_bytes(problem, call.options, plan_kind(problem, inputs.location, call.options))
    if inputs.location[0] == CPU or problem.queries.is_empty:
        return jax.numpy.zeros((size,), PLAN_DTYPE)
    register_calls(inputs.location[0])
    return jax.ffi.ffi_call(PLAN_TARGET, jax.ShapeDtypeStruct((size,), PLAN_DTYPE))(*arrays, **call.attributes())


def merge_states(outs: Any, lses: Any, *, platform: str | None = None) -> tuple[Any, Any]:
    """`cupy_mla.merge_states`: its arguments, returns and errors; ``platform`` as in `mla_decode`."""
    outs, lses = _stacked(outs, "outs"), _stacked(lses, "lses")
    arrays, views, location = views_of_parts((outs, lses), ("outs", "lses"), platform)
    out_shape, lse_shape = check_states(*views)
    require_backend(*location, "outs")
    jax = jax_module()
    results = jax.ShapeDtypeStruct(out_shape, views[0].dtype), jax.ShapeDtypeStruct(lse_shape, LSE_DTYPE)
    if not register_calls(location[0]):
        return tuple(jax.pure_callback(merge_in_callback, results, *arrays))
    out, lse = jax.ffi.ffi_call(MERGE_TARGET, results)(*arrays)
    return out, lse


@functools.cache
def register_calls(device: str) -> bool:
    """Register the custom calls for a device; False where jax-tvm-ffi is missing and not needed.

    Raises
    ------
    MissingDependencyError
        It is missing, and the device is a GPU.
    """
    return xla.register(CALLS, device)


# While a program is traced --------------------------------------------------------------------------------------------


def _trace(
    given: DecodeArrays, options: DecodeOptions, platform: str | None
) -> tuple[TracedCall, list[Any], DecodeProblem, DecodeInputs]:
    """Check a call by the shapes of its arrays: the custom call's attributes, its inputs, and the description."""
    given.kv_scale = scale_as_array(given.kv_scale)
    q_latent, q_rope = two_parts(given.q, "q")
    kv_latent, kv_rope = two_parts(given.kv_cache, "kv_cache")
    parts = (q_latent, q_rope, kv_latent, kv_rope, *(getattr(given, name) for name in PARTS[4:]))
    arrays, views, _ = views_of_parts(parts, ("q", "q[1]", "kv_cache", "kv_cache[1]", *PARTS[4:]), platform)
    problem, inputs = describe_decode(DecodeArrays.of_parts(views), options)
    require_backend(*inputs.location, "q")
    return TracedCall.of(parts, options), arrays, problem, inputs


def _stacked(arrays: Any, name: str) -> Any:
    """A list or tuple of arrays as one, as in `cupy_mla.merge_states`."""
    if not isinstance(arrays, (list, tuple)):
        return arrays
    said = [(str(getattr(array, "dtype", type(array))), getattr(array, "shape", None)) for array in arrays]
    if not arrays or said != said[:1] * len(said):
        raise InvalidArgumentError(name, "an array, or arrays of one shape and type", str(said))
    return jax_module().numpy.stack(arrays)
