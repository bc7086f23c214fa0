"""jit.compiler: NVRTC without a GPU, its report and its errors."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cupy_mla.errors import CompilationError, MissingDependencyError
from cupy_mla.gpu.jit import compiler
from cupy_mla.gpu.jit.compiler import CompiledKernel, ResourceUsage, compile_source, parse_usage, parse_warnings
from cupy_mla.gpu.jit.source import KernelSource

ELF_MAGIC = b"\x7fELF"

needs_nvrtc = pytest.mark.skipif(
    compiler.why_unavailable() is not None, reason=f"no compiler: {compiler.why_unavailable()}"
)

# What ptxas 12.9 printed for two kernels of one file, one of which calls a function that was not inlined.
LOG = """\
kernel.cu(3): warning #177-D: variable "unused" was declared but never referenced
  int unused;
      ^

Remark: The warnings can be suppressed with "-diag-suppress <warning-number>"

ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x in 'first'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
ptxas         .     400 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 400 bytes cumulative stack size
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers, 1024 bytes smem
ptxas info    : Function properties for _Z6helperPf
ptxas         .     16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "types.h").write_text("#pragma once\nusing f32 = float;\n")
    return tmp_path


def write(root: Path, text: str) -> KernelSource:
    folder = root / "test"
    folder.mkdir()
    (folder / "test.cu").write_text(text)
    return KernelSource("test/test.cu", "test", (("FACTOR", "3"),))


def test_usage_of_one_kernel_among_several() -> None:
    assert parse_usage(LOG, "first") == ResourceUsage(
        registers=168, spill_stores=4, spill_loads=8, stack_frame=16, static_smem=1024, barriers=9
    )
    assert parse_usage(LOG, "second") == ResourceUsage(
        registers=255, spill_stores=44, spill_loads=52, stack_frame=416, static_smem=0, barriers=0
    )


def test_usage_of_a_kernel_that_is_not_there() -> None:
    with pytest.raises(CompilationError, match=r"no kernel third \(kernels: first, second\)"):
        parse_usage(LOG, "third")


def test_warnings_are_found() -> None:
    first, second = parse_warnings(LOG)
    assert "#177-D" in first
    assert "C7510" in second


def test_problems_are_spills_stack_and_advisories() -> None:
    def problems(function: str, log: str) -> tuple[str, ...]:
        return CompiledKernel(b"", log, parse_usage(log, function), parse_warnings(log), 0.0).problems

    spills, stack, advisory = problems("second", LOG)
    assert "spills 44 bytes and reloads 52 bytes" in spills
    assert "416 bytes" in stack
    assert "C7510" in advisory
    clean = LOG[
        LOG.index("ptxas info    : Compiling entry function 'first'") : LOG.index("ptxas info    : Function prop")
    ]
    assert clean == ""  # the slice below starts at the kernel without spills
    clean = LOG[
        LOG.index("ptxas info    : Compiling entry function 'first'") : LOG.index(
            "ptxas info    : Function properties for _Z6helper"
        )
    ]
    assert problems("first", clean) == ()


@needs_nvrtc
def test_a_kernel_compiles_to_a_cubin(root: Path) -> None:
    source = write(
        root,
        """
        #include "core/types.h"
        #include "../core/types.h"
        extern "C" __global__ void test(f32* x) {
            __shared__ f32 tile[64];
            tile[threadIdx.x] = x[threadIdx.x];
            __syncthreads();
            x[threadIdx.x] = FACTOR * tile[63 - threadIdx.x];
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");  // sm_90a only
        }
        """,
    )
    kernel = compile_source(source, root)
    assert kernel.cubin.startswith(ELF_MAGIC)
    assert kernel.usage.registers > 0
    assert kernel.usage.static_smem == 64 * 4
    assert kernel.usage.barriers == 1
    assert kernel.warnings == kernel.problems == ()
    assert kernel.compile_seconds > 0
    assert kernel.path is None
    assert not kernel.from_cache


@needs_nvrtc
def test_compiling_again_reports_again(root: Path) -> None:
    # NVRTC 13 has a cache of its own; a hit there would leave the log, and so the report, empty.
    (root / "again.cu").write_text('extern "C" __global__ void again(float* x) { x[0] = 1.0f; }\n')
    source = KernelSource("again.cu", "again")
    assert compile_source(source, root).usage == compile_source(source, root).usage


@needs_nvrtc
def test_local_memory_is_a_problem(root: Path) -> None:
    source = write(
        root,
        """
        extern "C" __global__ void test(float* x, int n) {
            float table[64];
            for (int i = 0; i < 64; ++i) table[i] = x[i];
            for (int i = 0; i < n; ++i) x[i] = table[(i * n) % 64];
        }
        """,
    )
    kernel = compile_source(source, root)
    assert kernel.usage.stack_frame >= 64 * 4
    assert any("stack frame" in problem for problem in kernel.problems)


@needs_nvrtc
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('extern "C" __global__ void test(float* x) { *x = undefined_name; }', "undefined_name"),
        ('#include "none.h"\nextern "C" __global__ void test() {}', "none.h"),
        ('extern "C" __global__ void test() { asm volatile("bogus.op;"); }', "bogus"),
        ('extern "C" __global__ void other() {}', "no kernel test"),
    ],
    ids=["syntax", "include", "ptx", "name"],
)
def test_an_error_carries_the_compilers_log(root: Path, text: str, complaint: str) -> None:
    with pytest.raises(CompilationError) as caught:
        compile_source(write(root, text), root)
    assert complaint in str(caught.value)
    assert caught.value.log


@needs_nvrtc
def test_threads_may_compile_at_the_same_time(root: Path) -> None:
    source = write(root, 'extern "C" __global__ void test(float* x) { *x = FACTOR; }')
    sources = [KernelSource(source.entry, source.function, (("FACTOR", str(i)),)) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        kernels = list(pool.map(lambda each: compile_source(each, root), sources))
    assert len({kernel.cubin for kernel in kernels}) == len(sources)


@pytest.fixture
def _fresh_version() -> None:
    compiler.compiler_version.cache_clear()
    yield
    compiler.compiler_version.cache_clear()


class FakeNvrtc:
    """An NVRTC of another version, or one whose library is not there."""

    class nvrtcResult:  # noqa: N801 (the name that cuda-bindings uses)
        NVRTC_SUCCESS = 0

    def __init__(self, version: tuple[int, int] | None) -> None:
        self.version = version

    def nvrtcVersion(self) -> tuple[int, int, int]:  # noqa: N802
        if self.version is None:
            raise RuntimeError("libnvrtc.so not found")
        return (0, *self.version)


@pytest.mark.usefixtures("_fresh_version")
@pytest.mark.parametrize(
    ("version", "error", "complaint"),
    [
        ((12, 4), CompilationError, "12.4 is too old"),
        (None, MissingDependencyError, r"\.\[cuda12\]"),
    ],
    ids=["old", "missing"],
)
def test_an_unusable_nvrtc_is_named(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int] | None, error: type[Exception], complaint: str
) -> None:
    monkeypatch.setattr(compiler, "_import_nvrtc", lambda: FakeNvrtc(version))
    with pytest.raises(error, match=complaint):
        compiler.compiler_version()
    assert compiler.why_unavailable() is not None


@pytest.mark.usefixtures("_fresh_version")
def test_missing_cuda_bindings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependencyError, match=r"cuda-bindings.*\.\[cuda12\]"):
        compiler.compiler_version()
