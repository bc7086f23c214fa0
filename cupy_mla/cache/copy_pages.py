"""Copying pages of a cache, within it or from another one: for copy-on-write, shared prefixes, defragmentation.

One kernel launch on a Hopper GPU (kernels_cu/cache/copy_pages.cu), NumPy indexing on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays.exchange import as_numpy, keep_imported
from ..arrays.frameworks import CUDA, check_stream
from ..arrays.view import ArrayView
from ..call.arguments import as_boolean, settled_strides
from ..errors import InvalidArgumentError
from ..gpu.device import require_backend
from ..kernels.copy_pages import UNIT_TYPES, copy_pages_blocks, copy_pages_geometry, copy_pages_source
from ..kernels.structs import COPY_PAGES_PARAMS
from ..settings import wants_validation
from .page_numbers import Numbers, check_numbers, read_numbers, view_numbers
from .segments import check_same_place, parts_of, stream_of, view_pages

_INT32_MAX = 2**31 - 1


def copy_pages(
    kv_cache: Any,
    source_pages: Any = None,
    target_pages: Any = None,
    *,
    source: Any = None,
    validate: bool | None = None,
    stream: int | None = None,
) -> None:
    """Copy pages of a paged KV cache, in place: page ``source_pages[i]`` to page ``target_pages[i]``.

    Bytes move as they are, whatever the layout. With both numbers pages move within a cache, or from ``source`` to it;
    without ``target_pages`` they are gathered into the pages of ``kv_cache`` in turn, without ``source_pages`` those of
    ``source`` are scattered; without either all are copied.

    Parameters
    ----------
    kv_cache
        [num_pages, page_size, num_heads_kv, width], or the pair (latent, rope) of such arrays; it is written to. Any
        element type, page size and strides; pages without gaps that are multiples of 16 bytes are fastest.
    source_pages, target_pages
        int32 [n]. A copy of which one is no page (-1 says so on purpose) is left out. Of two copies to one page either
        may stay, and a page that is copied from must not be copied to by the same call.
    source
        Where to copy from: as ``kv_cache``, but for the number of pages. None: ``kv_cache`` itself.
    validate
        Whether page numbers are read and checked, which waits for the GPU. None: on the CPU, or if CUPY_MLA_VALIDATE
        says so.
    stream
        Raw CUDA stream; the current stream of the framework of ``kv_cache`` if not given.

    Raises
    ------
    InvalidArgumentError
        An argument of the wrong rank, shape, type, device, strides or alignment, a cache that cannot be written to, or
        page numbers that validation found wrong. Nothing is written then.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    check_stream(stream)
    if validate is not None:
        validate = as_boolean(validate, "validate")
    if stream is None:
        stream = stream_of(*parts_of(kv_cache, "kv_cache")[0])
    copies = describe_copies(CopyArrays(kv_cache, source_pages, target_pages, source), stream)
    run_copies(copies, validate, stream)
    if stream is not None:
        keep_imported((*copies.sources, copies.source_pages, copies.target_pages), stream)


@dataclass(frozen=True, slots=True, eq=False)
class CopyArrays:
    """The arrays of a call as given: of any framework, or views."""

    kv_cache: Any
    source_pages: Any = None
    target_pages: Any = None
    source: Any = None


@dataclass(frozen=True, slots=True)
class PageCopies:
    """Copies that were checked.

    Attributes
    ----------
    targets, sources
        What is written to and read, or the two parts of each.
    target_pages, source_pages
        [num_copies] page numbers; None: 0, 1, 2, ...
    in_place
        Whether the two are one cache.
    """

    targets: list[ArrayView]
    sources: list[ArrayView]
    target_pages: ArrayView | None
    source_pages: ArrayView | None
    num_copies: int
    in_place: bool


def describe_copies(given: CopyArrays, stream: int | None = None) -> PageCopies:
    """Check the arrays of a call. Reads no array's contents.

    Raises
    ------
    InvalidArgumentError
        An array is missing, has a wrong rank, shape, type, device, strides or alignment, or is to be written to and
        cannot be.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    targets = view_pages(given.kv_cache, stream, written=True)
    in_place = given.source is None
    if in_place:
        for name, numbers in (("source_pages", given.source_pages), ("target_pages", given.target_pages)):
            if numbers is None:
                raise InvalidArgumentError(name, "int32 [n] within one cache (or another one as source)", "None")
    sources = targets if in_place else view_pages(given.source, stream, "source", written=False)
    _check_alike(targets, sources)
    source_pages = view_numbers(given.source_pages, "source_pages", None, targets[0], stream)
    count = None if source_pages is None else source_pages.shape[0]
    target_pages = view_numbers(given.target_pages, "target_pages", count, targets[0], stream)
    numbers = source_pages or target_pages
    num_copies = targets[0].shape[0] if numbers is None else numbers.shape[0]
    for name, views, own in (("kv_cache", targets, target_pages), ("source", sources, source_pages)):
        if own is None and views[0].shape[0] != num_copies:
            what = "kv_cache" if numbers is None else "source_pages" if own is target_pages else "target_pages"
            raise InvalidArgumentError(name, f"{num_copies} pages, as {what}", str(views[0].shape[0]))
    if require_backend(*targets[0].location, "kv_cache"):
        for target, source in zip(targets, sources, strict=True):
            _, _, page_units, _ = _page_form(target, source)
            if page_units > _INT32_MAX or num_copies * copy_pages_blocks(page_units) > _INT32_MAX:
                raise InvalidArgumentError("kv_cache", "fewer or smaller pages at once", str(list(target.shape)))
    return PageCopies(targets, sources, target_pages, source_pages, num_copies, in_place)


def _check_alike(targets: list[ArrayView], sources: list[ArrayView]) -> None:
    if len(sources) != len(targets):
        words = ("an array", "a pair (latent, rope)")
        raise InvalidArgumentError("source", f"{words[len(targets) - 1]}, as kv_cache", words[len(sources) - 1])
    for index, (target, source) in enumerate(zip(targets, sources, strict=True)):
        name = "source" if len(sources) == 1 else f"source[{index}]"
        check_same_place(source, name, targets[0])
        check_same_place(target, "kv_cache[1]", targets[0])
        if (source.dtype, source.shape[1:]) != (target.dtype, target.shape[1:]):
            expected = f"{target.dtype} [num_pages, {', '.join(map(str, target.shape[1:]))}], as kv_cache"
            raise InvalidArgumentError(name, expected, f"{source.dtype} {list(source.shape)}")


def run_copies(copies: PageCopies, validate: bool | None, stream: int | None) -> None:
    """Do what was checked; on a GPU on a stream.

    Raises
    ------
    InvalidArgumentError
        Page numbers that validation found wrong.
    """
    target, source = copies.targets[0], copies.sources[0]
    check_numbers(copies.target_pages, "target_pages", target, validate, stream, written=True)
    check_numbers(copies.source_pages, "source_pages", source, validate, stream, written=False)
    on_gpu = target.device == CUDA
    if copies.in_place and wants_validation(validate, on_gpu):
        _check_not_written(copies, stream)
    if copies.num_copies == 0 or 0 in target.shape:
        return
    if not on_gpu:
        _copy_numpy(copies)
        return
    from ..gpu.jit.module import load  # what reaches the driver is only loaded for arrays that are on a GPU
    from ..gpu.launch import launch_kernel

    for target, source in zip(copies.targets, copies.sources, strict=True):
        if target.shape[-1] == 0:
            continue
        params, unit_bytes = pack_copies(copies, target, source)
        geometry = copy_pages_geometry(copies.num_copies, int(params["page_units"][0]))
        kernel = load(copy_pages_source(unit_bytes), target.device_id)
        launch_kernel(kernel, geometry.grid, geometry.block, geometry.shared_memory, stream or 0, (params,))


def _check_not_written(copies: PageCopies, stream: int | None) -> None:
    """Refuse copies within a cache whose source is also a target."""
    to, come_from = _read_pairs(copies, stream)
    for page in come_from[np.isin(come_from, to[to != come_from])][:1]:
        index = np.flatnonzero(read_numbers(copies.source_pages, 0, stream) == page)[0]
        raise InvalidArgumentError(f"source_pages[{index}]", "a page that no copy of the call goes to", str(page))


def _read_pairs(copies: PageCopies, stream: int | None = None) -> tuple[Numbers, Numbers]:
    """Targets and sources of the copies of which both are pages."""
    to = read_numbers(copies.target_pages, copies.num_copies, stream)
    come_from = read_numbers(copies.source_pages, copies.num_copies, stream)
    kept = (to >= 0) & (to < copies.targets[0].shape[0]) & (come_from >= 0) & (come_from < copies.sources[0].shape[0])
    return to[kept], come_from[kept]


def _copy_numpy(copies: PageCopies) -> None:
    to, come_from = _read_pairs(copies)
    for target, source in zip(copies.targets, copies.sources, strict=True):
        as_numpy(target)[to] = as_numpy(source)[come_from]


def pack_copies(copies: PageCopies, target: ArrayView, source: ArrayView) -> tuple[npt.NDArray[np.void], int]:
    """The kernel's by-value parameter for one part of the cache, of type ``COPY_PAGES_PARAMS``; and bytes of a unit."""
    unit, row_units, page_units, heads = _page_form(target, source)
    params = np.zeros(1, COPY_PAGES_PARAMS)
    sides = ("target", target, copies.target_pages), ("source", source, copies.source_pages)
    for name, pages, numbers in sides:
        side = params[name]
        side["pages"], side["numbers"] = pages.pointer, 0 if numbers is None else numbers.pointer
        page, token, head, _ = (step * pages.itemsize for step in settled_strides(pages))
        side["page_stride"], side["token_stride"], side["head_stride"] = page, token, head
        side["num_pages"] = pages.shape[0]
    params["num_heads_kv"], params["row_units"], params["page_units"] = heads, row_units, page_units
    params["blocks_per_page"] = copy_pages_blocks(page_units)
    return params, unit


def _page_form(target: ArrayView, source: ArrayView) -> tuple[int, int, int, int]:
    """Bytes of a unit, units of a row that is contiguous on both sides and of a page, and how many rows a token has."""
    _, page_size, heads, width = target.shape
    row = width * target.itemsize
    steps = [[step * pages.itemsize for step in settled_strides(pages)] for pages in (target, source)]
    sizes = [target.pointer, source.pointer, *(page for page, *_ in steps)]
    if all(head == row for _, _, head, _ in steps):
        row, heads = row * heads, 1
        if all(token == row for _, token, _, _ in steps):
            row, page_size = row * page_size, 1
    if heads > 1:
        sizes += [head for _, _, head, _ in steps]
    if page_size > 1:
        sizes += [token for _, token, _, _ in steps]
    unit = math.gcd(max(UNIT_TYPES), row, *sizes)
    return unit, row // unit, page_size * heads * row // unit, heads
