"""``cupy-mla compile``: kernels ahead of time, without a GPU."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import click

from ..kernels.catalogue import NamedKernel
from ..lab.compile_job import KernelReport, compile_all, select_kernels
from ..lab.files import to_json
from ..schedule.text import counted
from ..shown.tables import print_table
from .command import Command
from .common import json_option, note


@click.command("compile", cls=Command, short_help="Compile kernels into the cache, ahead of time.")
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option("--jobs", type=click.IntRange(min=1), default=os.cpu_count() or 1, help="Processes; one per core.")
@click.option("--fresh", is_flag=True, help="Compile again what the kernel cache has, to see how long it takes.")
@click.option("--list", "list_only", is_flag=True, help="Print the names and stop.")
@json_option
@click.pass_context
def compile_kernels(
    ctx: click.Context, patterns: tuple[str, ...], jobs: int, fresh: bool, list_only: bool, as_json: bool
) -> None:
    """Compile kernels into the cache, so that no first call has to.

    Without a PATTERN all of them; with patterns (as of file names, * and ?) those whose name matches one, for example
    "*512+64_page64*". Needs no GPU. Exits with 1 if a kernel spills registers, has a stack frame, draws a C75xx warning
    (serialised wgmma) or does not compile.
    """
    kernels = select_kernels(patterns)
    if list_only:
        for kernel in kernels:
            click.echo(kernel.name)
        return
    start = time.perf_counter()
    compilations = compile_all(kernels, jobs, fresh=fresh)
    with click.progressbar(compilations, length=len(kernels), label="Compiling", file=sys.stderr) as finished:
        reports = list(finished)
    if as_json:
        by_name = {report.kernel.name: report for report in reports}
        click.echo(to_json([_facts(by_name[kernel.name]) for kernel in kernels], indent=1))
    else:
        _print(kernels, reports)
    failures = [report for report in reports if report.problems]
    for report in failures:
        for problem in report.problems:
            click.echo(f"{report.kernel.name}: {problem}", err=True)
    compiled = sum(not report.from_cache for report in reports)
    kernels_text = counted(len(reports), "kernel")
    seconds = time.perf_counter() - start
    click.echo(
        f"{kernels_text}, {compiled} compiled now, {len(failures)} with problems, {seconds:.1f} s", err=as_json
    )
    ctx.exit(1 if failures else 0)


def _facts(report: KernelReport) -> dict[str, Any]:
    return {
        "kernel": report.kernel.name,
        "threads": report.kernel.threads,
        "registers": report.registers,
        "spill_bytes": report.spill_bytes,
        "shared_memory_bytes": report.kernel.shared_memory + report.static_shared,
        "compile_seconds": report.seconds,
        "from_cache": report.from_cache,
        "problems": report.problems,
    }


def _print(kernels: Sequence[NamedKernel], reports: Sequence[KernelReport]) -> None:
    by_name = {report.kernel.name: report for report in reports}
    lines = (
        (kernel.name, "" if kernel.threads is None else str(kernel.threads), *_figures(kernel, by_name[kernel.name]))
        for kernel in kernels
    )
    print_table(("kernel", "threads", "registers", "spills", "smem KB", "s"), lines)
    if any(report.from_cache for report in reports):
        note("* from the cache: the time is that of its compilation")


def _figures(kernel: NamedKernel, report: KernelReport) -> tuple[str, ...]:
    if report.registers == 0:
        return ("does not compile", "", "", "")
    shared = (kernel.shared_memory + report.static_shared) / 1024
    seconds = f"{report.seconds:.2f}{'*' if report.from_cache else ''}"
    return str(report.registers), str(report.spill_bytes), f"{shared:.1f}", seconds
