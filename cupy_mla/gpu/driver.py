"""The CUDA driver, for the calls that CuPy lacks, through cuda-bindings; imported when first needed."""

from __future__ import annotations

from typing import Any

from ..errors import DriverError, MissingDependencyError

_driver: Any = None


def driver() -> Any:
    """cuda-bindings' driver module, imported when first needed.

    Raises
    ------
    MissingDependencyError
        cuda-bindings is not installed.
    """
    global _driver
    if _driver is None:
        try:
            from cuda.bindings import driver as module
        except ImportError as error:
            raise MissingDependencyError("cuda-bindings", "cuda12", "launching kernels") from error
        _driver = module
    return _driver


def check(action: str, result: tuple[Any, ...]) -> Any:
    """The value of a driver call's result tuple.

    Raises
    ------
    DriverError
        The driver returned another status than success; the exception carries its number and name.
    """
    status = result[0]
    if int(status) != 0:
        raise DriverError(action, int(status), str(getattr(status, "name", status)))
    return result[1] if len(result) > 1 else None
