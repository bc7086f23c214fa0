#!/usr/bin/env python3
"""Run every kernel family under compute-sanitizer, or look for races and leaks without it; needs a Hopper GPU.

FAMILIES are beginnings of names: of kernel families, "around" (merges, slots, what ranks hand to each other), "cache"
(appends, copies, conversions), "shards" (every family on a shard of a cache), "hazards" (lengths, pages and indices
that nobody checked). All unless some are given. Exits with 1 if anything is found.
"""

from __future__ import annotations

import itertools
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import click
import numpy as np
from race_units import (
    ALL_FAMILIES,
    HAZARDS,
    SHARDS,
    UNITS,
    all_sharded_configs,
    dense_arrays,
    distinct_configs,
    gathered_arrays,
    prefill_configs,
    problems_of,
    run_unit,
    typical_configs,
    without,
)

from cupy_mla import mla_decode, mla_sparse_decode, mla_sparse_prefill, plan_decode, plan_sparse_decode
from cupy_mla.kernels.catalogue import NamedKernel, all_kernels, standard_configs
from cupy_mla.kernels.choose import FAMILIES, GATHERED_FAMILIES
from cupy_mla.kernels.family import DecodeFamily
from cupy_mla.kernels.fp8 import Fp8Family
from cupy_mla.lab.compile_job import compile_all
from cupy_mla.schedule.pieces import ceil_div

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SUMMARY = re.compile(
    r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warning)"
)
# Bindings of a later CUDA ask the driver for functions that it does not have, and do without: memcheck reports each.
LOOKUP = re.compile(r"on CUDA API call to cuGetProcAddress")
BETWEEN_REPORTS = re.compile(r"^=========\s*$", re.MULTILINE)
TOLD_LINES, TOLD_CHARACTERS = 12, 600  # of a process that failed: what the tool said first, and the end of the rest
SANITIZER_SECONDS = 300
SHARE_PROBLEMS = 16  # that a process runs one after the other
SINGLY = ("racecheck",)  # one problem a process: GBs each
THREADS, BYSTANDER, SWITCH_SECONDS = 4, 8192, 1e-5
WORD_BYTES, BLOCKS, BLOCK_THREADS = 4, 64, 256
COUNT_DIFFERENT = r"""
extern "C" __global__ void count_different(const unsigned* a, const unsigned* b, long long n,
                                            unsigned long long* count) {
    for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        if (a[i] != b[i]) atomicAdd(count, 1ull);
}
"""
WARM_CALLS = 2000
GROWTH_BYTES = 8 << 20  # of the host: Python's own pools breathe
WHERE = ("host", "pool", "device")


@click.command(help=__doc__)
@click.argument("families", nargs=-1)
@click.option("--tool", "tools", multiple=True, type=click.Choice(TOOLS), help="Of compute-sanitizer; all by default.")
@click.option("--every", is_flag=True, help="All standard configurations, not one a family; memcheck by default.")
@click.option(
    "--jobs", type=click.IntRange(min=1), default=4, show_default=True,
    help="Processes at once; each of racecheck's takes up to 8 GB of host memory, and two cores.",
)
@click.option("--repeats", type=click.IntRange(min=1), help="Without a tool: equal bits of one problem.")
@click.option("--calls", type=click.IntRange(min=1), help="Without a tool: memory over so many calls.")
@click.option("--work", type=click.Choice(UNITS), hidden=True, help="What runs under the tool.")
@click.option("--share", type=(int, int), default=(0, 1), hidden=True, help="Which share of it, and of how many.")
@click.pass_context
def main(
    ctx: click.Context, families: tuple[str, ...], tools: tuple[str, ...], every: bool, jobs: int,
    repeats: int | None, calls: int | None, work: str | None, share: tuple[int, int],
) -> None:  # fmt: skip
    if calls and families:
        raise click.UsageError("--calls takes no families: it has calls of its own.")
    if work is not None:
        import cupy

        cupy.cuda.set_allocator(None)  # arrays with memory of their own: the tools see what lies beyond one's end
        run_unit(work, every, share)
        return
    found = 0
    if repeats or calls:
        found += repeat_each(repeats, families, jobs) if repeats else 0
        found += count_memory(calls) if calls else 0
    else:
        units = [unit for unit in UNITS if not families or unit.startswith(families)]
        found += run_tools(tools or (("memcheck",) if every else TOOLS), units, every, jobs)
    ctx.exit(min(found, 1))


# Under compute-sanitizer ---------------------------------------------------------------------------------------------


def run_tools(tools: tuple[str, ...], units: list[str], every: bool, jobs: int) -> int:
    """Print a line for each unit and tool, and return how many have errors or did not run."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    compile_for(units, every)
    found = 0

    def run(tool: str, unit: str, share: tuple[int, int]) -> tuple[int, str]:
        """How many errors, -1 if it did not run; and what there is to say."""
        command = [sanitizer, "--tool", tool, "--target-processes", "all", sys.executable, __file__, "--work", unit]
        command += ["--every"] * every + ["--share", *map(str, share)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZER_SECONDS)
        except subprocess.TimeoutExpired:
            return -1, f"not done after {SANITIZER_SECONDS} s"
        summary = SUMMARY.findall(done.stdout)
        if done.returncode or not summary:
            return -1, f"exit code {done.returncode}\n{first_reports(done.stdout)}{done.stderr[-TOLD_CHARACTERS:]}"
        errors, raced, warned = summary[-1]
        count = int(errors) - len(LOOKUP.findall(done.stdout)) if errors else int(raced)
        return count, f"{warned} warnings" if count == 0 else done.stdout

    with ThreadPoolExecutor(jobs) as pool:
        work = {
            pool.submit(run, tool, unit, share): (tool, unit, share)
            for tool in tools
            for unit in units
            for share in shares_of(unit, every, tool)
        }
        for future in as_completed(work):
            (tool, unit, (index, of)), (count, text) = work[future], future.result()
            name = unit if of == 1 else f"{unit} {index + 1}/{of}"
            verdict = {-1: "did not run", 0: "clean"}.get(count, f"{count} errors")
            warned = count == 0 and text not in (" warnings", "0 warnings")
            print(f"{tool:10} {name:22} {verdict}" + (f", {text}" if warned else ""), flush=True)
            if count != 0:
                found += 1
                lines = text.splitlines() if count < 0 else text.splitlines()[-TOLD_LINES:]
                print(*[f"    {line}" for line in lines], sep="\n", flush=True)
    return found


def first_reports(output: str) -> str:
    """What a tool said first but for look-ups: a process that it ended says later only that it failed."""
    reports = [report for report in BETWEEN_REPORTS.split(output) if not LOOKUP.search(report)]
    lines = [line for report in reports for line in report.splitlines() if line.strip()]
    return "".join(f"{line}\n" for line in lines[:TOLD_LINES])


def shares_of(unit: str, every: bool, tool: str) -> list[tuple[int, int]]:
    """Which share of how many each process runs of a unit."""
    most = 1 if tool in SINGLY else SHARE_PROBLEMS
    count = ceil_div(len(problems_of(unit, every)), most)
    return [(index, count) for index in range(count)]


def compile_for(units: list[str], every: bool) -> None:
    """What the units run, in all processes that there is room for: under a tool it would be one after the other."""
    families = [family for family in ALL_FAMILIES if family.name in units or HAZARDS in units]
    configs = list(itertools.chain.from_iterable(map(distinct_configs if every else typical_configs, families)))
    gathered = [config for config in configs if config.family in GATHERED_FAMILIES]
    configs += itertools.chain.from_iterable(map(prefill_configs, gathered))
    configs += all_sharded_configs() if SHARDS in units else ()
    decode = {config.name for config in standard_configs()}
    kernels = [kernel for kernel in all_kernels() if kernel.name not in decode]
    kernels += {config.name: NamedKernel(config.name, config.source()) for config in configs}.values()
    for _ in compile_all(kernels, os.cpu_count() or 1):
        pass  # a kernel that does not compile fails where it is used


# Without it ----------------------------------------------------------------------------------------------------------


def typical_call(family: DecodeFamily) -> Callable[[], Any]:
    """A call whose work is split and merged, with its plan; returns out and lse."""
    config = next(iter(typical_configs(family)))
    if family in GATHERED_FAMILIES:
        arrays, options = gathered_arrays(config)
        of_plan = {**without(options, "attn_sink"), "kernel": family.name, "fixed_split_tokens": 64}
        return lambda: mla_sparse_decode(*arrays, **options, plan=plan_sparse_decode(*arrays, **of_plan))
    arrays, options = dense_arrays(replace(config, causal=False), (3000, 1, 700, 64))
    return lambda: mla_decode(*arrays, **options, plan=plan_decode(*arrays, **options, kernel=family.name))


def unplanned_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls that make their own plan, workspace and results."""
    for family in (FAMILIES[0], *(family for family in FAMILIES if isinstance(family, Fp8Family))):
        arrays, options = dense_arrays(replace(next(iter(typical_configs(family))), causal=False), (3000, 1, 700, 64))
        yield f"mla_decode, {arrays[1].dtype}", lambda a=arrays, o=options: mla_decode(*a, **o)
        if isinstance(family, Fp8Family):
            break
    arrays, options = gathered_arrays(next(iter(typical_configs(GATHERED_FAMILIES[0]))))
    yield "mla_sparse_decode", lambda: mla_sparse_decode(*arrays, **options)
    q, cache, indices = arrays
    yield "mla_sparse_prefill", lambda: mla_sparse_prefill(q[:, 0], cache, indices[:, 0], **options)


def repeat_each(repeats: int, families: tuple[str, ...], jobs: int) -> int:
    """Repeat a call of each family, each in a process of its own, and return how many went wrong."""
    chosen = [family for family in ALL_FAMILIES if not families or family.name.startswith(families)]
    if len(chosen) == 1:
        return repeat_beside_other_work(chosen[0], repeats)
    compile_for([family.name for family in chosen], False)

    def run(family: DecodeFamily) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, __file__, "--repeats", str(repeats), family.name]
        return subprocess.run(command, capture_output=True, text=True)

    wrong = 0
    with ThreadPoolExecutor(jobs) as pool:
        for family, done in zip(chosen, pool.map(run, chosen), strict=True):
            wrong += done.returncode != 0
            failure = f"{family.name:21} did not run, exit code {done.returncode}\n{done.stderr[-600:]}\n"
            print(done.stdout or failure, end="", flush=True)
    return wrong


def repeat_beside_other_work(family: DecodeFamily, repeats: int) -> int:
    """Calls from several threads on several streams, beside other work; every result has the bits of the first."""
    import cupy

    differ = cupy.RawKernel(COUNT_DIFFERENT, "count_different")
    call = typical_call(family)
    expected = call()
    cupy.cuda.Device().synchronize()
    counts = [cupy.zeros((1,), np.uint64) for _ in range(THREADS)]

    def work(number: int) -> None:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for _ in range(repeats // THREADS):
                for result, wanted in zip(call(), expected, strict=True):
                    words = result.nbytes // WORD_BYTES
                    differ((BLOCKS,), (BLOCK_THREADS,), (result, wanted, np.int64(words), counts[number]))
            stream.synchronize()

    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)  # threads that wait for each other at every launch
    stop = threading.Event()
    bystander = threading.Thread(target=multiply_until, args=(stop,))
    bystander.start()
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        cupy.cuda.Device().synchronize()
    finally:
        stop.set()
        bystander.join()
        sys.setswitchinterval(before)
    different = sum(int(count[0]) for count in counts)
    print(f"{family.name:21} {repeats} repeats in {THREADS} threads: {different} words differ", flush=True)
    return different


def multiply_until(stop: threading.Event) -> None:
    """Keeps a part of the GPU and its memory busy."""
    import cupy

    with cupy.cuda.Stream(non_blocking=True) as stream:
        values = cupy.ones((BYSTANDER, BYSTANDER), np.float32)
        while not stop.is_set():
            for _ in range(8):
                values = cupy.sqrt(values + 1)
            stream.synchronize()


def count_memory(calls: int) -> int:
    """Memory of the process and of the device after so many calls of each kind, less that after a few of them."""
    import cupy

    grown = 0
    for name, call in unplanned_calls():
        for count in (WARM_CALLS, calls):
            for index in range(count):
                call()
                if index % 1000 == 0:
                    cupy.cuda.Device().synchronize()
            cupy.cuda.Device().synchronize()
            host = resident_bytes()
            device = cupy.get_default_memory_pool().total_bytes()
            free = cupy.cuda.runtime.memGetInfo()[0]
            if count == WARM_CALLS:
                before = host, device, free
        changes = host - before[0], device - before[1], before[2] - free
        bad = changes[0] > GROWTH_BYTES or changes[1] > 0
        grown += bad
        words = ", ".join(f"{what} {change:+,}" for what, change in zip(WHERE, changes, strict=True))
        print(f"{name:18} {calls} calls: bytes of {words}" + " GROWN" * bad, flush=True)
    return grown


def resident_bytes() -> int:
    """Of this process, now; elsewhere than on Linux the most it ever had."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
