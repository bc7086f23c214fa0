"""The CUDA driver, for the calls that CuPy lacks, through cuda-bindings; imported when first needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import DriverError, MissingDependencyError

# Errors of a thread without a current context, or with that of another GPU: CUDA_ERROR_INVALID_CONTEXT and
# CUDA_ERROR_INVALID_HANDLE.
_CONTEXT_ERRORS = (201, 400)

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


def in_context(device_id: int, call: Callable[[], tuple[Any, ...]], result: tuple[Any, ...]) -> tuple[Any, ...]:
    """The result of a driver call; of a second one, with the GPU current, where the first failed for want of that.

    Only tried when it was not: asking before would cost every call.
    """
    if int(result[0]) not in _CONTEXT_ERRORS:
        return result
    from cupy.cuda import Device

    with Device(device_id) as device:
        device.use()  # entering does nothing for a thread that has this GPU by default and no context yet
        return call()


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
