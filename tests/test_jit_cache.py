"""jit.cache: one compilation over many processes, damage is a miss, an unwritable folder only costs time."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
import warnings
from pathlib import Path

import pytest

from cupy_mla.gpu.jit import cache
from cupy_mla.gpu.jit.compiler import CompiledKernel, ResourceUsage

DIGEST = "0123456789abcdef"
KERNEL = CompiledKernel(
    cubin=bytes(range(256)) * 16,
    log="ptxas info: fine",
    usage=ResourceUsage(registers=168, spill_stores=0, spill_loads=0, stack_frame=0, static_smem=128, barriers=3),
    warnings=("warning: something",),
    compile_seconds=1.25,
)
PROCESSES = 16
BUILD_SECONDS = 0.3  # long enough that all processes ask while the first one builds

spawn = multiprocessing.get_context("spawn")


def must_not_build() -> CompiledKernel:
    raise AssertionError("built although it is in the cache")


def fill(cache_dir: Path) -> CompiledKernel:
    return cache.fetch(DIGEST, lambda: KERNEL, cache_dir, lambda: {"entry": "decode/wide/wide.cu"})


def test_a_kernel_is_kept_and_found(tmp_path: Path) -> None:
    built = fill(tmp_path)
    assert built.path is not None
    assert built.path.read_bytes() == KERNEL.cubin
    assert not built.from_cache
    found = cache.fetch(DIGEST, must_not_build, tmp_path)
    assert found.from_cache
    assert (found.cubin, found.log, found.usage, found.warnings, found.compile_seconds, found.path) == (
        KERNEL.cubin,
        KERNEL.log,
        KERNEL.usage,
        KERNEL.warnings,
        KERNEL.compile_seconds,
        built.path,
    )
    assert cache.count_entries(tmp_path) == (1, len(KERNEL.cubin))


def test_the_description_lies_beside_the_cubin(tmp_path: Path) -> None:
    fill(tmp_path)
    record = json.loads((tmp_path / DIGEST / cache.RECORD_NAME).read_text())
    assert record["entry"] == "decode/wide/wide.cu"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        cache.fetch(DIGEST, must_not_build, tmp_path)
    assert not (tmp_path / DIGEST).exists()
    assert fill(tmp_path).path is not None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (cache.CUBIN_NAME, truncate),
        (cache.CUBIN_NAME, flip_a_bit),
        (cache.CUBIN_NAME, Path.unlink),
        (cache.RECORD_NAME, truncate),
        (cache.RECORD_NAME, Path.unlink),
        (cache.RECORD_NAME, lambda path: path.write_bytes(b"")),
        (cache.RECORD_NAME, lambda path: path.write_text("[]")),
        (cache.RECORD_NAME, lambda path: path.write_text("{}")),
        (cache.RECORD_NAME, lambda path: path.write_bytes(b"\xff\xfe")),
        (cache.RECORD_NAME, lambda path: path.write_text("[" * 100_000)),
    ],
)
def test_damage_is_a_miss_and_is_repaired(tmp_path: Path, name: str, damage: object) -> None:
    fill(tmp_path)
    damage(tmp_path / DIGEST / name)  # type: ignore[operator]
    assert cache.read_entry(tmp_path, DIGEST) is None
    assert not fill(tmp_path).from_cache
    assert cache.fetch(DIGEST, must_not_build, tmp_path).cubin == KERNEL.cubin
    assert {path.name for path in tmp_path.iterdir()} == {DIGEST, cache.LOCK_FOLDER}  # no leftovers


def test_a_file_where_the_entry_should_be_is_replaced(tmp_path: Path) -> None:
    (tmp_path / DIGEST).write_text("not a folder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fill(tmp_path).path is not None


@pytest.fixture
def _fresh_warning() -> None:
    cache._warn_unwritable.cache_clear()


@pytest.mark.usefixtures("_fresh_warning")
def test_an_impossible_folder_warns_once_and_builds_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    impossible = tmp_path / "file" / "cache"
    with pytest.warns(RuntimeWarning, match="CUPY_MLA_CACHE_DIR") as caught:
        kernels = [fill(impossible) for _ in range(3)]
    assert len(caught) == 1
    assert all(kernel.path is None and kernel.cubin == KERNEL.cubin for kernel in kernels)


@pytest.mark.usefixtures("_fresh_warning")
@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_warns_and_is_still_read(tmp_path: Path) -> None:
    fill(tmp_path)
    tmp_path.chmod(0o500)
    try:
        assert cache.fetch(DIGEST, must_not_build, tmp_path).from_cache
        with pytest.warns(RuntimeWarning, match="Permission denied"):
            assert cache.fetch("other", lambda: KERNEL, tmp_path).path is None
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.usefixtures("_fresh_warning")
def test_a_full_disk_warns_and_keeps_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    builds = []

    def build() -> CompiledKernel:
        builds.append(1)
        return KERNEL

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        kernel = cache.fetch(DIGEST, build, tmp_path)
    assert kernel.cubin == KERNEL.cubin
    assert kernel.path is None
    assert builds == [1]
    assert {path.name for path in tmp_path.iterdir()} == {cache.LOCK_FOLDER}


def test_an_error_of_the_build_is_not_taken_for_one_of_the_folder(tmp_path: Path) -> None:
    def build() -> CompiledKernel:
        raise OSError("the compiler's own trouble")

    with pytest.raises(OSError, match="the compiler's own trouble"):
        cache.fetch(DIGEST, build, tmp_path)


def test_a_file_system_without_locks_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def no_locks(file: object, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert fill(tmp_path).path is not None


def slow_build(log: Path) -> CompiledKernel:
    with log.open("ab") as file:  # append: one byte per build, whoever makes it
        file.write(b"b")
    time.sleep(BUILD_SECONDS)
    return KERNEL


def fetch_in_process(cache_dir: Path, log: Path, barrier: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    kernel = cache.fetch(DIGEST, lambda: slow_build(log), cache_dir)
    if kernel.cubin != KERNEL.cubin:
        raise SystemExit("wrong cubin")


def test_many_processes_build_once(tmp_path: Path) -> None:
    log = tmp_path / "builds"
    barrier = spawn.Barrier(PROCESSES)
    processes = [
        spawn.Process(target=fetch_in_process, args=(tmp_path / "cache", log, barrier)) for _ in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    assert log.read_bytes() == b"b"


def test_many_threads_build_once(tmp_path: Path) -> None:
    log = tmp_path / "builds"
    barrier = threading.Barrier(PROCESSES)
    threads = [
        threading.Thread(target=fetch_in_process, args=(tmp_path / "cache", log, barrier)) for _ in range(PROCESSES)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.read_bytes() == b"b"


def fetch_forever(cache_dir: Path, started: object) -> None:
    def build() -> CompiledKernel:
        started.set()  # type: ignore[attr-defined]
        time.sleep(600)
        return KERNEL

    cache.fetch(DIGEST, build, cache_dir)


def test_a_killed_builder_does_not_block_the_others(tmp_path: Path) -> None:
    started = spawn.Event()
    process = spawn.Process(target=fetch_forever, args=(tmp_path, started))
    process.start()
    assert started.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not fill(tmp_path).from_cache
    assert cache.fetch(DIGEST, must_not_build, tmp_path).from_cache


def test_readers_never_see_half_an_entry(tmp_path: Path) -> None:
    """One thread damages and repairs the entry over and over; whatever readers get is whole."""
    fill(tmp_path)
    stop = threading.Event()
    wrong: list[bytes] = []

    def read() -> None:
        while not stop.is_set():
            found = cache.read_entry(tmp_path, DIGEST)
            if found is not None and found.cubin != KERNEL.cubin:
                wrong.append(found.cubin)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for _ in range(50):
        truncate(tmp_path / DIGEST / cache.CUBIN_NAME)
        fill(tmp_path)
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == []
