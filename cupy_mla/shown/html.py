"""Tables in HTML, for what notebooks show of this package's objects. All text is escaped; rows may be of any length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def facts_table(title: str, facts: Mapping[str, object]) -> str:
    """A table of two columns: names, and what they are.

    Parameters
    ----------
    title
        Above the table, bold.
    facts
        Texts, or anything whose ``str`` is one.

    Returns
    -------
    str
        A ``<table>``.
    """
    lines = (
        f'<tr><th style="text-align: left">{_escape(name)}</th><td style="text-align: left">{_escape(fact)}</td></tr>'
        for name, fact in facts.items()
    )
    return f"<table>{_caption(title, bold=True)}<tbody>{''.join(lines)}</tbody></table>"


def grid_table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]], notes: Iterable[str] = ()) -> str:
    """A table with a header, and lines of text below it.

    Parameters
    ----------
    caption
        Above the table; none if empty.
    header
        Titles of the columns.
    rows
        Texts of each row, or anything whose ``str`` is one.
    notes
        Lines below the table.

    Returns
    -------
    str
        A ``<table>`` and a ``<div>`` for each note.
    """
    head = "".join(f"<th>{_escape(title)}</th>" for title in header)
    body = "".join("<tr>" + "".join(f"<td>{_escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    table = f"<table>{_caption(caption)}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return table + "".join(f"<div>{_escape(note)}</div>" for note in notes)


def _caption(text: str, bold: bool = False) -> str:
    if not text:
        return ""
    weight = "; font-weight: bold" if bold else ""
    return f'<caption style="text-align: left; caption-side: top{weight}">{_escape(text)}</caption>'


def _escape(text: object) -> str:
    from html import escape  # its table of named characters is 2,000 entries, for notebooks alone

    return escape(str(text))
