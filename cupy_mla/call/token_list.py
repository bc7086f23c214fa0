"""A cache and the tokens of it that the queries of a sparse call attend to: the checks of these arrays."""

from __future__ import annotations

from typing import NamedTuple

from ..arrays.frameworks import CUDA
from ..arrays.view import ArrayView, contiguous_strides
from ..errors import InvalidArgumentError
from ..layouts import DENSE_LAYOUTS, SPARSE_LAYOUTS, CacheLayout, find_layout, infer_layout
from .arguments import COPY_ALIGNMENT, settled_strides
from .problem import INDEX_DTYPE, MAX_TOKENS

# Strides of pages and tokens are 32-bit numbers of 16 bytes in the kernels.
CUDA_MAX_KV_STRIDE = COPY_ALIGNMENT * 2**32


class TokenListNames(NamedTuple):
    """What the caller calls the arrays of a list, and its layout."""

    kv: str
    indices: str = "indices"
    lengths: str = "topk_length"
    layout: str = "layout"


EXTRA_NAMES = TokenListNames("extra_kv_cache", "extra_indices", "extra_topk_length", "extra_layout")


class TokenList:
    """A cache with its indices and their lengths, as views; checked step by step.

    Attributes
    ----------
    names
        What errors call them.
    kv, indices, lengths
        The views; ``lengths`` may be None.
    layout
        Of the cache.

    Parameters
    ----------
    q
        The queries.
    layout
        The layout that is named, or None: what the cache's type and width mean.
    by_kernel
        Whether a kernel has to read the cache.

    Raises
    ------
    InvalidArgumentError
        There is no such layout, the cache leaves doubt which it has, or no kernel reads it.
    """

    def __init__(
        self,
        names: TokenListNames,
        q: ArrayView,
        kv: ArrayView,
        indices: ArrayView,
        lengths: ArrayView | None,
        layout: str | None,
        by_kernel: bool,
    ) -> None:
        self.names, self.kv, self.indices, self.lengths, self._q = names, kv, indices, lengths, q
        self.layout = self._find_layout(layout, by_kernel)

    def _find_layout(self, given: str | None, by_kernel: bool) -> CacheLayout:
        q, kv, names = self._q, self.kv, self.names
        if given is None and kv.dtype == q.dtype:
            return DENSE_LAYOUTS[q.dtype]
        coded = [dtype for layout in SPARSE_LAYOUTS for dtype in layout.dtypes if dtype not in DENSE_LAYOUTS]
        if given is None and kv.dtype not in coded:
            raise InvalidArgumentError(names.kv, f"{q.dtype}, the type of q", kv.dtype)
        if given is None:
            layout = infer_layout(kv.dtype, kv.shape[-1], names.kv, names.layout)
        else:
            layout = find_layout(given, names.layout)
        if layout not in SPARSE_LAYOUTS and by_kernel:
            expected = "a cache in the layout " + " or ".join(readable.name for readable in SPARSE_LAYOUTS)
            raise InvalidArgumentError(names.kv, expected, f"{layout.name}, which no kernel reads yet")
        return layout

    def check_keys(self, head_dim_v: int) -> None:
        """Whether q and the keys go together.

        Raises
        ------
        InvalidArgumentError
            A type or width differs, or the array is no cache of the layout.
        """
        q, kv, layout, width = self._q, self.kv, self.layout, self._q.shape[-1]
        if q.dtype not in layout.query_dtypes:
            expected = f"{' or '.join(layout.query_dtypes)} for a cache in the layout {layout.name}"
            raise InvalidArgumentError("q", expected, q.dtype)
        if layout in DENSE_LAYOUTS.values() and kv.shape[-1] != width:
            raise InvalidArgumentError(self.names.kv, f"width {width} as in q", str(kv.shape[-1]))
        if not 1 <= head_dim_v <= width:
            raise InvalidArgumentError("head_dim_v", f"1 to {width}, the width of q", str(head_dim_v))
        if not layout.supports(head_dim_v, width - head_dim_v):
            expected = f"a width that the layout {layout.name} has, of which head_dim_v are the value's"
            raise InvalidArgumentError("q", expected, f"{width}, with head_dim_v {head_dim_v}")
        layout.check(kv, self.names.kv, head_dim_v, width - head_dim_v)

    def indices_by_head(self, queries: tuple[int, ...]) -> ArrayView:
        """The indices with an axis of kv heads, given the shape of the query tokens. An array without serves all.

        Raises
        ------
        InvalidArgumentError
            They have another type, shape or order of elements.
        """
        indices, heads, name = self.indices, self.kv.shape[2], self.names.indices
        if indices.dtype != INDEX_DTYPE:
            raise InvalidArgumentError(name, INDEX_DTYPE, indices.dtype)
        if indices.shape[:-1] not in (queries, (*queries, heads)):
            shape, by_head = [*queries, "topk"], [*queries, heads, "topk"]
            raise InvalidArgumentError(name, f"shape {shape} or {by_head}", str(list(indices.shape)))
        if indices.shape[-1] > MAX_TOKENS:
            raise InvalidArgumentError(name, f"at most {MAX_TOKENS} of a query token", str(indices.shape[-1]))
        if indices.shape[-1] > 1 and indices.strides[-1] != 1:
            raise InvalidArgumentError(name, "a contiguous last dimension", f"strides {indices.strides}")
        if indices.ndim == len(queries) + 1:
            return with_axis(indices, len(queries), extent=heads)
        return settled(indices)

    def check_lengths(self, shapes: dict[tuple[int, ...], int]) -> int | None:
        """How many query tokens share a length: given the shapes it may have, and that for each; None without lengths.

        Raises
        ------
        InvalidArgumentError
            They have another type, shape or order of elements.
        """
        lengths, name = self.lengths, self.names.lengths
        if lengths is None:
            return None
        if lengths.dtype != INDEX_DTYPE:
            raise InvalidArgumentError(name, INDEX_DTYPE, lengths.dtype)
        if lengths.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise InvalidArgumentError(name, f"shape {expected}", str(list(lengths.shape)))
        check_contiguous(lengths, name)
        return shapes[lengths.shape]

    def arrays(self) -> list[tuple[str, ArrayView]]:
        """Those that are there, with their names; the cache first."""
        names = self.names
        named = [(names.kv, self.kv), (names.indices, self.indices), (names.lengths, self.lengths)]
        return [(name, array) for name, array in named if array is not None]

    def check_strides(self) -> None:
        """Refuse a cache whose strides kernels have no room for.

        Raises
        ------
        InvalidArgumentError
            Pages or tokens are too far apart.
        """
        for extent, step in zip(self.kv.shape[:2], self.kv.strides[:2], strict=True):
            if extent > 1 and step * self.kv.itemsize >= CUDA_MAX_KV_STRIDE:
                expected = f"pages and tokens less than {CUDA_MAX_KV_STRIDE} bytes apart"
                raise InvalidArgumentError(self.names.kv, expected, f"strides {self.kv.strides}")

    @property
    def page_size(self) -> int:
        """The page size as far as addresses depend on it: 1 where slots are equally far apart."""
        page_size = self.kv.shape[1]
        strides = settled_strides(self.kv)
        apart = self.layout.page_end_bytes > 0 or strides[0] != page_size * strides[1]
        return page_size if apart else 1


def check_contiguous(array: ArrayView, name: str) -> None:
    """Refuse an array whose elements do not lie one behind the other.

    Raises
    ------
    InvalidArgumentError
        They do not; ``argument`` is ``name``.
    """
    step = 1
    for extent, stride in zip(reversed(array.shape), reversed(array.strides), strict=True):
        if extent > 1 and stride != step:
            raise InvalidArgumentError(name, "a contiguous array", f"strides {array.strides}")
        step *= extent


def settled(array: ArrayView) -> ArrayView:
    """The same with strides that mean something along every axis."""
    return of_shape(array, array.shape, settled_strides(array))


def with_axis(array: ArrayView, axis: int, extent: int = 1) -> ArrayView:
    """A view with one more axis, along which nothing changes."""
    shape, strides = array.shape, settled_strides(array)
    return of_shape(array, (*shape[:axis], extent, *shape[axis:]), (*strides[:axis], 0, *strides[axis:]))


def of_shape(array: ArrayView, shape: tuple[int, ...], strides: tuple[int, ...]) -> ArrayView:
    """The same memory with another shape and other strides."""
    return ArrayView(array.pointer, shape, strides, array.dtype, array.device, array.device_id, array.owner)


def without_elements(array: ArrayView) -> ArrayView:
    """Strides of an array without elements may be anything: such an array with those of a contiguous one."""
    return of_shape(array, array.shape, contiguous_strides(array.shape)) if 0 in array.shape else array


def runs_kernels(array: ArrayView, strict: bool) -> bool:
    """Whether what a kernel asks for counts: on a GPU, and on the CPU where calls are strict."""
    return array.device == CUDA or strict
