"""Operators for torch.compile: ``torch.ops.cupy_mla.*``, registered when this module is imported.

They do what the functions of the package do, for CUDA and CPU tensors, and tell torch.compile what comes out. They are
registered with ``torch.library.Library`` and not as ``custom_op``: a function is called as it is, without a layer of
Python that handles its arguments first. Schemas and functions are written from the descriptions of the calls, so that
an option or an array is named in one place; pairs (latent, rope) come as two tensors, e.g. ``q`` and ``q_rope``, and
``kernel`` is called ``decode_kernel``.

A plan is a tensor here: a compiled program can hold tensors across its parts, and a Python object cannot be in it. See
`cupy_mla.decode.plan_arrays`. Its size says what it is for; on the CPU it holds nothing. Calls that share it are given
the options it was made with and follow one another on one stream: a decode counts its CTAs in it. A decode without one
plans by itself, by the same options.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .arrays.frameworks import CPU, CUDA, current_stream
from .arrays.sketch import pointer_of
from .arrays.view import ArrayView
from .cache.append import append_tokens
from .call.arguments import COPY_ALIGNMENT
from .call.describe import describe_decode
from .call.options import (
    ARRAYS,
    DECODE,
    OPTIONAL_ARRAYS,
    OPTIONS,
    OUTPUTS,
    PLAN,
    ROPE_OF,
    DecodeArrays,
    DecodeOptions,
    Option,
)
from .decode.dense import describe_plan, run_decode
from .decode.merge import merge_states
from .decode.plan import plan_kind
from .decode.plan_arrays import plan_array_bytes
from .errors import InvalidArgumentError, MissingDependencyError

NAMESPACE = "cupy_mla"

# What may be given without its name, in this order; everything else has to be named.
_POSITIONAL = (
    *("q", "kv_cache", "block_table", "cache_seqlens", "head_dim_v", "softmax_scale"),
    *("causal", "cu_seqlens_q", "max_seqlen_q"),
)
# torch.compile calls a function that has a parameter of this name itself, with the options beside it.
_OPERATOR_NAMES = {"kernel": "decode_kernel"}
_APPEND_ROPES = {"kv_cache": "kv_rope", "kv_new": "kv_new_rope"}
_NONE = "None"


# ---------------------------------------------------------------------------------------------------------------------
# What runs


def _run_plan(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    given, checked = DecodeArrays(*arrays), DecodeOptions(*options)
    problem, inputs, kind = describe_plan(given, checked)
    size = plan_array_bytes(problem, checked, kind)
    q = _first(given.q)
    if kind is None:
        return q.new_zeros((size,), dtype=_torch().uint8)
    plan = q.new_empty((size,), dtype=_torch().uint8)
    addresses = inputs.addresses()
    stream = current_stream(q, inputs.location[1])
    kind.launch_planner(addresses.cache_seqlens, addresses.cu_seqlens_q, pointer_of(plan), stream)
    return plan


def _run_decode_out(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> None:
    run_decode(arrays, options)


# ---------------------------------------------------------------------------------------------------------------------
# What comes out, for a compiler: shapes and types only


def _fake_decode(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Any, Any]:
    q, head_dim_v = _first(arrays[0]), options[0]
    if q.dim() not in (3, 4):
        raise InvalidArgumentError("q", "[batch, seqlen_q, heads, width] or [total_q, heads, width]", f"{q.dim()} dims")
    *batch, tokens, heads, _width = q.shape
    out = q.new_empty((*batch, tokens, heads, head_dim_v))
    return out, q.new_empty((*batch, heads, tokens), dtype=_torch().float32)


def _fake_plan(arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    tensors = [part for array in arrays for part in (array if isinstance(array, tuple) else (array,))]
    sizes = [size for tensor in tensors if tensor is not None for size in (*tensor.shape, *tensor.stride())]
    if all(type(size) is int for size in sizes):
        checked = DecodeOptions(*options)
        problem, inputs = describe_decode(DecodeArrays(*map(_view_of_fake, arrays)), checked)
        size = plan_array_bytes(problem, checked, plan_kind(problem, inputs.location, checked))
    else:  # dynamic shapes: known when it runs
        size = _torch().library.get_ctx().new_dynamic_size()
    return _first(arrays[0]).new_empty((size,), dtype=_torch().uint8)


def _fake_nothing(*arguments: Any, **options: Any) -> None:
    return None


def _fake_merge(outs: Any, lses: Any) -> tuple[Any, Any]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _view_of_fake(array: Any) -> Any:
    """A view of a tensor without memory, as aligned as any; of a pair, a pair."""
    if array is None:
        return None
    if isinstance(array, tuple):
        return tuple(map(_view_of_fake, array))
    device = CUDA if array.is_cuda else CPU
    dtype = str(array.dtype).removeprefix("torch.")
    device_id = (array.device.index or 0) if device == CUDA else 0
    return ArrayView(COPY_ALIGNMENT, tuple(array.shape), tuple(array.stride()), dtype, device, device_id, array)


# ---------------------------------------------------------------------------------------------------------------------
# Schemas, and functions of their arguments


@dataclass(frozen=True, slots=True)
class _Argument:
    """An argument of an operator: its type in a schema, and its default as the schema has it."""

    name: str
    type: str
    default: str | None = None  # None: it has to be given

    def __str__(self) -> str:
        return f"{self.type} {self.name}" + ("" if self.default is None else f"={self.default}")

    @classmethod
    def of_array(cls, name: str, *, optional: bool, alias: str = "") -> _Argument:
        """A tensor; one with an alias is written to."""
        return cls(name, f"Tensor{alias}?", _NONE) if optional else cls(name, f"Tensor{alias}")

    @classmethod
    def of_option(cls, option: Option) -> _Argument:
        # A schema cannot say that a default is infinite.
        infinite = option.type == "float" and option.default is not None and math.isinf(option.default)
        optional = "?" if option.optional or infinite else ""
        name = _OPERATOR_NAMES.get(option.name, option.name)
        return cls(name, option.type + optional, _NONE if infinite else repr(option.default))


@dataclass(frozen=True, slots=True)
class _Operator:
    """An operator: its arguments, how a function is called with them, and what comes out."""

    positional: Sequence[_Argument]
    named: Sequence[_Argument]
    call: str  # of the names of the arguments, e.g. "run(q, kv_cache)"
    results: str
    run: Callable[..., Any]
    fake: Callable[..., Any]

    @property
    def schema(self) -> str:
        """What torch reads."""
        named = ["*", *map(str, self.named)] if self.named else []
        return f"({', '.join([*map(str, self.positional), *named])}) -> {self.results}"

    def function(self, run: Callable[..., Any]) -> Any:
        """Takes what torch hands over and calls ``run``. Written out, as Python then matches the arguments itself."""

        def declare(arguments: Iterable[_Argument]) -> list[str]:
            return [name.name + ("" if name.default is None else f"={name.default}") for name in arguments]

        named = ["*", *declare(self.named)] if self.named else []
        arguments = ", ".join([*declare(self.positional), *named])
        return eval(f"lambda {arguments}: {self.call}", {"run": run, "inf": math.inf})


def _pair(name: str, ropes: dict[str, str]) -> str:
    """An array in the call of an operator: a rope part makes it a pair."""
    return f"{name} if {ropes[name]} is None else ({name}, {ropes[name]})" if name in ropes else name


def _decode_operator(
    function: str, outputs: Sequence[str], results: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> _Operator:
    """An operator on a decode call: its arrays as one tuple, its options as another."""
    left_out = {*OUTPUTS, *(("plan",) if function == PLAN else ())}
    arguments = [
        *(_Argument.of_array(name, optional=name in OPTIONAL_ARRAYS) for name in ARRAYS if name not in left_out),
        *(_Argument.of_option(option) for option in OPTIONS if function == DECODE or PLAN in option.functions),
        *(_Argument.of_array(rope, optional=True) for rope in ROPE_OF.values()),
        *(_Argument.of_array(name, optional=False, alias=f"({name}!)") for name in outputs),
    ]
    by_name = {argument.name: argument for argument in arguments}
    arrays = [_pair(name, ROPE_OF) if name in by_name else _NONE for name in ARRAYS]
    options = []
    for option in OPTIONS:
        name = _OPERATOR_NAMES.get(option.name, option.name)
        if name not in by_name:
            options.append(repr(option.default))
        elif by_name[name].default == _NONE and not option.optional:  # None stands for what a schema cannot say
            options.append(f"{option.default!r} if {name} is None else {name}")
        else:
            options.append(name)
    positional = [by_name.pop(name) for name in _POSITIONAL if name in by_name]
    call = f"run(({', '.join(arrays)}), ({', '.join(options)}))"
    return _Operator(positional, list(by_name.values()), call, results, run, fake)


def _append_operator() -> _Operator:
    """`cupy_mla.append_tokens` as it is, but for the stream."""
    parameters = [
        parameter for name, parameter in inspect.signature(append_tokens).parameters.items() if name != "stream"
    ]
    positional: list[_Argument] = []
    named: list[_Argument] = []
    call: list[str] = []
    for parameter in parameters:
        name = parameter.name
        is_cache = name == "kv_cache"
        by_name = parameter.kind is parameter.KEYWORD_ONLY
        argument = _Argument.of_array(
            name, optional=parameter.default is not parameter.empty, alias="(a!)" if is_cache else ""
        )
        (named if by_name else positional).append(argument)
        call.append(f"{name}={name}" if by_name else _pair(name, _APPEND_ROPES))
        if name in _APPEND_ROPES:
            named.append(_Argument.of_array(_APPEND_ROPES[name], optional=True, alias="(b!)" if is_cache else ""))
    return _Operator(positional, named, f"run({', '.join(call)})", "()", append_tokens, _fake_nothing)


def _merge_operator(kind: str) -> _Operator:
    """Of stacked tensors or of lists of them."""
    arguments = [_Argument(name, kind) for name in ("outs", "lses")]
    return _Operator(arguments, (), "run(outs, lses)", "(Tensor out, Tensor lse)", merge_states, _fake_merge)


_OPERATORS = {
    "plan_decode": _decode_operator(PLAN, (), "Tensor", _run_plan, _fake_plan),
    "mla_decode": _decode_operator(DECODE, (), "(Tensor out, Tensor lse)", run_decode, _fake_decode),
    "mla_decode_out": _decode_operator(DECODE, OUTPUTS, "()", _run_decode_out, _fake_nothing),
    "append_tokens": _append_operator(),
    "merge_states": _merge_operator("Tensor"),
    "merge_states.list": _merge_operator("Tensor[]"),
}


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
    for name, operator in _OPERATORS.items():
        library.define(name + operator.schema, tags=(torch.Tag.pt2_compliant_tag, strides))
        function = operator.function(operator.run)
        for key in ("CPU", "CUDA"):
            library.impl(name, function, key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", operator.function(operator.fake), lib=library)
    _library = library  # torch forgets operators whose library is gone


def _first(array: Any) -> Any:
    return array[0] if isinstance(array, tuple) else array


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError("torch", "torch", "torch.ops.cupy_mla") from error
    return torch


_library: Any = None
register()
