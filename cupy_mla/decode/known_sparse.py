"""Sparse calls that were checked and prepared before, recognised as `known` does dense ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..arrays.dtypes import ITEM_SIZES
from ..arrays.sketch import Sketches
from ..call.arguments import COPY_ALIGNMENT
from ..call.memo import shared_memo
from ..call.problem import INDEX_DTYPE, PLAN_ALIGNMENT
from ..settings import Settings

_CALLS_KEPT = 4096
_COPIED = ("q", "kv", "kv_cache", "extra_kv_cache", "out")  # read or written 16 bytes at once
_Call = TypeVar("_Call")


@dataclass(frozen=True, slots=True)
class Recognised(Generic[_Call]):
    """What tells a call from others, and what is known of it.

    Attributes
    ----------
    key
        All that its checks and its kernels depend on but addresses.
    addresses
        Of its arrays, 0 for one that is not there.
    call
        What was remembered of such calls; None: nothing, or an address is misaligned.
    """

    key: tuple[Any, ...]
    addresses: tuple[int, ...]
    call: _Call | None


class KnownCalls(Generic[_Call]):
    """Prepared calls of one function.

    Parameters
    ----------
    arrays
        Names of the function's arrays, in the order in which calls bring them.
    """

    def __init__(self, arrays: tuple[str, ...]) -> None:
        self._sketches = Sketches()
        self._known = shared_memo(_CALLS_KEPT)
        alignments = dict.fromkeys(_COPIED, COPY_ALIGNMENT) | {"plan": PLAN_ALIGNMENT}
        self._masks = tuple(alignments.get(name, ITEM_SIZES[INDEX_DTYPE]) - 1 for name in arrays)

    def find(
        self, arrays: tuple[Any, ...], options: tuple[Any, ...], kind: Any, settings: Settings
    ) -> Recognised[_Call] | None:
        """What is known of a call, by its arrays, options and plan's kind; None for one that cannot be recognised."""
        sketched = self._sketches.sketch(arrays, options)
        if sketched is None:
            return None
        addresses, sketcher, forms = sketched
        key = sketcher, kind, options, forms  # types first: only values of equal types are compared
        try:
            known = self._known.get(key)
        except TypeError:  # an option that is no number and cannot be hashed
            return None
        call = None
        if known is not None and known[1] is settings:
            aligned = not any(address & mask for address, mask in zip(addresses, self._masks, strict=True))
            call = known[0] if aligned else None
        return Recognised(key, addresses, call)

    def remember(self, recognised: Recognised[_Call], call: _Call, settings: Settings) -> None:
        """Note a call that was checked and prepared under these settings."""
        self._known.keep(recognised.key, (call, settings))
