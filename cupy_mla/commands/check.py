"""``cupy-mla check``: the numerical self-test."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..errors import InvalidArgumentError
from ..lab.files import to_json
from ..lab.processes import usual_jobs
from ..schedule.text import counted
from .command import Command
from .common import COUNT, Backend, backend_option, choose_backend, json_option, note

if TYPE_CHECKING:
    from ..lab.selftest import CheckResult


@click.command(cls=Command, short_help="Self-test of this machine, against float64.")
@backend_option
@click.option("--random", "random_problems", type=COUNT, help="Run so many random problems of every operation instead.")
@click.option(
    "--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="Of the first random problem."
)
@json_option
@click.pass_context
def check(ctx: click.Context, backend: str, random_problems: int | None, seed: int, as_json: bool) -> None:
    """Run small cases on poisoned caches and compare them with float64: dense decoding, also over e4m3 caches, sparse
    decoding and sparse prefill.

    Heads, query tokens, masks, types, page sizes, splits and strides; each case runs twice and must give the same
    bits. Several processes share the cases and, in a first run, the compilation of their kernels. Exits with 1 if a
    case fails.

    With --random, problems of every operation (dense and sparse decode, sparse prefill, merges, appends, slots) are
    drawn, one for each number from --seed on, and run in several processes. A problem that fails is shown with the
    command that runs it alone.
    """
    if random_problems is not None:
        if as_json:
            raise InvalidArgumentError("--json", "nothing beside --random", "both")
        ctx.exit(1 if _run_campaign(range(seed, seed + random_problems), choose_backend(backend)) else 0)
    if ctx.get_parameter_source("seed") is ParameterSource.COMMANDLINE:
        raise InvalidArgumentError("seed", "none without --random", str(seed))
    from ..lab.selftest import CHECK_CASES, run_checks

    chosen = choose_backend(backend)
    if chosen.note:
        note(chosen.note)
    # With --json these lines are no result: they show that it goes on.
    click.echo(f"{len(CHECK_CASES)} cases on {chosen.device}; errors as shares of their bounds", err=as_json)
    results = []
    start = time.perf_counter()
    for result in run_checks(chosen.name, jobs=usual_jobs()):
        results.append(result)
        verdict = "ok    " if result.passed else "FAILED"
        line = f"{verdict}  {result.case.name}"
        if result.accuracy is not None:
            out = result.accuracy.out_error / result.accuracy.out_bound
            lse = result.accuracy.lse_error / result.accuracy.lse_bound
            line = f"{verdict}  out {out:4.0%}  lse {lse:4.0%}  {result.case.name}"
        click.echo(line + (f": {result.problem}" if result.problem else ""), err=as_json)
    seconds = time.perf_counter() - start
    passed = sum(result.passed for result in results)
    if as_json:
        facts = {"backend": chosen.name, "device": chosen.device, "seconds": seconds, "passed": passed}
        click.echo(to_json({**facts, "cases": list(map(_facts, results))}, indent=1))
    else:
        click.echo(f"{passed} of {len(results)} cases passed in {seconds:.1f} s")
    ctx.exit(0 if passed == len(results) else 1)


def _facts(result: CheckResult) -> dict[str, Any]:
    accuracy = result.accuracy
    errors = {} if accuracy is None else asdict(accuracy)
    return {"name": result.case.name, "passed": result.passed, "problem": result.problem, **errors}


def _run_campaign(seeds: range, chosen: Backend) -> int:
    """Run random problems, print what came of them, and return how many failed."""
    from ..lab.campaign import compile_for, run_campaign

    if chosen.note:
        note(chosen.note)
    jobs = usual_jobs()
    drawn = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    click.echo(f"{counted(len(seeds), 'random problem')}, {drawn}, on {chosen.device}, {jobs} at a time")
    start = time.perf_counter()
    if chosen.name == "cuda":
        compile_for(seeds, jobs)
        click.echo(f"kernels ready after {time.perf_counter() - start:.1f} s")
    counts: Counter[str] = Counter()
    shares: dict[str, float] = {}
    failed = 0
    for result in run_campaign(seeds, chosen.name, jobs):
        counts[result.operation] += 1
        shares[result.operation] = max(shares.get(result.operation, 0.0), result.share)
        if result.failure:
            failed += 1
            click.echo(f"FAILED  {result.operation}: {result.failure}")
            click.echo(f"        again: cupy-mla check --random 1 --seed {result.seed} --backend {chosen.name}")
    for operation, count in sorted(counts.items()):
        click.echo(f"{operation:15} {count:7}  largest error {shares[operation]:4.0%} of its bound")
    seconds = time.perf_counter() - start
    click.echo(f"{len(seeds) - failed} of {counted(len(seeds), 'problem')} passed in {seconds:.1f} s")
    return failed
