"""Tables on the terminal, drawn by rich. All text is plain: square brackets in a shape are not rich's markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

FILE_WIDTH = 300  # characters of a line where there is no terminal: a wide table is not cut


def print_table(
    titles: Sequence[str],
    lines: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    texts: int = 1,
    file_width: int = FILE_WIDTH,
) -> None:
    """Print a table with a header; its first column is never wrapped.

    Parameters
    ----------
    titles
        Of the columns.
    lines
        Texts of each line, one a column.
    title
        Above the table.
    texts
        So many columns hold text; those right of them hold numbers, and are flush right.
    file_width
        Characters of a line where there is no terminal.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(titles):
        right = index >= texts
        table.add_column(Text(name), justify="right" if right else "left", no_wrap=index == 0, overflow="fold")
    for line in lines:
        table.add_row(*(Text(text) for text in line))
    _console(file_width).print(table)


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """Print a table of two columns: names, and what they are."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        table.add_row(name, Text(fact))
    Console().print(table)


def print_lines(lines: Iterable[str], *, faint: bool = False) -> None:
    """Print lines between tables, wrapped at words; ``faint``: in a paler colour."""
    console = _console(FILE_WIDTH)
    for line in lines:
        console.print(line, style="dim" if faint else None, markup=False, highlight=False)


def _console(file_width: int) -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=file_width)
