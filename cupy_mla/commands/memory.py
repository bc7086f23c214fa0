"""``cupy-mla memory``: what the KV cache of a model takes, by kind of attention and layout."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..lab.files import to_json
from ..lab.presets import GROUPED_PRESETS, PRESETS, find_model
from ..shown.tables import print_table
from .command import Command
from .common import json_option

if TYPE_CHECKING:
    from ..lab.cache_sizes import CacheSize

DEFAULT_LENGTHS = (4096, 32768, 131072)
GIB = 1 << 30
MODELS = (*PRESETS, *GROUPED_PRESETS)
FILE_WIDTH = 160  # characters of a line of a table where there is no terminal
TEXT_WIDTH = 120


@click.command(cls=Command, short_help="What the KV cache of a model takes.")
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Choice(MODELS),
    metavar="NAME",
    help=f"One of {', '.join(MODELS)}. May be repeated; all MLA models, and the attention that others really have, "
    "unless given.",
)
@click.option(
    "--config",
    "configs",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A model's config.json (Hugging Face), or the folder that has it; may be repeated.",
)
@click.option(
    "--length",
    "lengths",
    multiple=True,
    type=click.IntRange(min=0),
    default=DEFAULT_LENGTHS,
    show_default=True,
    help="Tokens of a request; may be repeated.",
)
@click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True, help="Sizes on one of so many ranks.")
@json_option
def memory(
    models: tuple[str, ...], configs: tuple[Path, ...], lengths: tuple[int, ...], tp: int, as_json: bool
) -> None:
    """Print the KV cache of models with MLA, MHA, GQA and MQA, in bf16 and fp8.

    Bytes per token of all layers together, and per request of each length. Attention in parentheses is what the model
    does not have: the same heads and widths, cached that way. Without --model and --config, what is true of the claim
    that MLA needs 1/15 of the memory at 32K and compresses 93.3% comes below. Needs no GPU.
    """
    from ..lab.cache_sizes import cache_sizes
    from ..lab.model_config import read_model_config

    chosen = [*map(find_model, models), *map(read_model_config, configs)]
    sizes = [size for model in chosen for size in cache_sizes(model, tp)]
    if not chosen:
        for name in MODELS:
            sizes += [size for size in cache_sizes(find_model(name), tp) if size.own or name in PRESETS]
    lengths = tuple(dict.fromkeys(lengths))
    if as_json:
        _print_json(sizes, lengths, tp)
        return
    _print_sizes(sizes, lengths, tp)
    if not chosen:
        _print_claim()


def _print_claim() -> None:
    from ..lab.cache_sizes import CLAIM, compare_claim, explain_claim

    width = min(TEXT_WIDTH, shutil.get_terminal_size((TEXT_WIDTH, 24)).columns)
    click.echo(click.wrap_text(f'The claim: "{CLAIM}". With DeepSeek-V2:', width))
    print_table(
        ("comparison", "the other, per token", "MLA, per token", "times", "saved"),
        [(c.question, c.other, c.mla, f"{c.factor:.2f}", f"{c.percent_saved:.1f}%") for c in compare_claim()],
        texts=3,
        file_width=FILE_WIDTH,
    )
    for paragraph in explain_claim().splitlines():
        click.echo(click.wrap_text(paragraph, width, subsequent_indent="  "))


def _print_json(sizes: Sequence[CacheSize], lengths: Sequence[int], tp: int) -> None:
    from ..lab.cache_sizes import CLAIM, compare_claim, explain_claim

    rows = [
        {**asdict(size), "bytes_per_request": {str(length): size.bytes_per_request(length) for length in lengths}}
        for size in sizes
    ]
    comparisons = [{**asdict(c), "factor": c.factor, "percent_saved": c.percent_saved} for c in compare_claim()]
    claim = {"claim": CLAIM, "comparisons": comparisons, "explanation": explain_claim()}
    click.echo(to_json({"tensor_parallel": tp, "rows": rows, "claim": claim}, indent=1))


def _print_sizes(sizes: Sequence[CacheSize], lengths: Sequence[int], tp: int) -> None:
    requests = [f"GiB at {length:,}" for length in lengths]
    lines = []
    for index, size in enumerate(sizes):
        first = index == 0 or sizes[index - 1].model != size.model
        lines.append(
            (
                size.model if first else "",
                size.attention if size.own else f"({size.attention})",
                size.layout,
                f"{size.bytes_per_token:,}",
                *(f"{size.bytes_per_request(length) / GIB:,.3f}" for length in lengths),
                f"{100 * size.share_of_mha:.3g}",
            )
        )
    title = "KV cache of all layers" if tp == 1 else f"KV cache of all layers, on each of {tp} ranks"
    header = ("model", "attention", "layout", "bytes per token", *requests, "% of MHA in bf16")
    print_table(header, lines, title=title, texts=3, file_width=FILE_WIDTH)
