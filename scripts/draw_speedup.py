"""The README's first picture: how much faster a call is than with the fastest other implementation, by KV length.

From a CSV file that ``tune.py scaling --save`` or ``cupy-mla bench --csv`` writes: cases of equal lengths and one query
token.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cupy_mla.bench.plots import save_figure
from cupy_mla.commands.command import Command
from cupy_mla.shown.drawing import INK, PALETTE, make_figure, plain_ticks, tidy, token_ticks

OURS = "cupy-mla"
PANEL_INCHES, HEIGHT_INCHES = 4.6, 3.4
MARKS = ("o", "s", "^", "D")

# heads -> batch -> KV tokens of a request -> the least time of another implementation over ours
Speedups = dict[int, dict[int, dict[int, float]]]


def read_speedups(path: Path) -> Speedups:
    """What a CSV file of a benchmark says; cases that only we have run are left out."""
    times: dict[tuple[int, int, int], dict[str, float]] = defaultdict(dict)
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            equal = int(line["kv_tokens"]) == int(line["batch"]) * int(line["longest"])
            if line["us"] and line["seqlen_q"] == "1" and equal:
                case = int(line["num_heads_q"]), int(line["batch"]), int(line["longest"])
                times[case][line["implementation"]] = float(line["us"])
    speedups: Speedups = defaultdict(lambda: defaultdict(dict))
    for (heads, batch, tokens), measured in sorted(times.items()):
        others = [us for name, us in measured.items() if name != OURS]
        if OURS in measured and others:
            speedups[heads][batch][tokens] = min(others) / measured[OURS]
    return speedups


@click.command(cls=Command)
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("picture", type=click.Path(dir_okay=False, path_type=Path))
def main(source: Path, picture: Path) -> None:
    """Draw PICTURE, a PNG, from the times in SOURCE, a CSV file."""
    speedups = read_speedups(source)
    if not speedups:
        raise click.ClickException(f"{source} has no case that another implementation has run too")
    figure = make_figure(PANEL_INCHES * len(speedups), HEIGHT_INCHES)
    panels = figure.subplots(1, len(speedups), sharey=True, squeeze=False)[0]
    for axes, (heads, by_batch) in zip(panels, speedups.items(), strict=True):
        axes.axhline(1.0, color=INK, linewidth=1.0)
        for colour, mark, (batch, by_tokens) in zip(PALETTE, MARKS, by_batch.items(), strict=False):
            name = f"{batch} request" + "s" * (batch != 1)
            axes.plot(by_tokens.keys(), by_tokens.values(), color=colour, marker=mark, markersize=4, label=name)
        axes.set_xscale("log", base=2)
        lengths = sorted({tokens for by_tokens in by_batch.values() for tokens in by_tokens})
        token_ticks(axes.xaxis, lengths[::3])
        axes.set_title(f"{heads} heads", loc="left", fontsize=10)
        axes.set_xlabel("KV tokens of a request")
        tidy(axes)
    panels[0].set_ylabel("speed, as a multiple of\nthe fastest other's")
    panels[-1].legend(frameon=False)
    plain_ticks(panels[0].yaxis)
    save_figure(figure, picture)


if __name__ == "__main__":
    main()
