"""FlashMLA: DeepSeek's package, or the copy of it that vLLM ships."""

from __future__ import annotations

from typing import Any

from ..grid import BenchCase
from ..inputs import Call, Inputs
from .base import Peer, import_first, installed_version

_OWN_MODULE = "flash_mla"
_VLLM_MODULE = "vllm.third_party.flashmla.flash_mla_interface"
# What its dense Hopper kernel is compiled for.
_WIDTHS = (512, 64)
_PAGE_SIZE = 64


class FlashMlaPeer(Peer):
    """``flash_mla_with_kvcache``, with its metadata made beforehand."""

    name = "flash_mla"

    def __init__(self, interface: Any, version: str) -> None:
        super().__init__(version)
        self._interface = interface

    def unsupported(self, case: BenchCase) -> str | None:
        if (case.latent_dim, case.rope_dim) != _WIDTHS:
            return f"widths {case.latent_dim} + {case.rope_dim}: only {_WIDTHS[0]} + {_WIDTHS[1]}"
        if case.page_size != _PAGE_SIZE:
            return f"page size {case.page_size}: only {_PAGE_SIZE}"
        if case.storage == "split":
            return "latent and rope part in separate arrays: only one array"
        if case.ragged is not None:
            return "ragged queries: only equally many tokens for all requests"
        return None

    def prepare(self, inputs: Inputs) -> Call:
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
    return FlashMlaPeer(interface, f"vllm {installed_version('vllm')}")
