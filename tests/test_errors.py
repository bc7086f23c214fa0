"""The exception hierarchy."""

from __future__ import annotations

import pickle

import pytest

from cupy_mla import errors

EXAMPLES = [
    errors.MlaError("anything"),
    errors.InvalidArgumentError("q", "4 dimensions", "3"),
    errors.PlanMismatchError("plan", "batch 4", "5"),
    errors.UnsupportedDeviceError("no Hopper GPU"),
    errors.CompilationError("wide.cu did not compile", "error: line 3"),
    errors.MissingDependencyError("cupy", "cuda12", "an array on a CUDA device"),
    errors.DriverError("cuLaunchKernelEx", 1, "CUDA_ERROR_INVALID_VALUE: invalid argument"),
]


def test_invalid_argument_tells_name_expectation_and_value():
    error = errors.InvalidArgumentError("q", "4 dimensions", "3")
    assert str(error) == "q: expected 4 dimensions, got 3"
    assert (error.argument, error.expected, error.got) == ("q", "4 dimensions", "3")


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.InvalidArgumentError, ValueError),
        (errors.PlanMismatchError, errors.InvalidArgumentError),
        (errors.UnsupportedDeviceError, RuntimeError),
        (errors.CompilationError, RuntimeError),
        (errors.MissingDependencyError, ImportError),
        (errors.DriverError, RuntimeError),
    ],
)
def test_hierarchy(kind: type, builtin: type):
    assert issubclass(kind, errors.MlaError)
    assert issubclass(kind, builtin)


def test_compilation_error_carries_the_log():
    error = errors.CompilationError("wide.cu did not compile", "error: line 3")
    assert error.log == "error: line 3"
    assert str(error) == "wide.cu did not compile\nerror: line 3"
    assert str(errors.CompilationError("no log")) == "no log"


def test_missing_dependency_names_the_extra():
    assert 'pip install ".[cuda12]"' in str(errors.MissingDependencyError("cupy", "cuda12", "a CUDA array"))


def test_driver_error_names_call_and_code():
    error = errors.DriverError("cuLaunchKernelEx", 700, "illegal address")
    assert (error.name, error.code, error.text) == ("cuLaunchKernelEx", 700, "illegal address")
    assert str(error) == "cuLaunchKernelEx failed with CUresult 700: illegal address"


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_pass_between_processes(error: errors.MlaError):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
