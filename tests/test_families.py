"""Families of decode kernels: what they take of an SM, and which of them serves which problem.

The times behind the choice are measured; here, what must follow from them.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest

from cupy_mla.call.arguments import CUDA_MAX_LATENT, CUDA_MAX_WIDTH, CUDA_WIDTH_MULTIPLE
from cupy_mla.call.options import COMPUTES
from cupy_mla.call.problem import DecodeProblem, PagedKeys, Queries
from cupy_mla.call.sparse_problem import GatheredKeys, SparseProblem
from cupy_mla.decode.plan import schedule_shape
from cupy_mla.decode.sparse_plan import sparse_schedule_shape
from cupy_mla.errors import InvalidArgumentError
from cupy_mla.gpu import hopper
from cupy_mla.gpu.jit.source import kernels_root
from cupy_mla.kernels.catalogue import all_kernels, standard_configs
from cupy_mla.kernels.choose import (
    FAMILIES,
    FP8_FAMILIES,
    GATHERED_FAMILIES,
    choose_config,
    choose_gathered_config,
    load_of,
)
from cupy_mla.kernels.combine import (
    COMBINE_REGISTERS,
    combine_geometry,
    combine_source,
    gathered_combine_source,
)
from cupy_mla.kernels.family import ALL_COLUMNS, STANDARD_DIMS, ColumnParts, DecodeFamily, KernelConfig
from cupy_mla.kernels.fp8 import FP8_EXACT16, FP8_EXACT64, FP8_SPLIT16, FP8_SPLIT64, FP8_TURNS16, Fp8Family
from cupy_mla.kernels.gathered import GATHERED_WIDE64, GatheredConfig, gathered_config
from cupy_mla.kernels.gathered_narrow import GATHERED_NARROW16, GATHERED_NARROW32
from cupy_mla.kernels.narrow import NARROW16, NARROW32
from cupy_mla.kernels.token_pages import RowPagesFamily
from cupy_mla.kernels.wide import WIDE64
from cupy_mla.layouts import BF16, DENSE_LAYOUTS, FP8_DS_MLA, FP8_E4M3, FP16, LAYOUTS, CacheLayout

NUM_SMS = 132


def problem(batch: int, tokens_k: int, heads: int, **changes: Any) -> DecodeProblem:
    values: dict[str, Any] = {
        "batch": batch,
        "seqlen_q": 1,
        "num_heads_q": heads,
        "num_heads_kv": 1,
        "latent_dim": 512,
        "rope_dim": 64,
        "dtype": "bfloat16",
        "causal": False,
        "ragged": False,
        "total_q": batch,
    }
    queries = Queries(**values | changes)
    return DecodeProblem(queries, PagedKeys(64, tokens_k // 64), DENSE_LAYOUTS.get(queries.dtype, BF16))


def fp8(call: DecodeProblem, compute: str = "auto") -> DecodeProblem:
    return replace(call, layout=FP8_E4M3, compute=compute)


@pytest.mark.parametrize("rows", [16, 32])
def test_two_scales_have_kernels_of_their_own_where_all_is_exact(rows: int) -> None:
    for compute, rope_dim, expected in (("exact", 64, True), ("exact", 0, False), ("split", 64, False)):
        family = next(f for f in FP8_FAMILIES if (f.rows, getattr(f, "compute", "")) == (rows, compute))
        plain = family.configure(fp8(problem(1, 1024, rows, rope_dim=rope_dim), compute), rows)
        config = family.for_two_scales(plain)
        assert not plain.two_scales
        assert (config.two_scales, config.name.endswith("_two_scales")) == (expected, expected)
        assert (("MLA_TWO_SCALES", "1") in config.source().defines) == expected
        assert (config == plain) == (not expected)


def name(config: KernelConfig) -> str:
    return config.family.name


@pytest.mark.parametrize("batch", [132, 1024])
@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (1, "narrow16"),
        (16, "narrow16"),
        (17, "narrow32"),
        (32, "narrow32"),
        (33, "wide64"),
        (64, "wide64"),
        (128, "wide64"),
    ],
)
def test_large_batches_read_the_cache_the_fewest_times(batch: int, heads: int, expected: str) -> None:
    assert name(choose_config(problem(batch, 8192, heads), NUM_SMS)) == expected


def test_small_batches_of_many_heads_spread_over_more_ctas() -> None:
    assert name(choose_config(problem(1, 1024, 128), NUM_SMS)) == "narrow16"
    assert name(choose_config(problem(1, 8192, 128), NUM_SMS)) == "narrow32"
    assert name(choose_config(problem(1, 131072, 128), NUM_SMS)) == "wide64"
    assert name(choose_config(problem(64, 64, 128), NUM_SMS)) == "wide64"  # an item each, nothing to cut


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "us"), [(128, 8192, 16, 272), (128, 8192, 32, 283), (64, 32768, 16, 550)]
)
def test_a_call_takes_no_less_than_reading_its_cache(batch: int, tokens: int, heads: int, us: float) -> None:
    few_rows = problem(batch, tokens, heads)
    config = choose_config(few_rows, NUM_SMS)
    assert config.family.cost.call_time(load_of(few_rows, None), config.rows, NUM_SMS) == pytest.approx(us, rel=0.03)


@pytest.mark.parametrize("split", [None, 256])
@pytest.mark.parametrize(
    ("latent_dim", "rope_dim", "expected"),
    [
        (512, 64, "wide64"),
        (256, 0, "wide64"),
        (128, 64, "wide64"),
        (384, 64, "narrow32"),
        (512, 128, "narrow32"),
        (64, 0, "narrow32"),
        (512, 512, "narrow32"),
    ],
)
def test_widths_that_the_wide_kernel_is_not_made_for_are_left_to_the_narrow_one(
    latent_dim: int, rope_dim: int, expected: str, split: int | None
) -> None:
    config = choose_config(problem(132, 8192, 128, latent_dim=latent_dim, rope_dim=rope_dim), NUM_SMS, None, split)
    assert name(config) == expected
    assert config.shared_memory <= hopper.MAX_SHARED_BYTES


@pytest.mark.parametrize(
    ("heads", "changes", "split", "expected"),
    [
        (4, {}, None, True),
        (2, {"seqlen_q": 2, "total_q": 16}, None, True),
        (5, {}, None, False),
        (2, {"seqlen_q": 3, "total_q": 24}, None, False),
        (128, {}, None, False),
        (4, {}, 256, True),
        (4, {"ragged": True, "seqlen_q": 4, "total_q": 9}, 256, True),  # the other requests do not decide
        (5, {"ragged": True, "seqlen_q": 4, "total_q": 9}, 256, False),
    ],
)
def test_partial_results_of_four_rows_and_fewer_are_float32(
    heads: int, changes: dict[str, Any], split: int | None, expected: bool
) -> None:
    config = choose_config(problem(8, 1024, heads, **changes), NUM_SMS, None, split)
    assert config.float_partials == expected
    assert config.partial_dtype == ("float32" if expected else "float16")
    assert config.refined == (expected or heads == 5 or changes.get("seqlen_q") == 3)


@pytest.mark.parametrize("family", [*FAMILIES, *GATHERED_FAMILIES], ids=lambda family: family.name)
def test_probabilities_of_few_rows_are_refined_where_they_are_bf16(family: DecodeFamily) -> None:
    is_fp8 = family.name.startswith(("fp8", "gathered_fp8", "row_"))
    is_wide = not is_fp8 and family.rows == 64
    refined = [not is_fp8, not is_fp8, is_wide, is_wide, False]
    assert [family.refines("bfloat16", rows) for rows in (1, 8, 9, 16, 17)] == refined
    assert not family.refines("float16", 1)
    for config in family.standard_configs():
        assert config.refined <= (config.dtype == "bfloat16" and not is_fp8)
        rows = family.refined_rows if config.refined else 0
        assert ("MLA_REFINED_ROWS", str(rows)) in config.source().defines


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("heads", "is_few"), [(1, True), (16, True), (17, False), (128, False)])
def test_partial_results_of_the_wide_kernel_are_scaled(heads: int, dtype: str, is_few: bool) -> None:
    """Few rows have exponents beside the lse, the others powers in an lse for each half of the columns."""
    config = choose_config(problem(8, 1024, heads, dtype=dtype), NUM_SMS, None, None, "wide64")
    is_bf16 = dtype == "bfloat16"
    assert config.scale_parts == (ColumnParts(256, 2, in_lse=not is_few) if is_bf16 else None)
    assert config.partial_dtype == "float16"
    assert config.partial_lse_bytes == (8 if is_bf16 else 4)


@pytest.mark.parametrize("kernel", ["narrow16", "narrow32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("heads", [1, 4, 5, 16, 128])
@pytest.mark.parametrize("of_share", [False, True])
def test_partial_results_are_not_bf16_in_the_narrow_kernels(
    kernel: str, dtype: str, heads: int, of_share: bool
) -> None:
    call = problem(8, 1024, heads, dtype=dtype)
    call = replace(call, keys=replace(call.keys, cp_share=of_share))
    config = choose_config(call, NUM_SMS, None, None, kernel)
    is_float = heads <= 4 and kernel == "narrow16"
    assert config.partial_dtype == ("float32" if is_float else "float16")
    is_scaled = dtype == "bfloat16" and not is_float
    assert config.scale_parts == ((ColumnParts(16, 4) if of_share else ALL_COLUMNS) if is_scaled else None)
    assert config.partial_lse_bytes == (8 if is_scaled and of_share else 4)


GATHERED_PARTS = {
    **{f"gathered_narrow{rows}": ColumnParts(16, 4) for rows in (16, 32)},
    "gathered_wide64": ColumnParts(256, 2),
}
FP8_GATHERED = [f"gathered_fp8_{rows}" for rows in ("narrow16", "narrow32", "wide64")]


@pytest.mark.parametrize("kernel", [*GATHERED_PARTS, *FP8_GATHERED])
@pytest.mark.parametrize("heads", [4, 32, 128])
@pytest.mark.parametrize("of_share", [False, True])
def test_partial_results_of_chosen_tokens_of_a_share_are_scaled(kernel: str, heads: int, of_share: bool) -> None:
    """Where probabilities are bf16; of FP8 caches they are fp16."""
    layout = FP8_DS_MLA if "fp8" in kernel else BF16
    queries = problem(8, 1024, heads).queries
    call = SparseProblem(queries, GatheredKeys(2048, 1, None, cp_share=of_share), layout)
    config = choose_gathered_config(call, NUM_SMS, planned=True, kernel=kernel)
    is_float, is_few = heads <= 4 and kernel.endswith("narrow16"), heads <= 16 and kernel.endswith("wide64")
    assert config.float_partials == is_float
    is_scaled = is_few or (of_share and not is_float and layout is BF16)
    parts = {**GATHERED_PARTS, "gathered_fp8_wide64": ColumnParts(256, 2)}
    assert config.scale_parts == (parts[kernel] if is_scaled else None)


@pytest.mark.parametrize("kernel", [*GATHERED_PARTS, *FP8_GATHERED])
@pytest.mark.parametrize("of_share", [False, True])
def test_what_is_planned_for_each_layer_is_not_packed(kernel: str, of_share: bool) -> None:
    layout = FP8_DS_MLA if "fp8" in kernel else BF16
    call = SparseProblem(problem(64, 1024, 128).queries, GatheredKeys(2048, 1, None, cp_share=of_share), layout)
    config = choose_gathered_config(call, NUM_SMS, planned=True, kernel=kernel)
    assert sparse_schedule_shape(call, config, NUM_SMS).cost.packs == (kernel.endswith("wide64") and not of_share)


@pytest.mark.parametrize("family", [*FAMILIES, *GATHERED_FAMILIES], ids=lambda family: family.name)
def test_the_merges_of_all_partial_results_are_compiled_ahead_of_time(family: DecodeFamily) -> None:
    prepared = {kernel.source for kernel in all_kernels()}
    merges = set()
    cases = itertools.product(STANDARD_DIMS, DENSE_LAYOUTS, LAYOUTS.values(), (1, 4, 5, 8, 16, 17, 128), (1, 64))
    for (latent_dim, rope_dim), dtype, layout, heads, page_size in cases:
        call = problem(8, 1024, heads, latent_dim=latent_dim, rope_dim=rope_dim, dtype=dtype)
        for of_share, compute in itertools.product((False, True), COMPUTES):
            keys = replace(call.keys, page_size=page_size, cp_share=of_share)
            dense = replace(call, layout=layout, keys=keys, compute=compute)
            sparse = SparseProblem(call.queries, GatheredKeys(2048, page_size, None, cp_share=of_share), layout)
            if family in FAMILIES and family.why_unsupported(dense) is None:
                merges.add(combine_source(family.configure(dense, heads)))
            if family in GATHERED_FAMILIES and family.why_unsupported(sparse) is None:
                merges.add(gathered_combine_source(gathered_config(family, sparse, planned=True)))
    assert merges
    assert merges <= prepared


def test_the_length_that_is_promised_counts() -> None:
    wide_table = problem(1, 131072, 128)
    assert name(choose_config(wide_table, NUM_SMS, max_seqlen_k=1024)) == "narrow16"
    assert choose_config(wide_table, NUM_SMS, max_seqlen_k=10**9) == choose_config(wide_table, NUM_SMS)


@pytest.mark.parametrize(("heads", "expected"), [(16, "narrow16"), (32, "narrow32"), (128, "wide64")])
def test_with_a_fixed_split_only_the_rows_decide(heads: int, expected: str) -> None:
    chosen = {
        name(choose_config(problem(batch, tokens, heads), NUM_SMS, limit, fixed_split_tokens=256))
        for batch in (1, 3, 200)
        for tokens in (64, 4096, 131072)
        for limit in (None, 640)
    }
    assert chosen == {expected}


def test_ragged_queries_go_by_the_longest_unless_it_is_an_exception() -> None:
    """16 heads, two tokens on average: 32 rows; with three at most, 48 rows are better served in one block."""
    usual = problem(128, 8192, 16, ragged=True, total_q=256, seqlen_q=3)
    assert name(choose_config(usual, NUM_SMS)) == "wide64"
    unknown = problem(128, 8192, 16, ragged=True, total_q=256, seqlen_q=256)
    assert name(choose_config(unknown, NUM_SMS)) == "narrow32"


def test_a_mask_is_compiled_in_only_where_it_can_hide_anything() -> None:
    assert not choose_config(problem(4, 640, 16, causal=True), NUM_SMS).causal
    assert choose_config(problem(4, 640, 16, causal=True, seqlen_q=2, total_q=8), NUM_SMS).causal


@pytest.mark.parametrize("batch", [0, 1, 65536])
@pytest.mark.parametrize("num_sms", [1, 78, 132])
def test_every_problem_gets_a_kernel(batch: int, num_sms: int) -> None:
    for heads in (1, 8, 12, 96, 128, 1000):
        choose_config(problem(batch, 64, heads), num_sms)


@pytest.mark.parametrize(("heads", "expected"), [(8, "narrow16"), (24, "narrow32"), (128, "wide64")])
def test_with_a_fixed_split_the_other_requests_of_a_ragged_batch_do_not_decide(heads: int, expected: str) -> None:
    chosen = {
        name(
            choose_config(problem(batch, 4096, heads, ragged=True, total_q=total, seqlen_q=longest), NUM_SMS, None, 256)
        )
        for batch, total, longest in ((1, 1, 1), (4, 7, 4), (4, 64, 61), (200, 400, 2))
    }
    assert chosen == {expected}


@pytest.mark.parametrize("split", [None, 256])
@pytest.mark.parametrize("heads", [4, 16, 128])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_kernel_that_is_asked_for_is_chosen(family: DecodeFamily, heads: int, split: int | None) -> None:
    call = problem(4, 8192, heads)
    if isinstance(family, Fp8Family):
        call = fp8(call, "fp8" if family.compute == "fp8" else "auto")
    if isinstance(family, RowPagesFamily):
        call = replace(call, layout=FP8_DS_MLA)
    elif family.gathers:
        call = replace(call, keys=PagedKeys(1, 8192))
    config = choose_config(call, NUM_SMS, None, split, kernel=family.name)
    assert config == family.configure(call, heads)
    assert config.float_partials == (family.rows == 16 and heads == 4)
    assert choose_config(call, NUM_SMS, None, split) in [
        choose_config(call, NUM_SMS, None, split, kernel=other.name)
        for other in FAMILIES
        if other.why_unsupported(call) is None
    ]


@pytest.mark.parametrize("split", [None, 256])
@pytest.mark.parametrize("heads", [4, 16, 128])
@pytest.mark.parametrize(("batch", "seqlen_q"), [(1, 1), (128, 1), (8, 3)])
def test_pages_of_one_token_are_gathered_where_they_can_be(
    batch: int, seqlen_q: int, heads: int, split: int | None
) -> None:
    call = replace(problem(batch, 2048, heads, seqlen_q=seqlen_q, causal=True), keys=PagedKeys(1, 2048))
    config = choose_config(call, NUM_SMS, None, split)
    assert config.family.gathers
    assert config.causal == (seqlen_q > 1)
    # TMA brings larger pages.
    assert not choose_config(problem(batch, 2048, heads), NUM_SMS, None, split).family.gathers


@pytest.mark.parametrize(
    ("widths", "reason"),
    [((384, 64), "latent widths of (128, 256, 512), not 384"), ((512, 128), "rope widths of (0, 64), not 128")],
)
def test_a_kernel_that_cannot_serve_the_call_is_refused_with_the_reason(widths: tuple[int, int], reason: str) -> None:
    call = problem(4, 640, 128, latent_dim=widths[0], rope_dim=widths[1])
    with pytest.raises(InvalidArgumentError, match=re.escape(reason)) as error:
        choose_config(call, NUM_SMS, kernel="wide64")
    assert error.value.argument == "kernel"
    assert "auto, narrow16, narrow32" in error.value.expected


@pytest.mark.parametrize("kernel", ["wide", "", "narrow64"])
def test_an_unknown_kernel_is_refused_with_the_names_that_there_are(kernel: str) -> None:
    with pytest.raises(InvalidArgumentError, match="auto, narrow16, narrow32, wide64") as error:
        choose_config(problem(4, 640, 128), NUM_SMS, kernel=kernel)
    assert error.value.argument == "kernel"


@pytest.mark.parametrize("changes", [{"dtype": "float32"}, {"rope_dim": 96}, {"latent_dim": 576}, {"rope_dim": 1088}])
def test_a_call_that_no_kernel_serves_is_refused_with_every_reason(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        choose_config(problem(4, 640, 128, **changes), NUM_SMS)
    assert all(f"{family.name} takes" in error.value.got for family in FAMILIES)


@pytest.mark.parametrize("layout", [LAYOUTS[name] for name in list(LAYOUTS)[2:]], ids=lambda layout: layout.name)
def test_the_kernels_of_dense_caches_read_no_other_layout(layout: CacheLayout) -> None:
    dense = problem(4, 640, 128)
    for family in (NARROW16, NARROW32, WIDE64):
        assert family.why_unsupported(dense) is None
        reason = family.why_unsupported(replace(dense, layout=layout))
        assert reason == f"takes a cache in the layout bf16 or fp16, not {layout.name}"
        mixed = family.why_unsupported(replace(dense, layout=FP16))
        assert mixed == "takes queries of float16 for the layout fp16, not bfloat16"


@pytest.mark.parametrize("split", [None, 256])
@pytest.mark.parametrize(
    ("compute", "kernel"), [("auto", "fp8_split"), ("split", "fp8_split"), ("exact", "fp8_exact"), ("fp8", "fp8_query")]
)
@pytest.mark.parametrize(("heads", "rows"), [(1, 16), (16, 16), (32, 32), (64, 64), (128, 64)])
def test_fp8_caches_go_to_the_kernel_that_computes_as_asked(
    heads: int, rows: int, compute: str, kernel: str, split: int | None
) -> None:
    config = choose_config(fp8(problem(132, 8192, heads), compute), NUM_SMS, None, split)
    if compute == "exact" and rows == 16 and split is None:
        kernel = "fp8_turns"  # as long items have time for
    assert name(config) == f"{kernel}{rows}"


@pytest.mark.parametrize(("tokens", "kernel"), [(256, "fp8_exact16"), (8192, "fp8_turns16")])
def test_scores_are_made_in_turns_where_items_are_long(tokens: int, kernel: str) -> None:
    case = fp8(problem(132, tokens, 16), "exact")
    assert name(choose_config(case, NUM_SMS)) == kernel
    assert name(choose_config(case, NUM_SMS, None, tokens)) == kernel


@pytest.mark.parametrize(
    ("changes", "keys", "reason"),
    [
        ({"latent_dim": 128}, PagedKeys(64, 10), "latent widths of (256, 512), not 128"),
        ({"rope_dim": 128}, PagedKeys(64, 10), "rope widths of (0, 64), not 128"),
        ({}, PagedKeys(1, 640), "page sizes that are multiples of 8, not 1"),
    ],
)
def test_the_fp8_kernel_says_what_it_is_not_made_for(changes: dict[str, Any], keys: PagedKeys, reason: str) -> None:
    call = replace(fp8(problem(4, 640, 16, **changes)), keys=keys)
    with pytest.raises(InvalidArgumentError, match=re.escape(reason)):
        choose_config(call, NUM_SMS)
    assert FP8_SPLIT16.why_unsupported(fp8(problem(4, 640, 16))) is None


@pytest.mark.parametrize("family", [NARROW16, NARROW32], ids=lambda family: family.name)
def test_the_narrow_kernel_serves_every_width_that_calls_may_have(family: DecodeFamily) -> None:
    for latent_dim in range(CUDA_WIDTH_MULTIPLE, CUDA_MAX_LATENT + 1, CUDA_WIDTH_MULTIPLE):
        for rope_dim in range(0, CUDA_MAX_WIDTH - latent_dim + 1, CUDA_WIDTH_MULTIPLE):
            call = problem(4, 640, 16, latent_dim=latent_dim, rope_dim=rope_dim)
            assert family.why_unsupported(call) is None
            assert family.configure(call, 16).shared_memory <= hopper.MAX_SHARED_BYTES


@pytest.mark.parametrize("config", standard_configs(), ids=lambda config: config.name)
def test_a_cta_fits_an_sm(config: KernelConfig) -> None:
    assert config.shared_memory <= hopper.MAX_SHARED_BYTES
    assert config.registers <= hopper.SM_REGISTERS
    assert config.threads % hopper.WARP_THREADS == 0
    assert all(role.registers % hopper.REGISTER_UNIT == 0 for role in config.family.roles(config))


@pytest.mark.parametrize(
    ("family", "batch", "tokens", "heads", "expected"),
    [
        (NARROW16, 1, 4096, 128, (132, 256)),
        (FP8_EXACT16, 1, 4096, 128, (132, 128)),
        (FP8_EXACT16, 8, 256, 64, (132, 256)),  # of more rows
        (FP8_EXACT16, 1, 16384, 16, (132, 256)),  # in more pieces
        (FP8_EXACT16, 1, 1024, 128, (132, 256)),  # of a tile each
        (FP8_TURNS16, 1, 4096, 128, (132, 256)),
        (FP8_SPLIT64, 1, 4096, 128, (132, 640)),
        (FP8_EXACT64, 1, 4096, 128, (132, 640)),
        (WIDE64, 1, 4096, 128, (132, 640)),
    ],
)
def test_few_rows_in_few_pieces_have_a_merge_of_fewer_warps(
    family: DecodeFamily, batch: int, tokens: int, heads: int, expected: tuple[int, int]
) -> None:
    case = replace(problem(batch, tokens, heads), layout=FP8_E4M3 if isinstance(family, Fp8Family) else BF16)
    shape = schedule_shape(case, family.configure(case, heads), NUM_SMS)
    geometry = combine_geometry(family, shape, NUM_SMS)
    assert (geometry.grid[0], geometry.block[0]) == expected


def test_with_a_fixed_split_its_pieces_count() -> None:
    case = replace(problem(1, 16384, 16), layout=FP8_E4M3)
    shapes = [schedule_shape(case, FP8_EXACT16.configure(case, 16), NUM_SMS, None, split) for split in (64, 256)]
    assert [shape.pieces_of_job for shape in shapes] == [256, 64]
    assert [combine_geometry(FP8_EXACT16, shape, NUM_SMS).block[0] for shape in shapes] == [256, 128]


@pytest.mark.parametrize(
    "config",
    [
        config
        for config in standard_configs()
        if isinstance(config.family, Fp8Family) and config.family.rows == 16 and config.family.scores_warpgroups == 1
    ],
    ids=lambda config: config.name,
)
def test_a_merge_of_few_rows_fits_beside_16_rows_of_an_e4m3_cache(config: KernelConfig) -> None:
    _, threads = config.family.combine_shape(NUM_SMS, rows=16, pieces=16, tiles=2)
    assert config.registers + threads * COMBINE_REGISTERS <= hopper.SM_REGISTERS
    assert config.shared_memory + hopper.CTA_SHARED_BYTES <= hopper.MAX_SHARED_BYTES


def test_the_wide_kernel_s_roles_have_the_registers_that_the_kernel_gives_them() -> None:
    text = "".join(path.read_text() for path in (kernels_root() / WIDE64.entry).parent.iterdir())
    for role in WIDE64.roles(standard_configs()[-1]):
        [registers] = re.findall(rf"\bk{role.name.capitalize()}Registers = (\d+);", text)
        assert int(registers) == role.registers


def test_the_roles_of_prefill_without_a_rope_part_have_the_registers_that_the_kernel_gives_them() -> None:
    text = (kernels_root() / "decode/gathered/prefill_schedule.h").read_text()
    configs = [c for c in GATHERED_WIDE64.standard_configs() if c.rope_dim == 0 and c.name.endswith("_static")]
    assert configs
    assert all(c.source().entry == "decode/gathered/prefill.cu" for c in configs)
    wide, narrow = (GATHERED_WIDE64.roles(replace(configs[0], latent_dim=width)) for width in (512, 256))
    for of_wide, of_narrow in zip(wide, narrow, strict=True):
        name = rf"\bk{of_wide.name.capitalize()}Registers"
        [registers] = re.findall(name + r" = (?:kLatent > 256 \? (\d+) : )?(\d+);", text)
        assert of_narrow.registers == int(registers[1])
        assert of_wide.registers == int(registers[0] or registers[1])


def test_the_roles_of_gathered_rows_have_the_registers_that_the_kernel_gives_them() -> None:
    text = (kernels_root() / "decode/gathered/narrow_schedule.h").read_text()

    def numbers_of(name: str) -> tuple[str, ...]:
        choices = r"kTakesTurns \? (\d+) : kRowsAlongM \? (\d+) : kRows == 16 \? (\d+) : (\d+);"
        [numbers] = re.findall(rf"\bk{name}Registers = {choices}", text)
        return numbers

    kinds = tuple(itertools.product((GATHERED_NARROW16, GATHERED_NARROW32), ("static", "planned")))
    for (family, schedule), index in zip(kinds, (0, 2, 1, 3), strict=True):
        name = f"{family.name}_bfloat16_512+64_page1_{schedule}"
        [config] = [config for config in family.standard_configs() if config.name == name]
        roles = family.roles(config)
        for role in roles:
            assert role.registers == int(numbers_of(role.name.capitalize())[index])
        held = sum(role.registers * role.threads for role in roles)
        assert held == int(numbers_of("Entry")[index]) * config.threads


@pytest.mark.parametrize(
    ("latent_dim", "rope_dim", "planned", "refined", "entry"),
    [
        (512, 64, False, False, "row_prefill"),
        (64, 0, False, False, "row_prefill"),
        (512, 128, False, False, "narrow"),  # ten boxes of Q are too many for registers
        (512, 64, False, True, "narrow"),
        (512, 64, True, False, "narrow"),
    ],
)
def test_prefill_of_32_rows_has_q_in_registers_where_it_fits(
    latent_dim: int, rope_dim: int, planned: bool, refined: bool, entry: str
) -> None:
    config = GatheredConfig(
        *(GATHERED_NARROW32, latent_dim, rope_dim, "bfloat16", 1), causal=False, planned=planned, refined=refined
    )
    assert config.source().entry == f"decode/gathered/{entry}.cu"
    assert config.shared_memory <= hopper.MAX_SHARED_BYTES


@pytest.mark.parametrize("family", [GATHERED_NARROW16, GATHERED_NARROW32], ids=lambda family: family.name)
def test_the_narrow_kernel_of_gathered_tokens_says_which_widths_it_serves(family: DecodeFamily) -> None:
    for latent_dim, rope_dim in ((512, 64), (512, 0), (64, 0), (320, 64)):
        assert family.why_unsupported(problem(4, 640, 16, latent_dim=latent_dim, rope_dim=rope_dim)) is None
    for latent_dim, rope_dim, reason in ((576, 0, "up to 512"), (500, 64, "multiples of 64"), (512, 1536, "no room")):
        why = family.why_unsupported(problem(4, 640, 16, latent_dim=latent_dim, rope_dim=rope_dim))
        assert why is not None
        assert reason in why
