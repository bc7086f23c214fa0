"""Pictures of a run as files: the roofline, latency against KV length, and the ratio to the peers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..lab.files import written_beside
from ..shown.drawing import make_figure, png_of
from .panels import (
    batches_of,
    device_of,
    draw_latency,
    draw_ratios,
    draw_roofline,
    draw_speedups,
    latency_groups,
    latency_handles,
    timed_peers,
)
from .results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Entry = TypeVar("_Entry")

_PANELS_PER_FIGURE, _PANEL_COLUMNS = 6, 2
_PANEL_SIZE = (5.4, 4.4)  # inches
_SPEEDUP_HEIGHT = 2.4
_CASES_PER_FIGURE = 24
_BAR_INCHES = 0.19


def write_plots(results: Results, folder: Path) -> list[Path]:
    """Draw PNGs of a run.

    Parameters
    ----------
    results
        Rows with times; those without one are left out, and so is a picture that nothing is left for.
    folder
        Where the files go; it must exist.

    Returns
    -------
    list of Path
        ``roofline.png`` (with ceilings); ``latency.png`` (cases of equal lengths only; when a peer was timed, with the
        ratio to the fastest below); ``ratio.png`` (when a peer was timed). What does not fit one picture goes on in
        ``latency-2.png`` and so on.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    InvalidArgumentError
        A file cannot be written.
    """
    written = []
    timed = any(row.ours.us is not None or row.best_peer for row in results.rows)
    if timed and results.ceilings is not None:  # no roofline without a roof
        figure = make_figure(9.0, 5.5)
        draw_roofline(figure.subplots(), results)
        written.append(save_figure(figure, folder / "roofline.png"))
    groups = list(latency_groups(results.rows).values())
    for index, page in enumerate(_pages(groups, _PANELS_PER_FIGURE)):
        shown = [row for rows in page for row in rows]
        heights = [_PANEL_SIZE[1], _SPEEDUP_HEIGHT] if timed_peers(shown) else [_PANEL_SIZE[1]]
        columns = min(len(page), _PANEL_COLUMNS)
        lines = math.ceil(len(page) / columns)
        figure = make_figure(columns * _PANEL_SIZE[0] + 2.0, lines * sum(heights) + 0.4)
        panels = figure.subplots(lines * len(heights), columns, squeeze=False, height_ratios=heights * lines)
        for place in range(lines * columns):
            line, column = divmod(place, columns)
            own = [panels[line * len(heights) + index, column] for index in range(len(heights))]
            if place >= len(page):
                for axes in own:
                    axes.set_axis_off()
                continue
            draw_latency(own[0], page[place], results.ceilings, batches=batches_of(shown))
            for axes in own[1:]:
                draw_speedups(axes, page[place], batches_of(shown))
        figure.suptitle(f"Time of a call against KV length, {device_of(results)}", x=0.01, ha="left", weight="bold")
        figure.legend(handles=latency_handles(shown, results.ceilings), loc="outside right upper", frameon=False)
        written.append(save_figure(figure, folder / f"{_numbered('latency', index)}.png"))
    compared = [row for row in results.rows if row.best_ratio is not None]
    for index, cases in enumerate(_pages(compared, _CASES_PER_FIGURE)):
        bars = sum(1 + len(timed_peers([row])) for row in cases)
        figure = make_figure(10.0, 1.4 + bars * _BAR_INCHES)
        axes = figure.subplots()
        draw_ratios(axes, cases)
        axes.set_title(f"Time of the peers over ours, {device_of(results)}", loc="left", weight="bold")
        written.append(save_figure(figure, folder / f"{_numbered('ratio', index)}.png"))
    return written


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG, as a whole, and return its path.

    Raises
    ------
    InvalidArgumentError
        The file cannot be written.
    """
    with written_beside(path, "folder", "a folder that can be written to") as partial:
        partial.write_bytes(png_of(figure))
    return path


def _numbered(stem: str, index: int) -> str:
    return stem if index == 0 else f"{stem}-{index + 1}"


def _pages(entries: Sequence[_Entry], size: int) -> list[Sequence[_Entry]]:
    return [entries[begin : begin + size] for begin in range(0, len(entries), size)]
