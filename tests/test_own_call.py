"""time_call: what it calls with what, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_mla.bench import Timing, time_call
from cupy_mla.errors import InvalidArgumentError


def test_on_the_cpu_the_arrays_themselves_are_used() -> None:
    array, seen = np.ones(8), []

    def call(given: Any) -> None:
        seen.append(given)

    timing = time_call(call, array)
    assert isinstance(timing, Timing)
    assert all(given is array for given in seen)
    assert timing.calls == 1
    assert timing.fastest <= timing.seconds <= timing.slowest
    assert timing.protocol == f"wall time, median of {len(seen)}"
    pair = (array, array)
    time_call(seen.append, pair)
    assert seen[-1] is pair


def test_torch_on_the_cpu() -> None:
    torch = pytest.importorskip("torch")
    assert time_call(torch.sum, torch.ones(8)).protocol.startswith("wall time")


@pytest.mark.parametrize("cold", [(), "text", None, [np.ones(2)]], ids=str)
def test_what_is_no_array_is_refused(cold: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^cold: "):
        time_call(lambda array: None, cold)


def test_frameworks_are_not_mixed() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(InvalidArgumentError, match="cold: expected arrays of one framework"):
        time_call(lambda arrays: None, (np.ones(2), torch.ones(2)))


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_gpu_calls_take_copies_in_turn(library: str) -> None:
    module = pytest.importorskip(library)
    device = {"device": "cuda"} if library == "torch" else {}
    cold = module.ones(32_000_000, dtype=module.float32, **device)
    out = module.zeros((), dtype=module.float32, **device)
    addresses = set()

    def call(array: Any) -> None:
        addresses.add(array.data_ptr() if library == "torch" else array.data.ptr)
        out[...] = array[0]

    timing = time_call(call, cold)
    assert len(addresses) == 2  # 256 MB in all
    assert 0 < timing.seconds < 1e-3
    assert timing.protocol.startswith("CUDA graph of 64 calls, 2 caches in turn")
