"""Launches on a driver that writes down what it is asked, and refuses when told to."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeGpu, fake_device, fake_gpu

from cupy_mla import DriverError
from cupy_mla.call.memo import forget
from cupy_mla.gpu import driver
from cupy_mla.gpu.jit.source import KernelSource
from cupy_mla.gpu.launch import Launch
from cupy_mla.kernels.structs import DECODE_PARAMS
from cupy_mla.kernels.tensor_maps import TENSOR_MAP

INVALID_VALUE, INVALID_CONTEXT = 1, 201


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    gpu = fake_gpu(monkeypatch)
    gpu.kernels[1] = "decode", KernelSource("decode.cu", "mla_decode", ())
    yield gpu
    monkeypatch.undo()
    forget()


def make() -> tuple[Launch, np.ndarray, np.ndarray]:
    """A launch, its parameters and one tensor map of its own."""
    params, tensor_map = np.zeros(1, DECODE_PARAMS), np.zeros(1, TENSOR_MAP)
    kernel = SimpleNamespace(handle=1, device_id=3)
    return Launch(kernel, (2, 3, 1), (64, 1, 1), 0, (tensor_map, tensor_map, params)), params, tensor_map


def test_what_is_written_in_place_holds_for_the_next_launch(gpu: FakeGpu) -> None:
    launch, params, _ = make()
    other_map = np.frombuffer(bytes(range(128)), TENSOR_MAP)
    for stream, table in ((7, 100), (7, 200), (8, 300)):
        params["block_table"] = table
        launch(stream)
        [launched] = gpu.take()
        assert (launched.stream, launched.grid, launched.programmatic) == (stream, (2, 3, 1), False)
        assert launched.arguments[2]["block_table"] == table
    launch.addresses[1] = other_map.ctypes.data
    launch(8)
    [launched] = gpu.take()
    assert launched.arguments[0].tobytes() == bytes(128)
    assert launched.arguments[1].tobytes() == other_map.tobytes()


def test_a_cluster_is_asked_for(gpu: FakeGpu) -> None:
    kernel = SimpleNamespace(handle=1, device_id=3)
    maps, params = np.zeros(1, TENSOR_MAP), np.zeros(1, DECODE_PARAMS)
    for programmatic in (False, True):
        Launch(kernel, (4, 3, 1), (64, 1, 1), 0, (maps, maps, params), programmatic, cluster=2)(7)
        [launched] = gpu.take()
        assert (launched.cluster, launched.programmatic) == ((2, 1, 1), programmatic)


def test_a_refused_launch_is_an_error(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver._driver, "cuLaunchKernelEx", lambda *arguments: (INVALID_VALUE,))
    with pytest.raises(DriverError) as caught:
        make()[0](0)
    assert caught.value.code == INVALID_VALUE


@pytest.mark.parametrize("later", [0, INVALID_VALUE])
def test_a_thread_without_a_context_gets_one(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, later: int) -> None:
    used = fake_device(monkeypatch)

    def launch_kernel(*arguments: Any) -> tuple[int]:
        return (later if used else INVALID_CONTEXT,)

    monkeypatch.setattr(driver._driver, "cuLaunchKernelEx", launch_kernel)
    launch = make()[0]
    if later:
        with pytest.raises(DriverError) as caught:
            launch(0)
        assert caught.value.code == later
    else:
        launch(0)
    assert used == [3]
