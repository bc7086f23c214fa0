"""Too little memory ends in the framework's own error and leaves everything usable; other GPUs, threads and forks."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from cases_dense import DenseCase, exact_decode

from cupy_mla import merge_states, mla_decode, mla_sparse_decode, plan_decode
from cupy_mla.arrays import exchange

cupy = pytest.importorskip("cupy")
CASE = DenseCase(lengths=(3000, 70, 1), num_heads_q=16)


def upload(array: np.ndarray) -> Any:
    return cupy.asarray(np.ascontiguousarray(array).view(f"u{array.itemsize}")).view(array.dtype)


def error_of(out: Any, exact: np.ndarray) -> float:
    got = cupy.asnumpy(out.view(np.uint16)).view("bfloat16").astype(np.float64)
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def case() -> tuple[list[Any], np.ndarray]:
    host = CASE.build()
    return [upload(array) for array in host.tensors], exact_decode(CASE, host)[0]


@pytest.fixture
def no_memory() -> Any:
    """A pool that gives nothing more until it is freed of its limit."""
    pool = cupy.get_default_memory_pool()

    kept: list[Any] = []

    def limit(is_on: bool) -> None:
        kept.clear()
        pool.free_all_blocks()
        pool.set_limit(size=max(pool.used_bytes(), 1) if is_on else 0)
        if is_on:  # what is left of chunks that are in use
            for size in (1 << power for power in range(24, 8, -1)):
                with contextlib.suppress(cupy.cuda.memory.OutOfMemoryError):
                    while True:
                        kept.append(cupy.empty(size, np.uint8))

    yield limit
    limit(False)


def test_out_of_memory_is_the_frameworks_and_harms_nothing(no_memory: Any) -> None:
    arrays, exact = case()
    plan = plan_decode(*arrays)
    out, lse = mla_decode(*arrays, plan=plan)
    outs, lses = cupy.stack([out.view(np.uint16)] * 2).view(out.dtype), cupy.stack([lse] * 2)
    indices = cupy.zeros((3, 1, 300), np.int32)
    no_memory(True)
    for call in (
        lambda: mla_decode(*arrays),
        lambda: mla_decode(*arrays, plan=plan),
        lambda: plan_decode(*arrays, fixed_split_tokens=64),
        lambda: merge_states(outs, lses),
        lambda: mla_sparse_decode(arrays[0], arrays[1], indices),
    ):
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
            call()
    mla_decode(*arrays, plan=plan, out=out, lse=lse)  # needs none
    assert error_of(out, exact) < 3e-3
    no_memory(False)
    assert error_of(mla_decode(*arrays)[0], exact) < 3e-3
    assert error_of(mla_decode(*arrays, plan=plan)[0], exact) < 3e-3


def test_torchs_out_of_memory_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    host = CASE.build()
    arrays = [
        torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16).cuda()
        if array.dtype.itemsize == 2
        else torch.from_numpy(array).cuda()
        for array in host.tensors
    ]
    expected = mla_decode(*arrays)[0]
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    kept = []

    def fill() -> None:
        for _ in range(1000):
            kept.append(mla_decode(*arrays))

    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            fill()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    kept.clear()
    assert torch.equal(mla_decode(*arrays)[0], expected)


def test_another_gpu() -> None:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    with cupy.cuda.Device(1):
        arrays, exact = case()
    out, lse = mla_decode(*arrays)
    assert out.device.id == lse.device.id == 1
    assert error_of(out, exact) < 3e-3


def test_threads_with_streams_of_their_own() -> None:
    arrays, exact = case()
    cupy.cuda.Device().synchronize()
    errors: list[float] = []

    def work() -> None:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for _ in range(50):
                out, _ = mla_decode(*arrays)
            stream.synchronize()
            errors.append(error_of(out, exact))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == len(threads)
    assert max(errors) < 3e-3


FORK = """
import os, sys
import numpy as np
import cupy_mla
child = os.fork()
import cupy
q = cupy.zeros((2, 1, 16, 576), np.float16)
cache = cupy.ones((4, 64, 1, 576), np.float16)
table, lengths = cupy.arange(4, dtype=np.int32).reshape(2, 2), cupy.asarray([100, 3], np.int32)
out, _ = cupy_mla.mla_decode(q, cache, table, lengths)
assert float(abs(out.astype(np.float32) - 1).max()) < 1e-3
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_after_the_import() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_nothing_is_kept_of_arrays_that_came_through_dlpack() -> None:
    """What waits for a stream's work is let go of when that is done."""
    jax = pytest.importorskip("jax")
    rows, cache = jax.numpy.zeros((2, 1, 16, 576), "bfloat16"), jax.numpy.zeros((4, 64, 1, 576), "bfloat16")
    if next(iter(rows.devices())).platform == "cpu":
        pytest.skip("JAX has no GPU here")
    table, lengths = jax.numpy.zeros((2, 2), "int32"), jax.numpy.full((2,), 3, "int32")
    for _ in range(200):
        mla_decode(rows, cache, table, lengths)
    cupy.cuda.Device().synchronize()
    mla_decode(rows, cache, table, lengths)
    assert len(exchange._in_flight) < 50
