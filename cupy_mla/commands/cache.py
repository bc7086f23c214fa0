"""``cupy-mla cache``: the compiled kernels that are kept on disk."""

from __future__ import annotations

import click

from ..gpu.jit.cache import CacheEntry, clear_cache, list_entries
from ..settings import get_settings
from ..shown.tables import print_table
from .command import Command

_ACTIONS = ("list", "check", "clear")
_SHOWN_DIGITS = 12  # of a digest


@click.command(cls=Command, short_help="The compiled kernels on disk: list, check, clear.")
@click.argument("action", type=click.Choice(_ACTIONS), default=_ACTIONS[0])
@click.pass_context
def cache(ctx: click.Context, action: str) -> None:
    """List the compiled kernels on disk, check them against their checksums, or remove them.

    list: every kernel with its size and what it was compiled for. check: exits with 1 if a file is damaged; damaged
    ones are never loaded, but compiled anew. clear: removes kernels and what killed compilations left; they are
    compiled again when they are needed.
    """
    folder = get_settings().cache_dir
    if action == "clear":
        kernels, leftovers = clear_cache(folder)
        click.echo(f"{kernels} kernels removed from {folder}" + f", and {leftovers} leftovers" * bool(leftovers))
        return
    entries = list_entries(folder)
    damaged = [entry for entry in entries if not entry.is_good]
    shown = damaged if action == "check" else entries
    if shown:
        print_table(("kernel", "KB", "compiled by", "digest", ""), map(_line, shown))
    size = sum(entry.size for entry in entries) / 1e6
    click.echo(f"{len(entries)} kernels, {size:.1f} MB in {folder}, {len(damaged)} damaged")
    ctx.exit(1 if action == "check" and damaged else 0)


def _line(entry: CacheEntry) -> tuple[str, ...]:
    state = "" if entry.is_good else "damaged"
    return entry.title, f"{entry.size / 1e3:.0f}", entry.compiler, entry.digest[:_SHOWN_DIGITS], state
