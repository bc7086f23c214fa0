"""Memory of each rank that all ranks of a host can store to: torch's symmetric memory."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from ..arrays.frameworks import torch_module
from .group import FEATURE, TorchGroup


@dataclass(frozen=True)
class HostMemory:
    """A rank's memory, and where that of each rank is mapped in its process.

    Attributes
    ----------
    own
        [size] uint8, a tensor on its device; zeros at first.
    addresses
        [world] int64, a tensor on the device.
    handle
        What keeps the memory of the others mapped.
    """

    own: Any
    addresses: Any
    handle: Any


def share_memory(ranks: TorchGroup, size: int, like: Any) -> HostMemory | str:
    """So many bytes of each rank, on the device of a tensor; or why there are none, the same on all ranks.

    A collective of all ranks, which waits for the device.
    """
    problem = _agree(ranks, _why_not(ranks, like))
    if problem is not None:
        return problem
    torch = torch_module(FEATURE)
    memory: HostMemory | None = None
    try:
        import torch.distributed._symmetric_memory as symmetric_memory

        own = symmetric_memory.empty(size, dtype=torch.uint8, device=like.device)
        own.zero_()
        torch.cuda.synchronize(like.device)
        handle = symmetric_memory.rendezvous(own, ranks.process_group)
        memory = HostMemory(own, torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=like.device), handle)
        mine = None
    except (AttributeError, ImportError, RuntimeError) as error:  # an old torch does not have it, or not all of it
        mine = f"torch's symmetric memory: {error}"
    # Also: nobody stores to what another has not cleared yet.
    problem = _agree(ranks, mine)
    return memory if problem is None and memory is not None else str(problem)


def _why_not(ranks: TorchGroup, like: Any) -> str | None:
    """Why this rank shares no memory with the others, as far as it can tell alone."""
    if not like.is_cuda:
        return f"tensors are on {like.device.type}"
    hosts = ranks.gather_objects(socket.gethostname())
    return f"ranks are on {len(set(hosts))} hosts" if len(set(hosts)) > 1 else None


def _agree(ranks: TorchGroup, problem: str | None) -> str | None:
    """The first rank's problem that has one."""
    return next((other for other in ranks.gather_objects(problem) if other is not None), None)
