"""Cubin to a function on a GPU: through the disk cache, then ``cupy.RawModule``."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DriverError
from ...settings import get_settings
from .. import device
from .source import KernelSource, compile_options, digest, read_files

# The compiler and the cache, with what they import, are needed when the first kernel is loaded, not before.
if TYPE_CHECKING:
    from .compiler import CompiledKernel, ResourceUsage


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    """A kernel that is ready to be launched on one GPU.

    Attributes
    ----------
    handle : int
        The driver's ``CUfunction``.
    source : KernelSource
        What it was compiled from.
    usage : ResourceUsage
        Registers, spills and shared memory.
    device_id : int
        The GPU it is loaded on.
    max_dynamic_smem : int
        Bytes of dynamic shared memory that a launch may ask for; set on the function already.
    """

    handle: int
    source: KernelSource
    usage: ResourceUsage
    device_id: int
    max_dynamic_smem: int
    _owner: Any = field(repr=False, compare=False)  # CuPy's kernel object: the module is unloaded with it


class _SourceChangedError(Exception):
    """A file was edited between its digest and its compilation: the cubin must not be kept under that digest."""


_loaded: dict[tuple[KernelSource, int], LoadedKernel] = {}
_loading = threading.Lock()


def get_cubin(source: KernelSource, *, cache_dir: Path | None = None, root: Path | None = None) -> CompiledKernel:
    """Return a kernel's cubin, from the disk cache or compiled now. Needs no GPU.

    Parameters
    ----------
    source : KernelSource
        The kernel.
    cache_dir : Path, optional
        The cache folder; the one of the settings unless given.
    root : Path, optional
        The kernel folder; ``source.kernels_root()`` unless given.

    Raises
    ------
    CompilationError
        The compiler refused; the exception carries its log.
    MissingDependencyError
        cuda-bindings or the NVRTC library is not installed.
    """
    from . import cache, compiler

    cache_dir = get_settings().cache_dir if cache_dir is None else cache_dir
    version = compiler.compiler_version()

    def build() -> CompiledKernel:
        kernel = compiler.compile_source(source, root)
        if digest(source, version, root) != key:
            raise _SourceChangedError
        return kernel

    while True:
        key = digest(source, version, root)
        with contextlib.suppress(_SourceChangedError):
            return cache.fetch(key, build, cache_dir, lambda: _describe(source, version, root))


def find_cubin(source: KernelSource) -> CompiledKernel | None:
    """Return a kernel's cubin if the disk cache has it; compiles nothing.

    Raises
    ------
    CompilationError
        The entry file cannot be read, or NVRTC is too old.
    MissingDependencyError
        cuda-bindings or the NVRTC library is not installed.
    """
    from . import cache, compiler

    return cache.read_entry(get_settings().cache_dir, digest(source, compiler.compiler_version()))


def load(source: KernelSource, device_id: int) -> LoadedKernel:
    """Return a kernel loaded on a GPU; the same object whenever it is asked for again.

    Every launch may use as much dynamic shared memory as the GPU gives one CTA.

    Parameters
    ----------
    source : KernelSource
        The kernel.
    device_id : int
        CUDA's number of the GPU.

    Raises
    ------
    UnsupportedDeviceError
        The GPU is not a Hopper GPU, or there is none.
    CompilationError
        The compiler refused; the exception carries its log.
    DriverError
        The driver did not load the cubin, e.g. as it is of an earlier CUDA than the compiler.
    MissingDependencyError
        CuPy, cuda-bindings or the NVRTC library is not installed.
    """
    found = _loaded.get((source, device_id))
    if found is not None:
        return found
    with _loading:
        found = _loaded.get((source, device_id))
        if found is None:
            found = _loaded[source, device_id] = _load(source, device_id)
    return found


def _load(source: KernelSource, device_id: int) -> LoadedKernel:
    info = device.require_supported(device_id)
    kernel = get_cubin(source)

    import cupy

    max_dynamic_smem = info.max_smem_per_cta - kernel.usage.static_smem
    with cupy.cuda.Device(device_id), _cubin_file(kernel) as path:
        try:
            function = cupy.RawModule(path=str(path)).get_function(source.function)
            handle = function.kernel.ptr  # loads the module
            function.max_dynamic_shared_size_bytes = max_dynamic_smem
        except cupy.cuda.driver.CUDADriverError as error:
            raise DriverError(f"loading {source}", error.status, f"{error} ({_versions()})") from error
    return LoadedKernel(handle, source, kernel.usage, device_id, max_dynamic_smem, function)


def _versions() -> str:
    """What decides whether a driver takes a cubin: it may be older than the compiler, of an earlier CUDA it may not."""
    from . import compiler

    return f"compiled by {compiler.compiler_version()}, the driver supports CUDA {device.driver_cuda_version()}"


@contextlib.contextmanager
def _cubin_file(kernel: CompiledKernel) -> Iterator[Path]:
    """Give the cubin as a file, which RawModule wants: one that lasts as long as the loading, in a folder that nobody
    else can write to. What is loaded is what was verified, whatever has become of the cached file since."""
    import tempfile

    from .cache import CUBIN_NAME

    with tempfile.TemporaryDirectory(prefix="cupy_mla-") as folder:
        path = Path(folder) / CUBIN_NAME
        path.write_bytes(kernel.cubin)
        yield path


def _describe(source: KernelSource, version: str, root: Path | None) -> dict[str, Any]:
    """Return what the cache keeps beside the cubin for people who look."""
    import hashlib

    files = read_files(source, root)
    return {
        "entry": source.entry,
        "function": source.function,
        "defines": dict(source.defines),
        "options": list(compile_options(source)),
        "compiler": version,
        "files": {name: hashlib.sha256(contents).hexdigest() for name, contents in sorted(files.items())},
    }
