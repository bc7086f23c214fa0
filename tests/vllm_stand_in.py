"""The least that our backend for vLLM needs of it, where it is not installed: base classes that keep what they get."""

from __future__ import annotations

import enum
import importlib
import sys
import types
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest

T = TypeVar("T")
INTERFACES = "vllm.model_executor.layers.attention.mla_attention"
BACKEND = "vllm.v1.attention.backend"
OURS = "cupy_mla.engines.vllm_backend"


class Backend:
    pass


@dataclass
class DecodeMetadata:
    block_table: Any
    seq_lens: Any
    dcp_tot_seq_lens: Any


class Metadata(Generic[T]):
    pass


class Builder(Generic[T]):
    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any, metadata: Any) -> None:
        self.model_config, self.device, self.num_heads = vllm_config.model_config, device, vllm_config.heads
        self.mla_dims, self.dcp_world_size = SimpleNamespace(kv_lora_rank=512, qk_rope_head_dim=64), 1

    def _build_decode(self, block_table_tensor: Any, seq_lens_device: Any, num_decode_tokens: int) -> DecodeMetadata:
        return DecodeMetadata(block_table_tensor, seq_lens_device, None)


class Impl(Generic[T]):
    def __init__(self, num_heads: int, head_size: int, scale: float, *others: Any, **mla_args: Any) -> None:
        self.scale, self.kv_cache_dtype, self.kv_lora_rank = scale, others[3], 512


class StandIn:
    """Our builder and our attention of a layer; ``metadata`` is that of a batch."""

    def __init__(self, ours: Any, torch: Any, heads: int, scale: float, cache_dtype: str, device: str) -> None:
        graphs = SimpleNamespace(cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: device != "cpu"))
        config = SimpleNamespace(
            model_config=SimpleNamespace(dtype=torch.bfloat16), heads=heads, compilation_config=graphs,
            cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        )  # fmt: skip
        self.builder = ours.CupyMlaMetadataBuilder(None, [], config, torch.device(device))
        self.attention = ours.CupyMlaImpl(heads, 576, scale, 1, None, None, cache_dtype, None, "decoder", None)

    def metadata(self, table: Any, seq_lens: Any, new: int) -> Any:
        decode = self.builder._build_decode(
            block_table_tensor=table, seq_lens_device=seq_lens, num_decode_tokens=len(table) * new
        )
        return SimpleNamespace(decode=decode, num_decodes=len(table))


def make(
    patch: pytest.MonkeyPatch, *, heads: int, scale: float, cache_dtype: str = "auto", device: str = "cpu"
) -> StandIn:
    """Our backend made of stand-ins, whether or not vLLM is installed."""
    torch = pytest.importorskip("torch")
    interfaces, backend = types.ModuleType(INTERFACES), types.ModuleType(BACKEND)
    vars(interfaces).update(
        MLACommonBackend=Backend, MLACommonDecodeMetadata=DecodeMetadata, MLACommonImpl=Impl,
        MLACommonMetadata=Metadata, MLACommonMetadataBuilder=Builder,
        QueryLenSupport=enum.Enum("QueryLenSupport", "UNIFORM"),
    )  # fmt: skip
    vars(backend).update(
        AttentionCGSupport=enum.Enum("AttentionCGSupport", "UNIFORM_BATCH"),
        AttentionType=SimpleNamespace(DECODER="decoder"),
    )
    for name in (INTERFACES, BACKEND):
        parts = name.split(".")
        for count in range(1, len(parts)):
            parent = ".".join(parts[:count])
            patch.setitem(sys.modules, parent, types.ModuleType(parent))
    patch.setitem(sys.modules, INTERFACES, interfaces)
    patch.setitem(sys.modules, BACKEND, backend)
    patch.delitem(sys.modules, OURS, raising=False)
    ours = importlib.import_module(OURS)
    patch.delitem(sys.modules, OURS)
    return StandIn(ours, torch, heads, scale, cache_dtype, device)
