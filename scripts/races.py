#!/usr/bin/env python3
"""Run every kernel family under compute-sanitizer, or look for races and leaks without it; needs a Hopper GPU.

FAMILIES are beginnings of names: of kernel families, "around" (merges, slots), "cache" (appends, copies, conversions),
"shards" (dense families on a shard of a cache), "hazards" (lengths, pages and indices that nobody checked). All unless
some are given. Exits with 1 if anything is found.
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
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import click
import numpy as np

from cupy_mla import (
    append_tokens,
    copy_pages,
    dequantise_cache,
    merge_states,
    mla_decode,
    mla_sparse_decode,
    mla_sparse_prefill,
    plan_decode,
    plan_sparse_decode,
    quantise_cache,
    slots_of,
)
from cupy_mla.kernels.catalogue import NamedKernel, all_kernels, standard_configs
from cupy_mla.kernels.choose import FAMILIES, GATHERED_FAMILIES
from cupy_mla.kernels.family import DecodeFamily, KernelConfig
from cupy_mla.kernels.fp8 import Fp8Family
from cupy_mla.kernels.gathered import GatheredConfig
from cupy_mla.kernels.token_pages import RowPagesFamily
from cupy_mla.lab.compile_job import compile_all
from cupy_mla.lab.libraries import CUPY
from cupy_mla.lab.trial import Settings, Trial
from cupy_mla.layouts import DENSE_LAYOUTS, LAYOUTS, CacheLayout
from cupy_mla.parallel import local_lengths

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
AROUND = "around"  # merges, slots
CACHE = "cache"  # appends, copies, conversions
SHARDS = "shards"  # dense families on a shard of a cache, a process each
HAZARDS = "hazards"  # lengths, pages and indices that nobody checked
UNITS = (*(family.name for family in (*FAMILIES, *GATHERED_FAMILIES)), AROUND, CACHE, SHARDS, HAZARDS)
SUMMARY = re.compile(
    r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warning)"
)
SANITIZER_SECONDS = 300
SHARE_CONFIGS = 16  # that a process runs one after the other
RACECHECK_BYTES = 50 << 30  # of the host, at most, for one unit; without them Linux kills it
LENGTHS = (0, 5, 64, 130, 700)
SHARDING = {"cp_world": 3, "cp_rank": 1, "cp_interleave": 5}
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
INT32 = np.iinfo(np.int32)


@click.command(help=__doc__)
@click.argument("families", nargs=-1)
@click.option("--tool", "tools", multiple=True, type=click.Choice(TOOLS), help="Of compute-sanitizer; all by default.")
@click.option("--every", is_flag=True, help="All standard configurations, not one a family; memcheck by default.")
@click.option(
    "--jobs", type=click.IntRange(min=1), default=4, show_default=True,
    help="Families at once; racecheck has as many as there is memory for.",
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
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    racechecks = threading.BoundedSemaphore(max(1, memory // RACECHECK_BYTES))
    found = 0

    def run(tool: str, unit: str, share: tuple[int, int]) -> tuple[int, str]:
        """How many errors, -1 if it did not run; and what there is to say."""
        command = [sanitizer, "--tool", tool, "--target-processes", "all", sys.executable, __file__, "--work", unit]
        command += ["--every"] * every + ["--share", *map(str, share)]
        with racechecks if tool == "racecheck" else nullcontext():
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZER_SECONDS)
            except subprocess.TimeoutExpired:
                return -1, f"not done after {SANITIZER_SECONDS} s"
        summary = SUMMARY.findall(done.stdout)
        if done.returncode or not summary:
            return -1, f"exit code {done.returncode}\n{(done.stdout + done.stderr)[-600:]}"
        errors, raced, warned = summary[-1]
        return int(errors or raced), f"{warned} warnings" if int(errors or raced) == 0 else done.stdout

    with ThreadPoolExecutor(jobs) as pool:
        work = {
            pool.submit(run, tool, unit, share): (tool, unit, share)
            for tool in tools
            for unit in units
            for share in shares_of(unit, every)
        }
        for future in as_completed(work):
            (tool, unit, (index, of)), (count, text) = work[future], future.result()
            name = unit if of == 1 else f"{unit} {index + 1}/{of}"
            verdict = {-1: "did not run", 0: "clean"}.get(count, f"{count} errors")
            warned = count == 0 and text not in (" warnings", "0 warnings")
            print(f"{tool:10} {name:22} {verdict}" + (f", {text}" if warned else ""), flush=True)
            if count != 0:
                found += 1
                print(*[f"    {line}" for line in text.splitlines()[-12:]], sep="\n", flush=True)
    return found


def shares_of(unit: str, every: bool) -> list[tuple[int, int]]:
    """Which share of how many each process runs of a unit."""
    count = len(FAMILIES) if unit == SHARDS else 1
    if every and unit not in (AROUND, CACHE, SHARDS, HAZARDS):
        count = -(-sum(1 for _ in distinct_configs(family_of(unit))) // SHARE_CONFIGS)
    return [(index, count) for index in range(count)]


def family_of(unit: str) -> DecodeFamily:
    return next(family for family in (*FAMILIES, *GATHERED_FAMILIES) if family.name == unit)


def compile_for(units: list[str], every: bool) -> None:
    """What the units run, in all processes that there is room for: under a tool it would be one after the other."""
    families = [family for family in (*FAMILIES, *GATHERED_FAMILIES) if family.name in units or HAZARDS in units]
    sharded = itertools.chain.from_iterable(map(sharded_configs, FAMILIES if SHARDS in units else ()))
    decode = {config.name: config for config in standard_configs()}
    wanted = {
        name for name, config in decode.items() if config.family in families and (every or is_typical(config))
    }
    kernels = [kernel for kernel in all_kernels() if kernel.name in wanted or kernel.name not in decode]
    typical = itertools.chain.from_iterable(map(typical_configs, families))
    kernels += [
        NamedKernel(config.name, config.source()) for config in (*typical, *sharded) if config.name not in decode
    ]
    for _ in compile_all(kernels, os.cpu_count() or 1):
        pass  # a kernel that does not compile fails where it is used


def run_unit(unit: str, every: bool, share: tuple[int, int]) -> None:
    """What the tool watches."""
    if unit == AROUND:
        run_around()
    elif unit == CACHE:
        run_cache()
    elif unit == SHARDS:
        for family in itertools.islice(FAMILIES, share[0], None, share[1]):
            for config in sharded_configs(family):
                run_shard(config)
    elif unit == HAZARDS:
        run_hazards()
    else:
        family, (index, of) = family_of(unit), share
        for config in itertools.islice(distinct_configs(family) if every else typical_configs(family), index, None, of):
            (run_gathered if family in GATHERED_FAMILIES else run_dense)(config)
    CUPY.synchronize()


def typical_configs(family: DecodeFamily) -> Iterator[KernelConfig]:
    """The model dimensions in bfloat16; with a mask, for few rows, with a second cache where the family has such."""
    return filter(is_typical, distinct_configs(family))


def sharded_configs(family: DecodeFamily) -> Iterator[KernelConfig]:
    """What differs of a shard: its mask, and partial results."""
    for config in typical_configs(family):
        tokens = tokens_of(config)
        rows = heads_of(config, tokens) * tokens
        parts = family.scale_parts(config.latent_dim, config.dtype, rows, of_share=True)
        of_shard = replace(config, sharded=config.causal, scale_parts=parts)
        if of_shard != config:
            yield of_shard


def is_typical(config: KernelConfig) -> bool:
    has_extra = isinstance(config, GatheredConfig) and config.extra_layout is not None
    of_a_model = (config.latent_dim, config.rope_dim) == (512, 64) or has_extra
    return of_a_model and config.dtype == "bfloat16" and config.page_size in (1, 64)


def distinct_configs(family: DecodeFamily) -> Iterator[KernelConfig]:
    """The standard ones, and typical ones of few rows where only a call by name gets them. Without those of a static
    schedule: what is planned is run as prefill, too.
    """
    standard = family.standard_configs()
    few = 0 if any(config.refined for config in standard) else family.refined_rows
    for config in standard:
        if isinstance(config, GatheredConfig) and not config.planned:
            continue
        yield config
        if few and is_typical(config) and family.refines(config.dtype, few):
            parts = family.scale_parts(config.latent_dim, config.dtype, few)
            yield replace(config, refined=True, scale_parts=parts)


def trial_of(config: KernelConfig) -> Trial:
    trial = Trial(0, CUPY)
    trial.settings = Settings(config.latent_dim, config.rope_dim, config.dtype, config.page_size, config.causal)
    return trial


def tokens_of(config: KernelConfig) -> int:
    return 2 if config.causal else 1


def heads_of(config: KernelConfig, tokens: int) -> int:
    """So that a query token, or so many of them, have as many rows as the configuration is for."""
    if config.float_partials:
        return 1
    return config.family.refined_rows // tokens if config.refined else config.rows + 3


def dense_arrays(config: KernelConfig, lengths: tuple[int, ...] = LENGTHS) -> tuple[list[Any], dict[str, Any]]:
    """A small problem that this configuration serves."""
    trial = trial_of(config)
    stored = "float8_e4m3fn" if isinstance(config.family, Fp8Family) else config.dtype
    width = config.latent_dim + config.rope_dim
    counts = [-(-length // config.page_size) for length in lengths]
    tokens = tokens_of(config)
    heads = heads_of(config, tokens)
    cache = trial.values((sum(counts) + 1, config.page_size, 1, width), stored)
    options: dict[str, Any] = {"head_dim_v": config.latent_dim, "causal": config.causal}
    if isinstance(config.family, RowPagesFamily):
        assert isinstance(config, GatheredConfig)
        cache = config.layout.with_page_starts(config.layout.quantise(np.asarray(cache, np.float32)))
        options["layout"] = config.layout.name
    table = np.zeros((len(lengths), max(counts)), np.int32)
    for row, count in enumerate(counts):
        table[row, :count] = sum(counts[:row]) + np.arange(count)
    q = trial.values((len(lengths), tokens, heads, width), config.dtype)
    arrays = [trial.upload(array) for array in (q, cache, table, np.array(lengths, np.int32))]
    if isinstance(config.family, Fp8Family):
        options["kv_scale"] = (0.5, 0.3) if config.two_scales else 0.5
        options["compute"] = config.family.compute
    return arrays, options


def run_dense(config: KernelConfig) -> None:
    arrays, options = dense_arrays(config)
    for split in (None, 64):
        plan = plan_decode(*arrays, **options, kernel=config.family.name, fixed_split_tokens=split)
        check_config(plan, config)
        for _ in range(2):
            mla_decode(*arrays, **options, plan=plan)


def check_config(plan: Any, config: KernelConfig) -> None:
    """The configuration that is looked at is the one that runs."""
    runs = plan.blueprint.config
    if config.two_scales:
        runs = config.family.for_two_scales(runs)
    if runs.source() != config.source():
        raise RuntimeError(f"{config.name} was wanted, {runs.name} runs")


def run_shard(config: KernelConfig) -> None:
    lengths = np.array(LENGTHS, np.int32)
    shares = local_lengths(lengths, *SHARDING.values())
    arrays, options = dense_arrays(config, tuple(map(int, shares)))
    options |= {"total_seqlens": CUPY.upload(lengths), **SHARDING}
    for split in (None, 64):
        plan = plan_decode(*arrays, **options, kernel=config.family.name, fixed_split_tokens=split)
        check_config(plan, config)
        for _ in range(2):
            mla_decode(*arrays, **options, plan=plan)


def gathered_arrays(config: KernelConfig) -> tuple[list[Any], dict[str, Any]]:
    trial = trial_of(config)
    width, topk, batch, tokens = config.latent_dim + config.rope_dim, 200, 3, 384
    heads = heads_of(config, 1)
    assert isinstance(config, GatheredConfig)

    def cache_of(layout: CacheLayout) -> Any:
        step = 2 if config.page_size > 1 else 1  # with gaps between pages, or without
        pages = tokens // config.page_size * step
        values: Any = trial.values((pages, config.page_size, 1, width), config.dtype)
        if layout.codec is not None:
            values = layout.quantise(np.asarray(values, np.float32), 0.5 if layout.needs_scale else None)
        return trial.upload(layout.with_page_starts(values)[::step])

    def indices() -> Any:
        return trial.upload(trial.rng.integers(-3, tokens + 3, (batch, 2, topk), dtype=np.int32))

    lengths, sinks = np.array([0, 70, topk], np.int32), trial.rng.standard_normal(heads).astype(np.float32)
    options = {"topk_length": trial.upload(lengths), "attn_sink": trial.upload(sinks), "head_dim_v": config.latent_dim}
    if config.layout.codec is not None:
        options |= {"layout": config.layout.name} | ({"kv_scale": 0.5} if config.layout.needs_scale else {})
    if config.extra_layout is not None:
        options |= {"extra_kv_cache": cache_of(config.extra_layout), "extra_indices": indices()}
        options |= {"extra_layout": config.extra_layout.name} if config.extra_layout.codec is not None else {}
    q = trial.values((batch, 2, heads, width), config.dtype)
    return [trial.upload(q), cache_of(config.layout), indices()], options


def without(options: dict[str, Any], beginning: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if not name.startswith(beginning)}


def run_gathered(config: KernelConfig) -> None:
    arrays, options = gathered_arrays(config)
    for split in (None, 64):
        plan = plan_sparse_decode(
            *arrays, **without(options, "attn_sink"), kernel=config.family.name, fixed_split_tokens=split
        )
        check_config(plan, config)
        for _ in range(2):
            mla_sparse_decode(*arrays, **options, plan=plan)
    q, cache, indices = arrays
    mla_sparse_prefill(q[:, 0], cache, indices[:, 0], **without(options, "extra"))


def run_around() -> None:
    trial = Trial(0, CUPY)
    for dtype in ("bfloat16", "float16", "float32"):
        outs = trial.upload(trial.values((3, 2, 2, 24, 512), dtype))
        merge_states(outs, trial.upload(trial.values((3, 2, 24, 2), "float32")))
    table, tokens = np.arange(8, dtype=np.int32).reshape(2, 4), np.arange(-5, 595, dtype=np.int32).reshape(2, 300)
    slots_of(trial.upload(tokens), trial.upload(table), 64)
    local_lengths(trial.upload(np.arange(1000, dtype=np.int32)), *SHARDING.values())


def run_cache() -> None:
    """Into and out of every layout, with slots and pages outside of the cache among those given."""
    trial = Trial(0, CUPY)
    slots = trial.upload(np.arange(-4, 36, dtype=np.int64) * 8)
    pages = trial.upload(np.array([3, -1, 0, 4, INT32.max, 1, INT32.min], np.int32))
    for dtype, layout in itertools.product(DENSE_LAYOUTS, LAYOUTS.values()):
        width = 576 if layout.supports(512, 64) else 512
        values = trial.values((4, 64, 1, width), dtype)
        rows = trial.upload(trial.values((40, 1, width), dtype))
        if layout in DENSE_LAYOUTS.values():
            append_tokens(trial.upload(values), rows, slots)
            continue
        scale = 0.5 if layout.needs_scale else None
        cache = trial.upload(layout.with_page_starts(layout.quantise(np.asarray(values, np.float32), scale)))
        options = {"kv_scale": scale, "layout": layout}
        append_tokens(cache, rows, slots, **options)
        for chosen, count in ((None, 4), (pages, 7)):
            wanted = trial.upload(trial.values((count, 64, 1, width), dtype))
            quantise_cache(cache, wanted, pages=chosen, validate=False, **options)
            dequantise_cache(cache, wanted, pages=chosen, validate=False, **options)
    # Of 16 bytes and of 1; whole, from page to page, and every other page.
    for shape in ((8, 64, 1, 1152), (8, 5, 3, 7)):
        cache, other = (trial.upload(trial.rng.integers(0, 256, shape, np.uint8)) for _ in range(2))
        copy_pages(cache, source=other)
        copy_pages(cache, pages, trial.upload(np.array([7, 6, 5, 2, 2, -1, 2], np.int32)), validate=False)
        copy_pages(cache[::2], pages, pages, source=other[1::2], validate=False)


def run_hazards() -> None:
    """Whatever lengths, pages and indices hold, only the cache is read."""
    wrong = np.array([-1, INT32.min, INT32.max, 701, 1 << 20], np.int32)
    for family in FAMILIES:
        config = next(iter(typical_configs(family)))
        (q, cache, table, _), options = dense_arrays(config)
        trial = Trial(1, CUPY)
        bad = trial.rng.choice([-1, cache.shape[0], INT32.max, INT32.min, 0], table.shape).astype(np.int32)
        good_lengths, bad_table = np.array(LENGTHS, np.int32), CUPY.upload(bad)
        for pages, lengths in ((table, wrong), (bad_table, good_lengths), (bad_table, wrong)):
            given = q, cache, pages, CUPY.upload(lengths)
            plan = plan_decode(*given, **options, kernel=family.name, validate=False)
            mla_decode(*given, **options, plan=plan, validate=False)
    for family in GATHERED_FAMILIES:
        (q, cache, indices), options = gathered_arrays(next(iter(typical_configs(family))))
        bad = np.resize(wrong, indices.shape).astype(np.int32)
        options["topk_length"] = CUPY.upload(wrong[:3])
        plan = plan_sparse_decode(
            q, cache, indices, **without(options, "attn_sink"), kernel=family.name, validate=False
        )
        mla_sparse_decode(q, cache, CUPY.upload(bad), **options, plan=plan, validate=False)
        mla_sparse_prefill(q[:, 0], cache, CUPY.upload(bad)[:, 0], **options, validate=False)


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
    chosen = [family for family in (*FAMILIES, *GATHERED_FAMILIES) if not families or family.name.startswith(families)]
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
