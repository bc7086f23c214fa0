"""jit.module: source to cubin through the disk cache, and to a function on a GPU (CuPy stood in for)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cupy_mla.errors import DriverError, UnsupportedDeviceError
from cupy_mla.gpu import device
from cupy_mla.gpu.jit import cache, compiler, module
from cupy_mla.gpu.jit.compiler import CompiledKernel
from cupy_mla.gpu.jit.source import KernelSource

HOPPER = device.DeviceInfo(0, "NVIDIA H200", (9, 0), 132, 141 << 30, 60 << 20, 232448)
HANDLE = 0xC0FFEE

needs_nvrtc = pytest.mark.skipif(
    compiler.why_unavailable() is not None, reason=f"no compiler: {compiler.why_unavailable()}"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "kernels"
    (root / "core").mkdir(parents=True)
    (root / "core" / "factor.h").write_text("#pragma once\n#define FACTOR 3.0f\n")
    (root / "scale.cu").write_text(
        '#include "core/factor.h"\nextern "C" __global__ void scale(float* x) { x[threadIdx.x] *= FACTOR; }\n'
    )
    return root


SOURCE = KernelSource("scale.cu", "scale")


@needs_nvrtc
def test_the_cache_follows_an_edited_header(root: Path, tmp_path: Path) -> None:
    def get() -> CompiledKernel:
        return module.get_cubin(SOURCE, cache_dir=tmp_path / "cache", root=root)

    first, second = get(), get()
    assert (first.from_cache, second.from_cache) == (False, True)
    (root / "core" / "factor.h").write_text("#pragma once\n#define FACTOR 4.0f\n")
    third = get()
    assert not third.from_cache
    assert third.cubin != first.cubin
    (root / "core" / "factor.h").write_text("#pragma once\n#define FACTOR 3.0f\n")
    assert get().cubin == first.cubin
    assert cache.count_entries(tmp_path / "cache")[0] == 2


@needs_nvrtc
def test_a_file_edited_while_it_compiles_is_compiled_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = root / "core" / "factor.h"
    compile_source = compiler.compile_source
    compiled = []

    def compile_and_edit(source: KernelSource, root: Path | None = None) -> CompiledKernel:
        kernel = compile_source(source, root)
        compiled.append(kernel.cubin)
        if len(compiled) == 1:
            header.write_text("#pragma once\n#define FACTOR 4.0f\n")
        return kernel

    monkeypatch.setattr(compiler, "compile_source", compile_and_edit)
    kernel = module.get_cubin(SOURCE, cache_dir=tmp_path / "cache", root=root)
    assert len(compiled) == 2
    assert kernel.cubin == compiled[1] != compiled[0]
    assert cache.count_entries(tmp_path / "cache")[0] == 1


@needs_nvrtc
def test_a_fresh_process_with_a_warm_cache_compiles_nothing_and_imports_no_cupy(root: Path, tmp_path: Path) -> None:
    module.get_cubin(SOURCE, cache_dir=tmp_path / "cache", root=root)
    script = f"""
import sys
from pathlib import Path
from cupy_mla.gpu.jit import module
from cupy_mla.gpu.jit.source import KernelSource
kernel = module.get_cubin(KernelSource("scale.cu", "scale"), cache_dir=Path({str(tmp_path / "cache")!r}),
                          root=Path({str(root)!r}))
assert kernel.from_cache
assert "cupy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_a_gpu_loading_says_so_and_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "why_unsupported", lambda device_id=0: "there is no GPU")
    monkeypatch.setattr(module, "get_cubin", lambda source: pytest.fail("compiled"))
    with pytest.raises(UnsupportedDeviceError, match=r"there is no GPU.*NumPy backend"):
        module.load(SOURCE, 0)


class FakeDriverError(RuntimeError):
    status = 209


class FakeCupy:
    """Stands in for CuPy: notes what is loaded, and what lay in the file at that moment."""

    def __init__(self) -> None:
        self.cubins: list[bytes] = []
        self.paths: list[Path] = []
        self.functions: list[SimpleNamespace] = []
        self.entered: list[int] = []
        self.error: Exception | None = None
        self.cuda = SimpleNamespace(Device=self._device, driver=SimpleNamespace(CUDADriverError=FakeDriverError))

    def _device(self, device_id: int) -> FakeCupy:
        self.entered.append(device_id)
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass

    def RawModule(self, path: str) -> SimpleNamespace:  # noqa: N802 (CuPy's name)
        return SimpleNamespace(get_function=lambda name: self._get_function(Path(path), name))

    def _get_function(self, path: Path, name: str) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        self.paths.append(path)
        self.cubins.append(path.read_bytes())
        self.functions.append(SimpleNamespace(name=name, kernel=SimpleNamespace(ptr=HANDLE)))
        return self.functions[-1]


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(device, "why_unsupported", lambda device_id=0: None)
    monkeypatch.setattr(device, "describe_device", lambda device_id=0: HOPPER)
    monkeypatch.setattr(module, "_loaded", {})
    return fake


@pytest.fixture
def get_cubin(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.get_cubin
    monkeypatch.setattr(module, "get_cubin", lambda source: original(source, cache_dir=tmp_path / "cache", root=root))


@needs_nvrtc
@pytest.mark.usefixtures("get_cubin")
def test_a_kernel_is_loaded_once_per_device_from_a_file_of_what_was_verified(cupy: FakeCupy, tmp_path: Path) -> None:
    loaded = module.load(SOURCE, 0)
    assert loaded.handle == HANDLE
    assert loaded.usage.registers > 0
    assert loaded.max_dynamic_smem == HOPPER.max_smem_per_cta
    assert cupy.functions[0].name == "scale"
    assert cupy.functions[0].max_dynamic_shared_size_bytes == HOPPER.max_smem_per_cta
    assert cupy.cubins[0] == module.get_cubin(SOURCE).cubin
    assert not cupy.paths[0].is_relative_to(tmp_path / "cache")  # where it may be swapped after the check
    assert not cupy.paths[0].exists()
    assert module.load(SOURCE, 0) is loaded
    assert module.load(SOURCE, 1).device_id == 1
    assert cupy.entered == [0, 1]


@needs_nvrtc
def test_without_a_cache_the_cubin_goes_through_a_file_that_does_not_stay(
    cupy: FakeCupy, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = compiler.compile_source(SOURCE, root)
    monkeypatch.setattr(module, "get_cubin", lambda source: kernel)
    module.load(SOURCE, 0)
    assert cupy.cubins == [kernel.cubin]
    assert not cupy.paths[0].exists()


@needs_nvrtc
@pytest.mark.usefixtures("get_cubin")
def test_a_driver_failure_is_ours(cupy: FakeCupy) -> None:
    cupy.error = FakeDriverError("CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image")
    with pytest.raises(DriverError, match="CUDA_ERROR_NO_BINARY_FOR_GPU") as caught:
        module.load(SOURCE, 0)
    assert caught.value.code == FakeDriverError.status


@needs_nvrtc
@pytest.mark.usefixtures("get_cubin")
def test_another_driver_gets_the_same_cubin(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the driver is in a cubin: after an update, or in a home that machines share, none is compiled anew."""
    monkeypatch.setattr(device, "driver_cuda_version", lambda: "12.9")
    module.load(SOURCE, 0)
    monkeypatch.setattr(module, "_loaded", {})
    monkeypatch.setattr(device, "driver_cuda_version", lambda: "13.1")
    monkeypatch.setattr(compiler, "compile_source", lambda *_: pytest.fail("compiled anew"))
    module.load(SOURCE, 0)
    assert cupy.cubins[0] == cupy.cubins[1]


@needs_nvrtc
@pytest.mark.usefixtures("get_cubin")
def test_a_driver_that_is_too_old_is_named_and_a_newer_one_gets_what_was_kept(
    cupy: FakeCupy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "driver_cuda_version", lambda: "12.2")
    cupy.error = FakeDriverError("CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image")
    versions = f"compiled by {compiler.compiler_version()}, the driver supports CUDA 12.2"
    for _ in range(2):
        with pytest.raises(DriverError, match=re.escape(versions)):
            module.load(SOURCE, 0)
    assert [entry.is_good for entry in cache.list_entries(tmp_path / "cache")] == [True]
    cupy.error = None
    monkeypatch.setattr(compiler, "compile_source", lambda *_: pytest.fail("compiled anew"))
    assert module.load(SOURCE, 0).handle == HANDLE


@needs_nvrtc
def test_what_another_compiler_made_is_left_to_it(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def get() -> CompiledKernel:
        return module.get_cubin(SOURCE, cache_dir=tmp_path / "cache", root=root)

    get()
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "compiler_version", lambda: "NVRTC 99.0")
        assert not get().from_cache
        assert get().from_cache
    assert get().from_cache
    assert len(cache.list_entries(tmp_path / "cache")) == 2


def test_a_loaded_kernel_is_not_looked_up_again(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = compiler.ResourceUsage(1, 0, 0, 0, 0, 0)
    loaded = module.LoadedKernel(HANDLE, SOURCE, usage, 0, 0, None)
    monkeypatch.setattr(module, "get_cubin", lambda source: pytest.fail("looked up again"))
    module._loaded[SOURCE, 0] = loaded
    assert module.load(KernelSource("scale.cu", "scale"), 0) is loaded
