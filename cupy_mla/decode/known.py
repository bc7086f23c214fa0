"""Calls that were checked and prepared before: an engine makes the same one for every layer of every step.

A call is recognised by all that its checks and its kernels depend on but addresses: shapes, strides, types and devices
of its arrays, its options, its plan's kind. What is left to check then is the alignment of the addresses. Nothing here
keeps an array alive or depends on what lies at an address.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..arrays.dtypes import ITEM_SIZES
from ..arrays.sketch import sketch, sketch_tensors
from ..call.arguments import COPY_ALIGNMENT
from ..call.problem import INDEX_DTYPE, DecodeInputs
from ..settings import Settings
from .plan import Blueprint
from .prepared import DecodeCall

_CALLS_KEPT = 4096
_COPY_MASK = COPY_ALIGNMENT - 1
_INDEX_MASK = ITEM_SIZES[INDEX_DTYPE] - 1  # an lse has as many bytes
# Of q_latent, q_rope, kv_latent, kv_rope, block_table, cache_seqlens, cu_seqlens_q, out, lse; 0 for one not there.
Addresses = tuple[int, int, int, int, int, int, int, int, int]
Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class KnownCall:
    """A prepared call, and how to find its addresses.

    Attributes
    ----------
    call
        The launches.
    settings
        The settings it was checked under.
    q_rope_offset, kv_rope_offset
        Bytes from the latent to the rope columns of a packed array; 0 for pairs, or when there is no rope part.
    """

    call: DecodeCall
    settings: Settings
    q_rope_offset: int
    kv_rope_offset: int


_known: dict[Key, KnownCall] = {}


def identify(
    q: Any,
    kv_cache: Any,
    others: tuple[Any, Any, Any, Any, Any],
    kind: Blueprint | None,
    head_dim_v: Any,
    softmax_scale: Any,
    causal: Any,
    max_seqlen_q: Any,
    empty_lse: Any,
) -> tuple[Key, tuple[int, ...]] | None:
    """The key of a call and its arrays' addresses; None for a call that cannot be recognised.

    Parameters
    ----------
    q, kv_cache
        Arrays, or pairs (latent, rope).
    others
        block_table, cache_seqlens, cu_seqlens_q, out and lse; None for one not given.
    kind
        That of the plan; None without a plan.
    head_dim_v, softmax_scale, causal, max_seqlen_q, empty_lse
        Options as given.
    """
    # Python holds 1, 1.0 and True for equal; the checks do not.
    if (
        type(head_dim_v) is not int
        or type(causal) is not bool
        or type(empty_lse) is not float
        or (softmax_scale is not None and type(softmax_scale) is not float)
        or (max_seqlen_q is not None and type(max_seqlen_q) is not int)
    ):
        return None
    block_table, cache_seqlens, cu_seqlens_q, out, lse = others
    if out is not None and lse is not None and cu_seqlens_q is None:
        sketched = sketch_tensors(q, kv_cache, block_table, cache_seqlens, out, lse)
        if sketched is not None:
            (q_pointer, kv_pointer, table, lengths, out_pointer, lse_pointer), layouts = sketched
            return (
                (kind, head_dim_v, softmax_scale, causal, max_seqlen_q, empty_lse, *layouts),
                (q_pointer, 0, kv_pointer, 0, table, lengths, 0, out_pointer, lse_pointer),
            )
    q_parts = _parts(q)
    kv_parts = _parts(kv_cache)
    if q_parts is None or kv_parts is None:
        return None
    general = sketch((*q_parts, *kv_parts, *others))
    if general is None:
        return None
    pointers, all_layouts = general
    return (kind, head_dim_v, softmax_scale, causal, max_seqlen_q, empty_lse, *all_layouts), tuple(pointers)


def recall(key: Key, pointers: tuple[int, ...], settings: Settings) -> tuple[DecodeCall, Addresses] | None:
    """The call of that key, if one was made before under the same settings, and its addresses if they are aligned."""
    known = _known.get(key)
    if known is None or known.settings is not settings:
        return None
    q, q_rope, kv, kv_rope, table, lengths, starts, out, lse = pointers
    if (q | q_rope | kv | kv_rope | out) & _COPY_MASK or (table | lengths | starts | lse) & _INDEX_MASK:
        return None
    if known.q_rope_offset:
        q_rope = q + known.q_rope_offset
    if known.kv_rope_offset:
        kv_rope = kv + known.kv_rope_offset
    return known.call, (q, q_rope, kv, kv_rope, table, lengths, starts, out, lse)


def remember(key: Key, call: DecodeCall, settings: Settings, inputs: DecodeInputs, pointers: tuple[int, ...]) -> None:
    """Note a call that was checked and prepared; ``pointers`` are those that `identify` found."""
    if len(_known) >= _CALLS_KEPT:
        _known.clear()
    q_rope = inputs.q_rope.pointer - pointers[0] if inputs.q_rope is not None and not pointers[1] else 0
    kv_rope = inputs.kv_rope.pointer - pointers[2] if inputs.kv_rope is not None and not pointers[3] else 0
    _known[key] = KnownCall(call, settings, q_rope, kv_rope)


def _parts(argument: Any) -> tuple[Any, Any] | None:
    if not isinstance(argument, (tuple, list)):
        return argument, None
    return (argument[0], argument[1]) if len(argument) == 2 else None
