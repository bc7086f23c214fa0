"""What every peer offers the benchmark, and what several of them need."""

from __future__ import annotations

import importlib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Collection
from types import ModuleType
from typing import Any

from ...layouts import DENSE_LAYOUTS, CacheLayout
from ..grid import BenchCase
from ..inputs import Call, Inputs

UNKNOWN_VERSION = "unknown"


class Peer(ABC):
    """Another implementation of the same decode.

    Attributes
    ----------
    name
        What the command line calls it.
    version
        Of the package that it was imported from; ``"unknown"`` if that does not say.
    """

    name: str

    def __init__(self, version: str) -> None:
        self.version = version

    @abstractmethod
    def unsupported(self, case: BenchCase) -> str | None:
        """Why this peer cannot run a case; None when it can, as far as is known before it is tried."""

    @abstractmethod
    def prepare(self, inputs: Inputs) -> Call:
        """Plan a case, and bring q into the form that the peer takes.

        Parameters
        ----------
        inputs
            Torch tensors of a case that `unsupported` does not refuse.

        Returns
        -------
        call
            From one of ``inputs.caches`` to ``(out, lse)``: out [batch, seqlen_q, h, latent_dim] of q's type (ragged:
            [total_q, h, latent_dim]), lse [batch, h, seqlen_q] float32, natural logarithm (ragged: [h, total_q]), or
            None where the peer gives none. It runs on torch's current stream and does not wait for the host. It may
            allocate from torch's allocator: capture it with ``torch.cuda.graph``, after one call outside. A later
            call may overwrite the results of an earlier one.

        Raises
        ------
        Exception
            Whatever the peer raises where it refuses the case after all.
        """


def beyond(
    case: BenchCase, function: str, layouts: Collection[CacheLayout] = tuple(DENSE_LAYOUTS.values())
) -> str | None:
    """Why a peer cannot run a case that offers one function only, over caches of these layouts; None when it is of
    these.
    """
    if case.function != function:
        return f"{case.function}: only {function}"
    if case.extra_topk is not None or case.attn_sink:
        return "a second cache or attention sinks"
    if case.spec.cache_layout not in layouts:
        return f"layout {case.layout}: only {' and '.join(layout.name for layout in layouts)}"
    return None


def import_first(*names: str) -> ModuleType:
    """The first of these modules that can be imported.

    Raises
    ------
    ImportError
        None can; says why, for each.
    """
    reasons = []
    for name in names:
        try:
            return importlib.import_module(name)
        except Exception as error:  # a binary for another torch raises what it likes
            reasons.append(f"{name}: {explain(error)}")
    raise ImportError("; ".join(reasons))


def explain(error: BaseException) -> str:
    """The kind of an exception and the first line of its text, for a table."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def installed_version(*distributions: str) -> str:
    """Version of the first of these distributions that is installed, else ``"unknown"``."""
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return UNKNOWN_VERSION


def cache_parts(case: BenchCase, cache: Any) -> tuple[Any, Any]:
    """Latent and rope part of a cache, [num_pages, page_size, 1, width] each; views, no copies."""
    if isinstance(cache, tuple):
        return cache
    return cache[..., : case.latent_dim], cache[..., case.latent_dim :]


def query_parts(inputs: Inputs) -> tuple[Any, Any]:
    """Latent and rope part of q, [total_q, h, width] each, contiguous."""
    flat = inputs.q.reshape(-1, *inputs.q.shape[-2:])
    width = inputs.case.latent_dim
    return flat[..., :width].contiguous(), flat[..., width:].contiguous()


def query_starts(inputs: Inputs) -> Any:
    """[batch + 1] int32 on q's device: where the query tokens of each request begin among all."""
    import torch

    return torch.tensor(inputs.spec.q_starts, dtype=torch.int32, device=inputs.q.device)


def as_promised(case: BenchCase, out: Any, lse: Any) -> tuple[Any, Any]:
    """Views of out [total_q, h, latent_dim] and lse [h, total_q] in the shapes that `Peer.prepare` promises."""
    if case.ragged is not None:
        return out, lse
    rows = (case.batch, case.seqlen_q)
    return out.view(*rows, *out.shape[1:]), lse.unflatten(1, rows).transpose(0, 1)
