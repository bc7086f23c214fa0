"""What writes to a cache in programs that JAX compiles: XLA's custom calls, whose results are what was written to.

JAX's arrays do not change. The result of such a call shares the memory of the input that it stands for, by XLA's own
rules: an array that the program does not need any more (or that was donated to it) is written in place, another copied
before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import xla
from ..arrays.exchange import as_numpy
from ..arrays.view import ArrayView
from ..arrays.xla import CustomCall, start, view_buffer, view_hosts
from ..call.traced import jax_module, views_of_parts
from ..layouts import LAYOUTS, CacheLayout, find_layout

# By number: longer strings arrive damaged as attributes of custom calls (jax-tvm-ffi 0.1.3).
_LAYOUTS: tuple[CacheLayout | None, ...] = (None, *LAYOUTS.values())
_VALIDATE = (None, False, True)
_ATTRIBUTES = ("given", "layout", "validate")

Parts = Sequence[Any]


@dataclass(frozen=True, slots=True)
class Options:
    """What such a call is given beside arrays."""

    layout: CacheLayout | None = None
    validate: bool | None = None


@dataclass(frozen=True, slots=True)
class InPlaceCall:
    """A function that writes to the first of its arrays.

    Attributes
    ----------
    target
        What XLA calls it.
    parts
        What errors call the arrays, the parts of pairs one by one: first the two that are written to.
    check
        Checks one array or None for each of them.
    run
        Does what was asked, on a stream; None on the CPU.
    """

    target: str
    parts: tuple[str, ...]
    check: Callable[[Parts, Options], object]
    run: Callable[[Parts, Options, int | None], object]

    def trace(self, parts: Parts, layout: Any, validate: bool | None, platform: str | None) -> Any:
        """Put the call into the program that is traced.

        Returns
        -------
        What stands for the arrays that are written to: one, or the two of a pair.

        Raises
        ------
        InvalidArgumentError
            ``check`` found an array wrong, or there is no such layout.
        UnsupportedDeviceError
            The platform is neither CPU nor CUDA.
        MissingDependencyError
            The platform is CUDA and jax-tvm-ffi is not installed.
        """
        jax = jax_module()
        arrays, views, location = views_of_parts(parts, self.parts, platform)
        options = Options(None if layout is None else find_layout(layout), validate)
        self.check(views, options)
        attributes = (
            sum(1 << index for index, part in enumerate(parts) if part is not None),
            _LAYOUTS.index(options.layout),
            _VALIDATE.index(validate),
        )
        written = [part for part in parts[:2] if part is not None]
        results = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in written)
        if register_calls(self, location[0]):
            aliases = {index: index for index in range(len(written))}
            call = jax.ffi.ffi_call(self.target, results, input_output_aliases=aliases)
            new = call(*arrays, **dict(zip(_ATTRIBUTES, map(np.int64, attributes), strict=True)))
        else:
            new = jax.pure_callback(functools.partial(self._in_callback, *attributes), results, *arrays)
        return new[0] if len(new) == 1 else tuple(new)

    def _in_callback(self, given: int, layout: int, validate: int, *arrays: Any) -> tuple[np.ndarray, ...]:
        """The NumPy backend, on what ``jax.pure_callback`` brings."""
        count = (given & 0b11).bit_count()
        written = [np.array(array) for array in arrays[:count]]
        self._run(given, layout, validate, view_hosts([*written, *arrays[count:]]), None)
        return tuple(written)

    def run_in_xla(self, given: int, layout: int, validate: int, *buffers: Any) -> None:
        """What XLA calls: the attributes, then the inputs, then the results."""
        views = [view_buffer(buffer) for buffer in buffers]
        num_inputs = given.bit_count()
        inputs, results = views[:num_inputs], views[num_inputs:]
        stream = start(results[0].location)
        for old, new in zip(inputs, results, strict=False):
            if old.pointer != new.pointer and stream is None:
                as_numpy(new)[...] = as_numpy(old)
        self._run(given, layout, validate, [*results, *inputs[len(results) :]], stream)

    def _run(self, given: int, layout: int, validate: int, arrays: list[ArrayView], stream: int | None) -> None:
        rest = iter(arrays)
        parts = [next(rest) if given >> index & 1 else None for index in range(len(self.parts))]
        self.run(parts, Options(_LAYOUTS[layout], _VALIDATE[validate]), stream)


@functools.cache
def register_calls(call: InPlaceCall, device: str) -> bool:
    """Register a custom call for a device; False where jax-tvm-ffi is missing and not needed.

    Raises
    ------
    MissingDependencyError
        It is missing, and the device is a GPU.
    """
    return xla.register({call.target: CustomCall(call.run_in_xla, _ATTRIBUTES)}, device)


def pair(latent: Any, rope: Any) -> Any:
    """An array, or the pair that a rope part makes it."""
    return latent if rope is None else (latent, rope)
