"""Memory of each rank that all ranks of a host can store to: torch's symmetric memory."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..arrays.frameworks import torch_module
from .group import FEATURE, TorchGroup

# How often this process has shared memory with others. torch names what ranks tell each other then by such a count, of
# the process and not of the group: those that do not agree would wait for each other for ever.
_shared = 0


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
    num_sms
        SMs that a kernel of each rank may wait on for the others: all of the smallest GPU, or, where several ranks are
        on one, so many of its SMs that the others still have some when all but one wait.
    has_own_gpus
        Whether no two ranks are on one GPU.
    """

    own: Any
    addresses: Any
    handle: Any
    num_sms: int
    has_own_gpus: bool = False


def share_memory(ranks: TorchGroup, size: int, like: Any) -> HostMemory | str:
    """So many bytes of each rank, on the device of a tensor; or why there are none, the same on all ranks.

    A collective of all ranks, which waits for the device.
    """
    global _shared
    problem = _agree(ranks, None if like.is_cuda else f"tensors are on {like.device.type}")
    if problem is not None:
        return problem
    counts = set(ranks.gather_objects(_shared))
    if len(counts) > 1:
        return f"ranks have shared memory {min(counts)} to {max(counts)} times before, and torch wants all as often"
    torch = torch_module(FEATURE)
    gpu = torch.cuda.get_device_properties(like.device)
    uuid = str(getattr(gpu, "uuid", None))  # torch that does not say it has no symmetric memory either
    gpus = ranks.gather_objects((socket.gethostname(), uuid, gpu.multi_processor_count))
    num_hosts = len({host for host, _, _ in gpus})
    if num_hosts > 1:
        return f"ranks are on {num_hosts} hosts"
    num_sms = sms_to_wait_on(gpus)
    memory: HostMemory | None = None
    try:
        import torch.distributed._symmetric_memory as symmetric_memory

        own = symmetric_memory.empty(size, dtype=torch.uint8, device=like.device)
        own.zero_()
        torch.cuda.synchronize(like.device)
        _shared += 1
        handle = symmetric_memory.rendezvous(own, ranks.process_group)
        addresses = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=like.device)
        memory = HostMemory(own, addresses, handle, num_sms, len(set(gpus)) == len(gpus))
        mine = None
    except (AttributeError, ImportError, RuntimeError) as error:  # an old torch does not have it, or not all of it
        mine = f"torch's symmetric memory: {error}"
    # Also: nobody stores to what another has not cleared yet.
    problem = _agree(ranks, mine)
    return memory if problem is None and memory is not None else str(problem)


def sms_to_wait_on(gpus: Sequence[tuple[Any, Any, int]]) -> int:
    """`HostMemory.num_sms`, of each rank's host, GPU and that GPU's SMs."""
    return min(sms // ranks_on_gpu for (*_, sms), ranks_on_gpu in Counter(gpus).items())


def _agree(ranks: TorchGroup, problem: str | None) -> str | None:
    """The first rank's problem that has one."""
    return next((other for other in ranks.gather_objects(problem) if other is not None), None)
