"""``cupy-mla check``: the numerical self-test."""

from __future__ import annotations

import time

import click

from .command import Command
from .common import backend_option, choose_backend, note


@click.command(cls=Command)
@backend_option
@click.pass_context
def check(ctx: click.Context, backend: str) -> None:
    """Run small cases on poisoned caches and compare them with float64: dense decoding, also over e4m3 caches, sparse
    decoding and sparse prefill.

    Heads, query tokens, masks, types, page sizes, splits and strides; each case runs twice and must give the same
    bits. Takes a minute, with the compilation of the kernels. Exits with 1 if a case fails.
    """
    from ..lab.libraries import LIBRARY_OF_BACKEND
    from ..lab.selftest import CHECK_CASES, run_checks

    chosen = choose_backend(backend)
    if chosen.note:
        note(chosen.note)
    click.echo(f"{len(CHECK_CASES)} cases on {chosen.device}; errors as shares of their bounds")
    failed = 0
    start = time.perf_counter()
    for result in run_checks(LIBRARY_OF_BACKEND[chosen.name]):
        failed += not result.passed
        verdict = "ok    " if result.passed else "FAILED"
        line = f"{verdict}  {result.case.name}"
        if result.accuracy is not None:
            out = result.accuracy.out_error / result.accuracy.out_bound
            lse = result.accuracy.lse_error / result.accuracy.lse_bound
            line = f"{verdict}  out {out:4.0%}  lse {lse:4.0%}  {result.case.name}"
        click.echo(line + (f": {result.problem}" if result.problem else ""))
    seconds = time.perf_counter() - start
    click.echo(f"{len(CHECK_CASES) - failed} of {len(CHECK_CASES)} cases passed in {seconds:.1f} s")
    ctx.exit(1 if failed else 0)
