"""Whether arrays are like those of an earlier call, in a few hundred nanoseconds each.

A sketch is an array's address and its *form*: shape, strides, element type and device, as its framework says them. A
form is only good for comparing. An array whose form equals that of one that `arrays.view` has found good is good.

Of a call that is made again and again with torch's tensors even the forms need not be asked for: torch compares all of
them with those of a call before at once (the guards of its compiler), in a quarter of the time.
"""

from __future__ import annotations

import functools
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
    ("cupy", "ndarray"): ("{a}.data.ptr", "{a}.shape, {a}.strides, {a}.dtype, {a}.data.device_id"),
    ("builtins", "NoneType"): ("0", "None"),
    # A number in the place of an array has no address, and is part of what a call is.
    ("builtins", "float"): ("0", "{a}"),
}
_NO_ARRAYS = (NoneType, float)
_TWO_NUMBERS = (float, float)  # so may be a pair of them
_REPEATS = 6  # calls like one another until guards are made, which takes as long as they save in so many calls
# The type of an array, or of the arrays of a pair.
_Type = Any


def _sketch_nothing(*arguments: Any) -> None:
    return None


class _Repeated:
    """Whether tensors have the same forms as in the calls before; makes torch's guards once some were alike.

    Attributes
    ----------
    same
        What says whether given tensors are like those of the forms that stand behind it; behind these, the numbers in
        the places of arrays. One tuple, as threads share it.
    """

    __slots__ = ("_before", "_count", "same")
    _none: tuple[Callable[..., bool], Any, Any] = (lambda *tensors: False), None, None

    def __init__(self) -> None:
        self.same = self._none
        self._before: Any = None
        self._count = 0

    def note(self, tensors: tuple[Any, ...], numbers: tuple[float, ...], forms: tuple[Any, ...]) -> tuple[Any, ...]:
        """The forms of a call that ``same`` did not recognise; what comes behind it may be like it."""
        self.same = self._none
        self._count = self._count + 1 if forms == self._before and self._count < _REPEATS else 1
        self._before = forms
        if self._count == _REPEATS:
            check = _guards_of(tensors)
            if check is not None:
                self.same = check, forms, numbers
        return forms


def _guards_of(tensors: tuple[Any, ...]) -> Callable[..., bool] | None:
    """What says whether other tensors have the same types, shapes, strides, element types and devices; holds none."""
    guards_of = _tensor_guards()
    if guards_of is None:
        return None
    sizes, strides = [[*tensor.shape] for tensor in tensors], [[*tensor.stride()] for tensor in tensors]
    try:
        check: Callable[..., bool] = guards_of(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        return check if check(*tensors) else None
    except Exception:  # of a torch that has them otherwise; forms do as well
        return None


@functools.cache
def _tensor_guards() -> Any:
    """torch's class of guards, if it has one."""
    try:
        from torch._C._dynamo.guards import TensorGuards
    except ImportError:
        return None
    return TensorGuards


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
    """

    __slots__ = ("not_there", "of_call")

    def __init__(self, types: tuple[_Type, ...], others: tuple[type, ...], pairs: int) -> None:
        self.of_call: Callable[..., tuple[tuple[int, ...], tuple[Any, ...]] | None] = _sketch_nothing
        self.not_there = 0
        pointers, forms, tensors, numbers = [], [], [], []
        guarded = True
        expected: list[tuple[str, type]] = []
        for index, array_type in enumerate(types):
            parts = [(f"a{index}", array_type)]
            if array_type == _TWO_NUMBERS and index >= pairs:
                [(name, _)] = parts
                pointers.append("0")
                forms.append(name)
                numbers.append(name)
                expected += [(name, tuple), (f"{name}[0]", float), (f"{name}[1]", float)]
                self.not_there += 1
                continue
            if isinstance(array_type, tuple):
                expected.append((f"a{index}", tuple))
                parts = [(f"a{index}[{part}]", part_type) for part, part_type in enumerate(array_type)]
            elif index < pairs:
                parts.append(("None", NoneType))
            if len(parts) != (2 if index < pairs else 1):
                return
            for name, part_type in parts:
                expressions = _EXPRESSIONS.get((part_type.__module__, part_type.__name__))
                if expressions is None:
                    return
                if part_type is float:
                    numbers.append(name)
                elif part_type is not NoneType:
                    tensors.append(name)
                    guarded = guarded and expressions is _TORCH
                pointers.append(expressions[0].format(a=name))
                forms.append(expressions[1].format(a=name))
                expected.append((name, part_type))
                self.not_there += part_type in _NO_ARRAYS
        expected += [(f"o{index}", other) for index, other in enumerate(others)]
        named: dict[str, Any] = {f"t{index}": known for index, (_, known) in enumerate(expected)}
        checks = {
            name: f"{name} is None" if known is NoneType else f"type({name}) is t{index}"
            for index, (name, known) in enumerate(expected)
        }
        names = [f"a{index}" for index in range(len(types))] + [f"o{index}" for index in range(len(others))]
        addresses, form = f"({', '.join(pointers)},)", f"({', '.join(forms)},)"
        again = ""
        if guarded and tensors:
            values = f"({''.join(f'{name}, ' for name in numbers)})"
            same = [check for name, check in checks.items() if name not in tensors]  # first: pairs are indexed
            same += [f"(same := repeated.same)[0]({', '.join(tensors)})"]  # of the same types, too
            same += [f"same[2] == {values}"] if numbers else []
            again = f"({addresses}, same[1]) if {' and '.join(same)} else "
            form = f"repeated.note(({', '.join(tensors)},), {values}, {form})"
            named["repeated"] = _Repeated()
        sketched = f"({addresses}, {form}) if {' and '.join(checks.values())} else None"
        self.of_call = eval(f"lambda {', '.join(names)}: {again}{sketched}", named)


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
