"""FlashMLA: DeepSeek's package, or the copy of it that vLLM ships.

Four of its functions: dense decode, the same over an e4m3 cache with e4m3 queries (in vLLM's copy), sparse decode
over caches of 656 bytes a token or of 584, the latter also with a second cache, and sparse prefill.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from ...lab.sparse_cases import SparseCase
from ...lab.spec import KV_SCALE
from ...layouts import BF16, FP8_DS_MLA, FP8_E4M3, FP8_MODEL1, FP16
from ..grid import DECODE, SPARSE_DECODE, SPARSE_PREFILL, BenchCase
from ..inputs import Call, Inputs
from .base import Peer, explain, import_first, installed_version

_OWN_MODULE = "flash_mla"
_VLLM_MODULE = "vllm.third_party.flashmla.flash_mla_interface"
_VLLM_FP8_MODULE, _VLLM_FP8_LIBRARY = "vllm._flashmla_extension_C", "_flashmla_extension_C"
# What its dense Hopper kernel is compiled for.
_WIDTHS = (512, 64)
_PAGE_SIZE = 64
# What its sparse kernels take.
_DECODE_HEADS, _PREFILL_HEADS = (64, 128), (8, 16, 32, 64, 128)
_DECODE_TOPK, _PREFILL_TOPK = 64, 128  # multiples
_PREFILL_ROPE_DIMS = (64, 0)


class FlashMlaPeer(Peer):
    """``flash_mla_with_kvcache``, with its metadata made beforehand, and ``flash_mla_sparse_fwd``.

    Parameters
    ----------
    interface
        Its module of functions.
    fp8
        vLLM's operators for e4m3 caches, or why they are not there.
    """

    name = "flash_mla"

    def __init__(self, interface: Any, version: str, fp8: Any = "only vLLM's copy has it") -> None:
        super().__init__(version)
        self._interface = interface
        self._fp8 = fp8

    def unsupported(self, case: BenchCase) -> str | None:
        if case.storage == "split":
            return "latent and rope part in separate arrays: only one array"
        if case.function == SPARSE_DECODE:
            return _beyond_sparse_decode(case)
        if case.function == SPARSE_PREFILL:
            return _beyond_sparse_prefill(case)
        if (case.latent_dim, case.rope_dim) != _WIDTHS:
            return f"widths {case.latent_dim} + {case.rope_dim}: only {_WIDTHS[0]} + {_WIDTHS[1]}"
        if case.page_size != _PAGE_SIZE:
            return f"page size {case.page_size}: only {_PAGE_SIZE}"
        if case.ragged is not None:
            return "ragged queries: only equally many tokens for all requests"
        layout = case.spec.cache_layout
        if layout == FP8_E4M3 and isinstance(self._fp8, str):
            return f"dense decode over {layout.name}: {self._fp8}"
        return None if layout in (BF16, FP16, FP8_E4M3) else f"dense decode over {layout.name}"

    def prepare(self, inputs: Inputs) -> Call:
        calls: dict[str, Callable[[Inputs], Call]] = {
            DECODE: self._prepare_fp8 if inputs.case.layout == FP8_E4M3.name else self._prepare_dense,
            SPARSE_DECODE: self._prepare_sparse_decode,
            SPARSE_PREFILL: self._prepare_sparse_prefill,
        }
        return calls[inputs.case.function](inputs)

    def _prepare_dense(self, inputs: Inputs) -> Call:
        case = inputs.case
        # The arguments are for versions before 2026; later ones ignore them and plan in the first decode instead.
        schedule = self._interface.get_mla_metadata(inputs.cache_seqlens, case.seqlen_q * case.num_heads_q, 1)

        def call(cache: Any) -> tuple[Any, Any]:
            out, lse = self._interface.flash_mla_with_kvcache(
                inputs.q,
                cache,
                inputs.block_table,
                inputs.cache_seqlens,
                case.latent_dim,
                *schedule,
                softmax_scale=inputs.spec.scale,
                causal=case.causal,
            )
            return out, lse

        call(inputs.caches[0])
        return call

    def _prepare_fp8(self, inputs: Inputs) -> Call:
        """Its queries are e4m3 too; that they were rounded shows in its error."""
        import torch

        case = inputs.case
        scales = [torch.full((1,), scale, dtype=torch.float32, device=inputs.q.device) for scale in (1.0, KV_SCALE)]
        rows = case.seqlen_q * case.num_heads_q
        schedule = self._fp8.get_mla_decoding_metadata_dense_fp8(inputs.cache_seqlens, rows, 1)
        q = inputs.q.to(torch.float8_e4m3fn)
        scale = inputs.spec.scale

        def call(cache: Any) -> tuple[Any, Any]:
            lengths, pages = inputs.cache_seqlens, inputs.block_table
            out, lse = self._fp8.fwd_kvcache_mla_fp8(
                q, cache, case.latent_dim, lengths, pages, scale, case.causal, *schedule, *scales
            )
            return out, lse

        return call

    def _prepare_sparse_decode(self, inputs: Inputs) -> Call:
        import torch

        case = inputs.case
        schedule, _ = self._interface.get_mla_metadata()
        stored = inputs.stored_case
        assert isinstance(stored, SparseCase)
        optional: dict[str, Any] = {} if stored.attn_sink is None else {"attn_sink": stored.attn_sink}
        if stored.extra is not None:
            optional["extra_indices_in_kvcache"] = stored.extra.indices
            optional["extra_topk_length"] = stored.extra.topk_length

        def call(cache: Any) -> tuple[Any, Any]:
            extra = {}
            if stored.extra is not None:
                cache, second = cache
                extra["extra_k_cache"] = second.view(torch.float8_e4m3fn)
            out, lse = self._interface.flash_mla_with_kvcache(
                inputs.q,
                cache.view(torch.float8_e4m3fn),
                None,
                None,
                case.latent_dim,
                schedule,
                softmax_scale=inputs.spec.scale,
                is_fp8_kvcache=True,
                indices=inputs.indices,
                **optional,
                **extra,
            )
            return out, lse

        call(inputs.caches[0])
        return call

    def _prepare_sparse_prefill(self, inputs: Inputs) -> Call:
        indices = inputs.indices[:, None]
        width = inputs.spec.head_dim
        stored = inputs.stored_case
        assert isinstance(stored, SparseCase)
        optional: dict[str, Any] = {} if stored.attn_sink is None else {"attn_sink": stored.attn_sink}

        def call(cache: Any) -> tuple[Any, Any]:
            out, _, lse = self._interface.flash_mla_sparse_fwd(
                inputs.q, cache.view(-1, 1, width), indices, inputs.spec.scale, **optional
            )
            return out, lse

        return call


def _beyond_sparse_decode(case: BenchCase) -> str | None:
    layouts = {spec.cache_layout for spec in (case.spec, case.spec.extra) if spec is not None}
    for layout in layouts - {FP8_DS_MLA, FP8_MODEL1}:
        return f"sparse decode over {layout.name}: only {FP8_DS_MLA.name} and {FP8_MODEL1.name}"
    if case.extra_topk is not None and FP8_DS_MLA in layouts:
        return f"a second cache beside {FP8_DS_MLA.name}: only beside {FP8_MODEL1.name}"
    if case.num_heads_q not in _DECODE_HEADS:
        return f"{case.num_heads_q} heads: only {' or '.join(map(str, _DECODE_HEADS))}"
    for topk in (case.topk, case.extra_topk):
        if topk is not None and topk % _DECODE_TOPK:
            return f"topk {topk}: only multiples of {_DECODE_TOPK}"
    return None


def _beyond_sparse_prefill(case: BenchCase) -> str | None:
    if case.spec.cache_layout != BF16:
        return f"sparse prefill over {case.spec.cache_layout.name}: only {BF16.name}"
    if case.num_heads_q not in _PREFILL_HEADS:
        return f"{case.num_heads_q} heads: only {', '.join(map(str, _PREFILL_HEADS))}"
    if case.topk is None or case.topk % _PREFILL_TOPK:
        return f"topk {case.topk}: only multiples of {_PREFILL_TOPK}"
    if case.latent_dim != _WIDTHS[0] or case.rope_dim not in _PREFILL_ROPE_DIMS or case.storage != "packed":
        return f"widths {case.latent_dim} + {case.rope_dim}, {case.storage}: only 512 + 64 or none, packed"
    return None


def load() -> FlashMlaPeer:
    """FlashMLA, from where it is installed.

    Raises
    ------
    ImportError
        It is installed nowhere, or does not load.
    """
    interface = import_first(_OWN_MODULE, _VLLM_MODULE)
    if interface.__name__ == _OWN_MODULE:
        return FlashMlaPeer(interface, installed_version("flash_mla"))
    return FlashMlaPeer(interface, f"vllm {installed_version('vllm')}", load_fp8())


def load_fp8() -> Any:
    """vLLM's operators for e4m3 caches, or why they are not there."""
    import torch

    try:
        importlib.import_module(_VLLM_FP8_MODULE)
        return getattr(torch.ops, _VLLM_FP8_LIBRARY)
    except Exception as error:  # a binary for another torch raises what it likes
        return f"{_VLLM_FP8_MODULE}: {explain(error)}"
