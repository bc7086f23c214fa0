"""The devices of a program under ``jax.shard_map`` as ranks that hand each other queries and results, head by head."""

from __future__ import annotations

import math
from typing import Any

from .. import jax_ops
from ..call.arguments import as_boolean
from ..call.traced import jax_module
from ..errors import InvalidArgumentError
from .exchange import ALL_TO_ALL, GATHER_AND_REDUCE

EXCHANGES = (ALL_TO_ALL, GATHER_AND_REDUCE)
_HEADS_AXIS = -2  # of q, of out and of lse


class Ranks:
    """The devices along an axis of the mesh. A program does not know which of them it runs on.

    Attributes
    ----------
    world
        How many they are.
    rank
        Which of them the device is: a value of the program.

    Raises
    ------
    InvalidArgumentError
        There is no such axis.
    """

    def __init__(self, axis_name: Any) -> None:
        jax = jax_module()
        self._axis = axis_name
        try:
            self.world = int(jax.lax.psum(1, axis_name))
            self.rank = jax.lax.axis_index(axis_name)
        except (NameError, TypeError, ValueError):
            expected = "an axis of the mesh that jax.shard_map runs this for"
            raise InvalidArgumentError("axis_name", expected, repr(axis_name)) from None

    def heads_of(self, q: Any, gathered: Any) -> int:
        """Heads of each device; ``gathered`` says whether q has those of all.

        Raises
        ------
        InvalidArgumentError
            q is no array of queries, or has all heads and they cannot be shared out equally, or ``gathered`` is no
            boolean.
        """
        shape = getattr(q, "shape", ())
        if len(shape) not in (3, 4):
            raise InvalidArgumentError("q", "an array [*rows, heads, width]", str(shape or type(q).__name__))
        heads = int(shape[_HEADS_AXIS])
        if not as_boolean(gathered, "gathered"):
            return heads
        if heads % self.world:
            raise InvalidArgumentError("q", f"a number of heads that {self.world} devices divide", str(heads))
        return heads // self.world

    def gather(self, q: Any) -> Any:
        """Queries of all heads."""
        return jax_module().lax.all_gather(q, self._axis, axis=q.ndim + _HEADS_AXIS, tiled=True)

    def finish(self, out: Any, lse: Any, heads: int, exchange: str, platform: str | None) -> tuple[Any, Any]:
        """Of results of all heads over a device's tokens, those of so many own heads over all tokens."""
        if exchange == ALL_TO_ALL:
            return jax_ops.merge_states(*self._exchange(out, lse, heads), platform=platform)
        return self._reduce(out, lse)

    def _exchange(self, out: Any, lse: Any, heads: int) -> tuple[Any, Any]:
        """Results of this device's heads from all devices, [world, ...], by one all-to-all of their bits."""
        jax = jax_module()
        bits = jax.numpy.uint16  # arithmetic types may be converted on the way, which NaN does not survive
        outs, lses = (self._by_rank(array, heads) for array in (out, lse))
        parts = [jax.lax.bitcast_convert_type(array, bits).reshape(self.world, -1) for array in (outs, lses)]
        sent = jax.numpy.concatenate(parts, axis=1)
        received = jax.lax.all_to_all(sent, self._axis, split_axis=0, concat_axis=0)
        out_bits, lse_bits = received[:, : parts[0].shape[1]], received[:, parts[0].shape[1] :]
        return (
            jax.lax.bitcast_convert_type(out_bits.reshape(outs.shape), out.dtype),
            jax.lax.bitcast_convert_type(lse_bits.reshape(*lses.shape, -1), lse.dtype),
        )

    def _reduce(self, out: Any, lse: Any) -> tuple[Any, Any]:
        """All-gather of lse, correction, and a sum in float32 of which each device gets its heads."""
        jax = jax_module()
        lses = jax.lax.all_gather(lse, self._axis)
        merged = jax.nn.logsumexp(lses, axis=0)
        weights = jax.numpy.where(lse == -math.inf, 0.0, jax.numpy.exp(lse - merged))
        weighted = out.astype(lse.dtype) * weights.swapaxes(-1, -2)[..., None]
        axis = weighted.ndim + _HEADS_AXIS
        summed = jax.lax.psum_scatter(weighted, self._axis, scatter_dimension=axis, tiled=True)
        return summed.astype(out.dtype), self._by_rank(merged, summed.shape[axis])[self.rank]

    def _by_rank(self, array: Any, heads: int) -> Any:
        """[..., world * heads, n] as [world, ..., heads, n]."""
        jnp = jax_module().numpy
        return jnp.moveaxis(array.reshape(*array.shape[:-2], self.world, heads, array.shape[-1]), -3, 0)
