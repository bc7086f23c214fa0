"""The tables of dense decoding's speed on one Hopper GPU: named suites of cases, beside the peers that can be imported.

targets: the cases of dense_targets.csv, with the ratio to the fastest peer that each is to reach. sustained: back to
back under the power limit. traces: 128 real requests, beside equal lengths of the same mean. parity: types, masks,
storages, page sizes and head counts beside the plain case of the same work. fp8_parity: an e4m3 cache beside a bf16
one, over 1, 8 and 64 requests of 64 to 1,048,576 tokens. scaling: 64 to 1,048,576 tokens.

All suites unless some are named. Exits with 1 if one of our own cases failed or was wrong; a target that is missed is
said in the table and in the last lines.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tune_suites import SUITES, Suite

from cupy_mla.bench.columns import number
from cupy_mla.bench.report import print_results
from cupy_mla.bench.results import Results, load_results
from cupy_mla.bench.rows import Row
from cupy_mla.bench.run import run_bench
from cupy_mla.commands.command import CannotRun, Command
from cupy_mla.commands.common import raise_failures
from cupy_mla.gpu.device import why_unsupported
from cupy_mla.lab.files import Writing
from cupy_mla.lab.timing import DEFAULT_LIMIT_SECONDS

DEFAULT_PEERS = "flash_mla,flashinfer,fa3"


@click.command(help=__doc__, cls=Command, spellings={"results": "--load", "folder": "--plot", "json": "--save"})
@click.argument("names", nargs=-1, type=click.Choice(list(SUITES)), metavar="[SUITE]...")
@click.option("--peer", "peers", default=DEFAULT_PEERS, show_default=True, help="Peers; empty for none.")
@click.option("--peers-path", type=click.Path(path_type=Path, file_okay=False), help="Folder to look for them in.")
@click.option("--cases", "part", default="", help="Only cases whose name has this in it, e.g. h16 or b1_.")
@click.option("--ceilings", is_flag=True, help="Measure this GPU's ceilings, once.")
@click.option("--limit", type=float, default=DEFAULT_LIMIT_SECONDS, show_default=True, help="Seconds for a case.")
@click.option("--backend", default="auto", hidden=True)
@click.option("--save", type=click.Path(path_type=Path, file_okay=False), help="Folder for tune_SUITE.json and .csv.")
@click.option("--load", type=click.Path(path_type=Path, file_okay=False), help="Print saved results; measure nothing.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for pictures; each suite's go into one of its own in it.",
)
def main(names: tuple[str, ...], **options: Any) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)  # failures, with their tracebacks
    if options["load"] is None and options["backend"] == "auto":
        refuse_without_gpu(names or tuple(SUITES))
    writing = Writing()
    all_results = run_suites(names or tuple(SUITES), writing, **options)
    if options["part"] and not any(results.rows for results in all_results.values()):
        raise click.UsageError(f"no case has {options['part']!r} in its name")
    for name, results in all_results.items():
        click.echo(summary(name, results))
    raise_failures(writing)
    sys.exit(1 if any(results.failed for results in all_results.values()) else 0)


def refuse_without_gpu(names: tuple[str, ...]) -> None:
    """End with what would be timed on a Hopper GPU: its cases would take NumPy hours, and mean nothing."""
    reason = why_unsupported()
    if reason is None:
        return
    for name in names:
        cases = [case for group in SUITES[name].groups() for case in as_cases(group)]
        click.echo(f"{name}: {len(cases)} cases, {cases[0].name} to {cases[-1].name}")
    raise CannotRun(f"these are timed on a Hopper GPU: {reason} (cupy-mla bench times small cases with NumPy)")


def run_suites(
    names: tuple[str, ...], writing: Writing, *, save: Path | None, load: Path | None, plot: Path | None, **options: Any
) -> dict[str, Results]:
    """Measure (or load) suites one after the other; each is printed and drawn when it is done."""
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
    all_results: dict[str, Results] = {}
    ceilings = None
    for name in names:
        if load is not None:
            results = load_results(load / f"tune_{name}.json")
        else:
            file = None if save is None else save / f"tune_{name}.json"
            results = measure_suite(name, SUITES[name], writing, file=file, **options)
            options["ceilings"] = False
            ceilings = results.ceilings = ceilings or results.ceilings
            if file is not None:
                writing.attempt(name, partial(results.write_json, file))
                writing.attempt(name, partial(results.write_csv, file.with_suffix(".csv")))
        all_results[name] = results
        print_results(results, SUITES[name].columns(results), SUITES[name].title)
        if plot is not None:
            draw(results, plot / name)
    return all_results


def measure_suite(
    name: str,
    suite: Suite,
    writing: Writing,
    *,
    peers: str,
    peers_path: Path | None,
    part: str,
    ceilings: bool,
    limit: float,
    backend: str,
    file: Path | None,
) -> Results:
    """Run a suite; its results are written after each case, so that a run that is stopped keeps what it has."""
    if peers_path is not None:
        from cupy_mla.bench.peers import add_peers_path

        add_peers_path(peers_path)
    asked = [peer.strip() for peer in peers.split(",") if peer.strip()]
    groups = suite.groups()
    if part:
        groups = [group for group in groups if any(part in case.name for case in as_cases(group))]
    total = sum(len(as_cases(group)) for group in groups)

    def on_rows(results: Results, rows: list[Row]) -> None:
        for row in rows:
            click.echo(f"{name} {len(results.rows)}/{total} {progress_of(row)}")
        if file is not None:
            writing.attempt(name, partial(results.write_json, file))

    return run_bench(
        groups,
        peers=[peer for peer in asked if suite.peers is None or peer in suite.peers],
        backend=backend,
        sustained=suite.sustained,
        ceilings=ceilings,
        limit=limit,
        command=f"scripts/tune.py {name}",
        on_rows=on_rows,
    )


def as_cases(group: Any) -> list[Any]:
    return [group] if hasattr(group, "name") else list(group)


def progress_of(row: Row) -> str:
    """One line while the run goes on."""
    ratios = [f"{peer} {number(row.ratio(peer), 2)}" for peer in row.peers]
    return ", ".join([f"{row.name}: {number(row.ours.us, 1)} us", *ratios])


def summary(name: str, results: Results) -> str:
    """How many targets were met."""
    columns = [column for column in SUITES[name].columns(results) if column.title == "met"]
    verdicts = [column.text(row) for column in columns for row in results.rows]
    judged = [verdict for verdict in verdicts if verdict in ("yes", "NO")]
    text = f"{name}: {len(results.rows)} cases, {len(results.failed)} failed"
    return f"{text}, {judged.count('yes')} of {len(judged)} targets met" if judged else text


def draw(results: Results, folder: Path) -> None:
    from cupy_mla.bench.plots import write_plots

    folder.mkdir(parents=True, exist_ok=True)
    for picture in write_plots(results, folder):
        click.echo(f"wrote {picture}")


if __name__ == "__main__":
    main()
