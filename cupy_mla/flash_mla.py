"""FlashMLA's functions over ours, name by name: ``import cupy_mla.flash_mla as flash_mla`` is the whole migration.

The interface is the one of FlashMLA with dense and sparse decoding and sparse prefill
(https://github.com/deepseek-ai/FlashMLA), with what vLLM's and SGLang's copies have besides: e4m3 caches in dense
decoding. Scheduling metadata is an object that is filled by the first call that uses it. What differs: arrays may come
from any framework, more page sizes and widths are taken, errors are this package's, and what this package does not have
raises `MissingFeatureError`, a NotImplementedError.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

from .call.options import AUTO, FP8
from .decode.flash_mla_dense import check_copies_arguments, decode_dense, fold_descale, is_e4m3, widen_queries
from .decode.flash_mla_meta import FlashMLASchedMeta, meta_of
from .decode.flash_mla_sparse import decode_sparse
from .decode.prefill import mla_sparse_prefill
from .errors import InvalidArgumentError, MlaError
from .torch_compile import teach

__all__ = [
    "FlashMLASchedMeta",
    "MissingFeatureError",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "flash_mla_with_kvcache_fp8",
    "get_mla_decoding_metadata",
    "get_mla_metadata",
    "get_mla_metadata_dense_fp8",
]

# What FlashMLA calls the arguments that have another name here.
_FLASH_MLA_NAMES = {
    "kv_cache": "k_cache",
    "kv_scale": "descale_k",
    "layout": "k_cache",
    "plan": "tile_scheduler_metadata",
    "extra_kv_cache": "extra_k_cache",
    "extra_layout": "extra_k_cache",
    "extra_indices": "extra_indices_in_kvcache",
}
_PREFILL_NAMES = {"softmax_scale": "sm_scale", "head_dim_v": "d_v"}
_LOG2_E = math.log2(math.e)
_MULTI_HEAD = "multi-head attention for prefill and training"
# Arguments of flash_mla_with_kvcache that ask for what is not there without indices, and what that is.
_MISSING_FEATURES = {
    "attn_sink": "attention sinks in dense attention",
    "extra_k_cache": "a second cache in dense attention",
    "extra_indices_in_kvcache": "indices of a second cache without indices",
    "topk_length": "lengths of indices without indices",
    "extra_topk_length": "lengths of indices of a second cache without indices",
}


class MissingFeatureError(MlaError, NotImplementedError):
    """A call asks for a part of FlashMLA that this package does not have; the message names it."""


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


def get_mla_decoding_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """`get_mla_metadata` as SGLang's copy has it; the first may also become the metadata of a FlashMLASchedMeta."""
    return get_mla_metadata()


def get_mla_metadata_dense_fp8(
    cache_seqlens: Any, num_q_tokens_per_head_k: Any, num_heads_k: Any
) -> tuple[FlashMLASchedMeta, None]:
    """`get_mla_metadata` for `flash_mla_with_kvcache_fp8`, as vLLM has it; the arguments are not used."""
    return get_mla_metadata()


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
    enable_batch_invariant: bool = False,
    use_legacy: bool = False,
    kv_format: str | None = None,
    descale_q: Any = None,
    descale_k: Any = None,
    *,
    cp_world: int = 1,
    cp_rank: int = 0,
    cp_interleave: int = 1,
    total_seqlens: Any = None,
) -> tuple[Any, Any]:
    """Decode over a paged latent cache, called as in FlashMLA.

    Parameters
    ----------
    q
        [batch, seqlen_q, num_heads_q, head_dim] bfloat16 or float16, of any framework; beside an e4m3 cache in dense
        attention bfloat16 or float8_e4m3fn. The latter are multiplied by FP8 tensor cores.
    k_cache
        [num_pages, page_size, num_heads_k, head_dim] of q's type. Any page size that `cupy_mla.mla_decode` takes. With
        ``is_fp8_kvcache`` bytes, [num_pages, page_size, 1, bytes of a token], e.g. 656 of DeepSeek V3.2, in sparse
        attention; in dense attention [num_pages, page_size, 1, head_dim] float8_e4m3fn.
    block_table
        [batch, max_pages_per_seq] int32; not looked at in sparse attention, as the next.
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
        Query i of s_q sees keys up to ``cache_seqlen - s_q + i`` only; of dense attention.
    indices, attn_sink, topk_length
        Sparse attention, as in `cupy_mla.mla_sparse_decode`; the last two only together with the first.
    is_fp8_kvcache
        Whether the cache is one of FP8; of two caches, both are.
    extra_k_cache, extra_indices_in_kvcache, extra_topk_length
        A second cache of sparse attention, as the extra_kv_cache, extra_indices and extra_topk_length of
        `cupy_mla.mla_sparse_decode`.
    out
        Array to write to, of the shape and type returned; None: a new one of q's framework.
    enable_batch_invariant
        Whether a request gives the same bits in any batch. Work is then cut after every 4096 tokens and nowhere else.
    use_legacy
        Not used: in SGLang's copy it chooses between two builds.
    kv_format
        None: what a cache holds is found from its type and width.
    descale_q, descale_k
        Of dense attention to an e4m3 cache: what q and the stored keys and values are multiplied by. One
        float32 in an array, or a number; None: 1. ``descale_q`` goes into the factor on the scores, so in an array it
        is read back, which waits for the device.
    cp_world, cp_rank, cp_interleave, total_seqlens
        Of attention to a shard of a cache, as in `cupy_mla.mla_decode`; in sparse attention only the first counts, as
        in `cupy_mla.mla_sparse_decode`. FlashMLA does not have them.

    Returns
    -------
    out
        [batch, seqlen_q, num_heads_q, head_dim_v] of q's type; bfloat16 for e4m3 queries.
    lse
        [batch, num_heads_q, seqlen_q] float32, natural logarithm. A query with no visible key gives out = 0 and
        lse = +inf, as in FlashMLA (`cupy_mla.mla_decode` returns -inf there; `merge_states` takes both).

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
    sparse = indices is not None
    of_sparse = (attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length)
    if not sparse and any(array is not None for array in of_sparse):
        _refuse_features(of_sparse)
    check_copies_arguments(enable_batch_invariant, kv_format, descale_q, descale_k, is_fp8_kvcache and not sparse)
    meta = meta_of(tile_scheduler_metadata, num_splits)
    if sparse:
        if causal:
            raise InvalidArgumentError("causal", "False in sparse attention", "True")
        try:
            return decode_sparse(
                (q, k_cache, indices, *of_sparse),
                meta,
                head_dim_v=head_dim_v,
                softmax_scale=softmax_scale,
                out=out,
                is_fp8=is_fp8_kvcache,
                cp_world=cp_world,
                enable_batch_invariant=enable_batch_invariant,
            )
        except InvalidArgumentError as error:
            raise _in_words_of_flash_mla(error, _FLASH_MLA_NAMES) from error
    for name, array in (("block_table", block_table), ("cache_seqlens", cache_seqlens)):
        if array is None:
            raise InvalidArgumentError(name, "an array (only sparse attention goes without)", "None")
    kv_scale, compute = None, AUTO
    try:
        if is_fp8_kvcache:
            if is_e4m3(q, "q"):
                q, compute = widen_queries(q), FP8
            if not is_e4m3(k_cache, "k_cache"):
                raise InvalidArgumentError("is_fp8_kvcache", "False: k_cache is not of float8_e4m3fn", "True")
            kv_scale = 1.0 if descale_k is None else descale_k
            softmax_scale = fold_descale(descale_q, q, softmax_scale)
        return decode_dense(
            (q, k_cache, block_table, cache_seqlens),
            meta,
            head_dim_v=head_dim_v,
            softmax_scale=softmax_scale,
            causal=causal,
            out=out,
            kv_scale=kv_scale,
            compute=compute,
            sharding={
                "cp_world": cp_world,
                "cp_rank": cp_rank,
                "cp_interleave": cp_interleave,
                "total_seqlens": total_seqlens,
            },
            enable_batch_invariant=enable_batch_invariant,
        )
    except InvalidArgumentError as error:
        raise _in_words_of_flash_mla(error, _FLASH_MLA_NAMES) from error


def flash_mla_with_kvcache_fp8(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: int,
    tile_scheduler_metadata: Any,
    num_splits: Any,
    softmax_scale: float | None = None,
    causal: bool = False,
    descale_q: Any = None,
    descale_k: Any = None,
) -> tuple[Any, Any]:
    """Dense decode over an e4m3 cache, called as in vLLM: `flash_mla_with_kvcache` with ``is_fp8_kvcache``.

    Queries are of e4m3, as vLLM's kernel wants them, or of bfloat16.
    """
    return flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits,
        softmax_scale,
        causal,
        is_fp8_kvcache=True,
        descale_q=descale_q,
        descale_k=descale_k,
    )


def flash_mla_sparse_fwd(
    q: Any,
    kv: Any,
    indices: Any,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Any = None,
    topk_length: Any = None,
    out: Any = None,
    return_log2_lse: bool = False,
) -> tuple[Any, Any, Any]:
    """Sparse attention for prefill, called as in FlashMLA.

    Parameters
    ----------
    q
        [s_q, num_heads_q, d_qk] bfloat16 or float16, of any framework.
    kv
        [s_kv, num_heads_kv, d_qk] of q's type.
    indices
        [s_q, num_heads_kv, topk] int32; -1 and every other number outside of ``kv`` name no token. Any topk.
    sm_scale
        Factor on the scores.
    d_v
        Width of the value: the first ``d_v`` columns of a key.
    attn_sink, topk_length
        As in `cupy_mla.mla_sparse_prefill`.
    out
        Array to write to, of the shape and type returned; None: a new one of q's framework.
    return_log2_lse
        Whether lse is a logarithm to base 2.

    Returns
    -------
    out
        [s_q, num_heads_q, d_v] of q's type.
    max_logits
        [s_q, num_heads_q] float32: the largest scaled score; -inf for a query token without a token.
    lse
        [s_q, num_heads_q] float32, natural logarithm; +inf for a query token without a token, as in FlashMLA.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value; ``argument`` is FlashMLA's name.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    try:
        result, max_logits, lse = mla_sparse_prefill(
            q,
            kv,
            indices,
            softmax_scale=sm_scale,
            head_dim_v=d_v,
            attn_sink=attn_sink,
            topk_length=topk_length,
            out=out,
            empty_lse=math.inf,
        )
    except InvalidArgumentError as error:
        raise _in_words_of_flash_mla(error, _PREFILL_NAMES) from error
    return result, max_logits, lse * _LOG2_E if return_log2_lse else lse


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


def _in_words_of_flash_mla(error: InvalidArgumentError, names: dict[str, str]) -> InvalidArgumentError:
    """The same error under the argument's name in FlashMLA."""
    name, bracket, index = error.argument.partition("[")
    return type(error)(names.get(name, name) + bracket + index, error.expected, error.got)


teach(get_mla_metadata, flash_mla_with_kvcache, flash_mla_sparse_fwd)
