"""A decode call as users write it, described once: its options and its arrays.

All that names them comes from here: the checks of the options, the schemas of torch's operators, the attributes of
JAX's custom calls, what a case file may hold. A new option is a field of `DecodeOptions`, a new array a field of
`DecodeArrays`; then they need an argument of `mla_decode` (the one signature that is written out for people to read, a
test compares it with this file), and what makes use of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import InvalidArgumentError
from .arguments import as_boolean, as_integer, as_number, as_text, check_softmax_scale
from .shard import Shard

DECODE, PLAN = "mla_decode", "plan_decode"  # the functions that take an option
AUTO = "auto"  # of ``kernel`` and ``compute``: what should take the least time
EXACT, SPLIT, FP8 = "exact", "split", "fp8"
COMPUTES = (AUTO, EXACT, SPLIT, FP8)


def option(default: Any, *functions: str) -> Any:
    """A field that is an option: its default, and the functions that take it."""
    return field(default=default, metadata={"functions": functions})


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """What a call takes besides its arrays, checked; values of NumPy's types become Python's.

    Types are ``int``, ``float``, ``bool`` or ``str``, and ``| None`` where that has a meaning of its own: torch's
    schemas and JAX's attributes know no others.

    Attributes
    ----------
    head_dim_v, softmax_scale, causal, max_seqlen_q, empty_lse, validate, strict, compute, layout, cp_world, cp_rank,
    cp_interleave
        As in `cupy_mla.mla_decode`.
    max_seqlen_k, fixed_split_tokens, kernel
        As in `cupy_mla.plan_decode`; of a decode call with a plan in an array, or without a plan.

    Raises
    ------
    InvalidArgumentError
        An option is of another type, or outside of its range; ``argument`` is its name.
    """

    head_dim_v: int = option(512, DECODE, PLAN)
    softmax_scale: float | None = option(None, DECODE)
    causal: bool = option(False, DECODE, PLAN)
    max_seqlen_q: int | None = option(None, DECODE, PLAN)
    empty_lse: float = option(-math.inf, DECODE)
    validate: bool | None = option(None, DECODE, PLAN)
    strict: bool = option(True, DECODE, PLAN)
    compute: str = option(AUTO, DECODE, PLAN)
    layout: str | None = option(None, DECODE, PLAN)
    cp_world: int = option(1, DECODE, PLAN)
    cp_rank: int = option(0, DECODE, PLAN)
    cp_interleave: int = option(1, DECODE, PLAN)
    max_seqlen_k: int | None = option(None, PLAN)
    fixed_split_tokens: int | None = option(None, PLAN)
    kernel: str = option(AUTO, PLAN)

    def __post_init__(self) -> None:
        settle_options(self, OPTIONS)
        if self.max_seqlen_q is not None and self.max_seqlen_q < 1:
            raise InvalidArgumentError("max_seqlen_q", "1 or more", str(self.max_seqlen_q))
        if self.compute not in COMPUTES:
            raise InvalidArgumentError("compute", "one of " + ", ".join(COMPUTES), repr(self.compute))
        if self.max_seqlen_k is not None and self.max_seqlen_k < 0:
            raise InvalidArgumentError("max_seqlen_k", "a non-negative integer", str(self.max_seqlen_k))
        Shard(self.cp_world, self.cp_rank, self.cp_interleave)  # which checks them

    def of_plan_alone(self) -> tuple[Any, ...]:
        """Those that a plan depends on beside the problem."""
        return tuple(getattr(self, option.name) for option in OPTIONS if option.functions == (PLAN,))


@dataclass(slots=True, eq=False)
class DecodeArrays:
    """The arrays of a call as given: of any framework, or views; None for one that is not there.

    Attributes
    ----------
    q, kv_cache
        As in `cupy_mla.mla_decode`: an array, or a pair (latent, rope).
    block_table, cache_seqlens, cu_seqlens_q, total_seqlens
        As in `cupy_mla.mla_decode`.
    kv_scale
        As in `cupy_mla.mla_decode`: an array, or a number.
    plan
        A plan in an array (see `cupy_mla.decode.plan_arrays`): uint8.
    out, lse
        To be written to.
    """

    q: Any
    kv_cache: Any
    block_table: Any
    cache_seqlens: Any
    cu_seqlens_q: Any = None
    total_seqlens: Any = None
    kv_scale: Any = None
    plan: Any = None
    out: Any = None
    lse: Any = None

    @classmethod
    def of_parts(cls, parts: Sequence[Any]) -> DecodeArrays:
        """From one array or None for each of `PARTS`."""
        return cls(*pair_up(parts))


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a call, as faces that are written from it need to know it."""

    name: str
    type: str  # "int", "float", "bool" or "str"
    optional: bool
    default: Any
    functions: tuple[str, ...]  # e.g. DECODE, PLAN


def options_of(described: type) -> tuple[Option, ...]:
    """The options that a dataclass describes."""
    return tuple(
        Option(
            field.name,
            str(field.type).partition(" | ")[0],
            "None" in str(field.type),
            field.default,
            field.metadata["functions"],
        )
        for field in fields(described)
    )


def settle_options(given: Any, options: Sequence[Option]) -> None:
    """Turn the values of an object that describes a call into Python's types, and check those that all calls have.

    Raises
    ------
    InvalidArgumentError
        A value is of another type, or ``empty_lse`` or ``softmax_scale`` out of range; ``argument`` is its name.
    """
    if not (isinstance(given.empty_lse, float) and math.isinf(given.empty_lse)):
        raise InvalidArgumentError("empty_lse", "-inf or +inf", repr(given.empty_lse))
    for option in options:
        value = getattr(given, option.name)
        if value is not None or not option.optional:
            object.__setattr__(given, option.name, _CONVERSIONS[option.type](value, option.name))
    if given.softmax_scale is not None:
        check_softmax_scale(given.softmax_scale)


_CONVERSIONS = {"int": as_integer, "float": as_number, "bool": as_boolean, "str": as_text}
OPTIONS = options_of(DecodeOptions)
ARRAYS = tuple(field.name for field in fields(DecodeArrays))
OPTIONAL_ARRAYS = ("cu_seqlens_q", "total_seqlens", "kv_scale", "plan", "out", "lse")
OUTPUTS = ("out", "lse")
# Interfaces that know no pairs have the rope part as an array of its own, under these names.
ROPE_OF = {"q": "q_rope", "kv_cache": "kv_rope"}
APPEND_ROPES = {"kv_cache": "kv_rope", "kv_new": "kv_new_rope"}  # of an append
COPY_ROPES = {"kv_cache": "kv_rope", "source": "source_rope"}  # of copies of pages
CONVERT_ROPES = {"kv_cache": "kv_rope", "values": "values_rope"}  # of pages that are quantised or dequantised
PARTS = ("q", "q_rope", "kv_cache", "kv_rope", *ARRAYS[2:])
# torch.compile calls a function that has a parameter named kernel itself, with the options beside it; and a layout is
# torch.strided or the like to it. So torch's operators have other names for them.
OPERATOR_NAMES = {"kernel": "decode_kernel", "layout": "cache_layout"}


@dataclass(frozen=True, slots=True)
class CallForm:
    """What a kind of call is written with, as faces that are written from it need to know it.

    Attributes
    ----------
    options, arrays
        All options of its functions, and all arrays, in the order in which they are handed on.
    optional
        The arrays that need not be there.
    outputs
        Those that are written to.
    positional
        What may be given without its name, in this order.
    has_pairs
        Whether q and the cache may be pairs (latent, rope).
    """

    options: tuple[Option, ...]
    arrays: tuple[str, ...]
    optional: tuple[str, ...]
    outputs: tuple[str, ...]
    positional: tuple[str, ...]
    has_pairs: bool = False


DECODE_FORM = CallForm(
    options=OPTIONS,
    arrays=ARRAYS,
    optional=OPTIONAL_ARRAYS,
    outputs=OUTPUTS,
    positional=(*ARRAYS[:4], "head_dim_v", "softmax_scale", "causal", "cu_seqlens_q", "max_seqlen_q"),
    has_pairs=True,
)


def pair_up(parts: Sequence[Any]) -> tuple[Any, ...]:
    """Values of `PARTS` as those of `ARRAYS`: a rope part makes a pair of what it belongs to."""
    q, q_rope, kv_cache, kv_rope, *others = parts
    return q if q_rope is None else (q, q_rope), kv_cache if kv_rope is None else (kv_cache, kv_rope), *others


def option_names(function: str) -> tuple[str, ...]:
    """The options of a function, `DECODE` or `PLAN`."""
    return tuple(option.name for option in OPTIONS if function in option.functions)


def read_call(
    q: Any, kv_cache: Any, block_table: Any, cache_seqlens: Any, **others: Any
) -> tuple[DecodeArrays, DecodeOptions]:
    """Arguments of `mla_decode` or `plan_decode` as the arrays and the options that they are.

    Raises
    ------
    InvalidArgumentError
        An option is of another type, or outside of its range; ``argument`` is its name.
    """
    arrays = {name: others.pop(name) for name in OPTIONAL_ARRAYS if name in others}
    return DecodeArrays(q, kv_cache, block_table, cache_seqlens, **arrays), DecodeOptions(**others)
