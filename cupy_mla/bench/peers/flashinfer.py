"""FlashInfer's paged MLA wrapper with its Hopper kernel, over caches of q's type, and over e4m3 ones where its version
has that.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from ...lab.spec import KV_SCALE, starts_of
from ...layouts import BF16, FP8_E4M3, FP16
from ..grid import DECODE, BenchCase
from ..inputs import Call, Inputs
from .base import Peer, as_promised, beyond, cache_parts, query_parts, query_starts

_MODULE = "flashinfer"
_BACKEND = "fa3"  # its name for the Hopper kernel
_WORKSPACE_BYTES = 128 << 20  # its documentation's advice
# Its Hopper kernel is written for latent parts of these widths and rope parts of a multiple.
_LATENT_DIMS, _FP8_LATENT_DIMS = (128, 256, 512), (512,)
_ROPE_MULTIPLE = 64
_SCALES = ("ckv_scale", "kpe_scale")  # of an e4m3 cache's parts, arguments of run


class FlashInferPeer(Peer):
    """``BatchMLAPagedAttentionWrapper``, planned beforehand."""

    name = "flashinfer"

    def __init__(self, wrapper_class: Any, version: str) -> None:
        super().__init__(version)
        self._wrapper_class = wrapper_class

    def unsupported(self, case: BenchCase) -> str | None:
        known = _FP8_LATENT_DIMS if case.spec.cache_layout == FP8_E4M3 else _LATENT_DIMS
        if case.latent_dim not in known or case.rope_dim % _ROPE_MULTIPLE != 0:
            latent_dims = ", ".join(map(str, known))
            return f"widths {case.latent_dim} + {case.rope_dim}: only {latent_dims} + a multiple of {_ROPE_MULTIPLE}"
        takes_fp8 = set(_SCALES) <= inspect.signature(self._wrapper_class.run).parameters.keys()
        return beyond(case, DECODE, (BF16, FP16, FP8_E4M3) if takes_fp8 else (BF16, FP16))

    def prepare(self, inputs: Inputs) -> Call:
        import torch

        case = inputs.case
        q_latent, q_rope = query_parts(inputs)
        metadata = {
            "qo_indptr": query_starts(inputs),
            "kv_indptr": _page_starts(inputs),
            "kv_indices": _pages(inputs),
            "kv_len_arr": inputs.cache_seqlens,
        }
        is_fp8 = case.spec.cache_layout == FP8_E4M3
        scales = dict.fromkeys(_SCALES, KV_SCALE) if is_fp8 else {}
        wrapper = self._wrapper_class(
            torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.q.device),
            use_cuda_graph=True,
            **{name: torch.empty_like(array) for name, array in metadata.items()},
            backend=_BACKEND,
        )
        # Metadata by name and separate parts are the form that all its versions take.
        wrapper.plan(
            **metadata,
            num_heads=case.num_heads_q,
            head_dim_ckv=case.latent_dim,
            head_dim_kpe=case.rope_dim,
            page_size=case.page_size,
            causal=case.causal,
            sm_scale=inputs.spec.scale,
            q_data_type=inputs.q.dtype,
            kv_data_type=torch.float8_e4m3fn if is_fp8 else inputs.q.dtype,
        )
        out = torch.empty_like(q_latent)
        lse = torch.empty(q_latent.shape[:2], dtype=torch.float32, device=inputs.q.device)

        def call(cache: Any) -> tuple[Any, Any]:
            latent, rope = cache_parts(case, cache)
            wrapper.run(
                q_nope=q_latent,
                q_pe=q_rope,
                ckv_cache=latent.squeeze(2),
                kpe_cache=rope.squeeze(2),
                out=out,
                lse=lse,
                return_lse=True,
                return_lse_base_on_e=True,
                **scales,
            )
            return as_promised(case, out, lse.transpose(0, 1))

        return call


def _page_starts(inputs: Inputs) -> Any:
    """[batch + 1] int32: where the pages of each request begin in `_pages`."""
    import torch

    return torch.tensor(starts_of(inputs.spec.page_counts), dtype=torch.int32, device=inputs.q.device)


def _pages(inputs: Inputs) -> Any:
    """int32: the pages of all requests, without what lies behind the last of each."""
    import torch

    counts = torch.tensor(inputs.spec.page_counts, device=inputs.q.device)
    columns = torch.arange(inputs.block_table.shape[1], device=inputs.q.device)
    return inputs.block_table[columns < counts[:, None]]


def load() -> FlashInferPeer:
    """FlashInfer, from where it is installed.

    Raises
    ------
    ImportError
        It is not installed, or one of its own dependencies is not.
    """
    package = importlib.import_module(_MODULE)
    wrapper_class = importlib.import_module(f"{_MODULE}.mla").BatchMLAPagedAttentionWrapper
    return FlashInferPeer(wrapper_class, str(package.__version__))
