"""The options of commands that run over caches which are sharded over several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ..call.shard import MAX_WORLD
from ..errors import InvalidArgumentError
from ..parallel.exchange import ALL_TO_ALL, EXCHANGES
from .common import Function

OPTION = "--context-parallel"
DEFAULT_WORLDS = (2, 4, 8)
_ALL = "all"  # the value of the option without one


def context_parallel_option(help_text: str) -> Callable[[Function], Function]:
    """``--context-parallel [N,...]``: None if it is not given, () if it is without a number."""

    def read(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[int, ...] | None:
        if text is None or text == _ALL:
            return None if text is None else ()
        kind: Any = click.IntRange(1, MAX_WORLD)
        return tuple(dict.fromkeys(kind.convert(word.strip(), param, ctx) for word in text.split(",")))

    whose = f"Without a number: the processes of torchrun, or {', '.join(map(str, DEFAULT_WORLDS))}."
    return click.option(
        OPTION, is_flag=False, flag_value=_ALL, callback=read, metavar="[N,...]", help=f"{help_text} {whose}"
    )


def exchange_option(function: Function) -> Function:
    """``--exchange NAME``: None if it is not given."""
    help_text = (
        f"With {OPTION} under torchrun, how results go to the ranks of their heads: by an all-to-all (a2a, if not "
        "given), by a reduce-scatter (ag_rs), or by stores into other GPUs' memory (direct)."
    )
    return click.option("--exchange", type=click.Choice(EXCHANGES), help=help_text)(function)


def chosen_exchange(exchange: str | None, *, in_processes: bool) -> str:
    """The exchange that was asked for, or the usual one.

    Raises
    ------
    InvalidArgumentError
        One was asked for where nothing is exchanged: not in the processes of torchrun.
    """
    if exchange is not None and not in_processes:
        raise InvalidArgumentError("--exchange", f"{OPTION} in the processes of torchrun", exchange)
    return ALL_TO_ALL if exchange is None else exchange


def require_world(worlds: tuple[int, ...], processes: int) -> int:
    """So many processes, which is what was asked for.

    Raises
    ------
    InvalidArgumentError
        Others were asked for.
    """
    if worlds not in ((), (processes,)):
        raise InvalidArgumentError(OPTION, f"{processes}, as torchrun started", ",".join(map(str, worlds)))
    return processes
