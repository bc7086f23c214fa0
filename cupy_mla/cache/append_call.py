"""Appends on a GPU, and reads: everything about a call but its addresses, packed once and launched for every layer."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays.view import ArrayView
from ..gpu.jit.module import load
from ..gpu.jit.source import KernelSource
from ..gpu.launch import Launch
from ..kernels.append import (
    CHUNK_BYTES,
    append_geometry,
    append_source,
    dequantise_source,
    quantise_source,
)
from ..kernels.structs import APPEND_PARAMS, BLOCKS_PARAMS
from .new_tokens import Append, Places
from .quantise import pack_quantiser
from .segments import Segment

_POINTER = np.dtype(np.uint64)


class AppendCall:
    """The launch of one kind of append; keeps no array alive, and is right for any memory with the same strides.

    Attributes
    ----------
    device_id : int
        The GPU.

    Parameters
    ----------
    append
        A checked append of that kind.
    """

    def __init__(self, append: Append) -> None:
        self.device_id = append.location[1]
        geometry, source = append_geometry(append.num_tokens), _source(append)
        params, self._addresses = pack_append(append)
        self._words = params.view(_POINTER).data
        self._lock = threading.Lock()  # the packed arguments are shared by all threads
        self._launch = Launch(
            load(source, self.device_id), geometry.grid, geometry.block, geometry.shared_memory, (params,)
        )

    def __call__(self, addresses: tuple[int, ...], stream: int) -> None:
        """Queue the kernel, given the address of each of `APPEND_PARTS`; 0 for one that is not there.

        Raises
        ------
        DriverError
            The driver refused the launch.
        """
        words = self._words
        with self._lock:
            for word, part, offset in self._addresses:
                words[word] = addresses[part] + offset
            self._launch(stream)


def _source(append: Append) -> KernelSource:
    dtype, quantiser = append.rows[0].dtype, append.quantiser
    widths = [segment.width * segment.rows.itemsize for segment in append.segments]
    first, second = (width // CHUNK_BYTES for width in (*widths, 0)[:2])
    if quantiser is None:
        return append_source((first, second))
    make_source = dequantise_source if append.reads else quantise_source
    return make_source(dtype, quantiser.layout, (first, second))


def pack_append(append: Append) -> tuple[npt.NDArray[np.void], list[tuple[int, int, int]]]:
    """The kernel's by-value parameter, and where addresses stand in it.

    Returns
    -------
    params
        An array of size one and type ``APPEND_PARAMS``, or ``BLOCKS_PARAMS`` where rows are rounded.
    addresses
        For each address: its word of ``params``, which of `APPEND_PARTS` it is in, and how many bytes from its first.
    """
    params = np.zeros(1, APPEND_PARAMS if append.quantiser is None else BLOCKS_PARAMS)
    fields, parts = params[0], append.parts()
    for packed, segment in zip(fields["segments"], append.segments, strict=False):
        _pack_segment(packed, segment)
    _pack_places(fields["places"], append.places, append.caches[0], append.num_tokens)
    if append.quantiser is not None:
        pack_quantiser(fields, append.quantiser, append.segments)
    in_parts: dict[str, ArrayView | None] = {}
    for index, segment in enumerate(append.segments):
        in_parts |= {f"segments/{index}/cache": segment.cache, f"segments/{index}/rows": segment.rows}
    for name in ("slot_mapping", "block_table", "positions", "requests"):
        in_parts[f"places/{name}"] = getattr(append.places, name)
    if append.quantiser is not None:
        in_parts["kv_scales/0"] = in_parts["kv_scales/1"] = append.quantiser.scale
        in_parts["scales"] = append.caches[0] if fields["scales"] else None
    addresses = []
    for path, view in in_parts.items():
        if view is not None:
            part = next(index for index, other in enumerate(parts) if other is view)
            word = _word_of(params.dtype, path)
            addresses.append((word, part, int(params.view(_POINTER)[word]) - view.pointer))
    return params, addresses


def _word_of(dtype: np.dtype[Any], path: str) -> int:
    """Which word of 8 bytes a field is, e.g. "segments/1/rows"."""
    offset = 0
    for step in path.split("/"):
        if step.isdigit():
            dtype = dtype.base
            offset += int(step) * dtype.itemsize
        else:
            assert dtype.fields is not None
            dtype, place = dtype.fields[step][:2]
            offset += place
    return offset // _POINTER.itemsize


def _pack_segment(packed: Any, segment: Segment) -> None:
    cache, rows = segment.cache, segment.rows
    packed["cache"] = cache.pointer + segment.cache_column * cache.itemsize
    packed["rows"] = rows.pointer + segment.rows_column * rows.itemsize
    packed["cache_page_stride"] = cache.strides[0] * cache.itemsize
    packed["cache_token_stride"] = segment.token_bytes
    packed["cache_head_stride"] = cache.strides[2] * cache.itemsize
    for name, stride in zip(("token", "head"), rows.strides[:2], strict=True):
        packed[f"rows_{name}_stride"] = stride * rows.itemsize


def _pack_places(packed: Any, places: Places, cache: ArrayView, num_tokens: int) -> None:
    for name in ("slot_mapping", "block_table", "positions", "requests"):
        view: ArrayView | None = getattr(places, name)
        packed[name] = 0 if view is None else view.pointer
    if places.block_table is not None:
        packed["block_table_stride"] = places.block_table.strides[0]
        packed["num_requests"], packed["max_pages_per_seq"] = places.block_table.shape
    elif places.slot_mapping is None:
        packed["num_requests"], packed["max_pages_per_seq"] = 1, cache.shape[0]
    packed["num_pages"], packed["page_size"], packed["num_heads_kv"] = cache.shape[:3]
    packed["num_tokens"] = num_tokens
    packed["tokens_per_request"] = places.tokens_per_request
