"""What programs that torch.compile traces do where they call this package's functions.

torch.compile traces the Python of what a program calls. Ours reads addresses, which traced tensors do not have. So each
function has a stand-in that is traced in its place (``_torchdynamo_inline``, which torch's own wrappers use too). It
puts an operator of `cupy_mla.torch_ops` into the program, or, where an argument is nothing that an operator takes (a
plan object, a stream, one output without the other), ends the graph, and the function runs as it is. Calls of a program
that is not compiled do not come by here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

_TRACED_INSTEAD = "_torchdynamo_inline"
_LOG2_E = math.log2(math.e)
_TAUGHT: dict[str, Callable[..., Any]] = {}  # the functions themselves


def teach(*functions: Callable[..., Any]) -> None:
    """Have programs that torch.compile traces call the stand-ins of these functions, if they have one."""
    for function in functions:
        stand_in = _STAND_INS.get(getattr(function, "__name__", ""))
        if stand_in is not None:
            _TAUGHT[function.__name__] = function
            setattr(function, _TRACED_INSTEAD, stand_in)


def _pair(array: Any) -> tuple[Any, Any]:
    return (array[0], array[1]) if isinstance(array, (tuple, list)) else (array, None)


def _mla_decode(
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    *,
    plan: Any = None,
    out: Any = None,
    lse: Any = None,
    kv_scale: Any = None,
    stream: int | None = None,
    **options: Any,
) -> Any:
    import torch

    from . import torch_rules

    by_operator = plan is None and stream is None and (out is None) == (lse is None)
    if not by_operator or not (kv_scale is None or isinstance(kv_scale, torch.Tensor)):
        outputs = {"out": out, "lse": lse, "plan": plan, "kv_scale": kv_scale, "stream": stream}
        arguments = q, kv_cache, block_table, cache_seqlens
        return torch_rules.as_it_is(_TAUGHT["mla_decode"], *arguments, **outputs, **options)
    (latent, q_rope), (cache, kv_rope) = _pair(q), _pair(kv_cache)
    arrays = {"q_rope": q_rope, "kv_rope": kv_rope, "kv_scale": kv_scale}
    if out is None:
        return torch.ops.cupy_mla.mla_decode(latent, cache, block_table, cache_seqlens, **arrays, **options)
    torch.ops.cupy_mla.mla_decode_out(latent, cache, block_table, cache_seqlens, **arrays, **options, out=out, lse=lse)
    return out, lse


def _mla_sparse_decode(
    q: Any,
    kv_cache: Any,
    indices: Any,
    *,
    plan: Any = None,
    out: Any = None,
    lse: Any = None,
    stream: int | None = None,
    **options: Any,
) -> Any:
    import torch

    from . import torch_rules

    if plan is not None or stream is not None or (out is None) != (lse is None):
        outputs = {"out": out, "lse": lse, "plan": plan, "stream": stream}
        return torch_rules.as_it_is(_TAUGHT["mla_sparse_decode"], q, kv_cache, indices, **outputs, **options)
    if out is None:
        return torch.ops.cupy_mla.mla_sparse_decode(q, kv_cache, indices, **options)
    torch.ops.cupy_mla.mla_sparse_decode_out(q, kv_cache, indices, **options, out=out, lse=lse)
    return out, lse


def _mla_sparse_prefill(
    q: Any,
    kv: Any,
    indices: Any,
    *,
    out: Any = None,
    max_logits: Any = None,
    lse: Any = None,
    stream: int | None = None,
    **options: Any,
) -> Any:
    import torch

    from . import torch_rules

    given = {"out": out, "max_logits": max_logits, "lse": lse}
    if stream is None and out is None and max_logits is None and lse is None:
        return torch.ops.cupy_mla.mla_sparse_prefill(q, kv, indices, **options)
    return torch_rules.as_it_is(_TAUGHT["mla_sparse_prefill"], q, kv, indices, **given, stream=stream, **options)


def _merge_states(outs: Any, lses: Any, *, stream: int | None = None) -> Any:
    import torch

    from . import torch_rules

    if stream is not None:
        return torch_rules.as_it_is(_TAUGHT["merge_states"], outs, lses, stream=stream)
    if isinstance(outs, (tuple, list)):
        return torch.ops.cupy_mla.merge_states(list(outs), list(lses))
    return torch.ops.cupy_mla.merge_states(outs, lses)


def _append_tokens(kv_cache: Any, kv_new: Any, *places: Any, stream: int | None = None, **named: Any) -> None:
    import torch

    from . import torch_rules

    if stream is not None:
        torch_rules.as_it_is(_TAUGHT["append_tokens"], kv_cache, kv_new, *places, stream=stream, **named)
        return
    (cache, kv_rope), (rows, kv_new_rope) = _pair(kv_cache), _pair(kv_new)
    torch.ops.cupy_mla.append_tokens(cache, rows, *places, kv_rope=kv_rope, kv_new_rope=kv_new_rope, **named)


def _slots_of(
    token_indices: Any, block_table: Any, page_size: int, *, requests: Any = None, out: Any = None, stream: Any = None
) -> Any:
    import torch

    from . import torch_rules

    if out is None and stream is None:
        return torch.ops.cupy_mla.slots_of(token_indices, block_table, page_size, requests=requests)
    given = {"requests": requests, "out": out, "stream": stream}
    return torch_rules.as_it_is(_TAUGHT["slots_of"], token_indices, block_table, page_size, **given)


def _plan_decode(*arrays: Any, **options: Any) -> Any:
    from . import torch_rules

    return torch_rules.as_it_is(_TAUGHT["plan_decode"], *arrays, **options)


def _plan_sparse_decode(*arrays: Any, **options: Any) -> Any:
    from . import torch_rules

    return torch_rules.as_it_is(_TAUGHT["plan_sparse_decode"], *arrays, **options)


def _get_mla_metadata(*arguments: Any, **options: Any) -> Any:
    from . import torch_rules

    return torch_rules.as_it_is(_TAUGHT["get_mla_metadata"], *arguments, **options)


def _flash_mla_with_kvcache(
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
) -> Any:
    """Plans in the program, as metadata is no tensor: the results are those of a plan that is kept in it."""
    import torch

    from . import torch_rules

    of_copies = enable_batch_invariant, use_legacy, kv_format, descale_q, descale_k
    others = is_fp8_kvcache, extra_k_cache, extra_indices_in_kvcache, extra_topk_length, out, *of_copies
    served = all(other is None or other is False for other in others)
    shared = {"head_dim_v": head_dim_v, "softmax_scale": softmax_scale, "empty_lse": math.inf}
    if served and indices is None and attn_sink is None and topk_length is None:
        return torch.ops.cupy_mla.mla_decode(q, k_cache, block_table, cache_seqlens, **shared, causal=causal)
    if served and indices is not None and not causal:
        chosen = {"topk_length": topk_length, "attn_sink": attn_sink}
        return torch.ops.cupy_mla.mla_sparse_decode(q, k_cache, indices, **shared, **chosen)
    sparse = indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length
    return torch_rules.as_it_is(
        _TAUGHT["flash_mla_with_kvcache"], q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata,
        num_splits, softmax_scale, causal, is_fp8_kvcache, *sparse, out, *of_copies,
    )  # fmt: skip


def _flash_mla_sparse_fwd(
    q: Any,
    kv: Any,
    indices: Any,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Any = None,
    topk_length: Any = None,
    out: Any = None,
    return_log2_lse: bool = False,
) -> Any:
    import torch

    from . import torch_rules

    chosen = {"topk_length": topk_length, "attn_sink": attn_sink}
    if out is not None:
        arguments = {"d_v": d_v, **chosen, "out": out, "return_log2_lse": return_log2_lse}
        return torch_rules.as_it_is(_TAUGHT["flash_mla_sparse_fwd"], q, kv, indices, sm_scale, **arguments)
    result, max_logits, lse = torch.ops.cupy_mla.mla_sparse_prefill(
        q, kv, indices, softmax_scale=sm_scale, head_dim_v=d_v, **chosen, empty_lse=math.inf
    )
    return result, max_logits, lse * _LOG2_E if return_log2_lse else lse


_STAND_INS: dict[str, Callable[..., Any]] = {
    "append_tokens": _append_tokens,
    "flash_mla_sparse_fwd": _flash_mla_sparse_fwd,
    "flash_mla_with_kvcache": _flash_mla_with_kvcache,
    "get_mla_metadata": _get_mla_metadata,
    "merge_states": _merge_states,
    "mla_decode": _mla_decode,
    "mla_sparse_decode": _mla_sparse_decode,
    "mla_sparse_prefill": _mla_sparse_prefill,
    "plan_decode": _plan_decode,
    "plan_sparse_decode": _plan_sparse_decode,
    "slots_of": _slots_of,
}
