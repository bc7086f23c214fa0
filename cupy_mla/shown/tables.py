"""Tables on the terminal, drawn by rich. All text is plain: square brackets in a shape are not rich's markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_GAP = 2  # characters between what is printed beside each other, and before it
FILE_WIDTH = 300  # characters of a line where there is no terminal: a wide table is not cut


def print_table(
    titles: Sequence[str],
    lines: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    texts: int = 1,
    file_width: int = FILE_WIDTH,
) -> None:
    """Print a table with a header; on a narrow terminal closer together, and if that does not do, line by line with the
    titles inside.

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

    lines = list(lines)
    console = _console(file_width)
    cells = [max(map(len, column)) for column in zip(*lines, strict=True)] if lines else [0] * len(titles)
    for title_width, gap in ((_longest_line, 1), (_longest_word, 1), (_longest_word, 0)):
        widths = [max(cell, title_width(name)) for cell, name in zip(cells, titles, strict=True)]
        if sum(widths) + len(widths) * (gap + 1) + 1 <= console.width:  # with a space on both sides
            break
    else:
        _print_one_by_one(console, titles, lines, title, texts)
        return
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, gap, 0, 0))
    for index, (name, width) in enumerate(zip(titles, widths, strict=True)):
        table.add_column(Text(name), justify="right" if index >= texts else "left", width=width)
    for line in lines:
        table.add_row(*(Text(text) for text in line))
    console.print(table)


def _longest_line(title: str) -> int:
    return max(map(len, title.splitlines()), default=0)


def _longest_word(title: str) -> int:
    return max(map(len, title.split()), default=0)


def _print_one_by_one(
    console: Console, titles: Sequence[str], lines: Sequence[Sequence[str]], title: str | None, texts: int
) -> None:
    """Each line's texts, and below them the other columns, as many beside each other as have room."""
    from rich.text import Text

    if title is not None:
        console.print(Text(title, style="italic"))
    for line in lines:
        heading = "  ".join(filter(None, line[:texts]))
        shown = texts if len(heading) <= console.width else 1
        console.print(Text("  ".join(filter(None, line[:shown])), style="bold"))
        row = ""
        for name, value in zip(titles[shown:], line[shown:], strict=True):
            if not value:
                continue
            item = ": ".join(filter(None, (" ".join(name.split()), value)))
            if row and len(row) + len(item) + _GAP > console.width:
                console.print(Text(row))
                row = ""
            row += f"{' ' * _GAP}{item}"
        console.print(Text(row))


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
