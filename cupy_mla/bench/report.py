"""What the terminal shows of a run: a bar while it goes on, tables at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from ..shown.tables import print_lines, print_table
from .columns import Column, notes, table_columns
from .results import Results, compare


def print_results(results: Results, extra: Sequence[Column] = (), title: str | None = None) -> None:
    """Print a run: what it ran on, a line for each case, and what failed or was not tried.

    Parameters
    ----------
    extra
        More columns, right of the times and rates.
    title
        Above the table.
    """
    print_lines(describe(results), faint=True)
    columns = [*table_columns(results.rows, results.ceilings), *extra]
    lines = ([column.text(row) for column in columns] for row in results.rows)
    print_table(_stacked(column.title for column in columns), lines, title=title)
    print_lines(f"{row.name}: {note}" for row in results.rows for note in notes(row))


def describe(results: Results) -> Iterator[str]:
    """Lines that say what a run ran on, and what it did without."""
    facts = results.metadata
    versions = {**facts.get("versions", {}), **facts.get("peers", {})}
    driver = [f"driver {facts['driver']}"] if facts.get("driver") else []
    yield ", ".join([str(facts.get("device")), *driver, str(facts.get("date"))])
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
    changes = compare(old, new)
    before, now = (f"{run.metadata['device']} with {run.metadata['backend']}" for run in (old, new))
    if before != now:
        print_lines([f"The earlier run was on {before}, this one is on {now}."])
    if not changes:
        print_lines(["No case of this run is in the earlier one."])
        return
    lines = (
        (change.name, f"{change.old_us:,.1f}", f"{change.new_us:,.1f}", f"{change.percent:+.1f}") for change in changes
    )
    title = f"our time, before ({old.metadata['date']}) and now"
    print_table(_stacked(["case", "before us", "now us", "change %"]), lines, title=title)


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


def _stacked(titles: Iterable[str]) -> list[str]:
    """One word below the other: the numbers under them are narrow, and the columns many."""
    return [title.replace(" ", "\n") for title in titles]
