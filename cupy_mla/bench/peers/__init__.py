"""The implementations that are timed beside this package: FlashMLA, FlashInfer, FlashAttention-3 and torch.

All take torch tensors. None is a dependency: whichever can be imported is used.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import InvalidArgumentError
from . import fa3, flash_mla, flashinfer, torch_sdpa
from .base import Peer, explain

__all__ = ["PEER_NAMES", "Peer", "add_peers_path", "available_peers"]

_LOADERS: dict[str, Callable[[], Peer]] = {
    flash_mla.FlashMlaPeer.name: flash_mla.load,
    flashinfer.FlashInferPeer.name: flashinfer.load,
    fa3.Fa3Peer.name: fa3.load,
    torch_sdpa.TorchPeer.name: torch_sdpa.load,
}
PEER_NAMES = tuple(_LOADERS)


def add_peers_path(folder: Path) -> None:
    """Look for peers in a folder first.

    Parameters
    ----------
    folder
        Packages as on ``sys.path``, or vLLM's loose FlashAttention-3 extension (``_vllm_fa3_C.abi3.so``, also packed
        as ``.so.xz``).

    Raises
    ------
    InvalidArgumentError
        It is not a folder.
    """
    if not os.path.isdir(folder):  # where it cannot be looked at, Path.is_dir raises
        raise InvalidArgumentError("peers_path", "a folder", str(folder))
    sys.path.insert(0, str(folder.resolve()))
    importlib.invalidate_caches()


def available_peers(names: Sequence[str] = PEER_NAMES) -> dict[str, Peer | str]:
    """The peers of these names, in their order.

    Returns
    -------
    peers
        By name: the peer, or the reason why it cannot be used here.

    Raises
    ------
    InvalidArgumentError
        A name that is no peer's.
    """
    for name in names:
        if name not in _LOADERS:
            raise InvalidArgumentError("peer", "one of " + ", ".join(PEER_NAMES), repr(name))
    missing = _why_no_torch()
    return {name: missing or _load(name) for name in names}


def _load(name: str) -> Peer | str:
    try:
        return _LOADERS[name]()
    except Exception as error:  # a peer that breaks on import is a peer that is not there
        return f"not importable: {error}" if isinstance(error, ImportError) else f"not importable: {explain(error)}"


def _why_no_torch() -> str | None:
    """Why no peer can run: all need torch and a GPU that it sees."""
    try:
        import torch
    except Exception as error:
        return f"needs torch: {explain(error)}"
    return None if torch.cuda.is_available() else "needs a CUDA device that torch sees"
