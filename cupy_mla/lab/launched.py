"""The processes that torchrun started together, for commands that run in all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .libraries import TorchLibrary


@contextmanager
def launched_group(backend: str) -> Iterator[Any]:
    """The process group of the processes that torchrun started, of which this is one; None if it is not.

    Parameters
    ----------
    backend
        ``"cuda"``: a GPU each, and NCCL; ``"numpy"``: gloo.
    """
    try:
        import torch
        from torch import distributed
    except ImportError:
        yield None
        return
    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield None
        return
    if backend == "cuda":
        device = torch.device("cuda", distributed.get_node_local_rank())
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", device_id=device)
    else:
        distributed.init_process_group("gloo")
    try:
        yield distributed.group.WORLD
    finally:
        distributed.destroy_process_group()


def library_of(backend: str) -> TorchLibrary:
    """What such a process makes arrays with."""
    return TorchLibrary("cuda" if backend == "cuda" else "cpu")
