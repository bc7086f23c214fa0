"""Sparse decode over two caches on the GPU: every kernel against float64 on the (dequantised) caches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from cases_dense import frobenius_error
from cases_extra import ExtraArrays, ExtraCase, of_plan
from cases_sparse import SparseCase
from cases_sparse_fp8 import NAN_BYTE, Fp8SparseCase

from cupy_mla import flash_mla, mla_sparse_decode, plan_sparse_decode
from cupy_mla.kernels.choose import GATHERED_FAMILIES
from cupy_mla.layouts import SPARSE_LAYOUTS

from . import gpu_arrays as gpu

MAX_ERROR = {"bfloat16": 3e-3, "float16": 1e-3}
LSE_TOLERANCE = 1e-5  # of 16-bit caches
RUNS = 5
KERNELS = tuple(family.name for family in GATHERED_FAMILIES)
DENSE = SparseCase(batch=5, seqlen_q=2, rope_dim=0, num_pages=40, page_size=64, topk=300)
FP8 = Fp8SparseCase(batch=5, seqlen_q=2, num_pages=40, page_size=64, topk=300)
MODEL1 = replace(FP8, layout="fp8_model1", rope_dim=0)
PAGE_SIZES = [(64, 64), (256, 2), (1, 61), (69, 1), (576, 64)]
CODED = {layout.name: layout for layout in SPARSE_LAYOUTS if layout.codec}
PAIRS = [
    (name, other)
    for name, layout in CODED.items()
    for other in CODED
    if layout.supports(512, 0) and layout.mixes_with(CODED[other])
]

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("kernel")]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every test runs on each of the kernels that serve its caches."""

    yield from gpu.on_gathered_kernel(request.param, monkeypatch)


@pytest.fixture(params=[DENSE, FP8, MODEL1], ids=["16 bits", "fp8", "fp8, scales at the page's end"])
def main(request: pytest.FixtureRequest) -> SparseCase:
    return request.param


@lru_cache(maxsize=32)  # for each of the kernels
def build(case: ExtraCase) -> tuple[ExtraArrays, tuple[np.ndarray, ...]]:
    arrays = case.build()
    return arrays, arrays.exact()


def check(case: ExtraCase, exact: tuple[np.ndarray, ...], out: Any, lse: Any) -> None:
    gpu.synchronize()
    out, lse = gpu.download(out), gpu.download(lse).swapaxes(1, 2)
    exact_out, _, exact_lse = exact
    assert np.isfinite(out).all(), f"{np.count_nonzero(~np.isfinite(out))} values are not finite"
    for place in np.ndindex(out.shape[:2]):
        error = frobenius_error(out[place], exact_out[place])
        assert error < MAX_ERROR[case.main.dtype], f"query token {place}: relative error {error:.2e}"
    unseen = np.isneginf(exact_lse)
    assert (out[unseen] == 0).all()
    np.testing.assert_array_equal(np.isneginf(lse), unseen)
    tolerance = case.main.lse_tolerance if isinstance(case.main, Fp8SparseCase) else LSE_TOLERANCE
    np.testing.assert_allclose(lse, exact_lse, rtol=tolerance, atol=tolerance)


def outputs(case: SparseCase) -> dict[str, Any]:
    """NaN everywhere."""
    out = gpu.empty((case.batch, case.seqlen_q, case.num_heads_q, case.latent_dim), case.dtype)
    return {"out": out, "lse": gpu.empty((case.batch, case.num_heads_q, case.seqlen_q), "float32")}


def on_gpu(case: ExtraCase) -> dict[str, Any]:
    return {**build(case)[0].arguments(gpu.upload, gpu.as_e4m3), **outputs(case.main)}


def run(case: ExtraCase, **options: Any) -> None:
    check(case, build(case)[1], *mla_sparse_decode(**{**on_gpu(case), **options}))


@pytest.mark.parametrize("heads", [1, 16, 40, 64, 128])
def test_heads(main: SparseCase, heads: int) -> None:
    run(ExtraCase.of(replace(main, num_heads_q=heads), page_size=16))


@pytest.mark.parametrize(
    ("topk", "extra_topk"), [(0, 70), (70, 0), (0, 0), (1, 1), (64, 64), (128, 1024), (63, 65), (2048, 130)]
)
@pytest.mark.parametrize("heads", [16, 64])
def test_topk(main: SparseCase, heads: int, topk: int, extra_topk: int) -> None:
    run(ExtraCase.of(replace(main, num_heads_q=heads, topk=topk, sinks=True), topk=extra_topk))


@pytest.mark.parametrize("lengths", [(None, "token"), ("request", None), ("token", "request"), ("request", "token")])
@pytest.mark.parametrize("heads", [8, 128])
def test_lengths(main: SparseCase, heads: int, lengths: tuple[str | None, str | None]) -> None:
    case = replace(main, num_heads_q=heads, batch=40, sinks=True, lengths=lengths[0])
    run(ExtraCase.of(case, topk=500, lengths=lengths[1]))


@pytest.mark.parametrize("page_sizes", PAGE_SIZES)
@pytest.mark.parametrize("main", [DENSE, FP8], ids=["16 bits", "fp8"])
@pytest.mark.parametrize("gap", [0, 1], ids=["contiguous", "gaps between pages"])
def test_page_sizes(main: SparseCase, page_sizes: tuple[int, int], gap: int) -> None:
    first, second = ({"page_size": size, "num_pages": max(1200 // size, 1)} for size in page_sizes)
    case = ExtraCase.of(replace(main, **first), **second)
    given = on_gpu(case)
    for name in ("kv_cache", "extra_kv_cache"):
        cache = given[name]
        shape = (cache.shape[0], cache.shape[1] + gap, *cache.shape[2:])
        larger = gpu.empty(shape, case.main.dtype) if main is DENSE else gpu.upload(np.full(shape, NAN_BYTE, np.uint8))
        gpu.assign(larger[:, gap:], cache)
        given[name] = larger[:, gap:]
    check(case, build(case)[1], *mla_sparse_decode(**given))


@pytest.mark.parametrize("page_sizes", PAGE_SIZES)
@pytest.mark.parametrize("heads", [16, 64])
def test_pages_that_end_with_scales(heads: int, page_sizes: tuple[int, int]) -> None:
    first, second = ({"page_size": size, "num_pages": max(1200 // size, 1)} for size in page_sizes)
    run(ExtraCase.of(replace(MODEL1, num_heads_q=heads, **first), **second))


@pytest.mark.parametrize("invalid", [(0.0, 0.0), (1.0, 0.3), (0.3, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("heads", [16, 64])
def test_indices_that_name_no_token(main: SparseCase, heads: int, invalid: tuple[float, float]) -> None:
    run(ExtraCase.of(replace(main, num_heads_q=heads, invalid=invalid[0], sinks=True), invalid=invalid[1]))


@pytest.mark.parametrize("batch", [1, 16, 128])
@pytest.mark.parametrize("heads", [16, 128])
def test_batches(main: SparseCase, heads: int, batch: int) -> None:
    case = replace(main, num_heads_q=heads, batch=batch, topk=128, sinks=True)
    run(ExtraCase.of(case, page_size=2, num_pages=700, topk=512, lengths="request"))


@pytest.mark.parametrize(("layout", "other"), PAIRS)
@pytest.mark.parametrize("heads", [16, 64])
def test_layouts(heads: int, layout: str, other: str) -> None:
    rope = 0 if CODED[layout].supports(512, 0) else 64
    case = replace(FP8, layout=layout, rope_dim=rope, num_heads_q=heads, kind="mixed", sinks=True, lengths="request")
    run(ExtraCase.of(case, layout=other, page_size=16, topk=200))


def test_warps_that_are_in_tiles_of_two_layouts() -> None:
    """A tile of each cache in turn, many times: some warp of a CTA is a tile ahead of another at times."""
    main = replace(FP8, layout="fp8_v41", rope_dim=0, num_heads_q=64, batch=300, topk=64, num_pages=300)
    case = ExtraCase.of(main, layout="fp4_v41", topk=64)
    given = on_gpu(case)
    first = [gpu.bits_of(result) for result in mla_sparse_decode(**given)]
    check(case, build(case)[1], given["out"], given["lse"])
    for _ in range(4 * RUNS):
        for result, bits in zip(mla_sparse_decode(**given), first, strict=True):
            np.testing.assert_array_equal(gpu.bits_of(result), bits)


@pytest.mark.parametrize(("latent_dim", "rope_dim"), [(512, 64), (256, 64), (320, 128)])
def test_widths(latent_dim: int, rope_dim: int) -> None:
    run(ExtraCase.of(replace(DENSE, latent_dim=latent_dim, rope_dim=rope_dim, dtype="float16", lengths="request")))


@pytest.mark.parametrize("heads", [16, 128])
def test_kv_heads(heads: int) -> None:
    case = replace(DENSE, num_heads_q=heads, num_heads_kv=2, num_pages=10, lengths="token", sinks=True)
    run(ExtraCase.of(case, page_size=16, lengths="request"))


@pytest.mark.parametrize("heads", [8, 64])
def test_graph_replayed_after_both_lengths_changed(main: SparseCase, heads: int) -> None:
    case = ExtraCase.of(
        replace(main, num_heads_q=heads, lengths="request", sinks=True, invalid=0.0), lengths="token", topk=500
    )
    arrays, _ = build(case)
    full = replace(arrays, **{part: without_lengths(getattr(arrays, part)) for part in ("main", "extra")})
    given = on_gpu(case)
    plan = plan_sparse_decode(**of_plan({name: value for name, value in given.items() if name not in ("out", "lse")}))
    names = "topk_length", "extra_topk_length"

    def step() -> None:
        plan.update(*(given[name] for name in names))
        mla_sparse_decode(**given, plan=plan)

    replay = gpu.capture(step)
    rng = np.random.default_rng(7)
    for share in (1.0, 0.5, 0.0):
        now = {}
        for name, part in zip(names, (arrays.main, arrays.extra), strict=True):
            lengths = exact_of(part).lengths
            assert lengths is not None
            # No more than before: tokens past those are NaN.
            now[name] = (lengths * share * rng.random(lengths.shape)).astype(np.int32)
            gpu.assign(given[name], gpu.upload(now[name]))
        replay()
        changed = {
            part: with_lengths(getattr(full, part), now[name])
            for name, part in zip(names, ("main", "extra"), strict=True)
        }
        check(case, replace(full, **changed).exact(), given["out"], given["lse"])


def exact_of(part: Any) -> Any:
    return getattr(part, "exact", part)


def with_lengths(part: Any, lengths: np.ndarray | None) -> Any:
    """The same arrays with other lengths."""
    if hasattr(part, "exact"):
        return replace(part, exact=replace(part.exact, lengths=lengths))
    return replace(part, lengths=lengths)


def without_lengths(part: Any) -> Any:
    return with_lengths(part, None)


@pytest.mark.parametrize("heads", [8, 64])
def test_results_are_the_same_every_time(main: SparseCase, heads: int) -> None:
    case = ExtraCase.of(replace(main, num_heads_q=heads, batch=3, lengths="request", sinks=True), topk=1500)
    given = on_gpu(case)
    first = [gpu.bits_of(result) for result in mla_sparse_decode(**given)]
    for _ in range(RUNS):
        for result, bits in zip(mla_sparse_decode(**given), first, strict=True):
            np.testing.assert_array_equal(gpu.bits_of(result), bits)


@pytest.mark.parametrize("heads", [8, 64])
def test_a_fixed_split_makes_results_batch_invariant(main: SparseCase, heads: int) -> None:
    case = ExtraCase.of(replace(main, num_heads_q=heads, lengths="request"), topk=640, lengths="request")
    given = {name: value for name, value in on_gpu(case).items() if name not in ("out", "lse")}
    of_batch = ("q", "indices", "topk_length", "extra_indices", "extra_topk_length")

    def results(requests: slice) -> list[np.ndarray]:
        part = {name: value[requests] if name in of_batch else value for name, value in given.items()}
        plan = plan_sparse_decode(**of_plan(part), fixed_split_tokens=128)
        return [gpu.bits_of(result) for result in mla_sparse_decode(**part, plan=plan)]

    for alone, together in zip(results(slice(4, 5)), results(slice(0, 5)), strict=True):
        np.testing.assert_array_equal(alone[0], together[4])


def test_flash_mla(main: SparseCase) -> None:
    case = ExtraCase.of(replace(main, lengths="request", sinks=True), page_size=2, num_pages=90, lengths="request")
    given, exact = on_gpu(case), build(case)[1]
    meta, _ = flash_mla.get_mla_metadata()
    width = case.main.latent_dim + case.main.rope_dim
    for _ in range(2):
        out, lse = flash_mla.flash_mla_with_kvcache(
            given["q"], given["kv_cache"], None, None, 512, meta, None, width**-0.5, False, main is not DENSE,
            given["indices"], given["attn_sink"], given["extra_kv_cache"], given["extra_indices"],
            given["topk_length"], given["extra_topk_length"],
        )  # fmt: skip
        lse = gpu.download(lse)
        unseen = np.isneginf(exact[2].swapaxes(1, 2))
        assert (lse[unseen] == np.inf).all()
        lse[unseen] = -np.inf
        check(case, exact, out, gpu.upload(lse))
