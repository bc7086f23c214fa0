"""``cupy-mla info``: what is here, and what is supported or why not."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import click

from .. import __version__
from ..errors import MlaError
from ..gpu import device
from ..gpu.jit import cache, compiler
from ..lab.files import to_json
from ..settings import BACKEND_VARIABLE, CACHE_DIR_VARIABLE, VALIDATE_VARIABLE, get_settings
from ..shown.tables import print_facts
from .command import Command
from .common import json_option

_PACKAGES = ("numpy", "ml_dtypes", "apache-tvm-ffi", "cuda-bindings", "torch", "jax")
_CUPY_WHEELS = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
_MISSING = "not installed"


@click.command(cls=Command, short_help="What this machine can run, and why not.")
@json_option
def info(as_json: bool) -> None:
    """Show GPUs, driver, CuPy, NVRTC, kernel cache and settings, and what is supported or why not."""
    facts = collect_facts()
    if as_json:
        click.echo(to_json(facts, indent=2))
    else:
        print_facts("cupy-mla info", facts)


def collect_facts() -> dict[str, str]:
    """Everything that ``cupy-mla info`` shows, by name."""
    settings = get_settings()
    return {
        "cupy-mla": __version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        **_gpus(),
        "driver": f"supports CUDA {device.driver_cuda_version()}" if device.driver_cuda_version() else "none",
        "CuPy": _cupy(),
        "compiler": _compiler(),
        **{name: _version(name) for name in _PACKAGES},
        "kernel cache": f"{settings.cache_dir}: {_cached(settings.cache_dir)} ({CACHE_DIR_VARIABLE})",
        "backend": f"{settings.backend} ({BACKEND_VARIABLE})",
        "validate": f"{'on' if settings.validate else 'off'} ({VALIDATE_VARIABLE})",
        "CUDA arrays": _support(device.why_unsupported()),
        "CPU arrays": "supported: NumPy backend",
        "compiling ahead": _support(compiler.why_unavailable()),
    }


def _cached(cache_dir: Path) -> str:
    try:
        kernels, size = cache.count_entries(cache_dir)
    except OSError as error:  # another user's folder, a name that is too long
        return f"cannot be read ({error.strerror or error})"
    return f"{kernels} kernels, {size / 1e6:.1f} MB"


def _gpus() -> dict[str, str]:
    facts = {}
    for number in range(device.count_devices()):
        gpu = device.describe_device(number)
        major, minor = gpu.compute_capability
        facts[f"GPU {number}"] = (
            f"{gpu.name}, compute capability {major}.{minor}, {gpu.num_sms} SMs, {gpu.memory_bytes / 1e9:.0f} GB, "
            f"{gpu.l2_bytes / 1e6:.0f} MB L2"
        )
    if not facts and device.driver_cuda_version() and _cupy() == _MISSING:
        return {"GPU": "not known without CuPy"}
    return facts or {"GPU": "none"}


def _cupy() -> str:
    return next((f"{_version(name)} ({name})" for name in _CUPY_WHEELS if _version(name) != _MISSING), _MISSING)


def _compiler() -> str:
    try:
        return compiler.compiler_version()
    except MlaError as error:
        return str(error)


def _support(reason: str | None) -> str:
    return "supported" if reason is None else f"not supported: {reason}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return _MISSING
