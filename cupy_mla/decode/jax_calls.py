"""What runs for `cupy_mla.jax_ops`: XLA's custom calls, and their arguments.

Custom calls get XLA's buffers and numbers as attributes; jax-tvm-ffi calls the functions here with them.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays.exchange import as_numpy
from ..arrays.frameworks import CPU, CUDA
from ..arrays.view import ArrayView, contiguous_strides
from ..call.arguments import validate_values
from ..call.describe import describe_decode
from ..call.options import OPTIONS, PARTS, DecodeArrays, DecodeOptions, Option
from ..call.problem import DecodeInputs, DecodeProblem
from ..errors import InvalidArgumentError, MissingDependencyError
from ..settings import wants_validation
from .plan import Blueprint, PlanMemory, plan_kind
from .prepared import CallStrides, prepare
from .reference import mla_decode_reference

DECODE_TARGET = "cupy_mla.mla_decode"
PLAN_TARGET = "cupy_mla.plan_decode"
_GIVEN = "given"
# Attributes of custom calls are numbers, in this order.
ATTRIBUTES = (*(option.name for option in OPTIONS), _GIVEN)
_NO_INTEGER = -1  # an option that is None; of a float, NaN
_DLPACK_CPU = 1  # DLPack's device type


@dataclass(frozen=True, slots=True)
class TracedCall:
    """What a custom call takes besides its buffers.

    Attributes
    ----------
    options
        Those of the call.
    given
        Which of `PARTS` the buffers of its inputs are: bit i stands for the i-th.
    """

    options: DecodeOptions
    given: int

    @classmethod
    def of(cls, parts: tuple[Any, ...], options: DecodeOptions) -> TracedCall:
        """Of a call with these parts, None for one that is not there."""
        return cls(options, sum(1 << index for index, part in enumerate(parts) if part is not None))

    def attributes(self) -> dict[str, Any]:
        """As attributes of a custom call."""
        values = {option.name: _number(option, getattr(self.options, option.name)) for option in OPTIONS}
        return {**values, _GIVEN: np.int64(self.given)}

    @classmethod
    def of_attributes(cls, values: tuple[Any, ...]) -> TracedCall:
        """What `attributes` told."""
        *options, given = values
        return cls(DecodeOptions(*map(_option, OPTIONS, options)), int(given))

    def arrays(self, buffers: list[ArrayView]) -> DecodeArrays:
        """The arrays that the first buffers are; takes them off the list."""
        return DecodeArrays.of_parts(
            [buffers.pop(0) if self.given >> index & 1 else None for index in range(len(PARTS))]
        )


def _number(option: Option, value: Any) -> Any:
    if option.type == "float":
        return np.float64(np.nan if value is None else value)
    return np.int64(_NO_INTEGER if value is None else value)


def _option(option: Option, number: Any) -> Any:
    if option.type == "float":
        return None if np.isnan(number) else float(number)
    return None if number == _NO_INTEGER else (bool(number) if option.type == "bool" else int(number))


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

    specification = [*(f"attrs.{name}" for name in ATTRIBUTES), "args", "rets"]
    for target, function in ((DECODE_TARGET, _run_decode), (PLAN_TARGET, _run_plan)):
        bridge.register_ffi_target(
            target,
            tvm_ffi.convert(function),
            specification,
            platform="cpu" if device == CPU else "gpu",
            pass_owned_tensor=True,
        )
    return True


def decode_in_callback(call: TracedCall, *arrays: Any) -> tuple[np.ndarray, np.ndarray]:
    """The NumPy backend, on what ``jax.pure_callback`` brings."""
    hosts = [np.asarray(array) for array in arrays]
    views = [
        ArrayView(host.ctypes.data, host.shape, contiguous_strides(host.shape), str(host.dtype), CPU, 0, host)
        for host in map(np.ascontiguousarray, hosts)
    ]
    problem, inputs = describe_decode(call.arrays(views), call.options)
    _validate(problem, inputs, call.options, None)
    return mla_decode_reference(problem, inputs, _scale(problem, call.options), empty_lse=call.options.empty_lse)


def _run_decode(*values: Any) -> None:
    """The custom call: attributes, then the inputs (and a plan), then out, lse (and a workspace)."""
    call, buffers = _unpack(values)
    options = call.options
    problem, inputs = describe_decode(call.arrays(buffers), options)
    inputs.out, inputs.lse, *workspace = buffers
    scale = _scale(problem, options)
    kind = plan_kind(problem, inputs.location, options)
    stream = None if kind is None else _start(inputs.location)
    _validate(problem, inputs, options, stream)
    if kind is None or stream is None:
        out, lse = as_numpy(inputs.out), as_numpy(inputs.lse)
        mla_decode_reference(problem, inputs, scale, out=out, lse=lse, empty_lse=options.empty_lse)
        return
    addresses = inputs.addresses()
    memory = _place(kind, workspace, addresses.plan)
    if not addresses.plan:
        kind.launch_planner(addresses.cache_seqlens, addresses.cu_seqlens_q, memory.pointer, stream)
    prepare(kind, scale, options.empty_lse, CallStrides.of(problem, inputs))(addresses, memory, stream)


def _run_plan(*values: Any) -> None:
    """The custom call: attributes, then the inputs, then the plan."""
    call, buffers = _unpack(values)
    problem, inputs = describe_decode(call.arrays(buffers), call.options)
    kind = plan_kind(problem, inputs.location, call.options)
    assert kind is not None  # only registered for GPUs
    stream = _start(inputs.location)
    _validate(problem, inputs, call.options, stream)
    addresses = inputs.addresses()
    kind.launch_planner(addresses.cache_seqlens, addresses.cu_seqlens_q, buffers[0].pointer, stream)


def _scale(problem: DecodeProblem, options: DecodeOptions) -> float:
    return problem.queries.default_softmax_scale if options.softmax_scale is None else options.softmax_scale


def _validate(problem: DecodeProblem, inputs: DecodeInputs, options: DecodeOptions, stream: int | None) -> None:
    if wants_validation(options.validate):  # the setting counts when the program runs
        validate_values(problem, inputs, stream, options.max_seqlen_k)


def _place(kind: Blueprint, workspace: list[ArrayView], plan: int) -> PlanMemory:
    """A plan in XLA's memory."""
    size = kind.partial_bytes if plan else kind.workspace_bytes
    if not workspace or workspace[0].shape[0] < size:
        raise InvalidArgumentError("platform", "the one that the program runs on, cuda", "another while it was traced")
    return PlanMemory(kind, workspace[0].pointer, plan)


def _unpack(values: tuple[Any, ...]) -> tuple[TracedCall, list[ArrayView]]:
    """The call, and views of its inputs and results."""
    views = [_view_of_buffer(buffer) for buffer in values[len(ATTRIBUTES) :]]
    return TracedCall.of_attributes(values[: len(ATTRIBUTES)]), views


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
