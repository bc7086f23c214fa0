"""Process groups of torch and their collectives, on tensors as they lie."""

from __future__ import annotations

import functools
from typing import Any

from ..arrays import frameworks
from ..errors import InvalidArgumentError

# What torch called them before 2.13.
_FORMER_NAMES = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}

torch_module = functools.partial(frameworks.torch_module, "cupy_mla.parallel.cp_decode")


def ranks_of(group: Any) -> tuple[int, int]:
    """World and rank of a process group.

    Raises
    ------
    InvalidArgumentError
        There is none, or this process is not in it; ``argument`` is ``group``.
    MissingDependencyError
        torch is not installed.
    """
    distributed = _distributed()
    if not (distributed.is_available() and distributed.is_initialized()):
        expected = "a process group (torch.distributed.init_process_group makes that of all processes)"
        raise InvalidArgumentError("group", expected, "none")
    try:
        rank = distributed.get_rank(group)
        world = distributed.get_world_size(group)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise InvalidArgumentError("group", "a process group of torch, or None", type(group).__name__) from None
    if rank < 0:
        raise InvalidArgumentError("group", "a process group that this process is in", "another")
    return world, rank


def all_gather(gathered: Any, mine: Any, group: Any) -> None:
    """``gathered[rank] = mine`` on every rank; both are contiguous."""
    _collective("all_gather_single")(gathered.view(-1), mine.view(-1), group=group)


def reduce_scatter(mine: Any, summands: Any, group: Any) -> None:
    """``mine`` = the sum over ranks of their ``summands[rank]``; both are contiguous."""
    _collective("reduce_scatter_single")(mine.view(-1), summands.view(-1), group=group)


def all_to_all(received: Any, sent: Any, group: Any) -> None:
    """``received[rank]`` = what that rank has in its ``sent`` for this one; both are contiguous."""
    _distributed().all_to_all_single(received, sent, group=group)


def _collective(name: str) -> Any:
    """One from a single tensor to a single tensor."""
    distributed = _distributed()
    return getattr(distributed, name, None) or getattr(distributed, _FORMER_NAMES[name])


def _distributed() -> Any:
    torch_module()
    import torch.distributed

    return torch.distributed
