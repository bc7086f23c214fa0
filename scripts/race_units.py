"""What races.py runs under the tools of compute-sanitizer: small problems of every kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

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
from cupy_mla.arrays.view import view
from cupy_mla.call.memo import forget
from cupy_mla.gpu.jit.module import load
from cupy_mla.gpu.launch import launch_kernel
from cupy_mla.kernels import choose
from cupy_mla.kernels.choose import FAMILIES, GATHERED_FAMILIES
from cupy_mla.kernels.exchange import (
    CHUNK_BYTES,
    PACKET_BYTES,
    PUSH_SOURCE,
    WORD_BYTES,
    combine_push_geometry,
    combine_push_source,
    packets_of_row,
    push_geometry,
    push_merge_geometry,
    push_merge_source,
)
from cupy_mla.kernels.family import DecodeFamily, KernelConfig
from cupy_mla.kernels.fp8 import Fp8Family
from cupy_mla.kernels.gathered import NO_EXTRA, GatheredConfig
from cupy_mla.kernels.structs import COMBINE_PARAMS, MERGE_ITEM, PLAN_HEADER, PUSH_MERGE_PARAMS, PUSH_PARAMS
from cupy_mla.kernels.token_pages import RowPagesFamily
from cupy_mla.kernels.wide import WIDE64
from cupy_mla.lab.libraries import CUPY
from cupy_mla.lab.trial import Settings, Trial
from cupy_mla.layouts import DENSE_LAYOUTS, LAYOUTS, CacheLayout
from cupy_mla.parallel import local_lengths, local_slots
from cupy_mla.schedule import waves
from cupy_mla.schedule.pieces import ceil_div

AROUND = "around"  # merges, slots, what ranks of one host hand to each other
CACHE = "cache"  # appends, copies, conversions
SHARDS = "shards"  # every family on a shard of a cache
HAZARDS = "hazards"  # lengths, pages and indices that nobody checked
OTHER_UNITS = (AROUND, CACHE, SHARDS, HAZARDS)
ALL_FAMILIES = (*FAMILIES, *GATHERED_FAMILIES)
UNITS = (*(family.name for family in ALL_FAMILIES), *OTHER_UNITS)
LENGTHS = (0, 5, 64, 130, 700)
MANY_PAGES = 65  # of 64 tokens
SHARDING = {"cp_world": 3, "cp_rank": 1, "cp_interleave": 5}
INT32 = np.iinfo(np.int32)
WRONG = np.array([-1, INT32.min, INT32.max, 701, 1 << 20], np.int32)  # lengths, and indices
AHEAD = 2**30  # a meeting of ranks that nobody waits for
CALLS = 2  # in which results take other places
PLAN_CALLS = 2  # with each plan: the second may read its work ahead of the kernel before it
ELEMENT_BYTES = 2


def family_of(unit: str) -> DecodeFamily:
    return next(family for family in ALL_FAMILIES if family.name == unit)


def run_unit(unit: str, every: bool, share: tuple[int, int]) -> None:
    """What the tool watches."""
    index, of = share
    for problem in problems_of(unit, every)[index::of]:
        problem()
    CUPY.synchronize()


def problems_of(unit: str, every: bool) -> list[Callable[[], None]]:
    """What a unit runs, one after the other; each knows nothing of the others."""
    if unit == AROUND:
        return [run_around, run_exchange, partial(run_exchange, in_packets=True), run_combine_push]
    if unit == CACHE:
        return [run_cache]
    if unit == SHARDS:
        return [
            partial(run_gathered_shard if config.family in GATHERED_FAMILIES else run_shard, config)
            for config in all_sharded_configs()
        ]
    if unit == HAZARDS:
        return [partial(run_hazards, family) for family in FAMILIES] + [
            partial(run_gathered_hazards, family) for family in GATHERED_FAMILIES
        ]
    family = family_of(unit)
    run = run_gathered if family in GATHERED_FAMILIES else run_dense
    return [partial(run, config) for config in (distinct_configs if every else typical_configs)(family)]


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


def all_sharded_configs() -> Iterator[KernelConfig]:
    """Of all families."""
    return itertools.chain.from_iterable(map(sharded_configs, ALL_FAMILIES))


def prefill_configs(config: GatheredConfig) -> list[GatheredConfig]:
    """What the same family has for a prefill: without a plan, a second cache, partial results. In clusters and not."""
    whole = replace(
        config, planned=False, float_partials=False, scale_parts=None, extra_page_size=NO_EXTRA, extra_layout=None
    )
    return [*([replace(whole, clustered=True)] if whole.family.shares_tokens(whole) else []), whole]


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
    counts = [ceil_div(length, config.page_size) for length in lengths]
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
        for _ in range(PLAN_CALLS):
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
        for _ in range(PLAN_CALLS):
            mla_decode(*arrays, **options, plan=plan)


def gathered_arrays(config: KernelConfig) -> tuple[list[Any], dict[str, Any]]:
    trial = trial_of(config)
    width, topk, batch, tokens = config.latent_dim + config.rope_dim, 200, 3, 384
    heads = heads_of(config, 1)
    assert isinstance(config, GatheredConfig)

    def cache_of(layout: CacheLayout, page_size: int) -> Any:
        step = 2 if page_size > 1 else 1  # with gaps between pages, or without
        pages = ceil_div(tokens, page_size) * step
        values: Any = trial.values((pages, page_size, 1, width), config.dtype)
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
        extra = cache_of(config.extra_layout, config.extra_page_size)
        options |= {"extra_kv_cache": extra, "extra_indices": indices()}
        options |= {"extra_layout": config.extra_layout.name} if config.extra_layout.codec is not None else {}
    q = trial.values((batch, 2, heads, width), config.dtype)
    return [trial.upload(q), cache_of(config.layout, config.page_size), indices()], options


def without(options: dict[str, Any], beginning: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if not name.startswith(beginning)}


def run_gathered(config: KernelConfig) -> None:
    arrays, options = gathered_arrays(config)
    run_planned(config, arrays, options)
    run_prefill(config.family, arrays, options)


def run_gathered_shard(config: KernelConfig) -> None:
    arrays, options = gathered_arrays(config)
    run_planned(config, arrays, options | {"cp_world": SHARDING["cp_world"]})


def run_planned(config: KernelConfig, arrays: list[Any], options: dict[str, Any]) -> None:
    for split in (None, 64):
        plan = plan_sparse_decode(
            *arrays, **without(options, "attn_sink"), kernel=config.family.name, fixed_split_tokens=split
        )
        check_config(plan, config)
        for _ in range(PLAN_CALLS):
            mla_sparse_decode(*arrays, **options, plan=plan)


def run_prefill(family: DecodeFamily, arrays: list[Any], options: dict[str, Any], **others: Any) -> None:
    """By this family, which so small a problem would not be given to, or was another's before. Clusters share the query
    tokens, where it can; then nobody does.
    """
    q, cache, indices = arrays
    for clusters in (waves.CLUSTERS, ()):
        forget()
        with (
            mock.patch.object(choose, "GATHERED_FAMILIES", (family,)),
            mock.patch.multiple(waves, CLUSTERS=clusters, MERGE_TILES=0),
        ):
            mla_sparse_prefill(q[:, 0], cache, indices[:, 0], **without(options, "extra"), **others)


def run_around() -> None:
    trial = Trial(0, CUPY)
    for dtype in ("bfloat16", "float16", "float32"):
        outs = trial.upload(trial.values((3, 2, 2, 24, 512), dtype))
        merge_states(outs, trial.upload(trial.values((3, 2, 24, 2), "float32")))
    table, tokens = np.arange(8, dtype=np.int32).reshape(2, 4), np.arange(-5, 595, dtype=np.int32).reshape(2, 300)
    slots_of(trial.upload(tokens), trial.upload(table), 64)
    local_lengths(trial.upload(np.arange(1000, dtype=np.int32)), *SHARDING.values())
    local_slots(trial.upload(tokens), trial.upload(table), 64, **SHARDING)


def run_exchange(*, in_packets: bool = False) -> None:
    """One of two ranks hands queries to both, and results to the other, which is always ahead of it, or finds them
    stored there; each twice, with so few CTAs that they have several rounds. In packets there is a CTA for each row.
    """
    trial = Trial(0, CUPY)
    world, rank, num_ctas, (steps, tokens, own), width, d_v = 2, 1, 2, (3, 5, 7), 576, 512
    row, rows = width * ELEMENT_BYTES, steps * tokens * own
    # In a rank's memory: flags of the meetings, queries of all heads, results of two calls from each rank, and packets.
    queries_at, chunks = num_ctas * world * WORD_BYTES, rows * row // CHUNK_BYTES
    outs_at = queries_at + world * rows * row
    lses_at = outs_at + CALLS * world * rows * d_v * ELEMENT_BYTES
    packets_at = lses_at + CALLS * world * rows * WORD_BYTES
    result_packets_at = packets_at + world * chunks * PACKET_BYTES
    end = result_packets_at + CALLS * world * rows * packets_of_row(d_v * ELEMENT_BYTES) * PACKET_BYTES
    memory = np.zeros((end if in_packets else packets_at) // WORD_BYTES, np.uint32)
    memory[: num_ctas * world] = memory[packets_at // WORD_BYTES :] = AHEAD
    memories = [trial.upload(memory.copy()) for _ in range(world)]
    addresses = trial.upload(np.array([view(memory, "memory").pointer for memory in memories], np.uint64))
    q = trial.upload(trial.values((steps, tokens, own, width), "bfloat16"))
    outs = trial.upload(trial.values((steps, tokens, world * own, d_v), "bfloat16"))
    lses = trial.upload(trial.values((steps, world * own, tokens), "float32"))
    out = trial.upload(trial.values((steps, tokens, own, d_v), "bfloat16"))
    lse = trial.upload(trial.values((steps, own, tokens), "float32"))
    push, merge = np.zeros(1, PUSH_PARAMS), np.zeros(1, PUSH_MERGE_PARAMS)
    push["from"], push["from_strides"] = view(q, "q").pointer, (tokens * own * row, own * row, row)
    push["to"] = queries_at + rank * own * row
    push["to_strides"] = tokens * world * own * row, world * own * row, row
    push["chunks"], merge["d_v"] = row // CHUNK_BYTES, d_v
    merge["outs"], merge["lses"] = view(outs, "outs").pointer, view(lses, "lses").pointer
    merge["received_outs"], merge["received_lses"], merge["places"] = outs_at, lses_at, CALLS
    merge["out"], merge["lse"], merge["aligned"] = view(out, "out").pointer, view(lse, "lse").pointer, 1
    merge["out_strides"], merge["lse_strides"] = (tokens * own * d_v, own * d_v, d_v), (own * tokens, 1, tokens)
    merge_source, merge_geometry = push_merge_source("bfloat16"), push_merge_geometry(num_ctas, rows)
    stored = merge.copy()
    stored["outs"] = 0
    merges = stored, merge
    if in_packets:
        push["packets"], merge["packets"] = packets_at, result_packets_at
        merge_geometry = push_merge_geometry(rows, rows, world * (d_v * ELEMENT_BYTES + WORD_BYTES))
        merges = (merge,)
    kernels = [(PUSH_SOURCE, push, push_geometry(num_ctas, chunks))]
    kernels += [(merge_source, params, merge_geometry) for params in merges]
    for source, params, geometry in kernels:
        calls = trial.upload(np.zeros(geometry.grid[0], np.uint32))
        params["sizes"], meetings = (steps, tokens, own), params["meetings"]
        meetings["memories"], meetings["calls"] = view(addresses, "memories").pointer, view(calls, "calls").pointer
        meetings["world"], meetings["rank"] = world, rank
        for _ in range(CALLS):
            launch_kernel(load(source, 0), geometry.grid, geometry.block, geometry.shared_memory, 0, (params,))


def run_combine_push() -> None:
    """One of two ranks, the other of which is always ahead of it, merges the pieces of one request of two, twice: warps
    have several units.
    """
    trial = Trial(0, CUPY)
    world, rank, num_ctas, (batch, own), d_v, pieces = 2, 1, 3, (2, 7), 512, 5
    config = next(config for config in WIDE64.standard_configs() if config.dtype == "bfloat16")
    rows, slot_rows = batch * own, config.rows
    packet_words = packets_of_row(d_v * ELEMENT_BYTES) * PACKET_BYTES // WORD_BYTES
    memories = [
        trial.upload(np.full(CALLS * world * rows * packet_words, AHEAD, np.uint32)) for _ in range(world)
    ]
    addresses = trial.upload(np.array([view(memory, "memory").pointer for memory in memories], np.uint64))
    header, merge = np.zeros(1, PLAN_HEADER), np.zeros(1, MERGE_ITEM)
    header["num_merges"], merge["request"], merge["seqlen_q"], merge["slot_count"] = 1, 1, 1, pieces
    plan = trial.upload(np.concatenate([header.view(np.int32), merge.view(np.int32)]))
    partial_out = trial.upload(trial.values((pieces, slot_rows, d_v), "bfloat16"))
    partial_lse = trial.upload(trial.values((pieces, slot_rows, config.partial_lse_bytes // WORD_BYTES), "float32"))
    outs = trial.upload(trial.values((batch, 1, world * own, d_v), "bfloat16"))
    lses = trial.upload(trial.values((batch, world * own, 1), "float32"))
    out = trial.upload(trial.values((batch, 1, own, d_v), "bfloat16"))
    lse = trial.upload(trial.values((batch, own, 1), "float32"))
    combine, push = np.zeros(1, COMBINE_PARAMS), np.zeros(1, PUSH_MERGE_PARAMS)
    combine["partial_out"], combine["partial_lse"] = view(partial_out, "out").pointer, view(partial_lse, "lse").pointer
    combine["plan"], combine["merges_offset"] = view(plan, "plan").pointer, PLAN_HEADER.itemsize // WORD_BYTES
    combine["slot_rows"], combine["rows"], combine["group_heads"] = slot_rows, slot_rows, world * own
    combine["d_v"] = push["d_v"] = d_v
    push["outs"], push["lses"] = view(outs, "outs").pointer, view(lses, "lses").pointer
    push["out"], push["lse"], push["aligned"] = view(out, "out").pointer, view(lse, "lse").pointer, 1
    push["out_strides"], push["lse_strides"] = (own * d_v, own * d_v, d_v), (own, 1, 1)
    push["places"], push["sizes"], meetings = CALLS, (batch, 1, own), push["meetings"]
    calls = trial.upload(np.zeros(num_ctas, np.uint32))
    meetings["memories"], meetings["calls"] = view(addresses, "memories").pointer, view(calls, "calls").pointer
    meetings["world"], meetings["rank"] = world, rank
    kernel, geometry = load(combine_push_source(config), 0), combine_push_geometry(num_ctas, world)
    assert geometry is not None
    for _ in range(CALLS):
        launch_kernel(kernel, geometry.grid, geometry.block, geometry.shared_memory, 0, (combine, push))


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
    for layout in LAYOUTS.values():
        run_cache_of_many(trial, layout)
    # Of 16 bytes and of 1; whole, from page to page, and every other page.
    for shape in ((8, 64, 1, 1152), (8, 5, 3, 7)):
        cache, other = (trial.upload(trial.rng.integers(0, 256, shape, np.uint8)) for _ in range(2))
        copy_pages(cache, source=other)
        copy_pages(cache, pages, trial.upload(np.array([7, 6, 5, 2, 2, -1, 2], np.int32)), validate=False)
        copy_pages(cache[::2], pages, pages, source=other[1::2], validate=False)


def run_cache_of_many(trial: Trial, layout: CacheLayout) -> None:
    """So many tokens that each warp takes all of its own: neighbours, scattered ones, and some that go nowhere."""
    width, count = 576 if layout.supports(512, 64) else 512, MANY_PAGES * 64
    dense = layout in DENSE_LAYOUTS.values()
    values = trial.values((MANY_PAGES, 64, 1, width), layout.dtype if dense else "bfloat16")
    rows = trial.upload(values.reshape(count, 1, width))
    scale = 0.5 if layout.needs_scale else None
    stored = values if dense else layout.with_page_starts(layout.quantise(np.asarray(values, np.float32), scale))
    cache, options = trial.upload(stored), {"kv_scale": scale, "layout": layout}
    for slots in (np.arange(-3, count - 3), trial.rng.permutation(count)):
        append_tokens(cache, rows, trial.upload(slots.astype(np.int64)), **options)
    if not dense:
        given = trial.upload(values)
        quantise_cache(cache, given, **options)
        dequantise_cache(cache, given, **options)


def run_hazards(family: DecodeFamily) -> None:
    """Whatever lengths and pages hold, only the cache is read."""
    config = next(iter(typical_configs(family)))
    (q, cache, table, _), options = dense_arrays(config)
    trial = Trial(1, CUPY)
    bad = trial.rng.choice([-1, cache.shape[0], INT32.max, INT32.min, 0], table.shape).astype(np.int32)
    good_lengths, bad_table = np.array(LENGTHS, np.int32), CUPY.upload(bad)
    for pages, lengths in ((table, WRONG), (bad_table, good_lengths), (bad_table, WRONG)):
        given = q, cache, pages, CUPY.upload(lengths)
        plan = plan_decode(*given, **options, kernel=family.name, validate=False)
        mla_decode(*given, **options, plan=plan, validate=False)


def run_gathered_hazards(family: DecodeFamily) -> None:
    """Whatever indices and their counts hold, only the cache is read."""
    (q, cache, indices), options = gathered_arrays(next(iter(typical_configs(family))))
    bad = CUPY.upload(np.resize(WRONG, indices.shape).astype(np.int32))
    options["topk_length"] = CUPY.upload(WRONG[:3])
    plan = plan_sparse_decode(q, cache, indices, **without(options, "attn_sink"), kernel=family.name, validate=False)
    for _ in range(PLAN_CALLS):  # the second may read indices while the first still runs
        mla_sparse_decode(q, cache, bad, **options, plan=plan, validate=False)
    run_prefill(family, [q, cache, bad], options, validate=False)
