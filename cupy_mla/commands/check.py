"""``cupy-mla check``: the numerical self-test."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
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
from .context_parallel import DEFAULT_WORLDS, chosen_exchange, context_parallel_option, exchange_option, require_world

if TYPE_CHECKING:
    from ..lab.selftest import CheckResult


@click.command(cls=Command, short_help="Self-test of this machine, against float64.")
@backend_option
@click.option("--random", "random_problems", type=COUNT, help="Run so many random problems of every operation instead.")
@click.option(
    "--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="Of the first random problem."
)
@context_parallel_option("Check caches that are sharded over so many ranks instead.")
@exchange_option
@json_option
@click.pass_context
def check(
    ctx: click.Context,
    backend: str,
    random_problems: int | None,
    seed: int,
    context_parallel: tuple[int, ...] | None,
    exchange: str | None,
    as_json: bool,
) -> None:
    """Run small cases on poisoned caches and compare them with float64: dense decoding, also over e4m3 caches, sparse
    decoding and sparse prefill.

    Heads, query tokens, masks, types, page sizes, splits and strides; each case runs twice and must give the same
    bits. Several processes share the cases and, in a first run, the compilation of their kernels. Exits with 1 if a
    case fails.

    With --random, problems of every operation (dense and sparse decode, sparse prefill, merges, what writes, copies and
    converts caches, slots) are drawn, one for each number from --seed on, and run in several processes. A problem that
    fails is shown with the command that runs it alone.

    With --context-parallel, caches are sharded along the sequence, in dense and sparse decoding. One process attends
    to the shards of all ranks one after the other and merges; under torchrun (torchrun --nproc-per-node 2 -m cupy_mla
    check --context-parallel) each process is a rank, and results go over NCCL on GPUs, over gloo without.
    """
    if context_parallel is not None:
        for option, given in (("--random", random_problems), ("--seed", seed)):
            if given:
                raise InvalidArgumentError(option, "nothing beside --context-parallel", "both")
        ctx.exit(0 if _check_shards(context_parallel, choose_backend(backend), exchange, as_json) else 1)
    chosen_exchange(exchange, in_processes=False)
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
    said = f"{len(CHECK_CASES)} cases on {chosen.device}"
    ctx.exit(0 if _report(said, run_checks(chosen.name, jobs=usual_jobs()), chosen, as_json) else 1)


def _check_shards(worlds: tuple[int, ...], chosen: Backend, exchange: str | None, as_json: bool) -> bool:
    """Run the self-test of sharded caches; True if all passed. One process of several prints."""
    from ..lab.launched import launched_group
    from ..lab.sharded_check import check_ranks, check_shards, sharded_cases

    with launched_group(chosen.name) as group:
        how = chosen_exchange(exchange, in_processes=group is not None)
        if group is None:
            if as_json and len(worlds) != 1:
                raise InvalidArgumentError("--json", "one number of ranks", ",".join(map(str, worlds)) or "none")
            if chosen.note:
                note(chosen.note)
            passed = True
            for world in worlds or DEFAULT_WORLDS:
                cases = sharded_cases(world)
                said = f"{len(cases)} cases on {world} shards, one after the other, on {chosen.device}"
                results = check_shards(world, chosen.name, cases, jobs=usual_jobs())
                passed &= _report(said, results, chosen, as_json)
            return passed
        world = require_world(worlds, group.size())
        cases = sharded_cases(world)
        results = check_ranks(group, chosen.name, cases, exchange=how)
        if group.rank():
            return all(result.passed for result in results)
        return _report(f"{len(cases)} cases on {world} processes, on {chosen.device}", results, chosen, as_json)


def _report(said: str, results: Iterable[CheckResult], chosen: Backend, as_json: bool) -> bool:
    """Print results as they come; True if all passed."""
    # With --json these lines are no result: they show that it goes on.
    click.echo(f"{said}; errors as shares of their bounds", err=as_json)
    start, kept = time.perf_counter(), []
    for result in results:
        kept.append(result)
        verdict = "ok    " if result.passed else "FAILED"
        line = f"{verdict}  {result.case.name}"
        if result.accuracy is not None:
            out = result.accuracy.out_error / result.accuracy.out_bound
            lse = result.accuracy.lse_error / result.accuracy.lse_bound
            line = f"{verdict}  out {out:4.0%}  lse {lse:4.0%}  {result.case.name}"
        click.echo(line + (f": {result.problem}" if result.problem else ""), err=as_json)
    seconds = time.perf_counter() - start
    passed = sum(result.passed for result in kept)
    if as_json:
        facts = {"backend": chosen.name, "device": chosen.device, "seconds": seconds, "passed": passed}
        click.echo(to_json({**facts, "cases": list(map(_facts, kept))}, indent=1))
    else:
        click.echo(f"{passed} of {len(kept)} cases passed in {seconds:.1f} s")
    return passed == len(kept)


def _facts(result: CheckResult) -> dict[str, Any]:
    accuracy = result.accuracy
    errors = {} if accuracy is None else asdict(accuracy)
    return {"name": result.case.name, "passed": result.passed, "problem": result.problem, **errors}


def _run_campaign(seeds: range, chosen: Backend) -> int:
    """Run random problems, print what came of them, and return how many failed."""
    from ..lab.campaign import run_campaign

    if chosen.note:
        note(chosen.note)
    jobs = usual_jobs()
    drawn = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    click.echo(f"{counted(len(seeds), 'random problem')}, {drawn}, on {chosen.device}, {jobs} at a time")
    start = time.perf_counter()
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
