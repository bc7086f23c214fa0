"""A run of the benchmark: cases in, results out."""

from __future__ import annotations

import logging
import platform
import re
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import InvalidArgumentError
from ..gpu import device
from ..lab.libraries import ArrayLibrary
from ..lab.timing import DEFAULT_LIMIT_SECONDS
from ..settings import BACKENDS, get_settings
from . import measure as protocol
from .ceilings import Ceilings, measure_ceilings, published_ceilings
from .grid import BenchCase
from .inputs import choose_library
from .measure import Side, measure
from .ours import OurSide
from .results import Results
from .rows import OURS, Row

OnRows = Callable[[Results, list[Row]], None]

_PACKAGES = ("torch", "jax", "numpy", "cupy-cuda12x", "cupy-cuda13x", "cupy", "cuda-bindings")
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_NO_PEERS = "the peers need torch on the GPU"
_NO_CEILINGS = "only those of a GPU can be"

_log = logging.getLogger(__name__)


def run_bench(
    cases: Sequence[BenchCase | Sequence[BenchCase]],
    *,
    peers: Sequence[str] = (),
    backend: str = "auto",
    sustained: bool = False,
    ceilings: bool = False,
    limit: float = DEFAULT_LIMIT_SECONDS,
    command: str | None = None,
    on_rows: OnRows | None = None,
) -> Results:
    """Time cases, beside the peers that can be imported.

    Parameters
    ----------
    cases
        Cases, from `expand_grid` or built by hand; a sequence in their place is timed in turn, for fair comparisons
        between its members.
    peers
        Names of peers: ``flash_mla``, ``flashinfer``, ``fa3``, ``torch``. Those that cannot be imported are left out,
        with the reason in the metadata.
    backend
        ``auto`` (the GPU where the kernels run, else NumPy), ``cuda`` or ``numpy``.
    sustained
        Also measure back to back, under the GPU's power limit.
    ceilings
        Measure what this GPU can do at most; otherwise the maker's figures are used where they are known.
    limit
        Seconds for each case.
    command
        What the user typed, for the record.
    on_rows
        Called after each case (or group of them) with the results so far and the new rows.

    Returns
    -------
    Results
        A row for each case. A case or a peer that fails has that in its row and ends nothing.

    Raises
    ------
    InvalidArgumentError
        An unknown peer or backend, or a limit that is not above 0.
    UnsupportedDeviceError
        ``cuda`` was asked for and the kernels cannot run here.
    """
    if not limit > 0:
        raise InvalidArgumentError("limit", "more than 0 seconds", str(limit))
    name = _choose_backend(backend)
    library = choose_library(name)
    sides, missing = _choose_peers(peers, library)
    record = {
        **describe_run(name, library),
        "peers": {side.name: getattr(side, "version", "") for side in sides},
        "missing_peers": missing,
        "sustained": sustained,
        "limit_seconds": limit,
        "command": command,
    }
    results = Results(record, _choose_ceilings(ceilings, record))
    for entry in cases:
        group = [entry] if isinstance(entry, BenchCase) else list(entry)
        rows = measure(group, [OurSide(), *sides], library, sustained=sustained, limit=limit)
        results.rows += rows
        try:
            library.release()
        except Exception as error:  # after an illegal access CUDA refuses everything: the rows say so, and must be kept
            _log.info("memory is not given back", exc_info=error)
        if on_rows is not None:
            on_rows(results, rows)
    return results


def describe_run(backend: str, library: ArrayLibrary) -> dict[str, Any]:
    """Where and how a run is made: device, driver, versions, protocol and date."""
    on_gpu = backend == "cuda"
    facts: dict[str, Any] = {
        "device": device.describe_device().name if on_gpu else f"CPU ({platform.machine()})",
        "backend": backend,
        "arrays": library.name,
        "driver": _driver_version() if on_gpu else None,
        "cuda": device.driver_cuda_version() if on_gpu else None,
        "python": platform.python_version(),
        "versions": {OURS: _own_version(), **_installed_versions()},
        "protocol": " ".join((protocol.__doc__ or "").split()),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if on_gpu:
        info = device.describe_device()
        facts |= {"num_sms": info.num_sms, "memory_bytes": info.memory_bytes, "l2_bytes": info.l2_bytes}
    return facts


def _choose_backend(asked: str) -> str:
    if asked not in BACKENDS:
        raise InvalidArgumentError("backend", "one of " + ", ".join(BACKENDS), repr(asked))
    wanted = get_settings().backend if asked == "auto" else asked
    if wanted == "auto":
        return "cuda" if device.why_unsupported() is None else "numpy"
    if wanted == "cuda":
        device.require_supported()
    return wanted


def _choose_peers(names: Sequence[str], library: ArrayLibrary) -> tuple[list[Side], dict[str, str]]:
    """The peers that can be imported, and why the others cannot."""
    if not names:
        return [], {}
    from .peers import available_peers

    found = available_peers(names)
    if library.name != "torch":
        return [], {name: peer if isinstance(peer, str) else _NO_PEERS for name, peer in found.items()}
    sides: list[Side] = [peer for peer in found.values() if not isinstance(peer, str)]
    return sides, {name: peer for name, peer in found.items() if isinstance(peer, str)}


def _choose_ceilings(measured: bool, record: dict[str, Any]) -> Ceilings | None:
    if record["backend"] != "cuda":
        if measured:
            record["ceilings_failure"] = _NO_CEILINGS
        return None
    if measured:
        try:
            return measure_ceilings()
        except Exception as error:  # a library that is missing must not cost the run
            record["ceilings_failure"] = f"{type(error).__name__}: {error}"
    return published_ceilings(record["device"])


def _own_version() -> str:
    # The package itself lies above this module and is not imported from here, but it is there.
    return str(sys.modules[__name__.partition(".")[0]].__version__)


def _installed_versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _driver_version() -> str | None:
    try:
        match = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", _DRIVER_FILE.read_text(encoding="utf-8"))
    except OSError:
        return None
    return match.group() if match else None
