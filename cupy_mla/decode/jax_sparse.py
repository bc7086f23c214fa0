"""The sparse functions for programs that JAX compiles (`cupy_mla.jax_ops` has them), and what runs for them.

Outputs and the room for plans and partial results are XLA's; else the custom calls do what the functions do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays import xla
from ..arrays.dtypes import numpy_dtype
from ..arrays.frameworks import CPU
from ..arrays.view import ArrayView
from ..arrays.xla import CustomCall, start, view_buffer, view_hosts
from ..call.problem import LSE_DTYPE, PLAN_DTYPE
from ..call.sparse import describe_sparse_decode, describe_sparse_prefill, validate_lengths
from ..call.sparse_options import (
    SPARSE_DECODE_ARRAYS,
    SPARSE_OPTIONS,
    SPARSE_PREFILL_ARRAYS,
    SparseDecodeArrays,
    SparseOptions,
    SparsePrefillArrays,
)
from ..call.traced import jax_module, like, take_parts, views_of_parts
from ..errors import InvalidArgumentError
from ..gpu.device import require_backend
from ..settings import wants_validation
from . import prefill, sparse
from .blueprint import PlanMemory
from .gathered import SparseStrides
from .gathered_decode import prepare_sparse_decode
from .jax_calls import attribute_of, bits_of, option_of
from .plan_arrays import check_plan_array, plan_array_bytes
from .prefill import prefill_shapes, run_prefill
from .sparse import CALL_INPUTS, run_sparse_decode
from .sparse_plan import sparse_plan_kind

_DECODE_TARGET = "cupy_mla.mla_sparse_decode"
_PLAN_TARGET = "cupy_mla.plan_sparse_decode"
_PREFILL_TARGET = "cupy_mla.mla_sparse_prefill"
_GIVEN = "given"
_ATTRIBUTES = (*(option.name for option in SPARSE_OPTIONS), _GIVEN)
_DECODE_INPUTS = SPARSE_DECODE_ARRAYS[: SPARSE_DECODE_ARRAYS.index("out")]
_PREFILL_INPUTS = SPARSE_PREFILL_ARRAYS[: SPARSE_PREFILL_ARRAYS.index("out")]


@like(sparse.mla_sparse_decode, sparse.plan_sparse_decode)
def mla_sparse_decode(
    q: Any, kv_cache: Any, indices: Any, *, platform: str | None = None, **named: Any
) -> tuple[Any, Any]:
    """`cupy_mla.mla_sparse_decode` for JAX arrays and tracers.

    Parameters
    ----------
    q, kv_cache, indices
        As in `cupy_mla.mla_sparse_decode`.
    platform
        ``"cpu"`` or ``"cuda"``: what a program that is being traced will run on. None: JAX's default backend.
    **named
        Other arrays and options, as in `cupy_mla.mla_sparse_decode`, and ``fixed_split_tokens`` and ``kernel`` as in
        `cupy_mla.plan_sparse_decode`. ``plan`` is one from `plan_sparse_decode`, made with the same options. Options
        are static. What ``validate`` finds is raised when the program runs.

    Returns
    -------
    out, lse
        As `cupy_mla.mla_sparse_decode` returns them, as JAX arrays.

    Raises
    ------
    InvalidArgumentError, PlanMismatchError
        An argument is wrong; raised while tracing.
    UnsupportedDeviceError
        The GPU is not Hopper, the platform is neither CPU nor CUDA, or the settings ask for the other backend.
    MissingDependencyError
        The platform is CUDA and jax-tvm-ffi is not installed.
    """
    parts = take_parts(_DECODE_INPUTS, (q, kv_cache, indices), named)
    plan, checked = parts[-1], SparseOptions(**named)
    arrays, views, location = views_of_parts(parts, _DECODE_INPUTS, platform)
    problem, _ = describe_sparse_decode(SparseDecodeArrays(*views), checked)
    require_backend(*location, "q")
    kind = sparse_plan_kind(problem, location, checked)
    if plan is not None:
        check_plan_array(plan.shape[0], problem, checked, kind)
    jax = jax_module()
    queries = problem.queries
    if queries.is_empty:
        return jax.numpy.zeros(queries.out_shape, queries.dtype), jax.numpy.zeros(queries.lse_shape, LSE_DTYPE)
    results = [
        jax.ShapeDtypeStruct(problem.queries.out_shape, problem.queries.dtype),
        jax.ShapeDtypeStruct(problem.queries.lse_shape, LSE_DTYPE),
    ]
    if kind is not None:
        size = kind.workspace_bytes if plan is None else kind.partial_bytes
        results.append(jax.ShapeDtypeStruct((size,), PLAN_DTYPE))
    out, lse, *_ = _call(_DECODE_TARGET, _decode_in_callback, results, arrays, parts, checked, location[0])
    return out, lse


@like(sparse.plan_sparse_decode)
def plan_sparse_decode(q: Any, kv_cache: Any, indices: Any, *, platform: str | None = None, **named: Any) -> Any:
    """The plan of a sparse decode step as a uint8 array, for all layers of a compiled program.

    Arguments and errors are those of `cupy_mla.plan_sparse_decode` and of `mla_sparse_decode`. On the CPU it holds
    nothing.
    """
    parts = take_parts(_DECODE_INPUTS, (q, kv_cache, indices), named)
    checked = SparseOptions(**named)
    arrays, views, location = views_of_parts(parts, _DECODE_INPUTS, platform)
    problem, _ = describe_sparse_decode(SparseDecodeArrays(*views), checked)
    require_backend(*location, "q")
    size = plan_array_bytes(problem, checked, sparse_plan_kind(problem, location, checked))
    jax = jax_module()
    if location[0] == CPU or problem.queries.is_empty:
        return jax.numpy.zeros((size,), PLAN_DTYPE)
    register_calls(location[0])
    result = jax.ShapeDtypeStruct((size,), PLAN_DTYPE)
    return jax.ffi.ffi_call(_PLAN_TARGET, result)(*arrays, **_attributes(checked, parts))


@like(prefill.mla_sparse_prefill)
def mla_sparse_prefill(
    q: Any, kv: Any, indices: Any, *, platform: str | None = None, **named: Any
) -> tuple[Any, Any, Any]:
    """`cupy_mla.mla_sparse_prefill` for JAX arrays and tracers: out, max_logits and lse.

    Arguments are those of `cupy_mla.mla_sparse_prefill`, options static; ``platform`` and errors as in
    `mla_sparse_decode`.
    """
    parts = take_parts(_PREFILL_INPUTS, (q, kv, indices), named)
    checked = SparseOptions(**named)
    arrays, views, location = views_of_parts(parts, _PREFILL_INPUTS, platform)
    problem, _ = describe_sparse_prefill(SparsePrefillArrays(*views), checked)
    require_backend(*location, "q")
    jax = jax_module()
    out_shape, row_shape = prefill_shapes(problem)
    rows = jax.ShapeDtypeStruct(row_shape, LSE_DTYPE)
    results = [jax.ShapeDtypeStruct(out_shape, problem.queries.dtype), rows, rows]
    out, max_logits, lse = _call(_PREFILL_TARGET, _prefill_in_callback, results, arrays, parts, checked, location[0])
    return out, max_logits, lse


@functools.cache
def register_calls(device: str) -> bool:
    """Register the custom calls for a device; False where jax-tvm-ffi is missing and not needed.

    Raises
    ------
    MissingDependencyError
        It is missing, and the device is a GPU.
    """
    return xla.register(CALLS, device)


def _call(
    target: str,
    in_callback: Any,
    results: list[Any],
    arrays: list[Any],
    parts: Sequence[Any],
    options: SparseOptions,
    device: str,
) -> Sequence[Any]:
    """A custom call, or a callback where there can be none."""
    jax = jax_module()
    if register_calls(device):
        return tuple(jax.ffi.ffi_call(target, results)(*arrays, **_attributes(options, parts)))
    callback = functools.partial(in_callback, options, bits_of(parts), [(r.shape, str(r.dtype)) for r in results])
    return tuple(jax.pure_callback(callback, tuple(results), *arrays))


def _attributes(options: SparseOptions, parts: Sequence[Any]) -> dict[str, Any]:
    values = {option.name: attribute_of(option, getattr(options, option.name)) for option in SPARSE_OPTIONS}
    return {**values, _GIVEN: np.int64(bits_of(parts))}


# When the program runs -----------------------------------------------------------------------------------------------


def _decode_in_callback(
    options: SparseOptions, given: int, results: list[tuple[tuple[int, ...], str]], *arrays: Any
) -> tuple[np.ndarray, ...]:
    made = tuple(np.empty(shape, numpy_dtype(dtype)) for shape, dtype in results)
    run_sparse_decode((*_inputs(_DECODE_INPUTS, given, view_hosts(arrays)), *view_hosts(made)), _values(options))
    return made


def _prefill_in_callback(
    options: SparseOptions, given: int, results: list[tuple[tuple[int, ...], str]], *arrays: Any
) -> tuple[np.ndarray, ...]:
    made = tuple(np.empty(shape, numpy_dtype(dtype)) for shape, dtype in results)
    run_prefill((*_inputs(_PREFILL_INPUTS, given, view_hosts(arrays)), *view_hosts(made)), _values(options))
    return made


def _run_prefill(*values: Any) -> None:
    """The custom call: attributes, then the inputs, then out, max_logits, lse."""
    options, given, buffers = _unpack(values)
    inputs = _inputs(_PREFILL_INPUTS, given, buffers)
    run_prefill((*inputs, *buffers), _values(options), start(inputs[0].location))


def _run_decode(*values: Any) -> None:
    """The custom call: attributes, then the inputs (and a plan), then out, lse (and a workspace)."""
    options, given, buffers = _unpack(values)
    arrays = _inputs(_DECODE_INPUTS, given, buffers)
    out, lse, *workspace = buffers
    stream = start(arrays[0].location)
    if stream is None:
        run_sparse_decode((*arrays, out, lse), _values(options))
        return
    problem, inputs = describe_sparse_decode(SparseDecodeArrays(*[*arrays, out, lse]), options)
    kind = sparse_plan_kind(problem, inputs.location, options)
    assert kind is not None  # on a GPU
    _validate(problem, inputs, options, stream)
    scale = problem.queries.default_softmax_scale if options.softmax_scale is None else options.softmax_scale
    addresses = inputs.addresses(*CALL_INPUTS)
    lengths, extra_lengths, plan = inputs.addresses("topk_length", "extra_topk_length", "plan")
    if not workspace or workspace[0].shape[0] < (kind.partial_bytes if plan else kind.workspace_bytes):
        raise InvalidArgumentError("platform", "the one that the program runs on, cuda", "another while it was traced")
    memory = PlanMemory(kind, workspace[0].pointer, plan)
    if not plan:
        kind.launch_planner(lengths, 0, memory.pointer, stream, extra_lengths)
    strides = SparseStrides.of(problem, inputs)
    call = prepare_sparse_decode(kind, scale, options.empty_lse, strides, inputs.kv_scale_value)
    call(addresses, memory, stream)


def _run_plan(*values: Any) -> None:
    """The custom call: attributes, then the inputs, then the plan."""
    options, given, buffers = _unpack(values)
    problem, inputs = describe_sparse_decode(SparseDecodeArrays(*_inputs(_DECODE_INPUTS, given, buffers)), options)
    kind = sparse_plan_kind(problem, inputs.location, options)
    stream = start(inputs.location)
    assert kind is not None  # only called on GPUs
    assert stream is not None
    _validate(problem, inputs, options, stream)
    lengths, extra_lengths = inputs.addresses("topk_length", "extra_topk_length")
    kind.launch_planner(lengths, 0, buffers[0].pointer, stream, extra_lengths)


def _validate(problem: Any, inputs: Any, options: SparseOptions, stream: int) -> None:
    if wants_validation(options.validate, inputs.location[0] != CPU):  # the setting counts when the program runs
        validate_lengths(problem, inputs, stream)


def _unpack(values: tuple[Any, ...]) -> tuple[SparseOptions, int, list[ArrayView]]:
    """Options, which inputs there are, and views of inputs and results."""
    *options, given = values[: len(_ATTRIBUTES)]
    views = [view_buffer(buffer) for buffer in values[len(_ATTRIBUTES) :]]
    return SparseOptions(*map(option_of, SPARSE_OPTIONS, options)), int(given), views


def _inputs(names: Sequence[str], given: int, buffers: list[ArrayView]) -> list[Any]:
    """The arrays that the first buffers are, None for one that is not there; takes them off the list."""
    return [buffers.pop(0) if given >> index & 1 else None for index in range(len(names))]


def _values(options: SparseOptions) -> tuple[Any, ...]:
    return tuple(getattr(options, option.name) for option in SPARSE_OPTIONS)


CALLS = {
    _DECODE_TARGET: CustomCall(_run_decode, _ATTRIBUTES),
    _PLAN_TARGET: CustomCall(_run_plan, _ATTRIBUTES),
    _PREFILL_TARGET: CustomCall(_run_prefill, _ATTRIBUTES),
}
