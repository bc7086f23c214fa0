"""Sparse decoding as FlashMLA calls it, for `cupy_mla.flash_mla`."""

from __future__ import annotations

import math
from typing import Any

from ..errors import InvalidArgumentError
from ..layouts import DENSE_LAYOUTS
from .flash_mla_dense import INVARIANT_SPLIT_TOKENS
from .flash_mla_meta import FlashMLASchedMeta, fill, plan_of
from .sparse import mla_sparse_decode, plan_sparse_decode
from .sparse_plan import SparsePlan


def decode_sparse(
    arrays: tuple[Any, ...],
    meta: FlashMLASchedMeta | None,
    *,
    head_dim_v: int,
    softmax_scale: float | None,
    out: Any,
    is_fp8: bool,
    cp_world: int,
    enable_batch_invariant: bool,
) -> tuple[Any, Any]:
    """`mla_sparse_decode` with the plan of metadata, which a first call fills.

    Parameters
    ----------
    arrays
        q, k_cache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length and extra_topk_length.
    meta
        From `meta_of`.
    head_dim_v, softmax_scale, out
        As in `mla_sparse_decode`.
    is_fp8
        Whether the caches are said to be of FP8.
    cp_world
        As in `mla_sparse_decode`.
    enable_batch_invariant
        Whether the plan cuts requests the same way in any batch.

    Raises
    ------
    InvalidArgumentError
        A wrong argument; ``argument`` is the name that `mla_sparse_decode` has for it, or ``is_fp8_kvcache``.
    PlanMismatchError
        The metadata belongs to calls with other shapes, settings or lengths.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    q, k_cache, indices, attn_sink, extra_k_cache, extra_indices, topk_length, extra_topk_length = arrays
    lengths = {"topk_length": topk_length, "extra_topk_length": extra_topk_length}
    shared: dict[str, Any] = {
        **lengths,
        "extra_kv_cache": extra_k_cache,
        "extra_indices": extra_indices,
        "head_dim_v": head_dim_v,
        "cp_world": cp_world,
    }
    plan = plan_of(meta, SparsePlan, lengths, enable_batch_invariant)
    if plan is None:
        split = INVARIANT_SPLIT_TOKENS if enable_batch_invariant else None
        plan = plan_sparse_decode(q, k_cache, indices, **shared, fixed_split_tokens=split)
    layout = plan.problem.layout
    if is_fp8 == (layout in DENSE_LAYOUTS.values()):
        raise InvalidArgumentError("is_fp8_kvcache", f"{not is_fp8} for a cache of {layout.name}", str(is_fp8))
    result, lse = mla_sparse_decode(
        q,
        k_cache,
        indices,
        attn_sink=attn_sink,
        softmax_scale=softmax_scale,
        plan=plan,
        out=out,
        empty_lse=math.inf,
        **shared,
    )
    if meta is not None and not meta.have_initialized:
        extra_page_size = None if extra_k_cache is None else extra_k_cache.shape[1]
        fill(meta, plan, k_cache.shape[1], lengths, enable_batch_invariant, extra_page_size)
    return result, lse
