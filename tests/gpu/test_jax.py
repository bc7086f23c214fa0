"""JAX on the GPU: eager through DLPack, and inside jax.jit through a custom call; against float64."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import pytest
from cases_chosen import attend_to_chosen, choose_tokens
from cases_dense import DenseCase

from cupy_mla import InvalidArgumentError, PlanMismatchError, append_tokens, merge_states, mla_decode, plan_decode
from cupy_mla.parallel import jax_ops as cp_jax_ops

from .gpu_arrays import attention, keys_of
from .test_decode import check_request

# JAX would take three quarters of the GPU's memory from the other tests; it reads this when it first uses the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
jax = pytest.importorskip("jax", reason="JAX is not installed")
jax_ops = pytest.importorskip("cupy_mla.jax_ops")
jnp = jax.numpy

pytestmark = pytest.mark.timeout(120)
LENGTHS = (0, 140, 4096, 1000)


@pytest.fixture(autouse=True)
def _needs_jax_on_gpu() -> None:
    if jax.default_backend() != "gpu":
        pytest.skip(f"this JAX has no GPU: its backend is {jax.default_backend()}")


def have_bridge() -> bool:
    try:
        import jax_tvm_ffi  # noqa: F401
    except ImportError:
        return False
    return True


needs_bridge = pytest.mark.skipif(not have_bridge(), reason="jax-tvm-ffi is not installed")


class OnJax:
    """A case with its arrays on the host and in JAX, on the GPU."""

    def __init__(self, **changes: Any) -> None:
        self.case = DenseCase(**{"lengths": LENGTHS, "num_heads_q": 16, "seqlens_q": 2, "causal": True, **changes})
        self.host = self.case.build()
        self.inputs = {
            "q": jnp.asarray(np.ascontiguousarray(self.host.q)),
            "kv_cache": jnp.asarray(np.ascontiguousarray(self.host.kv_cache)),
            "block_table": jnp.asarray(self.host.block_table),
            "cache_seqlens": jnp.asarray(self.host.cache_seqlens),
        }
        if self.host.cu_seqlens_q is not None:
            self.inputs["cu_seqlens_q"] = jnp.asarray(self.host.cu_seqlens_q)
        self.options = {name: value for name, value in self.case.options.items() if value is not None}
        self.plan_options = {name: value for name, value in self.options.items() if name != "softmax_scale"}

    def check(self, out: Any, lse: Any, sign: float = 1) -> None:
        """Against float64; ``sign``: for q with that factor."""
        host_out, host_lse = (np.asarray(array).astype(np.float64) for array in (out, lse))
        row = 0
        for request, length in enumerate(self.case.lengths):
            seqlen_q = self.case.seqlen_q_of(request)
            rows = slice(row, row + seqlen_q)
            row += seqlen_q
            q = self.host.q[rows] if self.case.ragged else self.host.q[request]
            keys = keys_of(self.case, self.host, request, length)
            exact = attention(
                keys, (q * np.asarray(sign, q.dtype)), self.case.latent_dim, self.case.scale, self.case.causal
            )
            result = (
                (host_out[rows], host_lse[:, rows].T) if self.case.ragged else (host_out[request], host_lse[request].T)
            )
            check_request(f"request {request}", self.case.dtype, result, exact)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("planned", [False, True])
def test_eager(dtype: str, planned: bool) -> None:
    on_jax = OnJax(dtype=dtype)
    plan = plan_decode(**on_jax.inputs, **on_jax.plan_options) if planned else None
    for _ in range(3):
        out, lse = mla_decode(**on_jax.inputs, **on_jax.options, plan=plan)
        assert isinstance(out, jax.Array)
        assert isinstance(lse, jax.Array)
        on_jax.check(out, lse)


@needs_bridge
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("ragged", [False, True])
def test_jit(heads: int, ragged: bool) -> None:
    on_jax = OnJax(num_heads_q=heads, seqlens_q=(1, 4, 0, 3)) if ragged else OnJax(num_heads_q=heads)
    program = jax.jit(lambda inputs: jax_ops.mla_decode(**inputs, **on_jax.options))
    for _ in range(3):
        on_jax.check(*program(on_jax.inputs))
    on_jax.check(*jax_ops.mla_decode(**on_jax.inputs, **on_jax.options))


@needs_bridge
def test_jit_with_a_plan_for_two_layers() -> None:
    on_jax = OnJax()

    @jax.jit
    def program(inputs: dict[str, Any]) -> Any:
        plan = jax_ops.plan_decode(**inputs, **on_jax.plan_options)
        first = jax_ops.mla_decode(**inputs, **on_jax.options, plan=plan)
        second = jax_ops.mla_decode(**{**inputs, "q": -inputs["q"]}, **on_jax.options, plan=plan)
        return first, second

    for _ in range(3):
        first, second = program(on_jax.inputs)
        on_jax.check(*first)
        on_jax.check(*second, sign=-1)


@needs_bridge
def test_jit_between_other_operations() -> None:
    """XLA's own work before and after, on its stream, many times: a missing order would show."""
    on_jax = OnJax()

    @jax.jit
    def program(inputs: dict[str, Any], noise: Any) -> Any:
        busy = noise @ noise
        q = inputs["q"] + (busy[0, 0] * 0).astype(inputs["q"].dtype)
        out, lse = jax_ops.mla_decode(**{**inputs, "q": -q}, **on_jax.options)
        return out * 1, lse + 0

    noise = jnp.zeros((4096, 4096))
    for _ in range(20):
        out, lse = program(on_jax.inputs, noise)
    on_jax.check(out, lse, sign=-1)


@needs_bridge
def test_jit_pairs() -> None:
    on_jax = OnJax()
    pairs = {name: (on_jax.inputs[name][..., :512], on_jax.inputs[name][..., 512:]) for name in ("q", "kv_cache")}
    on_jax.check(*jax.jit(lambda inputs: jax_ops.mla_decode(**inputs, **on_jax.options))({**on_jax.inputs, **pairs}))


@needs_bridge
def test_jit_errors() -> None:
    on_jax = OnJax()
    plan = jax_ops.plan_decode(**on_jax.inputs, **on_jax.plan_options)
    with pytest.raises(PlanMismatchError):
        jax.jit(lambda inputs: jax_ops.mla_decode(**inputs, plan=plan))(on_jax.inputs)
    with pytest.raises(InvalidArgumentError, match="page size"):
        jax.jit(lambda cache: jax_ops.mla_decode(**{**on_jax.inputs, "kv_cache": cache}))(
            on_jax.inputs["kv_cache"][:, :24]
        )


@needs_bridge
@pytest.mark.parametrize("donated", [False, True])
@pytest.mark.parametrize("by_slot", [False, True])
def test_append_tokens(donated: bool, by_slot: bool) -> None:
    random = np.random.default_rng(0)
    host = random.standard_normal((8, 64, 1, 576), np.float32).astype(jnp.bfloat16)
    rows = random.standard_normal((3, 1, 576), np.float32).astype(jnp.bfloat16)
    slots = np.array([130, -1, 511], np.int32)
    expected = host.copy()
    append_tokens(expected, rows, slots.astype(np.int64))
    places = {"slot_mapping": slots}
    if not by_slot:
        table = np.array([[2], [0], [7]], np.int32)
        places = {"block_table": table, "positions": np.array([2, -1, 63], np.int32)}
    cache = jnp.asarray(host)
    program = jax.jit(jax_ops.append_tokens, donate_argnums=(0,) if donated else ())
    address = cache.unsafe_buffer_pointer()
    result = program(cache, jnp.asarray(rows), **{name: jnp.asarray(array) for name, array in places.items()})
    assert np.asarray(result).tobytes() == expected.tobytes()
    if donated:
        assert result.unsafe_buffer_pointer() == address
    else:
        assert np.asarray(cache).tobytes() == host.tobytes()


@needs_bridge
def test_merge_states() -> None:
    random = np.random.default_rng(0)
    outs = random.standard_normal((3, 5, 2, 16, 512), np.float32).astype(jnp.bfloat16)
    lses = random.standard_normal((3, 5, 16, 2), np.float32)
    lses[:, 1] = -np.inf
    expected_out, expected_lse = merge_states(outs, lses)
    given = [jnp.asarray(out) for out in outs], [jnp.asarray(lse) for lse in lses]
    for merge in (jax.jit(jax_ops.merge_states), jax_ops.merge_states, merge_states):
        out, lse = merge(*given)
        np.testing.assert_allclose(np.asarray(lse), expected_lse, 1e-5, 1e-5)
        np.testing.assert_allclose(
            np.asarray(out, np.float32), np.asarray(expected_out, np.float32), rtol=1e-2, atol=1e-2
        )


@needs_bridge
@pytest.mark.parametrize("empty_lse", [-np.inf, np.inf])
def test_empty_lse(empty_lse: float) -> None:
    on_jax = OnJax()
    _, lse = jax.jit(lambda arrays: jax_ops.mla_decode(**arrays, **on_jax.options, empty_lse=empty_lse))(on_jax.inputs)
    assert (np.asarray(lse)[0] == empty_lse).all()
    assert np.isfinite(np.asarray(lse)[2:]).all()


@needs_bridge
@pytest.mark.parametrize("exchange", ["a2a", "ag_rs"])
@pytest.mark.parametrize("changes", [{}, {"seqlens_q": 1}, {"seqlens_q": (1, 4, 0, 3)}], ids=str)
def test_context_parallel_decode_on_one_device(changes: dict[str, Any], exchange: str) -> None:
    """XLA's collectives around the kernels, in a program of two layers that share a plan."""
    on_jax = OnJax(**changes)
    named = {**on_jax.plan_options, "axis_name": "ranks", "cp_interleave": 16}

    def program(inputs: dict[str, Any]) -> Any:
        given = {**inputs, **named}
        given["total_seqlens"] = given.pop("cache_seqlens")
        plan = cp_jax_ops.plan_cp_decode(**given)
        call = functools.partial(cp_jax_ops.cp_decode, exchange=exchange, plan=plan)
        return call(**given), call(**{**given, "q": -given["q"]})

    mesh, whole = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("ranks",)), jax.sharding.PartitionSpec()
    sharded = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False))
    for _ in range(3):
        first, second = sharded(on_jax.inputs)
        on_jax.check(*first)
        on_jax.check(*second, sign=-1)


@needs_bridge
@pytest.mark.parametrize("exchange", ["a2a", "ag_rs"])
@pytest.mark.parametrize("layout", [None, "fp8_ds_mla"])
def test_context_parallel_sparse_decode_on_one_device(layout: str | None, exchange: str) -> None:
    """Slots, plan and decode in a program, for other choices each time."""
    case = DenseCase(lengths=LENGTHS, num_heads_q=16, seqlens_q=2, layout=layout)
    host = case.build()
    arrays = host.q, host.kv_cache, host.block_table
    q, kv_cache, table = (jnp.asarray(np.ascontiguousarray(array)) for array in arrays)

    def program(tokens: Any) -> Any:
        indices, counts = cp_jax_ops.local_slots(tokens, table, 64, axis_name="ranks")
        named = {"topk_length": counts, "layout": layout, "axis_name": "ranks"}
        plan = cp_jax_ops.plan_cp_sparse_decode(q, kv_cache, indices, **named)
        return cp_jax_ops.cp_sparse_decode(q, kv_cache, indices, **named, exchange=exchange, plan=plan)

    mesh, whole = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("ranks",)), jax.sharding.PartitionSpec()
    sharded = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False))
    for most in (300, 1, 0):
        tokens = choose_tokens(LENGTHS, 2, 300, most)
        out, lse = (np.asarray(array).astype(np.float64) for array in sharded(tokens))
        exact_out, exact_lse = attend_to_chosen(host, tokens)
        for request in range(len(LENGTHS)):
            error = np.linalg.norm(out[request] - exact_out[request])
            assert error <= 3e-3 * np.linalg.norm(exact_out[request]), request
        np.testing.assert_allclose(lse, exact_lse, rtol=2e-4, atol=2e-4)
