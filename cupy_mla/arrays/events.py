"""What NumPy does about overflow, underflow, invalid values and divisions by zero: the caller's ``numpy.seterr``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def unheeded(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """The function with all of them ignored, whatever the caller asked for: to attention and its caches infinities, NaN
    and what is too small are values like others, as on the GPU.
    """

    @functools.wraps(function)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return run
