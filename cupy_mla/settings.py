"""Settings from the environment. Nothing else in the package reads ``os.environ``."""

from __future__ import annotations

import atexit
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .errors import InvalidArgumentError

CACHE_DIR_VARIABLE = "CUPY_MLA_CACHE_DIR"
VALIDATE_VARIABLE = "CUPY_MLA_VALIDATE"
BACKEND_VARIABLE = "CUPY_MLA_BACKEND"

# What the linear algebra libraries of NumPy's builds read when they are loaded.
_THREADS_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")

BACKENDS = ("auto", "cuda", "numpy")
_TRUE_WORDS = frozenset({"1", "true", "yes", "on"})
_FALSE_WORDS = frozenset({"", "0", "false", "no", "off"})


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    Attributes
    ----------
    cache_dir
        Where compiled kernels are kept. ``CUPY_MLA_CACHE_DIR``; by default ``$XDG_CACHE_HOME/cupy_mla`` or
        ``~/.cache/cupy_mla``; where that cannot be written, a folder of the user's among the temporary files.
    validate
        Whether calls on a GPU that do not say so themselves read lengths and page numbers back and check them; those on
        the CPU always do. ``CUPY_MLA_VALIDATE``: 1/true/yes/on or 0/false/no/off; off by default.
    backend
        ``CUPY_MLA_BACKEND``: ``auto`` (the default: the kernels for CUDA arrays, NumPy for CPU arrays), ``cuda``
        or ``numpy``.
    """

    cache_dir: Path
    validate: bool
    backend: str


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process, read from the environment once.

    Raises
    ------
    InvalidArgumentError
        A variable has a value that is not one of its own; ``argument`` is the variable's name.
    """
    return read_settings(os.environ)


def wants_validation(asked: bool | None, on_gpu: bool) -> bool:
    """Whether a call that asked for validation, asked for none, or did not say (None) is validated. It costs nothing to
    speak of where values need not be read back from a GPU."""
    return (not on_gpu or get_settings().validate) if asked is None else asked


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Processes that are started meanwhile compute with one thread each: there are as many as processors."""
    before = {name: os.environ.get(name) for name in _THREADS_VARIABLES}
    os.environ.update(dict.fromkeys(_THREADS_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def reload_settings() -> Settings:
    """Read the environment again, e.g. after a program has changed it.

    Raises
    ------
    InvalidArgumentError
        A variable has a value that is not one of its own; ``argument`` is the variable's name.
    """
    get_settings.cache_clear()
    return get_settings()


def read_settings(environment: Mapping[str, str]) -> Settings:
    """The settings that ``environment`` asks for.

    Raises
    ------
    InvalidArgumentError
        A variable has a value that is not one of its own; ``argument`` is the variable's name.
    """
    backend = environment.get(BACKEND_VARIABLE, "").strip().lower() or BACKENDS[0]
    if backend not in BACKENDS:
        raise InvalidArgumentError(BACKEND_VARIABLE, "one of " + ", ".join(BACKENDS), repr(backend))
    return Settings(
        cache_dir=_cache_dir(environment),
        validate=_switch(environment, VALIDATE_VARIABLE),
        backend=backend,
    )


def _switch(environment: Mapping[str, str], variable: str) -> bool:
    word = environment.get(variable, "").strip().lower()
    if word in _TRUE_WORDS:
        return True
    if word in _FALSE_WORDS:
        return False
    raise InvalidArgumentError(variable, "1/true/yes/on or 0/false/no/off", repr(environment[variable]))


def _cache_dir(environment: Mapping[str, str]) -> Path:
    if chosen := environment.get(CACHE_DIR_VARIABLE):
        try:
            # Absolute, so that a later chdir does not move the cache.
            return Path(chosen).expanduser().absolute()
        except RuntimeError as error:
            expected = "a folder (~ and ~user only for users who have a home)"
            raise InvalidArgumentError(CACHE_DIR_VARIABLE, expected, repr(chosen)) from error
    base = environment.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # by the XDG specification a relative path is ignored
        return Path(base) / "cupy_mla"
    try:
        home = Path.home()
    except RuntimeError:
        return _private_folder()
    folder = home / ".cache" / "cupy_mla"
    return folder if _can_be_made(folder) else _private_folder()


def _can_be_made(folder: Path) -> bool:
    """Whether a folder is there and can be written to, or its first ancestor that is there can."""
    for place in (folder, *folder.parents):
        try:
            if place.exists():
                return os.access(place, os.W_OK | os.X_OK)
        except OSError:  # a home that may not even be looked at
            return False
    return False


def _private_folder() -> Path:
    """A user without a home that can be written to (some containers) has one folder for all processes, in that for
    temporary files: if nobody else has planted it there. Else each process has its own, removed at its end."""
    import shutil
    import tempfile

    folder = Path(tempfile.gettempdir()) / f"cupy_mla-{os.getuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
            return folder
    own = Path(tempfile.mkdtemp(prefix="cupy_mla-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own
