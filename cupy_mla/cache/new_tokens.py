"""What an append writes and where to: its arguments, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..arrays import view as arrays
from ..arrays.frameworks import CUDA
from ..arrays.view import ArrayView
from ..call.arguments import misaligned
from ..call.options import APPEND_ROPES
from ..call.problem import SLOT_DTYPE
from ..errors import InvalidArgumentError
from ..gpu.device import require_backend
from ..layouts import CacheLayout
from .quantise import Quantiser, quantised_segments, settle_quantiser
from .segments import (
    Segment,
    check_chunks,
    check_last_contiguous,
    check_same_place,
    match_segments,
    view_pages,
    view_rows,
)

# The arrays of an append, the parts of a pair one by one.
APPEND_PARTS = (
    *(name for pair in APPEND_ROPES.items() for name in pair),
    *("slot_mapping", "block_table", "positions", "requests", "kv_scale"),
)


@dataclass(frozen=True, slots=True, eq=False)
class AppendArrays:
    """The arrays of an append as given: of any framework, or views; as in `cupy_mla.append_tokens`.

    ``kv_scale`` may be a number, or two.
    """

    kv_cache: Any
    kv_new: Any
    slot_mapping: Any = None
    block_table: Any = None
    positions: Any = None
    requests: Any = None
    kv_scale: Any = None


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens lie: a slot mapping, or a block table with positions (and requests).

    Without a slot mapping and positions the tokens are those of one request, in turn. Its pages are the one row of the
    block table, or without it all pages.
    """

    slot_mapping: ArrayView | None
    block_table: ArrayView | None
    positions: ArrayView | None
    requests: ArrayView | None
    tokens_per_request: int


def view_index(
    value: Any, name: str, dtype: str, shape: tuple[int | None, ...], cache: ArrayView, stream: int | None
) -> ArrayView:
    """View of an index array, whose shape has None for any size.

    Raises
    ------
    InvalidArgumentError
        It has another type, shape or device, gaps in its last dimension, or an address that is no multiple of its type;
        the error calls it ``name``.
    """
    view = arrays.view(value, name, stream)
    expected = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    fits = view.ndim == len(shape) and all(
        size is None or size == got for size, got in zip(shape, view.shape, strict=True)
    )
    if view.dtype != dtype or not fits:
        raise InvalidArgumentError(name, f"{dtype} {expected}", f"{view.dtype} {list(view.shape)}")
    check_same_place(view, name, cache)
    check_last_contiguous(view, name)
    if view.device == CUDA and view.pointer % view.itemsize:
        raise misaligned(name, view.pointer, view.itemsize)
    return view


@dataclass(frozen=True, slots=True)
class Append:
    """An append that was checked, or a read in the other direction.

    Attributes
    ----------
    caches, rows
        The cache and the tokens, or the two parts of each.
    segments
        What is moved; none where there is nothing to move.
    places
        Where in the cache.
    num_tokens
        How many rows.
    quantiser
        How they are rounded; None: they are copied as they are.
    reads
        Whether the rows are read from the cache, with what was rounded.
    """

    caches: list[ArrayView]
    rows: list[ArrayView]
    segments: list[Segment]
    places: Places
    num_tokens: int
    quantiser: Quantiser | None = None
    reads: bool = False

    @property
    def location(self) -> tuple[str, int]:
        """Device and its number, of all arrays."""
        return self.caches[0].location

    def parts(self) -> tuple[ArrayView | None, ...]:
        """One view for each of `APPEND_PARTS`, None for what is not there."""
        places = self.places
        scale = None if self.quantiser is None else self.quantiser.scale
        sides = [*self.caches, None][:2] + [*self.rows, None][:2]
        return *sides, places.slot_mapping, places.block_table, places.positions, places.requests, scale


def describe_append(given: AppendArrays, stream: int | None = None, layout: CacheLayout | str | None = None) -> Append:
    """Check the arrays of an append. Reads no array's contents.

    Raises
    ------
    InvalidArgumentError
        An array has a wrong rank, shape, type, device, strides or alignment, the cache cannot be written to, its layout
        is unknown or in doubt, or a scale is missing, out of place or no number above 0.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    cache_views = view_pages(given.kv_cache, stream, written=True)
    rows_views = view_rows(given.kv_new, stream)
    quantiser = settle_quantiser(cache_views, rows_views, given.kv_scale, layout, stream)
    if quantiser is None:
        segments = match_segments(cache_views, rows_views, cache_views[0].dtype)
    else:
        segments = quantised_segments(quantiser.layout, cache_views, rows_views)
    num_tokens = rows_views[0].shape[0]
    places = describe_places(cache_views[0], num_tokens, given, stream)
    if require_backend(*cache_views[0].location, "kv_cache"):
        check_chunks(segments)
    return Append(cache_views, rows_views, segments if num_tokens else [], places, num_tokens, quantiser)


def describe_places(cache: ArrayView, num_tokens: int, given: AppendArrays, stream: int | None) -> Places:
    """Where the tokens go.

    Raises
    ------
    InvalidArgumentError
        Both ways to say it are given or neither, or an index array has a wrong type, shape, device or strides.
    """
    if given.slot_mapping is not None:
        for name in ("block_table", "positions", "requests"):
            if getattr(given, name) is not None:
                raise InvalidArgumentError(name, "None beside slot_mapping", type(getattr(given, name)).__name__)
        slots = view_index(given.slot_mapping, "slot_mapping", SLOT_DTYPE, (num_tokens,), cache, stream)
        return Places(slots, None, None, None, 1)
    for name in ("block_table", "positions"):
        if getattr(given, name) is None:
            raise InvalidArgumentError(name, "an array (or slot_mapping instead)", "None")
    table = view_index(given.block_table, "block_table", "int32", (None, None), cache, stream)
    place = view_index(given.positions, "positions", "int32", (num_tokens,), cache, stream)
    if given.requests is not None:
        owner = view_index(given.requests, "requests", "int32", (num_tokens,), cache, stream)
        return Places(None, table, place, owner, 1)
    batch = table.shape[0]
    if num_tokens > 0 and (batch == 0 or num_tokens % batch != 0):
        raise InvalidArgumentError(
            "positions", f"a multiple of the batch of block_table, {batch} (or requests given)", str(num_tokens)
        )
    return Places(None, table, place, None, max(1, num_tokens // max(1, batch)))
