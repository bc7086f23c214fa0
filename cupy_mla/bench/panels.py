"""The pictures of a run, each drawn on axes that are given, for files and notebooks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..schedule.text import counted
from ..shown.drawing import FAINT, INK, PALETTE, format_tokens, legend_beside, plain_ticks, tidy, token_ticks
from .ceilings import Ceilings
from .columns import rate
from .grid import BenchCase
from .results import Results
from .rows import OURS, Row

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

# A side has the same colour and mark in every picture; ours is drawn last, on top.
_SIDES = {OURS: 0, "flash_mla": 1, "flashinfer": 2, "fa3": 3, "torch": 4}
_WORDS = {"flash_mla": "FlashMLA", "flashinfer": "FlashInfer", "fa3": "FlashAttention-3", "torch": "torch's SDPA"}
_MARKS = ("o", "s", "^", "D", "v", "X")
_LINE_STYLES = ("-", "--", ":", "-.")

_ROOM = 2.0  # factor left free beyond the outermost points of the roofline
_RATIO_ROOM = 0.12  # share of the width on both sides of the bars, for their numbers
_MOST_LENGTH_TICKS = 6
_USUAL_NAME = 4  # parts of the name of a case with nothing special: batch, length, heads, query tokens


def draw_roofline(axes: Axes, results: Results) -> None:
    """Speed against arithmetic intensity, one point for each case and side, below what the GPU can do at most.

    FLOP and bytes are those of the model in ``work.Work``, in which each cached token is read once.
    """
    from matplotlib.lines import Line2D

    points: dict[str, list[tuple[float, float]]] = {}
    for row in results.rows:
        for side in row.measurements:
            tflops = row.tflops(side)
            if tflops:
                points.setdefault(side, []).append((row.case.work.flops / row.case.work.bytes, tflops))
    axes.set_xscale("log")
    axes.set_yscale("log")
    handles: list[Artist] = []
    if points:
        xs, ys = map(list, zip(*(point for of_side in points.values() for point in of_side), strict=True))
        ceilings = results.ceilings
        if ceilings is not None:  # the corner of the roof is in the picture
            xs.append(ceilings.tflops * 1e3 / ceilings.read_gigabytes_per_second)
            ys.append(ceilings.tflops)
        low, high = min(xs) / _ROOM, max(xs) * _ROOM
        axes.set_xlim(low, high)
        axes.set_ylim(min(ys) / _ROOM, max(ys) * _ROOM)
        if ceilings is not None:
            handles += _draw_ceilings(axes, ceilings, low, high)
    for side in sorted(points, key=_side_rank, reverse=True):
        order = 10 - _side_rank(side)
        style = {"color": _colour(side), "marker": _mark(side), "markeredgecolor": "white", "markersize": 7.5}
        axes.plot(*zip(*points[side], strict=True), linestyle="", zorder=order, **style)
    for side in sorted(points, key=_side_rank):
        handles.append(_side_handle(side, line=False))
    if not handles:
        handles.append(Line2D([], [], linestyle="", label="no case has a time"))
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    axes.set_xlabel("arithmetic intensity, FLOP per byte")
    axes.set_ylabel("throughput, TFLOPS")
    axes.set_title(f"Roofline, {device_of(results)}", loc="left", weight="bold")
    tidy(axes)
    legend_beside(axes, handles)


def _draw_ceilings(axes: Axes, ceilings: Ceilings, low: float, high: float) -> list[Artist]:
    """Roofs from one intensity to another; the handles of their legend."""
    from matplotlib.lines import Line2D

    slope = ceilings.read_gigabytes_per_second / 1e3  # TFLOPS at one FLOP per byte
    bandwidth = f"{rate(ceilings.read_gigabytes_per_second)} GB/s"
    roofs = [(ceilings.tflops, "-", f"{rate(ceilings.tflops)} TFLOPS, {bandwidth} ({ceilings.source})")]
    if ceilings.sustained_tflops is not None:
        roofs.append((ceilings.sustained_tflops, "--", f"{rate(ceilings.sustained_tflops)} TFLOPS sustained"))
    handles: list[Artist] = []
    for top, style, label in roofs:
        ridge = top / slope
        xs = [low, ridge, high] if low < ridge < high else [low, high]
        look = {"color": INK, "linestyle": style, "linewidth": 1.3}
        axes.plot(xs, [min(slope * x, top) for x in xs], zorder=2, **look)
        handles.append(Line2D([], [], label=label, **look))
    return handles


def latency_groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of equal lengths that differ in batch and length only, under a name for what they share."""
    groups: dict[BenchCase, list[Row]] = {}
    for row in rows:
        timed = any(measurement.us is not None for measurement in row.measurements.values())
        if isinstance(row.case.lengths, int) and row.case.lengths > 0 and row.case.ragged is None and timed:
            groups.setdefault(replace(row.case, batch=1, lengths=1, name=""), []).append(row)
    return {case.name.removeprefix("b1_k1_"): members for case, members in groups.items()}


def draw_latency(
    axes: Axes, rows: Sequence[Row], ceilings: Ceilings | None = None, batches: Sequence[int] | None = None
) -> None:
    """Time against KV length on logarithmic axes: a line for each side (colour) and batch (mark and stroke).

    Parameters
    ----------
    axes
        matplotlib axes to draw on.
    rows
        One of the groups of `latency_groups`.
    ceilings
        If given, a grey line shows the least time that they allow, for each batch.
    batches
        Those of all panels of a picture, so that a mark means the same in each; the legend is then the picture's.
        Unless given, those of ``rows``, with a legend beside the axes.
    """
    for number, batch in enumerate(batches or batches_of(rows)):
        of_batch = sorted((row for row in rows if row.case.batch == batch), key=_length)
        mark, stroke = _batch_style(number)
        if ceilings is not None:
            least = [ceilings.least_seconds(row.case.work) * 1e6 for row in of_batch]
            axes.plot([_length(row) for row in of_batch], least, color=FAINT, linestyle=stroke, linewidth=1.0, zorder=1)
        for side in _sides(of_batch):
            timed = [row for row in of_batch if side in row.measurements and row.measurements[side].us is not None]
            xs, ys = [_length(row) for row in timed], [row.measurements[side].us for row in timed]
            style = {"color": _colour(side), "marker": mark, "linestyle": stroke, "markersize": 5.0}
            axes.plot(xs, ys, zorder=10 - _side_rank(side), linewidth=2.0 if side == OURS else 1.2, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _length_ticks(axes, rows)
    plain_ticks(axes.yaxis)
    axes.set_xlabel("KV tokens of a request")
    axes.set_ylabel("time per call, us")
    axes.set_title(_panel_title(rows[0].case), loc="left", fontsize=10)
    tidy(axes)
    if batches is None:
        legend_beside(axes, latency_handles(rows, ceilings))


def draw_speedups(axes: Axes, rows: Sequence[Row], batches: Sequence[int] | None = None) -> None:
    """Time of the fastest peer over ours against KV length: a line for each batch, ours faster above 1.

    Parameters
    ----------
    axes, rows, batches
        As in `draw_latency`, whose lines are read over decades; here a tenth is seen.
    """
    axes.axhline(1.0, color=INK, linewidth=1.2)
    for number, batch in enumerate(batches or batches_of(rows)):
        compared = sorted((row for row in rows if row.case.batch == batch and row.best_ratio), key=_length)
        mark, stroke = _batch_style(number)
        style = {"color": _colour(OURS), "marker": mark, "linestyle": stroke, "markersize": 5.0}
        axes.plot([_length(row) for row in compared], [row.best_ratio for row in compared], **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _length_ticks(axes, rows)
    plain_ticks(axes.yaxis)
    axes.set_xlabel("KV tokens of a request")
    axes.set_ylabel("fastest peer's time / ours")
    tidy(axes)


def _length_ticks(axes: Axes, rows: Sequence[Row]) -> None:
    lengths = sorted({_length(row) for row in rows})
    token_ticks(axes.xaxis, lengths[:: math.ceil(len(lengths) / _MOST_LENGTH_TICKS)])


def draw_ratios(axes: Axes, rows: Sequence[Row]) -> None:
    """Bars of each peer's time over ours, case by case, from the line at 1.0: to its right we are faster.

    The axis is logarithmic: twice as fast is as far from the line as half as fast.
    """
    from matplotlib.patches import Patch

    place, ticks, ratios = 0.0, [], [1.0]
    for row in rows:
        first = place
        for peer in timed_peers([row]):
            ratio = row.ratio(peer)
            assert ratio is not None  # what makes a peer a timed one
            axes.barh(place, ratio - 1.0, left=1.0, height=0.86, color=_colour(peer))
            offset, side = ((3, 0), "left") if ratio >= 1.0 else ((-3, 0), "right")
            where = {"xytext": offset, "textcoords": "offset points", "ha": side, "va": "center"}
            axes.annotate(f"{ratio:.2f}", (ratio, place), fontsize=8, **where)
            ratios.append(ratio)
            place += 1.0
        ticks.append((first + place - 1.0) / 2)
        place += 0.7
    axes.axvline(1.0, color=INK, linewidth=1.2)
    axes.set_xscale("log")
    room = (max(ratios) / min(ratios)) ** _RATIO_ROOM * 1.02  # for the numbers beside the bars
    axes.set_xlim(min(ratios) / room, max(ratios) * room)
    plain_ticks(axes.xaxis)
    axes.set_yticks(ticks, [_case_words(row) for row in rows], fontsize=9)
    axes.set_ylim(place - 0.9, -0.8)
    axes.set_xlabel(f"time of the peer / time of {OURS} (right of 1: {OURS} is faster)")
    axes.set_title("Time of the peers over ours", loc="left", weight="bold")
    tidy(axes, grid="x")
    legend_beside(axes, [Patch(facecolor=_colour(peer), label=words_of(peer)) for peer in timed_peers(rows)])


def latency_handles(rows: Sequence[Row], ceilings: Ceilings | None) -> list[Artist]:
    from matplotlib.lines import Line2D

    handles: list[Artist] = [_side_handle(side, line=True) for side in _sides(rows)]
    for number, batch in enumerate(batches_of(rows)):
        mark, stroke = _batch_style(number)
        label = counted(batch, "request")
        handles.append(Line2D([], [], color=INK, marker=mark, linestyle=stroke, markersize=5.0, label=label))
    if ceilings is not None:
        handles.append(Line2D([], [], color=FAINT, linewidth=1.0, label="least that this GPU allows"))
    return handles


def _side_handle(side: str, line: bool) -> Artist:
    from matplotlib.lines import Line2D

    if line:
        return Line2D([], [], color=_colour(side), linewidth=2.5, label=words_of(side))
    style = {"marker": _mark(side), "markeredgecolor": "white", "markersize": 7.5}
    return Line2D([], [], color=_colour(side), linestyle="", label=words_of(side), **style)


def _panel_title(case: BenchCase) -> str:
    """In words, with what differs from the defaults behind it."""
    heads, tokens = counted(case.num_heads_q, "head"), counted(case.seqlen_q, "query token")
    rest = replace(case, name="").name.split("_")[_USUAL_NAME:]
    return ", ".join((heads, tokens, *rest))


def _case_words(row: Row) -> str:
    """Like ``16 x 4K tokens, 128 heads, 1 query token``; a case of other lengths by its name."""
    lengths = row.case.lengths
    if not isinstance(lengths, int) or row.case.ragged is not None:
        return row.name
    return f"{row.case.batch} x {format_tokens(lengths)} tokens, {_panel_title(row.case)}"


def words_of(side: str) -> str:
    """What people call a side."""
    return _WORDS.get(side, side)


def _sides(rows: Sequence[Row]) -> list[str]:
    """Sides that have a time, ours first."""
    found = {side for row in rows for side, measured in row.measurements.items() if measured.us is not None}
    return sorted(found, key=_side_rank)


def timed_peers(rows: Sequence[Row]) -> list[str]:
    peers = {peer for row in rows for peer in row.peers if row.ratio(peer) is not None}
    return sorted(peers, key=_side_rank)


def batches_of(rows: Sequence[Row]) -> list[int]:
    return sorted({row.case.batch for row in rows})


def _length(row: Row) -> int:
    assert isinstance(row.case.lengths, int)  # latency_groups lets no others in
    return row.case.lengths


def _side_rank(side: str) -> int:
    return _SIDES.get(side, len(_SIDES))


def _colour(side: str) -> str:
    return PALETTE[_side_rank(side) % len(PALETTE)]


def _mark(side: str) -> str:
    return _MARKS[_side_rank(side) % len(_MARKS)]


def _batch_style(number: int) -> tuple[str, str]:
    return _MARKS[number % len(_MARKS)], _LINE_STYLES[number % len(_LINE_STYLES)]


def device_of(results: Results) -> str:
    return str(results.metadata.get("device", "unknown device"))
