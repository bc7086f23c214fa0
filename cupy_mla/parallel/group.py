"""Ranks that share a cache, and their collectives: a process group of torch, or a communicator of cupyx.distributed.

Collectives take whole arrays as they lie, and only bytes and float32 go over them: not every library of them knows our
types.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from ..arrays.exchange import empty_like
from ..arrays.frameworks import framework_of, torch_module
from ..arrays.view import view
from ..call.problem import INDEX_DTYPE
from ..call.shard import Shard
from ..errors import InvalidArgumentError

FEATURE = "cupy_mla.parallel.cp_decode"
_QUAD_BYTES = 16
# What torch called them before 2.13.
_FORMER_NAMES = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}


@dataclass(frozen=True)
class TorchGroup:
    """Ranks of a process group of torch; ``group`` None is that of all processes.

    Attributes
    ----------
    world, rank
        How many they are, and which of them this process is.
    """

    group: Any
    world: int
    rank: int

    def refuse_others(self, array: Any, name: str, wanted: str) -> None:
        """Refuse what is no array of this framework.

        Raises
        ------
        InvalidArgumentError
            It is something else.
        """
        if not isinstance(array, torch_module(FEATURE).Tensor):
            raise InvalidArgumentError(name, f"a tensor {wanted}", type(array).__name__)

    def copy(self, target: Any, source: Any) -> None:
        """``target[...] = source``, 16 bytes at once where both have them, which takes less than half as long."""
        if _has_quads(target) and _has_quads(source):
            widest = torch_module(FEATURE).complex128
            target, source = target.view(widest), source.view(widest)
        target.copy_(source)

    def count(self, shard: Shard, tokens: Any, counted: Any) -> None:
        """``counted[...] = shard.count(tokens)``; all int32."""
        counted.copy_(shard.count(tokens))

    def all_gather(self, gathered: Any, mine: Any) -> None:
        """``gathered[rank] = mine`` on every rank; ``gathered`` is contiguous."""
        self._collective("all_gather_single")(gathered.view(-1), mine.contiguous().view(-1), group=self.group)

    def reduce_scatter(self, mine: Any, summands: Any) -> None:
        """``mine`` = the sum over ranks of their ``summands[rank]``; both are contiguous."""
        self._collective("reduce_scatter_single")(mine.view(-1), summands.view(-1), group=self.group)

    def all_to_all(self, received: Any, sent: Any) -> None:
        """``received[rank]`` = what that rank has in its ``sent`` for this one; both are contiguous."""
        _distributed().all_to_all_single(received, sent, group=self.group)

    @property
    def process_group(self) -> Any:
        """The group, also where it is that of all processes."""
        return _distributed().group.WORLD if self.group is None else self.group

    def gather_objects(self, mine: Any) -> list[Any]:
        """What each rank has; waits for all of them."""
        gathered: list[Any] = [None] * self.world
        _distributed().all_gather_object(gathered, mine, group=self.group)
        return gathered

    def _collective(self, name: str) -> Any:
        """One from a single tensor to a single tensor."""
        distributed = _distributed()
        return getattr(distributed, name, None) or getattr(distributed, _FORMER_NAMES[name])


@dataclass(frozen=True)
class CupyGroup:
    """Ranks of a communicator of cupyx.distributed, which works on CuPy's current stream; as `TorchGroup`."""

    group: Any
    world: int
    rank: int

    def refuse_others(self, array: Any, name: str, wanted: str) -> None:
        """As `TorchGroup.refuse_others`. Arrays of NumPy pass, for communicators of one's own between CPUs.

        Raises
        ------
        InvalidArgumentError
            It is something else.
        """
        if framework_of(array, name) not in ("cupy", "numpy"):
            raise InvalidArgumentError(name, f"a CuPy array {wanted}", type(array).__name__)

    def copy(self, target: Any, source: Any) -> None:
        """``target[...] = source``."""
        _as_bits(target)[...] = _as_bits(source)

    def count(self, shard: Shard, tokens: Any, counted: Any) -> None:
        """As `TorchGroup.count`, in place: of what CuPy allocates by itself a CUDA graph would keep nothing."""
        rest = empty_like(tokens, tokens.shape, INDEX_DTYPE)
        rest[...] = tokens
        rest %= shard.world * shard.interleave
        rest -= shard.rank * shard.interleave
        sys.modules[framework_of(rest)].clip(rest, 0, shard.interleave, out=rest)
        counted[...] = tokens
        counted //= shard.world * shard.interleave
        counted *= shard.interleave
        counted += rest

    def all_gather(self, gathered: Any, mine: Any) -> None:
        """As `TorchGroup.all_gather`."""
        sent = mine
        if not mine.flags.c_contiguous:
            sent = empty_like(mine, mine.shape, view(mine, "q").dtype)
            self.copy(sent, mine)
        self.group.all_gather(sent.view("u1"), gathered.view("u1"), sent.nbytes)

    def all_to_all(self, received: Any, sent: Any) -> None:
        """As `TorchGroup.all_to_all`."""
        self.group.all_to_all(sent, received)


def ranks_of(group: Any) -> TorchGroup | CupyGroup:
    """The ranks of a group, and this process among them.

    Parameters
    ----------
    group
        A process group of torch, None for that of all its processes, or what ``cupyx.distributed.init_process_group``
        returns.

    Raises
    ------
    InvalidArgumentError
        There is none, or this process is not in it; ``argument`` is ``group``.
    MissingDependencyError
        torch is not installed.
    """
    if hasattr(group, "_n_devices"):  # how many they are, cupyx.distributed says nowhere else
        return CupyGroup(group, int(group._n_devices), int(group.rank))
    distributed = _distributed()
    if group is None and not (distributed.is_available() and distributed.is_initialized()):
        expected = (
            "a process group (torch.distributed.init_process_group makes that of all processes), or for CuPy arrays a "
            "communicator of cupyx.distributed"
        )
        raise InvalidArgumentError("group", expected, "none")
    try:
        rank = distributed.get_rank(group)
        world = distributed.get_world_size(group)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        expected = "a process group of torch, None, or a communicator of cupyx.distributed"
        raise InvalidArgumentError("group", expected, type(group).__name__) from None
    if rank < 0:
        raise InvalidArgumentError("group", "a process group that this process is in", "another")
    return TorchGroup(group, world, rank)


def _has_quads(tensor: Any) -> bool:
    """Whether the rows of a tensor are whole numbers of 16 bytes, as torch and a GPU want them."""
    steps = *tensor.stride()[:-1], tensor.shape[-1], tensor.storage_offset()
    is_whole = all(step * tensor.element_size() % _QUAD_BYTES == 0 for step in steps)
    return bool(is_whole and tensor.stride(-1) == 1 and tensor.data_ptr() % _QUAD_BYTES == 0)


def _as_bits(array: Any) -> Any:
    """As unsigned integers: CuPy's own kernels do not know every type."""
    return array.view(f"u{array.dtype.itemsize}")


def _distributed() -> Any:
    torch_module(FEATURE)
    import torch.distributed

    return torch.distributed
