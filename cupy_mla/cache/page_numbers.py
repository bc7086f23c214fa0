"""Page numbers that calls on whole pages are given: as arrays, and what is right about their values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays.exchange import as_numpy
from ..arrays.frameworks import CUDA
from ..arrays.view import ArrayView
from ..errors import InvalidArgumentError
from ..settings import wants_validation
from .new_tokens import view_index

NO_PAGE = -1
Numbers = npt.NDArray[np.int64]


def view_numbers(numbers: Any, name: str, count: int | None, cache: ArrayView, stream: int | None) -> ArrayView | None:
    """A view of int32 [count] (None: of any length) on the cache's device; None for None.

    Raises
    ------
    InvalidArgumentError
        It has another type, shape, device, stride or alignment; the error calls it ``name``.
    """
    return None if numbers is None else view_index(numbers, name, "int32", (count,), cache, stream)


def read_numbers(numbers: ArrayView | None, count: int, stream: int | None = None) -> Numbers:
    """The numbers; 0, 1, 2, ... for None. Waits for a GPU."""
    return np.arange(count) if numbers is None else as_numpy(numbers, stream).astype(np.int64)


def check_numbers(
    numbers: ArrayView | None, name: str, pages: ArrayView, validate: bool | None, stream: int | None, *, written: bool
) -> None:
    """Read page numbers and refuse wrong ones, where that is asked for: `cupy_mla.settings.wants_validation`.

    Raises
    ------
    InvalidArgumentError
        One is neither a page of ``pages`` nor -1, or is there twice and written to; the error has its place.
    """
    if numbers is None or not wants_validation(validate, pages.device == CUDA):
        return
    found, num_pages = read_numbers(numbers, 0, stream), pages.shape[0]
    for index in np.flatnonzero((found < NO_PAGE) | (found >= num_pages))[:1]:
        expected = f"a page, 0 to {num_pages - 1}, or {NO_PAGE} for none"
        raise InvalidArgumentError(f"{name}[{index}]", expected, str(found[index]))
    if written:
        check_distinct(found, name)


def check_distinct(found: Numbers, name: str) -> None:
    """Refuse a page that is written to twice.

    Raises
    ------
    InvalidArgumentError
        A page other than -1 is there twice; the error has the place of the second, in ``name``.
    """
    kept = np.flatnonzero(found != NO_PAGE)
    _, first = np.unique(found[kept], return_index=True)
    for index in np.delete(kept, first)[:1]:
        raise InvalidArgumentError(f"{name}[{index}]", "each page once, as it is written to", f"{found[index]} again")
