"""Compile many kernels ahead of time, in several processes (NVRTC compiles one program at a time in each)."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass

from ..errors import CompilationError, InvalidArgumentError
from ..gpu.jit import compiler
from ..gpu.jit.module import find_cubin, get_cubin
from ..kernels.catalogue import NamedKernel, all_kernels
from .processes import new_processes


@dataclass(frozen=True, slots=True)
class KernelReport:
    """What the compiler says of a kernel.

    Attributes
    ----------
    registers, spill_bytes, static_shared
        Registers per thread, bytes of spill stores and loads per thread, bytes of static shared memory.
    seconds
        How long compiling took, when it was done.
    from_cache
        Whether it was done before.
    problems
        Why the kernel must not be used: spills, stack frame, C75xx warnings, or the error of a failed compilation.
    """

    kernel: NamedKernel
    registers: int = 0
    spill_bytes: int = 0
    static_shared: int = 0
    seconds: float = 0.0
    from_cache: bool = False
    problems: tuple[str, ...] = ()


def select_kernels(patterns: Sequence[str]) -> list[NamedKernel]:
    """The kernels whose name matches one of the patterns (``fnmatch``); all of them without a pattern.

    Raises
    ------
    InvalidArgumentError
        A pattern matches no kernel.
    """
    kernels = all_kernels()
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(kernel.name, pattern) for kernel in kernels):
            names = ", ".join(kernel.name for kernel in (kernels[0], kernels[-1]))
            raise InvalidArgumentError("pattern", f"one that matches a kernel (such as {names}; see --list)", pattern)
    if not patterns:
        return kernels
    return [kernel for kernel in kernels if any(fnmatch.fnmatchcase(kernel.name, pattern) for pattern in patterns)]


def compile_all(kernels: Sequence[NamedKernel], jobs: int, *, fresh: bool = False) -> Iterator[KernelReport]:
    """Find kernels in the cache, compile the others, and report on each as it is done.

    Parameters
    ----------
    kernels
        What to compile.
    jobs
        How many processes compile; 1: this one.
    fresh
        Compile also what the cache has. The result is only reported on, not kept.

    Raises
    ------
    MissingDependencyError
        There is no compiler.
    """
    compiler.compiler_version()  # without a compiler, fail once and not for each kernel
    missing = []
    for kernel in kernels:
        found = None if fresh else find_cubin(kernel.source)
        if found is None:
            missing.append(kernel)
        else:
            yield _report(kernel, found)
    jobs = min(jobs, len(missing))
    if jobs <= 1:
        yield from (_compile(kernel, fresh) for kernel in missing)
        return
    with new_processes(jobs) as pool:
        futures = [pool.submit(_compile, kernel, fresh) for kernel in missing]
        for future in as_completed(futures):
            yield future.result()


def _compile(kernel: NamedKernel, fresh: bool) -> KernelReport:
    try:
        return _report(kernel, compiler.compile_source(kernel.source) if fresh else get_cubin(kernel.source))
    except CompilationError as error:
        return KernelReport(kernel, problems=(str(error),))


def _report(kernel: NamedKernel, compiled: compiler.CompiledKernel) -> KernelReport:
    usage = compiled.usage
    return KernelReport(
        kernel,
        registers=usage.registers,
        spill_bytes=usage.spill_stores + usage.spill_loads,
        static_shared=usage.static_smem,
        seconds=compiled.compile_seconds,
        from_cache=compiled.from_cache,
        problems=compiled.problems,
    )
