"""FlashMLA's functions over ours, name by name: ``import cupy_mla.flash_mla as flash_mla`` is the whole migration.

The interface is the one of FlashMLA with dense decoding (https://github.com/deepseek-ai/FlashMLA): scheduling metadata
is an object that is filled by the first call that uses it. What differs: arrays may come from any framework, more page
sizes and widths are taken, errors are this package's, and what this package does not have raises `MissingFeatureError`,
a NotImplementedError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from .arrays.exchange import as_numpy
from .arrays.view import view
from .decode.dense import mla_decode, plan_decode
from .decode.plan import DecodePlan
from .errors import InvalidArgumentError, MlaError, PlanMismatchError
from .settings import get_settings

__all__ = [
    "FlashMLASchedMeta",
    "MissingFeatureError",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]

# What FlashMLA calls the arguments that have another name here.
_FLASH_MLA_NAMES = {"kv_cache": "k_cache", "plan": "tile_scheduler_metadata"}
_MULTI_HEAD = "multi-head attention for prefill and training"
# Arguments of flash_mla_with_kvcache that ask for what is not there, and what that is.
_MISSING_FEATURES = {
    "is_fp8_kvcache": "FP8 caches",
    "indices": "sparse attention",
    "attn_sink": "attention sinks",
    "extra_k_cache": "a second cache",
    "extra_indices_in_kvcache": "sparse attention to a second cache",
    "topk_length": "sparse attention with lengths",
    "extra_topk_length": "sparse attention to a second cache with lengths",
}


class MissingFeatureError(MlaError, NotImplementedError):
    """A call asks for a part of FlashMLA that this package does not have; the message names it."""


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

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: DecodePlan | None = None
    num_splits: None = None
    # The lengths that were planned for, on the host; kept only where the settings ask for validation.
    _lengths: np.ndarray | None = field(default=None, init=False, repr=False, compare=False)


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """Scheduling metadata for `flash_mla_with_kvcache`.

    Parameters
    ----------
    *args, **kwargs
        Not used: older versions of FlashMLA were given the lengths and the number of heads here. What is needed is
        taken from the first call that uses the metadata.

    Returns
    -------
    FlashMLASchedMeta
        An empty one.
    None
        What used to be ``num_splits``; pass it on, or not.
    """
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: int,
    tile_scheduler_metadata: Any,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Any = None,
    attn_sink: Any = None,
    extra_k_cache: Any = None,
    extra_indices_in_kvcache: Any = None,
    topk_length: Any = None,
    extra_topk_length: Any = None,
    out: Any = None,
) -> tuple[Any, Any]:
    """Decode over a paged latent cache, called as in FlashMLA.

    Parameters
    ----------
    q
        [batch, seqlen_q, num_heads_q, head_dim] bfloat16 or float16, of any framework.
    k_cache
        [num_pages, page_size, num_heads_k, head_dim] of q's type. Any page size that `cupy_mla.mla_decode` takes.
    block_table
        [batch, max_pages_per_seq] int32.
    cache_seqlens
        [batch] int32: tokens of each request.
    head_dim_v
        Width of the latent part of a key, which is the value: the first ``head_dim_v`` columns.
    tile_scheduler_metadata
        What `get_mla_metadata` returned first. The first call plans and fills it, later ones use the plan as it is:
        their shapes, settings and lengths have to be the same. The lengths are compared only where CUPY_MLA_VALIDATE is
        set, as that waits for the device. A metadata tensor of an older FlashMLA is taken too, but not read: each such
        call plans by itself.
    num_splits
        What `get_mla_metadata` returned second: None, or a tensor beside a metadata tensor.
    softmax_scale
        Factor on the scores; None: ``head_dim ** -0.5``.
    causal
        Query i of s_q sees keys up to ``cache_seqlen - s_q + i`` only.
    is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length
        FP8 caches and sparse attention: not there yet, refused unless left out.
    out
        Array to write to, of the shape and type returned; None: a new one of q's framework.

    Returns
    -------
    out
        [batch, seqlen_q, num_heads_q, head_dim_v] of q's type.
    lse
        [batch, num_heads_q, seqlen_q] float32, natural logarithm. A query with no visible key gives out = 0 and
        lse = +inf, as in FlashMLA (`cupy_mla.mla_decode` returns -inf there, which merges).

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value; ``argument`` is FlashMLA's name.
    PlanMismatchError
        The metadata belongs to calls with other shapes, settings or lengths.
    MissingFeatureError
        An argument asks for what is not there yet.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    features = (indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length)
    if is_fp8_kvcache or any(feature is not None for feature in features):
        _refuse_features((is_fp8_kvcache or None, *features))
    for name, array in (("block_table", block_table), ("cache_seqlens", cache_seqlens)):
        if array is None:
            raise InvalidArgumentError(name, "an array (only sparse attention goes without)", "None")
    meta = _meta_of(tile_scheduler_metadata, num_splits)
    try:
        if meta is None:
            plan = None
        elif meta.have_initialized:
            plan = meta.tile_scheduler_metadata
            if meta._lengths is not None:
                _check_lengths(cache_seqlens, meta._lengths)
        else:
            plan = plan_decode(q, k_cache, block_table, cache_seqlens, head_dim_v=head_dim_v, causal=causal)
        result, lse = mla_decode(
            q,
            k_cache,
            block_table,
            cache_seqlens,
            head_dim_v=head_dim_v,
            softmax_scale=softmax_scale,
            causal=causal,
            plan=plan,
            out=out,
            empty_lse=math.inf,
        )
    except InvalidArgumentError as error:
        name, bracket, index = error.argument.partition("[")
        if name not in _FLASH_MLA_NAMES:
            raise
        raise type(error)(_FLASH_MLA_NAMES[name] + bracket + index, error.expected, error.got) from error
    if meta is not None and plan is not None and not meta.have_initialized:
        _fill(meta, plan, cache_seqlens)  # only now: a call that was refused leaves it empty
    return result, lse


def flash_mla_sparse_fwd(
    q: Any,
    kv: Any,
    indices: Any,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Any = None,
    topk_length: Any = None,
    out: Any = None,
) -> tuple[Any, Any, Any]:
    """Sparse attention for prefill: not there yet, always raises MissingFeatureError."""
    _refuse("flash_mla_sparse_fwd", "sparse prefill")


def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> NoReturn:
    """Multi-head attention, which FlashMLA has for Blackwell GPUs: not there, always raises MissingFeatureError."""
    _refuse("flash_attn_varlen_func", _MULTI_HEAD)


def flash_attn_varlen_qkvpacked_func(*args: Any, **kwargs: Any) -> NoReturn:
    """`flash_attn_varlen_func` on one packed array: not there, always raises MissingFeatureError."""
    _refuse("flash_attn_varlen_qkvpacked_func", _MULTI_HEAD)


def flash_attn_varlen_kvpacked_func(*args: Any, **kwargs: Any) -> NoReturn:
    """`flash_attn_varlen_func` on packed keys and values: not there, always raises MissingFeatureError."""
    _refuse("flash_attn_varlen_kvpacked_func", _MULTI_HEAD)


def _refuse(function: str, feature: str) -> NoReturn:
    raise MissingFeatureError(f"{function}: cupy_mla does not have {feature} yet")


def _refuse_features(values: tuple[Any, ...]) -> NoReturn:
    """Name every argument of flash_mla_with_kvcache that asks for something missing; in the order of the table."""
    asked = [
        f"{feature} ({name})"
        for (name, feature), value in zip(_MISSING_FEATURES.items(), values, strict=True)
        if value is not None
    ]
    _refuse("flash_mla_with_kvcache", ", ".join(asked))


def _meta_of(metadata: Any, num_splits: Any) -> FlashMLASchedMeta | None:
    """The metadata object of a call, or None for one with the tensors of an older FlashMLA."""
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


def _fill(meta: FlashMLASchedMeta, plan: DecodePlan, cache_seqlens: Any) -> None:
    problem = plan.problem
    meta.config = FlashMLASchedMeta.Config(
        b=problem.queries.batch,
        s_q=problem.queries.seqlen_q,
        h_q=problem.queries.num_heads_q,
        page_block_size=problem.keys.page_size,
        h_k=problem.queries.num_heads_kv,
        causal=problem.queries.causal,
        is_fp8_kvcache=False,
        topk=None,
        extra_page_block_size=None,
        extra_topk=None,
    )
    meta.tile_scheduler_metadata = plan
    if get_settings().validate:
        meta._lengths = as_numpy(cache_seqlens).copy()
    meta.have_initialized = True


def _check_lengths(cache_seqlens: Any, planned: np.ndarray) -> None:
    lengths = as_numpy(view(cache_seqlens, "cache_seqlens"))
    if lengths.shape != planned.shape:
        return  # mla_decode says so
    changed = np.flatnonzero(lengths != planned)
    if changed.size:
        request = int(changed[0])
        raise PlanMismatchError(
            f"cache_seqlens[{request}]",
            f"{planned[request]}, as in the call that filled tile_scheduler_metadata",
            f"{lengths[request]}",
        )
