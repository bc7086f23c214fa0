"""Cubins on disk, one folder per digest: ``<cache_dir>/<digest>/{kernel.cubin, kernel.json}``.

A folder appears by one rename, so readers never see half an entry. What is damaged all the same (checksum, truncated
JSON) counts as absent and is replaced. A file lock per digest lets many processes that need the same kernel compile it
once. A cache folder that cannot be written costs a warning and a compilation per process, nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .compiler import CompiledKernel, ResourceUsage

CUBIN_NAME = "kernel.cubin"
RECORD_NAME = "kernel.json"
LOCK_FOLDER = "locks"
_DIGEST = re.compile(r"[0-9a-f]{64}")  # sha256
_LEFTOVER = re.compile(r"[0-9a-f]{64}\.partial-[0-9a-f]+(\.damaged)?")


def fetch(
    digest: str,
    build: Callable[[], CompiledKernel],
    cache_dir: Path,
    describe: Callable[[], Mapping[str, Any]] = dict,
) -> CompiledKernel:
    """Return the kernel of this digest from the cache, or build it and keep it there.

    Parameters
    ----------
    digest : str
        ``source.digest(...)``.
    build : callable
        Compiles the kernel; called at most once over all processes that share the cache folder at this moment.
    cache_dir : Path
        The cache folder; made when missing. If it cannot be written, a RuntimeWarning says so once per process.
    describe : callable, optional
        Gives what is written beside a new cubin for people who look (entry, defines, files); JSON values.

    Returns
    -------
    CompiledKernel
        With ``path`` and ``from_cache`` filled in.
    """
    found = read_entry(cache_dir, digest)
    if found is not None:
        return found
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(cache_dir, digest))
        except OSError as error:
            _warn_unwritable(cache_dir, error.strerror or str(error))
            return build()
        found = read_entry(cache_dir, digest)  # another process may have built it while this one waited
        if found is not None:
            return found
        kernel = build()
        try:
            path = write_entry(cache_dir, digest, kernel, describe())
        except OSError as error:
            _warn_unwritable(cache_dir, error.strerror or str(error))
            return kernel
        return dataclasses.replace(kernel, path=path)


def read_entry(cache_dir: Path, digest: str) -> CompiledKernel | None:
    """Return the entry of this digest, or None when there is none or it is damaged."""
    folder = cache_dir / digest
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        cubin = (folder / CUBIN_NAME).read_bytes()
        if hashlib.sha256(cubin).hexdigest() != record["cubin_sha256"]:
            return None
        return CompiledKernel(
            cubin=cubin,
            log=record["log"],
            usage=ResourceUsage(**record["usage"]),
            warnings=tuple(record["warnings"]),
            compile_seconds=record["compile_seconds"],
            path=folder / CUBIN_NAME,
            from_cache=True,
        )
    # Not there, not JSON, JSON of another shape, or nested too deeply.
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write_entry(cache_dir: Path, digest: str, kernel: CompiledKernel, description: Mapping[str, Any]) -> Path:
    """Write an entry, replacing a damaged one, and return the cubin's path.

    Raises
    ------
    OSError
        The cache folder cannot be written.
    """
    record = {
        **description,
        "cubin_sha256": hashlib.sha256(kernel.cubin).hexdigest(),
        "usage": dataclasses.asdict(kernel.usage),
        "warnings": list(kernel.warnings),
        "compile_seconds": round(kernel.compile_seconds, 3),
        "log": kernel.log,
    }
    folder = cache_dir / digest
    partial = cache_dir / f"{digest}.partial-{secrets.token_hex(8)}"
    partial.mkdir(parents=True)
    try:
        (partial / CUBIN_NAME).write_bytes(kernel.cubin)
        (partial / RECORD_NAME).write_text(json.dumps(record, indent=1), encoding="utf-8")
        _replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / CUBIN_NAME


def count_entries(cache_dir: Path) -> tuple[int, int]:
    """Return how many cubins the cache folder holds, and their size in bytes."""
    sizes = [path.stat().st_size for path in cache_dir.glob(f"*/{CUBIN_NAME}")]
    return len(sizes), sum(sizes)


@dataclasses.dataclass(frozen=True, slots=True)
class CacheEntry:
    """What the cache folder has under one digest.

    Attributes
    ----------
    digest : str
        Name of its folder.
    title : str
        Kernel and defines, as far as they can be read.
    compiler : str
        What compiled it.
    size : int
        Bytes of the cubin.
    is_good : bool
        Whether it would be loaded; else it counts as absent.
    """

    digest: str
    title: str
    compiler: str
    size: int
    is_good: bool


def list_entries(cache_dir: Path) -> list[CacheEntry]:
    """What the cache folder holds, by title; nothing where there is no folder.

    Raises
    ------
    OSError
        The folder cannot be looked at.
    """
    if not os.path.isdir(cache_dir):
        return []
    folders = (folder for folder in cache_dir.iterdir() if _DIGEST.fullmatch(folder.name))
    return sorted(map(_list_entry, folders), key=lambda entry: (entry.title, entry.digest))


def clear_cache(cache_dir: Path) -> tuple[int, int]:
    """Remove all kernels and what killed processes left; other files stay, and so do locks, which may be held.

    Returns
    -------
    (int, int)
        Kernels and leftovers removed.

    Raises
    ------
    OSError
        Something cannot be removed.
    """
    removed = [0, 0]
    if os.path.isdir(cache_dir):
        for folder in list(cache_dir.iterdir()):
            is_kernel = _DIGEST.fullmatch(folder.name) is not None
            if is_kernel or _LEFTOVER.fullmatch(folder.name):
                with contextlib.suppress(FileNotFoundError):  # another process was quicker
                    shutil.rmtree(folder)
                    removed[0 if is_kernel else 1] += 1
    return removed[0], removed[1]


def _list_entry(folder: Path) -> CacheEntry:
    record: Any = {}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    record = record if isinstance(record, dict) else {}
    defines = record.get("defines")
    words = []
    if isinstance(defines, dict):
        words = [f"{name.removeprefix('MLA_').lower()}={value}" for name, value in defines.items()]
    size = 0
    with contextlib.suppress(OSError):
        size = (folder / CUBIN_NAME).stat().st_size
    return CacheEntry(
        digest=folder.name,
        title=" ".join([str(record.get("function", "unknown")), *words]),
        compiler=str(record.get("compiler", "")),
        size=size,
        is_good=read_entry(folder.parent, folder.name) is not None,
    )


def _replace_folder(new: Path, folder: Path) -> None:
    """Rename new to folder. A folder in the way is damaged (the caller looked); no rename replaces a full folder."""
    if folder.exists():
        damaged = new.with_name(f"{new.name}.damaged")
        os.rename(folder, damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    os.rename(new, folder)


@contextlib.contextmanager
def _locked(cache_dir: Path, digest: str) -> Iterator[None]:
    """Hold the digest's file lock, among threads as well as processes; it ends with its holder, even a killed one.

    The lock file stays: removing it would let a second process lock a new file while the first still holds the old one.
    """
    folder = cache_dir / LOCK_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{digest}.lock", "ab") as file:
        # A file system or a platform without locks only means that a kernel may be compiled more than once.
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def _warn_unwritable(cache_dir: Path, reason: str) -> None:
    """Warn; functools.cache makes it once per process."""
    warnings.warn(
        f"the kernel cache {cache_dir} cannot be written ({reason}): kernels are compiled anew in every process; "
        "set CUPY_MLA_CACHE_DIR to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )
