"""``cupy-mla bench``: how fast a decode is, over grids of cases and beside other implementations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..call.options import AUTO, COMPUTES
from ..errors import InvalidArgumentError
from ..lab.files import Writing, check_folder
from ..lab.presets import DEFAULT_PRESET, PRESETS
from ..lab.spec import DEFAULT_DTYPE, DEFAULT_PAGE_SIZE, DTYPES, PACKED, STORAGES
from ..lab.timing import DEFAULT_LIMIT_SECONDS
from ..layouts import LAYOUTS
from .command import Command
from .common import COUNT, Backend, Function, backend_option, choose_backend, note, raise_failures
from .context_parallel import (
    DEFAULT_WORLDS,
    OPTION,
    chosen_exchange,
    context_parallel_option,
    exchange_option,
    require_world,
)


def list_option(
    name: str, kind: Any, help_text: str, metavar: str | None = None
) -> Callable[[Function], Function]:
    """An option that takes values of a click type with commas or repeated; gives one tuple without repeats,
    empty when not used."""

    def read(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> tuple[Any, ...]:
        values = (kind.convert(word.strip(), param, ctx) for text in texts for word in text.split(","))
        return tuple(dict.fromkeys(values))

    choices = "|".join(kind.choices) if isinstance(kind, click.Choice) else kind.name.removesuffix(" range").upper()
    shown = f"{metavar or choices}[,...]"
    return click.option(name, multiple=True, callback=read, metavar=shown, help=help_text)


_NOT_SHARDED = ("json_path", "csv_path", "old", "plot", "peer", "peers_path", "sustained", "ceilings", "split")

# Refused before the run, not after it.
_FILE = click.Path(path_type=Path, dir_okay=False, writable=True)
_FOLDER = click.Path(path_type=Path, file_okay=False, writable=True)


@click.command(
    short_help="Time decodes, beside other implementations.",
    cls=Command,
    spellings={
        "fixed_split_tokens": "--split",
        "folder": "--plot",
        "lengths": "--length",
        "num_heads_q": "--heads",
        "results": "--compare",
        "attn_sink": "--sinks",
        "extra_topk_length": "--extra-lengths",
    },
)
@list_option("--batch", COUNT, "Requests.")
@list_option("--length", COUNT, "Cached tokens of every request.")
@list_option("--heads", COUNT, "Query heads.")
@list_option("--seqlen-q", COUNT, "Query tokens of a request.")
@list_option("--topk", COUNT, "Tokens that each query token attends to, of those cached: sparse decode.")
@click.option("--prefill", is_flag=True, help="Sparse prefill: --seqlen-q rows of indices over --length tokens.")
@list_option("--extra-topk", COUNT, "Tokens of a second cache that each attends to besides: sparse decode.")
@list_option("--extra-page-size", COUNT, "Tokens of a page of the second cache.")
@click.option("--extra-lengths", is_flag=True, help="Of the second cache only some indices count, at random.")
@click.option("--sinks", is_flag=True, help="Attention sinks, with --topk.")
@list_option("--dtype", click.Choice(DTYPES), "Type of q, and of a dense cache.")
@list_option(
    "--layout", click.Choice([*LAYOUTS, *STORAGES]), f"Layout of the cache: {', '.join(LAYOUTS)}.", metavar="LAYOUT"
)
@list_option("--compute", click.Choice(COMPUTES), "How products with an e4m3 cache are computed.")
@list_option("--page-size", COUNT, "Tokens of a page.")
@list_option("--storage", click.Choice(STORAGES), "One array; latent and rope apart; a view into a larger pool.")
@list_option("--split", COUNT, "Cut requests after so many tokens, in any batch (a multiple of 64).")
@click.option("--causal", is_flag=True, help="Mask aligned to the bottom right (for --seqlen-q above 1).")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="A model's heads and widths, in place of --heads.")
@list_option("--tp", COUNT, f"Tensor-parallel ranks of the preset ({DEFAULT_PRESET} unless given).")
@click.option("--trace", type=click.IntRange(min=0), default=0, help="So many draws of real lengths for each batch.")
@list_option("--peer", click.STRING, "flash_mla, flashinfer, fa3, torch: beside those that can be imported.")
@click.option("--peers-path", type=click.Path(path_type=Path), help="Folder to look for the peers in first.")
@click.option("--sustained", is_flag=True, help="Also 0.3 s back to back, under the GPU's power limit.")
@click.option("--ceilings", is_flag=True, help="Measure this GPU's read bandwidth and matrix products first.")
@click.option("--json", "json_path", type=_FILE, help="Write the results here, after each case.")
@click.option("--csv", "csv_path", type=_FILE, help="Write a line for each case and side here.")
@click.option("--compare", "old", type=click.Path(path_type=Path), help="Results of an earlier run (--json).")
@click.option("--plot", type=_FOLDER, help="Draw pictures into this folder.")
@click.option(
    "--limit",
    type=click.FloatRange(min=0, min_open=True),
    default=DEFAULT_LIMIT_SECONDS,
    show_default=True,
    help="Seconds for a case.",
)
@context_parallel_option("Caches that are sharded over so many ranks.")
@exchange_option
@backend_option
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    json_path: Path | None,
    csv_path: Path | None,
    old: Path | None,
    plot: Path | None,
    peers_path: Path | None,
    backend: str,
    context_parallel: tuple[int, ...] | None,
    exchange: str | None,
    **options: Any,
) -> None:
    """Time decodes, or sparse attention, over every combination of the values given, beside other implementations.

    Lists may be written with commas or by repeating the option. Without any: a small grid in DeepSeek-V3's widths.
    On the GPU: all kernels of a call with a cold L2, by CUDA graphs; on the CPU: wall time. Exits with 1 if one of our
    own cases failed or was wrong.

    With --context-parallel, dense decodes whose caches are sharded along the sequence. Under torchrun (torchrun
    --nproc-per-node 2 -m cupy_mla bench --context-parallel) each process is a rank, and whole calls are timed. One
    process times one rank's decode and merge, and adds the rest by a model; without a GPU all is by the model.
    """
    if context_parallel is not None:
        _time_shards(ctx, context_parallel, exchange, choose_backend(backend), options)
        return
    chosen_exchange(exchange, in_processes=False)
    from ..bench.report import print_changes, print_results, progress_bar
    from ..bench.results import Results, load_results
    from ..bench.rows import Row
    from ..bench.run import run_bench

    earlier = None if old is None else load_results(old)
    for option, path in (("json", json_path), ("csv", csv_path), ("plot", plot)):
        if path is not None:
            check_folder(path, option)
    if plot is not None:
        from ..shown.drawing import make_figure

        make_figure(1.0, 1.0)  # without matplotlib: refused now, not after the run
    if peers_path is not None:
        from ..bench.peers import add_peers_path

        add_peers_path(peers_path)
    chosen = choose_backend(backend)
    if chosen.note:
        note(chosen.note)
    cases = _cases(chosen.name, options)
    if plot is not None:
        _make_folder(plot)
    writing = Writing()
    with progress_bar(len(cases)) as advance:

        def on_rows(results: Results, rows: list[Row]) -> None:
            if json_path is not None:  # after each: a run that is stopped keeps what it has
                writing.attempt("json", lambda: results.write_json(json_path))
            advance(len(rows))

        results = run_bench(
            cases,
            peers=options["peer"],
            backend=chosen.name,
            sustained=options["sustained"],
            ceilings=options["ceilings"],
            limit=options["limit"],
            command=_command_line(ctx),
            on_rows=on_rows,
        )
    print_results(results)
    if earlier is not None:
        print_changes(earlier, results)
    if csv_path is not None:
        writing.attempt("csv", lambda: results.write_csv(csv_path))
    if plot is not None:
        from ..bench.plots import write_plots

        def draw() -> None:
            for picture in write_plots(results, plot):
                note(f"wrote {picture}")

        writing.attempt("plot", draw)
    raise_failures(writing)
    ctx.exit(1 if results.failed else 0)


def _time_shards(
    ctx: click.Context, worlds: tuple[int, ...], exchange: str | None, chosen: Backend, options: dict[str, Any]
) -> None:
    """Time or model sharded caches, and print the table; of several processes one does."""
    from ..bench.context_parallel import group_row, model_rows, print_rows, shard_rows
    from ..bench.inputs import choose_library
    from ..lab.launched import launched_group

    for name in _NOT_SHARDED:
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            (spelt,) = (parameter.opts[0] for parameter in ctx.command.params if parameter.name == name)
            raise InvalidArgumentError(spelt, f"nothing beside {OPTION}", "both")
    with launched_group(chosen.name) as group:
        how = chosen_exchange(exchange, in_processes=group is not None)
        cases = _cases(chosen.name if group is not None else "cuda", options)
        if group is not None:
            require_world(worlds, group.size())
            rows = [group_row(case, group, chosen.name, exchange=how) for case in cases]
            if group.rank() == 0:
                print_rows(rows)
            return
    if chosen.name == "numpy":
        note("No GPU: all times are by the model.")
        print_rows([row for case in cases for row in model_rows(case, worlds or DEFAULT_WORLDS)])
        return
    library = choose_library(chosen.name)
    print_rows([row for case in cases for row in shard_rows(case, worlds or DEFAULT_WORLDS, library)])


def _make_folder(plot: Path) -> None:
    try:
        plot.mkdir(exist_ok=True)
    except OSError as error:
        raise InvalidArgumentError("plot", "a folder that can be made", f"{plot} ({error.strerror})") from error


def _cases(backend: str, options: dict[str, Any]) -> list[Any]:
    from ..bench import grid

    on_gpu = backend == "cuda"
    if options["heads"] and (options["preset"] or options["tp"]):
        raise InvalidArgumentError("--heads", "nothing beside --preset or --tp", "both")
    preset = options["preset"] or (DEFAULT_PRESET if options["tp"] else None)
    # Real lengths take the place of the fixed ones, unless both were asked for.
    lengths = options["length"] or (() if options["trace"] else grid.DEFAULT_LENGTHS if on_gpu else grid.CPU_LENGTHS)
    batches = options["batch"] or (grid.DEFAULT_BATCHES if on_gpu else grid.CPU_BATCHES)
    return grid.expand_grid(
        batches=(options["batch"] or (1,)) if options["prefill"] else batches,
        lengths=lengths,
        heads=options["heads"] or (grid.DEFAULT_HEADS if on_gpu else grid.CPU_HEADS),
        seqlens_q=options["seqlen_q"] or (1,),
        dtypes=options["dtype"] or (DEFAULT_DTYPE,),
        page_sizes=options["page_size"] or (DEFAULT_PAGE_SIZE,),
        storages=options["storage"] or (PACKED,),
        layouts=options["layout"],
        computes=options["compute"] or (AUTO,),
        topks=options["topk"] or (None,),
        prefill=options["prefill"],
        extra_topks=options["extra_topk"] or (None,),
        extra_page_sizes=options["extra_page_size"] or (DEFAULT_PAGE_SIZE,),
        extra_topk_length=options["extra_lengths"],
        attn_sink=options["sinks"],
        splits=options["split"] or (None,),
        causal=options["causal"],
        preset=preset,
        tensor_parallel=options["tp"] or (1,),
        traces=options["trace"],
    )


def _command_line(ctx: click.Context) -> str:
    """What the user typed, in the order of the help."""
    words = ["cupy-mla bench"]
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[name]
        words.append(parameter.opts[0])
        if value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return " ".join(words)
