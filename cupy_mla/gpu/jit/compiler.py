"""Source to cubin with NVRTC, in memory: needs the NVRTC library, but neither a GPU nor a driver."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CompilationError, MissingDependencyError
from .source import KernelSource, compile_options, kernels_root, read_entry_file

# The oldest version the kernels are tested with.
MINIMUM_NVRTC = (12, 9)

CUDA_EXTRA = "cuda12"
PURPOSE = "compiling kernels"

_ENTRY_LINE = re.compile(r"Compiling entry function '([^']+)'")
_FUNCTION_LINE = re.compile(r"Function properties for (\S+)")
_STACK_LINE = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_BARRIERS = re.compile(r"used (\d+) barriers")
_SHARED_MEMORY = re.compile(r"(\d+) bytes smem")
# C75xx are ptxas' performance advisories: wgmma serialised, setmaxnreg ignored. Some come as "info", not "warning".
_ADVISORY = re.compile(r"\bC75\d\d\b")
_WARNING = re.compile(r"\bwarning\b", re.IGNORECASE)
_ENDS_A_NAME = re.compile(r'["\\\n]')
# NVRTC's closing remark on how to silence warnings.
_REMARK = "Remark: The warnings can be suppressed"


@dataclass(frozen=True, slots=True)
class ResourceUsage:
    """What ptxas reports for one kernel.

    Attributes
    ----------
    registers : int
        32-bit registers per thread at launch.
    spill_stores, spill_loads, stack_frame : int
        Bytes of local memory per thread, functions that were not inlined included. All are 0 in a good kernel.
    static_smem : int
        Bytes of statically declared shared memory per CTA.
    barriers : int
        Named barriers.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    stack_frame: int
    static_smem: int
    barriers: int


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """A compiled kernel and what the compiler said of it.

    Attributes
    ----------
    cubin : bytes
        Machine code for the architecture of its source.
    log : str
        The compiler's log.
    usage : ResourceUsage
        Registers, spills and shared memory.
    warnings : tuple of str
        Lines of the log that are warnings or performance advisories.
    compile_seconds : float
        What the compilation took, when it was made.
    path : Path or None
        Where the disk cache keeps the cubin; None when it is only in memory.
    from_cache : bool
        True when it was found in the disk cache instead of being compiled.
    """

    cubin: bytes
    log: str
    usage: ResourceUsage
    warnings: tuple[str, ...]
    compile_seconds: float
    path: Path | None = None
    from_cache: bool = False

    @property
    def problems(self) -> tuple[str, ...]:
        """What makes this kernel slow although it is right: spills, a stack frame, serialised wgmma."""
        usage = self.usage
        found = []
        if usage.spill_stores or usage.spill_loads:
            found.append(f"spills {usage.spill_stores} bytes and reloads {usage.spill_loads} bytes per thread")
        if usage.stack_frame:
            found.append(f"uses a stack frame of {usage.stack_frame} bytes per thread")
        return (*found, *(line for line in self.warnings if _ADVISORY.search(line)))


@functools.lru_cache(maxsize=1)
def compiler_version() -> str:
    """Return the compiler's name and version, e.g. ``"NVRTC 12.9"``.

    Raises
    ------
    MissingDependencyError
        cuda-bindings or the NVRTC library is not installed.
    CompilationError
        NVRTC is older than ``MINIMUM_NVRTC``.
    """
    nvrtc = _import_nvrtc()
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # cuda-bindings raises different types for a library that is not found
        raise MissingDependencyError("nvidia-cuda-nvrtc-cu12", CUDA_EXTRA, PURPOSE) from error
    _check(nvrtc, status, "nvrtcVersion")
    if (major, minor) < MINIMUM_NVRTC:
        raise CompilationError(
            f"NVRTC {major}.{minor} is too old, {MINIMUM_NVRTC[0]}.{MINIMUM_NVRTC[1]} or newer is needed: "
            "pip install -U nvidia-cuda-nvrtc-cu12"
        )
    return f"NVRTC {major}.{minor}"


def why_unavailable() -> str | None:
    """Return why nothing can be compiled in this environment, or None when it can be."""
    try:
        compiler_version()
    except (MissingDependencyError, CompilationError) as error:
        return str(error)
    return None


def compile_source(source: KernelSource, root: Path | None = None) -> CompiledKernel:
    """Compile one kernel, for the architecture that its source names.

    Threads may call this at the same time, but NVRTC takes one program at a time in a process: more need processes.

    Parameters
    ----------
    source : KernelSource
        The kernel.
    root : Path, optional
        The kernel folder; ``kernels_root()`` unless given.

    Raises
    ------
    CompilationError
        The compiler refused; the exception carries its log.
    MissingDependencyError
        cuda-bindings or the NVRTC library is not installed.
    """
    compiler_version()
    root = kernels_root() if root is None else root
    text = read_entry_file(source, root)
    defines = (f"-D{name}={value}" for name, value in source.defines)
    started = time.perf_counter()
    with _plainly_named(root) as folder:
        options = [*compile_options(source), f"--include-path={folder}", *defines]
        cubin, log = _run_nvrtc(text, str(folder / source.entry), options, source)
    seconds = time.perf_counter() - started
    return CompiledKernel(cubin, log, parse_usage(log, source.function), parse_warnings(log), seconds)


@contextlib.contextmanager
def _plainly_named(root: Path) -> Iterator[Path]:
    """A folder, or a link to it where its name has characters that end the names of files in what ptxas reads."""
    if not _ENDS_A_NAME.search(str(root)):
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="cupy_mla-") as folder:
        link = Path(folder) / "kernels"
        link.symlink_to(root.absolute(), target_is_directory=True)
        yield link


def parse_usage(log: str, function: str) -> ResourceUsage:
    """Read the ptxas report of one kernel out of a compiler log.

    Local memory of device functions that were not inlined counts too: ptxas lists them apart, without saying who calls
    them.

    Raises
    ------
    CompilationError
        The log has no report of this kernel.
    """
    entries = set(_ENTRY_LINE.findall(log))
    if function not in entries:
        known = ", ".join(sorted(entries)) or "none"
        raise CompilationError(f"the source has no kernel {function} (kernels: {known})", log)
    local_memory = [0, 0, 0]
    usage_line = ""
    listed = entry = ""
    for line in log.splitlines():
        if match := _ENTRY_LINE.search(line):
            entry = match.group(1)
        elif match := _FUNCTION_LINE.search(line):
            listed = match.group(1)
        elif (match := _STACK_LINE.search(line)) and (listed == function or listed not in entries):
            local_memory = [total + int(value) for total, value in zip(local_memory, match.groups(), strict=True)]
        elif _REGISTERS.search(line) and entry == function:
            usage_line = line
    stack_frame, spill_stores, spill_loads = local_memory

    def number(pattern: re.Pattern[str]) -> int:
        match = pattern.search(usage_line)
        return int(match.group(1)) if match else 0

    return ResourceUsage(
        registers=number(_REGISTERS),
        spill_stores=spill_stores,
        spill_loads=spill_loads,
        stack_frame=stack_frame,
        static_smem=number(_SHARED_MEMORY),
        barriers=number(_BARRIERS),
    )


def parse_warnings(log: str) -> tuple[str, ...]:
    """Return the lines of a compiler log that are warnings or performance advisories (C75xx)."""
    lines = (line.strip() for line in log.splitlines())
    return tuple(
        line for line in lines if (_WARNING.search(line) or _ADVISORY.search(line)) and not line.startswith(_REMARK)
    )


def _import_nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise MissingDependencyError("cuda-bindings", CUDA_EXTRA, PURPOSE) from error
    return nvrtc


def _run_nvrtc(text: bytes, name: str, options: list[str], source: KernelSource) -> tuple[bytes, str]:
    """Compile; the file's own path as the program's name lets NVRTC find includes beside it and profilers the lines."""
    nvrtc = _import_nvrtc()
    status, program = nvrtc.nvrtcCreateProgram(text, os.fsencode(name), 0, [], [])
    _check(nvrtc, status, "nvrtcCreateProgram")
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [os.fsencode(option) for option in options])
        log = _read(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompilationError(f"{source} does not compile ({status.name})", log)
        return _read(nvrtc, program, "CUBIN"), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(nvrtc: Any, program: Any, what: str) -> bytes:
    status, size = getattr(nvrtc, f"nvrtcGet{what}Size")(program)
    _check(nvrtc, status, f"nvrtcGet{what}Size")
    buffer = bytearray(size)
    (status,) = getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    _check(nvrtc, status, f"nvrtcGet{what}")
    return bytes(buffer)


def _check(nvrtc: Any, status: Any, call: str) -> None:
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompilationError(f"{call} failed: {status.name}")
