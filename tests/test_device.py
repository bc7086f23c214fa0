"""device: what is said of GPUs that cannot run the kernels (CUDA's runtime stood in for)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cupy_mla.errors import UnsupportedDeviceError
from cupy_mla.gpu import device


class FakeRuntimeError(RuntimeError):
    """Stands for CuPy's CUDARuntimeError."""


def fake_runtime(count: int | Exception, *, driver: int, built_for: int = 12090, major: int = 9) -> SimpleNamespace:
    def get_device_count() -> int:
        if isinstance(count, Exception):
            raise count
        return count

    properties = {
        "name": b"NVIDIA H200",
        "major": major,
        "minor": 0,
        "multiProcessorCount": 132,
        "totalGlobalMem": 141 << 30,
        "l2CacheSize": 60 << 20,
        "sharedMemPerBlockOptin": 232448,
    }
    return SimpleNamespace(
        CUDARuntimeError=FakeRuntimeError,
        getDeviceCount=get_device_count,
        driverGetVersion=lambda: driver,
        runtimeGetVersion=lambda: built_for,
        getDeviceProperties=lambda device_id: properties,
    )


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    def clear() -> None:
        device.describe_device.cache_clear()
        device.require_supported.cache_clear()
        device._why_no_cuda.cache_clear()

    clear()
    yield
    clear()


def test_a_hopper_gpu_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_runtime", lambda: fake_runtime(2, driver=13000))
    assert device.count_devices() == 2
    assert device.why_unsupported(1) is None
    assert device.driver_cuda_version() == "13.0"
    info = device.require_supported(1)
    assert (info.device_id, info.name, info.compute_capability, info.num_sms) == (1, "NVIDIA H200", (9, 0), 132)
    assert info.is_hopper


def no_cupy() -> SimpleNamespace:
    raise ImportError("No module named 'cupy'")


NO_LIBRARY = "lib-that-is-not-there.so"


def no_cache_folder() -> SimpleNamespace:
    raise PermissionError(13, "Permission denied", "/nobody/.cupy")


@pytest.mark.parametrize(
    ("runtime", "reason"),
    [
        (no_cupy, "no NVIDIA driver is installed"),
        (no_cache_folder, r"/nobody/\.cupy.*CUPY_CACHE_DIR"),
        (lambda: fake_runtime(0, driver=0), "no NVIDIA driver"),
        (lambda: fake_runtime(0, driver=13000), "there is no GPU"),
        (
            lambda: fake_runtime(FakeRuntimeError("insufficient"), driver=12040, built_for=13000),
            r"supports CUDA 12\.4, but this CuPy is built for CUDA 13\.0.*\.\[cuda12\]",
        ),
        (lambda: fake_runtime(FakeRuntimeError("cudaErrorNoDevice"), driver=13000), "cudaErrorNoDevice"),
        (lambda: fake_runtime(1, driver=13000, major=8), r"compute capability 8\.0; the kernels need Hopper"),
    ],
    ids=["no CuPy", "no cache folder for CuPy", "no driver", "no GPU", "old driver", "hidden GPU", "not Hopper"],
)
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, runtime: object, reason: str) -> None:
    monkeypatch.setattr(device, "_runtime", runtime)
    monkeypatch.setattr(device, "_DRIVER_LIBRARY", NO_LIBRARY)
    with pytest.raises(UnsupportedDeviceError, match=f"{reason}.*NumPy backend"):
        device.require_supported()


def test_where_there_is_a_driver_cupy_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_runtime", no_cupy)
    monkeypatch.setattr(device, "_driver_version_without_cupy", lambda: 13000)
    assert device.driver_cuda_version() == "13.0"
    with pytest.raises(UnsupportedDeviceError, match=r"CuPy cannot be imported.*\.\[cuda12\].*NumPy backend"):
        device.require_supported()


def test_the_driver_itself_says_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "_runtime", no_cupy)
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed")
    for name, body in (("driver", "int cuDriverGetVersion(int *v) { *v = 12080; return 0; }"), ("other", "int x;")):
        source = tmp_path / f"{name}.c"
        source.write_text(body, encoding="utf-8")
        subprocess.run([compiler, "-shared", "-o", str(tmp_path / f"{name}.so"), str(source)], check=True)
    for name, version in (("driver", "12.8"), ("other", None)):
        monkeypatch.setattr(device, "_DRIVER_LIBRARY", str(tmp_path / f"{name}.so"))
        assert device.driver_cuda_version() == version


def test_a_gpu_number_out_of_range_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_runtime", lambda: fake_runtime(2, driver=13000))
    for device_id in (-1, 2):
        with pytest.raises(UnsupportedDeviceError, match=rf"no GPU {device_id} \(GPUs: 2\)"):
            device.describe_device(device_id)


def test_counting_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_runtime", no_cupy)
    monkeypatch.setattr(device, "_DRIVER_LIBRARY", NO_LIBRARY)
    assert device.count_devices() == 0
    assert device.driver_cuda_version() is None
