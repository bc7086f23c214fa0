"""Whether a call is like one before, for calls that are made again and again with torch's tensors.

torch compares the types, shapes, strides, element types and devices of all tensors with those of another call at once
(the guards of its compiler), in a quarter of the time that it takes to ask for them. What is left to look at are the
addresses, and what a call has besides arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from .sketch import Sketcher

Found: TypeAlias = tuple[Any, tuple[int, ...], Any]
Recogniser: TypeAlias = Callable[[tuple[Any, ...], tuple[Any, ...], Any, Any], Found | None]

_MAKERS_KEPT = 64


def recognise_nothing(arrays: tuple[Any, ...], others: tuple[Any, ...], kind: Any, settings: Any) -> None:
    """A recogniser as long as no call was repeated."""
    return None


def recogniser_of(
    sketcher: Sketcher,
    masks: tuple[int, ...],
    call: tuple[tuple[Any, ...], tuple[Any, ...], Any, Any],
    noted: tuple[Any, Any],
) -> Recogniser:
    """What recognises a call when it comes again; holds none of its arrays.

    Parameters
    ----------
    sketcher
        Of the call.
    masks
        For each address, the bits that have to be 0.
    call
        Its arrays, its other values, and two objects that calls like it come with, too: the kind of its plan and the
        settings.
    noted
        What is known of such calls, in two parts.

    Returns
    -------
    callable
        Given another call like ``call``: the first of ``noted``, the addresses of its arrays, and the last; None where
        it differs in more than addresses, an address is misaligned, or an array has no memory. Where torch has no
        guards, or not all arrays are torch's, it is None for every call.
    """
    make = _maker(sketcher, masks) if sketcher.is_torch and sketcher.tensors else None
    return (make and make(_guards_of, *call, *noted)) or recognise_nothing


@functools.lru_cache(_MAKERS_KEPT)
def _maker(sketcher: Sketcher, masks: tuple[int, ...]) -> Callable[..., Recogniser | None]:
    """What makes the recognisers of calls whose arrays and other values are of certain types.

    It is written out: a loop over arrays and values takes twice the time.
    """
    arrays, others, tensors = (", ".join(names) for names in (sketcher.arrays, sketcher.others, sketcher.tensors))
    numbers = "".join(f"{number}, " for number in sketcher.numbers)
    of_tensors_and_others = {*sketcher.tensors, *sketcher.others}  # guards know the types of tensors
    checks = [check for name, check in sketcher.checks.items() if name not in of_tensors_and_others]
    for name in sketcher.others:  # types first: Python holds 1, 1.0 and True for equal
        checks.append(f"({name} is s{name} or type({name}) is type(s{name}) and {name} == s{name})")
    checks += [f"numbers == ({numbers})"] if numbers else []
    addresses = [f"p{index}" if pointer != "0" else "0" for index, pointer in enumerate(sketcher.pointers)]
    there = {name: place for place, name in enumerate(addresses) if name != "0"}
    asked = "; ".join(f"{name} = {sketcher.pointers[place]}" for name, place in there.items())
    wrong = misaligned({name: masks[place] for name, place in there.items()})
    source = f"""
def make(guards_of, arrays, others, same_kind, same_settings, first, last):
    [{arrays}] = arrays
    [{', '.join(f"s{name}" for name in sketcher.others)}] = others
    numbers = ({numbers})
    are_alike = guards_of(({tensors},))
    if are_alike is None:
        return None
    def recognise(arrays, others, kind, settings):
        if kind is not same_kind or settings is not same_settings or len(others) != {len(sketcher.others)}:
            return None
        [{arrays}] = arrays
        [{others}] = others
        if not ({' and '.join([*checks, f"are_alike({tensors})"])}):
            return None
        {asked}
        if not ({' and '.join(there)}) or {wrong}:
            return None
        return first, ({', '.join(addresses)},), last
    return recognise
"""
    named: dict[str, Any] = dict(sketcher.types)
    exec(source, named)
    made: Callable[..., Recogniser | None] = named["make"]
    return made


def misaligned(masks: Mapping[str, int]) -> str:
    """An expression that is not 0 where an address, by its name, has a bit that its mask has too."""
    names: dict[int, list[str]] = {}
    for name, mask in masks.items():
        names.setdefault(mask, []).append(name)
    return " or ".join(f"({' | '.join(alike)}) & {mask}" for mask, alike in names.items())


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
