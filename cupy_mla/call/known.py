"""Calls that were checked and prepared before: an engine makes the same one for every layer of every step.

A call is recognised by all that its checks and its kernels depend on but addresses: shapes, strides, types and devices
of its arrays, its options, its plan's kind. What is left to check then is the alignment of the addresses. Nothing here
keeps an array alive or depends on what lies at an address.
"""

from __future__ import annotations

from typing import Any, Generic, TypeAlias, TypeVar

from ..arrays.dtypes import ITEM_SIZES
from ..arrays.repeated import Recogniser, misaligned, recognise_nothing, recogniser_of
from ..arrays.sketch import Sketches
from ..settings import Settings
from .arguments import COPY_ALIGNMENT
from .memo import on_forget, shared_memo
from .problem import INDEX_DTYPE, PLAN_ALIGNMENT, SLOT_DTYPE

_CALLS_KEPT = 4096
_REPEATS = 6  # calls like one another until there is a recogniser, which takes as long to make as it saves in so many
# Read or written 16 bytes at once.
_COPIED = ("q", "q_rope", "kv", "kv_cache", "kv_rope", "extra_kv_cache", "kv_new", "kv_new_rope", "out")
_ALIGNMENTS = {
    **dict.fromkeys(_COPIED, COPY_ALIGNMENT),
    "plan": PLAN_ALIGNMENT,
    "slot_mapping": ITEM_SIZES[SLOT_DTYPE],
}
_Call = TypeVar("_Call")
Key: TypeAlias = tuple[Any, ...]
Addresses: TypeAlias = tuple[int, ...]


class KnownCalls(Generic[_Call]):
    """Prepared calls of one function.

    Parameters
    ----------
    arrays
        Names of what has an address, in the order in which calls bring them; the parts of a pair one by one.
    pairs
        How many of the first arrays may be a tuple of two instead.
    """

    def __init__(self, arrays: tuple[str, ...], pairs: int = 0) -> None:
        self._sketches = Sketches(pairs)
        self._calls = shared_memo(_CALLS_KEPT)
        self._last: tuple[Key, tuple[_Call, Settings] | None] = (), None  # the call before
        self._count = 0  # of calls like it that `_recognise` did not know
        self._recognise: Recogniser = recognise_nothing
        on_forget(self._forget_last)
        masks = {name: _ALIGNMENTS.get(name, ITEM_SIZES[INDEX_DTYPE]) - 1 for name in arrays}
        self._masks = tuple(masks.values())
        self._misaligned = eval(f"lambda {', '.join(arrays)}: {misaligned(masks)}")

    def _forget_last(self) -> None:
        self._last = (), None
        self._recognise = recognise_nothing

    def find(
        self, arrays: tuple[Any, ...], options: tuple[Any, ...], kind: Any, settings: Settings
    ) -> tuple[Key, Addresses, _Call | None] | None:
        """What is known of a call; None for one that cannot be recognised.

        Parameters
        ----------
        arrays
            As given; None for one that is not there.
        options
            As given, in an order of the caller's own.
        kind
            That of the plan; None without a plan, or with one in an array.
        settings
            Those in force.

        Returns
        -------
        tuple or None
            What tells the call from others; the addresses of its arrays, 0 for one that is not there; and what was
            remembered of such calls under the same settings: None where that is nothing, or an address is misaligned.
        """
        found = self._recognise(arrays, options, kind, settings)
        if found is not None:
            return found
        self._recognise = recognise_nothing  # what comes now may be repeated
        sketched = self._sketches.sketch(arrays, options)
        if sketched is None:
            return None
        addresses, sketcher, forms = sketched
        key = sketcher, kind, options, forms  # types first: only values of equal types are compared
        last_key, known = self._last
        self._count += 1
        if key != last_key:  # a step makes the same call for all layers; to compare takes half the time of to hash
            try:
                known = self._calls.get(key)
            except TypeError:  # an option that is no number and cannot be hashed
                return None
            self._count = 0
            if known is not None:
                self._last = key, known
        if known is None or known[1] is not settings or self._misaligned(*addresses):
            return key, addresses, None
        if self._count >= _REPEATS:
            self._recognise = recogniser_of(sketcher, self._masks, (arrays, options, kind, settings), (key, known[0]))
            self._count = 0
        return key, addresses, known[0]

    def remember(self, key: Key, call: _Call, settings: Settings) -> None:
        """Note a call that was checked and prepared under these settings; the key is the one that `find` gave."""
        self._last = key, self._calls.keep(key, (call, settings))
