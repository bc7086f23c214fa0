"""Dense decoding as FlashMLA and its copies in vLLM and SGLang call it, for `cupy_mla.flash_mla`."""

from __future__ import annotations

import math
from typing import Any

from ..arrays.dtypes import numpy_dtype
from ..arrays.exchange import as_numpy
from ..arrays.frameworks import framework_of
from ..arrays.view import view
from ..call.arguments import as_boolean, as_number
from ..errors import InvalidArgumentError
from .dense import mla_decode, plan_decode
from .flash_mla_meta import FlashMLASchedMeta, fill, plan_of
from .plan import DecodePlan

# Where batch-invariant requests are cut, whatever the batch. FlashMLA does not cut them at all, which leaves a long one
# to a single CTA for each 64 rows.
INVARIANT_SPLIT_TOKENS = 4096
_E4M3 = "float8_e4m3fn"


def decode_dense(
    arrays: tuple[Any, Any, Any, Any],
    meta: FlashMLASchedMeta | None,
    *,
    head_dim_v: int,
    softmax_scale: float | None,
    causal: bool,
    out: Any,
    kv_scale: Any,
    compute: str,
    sharding: dict[str, Any],
    enable_batch_invariant: bool,
) -> tuple[Any, Any]:
    """`mla_decode` with the plan of metadata, which a first call fills.

    Parameters
    ----------
    arrays
        q, k_cache, block_table and cache_seqlens.
    meta
        From `meta_of`.
    head_dim_v, softmax_scale, causal, out, kv_scale, compute
        As in `mla_decode`.
    sharding
        cp_world, cp_rank, cp_interleave and total_seqlens of `mla_decode`.
    enable_batch_invariant
        Whether the plan cuts requests the same way in any batch.

    Raises
    ------
    InvalidArgumentError
        A wrong argument; ``argument`` is the name that `mla_decode` has for it.
    PlanMismatchError
        The metadata belongs to calls with other shapes, settings or lengths.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    lengths = {"cache_seqlens": arrays[-1]}
    plan = plan_of(meta, DecodePlan, lengths, enable_batch_invariant)
    if plan is None and (meta is not None or enable_batch_invariant):
        split = INVARIANT_SPLIT_TOKENS if enable_batch_invariant else None
        options = {"head_dim_v": head_dim_v, "causal": causal, "kv_scale": kv_scale, "compute": compute} | sharding
        plan = plan_decode(*arrays, **options, fixed_split_tokens=split)
    result, lse = mla_decode(
        *arrays,
        head_dim_v=head_dim_v,
        softmax_scale=softmax_scale,
        causal=causal,
        kv_scale=kv_scale,
        compute=compute,
        plan=plan,
        out=out,
        empty_lse=math.inf,
        **sharding,
    )
    if meta is not None and plan is not None and not meta.have_initialized:  # a call that was refused leaves it empty
        fill(meta, plan, plan.problem.keys.page_size, lengths, enable_batch_invariant)
    return result, lse


def check_copies_arguments(
    enable_batch_invariant: Any, kv_format: Any, descale_q: Any, descale_k: Any, is_dense_fp8: bool
) -> None:
    """Refuse what SGLang's and vLLM's copies of FlashMLA take for other caches.

    Raises
    ------
    InvalidArgumentError
        A flag that is no truth value, a format, or scales of a call that is not dense decoding over an e4m3 cache.
    """
    as_boolean(enable_batch_invariant, "enable_batch_invariant")
    if kv_format is not None:
        raise InvalidArgumentError("kv_format", "None: the cache itself says what it is", repr(kv_format))
    if is_dense_fp8:
        return
    for name, value in (("descale_q", descale_q), ("descale_k", descale_k)):
        if value is not None:
            raise InvalidArgumentError(name, "None but in dense attention to an e4m3 cache", type(value).__name__)


def is_e4m3(array: Any, name: str) -> bool:
    """Whether an array, which errors call ``name``, is of the type that FlashMLA wants of queries and of caches."""
    return view(array, name).dtype == _E4M3


def widen_queries(q: Any) -> Any:
    """e4m3 queries as bfloat16, which holds them, in their framework and on its current stream. With ``compute="fp8"``
    they are multiplied as they came."""
    if framework_of(q, "q") == "torch":
        import torch

        return q.to(torch.bfloat16)
    return q.astype(numpy_dtype("bfloat16"))


def fold_descale(descale_q: Any, q: Any, softmax_scale: float | None) -> float | None:
    """The softmax scale with what queries are to be multiplied by.

    Parameters
    ----------
    descale_q
        A number; one float32 in an array, which is read back (waits for the device); or None.
    q
        [..., head_dim].
    softmax_scale
        Factor on the scores; None: ``head_dim ** -0.5``.

    Raises
    ------
    InvalidArgumentError
        ``descale_q`` is neither a number nor an array of one.
    """
    if descale_q is None:
        return softmax_scale
    if hasattr(descale_q, "__dlpack__"):
        values = as_numpy(view(descale_q, "descale_q")).reshape(-1)
        if values.size != 1:
            raise InvalidArgumentError("descale_q", "a number, or an array of one", f"{values.size} numbers")
        descale_q = float(values[0])
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return float(scale * as_number(descale_q, "descale_q"))
