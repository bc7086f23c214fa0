"""The one description of a decode call, and that what is written for people agrees with it."""

from __future__ import annotations

import inspect
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import cupy_mla
from cupy_mla import InvalidArgumentError, mla_decode, plan_decode
from cupy_mla.call.options import (
    ARRAYS,
    DECODE,
    OPTIONAL_ARRAYS,
    OPTIONS,
    OUTPUTS,
    PARTS,
    PLAN,
    DecodeArrays,
    DecodeOptions,
    option_names,
    read_call,
)
from cupy_mla.call.sparse_options import (
    PLAN_SPARSE,
    SPARSE_DECODE,
    SPARSE_DECODE_ARRAYS,
    SPARSE_OPTIONS,
    SPARSE_PREFILL,
    SPARSE_PREFILL_ARRAYS,
    SparseOptions,
)

FUNCTIONS = {DECODE: mla_decode, PLAN: plan_decode}
NO_DESCRIPTION = {"plan", "stream"}  # a plan as an object, and what only eager calls have


@pytest.mark.parametrize("function", FUNCTIONS)
def test_signatures_that_are_written_out_agree(function: str) -> None:
    parameters = dict(inspect.signature(FUNCTIONS[function]).parameters)
    for name in ARRAYS:
        if name in NO_DESCRIPTION or (function == PLAN and name in OUTPUTS):
            continue
        parameter = parameters.pop(name)
        assert parameter.default is (None if name in OPTIONAL_ARRAYS else parameter.empty)
        assert (parameter.kind is parameter.KEYWORD_ONLY) == (name in OPTIONAL_ARRAYS)
    annotations = DecodeOptions.__annotations__
    for option in OPTIONS:
        if function in option.functions:
            parameter = parameters.pop(option.name)
            assert parameter.default == option.default
            assert type(parameter.default) is type(option.default)
            assert parameter.annotation == annotations[option.name]
            assert parameter.kind is parameter.KEYWORD_ONLY
    assert parameters.keys() <= NO_DESCRIPTION


@pytest.mark.parametrize(
    ("name", "arrays", "not_taken"),
    [
        (SPARSE_DECODE, SPARSE_DECODE_ARRAYS, set()),
        (PLAN_SPARSE, SPARSE_DECODE_ARRAYS, {"attn_sink", "out", "lse"}),
        (SPARSE_PREFILL, SPARSE_PREFILL_ARRAYS, set()),
    ],
)
def test_signatures_of_sparse_functions_agree(name: str, arrays: tuple[str, ...], not_taken: set[str]) -> None:
    parameters = dict(inspect.signature(getattr(cupy_mla, name)).parameters)
    for array in arrays:
        if array in NO_DESCRIPTION | not_taken:
            continue
        parameter = parameters.pop(array)
        is_needed = array in arrays[:3]
        assert parameter.default is (parameter.empty if is_needed else None)
        assert (parameter.kind is parameter.KEYWORD_ONLY) != is_needed
    annotations = SparseOptions.__annotations__
    for option in SPARSE_OPTIONS:
        if name in option.functions:
            parameter = parameters.pop(option.name)
            assert (parameter.default, parameter.annotation) == (option.default, annotations[option.name])
            assert type(parameter.default) is type(option.default)
            assert parameter.kind is parameter.KEYWORD_ONLY
    assert parameters.keys() <= NO_DESCRIPTION


def test_options_know_their_types() -> None:
    described = {option.name: (option.type, option.optional, option.default) for option in OPTIONS}
    assert described["head_dim_v"] == ("int", False, 512)
    assert described["softmax_scale"] == ("float", True, None)
    assert described["causal"] == ("bool", False, False)
    assert described["validate"] == ("bool", True, None)
    assert {option.type for option in OPTIONS} <= {"int", "float", "bool", "str"}
    # Hot calls give the leading ones by position.
    assert option_names(DECODE) == tuple(described)[: len(option_names(DECODE))]


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ({"head_dim_v": np.int64(448)}, 448),
        ({"softmax_scale": 1}, 1.0),
        ({"softmax_scale": np.float32(0.5)}, 0.5),
        ({"softmax_scale": Fraction(1, 4)}, 0.25),
        ({"causal": np.True_}, True),
        ({"causal": 0}, False),
        ({"max_seqlen_q": np.int32(3)}, 3),
        ({"max_seqlen_k": 0}, 0),
        ({"fixed_split_tokens": np.uint8(64)}, 64),
        ({"empty_lse": np.float64(math.inf)}, math.inf),
        ({"validate": 1}, True),
        ({"kernel": np.str_("wide64")}, "wide64"),
    ],
    ids=str,
)
def test_values_become_those_of_python(given: dict[str, Any], value: Any) -> None:
    [name] = given
    converted = getattr(DecodeOptions(**given), name)
    assert converted == value
    assert type(converted) is type(value)
    assert DecodeOptions(**given) == DecodeOptions(**{name: value})
    assert hash(DecodeOptions(**given)) == hash(DecodeOptions(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("head_dim_v", None, "an integer"),
        ("head_dim_v", 1.0, "an integer"),
        ("softmax_scale", "1", "a number"),
        ("softmax_scale", True, "a number"),
        ("softmax_scale", np.ones(2), "a number"),
        ("softmax_scale", math.nan, "a finite number above 0"),
        ("softmax_scale", -(10**400), "a finite number above 0"),
        ("causal", None, "True or False"),
        ("max_seqlen_q", 0, "1 or more"),
        ("max_seqlen_k", -1, "a non-negative integer"),
        ("fixed_split_tokens", "64", "an integer"),
        ("empty_lse", None, "-inf or +inf"),
        ("empty_lse", 0.0, "-inf or +inf"),
        ("empty_lse", math.nan, "-inf or +inf"),
        ("validate", "yes", "True or False"),
        ("kernel", None, "a string"),
        ("kernel", 64, "a string"),
    ],
)
def test_bad_options_are_refused(name: str, value: Any, expected: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        DecodeOptions(**{name: value})
    assert caught.value.argument == name
    assert expected in caught.value.expected
    assert caught.value.got


def test_what_a_plan_depends_on_alone() -> None:
    assert DecodeOptions(max_seqlen_k=640, fixed_split_tokens=64, causal=True).of_plan_alone() == (640, 64, "auto")


def test_parts_and_pairs() -> None:
    values = [f"the {part}" for part in PARTS]
    arrays = DecodeArrays.of_parts(values)
    assert (arrays.q, arrays.kv_cache) == (("the q", "the q_rope"), ("the kv_cache", "the kv_rope"))
    assert [getattr(arrays, name) for name in ARRAYS[2:]] == values[4:]
    packed = DecodeArrays.of_parts([None if part.endswith("_rope") else part for part in PARTS])
    assert [getattr(packed, name) for name in ARRAYS] == list(ARRAYS)


def test_a_call_by_names() -> None:
    arrays, options = read_call(1, 2, 3, 4, cu_seqlens_q=5, out=6, causal=True)
    assert [getattr(arrays, name) for name in ARRAYS] == [1, 2, 3, 4, 5, None, None, None, 6, None]
    assert options == DecodeOptions(causal=True)
    with pytest.raises(TypeError, match="sink"):
        read_call(1, 2, 3, 4, sink=5)
