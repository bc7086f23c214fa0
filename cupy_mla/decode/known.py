"""Calls that were checked and prepared before: an engine makes the same one for every layer of every step.

A call is recognised by all that its checks and its kernels depend on but addresses: shapes, strides, types and devices
of its arrays, its options, its plan's kind. What is left to check then is the alignment of the addresses. Nothing here
keeps an array alive or depends on what lies at an address.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..arrays.dtypes import ITEM_SIZES
from ..arrays.sketch import Sketches
from ..call.arguments import COPY_ALIGNMENT
from ..call.memo import on_forget, shared_memo
from ..call.options import ROPE_OF
from ..call.problem import INDEX_DTYPE, PLAN_ALIGNMENT, DecodeInputs
from ..settings import Settings
from .blueprint import DenseBlueprint
from .prepared import DecodeCall

_CALLS_KEPT = 4096
_COPY_MASK = COPY_ALIGNMENT - 1
_INDEX_MASK = ITEM_SIZES[INDEX_DTYPE] - 1  # an lse and a scale have as many bytes
_PLAN_MASK = PLAN_ALIGNMENT - 1
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


_sketches = Sketches(pairs=len(ROPE_OF))  # q and kv_cache, the first arrays of a call
_known = shared_memo(_CALLS_KEPT)
_last: tuple[Key, KnownCall | None] = (), None  # the call before


@on_forget
def _forget_last() -> None:
    global _last
    _last = (), None


def identify(
    arrays: tuple[Any, ...], options: tuple[Any, ...], kind: DenseBlueprint | None
) -> tuple[Key, tuple[int, ...]] | None:
    """The key of a call and its arrays' addresses; None for a call that cannot be recognised.

    Parameters
    ----------
    arrays
        As given, one for each of `cupy_mla.call.options.ARRAYS`.
    options
        As given, in an order of the caller's own.
    kind
        That of the plan; None without a plan, or with one in an array.
    """
    sketched = _sketches.sketch(arrays, options)
    if sketched is None:
        return None
    pointers, sketcher, forms = sketched
    return (sketcher, kind, options, forms), pointers  # types first: only values of equal types are compared


def recall(key: Key, pointers: tuple[int, ...], settings: Settings) -> tuple[DecodeCall, tuple[int, ...]] | None:
    """The call of that key, if one was made before under the same settings, and its addresses if they are aligned.

    The addresses are in the order of `Addresses`, without their names: to name them takes longer than to find them.
    """
    global _last
    last_key, known = _last
    if key != last_key:  # a step makes the same call for all layers, and to compare takes half the time of to hash
        try:
            known = _known.get(key)
        except TypeError:  # an option that is no number and cannot be hashed
            return None
        if known is not None:
            _last = key, known
    if known is None or known.settings is not settings:
        return None
    q, q_rope, kv, kv_rope, table, lengths, starts, scale, plan, out, lse = pointers
    index_bits = table | lengths | starts | scale | lse
    if (q | q_rope | kv | kv_rope | out) & _COPY_MASK or index_bits & _INDEX_MASK or plan & _PLAN_MASK:
        return None
    if known.q_rope_offset:
        q_rope = q + known.q_rope_offset
    if known.kv_rope_offset:
        kv_rope = kv + known.kv_rope_offset
    return known.call, (q, q_rope, kv, kv_rope, table, lengths, starts, scale, plan, out, lse)


def remember(key: Key, pointers: tuple[int, ...], call: DecodeCall, settings: Settings, inputs: DecodeInputs) -> None:
    """Note a call that was checked and prepared; ``pointers`` are those that `identify` found."""
    q_rope = inputs.q_rope.pointer - pointers[0] if inputs.q_rope is not None and not pointers[1] else 0
    kv_rope = inputs.kv_rope.pointer - pointers[2] if inputs.kv_rope is not None and not pointers[3] else 0
    global _last
    _last = key, _known.keep(key, KnownCall(call, settings, q_rope, kv_rope))
