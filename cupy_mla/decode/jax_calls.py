"""What runs for `cupy_mla.jax_ops`: XLA's custom calls, and their arguments.

Custom calls get XLA's buffers and numbers as attributes; jax-tvm-ffi calls the functions here with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays.dtypes import numpy_dtype
from ..arrays.exchange import as_numpy
from ..arrays.frameworks import CUDA
from ..arrays.view import ArrayView
from ..arrays.xla import CustomCall, start, view_buffer, view_hosts
from ..call.describe import describe_decode
from ..call.options import COMPUTES, OPTIONS, PARTS, DecodeArrays, DecodeOptions, Option
from ..call.problem import DecodeInputs, DecodeProblem
from ..call.values import validate_values
from ..errors import InvalidArgumentError
from ..kernels.choose import FAMILIES, GATHERED_FAMILIES
from ..layouts import LAYOUTS
from ..settings import wants_validation
from .blueprint import DenseBlueprint, PlanMemory
from .merge import check_states, merge_views
from .plan import plan_kind
from .prepared import CallStrides
from .reference import mla_decode_reference
from .token_pages import prepare

DECODE_TARGET = "cupy_mla.mla_decode"
PLAN_TARGET = "cupy_mla.plan_decode"
MERGE_TARGET = "cupy_mla.merge_states"
_GIVEN = "given"
# Attributes of custom calls, in this order. They are numbers, words too: strings of 8 bytes and more arrive damaged
# (jax-tvm-ffi 0.1.3).
ATTRIBUTES = (*(option.name for option in OPTIONS), _GIVEN)
_KERNELS = (family.name for family in (*FAMILIES, *GATHERED_FAMILIES))
_WORDS = tuple(dict.fromkeys((*COMPUTES, *_KERNELS, *LAYOUTS)))
_NO_INTEGER = -1  # an option that is None; of a float, NaN


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
        return cls(options, bits_of(parts))

    def attributes(self) -> dict[str, Any]:
        """As attributes of a custom call."""
        values = {option.name: attribute_of(option, getattr(self.options, option.name)) for option in OPTIONS}
        return {**values, _GIVEN: np.int64(self.given)}

    @classmethod
    def of_attributes(cls, values: tuple[Any, ...]) -> TracedCall:
        """What `attributes` told."""
        *options, given = values
        return cls(DecodeOptions(*map(option_of, OPTIONS, options)), int(given))

    def arrays(self, buffers: list[ArrayView]) -> DecodeArrays:
        """The arrays that the first buffers are; takes them off the list."""
        return DecodeArrays.of_parts(
            [buffers.pop(0) if self.given >> index & 1 else None for index in range(len(PARTS))]
        )


def bits_of(parts: Sequence[Any]) -> int:
    """Which of them are there: bit i says it of the i-th."""
    return sum(1 << index for index, part in enumerate(parts) if part is not None)


def attribute_of(option: Option, value: Any) -> Any:
    """The value of an option as an attribute of a custom call.

    Raises
    ------
    InvalidArgumentError
        It is a word that no option has; ``argument`` is the option's name.
    """
    if option.type == "str" and value is not None:
        if value not in _WORDS:
            raise InvalidArgumentError(option.name, "one of " + ", ".join(_WORDS), repr(value))
        return np.int64(_WORDS.index(value))
    if option.type == "float":
        return np.float64(np.nan if value is None else value)
    return np.int64(_NO_INTEGER if value is None else value)


def option_of(option: Option, attribute: Any) -> Any:
    """What `attribute_of` was given."""
    if option.type == "str":
        return None if attribute == _NO_INTEGER else _WORDS[int(attribute)]
    if option.type == "float":
        return None if np.isnan(attribute) else float(attribute)
    return None if attribute == _NO_INTEGER else (bool(attribute) if option.type == "bool" else int(attribute))


def decode_in_callback(call: TracedCall, *arrays: Any) -> tuple[np.ndarray, np.ndarray]:
    """The NumPy backend, on what ``jax.pure_callback`` brings."""
    problem, inputs = describe_decode(call.arrays(view_hosts(arrays)), call.options)
    _validate(problem, inputs, call.options, None)
    return mla_decode_reference(problem, inputs, _scale(problem, call.options), empty_lse=call.options.empty_lse)


def merge_in_callback(*arrays: Any) -> tuple[np.ndarray, np.ndarray]:
    """`merge_states` on the NumPy backend, on what ``jax.pure_callback`` brings."""
    outs, lses = view_hosts(arrays)
    out_shape, lse_shape = check_states(outs, lses)
    results = np.empty(out_shape, numpy_dtype(outs.dtype)), np.empty(lse_shape, np.float32)
    out, lse = view_hosts(results)
    merge_views(outs, lses, out, lse, None)
    return results


def _run_decode(*values: Any) -> None:
    """The custom call: attributes, then the inputs (and a plan), then out, lse (and a workspace)."""
    call, buffers = _unpack(values)
    options = call.options
    problem, inputs = describe_decode(call.arrays(buffers), options)
    inputs.out, inputs.lse, *workspace = buffers
    scale = _scale(problem, options)
    kind = plan_kind(problem, inputs.location, options)
    stream = start(inputs.location)
    _validate(problem, inputs, options, stream)
    if kind is None or stream is None:
        out, lse = as_numpy(inputs.out), as_numpy(inputs.lse)
        mla_decode_reference(problem, inputs, scale, out=out, lse=lse, empty_lse=options.empty_lse)
        return
    addresses = inputs.addresses()
    memory = _place(kind, workspace, addresses.plan)
    if not addresses.plan:
        kind.launch_planner(inputs.planned_lengths.pointer, addresses.cu_seqlens_q, memory.pointer, stream)
    call_kernels = prepare(kind, scale, options.empty_lse, CallStrides.of(problem, inputs), inputs.kv_scale_values)
    call_kernels(addresses, memory, stream)


def _run_plan(*values: Any) -> None:
    """The custom call: attributes, then the inputs, then the plan."""
    call, buffers = _unpack(values)
    problem, inputs = describe_decode(call.arrays(buffers), call.options)
    kind = plan_kind(problem, inputs.location, call.options)
    stream = start(inputs.location)
    assert kind is not None  # only called on GPUs
    assert stream is not None
    _validate(problem, inputs, call.options, stream)
    addresses = inputs.addresses()
    kind.launch_planner(inputs.planned_lengths.pointer, addresses.cu_seqlens_q, buffers[0].pointer, stream)


def _run_merge(*buffers: Any) -> None:
    """The custom call: outs, lses, then out, lse."""
    outs, lses, out, lse = map(view_buffer, buffers)
    merge_views(outs, lses, out, lse, start(outs.location))


def _scale(problem: DecodeProblem, options: DecodeOptions) -> float:
    return problem.queries.default_softmax_scale if options.softmax_scale is None else options.softmax_scale


def _validate(problem: DecodeProblem, inputs: DecodeInputs, options: DecodeOptions, stream: int | None) -> None:
    if wants_validation(options.validate, inputs.location[0] == CUDA):  # the setting counts when the program runs
        validate_values(problem, inputs, stream, options.max_seqlen_k)


def _place(kind: DenseBlueprint, workspace: list[ArrayView], plan: int) -> PlanMemory:
    """A plan in XLA's memory."""
    size = kind.partial_bytes if plan else kind.workspace_bytes
    if not workspace or workspace[0].shape[0] < size:
        raise InvalidArgumentError("platform", "the one that the program runs on, cuda", "another while it was traced")
    return PlanMemory(kind, workspace[0].pointer, plan)


def _unpack(values: tuple[Any, ...]) -> tuple[TracedCall, list[ArrayView]]:
    """The call, and views of its inputs and results."""
    views = [view_buffer(buffer) for buffer in values[len(ATTRIBUTES) :]]
    return TracedCall.of_attributes(values[: len(ATTRIBUTES)]), views


CALLS = {DECODE_TARGET: CustomCall(_run_decode, ATTRIBUTES), PLAN_TARGET: CustomCall(_run_plan, ATTRIBUTES)}
CALLS[MERGE_TARGET] = CustomCall(_run_merge, ())
