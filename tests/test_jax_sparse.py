"""Sparse attention in programs that JAX compiles, on the CPU; tests/gpu/test_jax.py has dense decoding on the GPU."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_sparse import SparseCase
from test_sparse_decode import arguments as decode_arguments
from test_sparse_prefill import arguments as prefill_arguments

import cupy_mla
from cupy_mla import InvalidArgumentError, PlanMismatchError
from cupy_mla.decode import jax_sparse

jax = pytest.importorskip("jax", reason="jax is not installed")
jax_ops = pytest.importorskip("cupy_mla.jax_ops")

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="JAX would run it on a GPU")
CASE = SparseCase(batch=3, seqlen_q=2, lengths="token", sinks=True)
Arrays = dict[str, Any]


@pytest.fixture(params=["custom call", "callback"], autouse=True)
def _bridge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through jax-tvm-ffi, and as if that was not installed."""
    if request.param == "callback":
        monkeypatch.setattr(jax_sparse, "register_calls", lambda device: False)
    elif importlib.util.find_spec("jax_tvm_ffi") is None:
        pytest.skip("jax-tvm-ffi is not installed")
    jax.clear_caches()


def arrays_of(given: dict[str, Any]) -> Arrays:
    there = {name: value for name, value in given.items() if value is not None and name not in ("head_dim_v", "strict")}
    return {name: jax.numpy.asarray(value) for name, value in there.items()}


def decode_arrays(case: SparseCase = CASE) -> Arrays:
    return arrays_of(decode_arguments(case.build()))


def prefill_arrays() -> Arrays:
    return arrays_of(prefill_arguments(replace(CASE, seqlen_q=1).build()))


def same(results: Any, expected: Any) -> None:
    assert len(results) == len(expected)
    for result, value in zip(results, expected, strict=True):
        assert isinstance(result, jax.Array)
        np.testing.assert_array_equal(np.asarray(result), np.asarray(value))


OPTIONS = pytest.mark.parametrize("options", [{}, {"softmax_scale": 0.1}, {"empty_lse": np.inf}], ids=str)
JIT = pytest.mark.parametrize("jit", [False, True])


@OPTIONS
@JIT
def test_decode(jit: bool, options: dict[str, Any]) -> None:
    def program(arrays: Arrays) -> Any:
        return jax_ops.mla_sparse_decode(**arrays, **options)

    arrays = decode_arrays()
    expected = cupy_mla.mla_sparse_decode(**arrays, **options)
    same((jax.jit(program) if jit else program)(arrays), expected)


@JIT
@pytest.mark.parametrize("case", [CASE, replace(CASE, lengths=None, sinks=False), replace(CASE, lengths="request")])
def test_a_plan_serves_every_layer(case: SparseCase, jit: bool) -> None:
    def program(arrays: Arrays) -> Any:
        plan = jax_ops.plan_sparse_decode(**{name: array for name, array in arrays.items() if name != "attn_sink"})
        first, _ = jax_ops.mla_sparse_decode(**arrays, plan=plan)
        q = jax.numpy.pad(first, ((0, 0), (0, 0), (0, 0), (0, 64)))
        return jax_ops.mla_sparse_decode(**{**arrays, "q": q}, plan=plan)

    arrays = decode_arrays(case)
    first, _ = cupy_mla.mla_sparse_decode(**arrays)
    q = jax.numpy.pad(first, ((0, 0), (0, 0), (0, 0), (0, 64)))
    expected = cupy_mla.mla_sparse_decode(**{**arrays, "q": q})
    same((jax.jit(program) if jit else program)(arrays), expected)


@OPTIONS
@JIT
def test_prefill(jit: bool, options: dict[str, Any]) -> None:
    def program(arrays: Arrays) -> Any:
        return jax_ops.mla_sparse_prefill(**arrays, **options)

    arrays = prefill_arrays()
    same((jax.jit(program) if jit else program)(arrays), cupy_mla.mla_sparse_prefill(**arrays, **options))


def test_wrong_arguments_are_refused_while_tracing() -> None:
    arrays = decode_arrays()
    wrong = {**arrays, "indices": arrays["indices"].astype("float32")}
    with pytest.raises(InvalidArgumentError, match="indices"):
        jax.jit(lambda given: jax_ops.mla_sparse_decode(**given))(wrong)
    with pytest.raises(InvalidArgumentError, match="kv"):
        jax_ops.mla_sparse_prefill(**{**prefill_arrays(), "kv": 3})
    with pytest.raises(InvalidArgumentError, match="empty_lse"):
        jax_ops.mla_sparse_decode(**arrays, empty_lse=0.0)
    with pytest.raises(TypeError, match="causal"):
        jax_ops.mla_sparse_decode(**arrays, causal=True)


def test_a_plan_of_another_call_is_refused() -> None:
    arrays = decode_arrays()
    of_plan = {name: array for name, array in arrays.items() if name != "attn_sink"}
    plan = jax_ops.plan_sparse_decode(**of_plan, fixed_split_tokens=64)
    with pytest.raises(PlanMismatchError, match="plan"):
        jax_ops.mla_sparse_decode(**arrays, plan=plan)
    same(jax_ops.mla_sparse_decode(**arrays, plan=plan, fixed_split_tokens=64), cupy_mla.mla_sparse_decode(**arrays))


def test_what_validation_finds_is_raised_when_the_program_runs() -> None:
    arrays = decode_arrays()
    arrays["topk_length"] = arrays["topk_length"].at[1, 1].set(99)
    program = jax.jit(lambda given: jax_ops.mla_sparse_decode(**given, validate=True))
    with pytest.raises(Exception, match=r"topk_length\[1, 1\]"):
        jax.block_until_ready(program(arrays))


def test_what_is_taken_is_shown() -> None:
    """What the functions take, but streams and outputs; and the options of the plan where a call plans by itself."""
    taken = {
        jax_ops.mla_sparse_decode: (cupy_mla.mla_sparse_decode, cupy_mla.plan_sparse_decode),
        jax_ops.plan_sparse_decode: (cupy_mla.plan_sparse_decode,),
        jax_ops.mla_sparse_prefill: (cupy_mla.mla_sparse_prefill,),
        jax_ops.append_tokens: (cupy_mla.append_tokens,),
        jax_ops.copy_pages: (cupy_mla.copy_pages,),
        jax_ops.quantise_cache: (cupy_mla.quantise_cache,),
        jax_ops.dequantise_cache: (cupy_mla.dequantise_cache,),
    }
    for function, others in taken.items():
        shown = inspect.signature(function).parameters
        parameters = {
            name: parameter for other in others for name, parameter in inspect.signature(other).parameters.items()
        }
        assert shown.keys() == {*parameters, "platform"} - {"stream", "out", "lse", "max_logits"}
        assert all(shown[name].default == parameters[name].default for name in shown if name != "platform")
        with pytest.raises(TypeError, match=rf"{function.__name__}\(\) got an unexpected keyword argument 'stream'"):
            function(1, 2, 3, stream=0)
