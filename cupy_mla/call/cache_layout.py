"""The layout of a paged cache: the one that is named, or what its type and width mean."""

from __future__ import annotations

from collections.abc import Sequence

from ..arrays.view import ArrayView
from ..errors import InvalidArgumentError
from ..layouts import DENSE_LAYOUTS, LAYOUTS, CacheLayout, find_layout, infer_layout

_OF_FEWER_BITS = tuple(layout for layout in LAYOUTS.values() if layout not in DENSE_LAYOUTS.values())


def layout_of(kv: Sequence[ArrayView], q_dtype: str, named: str | None) -> CacheLayout:
    """The layout of a cache, or of its two parts, beside queries of a 16-bit type; that of this type if nothing else is
    meant. Whether the cache is one of it is not looked at but for a layout that is named.

    Raises
    ------
    InvalidArgumentError
        There is no layout of that name, it does not go with the cache's type or with a pair, or none is named and the
        cache may have either of two.
    """
    dtype, width = kv[0].dtype, kv[0].shape[-1]
    if named is not None:
        layout = find_layout(named)
        if not layout.has_columns and len(kv) == 2:
            raise InvalidArgumentError("kv_cache", f"one array for the layout {layout.name}", "a pair")
        if layout in _OF_FEWER_BITS and dtype not in layout.dtypes:
            expected = f"{' or '.join(layout.dtypes)} for the layout {layout.name}"
            raise InvalidArgumentError("kv_cache", expected, dtype)
        return layout
    fitting = [other for other in _OF_FEWER_BITS if other.fits(dtype, width) and (other.has_columns or len(kv) == 1)]
    if len(fitting) > 1:
        return infer_layout(dtype, width)  # says that it must be named
    return fitting[0] if fitting else DENSE_LAYOUTS[q_dtype]
