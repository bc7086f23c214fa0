"""Context-parallel decode in programs of JAX: inside ``jax.shard_map``, with XLA's collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import jax_ops
from ..call.arguments import shard_of
from ..call.traced import jax_module, like
from ..decode import dense
from ..errors import InvalidArgumentError, PlanMismatchError
from .exchange import ALL_TO_ALL, check_exchange
from .jax_ranks import EXCHANGES, Ranks
from .jax_sparse import cp_sparse_decode, local_slots, plan_cp_sparse_decode
from .lengths import local_lengths

__all__ = ["cp_decode", "cp_sparse_decode", "local_slots", "plan_cp_decode", "plan_cp_sparse_decode"]

_OF_THE_SHARD = ("cache_seqlens", "cp_world", "cp_rank", "validate", "empty_lse")


@like(dense.mla_decode, dense.plan_decode, without=_OF_THE_SHARD)
def cp_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    total_seqlens: Any,
    *,
    axis_name: Any,
    cp_interleave: int = 1,
    gathered: bool = False,
    exchange: str = ALL_TO_ALL,
    platform: str | None = None,
    plan: Any = None,
    **named: Any,
) -> tuple[Any, Any]:
    """`cupy_mla.parallel.cp_decode` on each device's part of a program under ``jax.shard_map``.

    Devices are ranks in the order of ``axis_name``. ``shard_map`` has to be told ``check_vma=False``.

    Parameters
    ----------
    q
        [batch, seqlen_q, num_heads_q, d_qk] bfloat16 or float16: queries of this device's heads, as many on each; with
        ``cu_seqlens_q`` [total_q, num_heads_q, d_qk]. With ``gathered`` those of all heads, the same on each device.
    kv_cache, block_table
        This device's tokens and the pages of each request, as in `cupy_mla.mla_decode`.
    total_seqlens
        [batch] int32: tokens of each request on all devices.
    axis_name
        Axis of the mesh, or a tuple of axes, that the tokens are sharded over.
    cp_interleave, gathered, exchange
        As in `cupy_mla.parallel.cp_decode`.
    platform
        As in `cupy_mla.jax_ops.mla_decode`.
    plan
        From `plan_cp_decode`, made with the same options. None: the call makes its own.
    **named
        Other arrays and options, as in `cupy_mla.jax_ops.mla_decode`.

    Returns
    -------
    out, lse
        Of this device's heads, over the tokens of all: [batch, seqlen_q, num_heads_q, head_dim_v] of q's type and
        [batch, num_heads_q, seqlen_q] float32, or [total_q, num_heads_q, head_dim_v] and [num_heads_q, total_q].

    Raises
    ------
    InvalidArgumentError, PlanMismatchError
        An argument is wrong, or there is no such axis; raised while tracing.
    UnsupportedDeviceError
        The GPU is not Hopper, the platform is neither CPU nor CUDA, or the settings ask for the other backend.
    MissingDependencyError
        JAX is not installed, or the platform is CUDA and jax-tvm-ffi is not.
    """
    check_exchange(exchange, among=EXCHANGES)
    ranks = _Shards(axis_name, cp_interleave, total_seqlens, block_table)
    heads = ranks.heads_of(q, gathered)
    queries = q if gathered else ranks.gather(q)
    out, lse = ranks.decode(queries, kv_cache, block_table, plan, {**named, "platform": platform})
    return ranks.finish(out, lse, heads, exchange, platform)


@like(dense.plan_decode, without=_OF_THE_SHARD)
def plan_cp_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    total_seqlens: Any,
    *,
    axis_name: Any,
    cp_interleave: int = 1,
    gathered: bool = False,
    platform: str | None = None,
    **named: Any,
) -> Any:
    """The plan of a device's decodes in one step, uint8 arrays, for all layers of a program under ``jax.shard_map``.

    Arguments and errors are those of `cp_decode` and of `cupy_mla.plan_decode`. Of q only shape and type count. Nothing
    is sent.
    """
    ranks = _Shards(axis_name, cp_interleave, total_seqlens, block_table)
    heads = ranks.heads_of(q, gathered) * ranks.world
    queries = jax_module().numpy.zeros((*q.shape[:-2], heads, q.shape[-1]), q.dtype)
    return ranks.plan(queries, kv_cache, block_table, {**named, "platform": platform})


class _Shards(Ranks):
    """Devices that a program's tokens are sharded over, with the lengths of their shares."""

    def __init__(self, axis_name: Any, cp_interleave: int, total_seqlens: Any, block_table: Any) -> None:
        super().__init__(axis_name)
        jax = jax_module()
        requests = list(getattr(block_table, "shape", ())[:1])
        shape, dtype = getattr(total_seqlens, "shape", None), getattr(total_seqlens, "dtype", None)
        if shape is None or list(shape) != (requests or list(shape)) or str(dtype) != "int32":
            got = type(total_seqlens).__name__ if shape is None else f"{dtype} {list(shape)}"
            raise InvalidArgumentError("total_seqlens", f"int32 {requests or '[batch]'}, one per request", got)
        self._interleave = shard_of(self.world, 0, cp_interleave).interleave
        self._total_seqlens = total_seqlens
        shares = [local_lengths(total_seqlens, self.world, rank, cp_interleave) for rank in range(self.world)]
        self._lengths = jax.numpy.stack(shares)[self.rank]

    def decode(self, queries: Any, kv_cache: Any, block_table: Any, plan: Any, named: dict[str, Any]) -> Any:
        """out and lse of all heads over this device's tokens.

        Raises
        ------
        PlanMismatchError
            The plan is for a mask where there is none, or the other way round.
        """
        inputs = queries, kv_cache, block_table, self._lengths
        is_masked = _is_masked(queries, named)
        if plan is not None and is_masked != isinstance(plan, tuple):
            kinds = "without a mask", "of several query tokens with a mask"
            wanted, came = f"a plan for calls {kinds[is_masked]}", f"one for calls {kinds[not is_masked]}"
            raise PlanMismatchError("plan", wanted, came)
        if is_masked and plan is not None and len(plan) != self.world:
            raise PlanMismatchError("plan", f"a plan for {self.world} ranks", f"one for {len(plan)}")
        if not is_masked:
            return jax_ops.mla_decode(*inputs, plan=plan, cp_world=self.world, **named)

        def call_of(rank: int) -> Callable[..., Any]:
            sharding = self._sharding(rank, named)
            return lambda inputs, total, plan: jax_ops.mla_decode(
                *inputs, total_seqlens=total, plan=None if plan is None else plan[rank], **sharding
            )

        return self._on_its_rank(call_of, inputs, self._total_seqlens, plan)

    def plan(self, queries: Any, kv_cache: Any, block_table: Any, named: dict[str, Any]) -> Any:
        """An array; for masked calls a tuple with one for each rank, of which this device's one is filled."""
        inputs = queries, kv_cache, block_table, self._lengths
        if not _is_masked(queries, named):
            return jax_ops.plan_decode(*inputs, cp_world=self.world, **named)
        jax = jax_module()

        def plan_of(rank: int) -> Callable[..., Any]:
            sharding = self._sharding(rank, named)
            return lambda inputs, total: jax_ops.plan_decode(*inputs, total_seqlens=total, **sharding)

        given = inputs, self._total_seqlens
        # Plans have sizes that say what they are for, the rank too.
        others = [jax.eval_shape(plan_of(rank), *given) for rank in range(self.world)]

        def call_of(rank: int) -> Callable[..., Any]:
            def call(*given: Any) -> tuple[Any, ...]:
                plans = [jax.numpy.zeros(other.shape, other.dtype) for other in others]
                return (*plans[:rank], plan_of(rank)(*given), *plans[rank + 1 :])

            return call

        return self._on_its_rank(call_of, *given)

    def _on_its_rank(self, call_of: Callable[[int], Callable[..., Any]], *given: Any) -> Any:
        """What the call of this device's rank returns: a mask's rank is no value of a program but part of it, so the
        program has the calls of all ranks, and runs one."""
        return jax_module().lax.switch(self.rank, [call_of(rank) for rank in range(self.world)], *given)

    def _sharding(self, rank: int, named: dict[str, Any]) -> dict[str, Any]:
        return {**named, "cp_world": self.world, "cp_rank": rank, "cp_interleave": self._interleave}


def _is_masked(queries: Any, named: dict[str, Any]) -> bool:
    """Whether a mask hides anything from a call: not from one query token."""
    return named.get("causal", False) is not False and not (queries.ndim == 4 and queries.shape[1] == 1)
