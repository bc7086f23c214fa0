"""Whether arrays are like those of an earlier call, in a few hundred nanoseconds each.

A sketch is an array's address and its *form*: shape, strides, element type and device, as its framework says them. A
form is only good for comparing. An array whose form equals that of one that `arrays.view` has found good is good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .view import view

Form = tuple[Any, ...]


def _sketch_torch(tensor: Any) -> tuple[int, Form]:
    # Of contiguous tensors the strides follow from the shape, but for axes of one element, where they mean nothing.
    return tensor.data_ptr(), (tensor.shape, tensor.is_contiguous() or tensor.stride(), tensor.dtype, tensor.device)


def _sketch_cupy(array: Any) -> tuple[int, Form]:
    memory = array.data
    return memory.ptr, (array.shape, array.strides, array.dtype, memory.device_id)


# By module and name, as no framework is imported here. Subclasses may mean anything by their attributes: not these.
_SKETCHER_OF_TYPE: dict[tuple[str, str], Callable[[Any], tuple[int, Form]]] = {
    ("torch", "Tensor"): _sketch_torch,
    ("torch.nn.parameter", "Parameter"): _sketch_torch,
    ("cupy", "ndarray"): _sketch_cupy,
}


class _Sketchers(dict[type, Callable[[Any], tuple[int, Form]]]):
    """Sketchers by type, found the first time that a type comes. KeyError: only `arrays.view` can read it."""

    def __missing__(self, array_type: type) -> Callable[[Any], tuple[int, Form]]:
        sketcher = self[array_type] = _SKETCHER_OF_TYPE[array_type.__module__, array_type.__name__]
        return sketcher


_SKETCHERS = _Sketchers()


def sketch(arrays: Iterable[Any]) -> tuple[list[int], list[Any]] | None:
    """Addresses, and everything else that `view` would say, in a form that is only good for comparing.

    Takes half the time of `view`, and checks nothing: an array of the form of one found good is good.

    Parameters
    ----------
    arrays
        Arrays, or None for one that is not there.

    Returns
    -------
    (list of int, list) or None
        For each array its address (0 if not there), and the forms of all, one behind the other. None when there is
        an array that only `view` can read, or that has no memory.
    """
    pointers: list[int] = []
    forms: list[Any] = []
    try:
        for array in arrays:
            if array is None:
                pointers.append(0)
                forms.append(None)
                continue
            pointer, form = _SKETCHERS[type(array)](array)
            if not pointer:
                return None
            pointers.append(pointer)
            forms += form
    except Exception:  # no sketcher, or a tensor without memory; `view` finds the words
        return None
    return pointers, forms


def sketch_tensors(a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> tuple[tuple[int, ...], tuple[Any, ...]] | None:
    """`sketch` of six torch tensors: what decoding with given outputs takes, and so written out that it takes 2 us.

    Returns
    -------
    (tuple of int, tuple) or None
        Addresses and forms as `sketch` gives them. None unless all are torch tensors with memory.
    """
    kind = type(a)
    if not (kind is type(b) is type(c) is type(d) is type(e) is type(f)):
        return None
    try:
        if _SKETCHERS[kind] is not _sketch_torch:
            return None
        pointers = a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr(), e.data_ptr(), f.data_ptr()
        if 0 in pointers:
            return None
        return pointers, (
            a.shape, a.is_contiguous() or a.stride(), a.dtype, a.device,
            b.shape, b.is_contiguous() or b.stride(), b.dtype, b.device,
            c.shape, c.is_contiguous() or c.stride(), c.dtype, c.device,
            d.shape, d.is_contiguous() or d.stride(), d.dtype, d.device,
            e.shape, e.is_contiguous() or e.stride(), e.dtype, e.device,
            f.shape, f.is_contiguous() or f.stride(), f.dtype, f.device,
        )  # fmt: skip
    except Exception:  # no tensors, or one without memory; `view` finds the words
        return None


def pointer_of(array: Any) -> int:
    """Address of an array's first element.

    Raises
    ------
    InvalidArgumentError
        The object cannot be read as an array, for the reasons that `view` names.
    """
    sketcher = _SKETCHERS.get(type(array))
    return view(array, "array").pointer if sketcher is None else sketcher(array)[0]
