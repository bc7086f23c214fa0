"""A process in which JAX has several devices, and arrays of which each device has one."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
from collections.abc import Iterator

import numpy as np
import pytest


@contextlib.contextmanager
def process_with_devices(count: int) -> Iterator[concurrent.futures.Executor]:
    """A process in which the CPU is so many devices."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={count}")
        environment.setenv("JAX_PLATFORMS", "cpu")
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield process


def padded(arrays: list[np.ndarray]) -> np.ndarray:
    """All of them along a first axis, as if each was as large as the largest."""
    shape = np.max([array.shape for array in arrays], axis=0)
    widths = [[(0, most - extent) for most, extent in zip(shape, array.shape, strict=True)] for array in arrays]
    return np.stack([np.pad(array, width) for array, width in zip(arrays, widths, strict=True)])
