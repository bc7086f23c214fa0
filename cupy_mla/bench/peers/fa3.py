"""FlashAttention-3, whose decode takes MLA's latent part of q as ``qv``: its own package, or vLLM's build of it."""

from __future__ import annotations

import importlib
import lzma
import shutil
import sys
import tempfile
from abc import abstractmethod
from pathlib import Path
from typing import Any

from ..grid import BenchCase
from ..inputs import Call, Inputs
from .base import (
    Peer,
    as_promised,
    cache_parts,
    explain,
    installed_version,
    query_parts,
    query_starts,
)

_OWN_MODULE = "flash_attn_interface"
_VLLM_MODULE = "vllm.vllm_flash_attn._vllm_fa3_C"
_VLLM_LIBRARY = "_vllm_fa3_C"
_VLLM_OPERATOR = "fwd"  # one of those in it
_VLLM_FILE = "_vllm_fa3_C.abi3.so"
# With a latent part its kernel wants the rope part 64 wide; it is compiled for values of these widths.
_ROPE_DIM = 64
_LATENT_DIMS = (256, 512)
_CHOOSE_SPLITS = 0  # num_splits: leave it to its heuristic
_NO_WINDOW = -1


class Fa3Peer(Peer):
    """The decode over a paged cache, with its scheduler metadata made beforehand."""

    name = "fa3"

    def unsupported(self, case: BenchCase) -> str | None:
        if case.rope_dim != _ROPE_DIM or case.latent_dim not in _LATENT_DIMS:
            latent_dims = " or ".join(map(str, _LATENT_DIMS))
            return f"widths {case.latent_dim} + {case.rope_dim}: only {latent_dims} + {_ROPE_DIM}"
        return None

    def prepare(self, inputs: Inputs) -> Call:
        case = inputs.case
        q_latent, q_rope = query_parts(inputs)
        starts = query_starts(inputs)
        metadata = self._metadata(inputs, starts)

        def call(cache: Any) -> tuple[Any, Any]:
            latent, rope = cache_parts(case, cache)
            out, lse = self._decode(inputs, (q_latent, q_rope), (latent, rope), starts, metadata)
            return as_promised(case, out, lse)

        return call

    @abstractmethod
    def _metadata(self, inputs: Inputs, starts: Any) -> Any:
        """What its scheduler works out from the lengths."""

    @abstractmethod
    def _decode(
        self, inputs: Inputs, query: tuple[Any, Any], cache: tuple[Any, Any], starts: Any, metadata: Any
    ) -> tuple[Any, Any]:
        """out [total_q, h, latent_dim], lse [h, total_q]; query and cache are (latent, rope)."""


class PackagePeer(Fa3Peer):
    """Through ``flash_attn_interface``, the package's own functions."""

    def __init__(self, interface: Any) -> None:
        super().__init__(installed_version("flash_attn_3", "flash-attn-3"))
        self._interface = interface

    def _metadata(self, inputs: Inputs, starts: Any) -> Any:
        case = inputs.case
        return self._interface.get_scheduler_metadata(
            case.batch,
            case.seqlen_q,
            inputs.block_table.shape[1] * case.page_size,  # what the decode assumes, for the same number of splits
            case.num_heads_q,
            1,
            case.rope_dim,
            inputs.cache_seqlens,
            qkv_dtype=inputs.q.dtype,
            headdim_v=case.latent_dim,
            cu_seqlens_q=starts,
            page_size=case.page_size,
            causal=case.causal,
            num_splits=_CHOOSE_SPLITS,
        )

    def _decode(
        self, inputs: Inputs, query: tuple[Any, Any], cache: tuple[Any, Any], starts: Any, metadata: Any
    ) -> tuple[Any, Any]:
        out, lse, *_ = self._interface.flash_attn_with_kvcache(
            query[1],
            cache[1],
            cache[0],
            qv=query[0],
            cache_seqlens=inputs.cache_seqlens,
            page_table=inputs.block_table,
            cu_seqlens_q=starts,
            max_seqlen_q=inputs.case.seqlen_q,
            softmax_scale=inputs.spec.scale,
            causal=inputs.case.causal,
            scheduler_metadata=metadata,
            num_splits=_CHOOSE_SPLITS,
            return_softmax_lse=True,
        )
        return out, lse


class VllmPeer(Fa3Peer):
    """Through the torch operators of vLLM's extension, which are the same without Python around them."""

    def __init__(self, operators: Any) -> None:
        super().__init__(f"vllm {installed_version('vllm')}")
        self._operators = operators

    def _metadata(self, inputs: Inputs, starts: Any) -> Any:
        case = inputs.case
        return _call_operator(
            self._operators.get_scheduler_metadata,
            batch_size=case.batch,
            max_seqlen_q=case.seqlen_q,
            max_seqlen_k=int(inputs.spec.kv_lengths.max()),
            num_heads=case.num_heads_q,
            num_heads_k=1,
            headdim=case.rope_dim,
            headdim_v=case.latent_dim,
            qkv_dtype=inputs.q.dtype,
            seqused_k=inputs.cache_seqlens,
            cu_seqlens_q=starts,
            page_size=case.page_size,
            max_seqlen_k_new=0,
            is_causal=case.causal,
            window_size_left=_NO_WINDOW,
            window_size_right=_NO_WINDOW,
            has_softcap=False,
            num_splits=_CHOOSE_SPLITS,
            sm_margin=0,
        )

    def _decode(
        self, inputs: Inputs, query: tuple[Any, Any], cache: tuple[Any, Any], starts: Any, metadata: Any
    ) -> tuple[Any, Any]:
        out, lse, *_ = _call_operator(
            self._operators.fwd,
            q=query[1],
            k=cache[1],
            v=cache[0],
            q_v=query[0],
            cu_seqlens_q=starts,
            seqused_k=inputs.cache_seqlens,
            max_seqlen_q=inputs.case.seqlen_q,
            max_seqlen_k=int(inputs.spec.kv_lengths.max()),
            page_table=inputs.block_table,
            softmax_scale=inputs.spec.scale,
            is_causal=inputs.case.causal,
            window_size_left=_NO_WINDOW,
            window_size_right=_NO_WINDOW,
            softcap=0.0,
            is_rotary_interleaved=True,
            scheduler_metadata=metadata,
            num_splits=_CHOOSE_SPLITS,
            sm_margin=0,
            cp_world_size=1,
            cp_rank=0,
        )
        return out, lse


def _call_operator(operator: Any, **given: Any) -> Any:
    """Call a torch operator; what its schema has beyond ``given`` is None, and what it lacks is left out.

    The arguments of these operators have no defaults, and vLLM adds one now and then.
    """
    names = [argument.name for argument in operator.default._schema.arguments]
    return operator(**{name: given.get(name) for name in names})


def load() -> Fa3Peer:
    """FlashAttention-3, from where it is installed, or from a loose ``_vllm_fa3_C.abi3.so`` (or ``.so.xz``) in a folder
    of ``sys.path``.

    Raises
    ------
    ImportError
        It is nowhere, or does not load; says why, for each place.
    """
    import torch

    reasons = []
    try:
        return PackagePeer(importlib.import_module(_OWN_MODULE))
    except Exception as error:
        reasons.append(f"{_OWN_MODULE}: {explain(error)}")
    try:
        importlib.import_module(_VLLM_MODULE)
        return VllmPeer(getattr(torch.ops, _VLLM_LIBRARY))
    except Exception as error:
        reasons.append(f"{_VLLM_MODULE}: {explain(error)}")
    try:
        _load_loose_library()
        return VllmPeer(getattr(torch.ops, _VLLM_LIBRARY))
    except Exception as error:
        reasons.append(f"{_VLLM_FILE}: {explain(error)}")
    raise ImportError("; ".join(reasons))


def _load_loose_library() -> None:
    """Load the first loose file of vLLM's extension on ``sys.path``; a packed one is unpacked for the while.

    Once in a process: a second copy would register its operators again, which ends the process.
    """
    import torch

    if hasattr(getattr(torch.ops, _VLLM_LIBRARY, None), _VLLM_OPERATOR):
        return
    for folder in map(Path, sys.path):
        library = folder / _VLLM_FILE
        packed = library.with_name(f"{_VLLM_FILE}.xz")
        if library.is_file():
            torch.ops.load_library(str(library))
            return
        if packed.is_file():
            with tempfile.TemporaryDirectory(prefix="cupy_mla-") as unpacked:
                library = Path(unpacked, _VLLM_FILE)
                with lzma.open(packed) as source, library.open("wb") as target:
                    shutil.copyfileobj(source, target)
                torch.ops.load_library(str(library))  # stays mapped when the file is gone
            return
    raise FileNotFoundError("in no folder of sys.path")
