"""What is compiled: an entry file, its defines, and a digest that changes whenever the compiled code could."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import CompilationError
from .. import hopper

# Besides the architecture, which is the source's.
COMPILE_OPTIONS: tuple[str, ...] = (
    "--std=c++17",
    "-default-device",
    "-lineinfo",
    "--ptxas-options=-v",  # registers, spills and stack frames in the program log
    "--no-cache",  # a hit in the compiler's own cache skips ptxas, and the log then has no report
)

_PACKAGE = Path(__file__).resolve().parents[2]
_WHEEL_ROOT = _PACKAGE / "_kernels_cu"
_CHECKOUT_ROOT = _PACKAGE.parent / "kernels_cu"

# Kernels include only headers of this project, always in quotes; <...> would be a header that the digest cannot follow.
_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]+"([^"\n]+)"', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class KernelSource:
    """One kernel to compile.

    Attributes
    ----------
    entry : str
        The file to compile, relative to the kernel folder, e.g. ``"decode/wide/wide.cu"``.
    function : str
        Its ``extern "C"`` kernel.
    defines : tuple of (str, str)
        Macro names and values, given to the compiler as ``-DNAME=VALUE``.
    arch : str
        The architecture to compile for, ``-arch=ARCH``.
    """

    entry: str
    function: str
    defines: tuple[tuple[str, str], ...] = ()
    arch: str = hopper.ARCH

    def __str__(self) -> str:
        defines = ", ".join(f"{name}={value}" for name, value in self.defines)
        return f"{self.entry}:{self.function}({defines})"


def compile_options(source: KernelSource) -> tuple[str, ...]:
    """Return the compiler's options for a kernel, less its defines and where headers lie."""
    return (f"-arch={source.arch}", *COMPILE_OPTIONS)


def kernels_root() -> Path:
    """Return the folder that holds the kernel sources: inside an installed wheel, or beside the package in a checkout.

    Raises
    ------
    CompilationError
        Neither is there: the installation is broken.
    """
    for root in (_WHEEL_ROOT, _CHECKOUT_ROOT):
        if root.is_dir():
            return root
    raise CompilationError(
        f"the kernel sources are missing: neither {_WHEEL_ROOT} nor {_CHECKOUT_ROOT} is there; reinstall cupy-mla"
    )


def read_entry_file(source: KernelSource, root: Path) -> bytes:
    """Return the text of the entry file.

    Raises
    ------
    CompilationError
        The file cannot be read.
    """
    try:
        return (root / source.entry).read_bytes()
    except OSError as error:
        raise CompilationError(f"{source}: the entry file cannot be read: {error}") from error


def read_files(source: KernelSource, root: Path | None = None) -> dict[str, bytes]:
    """Return everything that is compiled: the entry file and all headers it includes, also through other headers.

    Parameters
    ----------
    source : KernelSource
        The kernel.
    root : Path, optional
        The kernel folder; ``kernels_root()`` unless given.

    Returns
    -------
    dict of str to bytes
        Contents by path relative to the kernel folder. An include that names no file there is left out: either the
        preprocessor skips it, or the compilation fails and says so.
    """
    root = kernels_root() if root is None else root
    files = {source.entry: read_entry_file(source, root)}
    unread = [source.entry]
    while unread:
        includer = unread.pop()
        for match in _INCLUDE.finditer(files[includer]):
            for name in _candidates(match.group(1).decode(), includer):
                if name in files:
                    break
                try:
                    files[name] = (root / name).read_bytes()
                except OSError:
                    continue
                unread.append(name)
                break
    return files


def digest(source: KernelSource, compiler_version: str, root: Path | None = None) -> str:
    """Return a hexadecimal digest of everything the cubin depends on.

    That is: the contents of the entry file and of every header it reaches, the function, the defines, the architecture,
    the compile options and the compiler. Files are read anew each time, so an edited header is always seen.

    Parameters
    ----------
    source : KernelSource
        The kernel.
    compiler_version : str
        ``compiler.compiler_version()``.
    root : Path, optional
        The kernel folder; ``kernels_root()`` unless given.
    """
    import hashlib

    hasher = hashlib.sha256()

    def feed(*parts: str | bytes) -> None:
        # Each part with its length in front, so that no two lists of parts can look alike.
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            hasher.update(len(data).to_bytes(8, "little"))
            hasher.update(data)

    feed(compiler_version, *compile_options(source))
    feed("kernel", source.entry, source.function)
    for name, value in source.defines:
        feed("define", name, value)
    for path, contents in sorted(read_files(source, root).items()):
        feed("file", path, contents)
    return hasher.hexdigest()


def _candidates(included: str, includer: str) -> Iterator[str]:
    """Yield where an include may lie, relative to the kernel folder, in the order the compiler looks."""
    for folder in (posixpath.dirname(includer), ""):
        name = posixpath.normpath(posixpath.join(folder, included))
        if not name.startswith(".."):
            yield name
