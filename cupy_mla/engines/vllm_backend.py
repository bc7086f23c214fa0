"""vLLM's attention backend on this package's kernels: dense decoding of MLA models.

Prompts, the write to the cache and the projections stay vLLM's own. The batch is planned once a step, by the metadata
builder, for all layers; in a CUDA graph's buffer if there are such graphs, as it runs before a graph is replayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonDecodeMetadata,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType

from .. import torch_ops as torch_ops  # registers torch.ops.cupy_mla
from ..decode.support import is_supported
from ..gpu import hopper

PAGE_SIZE = 64  # the kernels' fastest; vLLM divides larger blocks
FP8_DTYPES = ("fp8", "fp8_e4m3")
ROPE_DIM = 64
ANY_PAGES = 2**31 - 1  # more than any cache has
# Requests with so many new tokens decode, as for vLLM's FlashMLA: expanding the cache costs more up to there.
MAX_NEW_TOKENS = 128


class CupyMlaBackend(MLACommonBackend):
    """What the kernels take, as vLLM asks for it."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", *FP8_DTYPES]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks it up among the names of its backends

    @staticmethod
    def get_builder_cls() -> type[CupyMlaMetadataBuilder]:
        return CupyMlaMetadataBuilder

    @staticmethod
    def get_impl_cls() -> type[CupyMlaImpl]:
        return CupyMlaImpl

    @staticmethod
    def get_supported_kernel_block_sizes(*_: Any) -> list[int]:
        return [PAGE_SIZE]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [latent + ROPE_DIM for latent in (256, 512)]

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return (capability.major, capability.minor) == hopper.COMPUTE_CAPABILITY

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *_: Any, **__: Any
    ) -> str | None:
        """Why the kernels do not take this type with this cache, in words; None if they do."""
        return is_supported(
            latent_dim=head_size - ROPE_DIM,
            rope_dim=ROPE_DIM,
            dtype=str(dtype).removeprefix("torch."),
            layout="fp8_e4m3" if kv_cache_dtype in FP8_DTYPES else None,
            page_size=PAGE_SIZE,
        ).reason


@dataclass
class CupyMlaDecodeMetadata(MLACommonDecodeMetadata):
    """vLLM's, and the plan of the batch as `torch.ops.cupy_mla` takes it."""

    plan: torch.Tensor


@dataclass
class CupyMlaMetadata(MLACommonMetadata[CupyMlaDecodeMetadata]):
    """vLLM's, with our part for decoding."""


class CupyMlaMetadataBuilder(MLACommonMetadataBuilder[CupyMlaMetadata]):
    """Plans each step. Requests that decode together have equally many new tokens."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.UNIFORM
    reorder_batch_threshold: int = MAX_NEW_TOKENS

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, CupyMlaMetadata)
        self._in_graphs = vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        self._plans: dict[tuple[int, int], torch.Tensor] = {}  # of requests and tokens: what graphs read
        latent_dim, rope_dim = self.mla_dims.kv_lora_rank, self.mla_dims.qk_rope_head_dim
        is_fp8 = vllm_config.cache_config.cache_dtype in FP8_DTYPES
        dtype = torch.float8_e4m3fn if is_fp8 else self.model_config.dtype
        # A plan depends on shapes and types alone: these stand for the queries and the cache of any layer.
        self._heads = self.num_heads * self.dcp_world_size
        self._width = latent_dim + rope_dim
        page = torch.empty(1, PAGE_SIZE, 1, self._width, dtype=dtype, device=device)
        self._cache = page.expand(ANY_PAGES, -1, -1, -1)
        self._scale = torch.ones((), device=device) if is_fp8 else None

    def _build_decode(self, **given: Any) -> CupyMlaDecodeMetadata:
        metadata = super()._build_decode(**given)
        batch, tokens = metadata.seq_lens.shape[0], given["num_decode_tokens"]
        q = torch.empty(
            batch, tokens // batch, self._heads, self._width, dtype=self.model_config.dtype, device=self.device
        )
        plan = torch.ops.cupy_mla.plan_decode(
            q, self._cache, metadata.block_table, metadata.seq_lens,
            head_dim_v=self.mla_dims.kv_lora_rank, causal=q.shape[1] > 1, kv_scale=self._scale,
        )  # fmt: skip
        if self._in_graphs:
            plan = self._plans.setdefault((batch, tokens), plan).copy_(plan)
        return CupyMlaDecodeMetadata(**vars(metadata), plan=plan)


class CupyMlaImpl(MLACommonImpl[CupyMlaMetadata]):
    """Attention of a layer."""

    can_return_lse_for_decode: bool = True
    supports_dcp: bool = True
    lse_base_on_e: bool = True

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, alibi_slopes: list[float] | None,
        sliding_window: int | None, kv_cache_dtype: str, logits_soft_cap: float | None, attn_type: str,
        kv_sharing_target_layer_name: str | None, **mla_args: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap,
            attn_type, kv_sharing_target_layer_name, **mla_args,
        )  # fmt: skip
        lacking = {"alibi_slopes": alibi_slopes, "sliding_window": sliding_window, "logits_soft_cap": logits_soft_cap}
        if any(lacking.values()):
            names = ", ".join(name for name, value in lacking.items() if value)
            raise NotImplementedError(f"cupy-mla does not take {names}")
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"cupy-mla does not take attention of the type {attn_type}")
        self.supports_quant_query_input = False  # queries stay in 16 bits over a cache of e4m3

    def forward_mqa(
        self, q: Any, kv_c_and_k_pe_cache: torch.Tensor, attn_metadata: CupyMlaMetadata, layer: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Out [tokens, heads, kv_lora_rank] and lse [tokens, heads]; q is [tokens, heads, width], or (latent, rope)."""
        decode = attn_metadata.decode
        batch = attn_metadata.num_decodes
        parts = q if isinstance(q, tuple) else (q,)
        latent, *rope = (part.unflatten(0, (batch, -1)) for part in parts)
        out, lse = torch.ops.cupy_mla.mla_decode(
            latent, kv_c_and_k_pe_cache.unsqueeze(2), decode.block_table, decode.seq_lens,
            q_rope=rope[0] if rope else None,
            head_dim_v=self.kv_lora_rank, softmax_scale=self.scale, causal=latent.shape[1] > 1, plan=decode.plan,
            kv_scale=layer._k_scale if self.kv_cache_dtype in FP8_DTYPES else None,
        )  # fmt: skip
        return out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
