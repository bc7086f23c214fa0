"""What runs for `cupy_mla.jax_ops`: XLA's custom calls, and their arguments.

Custom calls get XLA's buffers and numbers as attributes; jax-tvm-ffi calls the functions here with them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays.exchange import as_numpy
from ..arrays.frameworks import CPU, CUDA
from ..arrays.view import ArrayView, contiguous_strides
from ..call.arguments import validate_values
from ..call.describe import describe_decode
from ..call.problem import DecodeInputs, DecodeProblem
from ..errors import InvalidArgumentError, MissingDependencyError
from ..settings import get_settings
from .plan import Blueprint, DecodePlan
from .plan_arrays import plan_kind
from .prepared import CallLayout, prepare
from .reference import mla_decode_reference

DECODE_TARGET = "cupy_mla.mla_decode"
PLAN_TARGET = "cupy_mla.plan_decode"
_NOT_GIVEN = -1  # an option that is None, as an attribute
_DLPACK_CPU = 1  # DLPack's device type


@dataclass(frozen=True, slots=True)
class CallOptions:
    """What a call is told besides its arrays."""

    head_dim_v: int
    softmax_scale: float
    causal: bool
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    fixed_split_tokens: int | None
    q_parts: int  # 1: packed, 2: (latent, rope)
    kv_parts: int
    ragged: bool
    planned: bool

    def attributes(self) -> dict[str, Any]:
        """As attributes of a custom call, which are numbers."""
        values: dict[str, Any] = {}
        for name in attribute_names():
            value = getattr(self, name)
            value = _NOT_GIVEN if value is None else value
            values[name] = np.float64(value) if name == "softmax_scale" else np.int64(value)
        return values

    @classmethod
    def of_attributes(cls, values: tuple[Any, ...]) -> CallOptions:
        """What `attributes` told."""
        given = dict(zip(attribute_names(), values, strict=True))
        for name in ("max_seqlen_q", "max_seqlen_k", "fixed_split_tokens"):
            given[name] = None if given[name] == _NOT_GIVEN else given[name]
        return cls(**{**given, "causal": bool(given["causal"])})

    def describe(self, views: list[ArrayView]) -> tuple[DecodeProblem, DecodeInputs]:
        """Check views of a call's inputs, in the order q, kv_cache, block_table, cache_seqlens[, cu_seqlens_q]."""
        inputs = iter(views)
        q = [next(inputs) for _ in range(self.q_parts)]
        kv_cache = [next(inputs) for _ in range(self.kv_parts)]
        block_table, cache_seqlens = next(inputs), next(inputs)
        return describe_decode(
            q if len(q) > 1 else q[0],
            kv_cache if len(kv_cache) > 1 else kv_cache[0],
            block_table,
            cache_seqlens,
            head_dim_v=self.head_dim_v,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            cu_seqlens_q=next(inputs) if self.ragged else None,
            max_seqlen_q=self.max_seqlen_q,
        )

    def plan_arguments(
        self, problem: DecodeProblem, location: tuple[str, int]
    ) -> tuple[DecodeProblem, tuple[str, int], int | None, int | None]:
        """What a plan depends on."""
        return problem, location, self.max_seqlen_k, self.fixed_split_tokens


@functools.cache
def attribute_names() -> tuple[str, ...]:
    """The attributes of the custom calls, in their order."""
    return tuple(field.name for field in dataclasses.fields(CallOptions))


@functools.cache
def register_calls(device: str) -> bool:
    """Register the custom calls for a device; False where jax-tvm-ffi is missing and not needed.

    Raises
    ------
    MissingDependencyError
        It is missing, and the device is a GPU.
    """
    try:
        bridge = importlib.import_module("jax_tvm_ffi")
    except ImportError as error:
        if device == CPU:
            return False
        raise MissingDependencyError("jax-tvm-ffi", "jax", "mla_decode inside jax.jit on a GPU") from error
    import tvm_ffi

    specification = [*(f"attrs.{name}" for name in attribute_names()), "args", "rets"]
    for target, function in ((DECODE_TARGET, _run_decode), (PLAN_TARGET, _run_plan)):
        bridge.register_ffi_target(
            target,
            tvm_ffi.convert(function),
            specification,
            platform="cpu" if device == CPU else "gpu",
            pass_owned_tensor=True,
        )
    return True


def decode_in_callback(options: CallOptions, *arrays: Any) -> tuple[np.ndarray, np.ndarray]:
    """The NumPy backend, on what ``jax.pure_callback`` brings."""
    hosts = [np.asarray(array) for array in arrays]
    views = [
        ArrayView(host.ctypes.data, host.shape, contiguous_strides(host.shape), str(host.dtype), CPU, 0, host)
        for host in map(np.ascontiguousarray, hosts)
    ]
    problem, inputs = options.describe(views[: len(views) - options.planned])
    if get_settings().validate:
        validate_values(problem, inputs, None, options.max_seqlen_k)
    return mla_decode_reference(problem, inputs, options.softmax_scale)


def _run_decode(*values: Any) -> None:
    """The custom call: attributes, then the inputs (and a plan), then out, lse (and a workspace)."""
    options, views, location = _unpack(values)
    num_inputs = options.q_parts + options.kv_parts + 2 + options.ragged
    problem, inputs = options.describe(views[:num_inputs])
    plan = views[num_inputs] if options.planned else None
    out, lse, *workspace = views[num_inputs + options.planned :]
    stream = None if location[0] == CPU else _start(location)
    if get_settings().validate:
        validate_values(problem, inputs, stream, options.max_seqlen_k)
    if stream is None:
        mla_decode_reference(problem, inputs, options.softmax_scale, out=as_numpy(out), lse=as_numpy(lse))
        return
    kind = plan_kind(*options.plan_arguments(problem, location))
    assert kind is not None  # on a GPU there is one
    made = _place(kind, workspace, plan)
    if plan is None:
        starts = 0 if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q.pointer
        made.launch(inputs.cache_seqlens.pointer, starts, stream)
    call = prepare(kind, options.softmax_scale, -math.inf, CallLayout.of(problem, inputs, out.strides, lse.strides))
    call(
        inputs.q_latent.pointer,
        0 if inputs.q_rope is None else inputs.q_rope.pointer,
        inputs.kv_latent.pointer,
        0 if inputs.kv_rope is None else inputs.kv_rope.pointer,
        inputs.block_table.pointer,
        out.pointer,
        lse.pointer,
        made,
        stream,
    )


def _run_plan(*values: Any) -> None:
    """The custom call: attributes, then the inputs, then the plan."""
    options, views, location = _unpack(values)
    problem, inputs = options.describe(views[:-1])
    kind = plan_kind(*options.plan_arguments(problem, location))
    assert kind is not None  # only registered for GPUs
    starts = 0 if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q.pointer
    kind.launch_planner(inputs.cache_seqlens.pointer, starts, views[-1].pointer, _start(location))


def _place(kind: Blueprint, workspace: list[ArrayView], plan: ArrayView | None) -> DecodePlan:
    """A plan in XLA's memory."""
    size = kind.workspace_bytes - (0 if plan is None else kind.plan_bytes)
    if not workspace or workspace[0].shape[0] < size:
        raise InvalidArgumentError("platform", "the one that the program runs on, cuda", "another while it was traced")
    return DecodePlan.at(kind, workspace[0].pointer, None if plan is None else plan.pointer)


def _unpack(values: tuple[Any, ...]) -> tuple[CallOptions, list[ArrayView], tuple[str, int]]:
    views = [_view_of_buffer(buffer) for buffer in values[len(attribute_names()) :]]
    return CallOptions.of_attributes(values[: len(attribute_names())]), views, views[0].location


def _view_of_buffer(buffer: Any) -> ArrayView:
    device_type, device_id = buffer.__dlpack_device__()
    device = CPU if device_type == _DLPACK_CPU else CUDA
    return ArrayView(
        buffer.data_ptr(), tuple(buffer.shape), tuple(buffer.strides), str(buffer.dtype), device,
        device_id if device == CUDA else 0, buffer,
    )  # fmt: skip


def _start(location: tuple[str, int]) -> int:
    """XLA's stream, after its GPU was made current: the driver is called from a thread of XLA's."""
    import cupy
    import tvm_ffi

    cupy.cuda.Device(location[1]).use()
    return int(tvm_ffi.get_raw_stream(tvm_ffi.device("cuda", location[1])))
