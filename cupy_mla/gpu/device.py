"""The GPUs of this machine: what they are, and whether the kernels run on them, or why not."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

from ..arrays.frameworks import CUDA
from ..errors import UnsupportedDeviceError, install_command
from ..settings import get_settings
from . import hopper

CUDA_EXTRA = "cuda12"  # runs on every driver that the kernels do
NUMPY_WAY_OUT = "arrays in host memory run on the NumPy backend instead"
_DRIVER_LIBRARY = "libcuda.so.1"
_NO_DRIVER = "no NVIDIA driver is installed"


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One GPU.

    Attributes
    ----------
    device_id : int
        CUDA's number of it.
    name : str
        For example ``"NVIDIA H200"``.
    compute_capability : (int, int)
        (9, 0) for Hopper.
    num_sms : int
        Streaming multiprocessors.
    memory_bytes, l2_bytes : int
        Device memory and L2 cache, in bytes.
    max_smem_per_cta : int
        The most shared memory one CTA can opt in to, in bytes.
    """

    device_id: int
    name: str
    compute_capability: tuple[int, int]
    num_sms: int
    memory_bytes: int
    l2_bytes: int
    max_smem_per_cta: int

    @property
    def is_hopper(self) -> bool:
        """Whether the kernels, which are machine code for it alone, can run on it."""
        return self.compute_capability == hopper.COMPUTE_CAPABILITY


def count_devices() -> int:
    """Return the number of CUDA GPUs; 0 without CuPy, without a driver or without a GPU."""
    return 0 if _why_no_cuda() else _device_count()


@functools.cache
def describe_device(device_id: int = 0) -> DeviceInfo:
    """Return what a GPU is.

    Raises
    ------
    UnsupportedDeviceError
        There is no such GPU.
    """
    reason = _why_no_cuda() or _why_no_device(device_id)
    if reason is not None:
        raise UnsupportedDeviceError(f"{reason}; {NUMPY_WAY_OUT}")
    properties = _runtime().getDeviceProperties(device_id)
    return DeviceInfo(
        device_id=device_id,
        name=properties["name"].decode(),
        compute_capability=(properties["major"], properties["minor"]),
        num_sms=properties["multiProcessorCount"],
        memory_bytes=properties["totalGlobalMem"],
        l2_bytes=properties["l2CacheSize"],
        max_smem_per_cta=properties["sharedMemPerBlockOptin"],
    )


def why_unsupported(device_id: int = 0) -> str | None:
    """Return why the Hopper kernels cannot run on a GPU, in words for the user, or None when they can."""
    reason = _why_no_cuda() or _why_no_device(device_id)
    if reason is not None:
        return reason
    info = describe_device(device_id)
    if not info.is_hopper:
        major, minor = info.compute_capability
        return f"GPU {device_id} is a {info.name} of compute capability {major}.{minor}; the kernels need Hopper (9.0)"
    return None


@functools.cache  # that it can; asked for by every append and merge
def require_supported(device_id: int = 0) -> DeviceInfo:
    """Return what a GPU is, if the Hopper kernels can run on it.

    Raises
    ------
    UnsupportedDeviceError
        They cannot; the message says why, and the way out.
    """
    reason = why_unsupported(device_id)
    if reason is not None:
        raise UnsupportedDeviceError(f"{reason}; {NUMPY_WAY_OUT}")
    return describe_device(device_id)


def require_backend(device: str, device_id: int, name: str) -> bool:
    """Whether work on arrays of a device runs on the GPU; refuses what the settings or the GPU do not allow.

    Parameters
    ----------
    device, device_id
        ``"cpu"`` or ``"cuda"``, and the GPU's number.
    name
        What lies there; for the message.

    Raises
    ------
    UnsupportedDeviceError
        CUPY_MLA_BACKEND asks for the other device, or the GPU is not Hopper.
    """
    backend = get_settings().backend
    if device == CUDA:
        if backend == "numpy":
            raise UnsupportedDeviceError(f"CUPY_MLA_BACKEND=numpy takes CPU arrays; {name} is on a CUDA device")
        require_supported(device_id)
        return True
    if backend == "cuda":
        raise UnsupportedDeviceError(f"CUPY_MLA_BACKEND=cuda takes CUDA arrays; {name} is on the CPU")
    return False


def require_cuda() -> None:
    """Refuse a machine on which no GPU can be used.

    Raises
    ------
    UnsupportedDeviceError
        There is none, no driver or no CuPy; the message says which, and the way out.
    """
    reason = _why_no_cuda()
    if reason is not None:
        raise UnsupportedDeviceError(f"{reason}; {NUMPY_WAY_OUT}")


def driver_cuda_version() -> str | None:
    """Return the newest CUDA version that the driver supports, e.g. ``"13.0"``; None without a driver."""
    version = _driver_version()
    return _version_text(version) if version else None


def _runtime() -> Any:
    from cupy.cuda import runtime

    return runtime


def _device_count() -> int:
    return int(_runtime().getDeviceCount())


def _driver_version() -> int:
    """Return the driver's CUDA version as CUDA numbers it (13000 is 13.0); 0 without a driver."""
    try:
        return int(_runtime().driverGetVersion())
    except (ImportError, OSError):
        return _driver_version_without_cupy()


def _driver_version_without_cupy() -> int:
    """The driver's own answer: what to install depends on whether there is a driver at all."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL(_DRIVER_LIBRARY).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):  # no such library, or one that is not NVIDIA's
        return 0
    return version.value


def _version_text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@functools.lru_cache(maxsize=1)
def _why_no_cuda() -> str | None:
    """Return why no GPU can be used at all, or None."""
    try:
        runtime = _runtime()
    except ImportError as error:
        if not _driver_version():
            return _NO_DRIVER
        return f"CuPy cannot be imported ({error}): {install_command(CUDA_EXTRA)}"
    except OSError as error:  # CuPy makes its cache folder when it is imported
        return f"CuPy cannot be imported ({error}): set CUPY_CACHE_DIR to a folder that can be written"
    driver = _driver_version()
    if not driver:
        return _NO_DRIVER
    try:
        return None if _device_count() else "there is no GPU"
    except runtime.CUDARuntimeError as error:
        built_for = runtime.runtimeGetVersion()
        if driver // 1000 < built_for // 1000:
            return (
                f"the driver supports CUDA {_version_text(driver)}, but this CuPy is built for "
                f"CUDA {_version_text(built_for)}: in a fresh environment, {install_command(CUDA_EXTRA)}"
            )
        return f"CUDA does not start: {error}"


def _why_no_device(device_id: int) -> str | None:
    count = _device_count()
    return None if 0 <= device_id < count else f"there is no GPU {device_id} (GPUs: {count})"
