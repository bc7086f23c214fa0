"""Whether arrays are like those of an earlier call, in a few hundred nanoseconds each.

A sketch is an array's address and its *form*: shape, strides, element type and device, as its framework says them. A
form is only good for comparing. An array whose form equals that of one that `arrays.view` has found good is good.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

from .view import view

# Expressions of an array ``a``: its address, and its form. By module and name, as no
# framework is imported here. Subclasses may mean anything by their attributes: not these.
_TORCH = (
    "{a}.data_ptr()",
    # Of contiguous tensors the strides follow from the shape, but for axes of one element, where they mean nothing. The
    # number of the device (-1: the CPU) says which it is: torch has one kind of accelerator in a process.
    "{a}.shape, {a}.is_contiguous() or {a}.stride(), {a}.dtype, {a}.get_device()",
)
_EXPRESSIONS: dict[tuple[str, str], tuple[str, str]] = {
    ("torch", "Tensor"): _TORCH,
    ("torch.nn.parameter", "Parameter"): _TORCH,
    ("cupy", "ndarray"): ("{a}.data.ptr", "{a}.shape, {a}.strides, {a}.dtype, {a}.data.device_id"),
    ("builtins", "NoneType"): ("0", "None"),
    # A number in the place of an array has no address, and is part of what a call is.
    ("builtins", "float"): ("0", "{a}"),
}
_NO_ARRAYS = (NoneType, float)
# The type of an array, or of the arrays of a pair.
_Type = Any


class Sketcher:
    """Sketches the arrays of calls whose arrays and other arguments are of certain types.

    Attributes
    ----------
    of_arrays
        Given the arrays: their addresses, and their forms one behind the other. One expression, as that takes half the
        time of a loop. None where there is an array that only `view` can read.
    not_there
        How many of the addresses are 0 because there is no array.
    """

    __slots__ = ("not_there", "of_arrays")

    def __init__(self, types: tuple[_Type, ...], pairs: int) -> None:
        self.of_arrays: Callable[..., tuple[tuple[int, ...], tuple[Any, ...]]] | None = None
        self.not_there = 0
        pointers, forms = [], []
        for index, array_type in enumerate(types):
            parts = [(f"a{index}", array_type)]
            if isinstance(array_type, tuple):
                parts = [(f"a{index}[{part}]", part_type) for part, part_type in enumerate(array_type)]
            elif index < pairs:
                parts.append(("None", NoneType))
            if len(parts) != (2 if index < pairs else 1):
                return
            for name, part_type in parts:
                expressions = _EXPRESSIONS.get((part_type.__module__, part_type.__name__))
                if expressions is None:
                    return
                pointers.append(expressions[0].format(a=name))
                forms.append(expressions[1].format(a=name))
                self.not_there += part_type in _NO_ARRAYS
        arguments = ", ".join(f"a{index}" for index in range(len(types)))
        self.of_arrays = eval(f"lambda {arguments}: (({', '.join(pointers)},), ({', '.join(forms)},))")


_sketchers: dict[tuple[Any, ...], Sketcher] = {}


def sketch(
    arrays: tuple[Any, ...], others: tuple[Any, ...] = (), pairs: int = 0
) -> tuple[tuple[int, ...], Sketcher, tuple[Any, ...]] | None:
    """Addresses and forms of a call's arrays. Takes a third of the time of `view`, and checks nothing.

    Parameters
    ----------
    arrays
        Arrays, or None for one that is not there, or a float.
    others
        Values whose types are to be told apart too (Python holds 1, 1.0 and True for equal).
    pairs
        How many of the first arrays may be a tuple of two instead; each of them has two addresses.

    Returns
    -------
    (tuple of int, Sketcher, tuple) or None
        The addresses (0 where there is no array), what stands for the types, and the forms. None when there is an array
        that only `view` can read, or that has no memory.
    """
    types: tuple[_Type, ...] = tuple(map(type, arrays + others))
    sketcher = _sketchers.get(types)
    if sketcher is None:
        of_arrays = types[: len(arrays)]
        if tuple in of_arrays:
            of_arrays = tuple(tuple(map(type, array)) if type(array) is tuple else type(array) for array in arrays)
            types = of_arrays + types[len(arrays) :]
            sketcher = _sketchers.get(types)
        if sketcher is None:
            sketcher = _sketchers[types] = Sketcher(of_arrays, pairs)
    if sketcher.of_arrays is None:
        return None
    try:
        pointers, forms = sketcher.of_arrays(*arrays)
    except Exception:  # a tensor without memory; `view` finds the words
        return None
    return (pointers, sketcher, forms) if pointers.count(0) == sketcher.not_there else None


class _Pointers(dict[type, Callable[[Any], int]]):
    """How to find the address of arrays of a type."""

    def __missing__(self, array_type: type) -> Callable[[Any], int]:
        expressions = _EXPRESSIONS.get((array_type.__module__, array_type.__name__))
        if expressions is None:
            self[array_type] = lambda array: view(array, "array").pointer
        else:
            self[array_type] = eval(f"lambda a: {expressions[0].format(a='a')}")
        return self[array_type]


_POINTERS = _Pointers()


def pointer_of(array: Any) -> int:
    """Address of an array's first element.

    Raises
    ------
    InvalidArgumentError
        The object cannot be read as an array, for the reasons that `view` names.
    """
    return _POINTERS[type(array)](array)
