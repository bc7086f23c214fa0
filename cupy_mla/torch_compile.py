"""What programs that torch.compile traces do where they call this package's functions.

torch.compile traces the Python of what a program calls. Ours reads addresses, which traced tensors do not have. So each
function has a stand-in that is traced in its place (``_torchdynamo_inline``, which torch's own wrappers use too). It
puts an operator of `cupy_mla.torch_ops` into the program, or, where an argument is nothing that an operator takes (a
plan object, a stream, one output without the other), ends the graph, and the function runs as it is. Calls of a program
that is not compiled do not come by here.

What a function takes is written where the function is: a stand-in reads the names from it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from .call.options import APPEND_ROPES, CONVERT_ROPES, COPY_ROPES, OPERATOR_NAMES, ROPE_OF

_TRACED_INSTEAD = "_torchdynamo_inline"
_LOG2_E = math.log2(math.e)
_NO_TENSORS = ("plan", "stream", "out")  # no operator has them; outputs go to one of their own
Given = dict[str, Any]  # arguments of a call, by name; those left out are not in it


def teach(*functions: Callable[..., Any]) -> None:
    """Have programs that torch.compile traces call the stand-ins of these functions, if they have one."""
    for function in functions:
        name = getattr(function, "__name__", "")
        if name in _OPERATORS:
            setattr(function, _TRACED_INSTEAD, _stand_in(function, _OPERATORS[name]))


def _stand_in(function: Callable[..., Any], operator: Callable[[Given], Any]) -> Callable[..., Any]:
    """What is traced instead of a function: its operator, or itself as it is where that returns NotImplemented."""
    parameters = inspect.signature(function).parameters
    names = tuple(parameters)
    places = tuple(name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)
    needed = tuple(name for name, p in parameters.items() if p.default is p.empty)

    def stand_in(*arguments: Any, **named: Any) -> Any:
        from . import torch_rules

        result = NotImplemented
        given = {**dict(zip(places, arguments, strict=False)), **named}
        is_right = len(given) == len(arguments) + len(named) and all(name in names for name in given)
        if is_right and all(name in given for name in needed):  # what is wrong the function says itself
            result = operator(given)
        return torch_rules.as_it_is(function, *arguments, **named) if result is NotImplemented else result

    return stand_in


def _operator(
    name: str, outputs: tuple[str, ...] = (), ropes: Mapping[str, str] = {}, names: Mapping[str, str] = {}
) -> Callable[[Given], Any]:
    """The operator of a name, for arrays of which some may be pairs, and options that it knows by other names.

    With outputs it is another that writes to them.
    """

    def call(given: Given) -> Any:
        import torch

        results = [given.pop(output, None) for output in outputs]
        num_given = len([result for result in results if result is not None])
        scale, layout = given.get("kv_scale"), given.get("layout")
        if (
            num_given not in (0, len(outputs))
            or any(given.pop(argument, None) is not None for argument in _NO_TENSORS)
            or not (scale is None or isinstance(scale, torch.Tensor))
            or not (layout is None or isinstance(layout, str))
        ):
            return NotImplemented
        for array, rope in ropes.items():
            if isinstance(given.get(array), (tuple, list)):
                if len(given[array]) != len((array, rope)):
                    return NotImplemented
                given[array], given[rope] = given[array]
        arguments = {names.get(argument, argument): value for argument, value in given.items()}
        if num_given == 0:
            return getattr(torch.ops.cupy_mla, name)(**arguments)
        getattr(torch.ops.cupy_mla, f"{name}_out")(**arguments, **dict(zip(outputs, results, strict=True)))
        return tuple(results)

    return call


_mla_decode = _operator("mla_decode", ("out", "lse"), ROPE_OF, OPERATOR_NAMES)
_mla_sparse_decode = _operator("mla_sparse_decode", ("out", "lse"), names=OPERATOR_NAMES)
_mla_sparse_prefill = _operator("mla_sparse_prefill", ("out", "max_logits", "lse"), names=OPERATOR_NAMES)
_merge_states_once = _operator("merge_states")


def _merge_states(given: Given) -> Any:
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    return _merge_states_once(listed)


def _no_operator(given: Given) -> Any:
    return NotImplemented


# What FlashMLA calls the arguments that have another name here, of those that an operator takes.
_OF_FLASH_MLA = {
    "k_cache": "kv_cache",
    "sm_scale": "softmax_scale",
    "d_v": "head_dim_v",
    "extra_k_cache": "extra_kv_cache",
    "extra_indices_in_kvcache": "extra_indices",
}
# Metadata is no tensor: such a call plans in the program, and its results are those of a plan that is kept in it.
_NOT_LOOKED_AT = ("tile_scheduler_metadata", "num_splits", "use_legacy")
_SHARED = ("q", "k_cache", "head_dim_v", "softmax_scale")
_SHARDING = ("cp_world", "cp_rank", "cp_interleave", "total_seqlens")
_DENSE = (*_SHARED, "block_table", "cache_seqlens", "causal", *_SHARDING)
_EXTRA = ("extra_k_cache", "extra_indices_in_kvcache", "extra_topk_length")
_CHOSEN = (*_SHARED, "indices", "attn_sink", "topk_length", *_EXTRA, "cp_world")


def _flash_mla_with_kvcache(given: Given) -> Any:
    asked = {
        name: value
        for name, value in given.items()
        if name not in _NOT_LOOKED_AT and value is not None and value is not False
    }
    if "indices" in asked:
        asked = {name: value for name, value in asked.items() if name not in ("block_table", "cache_seqlens")}
    taken, operator = (_CHOSEN, _mla_sparse_decode) if "indices" in asked else (_DENSE, _mla_decode)
    if not all(name in taken for name in asked):
        return NotImplemented
    return operator(_renamed(asked))


def _flash_mla_sparse_fwd(given: Given) -> Any:
    in_base_2 = given.pop("return_log2_lse", False)
    if given.get("out") is not None:
        return NotImplemented
    out, max_logits, lse = _mla_sparse_prefill(_renamed(given))
    return out, max_logits, lse * _LOG2_E if in_base_2 else lse


def _renamed(given: Given) -> Given:
    """By our names; the lse of a query without a key is +inf, as FlashMLA has it."""
    return {**{_OF_FLASH_MLA.get(name, name): value for name, value in given.items()}, "empty_lse": math.inf}


_OPERATORS: dict[str, Callable[[Given], Any]] = {
    "append_tokens": _operator("append_tokens", ropes=APPEND_ROPES),
    "copy_pages": _operator("copy_pages", ropes=COPY_ROPES),
    "dequantise_cache": _operator("dequantise_cache", ropes=CONVERT_ROPES),
    "flash_mla_sparse_fwd": _flash_mla_sparse_fwd,
    "flash_mla_with_kvcache": _flash_mla_with_kvcache,
    "get_mla_metadata": _no_operator,
    "local_slots": _operator("local_slots"),
    "merge_states": _merge_states,
    "mla_decode": _mla_decode,
    "mla_sparse_decode": _mla_sparse_decode,
    "mla_sparse_prefill": _mla_sparse_prefill,
    "plan_decode": _no_operator,
    "plan_sparse_decode": _no_operator,
    "quantise_cache": _operator("quantise_cache", ropes=CONVERT_ROPES),
    "slots_of": _operator("slots_of"),
}
