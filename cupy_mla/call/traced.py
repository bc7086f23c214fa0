"""Arrays of a program that JAX traces: only their shapes and types are known, and where the program will run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from ..arrays.frameworks import CPU, CUDA
from ..arrays.view import ArrayView, contiguous_strides
from ..errors import InvalidArgumentError, MissingDependencyError, UnsupportedDeviceError
from .arguments import is_number, is_pair_of_numbers
from .problem import PLAN_ALIGNMENT

_NOT_IN_JAX = ("stream", "out", "lse", "max_logits")  # programs have no streams, and no arrays to write to
_Function = TypeVar("_Function", bound=Callable[..., Any])


def like(*functions: Callable[..., Any], without: Sequence[str] = ()) -> Callable[[_Function], _Function]:
    """Have a function for JAX take what these functions take, but streams, outputs and what it is to be ``without``;
    ``help()`` shows it so.

    What the function does not name itself comes to it by name, in its ``**named``. Other names are a TypeError, as
    Python has it.
    """

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        shown = {name: p for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
        for other in functions:
            for name, parameter in inspect.signature(other).parameters.items():
                if name not in (*_NOT_IN_JAX, *without):
                    shown.setdefault(name, parameter.replace(kind=parameter.KEYWORD_ONLY))

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            for name in named:
                if name not in shown:
                    raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}")
            return function(*arguments, **named)

        call.__signature__ = signature.replace(parameters=[*shown.values()])  # type: ignore[attr-defined]
        return cast(_Function, call)

    return decorate


def take_parts(names: Sequence[str], given: Sequence[Any], named: dict[str, Any]) -> tuple[Any, ...]:
    """The arrays of these names: the first ones as given, the others taken from ``named``; None for one not there."""
    others = {name: named.pop(name, None) for name in names[len(given) :]}
    if "kv_scale" in others:
        others["kv_scale"] = scale_as_array(others["kv_scale"])
    return *given, *others.values()


def views_of_parts(
    parts: Sequence[Any], names: Sequence[str], platform: str | None
) -> tuple[list[Any], list[Any], tuple[str, int]]:
    """Those of the arrays that are there, views of all of them (None for one that is not), and where they will be.

    Raises
    ------
    InvalidArgumentError
        One is no JAX array; the error has its name of ``names``.
    UnsupportedDeviceError
        The platform is neither CPU nor CUDA.
    """
    arrays = [part for part in parts if part is not None]
    location = _location(arrays, platform)
    views = [
        None if part is None else _view_of_shape(part, name, location) for name, part in zip(names, parts, strict=True)
    ]
    return arrays, views, location


def _location(arrays: list[Any], platform: str | None) -> tuple[str, int]:
    """Where the program will run."""
    jax = jax_module()
    if platform is None:
        concrete = [
            array for array in arrays if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
        ]
        platform = next(iter(concrete[0].devices())).platform if concrete else jax.default_backend()
    if platform == CPU:
        return CPU, 0
    if platform not in (CUDA, "gpu"):
        raise UnsupportedDeviceError(f"JAX runs on {platform}; the kernels need CUDA, the NumPy backend the CPU")
    return CUDA, 0  # all GPUs of a program are of one kind


def _view_of_shape(array: Any, name: str, location: tuple[str, int]) -> ArrayView:
    """A view of an array that may not exist yet; XLA's arrays are contiguous and aligned."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        own_plan = " of cupy_mla.jax_ops' own plan functions" if name == "plan" else ""
        raise InvalidArgumentError(name, f"a JAX array{own_plan}", type(array).__name__)
    shape = tuple(array.shape)
    return ArrayView(PLAN_ALIGNMENT, shape, contiguous_strides(shape), str(array.dtype), *location, None)


def two_parts(argument: Any, name: str) -> tuple[Any, Any]:
    """An array and None, or the two of a pair (latent, rope).

    Raises
    ------
    InvalidArgumentError
        It is a list or tuple of another length.
    """
    if not isinstance(argument, (tuple, list)):
        return argument, None
    if len(argument) != 2:
        raise InvalidArgumentError(name, "an array or a pair (latent, rope)", f"{len(argument)} items")
    return argument[0], argument[1]


def scale_as_array(kv_scale: Any) -> Any:
    """A number, or a pair of them, as an array: a compiled program takes it like the others."""
    given = is_number(kv_scale) or is_pair_of_numbers(kv_scale)
    return jax_module().numpy.asarray(kv_scale, "float32") if given else kv_scale


def jax_module() -> Any:
    """JAX, imported now.

    Raises
    ------
    MissingDependencyError
        It is not installed.
    """
    try:
        import jax
    except ImportError as error:
        raise MissingDependencyError("jax", "jax", "cupy_mla.jax_ops") from error
    return jax
