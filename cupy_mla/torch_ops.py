"""Operators for torch.compile: ``torch.ops.cupy_mla.*``, registered when this module is imported.

They do what the functions of the package do, for CUDA and CPU tensors, and tell torch.compile what comes out. They are
registered with ``torch.library.Library`` and not as ``custom_op``: a function is called as it is, without a layer of
Python that handles its arguments first. Schemas and functions are written from the descriptions of the calls, so that
an option or an array is named in one place; pairs (latent, rope) come as two tensors, e.g. ``q`` and ``q_rope``, and
``kernel`` is called ``decode_kernel``, ``layout`` ``cache_layout``.

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

from .arrays.frameworks import torch_module
from .cache.append import append_tokens
from .cache.convert import dequantise_cache, quantise_cache
from .cache.copy_pages import copy_pages
from .cache.local_slots import local_slots
from .cache.slots import slots_of
from .call.options import (
    APPEND_ROPES,
    CONVERT_ROPES,
    COPY_ROPES,
    DECODE,
    DECODE_FORM,
    OPERATOR_NAMES,
    PLAN,
    ROPE_OF,
    CallForm,
    Option,
)
from .call.sparse_options import (
    PLAN_SPARSE,
    SPARSE_DECODE,
    SPARSE_DECODE_FORM,
    SPARSE_PREFILL,
    SPARSE_PREFILL_FORM,
)
from .decode import torch_calls as calls
from .decode.dense import run_decode
from .decode.merge import merge_states
from .decode.prefill import run_prefill
from .decode.sparse import run_sparse_decode

NAMESPACE = "cupy_mla"

_NONE = "None"


@dataclass(frozen=True, slots=True)
class _Argument:
    """An argument of an operator: its type in a schema, and its default as the schema has it."""

    name: str
    type: str
    default: str | None = None  # None: it has to be given

    @property
    def is_tensor(self) -> bool:
        return self.type.startswith("Tensor")

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
        name = OPERATOR_NAMES.get(option.name, option.name)
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
        return self._schema(self.named)

    @property
    def usual_schema(self) -> str:
        """The same without options that have to be named, which keep their defaults."""
        return self._schema([argument for argument in self.named if argument.is_tensor])

    def _schema(self, named: Sequence[_Argument]) -> str:
        arguments = [*map(str, self.positional), *(["*", *map(str, named)] if named else [])]
        return f"({', '.join(arguments)}) -> {self.results}"

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


def _call_operator(
    form: CallForm,
    functions: Sequence[str],
    results: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    outputs: Sequence[str] = (),
    has_plan: bool = True,
) -> _Operator:
    """An operator on a call of a form: its arrays as one tuple, its options as another.

    It takes the options of ``functions``; ``outputs`` are those that it is given and writes to. What may be given by
    its place costs torch a third of a microsecond less even where it is given by its name: so may outputs and plans.
    """
    left_out = {*form.outputs, *(() if has_plan else ("plan",))}
    arguments = [
        *(_Argument.of_array(name, optional=name in form.optional) for name in form.arrays if name not in left_out),
        *(_Argument.of_option(option) for option in form.options if {*functions} & {*option.functions}),
        *(_Argument.of_array(rope, optional=True) for rope in ROPE_OF.values() if form.has_pairs),
        *(_Argument.of_array(name, optional=False, alias=f"({name}!)") for name in outputs),
    ]
    by_name = {argument.name: argument for argument in arguments}
    ropes = ROPE_OF if form.has_pairs else {}
    arrays = [_pair(name, ropes) if name in by_name else _NONE for name in form.arrays]
    options = []
    for option in form.options:
        name = OPERATOR_NAMES.get(option.name, option.name)
        if name not in by_name:
            options.append(repr(option.default))
        elif by_name[name].default == _NONE and not option.optional:  # None stands for what a schema cannot say
            options.append(f"{option.default!r} if {name} is None else {name}")
        else:
            options.append(name)
    inputs = [name for name in form.positional if name in by_name and by_name[name].default is None]
    others = [name for name in form.positional if name not in inputs]
    positional = [by_name.pop(name) for name in (*inputs, *outputs, *others, "plan") if name in by_name]
    call = f"run(({', '.join(arrays)}), ({', '.join(options)}))"
    if outputs:
        call += " and None"  # an operator does not return what it writes to; a tuple of results is true
    return _Operator(positional, list(by_name.values()), call, results, run, fake)


# What functions that write to an array take besides tensors; None stands for their defaults.
_NO_TENSORS = {"layout": "str?", "validate": "bool?"}


def _in_place_operator(function: Callable[..., Any], written: str, ropes: dict[str, str]) -> _Operator:
    """A function that writes to one of its arrays, as it is but for the stream; the layout by its name, the scale in a
    tensor."""
    parameters = [parameter for name, parameter in inspect.signature(function).parameters.items() if name != "stream"]
    positional: list[_Argument] = []
    named: list[_Argument] = []
    call: list[str] = []
    for parameter in parameters:
        name = parameter.name
        is_written = name == written
        by_name = parameter.kind is parameter.KEYWORD_ONLY
        argument = _Argument.of_array(
            name, optional=parameter.default is not parameter.empty, alias="(a!)" if is_written else ""
        )
        if name in _NO_TENSORS:
            argument = _Argument(name, _NO_TENSORS[name], _NONE)
        (named if by_name else positional).append(argument)
        call.append(f"{name}={_pair(name, ropes)}" if by_name else _pair(name, ropes))
        if name in ropes:
            named.append(_Argument.of_array(ropes[name], optional=True, alias="(b!)" if is_written else ""))
    return _Operator(positional, named, f"run({', '.join(call)})", "()", function, calls.fake_nothing)


def _merge_operator(kind: str) -> _Operator:
    """Of stacked tensors or of lists of them."""
    arguments = [_Argument(name, kind) for name in ("outs", "lses")]
    return _Operator(arguments, (), "run(outs, lses)", "(Tensor out, Tensor lse)", merge_states, calls.fake_merge)


_OUT_LSE, _OUT_LOGITS_LSE = "(Tensor out, Tensor lse)", "(Tensor out, Tensor max_logits, Tensor lse)"
_SLOTS = [_Argument("token_indices", "Tensor"), _Argument("block_table", "Tensor"), _Argument("page_size", "int")]
_ALL_DECODE, _ALL_SPARSE = (DECODE, PLAN), (SPARSE_DECODE, PLAN_SPARSE)
_OPERATORS = {
    "plan_decode": _call_operator(DECODE_FORM, [PLAN], "Tensor", calls.run_plan, calls.fake_plan, has_plan=False),
    "mla_decode": _call_operator(DECODE_FORM, _ALL_DECODE, _OUT_LSE, run_decode, calls.fake_decode),
    "mla_decode_out": _call_operator(
        DECODE_FORM,
        _ALL_DECODE,
        "()",
        run_decode,
        calls.fake_nothing,
        outputs=DECODE_FORM.outputs,
    ),
    "plan_sparse_decode": _call_operator(
        SPARSE_DECODE_FORM, [PLAN_SPARSE], "Tensor", calls.run_sparse_plan, calls.fake_sparse_plan, has_plan=False
    ),
    "mla_sparse_decode": _call_operator(
        SPARSE_DECODE_FORM, _ALL_SPARSE, _OUT_LSE, run_sparse_decode, calls.fake_decode
    ),
    "mla_sparse_decode_out": _call_operator(
        SPARSE_DECODE_FORM,
        _ALL_SPARSE,
        "()",
        run_sparse_decode,
        calls.fake_nothing,
        outputs=SPARSE_DECODE_FORM.outputs,
    ),
    "mla_sparse_prefill": _call_operator(
        SPARSE_PREFILL_FORM, [SPARSE_PREFILL], _OUT_LOGITS_LSE, run_prefill, calls.fake_prefill
    ),
    "mla_sparse_prefill_out": _call_operator(
        SPARSE_PREFILL_FORM,
        [SPARSE_PREFILL],
        "()",
        run_prefill,
        calls.fake_nothing,
        outputs=SPARSE_PREFILL_FORM.outputs,
    ),
    "slots_of": _Operator(
        _SLOTS,
        [_Argument.of_array("requests", optional=True)],
        "run(token_indices, block_table, page_size, requests=requests)",
        "Tensor",
        slots_of,
        calls.fake_slots,
    ),
    "local_slots": _Operator(
        _SLOTS,
        [
            *(_Argument("cp_world", "int"), _Argument("cp_rank", "int"), _Argument("cp_interleave", "int", "1")),
            _Argument.of_array("requests", optional=True),
        ],
        "run(token_indices, block_table, page_size, cp_world=cp_world, cp_rank=cp_rank, cp_interleave=cp_interleave, "
        "requests=requests)",
        "(Tensor indices, Tensor topk_length)",
        local_slots,
        calls.fake_local_slots,
    ),
    "append_tokens": _in_place_operator(append_tokens, "kv_cache", APPEND_ROPES),
    "copy_pages": _in_place_operator(copy_pages, "kv_cache", COPY_ROPES),
    "quantise_cache": _in_place_operator(quantise_cache, "kv_cache", CONVERT_ROPES),
    "dequantise_cache": _in_place_operator(dequantise_cache, "values", CONVERT_ROPES),
    "merge_states": _merge_operator("Tensor"),
    "merge_states.list": _merge_operator("Tensor[]"),
}
# Called for every layer of a model. Each argument of a schema costs torch 60 ns where it is not given, so these have an
# overload with few, which it tries first.
_OF_LAYERS = ("mla_decode", "mla_decode_out", "mla_sparse_decode", "mla_sparse_decode_out")


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
    torch = torch_module("torch.ops.cupy_mla")
    library = torch.library.Library(NAMESPACE, "DEF")
    # Strides are part of a call: a compiler must hand tensors over as the program made them.
    strides = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
    for name, operator in _OPERATORS.items():
        schemas = {f"{name}.usual": operator.usual_schema} if name in _OF_LAYERS else {}
        schemas[name] = operator.schema
        function, fake = operator.function(operator.run), operator.function(operator.fake)
        for overload, schema in schemas.items():
            library.define(overload + schema, tags=(torch.Tag.pt2_compliant_tag, strides))
            for key in ("CPU", "CUDA"):
                library.impl(overload, function, key)
            torch.library.register_fake(f"{NAMESPACE}::{overload}", fake, lib=library)
    _library = library  # torch forgets operators whose library is gone


_library: Any = None
register()
