"""Whether arrays are like those of an earlier call, in a few hundred nanoseconds each.

A sketch is an array's address and its *form*: shape, strides, element type and device, as its framework says them. A
form is only good for comparing. An array whose form equals that of one that `arrays.view` has found good is good.

Of a call that is made again and again with torch's tensors even the forms need not be asked for (`arrays.repeated`).
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
    # Parts of conjugated complex tensors, whose sign is a lazy bit, lie apart.
    "{a}.shape, {a}.is_contiguous() or ({a}.stride(), {a}.is_neg()), {a}.dtype, {a}.get_device()",
)
_EXPRESSIONS: dict[tuple[str, str], tuple[str, str]] = {
    ("torch", "Tensor"): _TORCH,
    ("torch.nn.parameter", "Parameter"): _TORCH,
    ("cupy_mla.arrays.view", "ArrayView"): ("{a}.pointer", "{a}.shape, {a}.strides, {a}.dtype, {a}.location"),
    ("cupy", "ndarray"): ("{a}.data.ptr", "{a}.shape, {a}.strides, {a}.dtype, {a}.data.device_id"),
    ("builtins", "NoneType"): ("0", "None"),
    # A number in the place of an array has no address, and is part of what a call is.
    ("builtins", "float"): ("0", "{a}"),
}
_NO_ARRAYS = (NoneType, float)
_TWO_NUMBERS = (float, float)  # so may be a pair of them
# The type of an array, or of the arrays of a pair.
_Type = Any


def _sketch_nothing(*arguments: Any) -> None:
    return None


class Sketcher:
    """Sketches the arrays of calls whose arrays and other arguments are of certain types.

    Attributes
    ----------
    of_call
        Given the arrays and the other arguments: the arrays' addresses, and their forms one behind the other; None if
        one is of another type, or there is an array that only `view` can read. One expression, as that takes half the
        time of a loop.
    not_there
        How many of the addresses are 0 because there is no array.
    arrays, others
        Names of the arrays and of the other arguments in what follows: ``a0``, ``a1``, ..., ``o0``, ``o1``, ...
    pointers
        Expressions of the addresses.
    tensors
        Expressions of the arrays themselves.
    is_torch
        Whether all of them are torch's.
    numbers
        Expressions of what stands in the places of arrays and has no address.
    checks
        Expressions that say whether the arrays and the other arguments are of these types, by what they look at.
    types
        The types that ``checks`` name.
    """

    __slots__ = (
        "arrays", "checks", "is_torch", "not_there", "numbers", "of_call", "others", "pointers", "tensors", "types",
    )  # fmt: skip

    def __init__(self, types: tuple[_Type, ...], others: tuple[type, ...], pairs: int) -> None:
        self.of_call: Callable[..., tuple[tuple[int, ...], tuple[Any, ...]] | None] = _sketch_nothing
        self.not_there = 0
        self.arrays = [f"a{index}" for index in range(len(types))]
        self.others = [f"o{index}" for index in range(len(others))]
        self.pointers: list[str] = []
        self.tensors: list[str] = []
        self.is_torch = True
        self.numbers: list[str] = []
        self.checks: dict[str, str] = {}
        self.types: dict[str, type] = {}
        forms = []
        for index, (name, array_type) in enumerate(zip(self.arrays, types, strict=True)):
            if array_type == _TWO_NUMBERS and index >= pairs:
                self.pointers.append("0")
                self.numbers.append(name)
                forms.append(name)
                self._check_parts(name, _TWO_NUMBERS)
                for number in range(len(_TWO_NUMBERS)):
                    self._check(f"{name}[{number}]", float)
                self.not_there += 1
                continue
            parts = [(name, array_type)]
            if isinstance(array_type, tuple):
                if len(array_type) != 2 or index >= pairs:
                    return
                self._check_parts(name, array_type)
                parts = [(f"{name}[{part}]", part_type) for part, part_type in enumerate(array_type)]
            elif index < pairs:
                parts.append(("None", NoneType))
            for part, part_type in parts:
                expressions = _EXPRESSIONS.get((part_type.__module__, part_type.__name__))
                if expressions is None:
                    return
                if part_type is float:
                    self.numbers.append(part)
                elif part_type is not NoneType:
                    self.tensors.append(part)
                    self.is_torch = self.is_torch and expressions is _TORCH
                self.pointers.append(expressions[0].format(a=part))
                forms.append(expressions[1].format(a=part))
                self._check(part, part_type)
                self.not_there += part_type in _NO_ARRAYS
        for name, other in zip(self.others, others, strict=True):
            self._check(name, other)
        names = ", ".join([*self.arrays, *self.others])
        sketched = f"(({', '.join(self.pointers)},), ({', '.join(forms)},))"
        is_such = " and ".join(self.checks.values())
        self.of_call = eval(f"lambda {names}: {sketched} if {is_such} else None", {**self.types})

    def _check_parts(self, name: str, parts: tuple[type, ...]) -> None:
        self._check(name, tuple)
        self.checks[name] += f" and len({name}) == {len(parts)}"

    def _check(self, name: str, known: type) -> None:
        if known is NoneType:
            self.checks[name] = f"{name} is None"
        else:
            self.types[f"t{len(self.types)}"] = known
            self.checks[name] = f"type({name}) is t{len(self.types) - 1}"


class Sketches:
    """Sketches of the calls of one function; takes a third of the time of `view`, and checks nothing.

    Parameters
    ----------
    pairs
        How many of the first arrays may be a tuple of two instead; each of them has two addresses.
    """

    __slots__ = ("_known", "_last", "_pairs")

    def __init__(self, pairs: int = 0) -> None:
        self._pairs = pairs
        self._known: dict[tuple[tuple[_Type, ...], tuple[type, ...]], Sketcher] = {}
        # Of the call before with so many other arguments: to ask it takes less time than to look one up.
        self._last: dict[int, Sketcher] = {}

    def sketch(
        self, arrays: tuple[Any, ...], others: tuple[Any, ...] = ()
    ) -> tuple[tuple[int, ...], Sketcher, tuple[Any, ...]] | None:
        """Addresses and forms of a call's arrays.

        Parameters
        ----------
        arrays
            Arrays, or None for one that is not there, or a float; always as many.
        others
            Values whose types are to be told apart too (Python holds 1, 1.0 and True for equal).

        Returns
        -------
        (tuple of int, Sketcher, tuple) or None
            The addresses (0 where there is no array), what stands for the types, and the forms. None when there is an
            array that only `view` can read, or that has no memory.
        """
        sketcher = self._last.get(len(others))
        try:
            sketched = None if sketcher is None else sketcher.of_call(*arrays, *others)
            if sketched is None or sketcher is None:
                sketcher = self._find(arrays, others)
                sketched = sketcher.of_call(*arrays, *others)
                if sketched is None:
                    return None
                self._last[len(others)] = sketcher
        except Exception:  # a tensor without memory; `view` finds the words
            return None
        pointers, forms = sketched
        return (pointers, sketcher, forms) if pointers.count(0) == sketcher.not_there else None

    def _find(self, arrays: tuple[Any, ...], others: tuple[Any, ...]) -> Sketcher:
        types = tuple(tuple(map(type, array)) if type(array) is tuple else type(array) for array in arrays)
        of_others = tuple(map(type, others))
        key = types, of_others
        if key not in self._known:
            self._known[key] = Sketcher(types, of_others, self._pairs)
        return self._known[key]


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
