"""The exceptions that cupy_mla raises: one hierarchy, so that ``except MlaError`` catches all of them."""

from __future__ import annotations


def install_command(extra: str) -> str:
    """How to install what an extra of this package brings. There is no release on a package index yet; when there is,
    this is the place to say so.
    """
    return f'pip install ".[{extra}]" in the checkout, or a wheel as "WHEEL[{extra}]"'


class MlaError(Exception):
    """Base of every exception of this package."""


class InvalidArgumentError(MlaError, ValueError):
    """An argument was refused before anything was launched or written.

    Parameters
    ----------
    argument
        Name of the argument as the caller wrote it, e.g. ``"block_table"`` or ``"kv_cache[1]"``.
    expected
        What would have been accepted.
    got
        What came.
    """

    def __init__(self, argument: str, expected: str, got: str) -> None:
        super().__init__(f"{argument}: expected {expected}, got {got}")
        self.argument = argument
        self.expected = expected
        self.got = got

    def __reduce__(self) -> tuple[type[InvalidArgumentError], tuple[str, str, str]]:
        # Exceptions are rebuilt from their message alone by default, which does not fit this signature;
        # engines send them between worker processes.
        return type(self), (self.argument, self.expected, self.got)


class PlanMismatchError(InvalidArgumentError):
    """A plan was used with other shapes or settings than the ones it was made for."""


class UnsupportedDeviceError(MlaError, RuntimeError):
    """The arrays live on a device that no kernel of this package runs on."""


class CompilationError(MlaError, RuntimeError):
    """A kernel did not compile, or compiled to something that must not be used.

    Parameters
    ----------
    message
        What was compiled and what went wrong, in one line.
    log
        The compiler's whole log; part of ``str(error)``.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(f"{message}\n{log}" if log else message)
        self.message = message
        self.log = log

    def __reduce__(self) -> tuple[type[CompilationError], tuple[str, str]]:
        return type(self), (self.message, self.log)


class MissingDependencyError(MlaError, ImportError):
    """An optional package is needed and cannot be imported.

    Parameters
    ----------
    package
        The package that is missing.
    extra
        The extra of cupy-mla that brings it, e.g. ``cuda12``.
    purpose
        What it is needed for.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}: {install_command(extra)}", name=package)
        self.package = package
        self.extra = extra
        self.purpose = purpose

    def __reduce__(self) -> tuple[type[MissingDependencyError], tuple[str, str, str]]:
        return type(self), (self.package, self.extra, self.purpose)


class DriverError(MlaError, RuntimeError):
    """A call of the CUDA driver failed.

    Parameters
    ----------
    name
        The driver function, e.g. ``"cuLaunchKernelEx"``.
    code
        Its CUresult.
    text
        What the driver says about that code.
    """

    def __init__(self, name: str, code: int, text: str) -> None:
        super().__init__(f"{name} failed with CUresult {code}: {text}")
        self.name = name
        self.code = code
        self.text = text

    def __reduce__(self) -> tuple[type[DriverError], tuple[str, int, str]]:
        return type(self), (self.name, self.code, self.text)
