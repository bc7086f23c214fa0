"""What the terminal shows of a run: a bar while it goes on, tables at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .columns import Column, notes, table_columns
from .results import Results, compare

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FILE_WIDTH = 300  # characters of a line where there is no terminal: a wide table is not cut


def print_results(results: Results, extra: Sequence[Column] = (), title: str | None = None) -> None:
    """Print a run: what it ran on, a line for each case, and what failed or was not tried.

    Parameters
    ----------
    extra
        More columns, right of the times and rates.
    title
        Above the table.
    """
    console = _console()
    for line in describe(results):
        console.print(line, style="dim", markup=False, highlight=False)
    columns = [*table_columns(results.rows, results.ceilings), *extra]
    table = _table(title, [column.title for column in columns])
    for row in results.rows:
        _add(table, [column.text(row) for column in columns])
    console.print(table)
    for row in results.rows:
        for note in notes(row):
            console.print(f"{row.name}: {note}", markup=False, highlight=False)


def describe(results: Results) -> Iterator[str]:
    """Lines that say what a run ran on, and what it did without."""
    facts = results.metadata
    versions = {**facts.get("versions", {}), **facts.get("peers", {})}
    yield f"{facts.get('device')}, driver {facts.get('driver') or '-'}, {facts.get('date')}"
    yield ", ".join(f"{name} {version}" for name, version in versions.items())
    ceilings = results.ceilings
    if ceilings is not None:
        sustained = "" if ceilings.sustained_tflops is None else f" ({ceilings.sustained_tflops:,.0f} sustained)"
        bandwidth = f"{ceilings.read_gigabytes_per_second:,.0f} GB/s read"
        yield f"ceilings, {ceilings.source}: {bandwidth}, {ceilings.tflops:,.0f} TFLOPS{sustained}"
    if "ceilings_failure" in facts:
        yield f"the ceilings could not be measured: {facts['ceilings_failure']}"
    for peer, reason in facts.get("missing_peers", {}).items():
        yield f"without {peer}: {reason}"


def print_changes(old: Results, new: Results) -> None:
    """Print how our times differ from those of an earlier run, and where that was made if it was not here."""
    console = _console()
    changes = compare(old, new)
    places = [(run.metadata["device"], run.metadata["backend"]) for run in (old, new)]
    if places[0] != places[1]:
        console.print(f"The earlier run was on {' with '.join(places[0])}, this one is on {' with '.join(places[1])}.")
    if not changes:
        console.print("No case of this run is in the earlier one.")
        return
    table = _table(f"our time, before ({old.metadata['date']}) and now", ["case", "before us", "now us", "change %"])
    for change in changes:
        _add(table, [change.name, f"{change.old_us:,.1f}", f"{change.new_us:,.1f}", f"{change.percent:+.1f}"])
    console.print(table)


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error (nothing where that is no terminal); the function given moves it on by so many cases."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("cases", total=total)
        yield lambda count: progress.advance(task, count)


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def _table(title: str | None, titles: Sequence[str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(titles):
        table.add_column(
            name.replace(" ", "\n"), justify="right" if index else "left", no_wrap=index == 0, overflow="fold"
        )
    return table


def _add(table: Table, texts: Sequence[str]) -> None:
    from rich.text import Text

    table.add_row(*(Text(text) for text in texts))  # Text: square brackets are not rich's markup
