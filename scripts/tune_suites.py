"""The suites of `tune.py`: which cases each of them times, and what it adds to the table of its results."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cupy_mla.bench.columns import NOTHING, Column, number
from cupy_mla.bench.grid import BenchCase, expand_grid
from cupy_mla.bench.results import Results
from cupy_mla.bench.rows import Row

DENSE_TARGETS = Path(__file__).with_name("dense_targets.csv")
# Cases of other suites by their BenchCase fields, the best peer's time when the target was set and what to reach.
TIME_TARGETS = {name: Path(__file__).with_name(f"{name}_targets.csv") for name in ("fp8", "sparse", "prefill")}
MAIN_PEER = "flash_mla"

SUSTAINED_TARGETS = {(128, 16384, 128, 1): 1.12, (128, 8192, 64, 1): 1.12, (128, 8192, 16, 1): 1.06}

TRACE_BATCH, TRACE_DRAWS, TRACE_HEADS = 128, 5, (16, 128)
TRACE_SHARE, TRACE_RATIO = 0.97, 1.1

PARITY_BASES = ((128, 8192, 16), (128, 8192, 128), (16, 4096, 128))  # HBM-bound, compute-bound, between
FP16_LIMIT, VARIANT_LIMIT = 1.02, 1.05
HEADS_LIMIT = 1.01  # "no slower": repeated runs of one case differ by 1%
PADDED_HEADS = {8: 16, 12: 16, 96: 128}  # slower than the next full count they must not be
PARITY_HEADS_BASES = ((128, 8192), (16, 4096))

# An e4m3 cache: faster than a bf16 one from so many tokens an SM on, with so many heads at most.
FP8_LAYOUT = "fp8_e4m3"
FP8_HEADS = (8, 16, 32, 64, 128)
FASTER_TOKENS, H200_SMS, FASTER_HEADS, FASTER_LIMIT = 64, 132, 64, 1.0

SCALING_BATCHES, SCALING_HEADS = (1, 8, 64), (16, 128)
SCALING_LENGTHS = (*(64 << step for step in range(11)), 1 << 18, 1 << 20)
SCALING_CACHE_BYTES = 60_000_000_000  # larger caches do not fit beside a peer's copies

Groups = list[BenchCase | Sequence[BenchCase]]
Key = tuple[int, int, int, int]  # batch, length, heads, seqlen_q


@dataclass(frozen=True)
class Suite:
    """Cases (groups of them are timed in turn), the peers that matter, and columns that judge the results."""

    title: str
    groups: Callable[[], Groups]
    columns: Callable[[Results], list[Column]]
    peers: tuple[str, ...] | None = None  # None: all that were asked for
    sustained: bool = False


def met(value: float | None, wanted: float, *, at_most: bool = False) -> str:
    if value is None:
        return NOTHING
    return "yes" if (value <= wanted if at_most else value >= wanted) else "NO"


def key_of(case: BenchCase) -> Key:
    return case.batch, int(case.kv_lengths.max()), case.num_heads_q, case.seqlen_q


# Ratios to the best peer ----------------------------------------------------------------------------------------------


def read_targets() -> dict[Key, tuple[float, float]]:
    """The best peer's us when the target was set, and the ratio to reach."""
    targets = {}
    with DENSE_TARGETS.open(newline="") as file:
        for line in csv.DictReader(file):
            key = int(line["batch"]), int(line["length"]), int(line["heads"]), int(line["seqlen_q"])
            targets[key] = float(line["best_peer_us"]), float(line["wanted_ratio"])
    return targets


def target_groups() -> Groups:
    return [BenchCase(*key) for key in read_targets()]


def target_columns(results: Results) -> list[Column]:
    targets = read_targets()

    def on_file(row: Row) -> float | None:
        return None if row.ours.us is None else targets[key_of(row.case)][0] / row.ours.us

    def best(row: Row) -> float | None:
        return on_file(row) if row.best_ratio is None else row.best_ratio

    return [
        Column("ratio to figure on file", lambda row: number(on_file(row), 3)),
        Column("fastest peer", lambda row: row.best_peer or "(on file)"),
        Column("ratio to fastest", lambda row: number(best(row), 3)),
        Column("wanted", lambda row: number(targets[key_of(row.case)][1], 2)),
        Column("met", lambda row: met(best(row), targets[key_of(row.case)][1])),
    ]


# Microseconds to reach ------------------------------------------------------------------------------------------------


def read_time_targets(name: str) -> dict[BenchCase, tuple[str, float]]:
    """The peer's us when the target was set, as text as there may be none; and the us to reach."""
    targets = {}
    with TIME_TARGETS[name].open(newline="") as file:
        for line in csv.DictReader(file):
            peer, wanted = line.pop("peer_us"), float(line.pop("wanted_us"))
            words = {field: value for field, value in line.items() if value}
            fields = {field: int(value) if value.isdigit() else value for field, value in words.items()}
            targets[BenchCase(**{**fields, "prefill": name == "prefill"})] = peer, wanted
    return targets


def time_suite(name: str, title: str, peers: tuple[str, ...]) -> Suite:
    def columns(results: Results) -> list[Column]:
        targets = read_time_targets(name)
        return [
            Column("peer's on file", lambda row: targets[row.case][0] or NOTHING),
            Column("wanted us", lambda row: number(targets[row.case][1], 1)),
            Column("met", lambda row: met(row.ours.us, targets[row.case][1], at_most=True)),
        ]

    return Suite(title, lambda: list(read_time_targets(name)), columns, peers)


# Sustained ------------------------------------------------------------------------------------------------------------


def sustained_groups() -> Groups:
    return [BenchCase(*key) for key in SUSTAINED_TARGETS]


def sustained_columns(results: Results) -> list[Column]:
    def wanted(row: Row) -> float:
        return SUSTAINED_TARGETS[key_of(row.case)]

    return [
        Column("wanted", lambda row: number(wanted(row), 2)),
        Column("met", lambda row: met(row.sustained_ratio(MAIN_PEER), wanted(row))),
    ]


# Real lengths ---------------------------------------------------------------------------------------------------------


def trace_groups() -> Groups:
    groups: Groups = []
    for case in expand_grid(batches=[TRACE_BATCH], lengths=[], heads=TRACE_HEADS, traces=TRACE_DRAWS):
        mean = round(float(case.kv_lengths.mean()))
        groups.append((case, replace(case, lengths=mean, name=case.name.replace("trace", "equal"))))
    return groups


def trace_columns(results: Results) -> list[Column]:
    rows = {row.name: row for row in results.rows}

    def throughput(row: Row | None) -> float | None:
        return None if row is None or row.ours.us is None else int(row.case.kv_lengths.sum()) / row.ours.us

    def share(row: Row) -> float | None:
        ours, equal = throughput(row), throughput(rows.get(row.name.replace("trace", "equal")))
        return None if "trace" not in row.name or ours is None or equal is None else ours / equal

    def verdict(row: Row) -> str:
        if "trace" not in row.name:
            return NOTHING
        verdicts = {met(share(row), TRACE_SHARE), met(row.ratio(MAIN_PEER), TRACE_RATIO)}
        return "NO" if "NO" in verdicts else NOTHING if NOTHING in verdicts else "yes"

    return [
        Column("tokens", lambda row: f"{int(row.case.kv_lengths.sum()):,}"),
        Column("share of equal", lambda row: number(share(row), 3)),
        Column("wanted share, ratio", lambda row: f"{TRACE_SHARE}, {TRACE_RATIO}" if "trace" in row.name else NOTHING),
        Column("met", verdict),
    ]


# Variants against the plain case of the same work ---------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A case, the plain one that it is compared with, and how many times as long it may take."""

    case: BenchCase
    plain: BenchCase
    limit: float


def parity_variants() -> list[list[Variant]]:
    """Groups to be timed in turn."""
    groups = []
    for batch, length, heads in PARITY_BASES:
        plain, pairs = BenchCase(batch, length, heads), BenchCase(batch, length, heads, seqlen_q=2)
        variants = [Variant(replace(plain, dtype="float16", name=""), plain, FP16_LIMIT)]
        variants += [Variant(replace(plain, page_size=size, name=""), plain, VARIANT_LIMIT) for size in (16, 32, 128)]
        variants += [
            Variant(replace(plain, storage=storage, name=""), plain, VARIANT_LIMIT) for storage in ("strided", "split")
        ]
        uneven = tuple(1 + 2 * (request % 2) for request in range(batch))  # 1, 3, 1, 3, ...: 2 on average
        variants += [
            Variant(replace(pairs, causal=True, name=""), pairs, VARIANT_LIMIT),
            Variant(replace(pairs, ragged=(2,) * batch, name=""), pairs, VARIANT_LIMIT),
            Variant(replace(pairs, ragged=uneven, name=""), pairs, VARIANT_LIMIT),
        ]
        groups.append(variants)
    for batch, length in PARITY_HEADS_BASES:
        groups.append(
            [
                Variant(BenchCase(batch, length, heads), BenchCase(batch, length, full), HEADS_LIMIT)
                for heads, full in PADDED_HEADS.items()
            ]
        )
    return groups


def fp8_parity_variants() -> list[list[Variant]]:
    """An e4m3 cache beside the 16-bit one of the same tokens: never slower, and faster where its bytes should tell."""

    def limit(case: BenchCase) -> float:
        tokens = int(case.kv_lengths.sum())
        is_faster = case.num_heads_q <= FASTER_HEADS and tokens > FASTER_TOKENS * H200_SMS
        return FASTER_LIMIT if is_faster else VARIANT_LIMIT

    return [
        [Variant(replace(plain, layout=FP8_LAYOUT, name=""), plain, limit(plain))] for plain in scaling_cases(FP8_HEADS)
    ]


def variant_groups(variants: list[list[Variant]]) -> Groups:
    """Each group's plain cases first; a case that several groups need is timed in each of them."""
    return [
        list(dict.fromkeys([*(variant.plain for variant in group), *(variant.case for variant in group)]))
        for group in variants
    ]


def variant_columns(groups: list[list[Variant]], results: Results) -> list[Column]:
    variants = {variant.case: variant for group in groups for variant in group}
    partners: dict[int, tuple[Row, float]] = {}
    latest: dict[BenchCase, Row] = {}  # a plain case may be in several groups, in each ahead of its variants
    for row in results.rows:
        latest[row.case] = row
        variant = variants.get(row.case)
        if variant is not None and variant.plain in latest:
            partners[id(row)] = (latest[variant.plain], variant.limit)

    def part(row: Row) -> float | None:
        found = partners.get(id(row))
        if found is None or row.ours.us is None or found[0].ours.us is None:
            return None
        return row.ours.us / found[0].ours.us

    def of_partner(row: Row, text: Callable[[Row, float], str]) -> str:
        return text(*partners[id(row)]) if id(row) in partners else NOTHING

    return [
        Column("plain", lambda row: of_partner(row, lambda plain, _: plain.name)),
        Column("times plain", lambda row: number(part(row), 3)),
        Column("at most", lambda row: of_partner(row, lambda _, limit: number(limit, 2))),
        Column("met", lambda row: of_partner(row, lambda _, limit: met(part(row), limit, at_most=True))),
    ]


def variant_suite(title: str, variants: Callable[[], list[list[Variant]]]) -> Suite:
    return Suite(title, lambda: variant_groups(variants()), lambda results: variant_columns(variants(), results), ())


# Time against length --------------------------------------------------------------------------------------------------


def scaling_cases(heads_counts: tuple[int, ...]) -> list[BenchCase]:
    return [
        BenchCase(batch, length, heads)
        for heads in heads_counts
        for batch in SCALING_BATCHES
        for length in SCALING_LENGTHS
        if BenchCase(batch, length, heads).cache_bytes <= SCALING_CACHE_BYTES
    ]


SUITES = {
    "targets": Suite("The fastest peer's time over ours", target_groups, target_columns),
    "sustained": Suite(
        "Back to back under the power limit", sustained_groups, sustained_columns, (MAIN_PEER,), sustained=True
    ),
    "traces": Suite("Real lengths beside equal ones", trace_groups, trace_columns, (MAIN_PEER,)),
    "parity": variant_suite("Variants beside the plain case of the same work", parity_variants),
    "fp8_parity": variant_suite("An e4m3 cache beside a bf16 one", fp8_parity_variants),
    "scaling": Suite("Time against length", lambda: list(scaling_cases(SCALING_HEADS)), lambda results: []),
    "fp8": time_suite("fp8", "Dense decode over an e4m3 cache", ("flash_mla", "flashinfer")),
    "sparse": time_suite("sparse", "Sparse decode", ("flash_mla", "fa3")),
    "prefill": time_suite("prefill", "Sparse prefill", ("flash_mla",)),
}
