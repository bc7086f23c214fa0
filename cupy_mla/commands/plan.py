"""``cupy-mla plan``: the split schedule of a batch, drawn as text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from ..call.options import AUTO
from ..call.problem import MAX_TOKENS, DecodeProblem, PagedKeys, Queries
from ..decode.plan import schedule_shape
from ..errors import InvalidArgumentError
from ..gpu import hopper
from ..kernels.choose import KERNELS, choose_config
from ..lab.files import to_json
from ..lab.presets import find_preset
from ..layouts import DENSE_LAYOUTS
from ..schedule.make import make_schedule
from ..schedule.pieces import ceil_div
from ..schedule.text import draw_schedule, list_schedule
from .command import Command
from .common import batch_options, describe_lengths, draw_lengths, json_option


@click.command(cls=Command, short_help="How a batch is divided among the SMs, as text.")
@click.argument("kv_lengths", nargs=-1, type=click.IntRange(0, MAX_TOKENS), metavar="[KV_LENGTH]...")
@batch_options
@click.option("--sms", type=click.IntRange(min=1), default=hopper.COMMON_SMS, show_default=True, help="SMs of the GPU.")
@click.option("--fixed-split-tokens", type=click.IntRange(min=1), help="Cut after so many tokens, in any batch.")
@click.option(
    "--kernel",
    type=click.Choice(KERNELS),
    default=AUTO,
    metavar="NAME",
    show_default=True,
    help=f"The decode kernel: one of {', '.join(KERNELS)}.",
)
@click.option("--width", type=click.IntRange(min=40), help="Characters of a line; the terminal's unless given.")
@click.option("--lines", type=click.IntRange(min=1), default=40, show_default=True, help="Lines for the parts.")
@json_option
def plan(
    kv_lengths: tuple[int, ...],
    lengths: Path | None,
    batch: int | None,
    seed: int,
    sms: int,
    fixed_split_tokens: int | None,
    kernel: str,
    width: int | None,
    lines: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Draw how a batch is divided among the SMs: for the KV lengths given, or drawn from real ones. Needs no GPU."""
    if kv_lengths and (lengths is not None or batch is not None):
        raise InvalidArgumentError("KV_LENGTH", "no lengths beside --lengths or --batch", "both")
    drawn = np.array(kv_lengths, dtype=np.int64) if kv_lengths else draw_lengths(lengths, batch, seed)
    problem = _describe(drawn, **options)
    config = choose_config(problem, sms, fixed_split_tokens=fixed_split_tokens, kernel=kernel)
    shape = schedule_shape(problem, config, sms, fixed_split_tokens=fixed_split_tokens)
    schedule = make_schedule(shape, drawn)
    if as_json:
        facts = {"kernel": config.name, "num_sms": sms, "num_heads_q": problem.queries.num_heads_q}
        click.echo(to_json({**facts, "kv_lengths": drawn.tolist(), **list_schedule(schedule, shape)}))
        return
    columns = width or shutil.get_terminal_size().columns
    batch_text = f"{describe_lengths(drawn)}; {problem.queries.num_heads_q} heads, {sms} SMs, kernel {config.name}"
    click.echo(click.wrap_text(batch_text, columns))
    click.echo(draw_schedule(schedule, shape, width=columns, max_lines=lines))


def _describe(
    kv_lengths: npt.NDArray[np.int64], preset: str, tp: int, dtype: str, page_size: int, seqlen_q: int, causal: bool
) -> DecodeProblem:
    model = find_preset(preset)
    page_counts = [ceil_div(length, page_size) for length in kv_lengths.tolist()]
    queries = Queries(
        batch=len(kv_lengths),
        seqlen_q=seqlen_q,
        total_q=len(kv_lengths) * seqlen_q,
        num_heads_q=model.heads_per_rank(tp),
        num_heads_kv=1,
        latent_dim=model.latent_dim,
        rope_dim=model.rope_dim,
        dtype=dtype,
        causal=causal,
        ragged=False,
    )
    return DecodeProblem(queries, PagedKeys(page_size, max(page_counts)), DENSE_LAYOUTS[dtype])
