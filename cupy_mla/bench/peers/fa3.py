"""FlashAttention-3, whose decode takes MLA's latent part of q as ``qv``: its own package, or vLLM's build of it.

Sparse decode over caches of q's type is the same decode: pages of one token, of which the indices are the page table.
"""

from __future__ import annotations

import importlib
import lzma
import shutil
import sys
import tempfile
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...lab.spec import PACKED
from ..grid import DECODE, SPARSE_DECODE, BenchCase
from ..inputs import Call, Inputs
from .base import (
    Peer,
    as_promised,
    beyond,
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


@dataclass(frozen=True)
class PagedBatch:
    """Requests as it takes them.

    Attributes
    ----------
    size, seqlen_q
        Requests, and the most query tokens of one.
    starts
        [size + 1] int32: where the query tokens of each begin among all.
    lengths
        [size] int32: keys of each; ``longest`` is the largest on the host.
    table
        [size, pages] int32, of ``page_size`` tokens.
    """

    size: int
    seqlen_q: int
    starts: Any
    lengths: Any
    longest: int
    table: Any
    page_size: int


def _as_it_is(inputs: Inputs) -> PagedBatch:
    case = inputs.case
    longest = int(inputs.spec.kv_lengths.max())
    lengths, table = inputs.cache_seqlens, inputs.block_table
    return PagedBatch(case.batch, case.seqlen_q, query_starts(inputs), lengths, longest, table, case.page_size)


def _as_pages_of_one_token(inputs: Inputs) -> PagedBatch:
    """Every query token is a request."""
    import torch

    table = inputs.indices.flatten(0, 1)
    chosen = torch.tensor(inputs.spec.chosen, dtype=torch.int32, device=table.device).flatten()
    starts = torch.arange(len(table) + 1, dtype=torch.int32, device=table.device)
    return PagedBatch(len(table), 1, starts, chosen, int(inputs.spec.chosen.max()), table.clamp(min=0), 1)


class Fa3Peer(Peer):
    """The decode over a paged cache, with its scheduler metadata made beforehand."""

    name = "fa3"

    def unsupported(self, case: BenchCase) -> str | None:
        if case.rope_dim != _ROPE_DIM or case.latent_dim not in _LATENT_DIMS:
            latent_dims = " or ".join(map(str, _LATENT_DIMS))
            return f"widths {case.latent_dim} + {case.rope_dim}: only {latent_dims} + {_ROPE_DIM}"
        if case.function == SPARSE_DECODE and case.storage == PACKED:
            return beyond(case, SPARSE_DECODE)
        return beyond(case, DECODE)

    def prepare(self, inputs: Inputs) -> Call:
        case = inputs.case
        q_latent, q_rope = query_parts(inputs)
        batch = _as_pages_of_one_token(inputs) if case.function == SPARSE_DECODE else _as_it_is(inputs)
        metadata = self._metadata(batch, inputs)

        def call(cache: Any) -> tuple[Any, Any]:
            latent, rope = cache_parts(case, cache)
            if case.function == SPARSE_DECODE:
                latent, rope = (part.view(-1, 1, 1, part.shape[-1]) for part in (latent, rope))
            out, lse = self._decode(batch, inputs, (q_latent, q_rope), (latent, rope), metadata)
            return as_promised(case, out, lse)

        return call

    @abstractmethod
    def _metadata(self, batch: PagedBatch, inputs: Inputs) -> Any:
        """What its scheduler works out from the lengths."""

    @abstractmethod
    def _decode(
        self, batch: PagedBatch, inputs: Inputs, query: tuple[Any, Any], cache: tuple[Any, Any], metadata: Any
    ) -> tuple[Any, Any]:
        """out [total_q, h, latent_dim], lse [h, total_q]; query and cache are (latent, rope)."""


class PackagePeer(Fa3Peer):
    """Through ``flash_attn_interface``, the package's own functions."""

    def __init__(self, interface: Any) -> None:
        super().__init__(installed_version("flash_attn_3", "flash-attn-3"))
        self._interface = interface

    def _metadata(self, batch: PagedBatch, inputs: Inputs) -> Any:
        case = inputs.case
        return self._interface.get_scheduler_metadata(
            batch.size,
            batch.seqlen_q,
            batch.table.shape[1] * batch.page_size,  # what the decode assumes, for the same number of splits
            case.num_heads_q,
            1,
            case.rope_dim,
            batch.lengths,
            qkv_dtype=inputs.q.dtype,
            headdim_v=case.latent_dim,
            cu_seqlens_q=batch.starts,
            page_size=batch.page_size,
            causal=case.causal,
            num_splits=_CHOOSE_SPLITS,
        )

    def _decode(
        self, batch: PagedBatch, inputs: Inputs, query: tuple[Any, Any], cache: tuple[Any, Any], metadata: Any
    ) -> tuple[Any, Any]:
        out, lse, *_ = self._interface.flash_attn_with_kvcache(
            query[1],
            cache[1],
            cache[0],
            qv=query[0],
            cache_seqlens=batch.lengths,
            page_table=batch.table,
            cu_seqlens_q=batch.starts,
            max_seqlen_q=batch.seqlen_q,
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

    def _metadata(self, batch: PagedBatch, inputs: Inputs) -> Any:
        case = inputs.case
        return _call_operator(
            self._operators.get_scheduler_metadata,
            batch_size=batch.size,
            max_seqlen_q=batch.seqlen_q,
            max_seqlen_k=batch.longest,
            num_heads=case.num_heads_q,
            num_heads_k=1,
            headdim=case.rope_dim,
            headdim_v=case.latent_dim,
            qkv_dtype=inputs.q.dtype,
            seqused_k=batch.lengths,
            cu_seqlens_q=batch.starts,
            page_size=batch.page_size,
            max_seqlen_k_new=0,
            is_causal=case.causal,
            window_size_left=_NO_WINDOW,
            window_size_right=_NO_WINDOW,
            has_softcap=False,
            num_splits=_CHOOSE_SPLITS,
            sm_margin=0,
        )

    def _decode(
        self, batch: PagedBatch, inputs: Inputs, query: tuple[Any, Any], cache: tuple[Any, Any], metadata: Any
    ) -> tuple[Any, Any]:
        out, lse, *_ = _call_operator(
            self._operators.fwd,
            q=query[1],
            k=cache[1],
            v=cache[0],
            q_v=query[0],
            cu_seqlens_q=batch.starts,
            seqused_k=batch.lengths,
            max_seqlen_q=batch.seqlen_q,
            max_seqlen_k=batch.longest,
            page_table=batch.table,
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
