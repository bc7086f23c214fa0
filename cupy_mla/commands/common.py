"""What several commands share: choosing the backend, options that describe a batch, and texts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import numpy.typing as npt

from ..gpu import device
from ..lab.files import Writing
from ..lab.lengths import mid_decode_lengths, read_lengths, shipped_lengths
from ..lab.presets import DEFAULT_PRESET, PRESETS
from ..lab.spec import DEFAULT_DTYPE, DEFAULT_PAGE_SIZE, DTYPES
from ..schedule.text import counted
from ..settings import BACKENDS, get_settings

Function = TypeVar("Function", bound=Callable[..., Any])

DEFAULT_BATCH = 128

COUNT = click.IntRange(1, 2**31 - 1)  # of anything: all are int32 further on


@dataclass(frozen=True, slots=True)
class Backend:
    """``name`` is cuda or numpy; ``note`` says why it is not cuda when that was the wish, else empty."""

    name: str
    device: str
    note: str = ""


def choose_backend(asked: str) -> Backend:
    """The backend for ``--backend``; ``auto`` is the GPU where the kernels run, else NumPy.

    Raises
    ------
    UnsupportedDeviceError
        ``cuda`` was asked for and the kernels cannot run here.
    """
    wanted = get_settings().backend if asked == "auto" else asked
    reason = None if wanted == "numpy" else device.why_unsupported()
    if wanted == "cuda":
        device.require_supported()
    if wanted == "numpy" or reason is not None:
        return Backend("numpy", "CPU", "" if reason is None else f"NumPy backend: {reason}")
    return Backend("cuda", device.describe_device().name)


def backend_option(command: Function) -> Function:
    return click.option(
        "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="auto: the GPU if it can run."
    )(command)


def json_option(command: Function) -> Function:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")(command)


def batch_options(command: Function) -> Function:
    """Options that describe a batch to build."""
    options = (
        click.option("--lengths", type=click.Path(path_type=Path), help="CSV: context_tokens, generated_tokens."),
        click.option("--batch", type=COUNT, help="Requests, drawn from the lengths."),
        click.option("--preset", type=click.Choice(list(PRESETS)), default=DEFAULT_PRESET, show_default=True),
        click.option("--tp", type=COUNT, default=1, show_default=True, help="Tensor-parallel ranks."),
        click.option("--dtype", type=click.Choice(DTYPES), default=DEFAULT_DTYPE, show_default=True),
        click.option("--page-size", type=COUNT, default=DEFAULT_PAGE_SIZE, show_default=True, help="Tokens."),
        click.option("--seqlen-q", type=COUNT, default=1, show_default=True, help="Tokens a request."),
        click.option("--causal", is_flag=True, help="Mask aligned to the bottom right (for --seqlen-q above 1)."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
    )
    for option in reversed(options):
        command = option(command)
    return command


def draw_lengths(
    lengths: Path | None, batch: int | None, seed: int, *, default: int = DEFAULT_BATCH
) -> npt.NDArray[np.int64]:
    """KV lengths of requests in mid-decode, from a file or the shipped sample.

    Parameters
    ----------
    batch, default
        How many requests to draw; None: ``default`` of them, or all where the file has fewer.
    """
    requests = read_lengths(shipped_lengths() if lengths is None else lengths)
    return mid_decode_lengths(requests, min(default, len(requests)) if batch is None else batch, seed)


def note(text: str) -> None:
    """Print what is no result: on standard error, so that it stays out of a file with the results."""
    click.echo(text, err=True)


def busy(text: str) -> AbstractContextManager[Any]:
    """Show on a terminal, on standard error, that something goes on which may take more than a moment."""
    from rich.console import Console

    return Console(stderr=True).status(text)


def raise_failures(writing: Writing) -> None:
    """Raise why a file could not be written, the first of several, after a line for each other one.

    Raises
    ------
    InvalidArgumentError
        There is such a failure.
    """
    for failure in writing.failures[1:]:
        note(str(failure))
    if writing.failures:
        raise writing.failures[0]


def describe_lengths(kv_lengths: npt.NDArray[np.int64]) -> str:
    """For example ``128 requests, 12 to 4,312 tokens each, 146,113 in all``."""
    if len(kv_lengths) == 0:
        return "no requests"
    least, most = kv_lengths.min(), kv_lengths.max()
    each = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    return f"{counted(len(kv_lengths), 'request')}, {each} tokens each, {kv_lengths.sum():,} in all"


def format_time(seconds: float) -> str:
    """In the unit that suits: the GPU takes microseconds, a CPU seconds."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 10 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds * 1e6:,.1f} us"
