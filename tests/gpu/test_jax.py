"""JAX on the GPU: eager through DLPack, and inside jax.jit through a custom call; against float64."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from cases_dense import DenseCase

from cupy_mla import InvalidArgumentError, PlanMismatchError, mla_decode, plan_decode

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
