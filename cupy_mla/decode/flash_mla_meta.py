"""FlashMLA's scheduling metadata over our plans, for `cupy_mla.flash_mla`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ..arrays.exchange import as_numpy
from ..arrays.view import view
from ..errors import InvalidArgumentError, PlanMismatchError
from ..layouts import DENSE_LAYOUTS
from ..settings import get_settings
from .plan import DecodePlan
from .sparse_plan import SparsePlan

_Plan = TypeVar("_Plan", DecodePlan, SparsePlan)


@dataclass
class FlashMLASchedMeta:
    """Scheduling metadata: empty until its first call, which plans the batch on the device and keeps the plan here.

    One object serves all calls that have the same shapes and the same lengths, e.g. all layers of a step. For a step
    with other lengths, take a new one from `get_mla_metadata`. Calls that share one must follow one another on one
    stream, as they share the plan's workspace.

    Attributes
    ----------
    have_initialized
        Whether a call has filled it.
    config
        Shapes and settings that it belongs to; None before.
    tile_scheduler_metadata
        The plan (FlashMLA: a tensor); None before.
    num_splits
        Always None: the plan holds the splits too.
    """

    @dataclass
    class Config:
        """What has to be the same in every call, by FlashMLA's names."""

        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: int | None
        extra_page_block_size: int | None
        extra_topk: int | None
        enable_batch_invariant: bool = False

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: DecodePlan | SparsePlan | None = None
    num_splits: None = None
    # The lengths that were planned for, on the host; kept only where the settings ask for validation.
    _lengths: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)


def plan_of(
    meta: FlashMLASchedMeta | None, kind: type[_Plan], lengths: dict[str, Any], enable_batch_invariant: bool
) -> _Plan | None:
    """The plan of filled metadata; None of empty metadata, or none. ``lengths`` by their names, None for those that are
    not there.

    Raises
    ------
    PlanMismatchError
        It is a plan of the other kind, or batch-invariant where the call is not or not where it is, or settings ask for
        validation and the lengths are others.
    """
    if meta is None or not meta.have_initialized:
        return None
    plan = meta.tile_scheduler_metadata
    if not isinstance(plan, kind):
        raise PlanMismatchError("plan", f"metadata that holds a {kind.__name__}", f"a {type(plan).__name__}")
    if meta.config is not None and meta.config.enable_batch_invariant != enable_batch_invariant:
        expected = f"{meta.config.enable_batch_invariant}, as in the call that filled tile_scheduler_metadata"
        raise PlanMismatchError("enable_batch_invariant", expected, str(enable_batch_invariant))
    for name, planned in meta._lengths.items():
        if lengths.get(name) is not None:
            _check_lengths(name, lengths[name], planned)
    return plan


def meta_of(metadata: Any, num_splits: Any) -> FlashMLASchedMeta | None:
    """The metadata object of a call, or None for one with the tensors of an older FlashMLA.

    Raises
    ------
    InvalidArgumentError
        There is neither, or ``num_splits`` does not belong to it.
    """
    if isinstance(metadata, FlashMLASchedMeta):
        if num_splits is not None:
            raise InvalidArgumentError(
                "num_splits", "None, as tile_scheduler_metadata is a FlashMLASchedMeta", type(num_splits).__name__
            )
        return metadata
    # How the tensors cut the batch suits FlashMLA's kernel, and they do not tell the lengths.
    for name, tensor in (("tile_scheduler_metadata", metadata), ("num_splits", num_splits)):
        if not hasattr(tensor, "__dlpack__"):
            expected = "a FlashMLASchedMeta from get_mla_metadata, or two metadata tensors of an older FlashMLA"
            raise InvalidArgumentError(name, expected, type(tensor).__name__)
    return None


def fill(
    meta: FlashMLASchedMeta,
    plan: DecodePlan | SparsePlan,
    page_size: int,
    lengths: dict[str, Any],
    enable_batch_invariant: bool,
    extra_page_size: int | None = None,
) -> None:
    """Keep a plan in empty metadata."""
    problem = plan.problem
    meta.config = FlashMLASchedMeta.Config(
        b=problem.queries.batch,
        s_q=problem.queries.seqlen_q,
        h_q=problem.queries.num_heads_q,
        page_block_size=page_size,
        h_k=problem.queries.num_heads_kv,
        causal=problem.queries.causal,
        is_fp8_kvcache=problem.layout not in DENSE_LAYOUTS.values(),
        topk=None if isinstance(plan, DecodePlan) else plan.problem.keys.topk,
        extra_page_block_size=extra_page_size,
        extra_topk=None if isinstance(plan, DecodePlan) else plan.problem.keys.extra_topk,
        enable_batch_invariant=enable_batch_invariant,
    )
    meta.tile_scheduler_metadata = plan
    if get_settings().validate:
        given = {name: array for name, array in lengths.items() if array is not None}
        meta._lengths = {name: as_numpy(array).copy() for name, array in given.items()}
    meta.have_initialized = True


def _check_lengths(name: str, lengths: Any, planned: np.ndarray) -> None:
    given = as_numpy(view(lengths, name)).reshape(-1)
    planned = planned.reshape(-1)
    if given.shape != planned.shape:
        return  # the function that attends says so
    changed = np.flatnonzero(given != planned)
    if changed.size:
        request = int(changed[0])
        raise PlanMismatchError(
            f"{name}[{request}]",
            f"{planned[request]}, as in the call that filled tile_scheduler_metadata",
            f"{given[request]}",
        )
