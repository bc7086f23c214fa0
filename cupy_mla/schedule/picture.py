"""A schedule as a picture, for notebooks; `schedule_text` is the same in text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..shown.drawing import FAINT, INK, PALETTE, legend_beside, tidy
from .make import WHOLE_JOB, Schedule, piece_costs
from .pieces import TILE_COST, TILE_TOKENS
from .shape import ScheduleShape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR_HEIGHT = 0.84  # of the distance from one part to the next
_LABEL_SHARE = 0.03  # of the width that a piece needs to carry the number of its request
_MAX_LABELLED_PARTS = 48  # more parts leave no height for text
_HATCH = "////"


def draw_schedule(axes: Axes, schedule: Schedule, shape: ScheduleShape, title: str | None = None) -> None:
    """Draw what each part computes, and when.

    Parts are rows, pieces are bars as long as the planner reckons that they take, in the colour and with the number of
    their request; hatched pieces are partial results that are merged at the end. The pale start of a piece is what it
    costs besides its tiles. The dashed line is the end of the fullest part.

    Parameters
    ----------
    axes
        matplotlib axes to draw on.
    schedule
        What to draw, from `make_schedule` or read back from a plan.
    shape
        The shape it was made for.
    title
        Above the picture; a summary unless given.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    budget = schedule.budget / TILE_COST
    parts = np.repeat(np.arange(shape.num_parts), np.diff(schedule.part_begin))
    ends: dict[int, float] = {}
    costs = piece_costs(schedule.items, shape.cost) / TILE_COST
    for part, item, length in zip(parts.tolist(), schedule.items.tolist(), costs.tolist(), strict=True):
        request, _, tile_begin, tile_end, *_, slot = item
        whole = slot == WHOLE_JOB
        overhead = length - (tile_end - tile_begin)
        start = ends.get(part, 0.0)
        ends[part] = start + length
        colour = PALETTE[request % len(PALETTE)]
        box = {"height": _BAR_HEIGHT, "color": colour, "linewidth": 0.0}
        axes.barh(part, overhead, left=start, alpha=0.35, **box)
        if tile_end > tile_begin:
            hatched = {} if whole else {"hatch": _HATCH, "edgecolor": "white"}
            axes.barh(part, tile_end - tile_begin, left=start + overhead, **{**box, **hatched})
        if shape.num_parts <= _MAX_LABELLED_PARTS and ends[part] - start >= _LABEL_SHARE * budget:
            backed = {"boxstyle": "round,pad=0.15", "facecolor": colour, "edgecolor": "none"}
            middle = (start + ends[part]) / 2
            axes.text(middle, part, str(request), ha="center", va="center", color="white", fontsize=8, bbox=backed)
    axes.axvline(budget, color=INK, linestyle="--", linewidth=1.0)
    axes.set_xlim(0, budget * 1.02 or 1.0)
    axes.set_ylim(shape.num_parts - 0.4, -0.6)
    axes.set_xlabel(f"time, in KV tiles of {TILE_TOKENS} tokens")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("part, one CTA" if shape.blocks_per_job == 1 else f"part, {shape.blocks_per_job} CTAs")
    axes.set_title(title or _summary(schedule, shape), loc="left")
    tidy(axes, grid="x")
    legend_beside(
        axes,
        [
            Patch(facecolor=INK, label="whole job"),
            Patch(facecolor=INK, edgecolor="white", hatch=_HATCH, linewidth=0.0, label="piece, merged later"),
            Patch(facecolor=FAINT, label="overhead of a piece"),
            Line2D([], [], color=INK, linestyle="--", linewidth=1.0, label="end of the fullest part"),
        ],
    )


def _summary(schedule: Schedule, shape: ScheduleShape) -> str:
    share = float(piece_costs(schedule.items, shape.cost).sum()) / max(schedule.budget * shape.num_parts, 1)
    return f"{schedule.num_jobs} jobs in {len(schedule.items)} pieces on {shape.num_parts} parts, {share:.0%} busy"
