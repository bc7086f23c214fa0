"""The columns of a table of rows, as text: what the terminal and the notebook show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .ceilings import Ceilings
from .rows import OURS, Measurement, Row

NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Column:
    """A title, and a row's text under it."""

    title: str
    text: Callable[[Row], str]


def number(value: float | None, digits: int) -> str:
    """With so many digits behind the point, or a dash."""
    return NOTHING if value is None else f"{value:,.{digits}f}"


def table_columns(rows: Sequence[Row], ceilings: Ceilings | None) -> list[Column]:
    """Columns for rows of one run: those that have something to show."""
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    measured = [measurement for row in rows for measurement in row.measurements.values()]
    columns = [
        Column("case", lambda row: row.name),
        Column(f"{OURS} us", lambda row: _time(row.ours)),
        *(column for peer in peers for column in _peer_columns(peer)),
        Column("TFLOPS", lambda row: rate(row.tflops())),
        Column("GB/s", lambda row: rate(row.gigabytes_per_second())),
    ]
    if ceilings is not None:
        columns.append(Column("% of ceiling", lambda row: _percent(row.share(ceilings))))
    columns.append(Column("error", lambda row: _error(row.ours)))
    columns += [_error_column(peer) for peer in peers]
    if any(measurement.sustained_us is not None for measurement in measured):
        columns.append(Column("sustained us", lambda row: number(row.ours.sustained_us, 1)))
        columns += [_sustained_column(peer) for peer in peers]
    return columns


def notes(row: Row) -> list[str]:
    """What failed or was not tried, and why."""
    found = []
    for name, measurement in row.measurements.items():
        if measurement.failure is not None:
            found.append(f"{name} failed: {measurement.failure}")
        elif measurement.skipped is not None:
            found.append(f"{name}: {measurement.skipped}")
    return found


def _peer_columns(peer: str) -> tuple[Column, Column]:
    return (
        Column(f"{peer} us", lambda row: _time(row.peers.get(peer))),
        Column("ratio", lambda row: number(row.ratio(peer), 2)),
    )


def _error_column(peer: str) -> Column:
    return Column(f"{peer} error", lambda row: _error(row.peers.get(peer)))


def _sustained_column(peer: str) -> Column:
    return Column(f"{peer} ratio", lambda row: number(row.sustained_ratio(peer), 2))


def _time(measurement: Measurement | None) -> str:
    if measurement is None or measurement.us is None:
        return "failed" if measurement is not None and measurement.failure else NOTHING
    return number(measurement.us, 1)


def _error(measurement: Measurement | None) -> str:
    return NOTHING if measurement is None or measurement.error is None else f"{measurement.error:.1e}"


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.3g}"


def rate(value: float | None) -> str:
    """Three digits at least, whole numbers from 100 on: a CPU reaches hundredths of what a GPU does."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
