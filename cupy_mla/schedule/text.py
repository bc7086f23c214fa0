"""A schedule as a picture in text, for `cupy-mla plan`."""

from __future__ import annotations

import textwrap
from itertools import pairwise

import numpy as np

from .make import (
    WHOLE_JOB,
    Schedule,
    first_row_block_of,
    kv_head_of,
    piece_costs,
)
from .pieces import TILE_COST, PieceCosts
from .shape import ScheduleShape

DEFAULT_WIDTH = 100
DEFAULT_MAX_LINES = 40
_MIN_BAR = 20
_WHOLE_FILL = "="
_PARTIAL_FILL = "-"
_LEGEND = (
    "A job is what CTAs compute together of a request; a tile is 64 tokens. Below: a line for each part (parts alike "
    "share one), as long as its time. [7== is a whole job of request 7, [7-- a piece of one.",
)


def draw_schedule(
    schedule: Schedule,
    shape: ScheduleShape,
    width: int = DEFAULT_WIDTH,
    max_lines: int = DEFAULT_MAX_LINES,
) -> str:
    """Draw what each part computes.

    One line per part, as long as its cost; the budget is the full width. A piece begins with a bracket and the number
    of its request and goes on with ``=`` if it is a whole job and with ``-`` if it is a part of one. Neighbouring parts
    that look the same share a line.

    Parameters
    ----------
    schedule
        What to draw.
    shape
        The shape it was made for.
    width
        Characters of a line.
    max_lines
        Lines for parts; those in the middle are left out when there are more.

    Returns
    -------
    str
        Lines joined by newlines: a summary, what the signs mean, the parts, and the jobs that are merged.
    """
    bars: list[tuple[int, int, float, str]] = []  # first and last part, tiles, drawing
    prefix = "  000-000  0000.0 tiles  "
    cells = max(width - len(prefix) - 1, _MIN_BAR)
    for part in range(shape.num_parts):
        items = schedule.items[schedule.part_begin[part] : schedule.part_begin[part + 1]]
        tiles = float((items[:, 3] - items[:, 2]).sum())
        bar = _bar(items, schedule.budget, cells, shape.cost)
        if bars and bars[-1][2:] == (tiles, bar):
            bars[-1] = (bars[-1][0], part, tiles, bar)
        else:
            bars.append((part, part, tiles, bar))
    lines = [
        f"  {_span(first, last):<7}  {tiles:6.0f} {'tile ' if tiles == 1 else 'tiles'}  {bar}|"
        for first, last, tiles, bar in bars
    ]
    summary = [line for text in (*summarise(schedule, shape), *_LEGEND) for line in textwrap.wrap(text, width)]
    return "\n".join([*summary, *_shorten(lines, max_lines), *_merges(schedule, max_lines)])


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _shorten(lines: list[str], max_lines: int) -> list[str]:
    if len(lines) <= max_lines:
        return lines
    head = (max_lines + 1) // 2
    tail = max_lines - head
    return [*lines[:head], f"  ... {len(lines) - max_lines} more lines", *lines[len(lines) - tail :]]


def _bar(items: np.ndarray, budget: int, cells: int, cost: PieceCosts) -> str:
    ends = np.rint(np.cumsum(piece_costs(items, cost)) * (cells / max(budget, 1))).astype(int).tolist()
    text = ""
    for item, end in zip(items.tolist(), ends, strict=True):
        fill = _WHOLE_FILL if item[7] == WHOLE_JOB else _PARTIAL_FILL
        room = end - len(text)
        label = f"[{item[0]}"
        text += label + fill * (room - len(label)) if room >= len(label) else "["[:room] + fill * (room - 1)
    return text.ljust(cells)


def summarise(schedule: Schedule, shape: ScheduleShape) -> list[str]:
    """Two sentences: how the jobs are cut, and how full the parts are."""
    share = float(piece_costs(schedule.items, shape.cost).sum()) / max(schedule.budget * shape.num_parts, 1)
    ctas = shape.num_parts * shape.blocks_per_job
    busy = int((np.diff(schedule.part_begin) > 0).sum())
    merged = len(schedule.merges)
    cut = f"{merged} of them cut, and merged from {counted(schedule.num_slots, 'partial result')}"
    return [
        f"{counted(schedule.num_jobs, 'job')} in {counted(len(schedule.items), 'piece')}, "
        f"{cut if merged else 'none of them cut'}",
        f"{busy} of {counted(shape.num_parts, 'part')} of {counted(shape.blocks_per_job, 'CTA')} ({ctas} in all) "
        f"with work; the fullest takes the time of {schedule.budget / TILE_COST:.1f} tiles, "
        f"the mean is {share:.0%} of that",
    ]


def counted(number: int, thing: str) -> str:
    """``1 job``, ``2 jobs``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _merges(schedule: Schedule, max_lines: int) -> list[str]:
    lines = [
        f"  request {request}, kv head {kv_head_of(head_block)}, "
        f"from row block {first_row_block_of(head_block)}: {counted(count, 'partial result')}"
        for request, head_block, _, _, _, count, _, _ in schedule.merges.tolist()
    ]
    return ["merges", *_shorten(lines, max_lines)] if lines else []


def list_schedule(schedule: Schedule, shape: ScheduleShape) -> dict[str, object]:
    """The same as numbers and lists, for JSON.

    ``parts`` has a list of pieces for each part: ``[request, kv_head, row_block, first_tile, end_tile, whole]``, of
    tiles of 64 tokens. ``merges`` has ``[request, kv_head, row_block, partial_results]``. ``fullest_tiles`` is the time
    of the fullest part, in that of a tile.
    """
    pieces = [
        [request, kv_head_of(block), first_row_block_of(block), begin, end, slot == WHOLE_JOB]
        for request, block, begin, end, _, _, _, slot in schedule.items.tolist()
    ]
    ends = schedule.part_begin.tolist()
    return {
        "num_parts": shape.num_parts,
        "ctas_per_part": shape.blocks_per_job,
        "num_jobs": schedule.num_jobs,
        "fullest_tiles": schedule.budget / TILE_COST,
        "parts": [pieces[begin:end] for begin, end in pairwise(ends)],
        "merges": [
            [request, kv_head_of(block), first_row_block_of(block), count]
            for request, block, _, _, _, count, _, _ in schedule.merges.tolist()
        ],
    }
