"""Sparse calls as users write them, described once: their options and their arrays, as `options` has those of dense
decoding. Decode and prefill share their options."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from .options import AUTO, CallForm, option, options_of, settle_options
from .shard import Shard

# The functions that take an option.
SPARSE_DECODE, PLAN_SPARSE, SPARSE_PREFILL = "mla_sparse_decode", "plan_sparse_decode", "mla_sparse_prefill"


@dataclass(frozen=True, slots=True)
class SparseOptions:
    """What a sparse call takes besides its arrays, checked; values of NumPy's types become Python's.

    Attributes
    ----------
    head_dim_v, softmax_scale, empty_lse, validate, strict, layout, extra_layout, cp_world
        As in `cupy_mla.mla_sparse_decode`.
    fixed_split_tokens, kernel
        As in `cupy_mla.plan_sparse_decode`; of a decode call with a plan in an array, or without a plan.

    Raises
    ------
    InvalidArgumentError
        An option is of another type, or outside of its range; ``argument`` is its name.
    """

    head_dim_v: int = option(512, SPARSE_DECODE, SPARSE_PREFILL, PLAN_SPARSE)
    softmax_scale: float | None = option(None, SPARSE_DECODE, SPARSE_PREFILL)
    empty_lse: float = option(-math.inf, SPARSE_DECODE, SPARSE_PREFILL)
    validate: bool | None = option(None, SPARSE_DECODE, SPARSE_PREFILL, PLAN_SPARSE)
    strict: bool = option(True, SPARSE_DECODE, SPARSE_PREFILL, PLAN_SPARSE)
    layout: str | None = option(None, SPARSE_DECODE, SPARSE_PREFILL, PLAN_SPARSE)
    extra_layout: str | None = option(None, SPARSE_DECODE, PLAN_SPARSE)
    cp_world: int = option(1, SPARSE_DECODE, PLAN_SPARSE)
    fixed_split_tokens: int | None = option(None, PLAN_SPARSE)
    kernel: str = option(AUTO, PLAN_SPARSE)

    def __post_init__(self) -> None:
        settle_options(self, SPARSE_OPTIONS)
        Shard(self.cp_world, rank=0)  # which checks it

    def of_plan_alone(self) -> tuple[Any, ...]:
        """Those that a plan depends on beside the problem."""
        return self.fixed_split_tokens, self.kernel


@dataclass(slots=True, eq=False)
class SparseDecodeArrays:
    """The arrays of a decode call as given: of any framework, or views; None for one that is not there.

    Attributes
    ----------
    q, kv_cache, indices, topk_length, attn_sink
        As in `cupy_mla.mla_sparse_decode`.
    kv_scale
        As in `cupy_mla.mla_sparse_decode`: an array, or a number.
    extra_kv_cache, extra_indices, extra_topk_length
        As in `cupy_mla.mla_sparse_decode`.
    plan
        A plan in an array (see `cupy_mla.decode.plan_arrays`): uint8.
    out, lse
        To be written to.
    """

    q: Any
    kv_cache: Any
    indices: Any
    topk_length: Any = None
    attn_sink: Any = None
    kv_scale: Any = None
    extra_kv_cache: Any = None
    extra_indices: Any = None
    extra_topk_length: Any = None
    plan: Any = None
    out: Any = None
    lse: Any = None


@dataclass(slots=True, eq=False)
class SparsePrefillArrays:
    """The arrays of a prefill call as given: of any framework, or views; None for one that is not there.

    Attributes
    ----------
    q, kv, indices, topk_length, attn_sink
        As in `cupy_mla.mla_sparse_prefill`.
    kv_scale
        As in `cupy_mla.mla_sparse_prefill`: an array, or a number.
    out, max_logits, lse
        To be written to.
    """

    q: Any
    kv: Any
    indices: Any
    topk_length: Any = None
    attn_sink: Any = None
    kv_scale: Any = None
    out: Any = None
    max_logits: Any = None
    lse: Any = None


SPARSE_OPTIONS = options_of(SparseOptions)
SPARSE_DECODE_ARRAYS = tuple(field.name for field in fields(SparseDecodeArrays))
SPARSE_PREFILL_ARRAYS = tuple(field.name for field in fields(SparsePrefillArrays))
_EXTRA = ("extra_kv_cache", "extra_indices", "extra_topk_length")
_OPTIONAL = ("topk_length", "attn_sink", "kv_scale", *_EXTRA, "plan", "out", "max_logits", "lse")
_POSITIONAL = ("q", "kv_cache", "kv", "indices", "head_dim_v", "softmax_scale", "topk_length", "attn_sink")

SPARSE_DECODE_FORM = CallForm(SPARSE_OPTIONS, SPARSE_DECODE_ARRAYS, _OPTIONAL, ("out", "lse"), _POSITIONAL)
SPARSE_PREFILL_FORM = CallForm(
    SPARSE_OPTIONS, SPARSE_PREFILL_ARRAYS, _OPTIONAL, ("out", "max_logits", "lse"), _POSITIONAL
)


def sparse_option_names(function: str) -> tuple[str, ...]:
    """The options of a function, `SPARSE_DECODE`, `PLAN_SPARSE` or `SPARSE_PREFILL`."""
    return tuple(option.name for option in SPARSE_OPTIONS if function in option.functions)
