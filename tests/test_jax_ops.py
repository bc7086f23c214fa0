"""Decoding in programs that JAX compiles, on the CPU; tests/gpu/test_jax.py has the same on the GPU."""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases_dense import DTYPES

from cupy_mla import (
    InvalidArgumentError,
    MissingDependencyError,
    PlanMismatchError,
    UnsupportedDeviceError,
    append_tokens,
    merge_states,
    mla_decode,
)
from cupy_mla.arrays import xla
from cupy_mla.cache import jax_in_place
from cupy_mla.call.options import DECODE, OPTIONS, PARTS, PLAN, DecodeOptions
from cupy_mla.decode import jax_calls
from cupy_mla.decode.jax_calls import TracedCall
from cupy_mla.layouts import FP8_E4M3, FP8_V41, CacheLayout

jax = pytest.importorskip("jax", reason="JAX is not installed")
jax_ops = pytest.importorskip("cupy_mla.jax_ops")
jnp = jax.numpy


def have_bridge() -> bool:
    """Whether jax-tvm-ffi is installed."""
    try:
        import jax_tvm_ffi  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.fixture(params=["custom call", "callback"], autouse=True)
def bridge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Through jax-tvm-ffi, and as if that was not installed."""
    if request.param == "custom call" and not have_bridge():
        pytest.skip("jax-tvm-ffi is not installed")
    if request.param == "callback":
        monkeypatch.setattr(jax_ops, "register_calls", lambda device: False)
        monkeypatch.setattr(jax_in_place, "register_calls", lambda call, device: False)
    jax.clear_caches()
    return str(request.param)


def make(dtype: str = "bfloat16", ragged: bool = False) -> dict[str, Any]:
    """NumPy arrays of 3 requests; pages past a request's end hold NaN."""
    random = np.random.default_rng(0)
    q_shape = (7, 16, 576) if ragged else (3, 2, 16, 576)
    cache = random.standard_normal((8, 64, 1, 576), np.float32)
    cache[6:] = np.nan
    arrays = {
        "q": random.standard_normal(q_shape, np.float32).astype(DTYPES[dtype]),
        "kv_cache": cache.astype(DTYPES[dtype]),
        "block_table": np.array([[0, 1], [2, 7], [3, 5]], np.int32),
        "cache_seqlens": np.array([100, 0, 128], np.int32),
    }
    if ragged:
        arrays["cu_seqlens_q"] = np.array([0, 2, 3, 7], np.int32)
    return arrays


def same(results: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """The same bits as the eager function on NumPy arrays."""
    for result, value in zip(results, expected, strict=True):
        host = np.asarray(result)
        assert host.dtype == value.dtype
        np.testing.assert_array_equal(host, value)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softmax_scale": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("ragged", [False, True])
def test_values(dtype: str, ragged: bool, options: dict[str, Any]) -> None:
    host = make(dtype, ragged)
    expected = mla_decode(**host, **options)
    arrays = {name: jnp.asarray(array) for name, array in host.items()}

    @jax.jit
    def program(arrays: dict[str, Any]) -> Any:
        out, lse = jax_ops.mla_decode(**arrays, **options)
        return out, lse

    same(program(arrays), expected)
    same(program(arrays), expected)
    same(jax_ops.mla_decode(**arrays, **options), expected)


def test_between_other_operations() -> None:
    host = make()
    arrays = {name: jnp.asarray(array) for name, array in host.items()}

    @jax.jit
    def program(q: Any, rest: dict[str, Any]) -> Any:
        out, lse = jax_ops.mla_decode(-q, **rest)
        return out * 2, lse + 1

    q = arrays.pop("q")
    out, lse = mla_decode(**{**host, "q": -host["q"]})
    same(program(q, arrays), (out * np.asarray(2, out.dtype), lse + np.float32(1)))


def test_pairs() -> None:
    host = make()
    arrays = {name: jnp.asarray(array) for name, array in host.items()}
    for name in ("q", "kv_cache"):
        arrays[name] = arrays[name][..., :512], arrays[name][..., 512:]
    same(jax.jit(lambda arrays: jax_ops.mla_decode(**arrays))(arrays), mla_decode(**host))


@pytest.mark.parametrize(
    "options", [{}, {"fixed_split_tokens": 64}, {"max_seqlen_k": 128}, {"kernel": "wide64"}], ids=str
)
def test_plan_for_several_layers(options: dict[str, Any]) -> None:
    host = make()
    arrays = {name: jnp.asarray(array) for name, array in host.items()}

    @jax.jit
    def program(arrays: dict[str, Any]) -> Any:
        plan = jax_ops.plan_decode(**arrays, causal=True, **options)
        first = jax_ops.mla_decode(**arrays, causal=True, plan=plan, **options)
        second = jax_ops.mla_decode(**{**arrays, "q": -arrays["q"]}, causal=True, plan=plan, **options)
        return first, second

    first, second = program(arrays)
    same(first, mla_decode(**host, causal=True))
    same(second, mla_decode(**{**host, "q": -host["q"]}, causal=True))


@pytest.mark.parametrize(
    "other", [{"causal": True}, {"fixed_split_tokens": 64}, {"max_seqlen_k": 64}, {"kernel": "wide64"}], ids=str
)
def test_a_plan_of_other_settings_is_refused(other: dict[str, Any]) -> None:
    arrays = make()
    plan = jax_ops.plan_decode(**arrays)
    with pytest.raises(PlanMismatchError):
        jax.jit(lambda arrays: jax_ops.mla_decode(**arrays, plan=plan, **other))(arrays)
    with pytest.raises(InvalidArgumentError, match=r"plan: .*plan_decode"):
        jax_ops.mla_decode(**arrays, plan=plan[None])


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "q of another rank": ("q", {"q": np.zeros((3, 16, 576), DTYPES["bfloat16"])}),
    "cache of another type": ("kv_cache", {"kv_cache": np.zeros((8, 64, 1, 576), np.float16)}),
    "table of another batch": ("block_table", {"block_table": np.zeros((2, 2), np.int32)}),
    "table of int16": ("block_table", {"block_table": np.zeros((3, 2), np.int16)}),
    "scale of 0": ("softmax_scale", {"softmax_scale": 0.0}),
    "value width beyond the key": ("head_dim_v", {"head_dim_v": 600}),
    "q of three": ("q", {"q": (np.zeros(1),) * 3}),
    "q that is no array": ("q", {"q": 3}),
    "split of no whole tile": ("fixed_split_tokens", {"fixed_split_tokens": 63}),
    "kernel that there is not": ("kernel", {"kernel": "wide"}),
    "plan that is no array": ("plan", {"plan": 3}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_while_tracing(name: str) -> None:
    argument, change = BAD[name]
    arrays = {**make(), **change}
    static = {
        key: arrays.pop(key)
        for key in ("softmax_scale", "head_dim_v", "q", "fixed_split_tokens", "kernel", "plan")
        if key in change
    }
    with pytest.raises(InvalidArgumentError) as caught:
        jax.jit(lambda arrays: jax_ops.mla_decode(**{**arrays, **static}))(arrays)
    assert caught.value.argument == argument


def test_the_backend_of_the_settings_counts(set_environment: Callable[..., Any]) -> None:
    set_environment(CUPY_MLA_BACKEND="cuda")
    with pytest.raises(UnsupportedDeviceError, match="CUPY_MLA_BACKEND"):
        jax_ops.mla_decode(**make())
    with pytest.raises(UnsupportedDeviceError, match="CUPY_MLA_BACKEND"):
        jax_ops.plan_decode(**make())


@pytest.mark.parametrize("setting", [None, "1"])
def test_values_are_validated_on_the_cpu(setting: str | None, set_environment: Callable[..., Any]) -> None:
    arrays = make()
    arrays["cache_seqlens"][0] = 10**6
    set_environment(CUPY_MLA_VALIDATE=setting)
    jax.block_until_ready(jax_ops.mla_decode(**arrays, validate=False))
    with pytest.raises(Exception, match=r"cache_seqlens\[0\]"):  # JAX's own exception, with our message
        jax.block_until_ready(jax_ops.mla_decode(**arrays))


@pytest.mark.parametrize("empty_lse", [-np.inf, np.inf])
def test_empty_lse(empty_lse: float) -> None:
    host = make()
    expected = mla_decode(**host, empty_lse=empty_lse)
    assert (expected[1][1] == empty_lse).all()
    same(jax.jit(lambda arrays: jax_ops.mla_decode(**arrays, empty_lse=empty_lse))(host), expected)


def test_a_call_says_itself_whether_values_are_validated(set_environment: Callable[..., Any]) -> None:
    arrays = make()
    arrays["cache_seqlens"][0] = 10**6
    with pytest.raises(Exception, match=r"cache_seqlens\[0\]"):  # JAX's own exception, with our message
        jax.block_until_ready(jax_ops.mla_decode(**arrays, validate=True))
    set_environment(CUPY_MLA_VALIDATE="1")
    jax.block_until_ready(jax_ops.mla_decode(**arrays, validate=False))


def test_a_plan_serves_a_pool_that_has_grown() -> None:
    host = make()
    plan = jax_ops.plan_decode(**host)
    grown = np.concatenate((host["kv_cache"], host["kv_cache"][6:]))
    same(jax_ops.mla_decode(**{**host, "kv_cache": grown}, plan=plan), mla_decode(**host))


def test_options_are_shown_and_others_refused() -> None:
    for function, described in ((jax_ops.mla_decode, {DECODE, PLAN}), (jax_ops.plan_decode, {PLAN})):
        shown = inspect.signature(function).parameters
        for option in OPTIONS:
            assert (option.name in shown) == bool(described & set(option.functions))
            if option.name in shown:
                assert shown[option.name].default == option.default
    with pytest.raises(TypeError, match=r"plan_decode\(\) got an unexpected keyword argument 'softmax_scale'"):
        jax_ops.plan_decode(**make(), softmax_scale=1.0)


def test_a_traced_scale_is_refused() -> None:
    arrays = make()
    with pytest.raises(InvalidArgumentError, match="softmax_scale"):
        jax.jit(lambda scale: jax_ops.mla_decode(**arrays, softmax_scale=scale))(0.5)


def test_the_eager_function_says_what_to_call_inside_jit() -> None:
    arrays = make()
    with pytest.raises(InvalidArgumentError, match=r"jax_ops\.mla_decode"):
        jax.jit(lambda q: mla_decode(**{**arrays, "q": q}))(jnp.asarray(arrays["q"]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softmax_scale": 0.25, "causal": True, "max_seqlen_q": 3, "empty_lse": np.inf, "validate": False},
        {"head_dim_v": 256, "max_seqlen_k": 4096, "fixed_split_tokens": 64, "validate": True},
        {"kernel": "wide64"},
        {"kernel": "fp8_exact16", "compute": "exact"},
    ],
    ids=str,
)
def test_options_survive_as_attributes(options: dict[str, Any]) -> None:
    parts = [object() if index % 3 else None for index in range(len(PARTS))]
    call = TracedCall.of(tuple(parts), DecodeOptions(**options))
    attributes = call.attributes()
    assert tuple(attributes) == jax_calls.ATTRIBUTES
    told = TracedCall.of_attributes(tuple(value.item() for value in attributes.values()))
    assert told == call
    views = [part for part in parts if part is not None]
    arrays = told.arrays([*views, "result"])
    assert arrays.q == (None, views[0]) or arrays.q is views[0]
    assert [arrays.block_table, arrays.cache_seqlens, arrays.cu_seqlens_q] == parts[4:7]


SHARDED = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import cupy_mla
from cupy_mla import jax_ops

mesh = Mesh(np.array(jax.devices()), ("x",))
random = np.random.default_rng(0)
q, kv = (jax.numpy.asarray(random.standard_normal(s), "bfloat16") for s in ((2, 1, 16, 576), (8, 64, 1, 576)))
arrays = q, kv, jax.numpy.arange(8, dtype="int32").reshape(2, 4), jax.numpy.asarray([200, 17], "int32")
expected = cupy_mla.mla_decode(*arrays)
halves = [cupy_mla.mla_decode(q[:, :, first : first + 8], *arrays[1:]) for first in (0, 8)]
of_halves = [np.concatenate(parts, axis) for axis, *parts in zip((2, 1), *halves)]  # other bits by some CPUs' BLAS
heads, whole = P(None, None, "x"), P()
placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, (heads, whole, whole, whole))]
call = jax_ops.mla_decode
specs = {"mesh": mesh, "in_specs": (heads, whole, whole, whole), "out_specs": (heads, P(None, "x")), "check_vma": False}
for program, results in ((call, expected), (jax.shard_map(call, **specs), of_halves)):
    for found, value in zip(jax.jit(program)(*placed), results):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(value))
try:
    cupy_mla.mla_decode(*placed)
except cupy_mla.InvalidArgumentError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX is older than jax.shard_map")
def test_sharded_arrays_are_served_or_refused_in_words(bridge: str) -> None:
    if bridge == "callback":
        pytest.skip("another process, with the bridge if there is one")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("q: expected an array on one device (cupy_mla.jax_ops inside jax.shard_map")


def test_words_of_any_length_reach_the_call() -> None:
    host = make()
    expected = mla_decode(**host)
    for kernel in ("narrow16", "wide64"):
        same(jax.jit(functools.partial(jax_ops.mla_decode, kernel=kernel))(**host), expected)
    with pytest.raises(InvalidArgumentError, match="kernel: "):
        jax_ops.mla_decode(**host, kernel="narrow64")


def test_the_missing_bridge_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(xla.importlib, "import_module", refuse)
    assert xla.register(jax_calls.CALLS, "cpu") is False
    with pytest.raises(MissingDependencyError, match="jax-tvm-ffi"):
        xla.register(jax_calls.CALLS, "cuda")


@pytest.mark.parametrize("as_array", [False, True])
def test_each_part_of_an_e4m3_cache_has_a_scale(as_array: bool) -> None:
    host = make()
    host["kv_cache"] = host["kv_cache"].astype(FP8_E4M3.dtype)
    scales = np.array([0.5, 0.0375], np.float32)
    expected = mla_decode(**host, kv_scale=scales)
    given = scales if as_array else (0.5, 0.0375)
    program = jax.jit(lambda arrays, scale: jax_ops.mla_decode(**arrays, kv_scale=scale if as_array else given))
    for results in (program(host, scales), jax_ops.mla_decode(**host, kv_scale=given)):
        same(results, expected)


# --- appends and merges


def slots_of(kind: str) -> dict[str, Any]:
    """Where 4 tokens go in a cache of 8 pages of 64, one of them nowhere."""
    if kind == "slots":
        return {"slot_mapping": np.array([70, -1, 3, 511], np.int64)}
    table = np.array([[0, 1], [2, 7]], np.int32)
    if kind == "one request each":
        return {"block_table": table, "positions": np.array([127, 128, 0, 64], np.int32)}
    requests = np.array([1, 0, 5, 0], np.int32)
    return {"block_table": table, "positions": np.array([65, 3, 0, 127], np.int32), "requests": requests}


@pytest.mark.parametrize("pairs", ["packed", "pair", "pair of packed rows"])
@pytest.mark.parametrize("kind", ["slots", "one request each", "requests"])
def test_append_tokens(kind: str, pairs: str) -> None:
    cache, places = make()["kv_cache"], slots_of(kind)
    rows = np.random.default_rng(1).standard_normal((4, 1, 576), np.float32).astype(cache.dtype)
    expected = cache.copy()
    append_tokens(expected, rows, **places)

    def split(array: Any) -> Any:
        return array[..., :512], array[..., 512:]

    given = split(cache) if pairs != "packed" else cache
    new = split(rows) if pairs == "pair" else rows
    arrays = jax.tree.map(jnp.asarray, given)
    program = jax.jit(lambda cache, new, places: jax_ops.append_tokens(cache, new, **places))
    for result in (program(arrays, new, places), jax_ops.append_tokens(arrays, new, **places)):
        found = np.concatenate([np.asarray(part) for part in result], -1) if pairs != "packed" else np.asarray(result)
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes()
    before = [np.asarray(part) for part in arrays] if pairs != "packed" else [np.asarray(arrays)]
    assert np.concatenate(before, -1).tobytes() == cache.tobytes()


def test_a_donated_cache_is_appended_to_and_attended_to() -> None:
    host = make()
    rows = np.random.default_rng(1).standard_normal((3, 576), np.float32).astype(host["q"].dtype)
    positions = host["cache_seqlens"] % 128
    lengths = positions + 1
    expected_cache = host["kv_cache"].copy()
    append_tokens(expected_cache, rows, block_table=host["block_table"], positions=positions)
    expected = mla_decode(**{**host, "kv_cache": expected_cache, "cache_seqlens": lengths})

    def step(cache: Any, rows: Any) -> Any:
        cache = jax_ops.append_tokens(cache, rows, block_table=host["block_table"], positions=positions)
        arrays = {**host, "kv_cache": cache, "cache_seqlens": lengths}
        return cache, jax_ops.mla_decode(**arrays)

    cache, results = jax.jit(step, donate_argnums=0)(jnp.asarray(host["kv_cache"]), rows)
    same(results, expected)
    assert np.asarray(cache).tobytes() == expected_cache.tobytes()


@pytest.mark.parametrize("layout", [FP8_E4M3, FP8_V41], ids=lambda layout: layout.name)
def test_append_to_fewer_bits(layout: CacheLayout) -> None:
    scale = 0.01 if layout.needs_scale else None
    values = np.ones((4, 16, 1, 512), np.float32)
    expected = layout.quantise(values, scale)
    rows = np.random.default_rng(2).standard_normal((3, 512), np.float32).astype(DTYPES["bfloat16"])
    slots = np.array([17, -1, 63], np.int64)
    cache = jnp.asarray(expected)
    append_tokens(expected, rows, slots, kv_scale=scale, layout=layout)

    def append(cache: Any, rows: Any, scale: Any) -> Any:
        return jax_ops.append_tokens(cache, rows, slots, kv_scale=scale, layout=layout)

    for new in (jax.jit(append)(cache, rows, scale), append(cache, rows, scale)):
        assert np.asarray(new).tobytes() == expected.tobytes()
    if layout.needs_scale:
        scales, parts = np.array([scale, 0.03], np.float32), (rows[:, :448], rows[:, 448:])
        append_tokens(expected, parts, slots, kv_scale=(scale, 0.03))
        assert np.asarray(new).tobytes() != expected.tobytes()
        for new in (jax.jit(append)(cache, parts, scales), append(cache, parts, (scale, 0.03))):
            assert np.asarray(new).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"kv_scale": 1.0}, "kv_scale"),
        ({"layout": "fp8_e4m3"}, "kv_cache"),
        ({"kv_new": np.zeros((4, 1, 575), DTYPES["bfloat16"])}, "kv_new"),
        ({"kv_new": np.zeros((4, 1, 576), np.float16)}, "kv_new"),
        ({"slot_mapping": np.zeros((3,), np.int32)}, "positions"),
        ({"slot_mapping": np.zeros((4,), np.float32)}, "slot_mapping"),
        ({"slot_mapping": None}, "block_table"),
        ({"block_table": np.zeros((4, 1), np.int32)}, "block_table"),
        ({"kv_cache": 3}, "kv_cache"),
    ],
)
def test_bad_appends_are_refused_while_tracing(change: dict[str, Any], argument: str) -> None:
    cache = jnp.asarray(make()["kv_cache"])
    rows = np.zeros((4, 1, 576), DTYPES["bfloat16"])
    arrays = {"kv_cache": cache, "kv_new": rows, "slot_mapping": np.zeros((4,), np.int32), **change}
    with pytest.raises(InvalidArgumentError) as caught:
        jax_ops.append_tokens(**arrays)
    assert caught.value.argument == argument
    with pytest.raises(TypeError, match="unexpected keyword argument 'slots'"):
        jax_ops.append_tokens(cache, rows, slots=None)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("ragged", [False, True])
def test_merge_states(ragged: bool, stacked: bool) -> None:
    random = np.random.default_rng(0)
    out_shape, lse_shape = ((7, 16, 64), (16, 7)) if ragged else ((3, 2, 16, 64), (3, 16, 2))
    outs = random.standard_normal((4, *out_shape), np.float32).astype(DTYPES["bfloat16"])
    lses = random.standard_normal((4, *lse_shape), np.float32)
    lses[:, ..., 0] = -np.inf
    expected = merge_states(outs, lses)
    given = (outs, lses) if stacked else (list(outs), tuple(lses))
    same(jax.jit(jax_ops.merge_states)(*given), expected)
    same(jax_ops.merge_states(*given), expected)


def test_bad_states_are_refused_while_tracing() -> None:
    outs, lses = np.zeros((2, 3, 4, 8), np.float32), np.zeros((2, 4, 3), np.float32)
    for wrong, argument in (
        ((outs, lses[:1]), "lses"),
        ((outs[0, 0], lses), "outs"),
        (([outs[0], outs[1, :2]], lses), "outs"),
        (([], lses), "outs"),
        ((outs, 3), "lses"),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            jax_ops.merge_states(*wrong)
        assert caught.value.argument == argument
