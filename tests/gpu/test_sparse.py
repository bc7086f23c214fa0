"""Every line of the contract that concerns sparse attention to 16-bit caches, on the GPU, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
from cases_dense import frobenius_error
from cases_sparse import SparseArrays, SparseCase, exact_sparse

from cupy_mla import (
    InvalidArgumentError,
    PlanMismatchError,
    flash_mla,
    mla_decode,
    mla_sparse_decode,
    mla_sparse_prefill,
    plan_sparse_decode,
    slots_of,
)
from cupy_mla.call.options import AUTO
from cupy_mla.decode import gathered
from cupy_mla.kernels.choose import GATHERED_DENSE_FAMILIES
from cupy_mla.kernels.gathered import GATHERED_WIDE64
from cupy_mla.schedule import waves

from . import gpu_arrays as gpu

MAX_ERROR = {"bfloat16": 3e-3, "float16": 1e-3}
FEW_ROWS_ERROR = 2e-3
ROUNDING_OF_OUTPUT = 2e-3  # bfloat16's, 2^-9 at most
EQUAL_WEIGHTS = 1e-20  # a factor on the scores
LSE_TOLERANCE = 1e-5  # relative, and absolute
RUNS = 10
KERNELS = (AUTO, *(family.name for family in GATHERED_DENSE_FAMILIES))
DECODE = SparseCase(batch=5, seqlen_q=2, num_pages=40, page_size=64, topk=300)
PREFILL = SparseCase(batch=150, num_pages=3000, page_size=1, topk=300)  # more query tokens than SMs

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("kernel")]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every test runs on the kernel that is chosen for its case, and on each of the kernels that serve its widths."""

    yield from gpu.on_gathered_kernel(request.param, monkeypatch)


@lru_cache(maxsize=32)  # for each of the kernels
def build(case: SparseCase) -> tuple[SparseArrays, tuple[np.ndarray, ...]]:
    """Arrays of a case, and what they give in float64."""
    arrays = case.build()
    return arrays, exact_sparse(arrays)


class OnGpu:
    """A case with its arrays on the host and on the GPU."""

    def __init__(self, case: SparseCase) -> None:
        self.case = case
        self.host, self.exact = build(case)
        self.q, self.kv, self.indices = map(gpu.upload, (self.host.q, self.host.kv, self.host.indices))
        self.lengths = None if self.host.lengths is None else gpu.upload(self.host.lengths)
        self.sinks = None if self.host.sinks is None else gpu.upload(self.host.sinks)

    @property
    def of_plan(self) -> dict[str, Any]:
        return {
            "q": self.q, "kv_cache": self.kv, "indices": self.indices, "topk_length": self.lengths,
            "head_dim_v": self.case.latent_dim,
        }  # fmt: skip

    @property
    def of_prefill(self) -> dict[str, Any]:
        return {
            "q": self.q[:, 0], "kv": self.kv, "indices": self.indices[:, 0], "attn_sink": self.sinks,
            "topk_length": None if self.lengths is None else self.lengths.reshape(-1),
            "head_dim_v": self.case.latent_dim,
        }  # fmt: skip

    def outputs(self) -> dict[str, Any]:
        """NaN everywhere, of decode."""
        batch, tokens, heads = self.host.q.shape[:3]
        out = gpu.empty((batch, tokens, heads, self.case.latent_dim), self.case.dtype)
        return {"out": out, "lse": gpu.empty((batch, heads, tokens), "float32")}

    def prefill_outputs(self) -> dict[str, Any]:
        tokens, _, heads, _ = self.host.q.shape
        out = gpu.empty((tokens, heads, self.case.latent_dim), self.case.dtype)
        return {"out": out, **{name: gpu.empty((tokens, heads), "float32") for name in ("max_logits", "lse")}}

    def decode(self, **options: Any) -> tuple[Any, Any]:
        outputs = {} if "out" in options else self.outputs()  # none are made where a graph is captured
        return mla_sparse_decode(**{**self.of_plan, "attn_sink": self.sinks, **outputs, **options})

    def prefill(self, **options: Any) -> tuple[Any, Any, Any]:
        outputs = {} if "out" in options else self.prefill_outputs()
        return mla_sparse_prefill(**{**self.of_prefill, **outputs, **options})

    def check_decode(self, out: Any, lse: Any) -> None:
        gpu.synchronize()
        check(self.case, self.exact, gpu.download(out), gpu.download(lse).swapaxes(1, 2))

    def check_prefill(self, out: Any, max_logits: Any, lse: Any) -> None:
        gpu.synchronize()
        check(self.case, self.exact, gpu.download(out)[:, None], gpu.download(lse)[:, None])
        largest, exact = gpu.download(max_logits), self.exact[1][:, 0]
        np.testing.assert_array_equal(np.isneginf(largest), np.isneginf(exact))
        np.testing.assert_allclose(largest, exact, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


def check(case: SparseCase, exact: tuple[np.ndarray, ...], out: np.ndarray, lse: np.ndarray) -> None:
    """out and lse of every query token against float64."""
    exact_out, _, exact_lse = exact
    assert np.isfinite(out).all(), f"{np.count_nonzero(~np.isfinite(out))} values are not finite"
    for place in np.ndindex(out.shape[:2]):
        error = frobenius_error(out[place], exact_out[place])
        assert error < MAX_ERROR[case.dtype], f"query token {place}: relative error {error:.2e}"
    unseen = np.isneginf(exact_lse)
    assert (out[unseen] == 0).all()
    np.testing.assert_array_equal(np.isneginf(lse), unseen)
    np.testing.assert_allclose(lse, exact_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


def run_decode(case: SparseCase, **options: Any) -> None:
    on_gpu = OnGpu(case)
    on_gpu.check_decode(*on_gpu.decode(**options))


def run_prefill(case: SparseCase, **options: Any) -> None:
    on_gpu = OnGpu(case)
    on_gpu.check_prefill(*on_gpu.prefill(**options))


Run = Callable[..., None]
RUNS_AND_CASES = [(run_decode, DECODE), (run_prefill, PREFILL)]
RUN = pytest.mark.parametrize(("run", "base"), RUNS_AND_CASES, ids=["decode", "prefill"])


# Shapes --------------------------------------------------------------------------------------------------------------


@RUN
@pytest.mark.parametrize("heads", [1, 3, 8, 12, 16, 32, 63, 64, 96, 126, 128])
def test_heads(run: Run, base: SparseCase, heads: int) -> None:
    run(replace(base, num_heads_q=heads))


@RUN
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (16, 2), (128, 2), (128, 8)])
def test_kv_heads(run: Run, base: SparseCase, heads: int, kv_heads: int) -> None:
    run(replace(base, num_heads_q=heads, num_heads_kv=kv_heads, num_pages=base.num_pages // 4, lengths="request"))


@RUN
@pytest.mark.parametrize("topk", [0, 1, 63, 64, 65, 127, 129, 640, 2048])
@pytest.mark.parametrize("heads", [16, 128])
def test_topk(run: Run, base: SparseCase, heads: int, topk: int) -> None:
    run(replace(base, num_heads_q=heads, topk=topk, batch=min(base.batch, 20)))


@RUN
@pytest.mark.parametrize(("latent_dim", "rope_dim"), [(512, 0), (256, 64), (128, 64), (64, 64), (320, 128), (512, 512)])
@pytest.mark.parametrize("heads", [16, 128])
def test_widths(run: Run, base: SparseCase, heads: int, latent_dim: int, rope_dim: int) -> None:
    case = replace(base, num_heads_q=heads, latent_dim=latent_dim, rope_dim=rope_dim, batch=min(base.batch, 20))
    run(replace(case, lengths="request", sinks=True))


@RUN
@pytest.mark.parametrize("heads", [16, 128])
def test_fp16(run: Run, base: SparseCase, heads: int) -> None:
    run(replace(base, num_heads_q=heads, dtype="float16", lengths="request", sinks=True))


@RUN
@pytest.mark.parametrize("page_size", [1, 2, 61, 64, 69, 256, 576])
@pytest.mark.parametrize("gap", [0, 1], ids=["contiguous", "gaps between pages"])
def test_page_sizes(run: Run, base: SparseCase, page_size: int, gap: int) -> None:
    case = replace(base, page_size=page_size, num_pages=max(1200 // page_size, 1), batch=min(base.batch, 20))
    on_gpu = OnGpu(case)
    shape = (case.num_pages, page_size + gap, *on_gpu.host.kv.shape[2:])
    larger = gpu.empty(shape, case.dtype)
    pages = larger[:, gap:]
    gpu.assign(pages, on_gpu.kv)
    if run is run_decode:
        on_gpu.check_decode(*on_gpu.decode(kv_cache=pages))
    else:
        on_gpu.check_prefill(*on_gpu.prefill(kv=pages))


@pytest.mark.parametrize("batch", [1, 16, 128])
@pytest.mark.parametrize("heads", [8, 64, 128])
@pytest.mark.parametrize("seqlen_q", [1, 4])
def test_decode_batches(batch: int, heads: int, seqlen_q: int) -> None:
    run_decode(replace(DECODE, batch=batch, num_heads_q=heads, seqlen_q=seqlen_q, lengths="token"))


@pytest.mark.parametrize("tokens", [1, 2, 131, 133, 600])
@pytest.mark.parametrize("heads", [16, 128])
def test_prefill_tokens(tokens: int, heads: int) -> None:
    run_prefill(replace(PREFILL, batch=tokens, num_heads_q=heads, lengths="token", topk=100))


@pytest.mark.parametrize("heads", [8, 16, 32])
def test_prefill_of_many_query_tokens_of_few_tiles(heads: int) -> None:
    """A CTA has several query tokens of none to three tiles each, so whoever has one's first tile and its last varies.
    With this scale the maxima of most rows move."""
    scale = 0.3
    on_gpu = OnGpu(replace(PREFILL, batch=700, num_heads_q=heads, num_pages=500, topk=150, lengths="token", sinks=True))
    on_gpu.exact = exact_sparse(on_gpu.host, scale)
    on_gpu.check_prefill(*on_gpu.prefill(softmax_scale=scale))


@pytest.mark.parametrize("cluster", [3, 8])
@pytest.mark.parametrize("tokens", [3, 133])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "latent_dim", "rope_dim"),
    [(16, 1, 512, 64), (8, 1, 512, 64), (64, 1, 512, 64), (40, 2, 256, 0), (64, 1, 512, 0), (20, 1, 128, 64)],
)
def test_query_tokens_that_clusters_share(
    cluster: int, tokens: int, heads: int, kv_heads: int, latent_dim: int, rope_dim: int, kernel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All of few, and what is over of many; tiles of each from none to eleven."""
    monkeypatch.setattr(waves, "CLUSTERS", (cluster,))
    monkeypatch.setattr(waves, "CTA_TILES", 1)
    monkeypatch.setattr(waves, "MERGE_TILES", 0)
    dealt = []

    def deal_out(*given: Any, **options: Any) -> waves.Waves:
        dealt.append(waves.deal_out(*given, **options))
        return dealt[-1]

    monkeypatch.setattr(gathered, "deal_out", deal_out)
    case = replace(PREFILL, batch=tokens, num_heads_q=heads, num_heads_kv=kv_heads, latent_dim=latent_dim)
    case = replace(case, rope_dim=rope_dim, topk=700, lengths="token", sinks=True)
    on_gpu = OnGpu(case)
    results = on_gpu.prefill()
    on_gpu.check_prefill(*results)
    first = [gpu.bits_of(result) for result in results]
    for _ in range(RUNS):
        for result, bits in zip(on_gpu.prefill(), first, strict=True):
            np.testing.assert_array_equal(gpu.bits_of(result), bits)
    has_no_registers = kernel == GATHERED_WIDE64.name and GATHERED_WIDE64.refines(case.dtype, heads // kv_heads)
    assert [made.cluster for made in dealt] == [1 if has_no_registers else cluster]


@pytest.mark.parametrize("tokens", [1, 131, 300])
@pytest.mark.parametrize(("heads", "kv_heads"), [(40, 1), (64, 1), (128, 1), (128, 2)])
@pytest.mark.parametrize("latent_dim", [128, 256, 512])
def test_prefill_without_a_rope_part(tokens: int, heads: int, kv_heads: int, latent_dim: int) -> None:
    case = replace(PREFILL, batch=tokens, num_heads_q=heads, num_heads_kv=kv_heads, latent_dim=latent_dim, rope_dim=0)
    run_prefill(replace(case, lengths="token", sinks=True, invalid=0.1, topk=200))


def test_no_query_tokens() -> None:
    on_gpu = OnGpu(replace(PREFILL, batch=1))
    given = {**on_gpu.of_prefill, "q": on_gpu.q[:0, 0], "indices": on_gpu.indices[:0, 0]}
    out, max_logits, lse = mla_sparse_prefill(**given)
    assert tuple(out.shape) == (0, 16, 512)
    assert tuple(max_logits.shape) == tuple(lse.shape) == (0, 16)


# Values --------------------------------------------------------------------------------------------------------------


@RUN
@pytest.mark.parametrize("lengths", ["request", "token"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("heads", [8, 128])
def test_lengths_and_sinks(run: Run, base: SparseCase, heads: int, sinks: bool, lengths: str) -> None:
    run(replace(base, num_heads_q=heads, lengths=lengths, sinks=sinks))


@RUN
@pytest.mark.parametrize("invalid", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("heads", [16, 128])
def test_indices_that_name_no_token(run: Run, base: SparseCase, heads: int, invalid: float) -> None:
    run(replace(base, num_heads_q=heads, invalid=invalid, sinks=True))


@RUN
def test_every_token_many_times(run: Run, base: SparseCase) -> None:
    run(replace(base, num_pages=1, page_size=3, topk=500))


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("empty_lse", [-math.inf, math.inf])
def test_empty_lse(heads: int, empty_lse: float) -> None:
    on_gpu = OnGpu(replace(DECODE, num_heads_q=heads, lengths="request"))
    out, lse = on_gpu.decode(empty_lse=empty_lse)
    gpu.synchronize()
    assert (gpu.download(out)[0] == 0).all()
    assert (gpu.download(lse)[0] == empty_lse).all()
    on_gpu = OnGpu(replace(PREFILL, num_heads_q=heads, lengths="request"))
    _, max_logits, lse = on_gpu.prefill(empty_lse=empty_lse)
    gpu.synchronize()
    assert (gpu.download(max_logits)[0] == -math.inf).all()
    assert (gpu.download(lse)[0] == empty_lse).all()


@pytest.mark.parametrize("heads", [5, 47, 128])
@RUN
def test_tokens_that_weigh_the_same(
    run: Run, base: SparseCase, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What their weights lose by rounding is the same of all, and would not average out; here nothing is lost."""
    monkeypatch.setitem(MAX_ERROR, "bfloat16", ROUNDING_OF_OUTPUT)
    check_scaled(run, replace(base, num_heads_q=heads, topk=43, lengths=None), EQUAL_WEIGHTS)


@pytest.mark.parametrize("scale", [1e-3, 0.5])
@RUN
def test_softmax_scale(run: Run, base: SparseCase, scale: float) -> None:
    check_scaled(run, base, scale)


def check_scaled(run: Run, case: SparseCase, scale: float) -> None:
    on_gpu = OnGpu(case)
    on_gpu.exact = exact_sparse(on_gpu.host, scale)
    if run is run_decode:
        on_gpu.check_decode(*on_gpu.decode(softmax_scale=scale))
    else:
        on_gpu.check_prefill(*on_gpu.prefill(softmax_scale=scale))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1), (8, 1), (8, 4), (13, 1), (16, 1)])
def test_few_rows_that_see_few_keys(
    kernel: str, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One key may have most of a row's weight, and what bf16 makes of that weight does not show. The rounding of the
    output alone gives 1.7e-3."""
    gpu.skip_where_not_refined(kernel, heads // kv_heads)
    monkeypatch.setitem(MAX_ERROR, "bfloat16", FEW_ROWS_ERROR)
    case = replace(DECODE, batch=60, num_heads_q=heads, num_heads_kv=kv_heads, topk=30, lengths="token", sinks=True)
    few = OnGpu(case)
    few.check_decode(*few.decode())
    few = OnGpu(replace(case, batch=150, seqlen_q=1))
    few.check_prefill(*few.prefill())


@pytest.mark.parametrize("heads", [16, 128])
def test_nan_of_a_chosen_token_shows_where_it_is_chosen(heads: int) -> None:
    on_gpu = OnGpu(replace(PREFILL, num_heads_q=heads, invalid=0.0))
    slot = int(on_gpu.host.indices[7, 0, 0, 5])
    on_gpu.kv[slot] = math.nan
    out, _, _ = on_gpu.prefill()
    gpu.synchronize()
    choosing = (on_gpu.host.indices[:, 0, 0] == slot).any(axis=1)
    np.testing.assert_array_equal(np.isnan(gpu.download(out)).any(axis=(1, 2)), choosing)


@pytest.mark.parametrize("dtype", MAX_ERROR)
def test_all_tokens_are_dense_decode(dtype: str) -> None:
    """Each is as near to float64 as promised, and the two are as near to each other."""
    case = replace(DECODE, invalid=0.0, seqlen_q=1, dtype=dtype)
    on_gpu = OnGpu(case)
    rng = np.random.default_rng(9)
    table = np.stack([rng.permutation(case.num_pages)[:8] for _ in range(case.batch)]).astype(np.int32)
    lengths = rng.integers(1, 8 * case.page_size, case.batch, dtype=np.int32)
    tokens = np.tile(np.arange(8 * case.page_size, dtype=np.int32), (case.batch, 1, 1))
    kv = rng.normal(size=on_gpu.host.kv.shape).astype(on_gpu.host.kv.dtype)
    pages = np.take_along_axis(table[:, None], tokens // case.page_size, axis=2)
    slots = pages * case.page_size + tokens % case.page_size
    arrays = SparseArrays(replace(case, topk=slots.shape[2]), on_gpu.host.q, kv, slots[:, :, None], lengths, None)
    exact = exact_sparse(arrays)
    cache, given_table, given_lengths = map(gpu.upload, (kv, table, lengths))
    given_slots = slots_of(gpu.upload(tokens), given_table, case.page_size)
    np.testing.assert_array_equal(gpu.download(given_slots), slots)
    sparse = mla_sparse_decode(on_gpu.q, cache, given_slots, topk_length=given_lengths)
    dense = mla_decode(on_gpu.q, cache, given_table, given_lengths)
    gpu.synchronize()
    for out, lse in (sparse, dense):
        check(arrays.case, exact, gpu.download(out), gpu.download(lse).swapaxes(1, 2))
    for ours, theirs in zip(sparse, dense, strict=True):
        assert frobenius_error(gpu.download(ours), gpu.download(theirs)) < MAX_ERROR[dtype]


@pytest.mark.parametrize("heads", [16, 128])
def test_cache_beyond_32_bits(heads: int) -> None:
    """2^31 elements and more, of which the last slots are chosen."""
    slots, width = 2**31 // 576 + 1000, 576
    kv = gpu.empty((slots, 1, width), "bfloat16")
    case = replace(PREFILL, batch=9, num_heads_q=heads, num_pages=500, topk=200)
    on_gpu = OnGpu(case)
    gpu.assign(kv[slots - 500 :], on_gpu.kv[:, 0])
    moved = np.where(
        (on_gpu.host.indices >= 0) & (on_gpu.host.indices < 500), on_gpu.host.indices + slots - 500, -1
    ).astype(np.int32)
    on_gpu.check_prefill(*on_gpu.prefill(kv=kv, indices=gpu.upload(moved[:, 0])))


# Strides -------------------------------------------------------------------------------------------------------------


def test_strides_of_decode() -> None:
    case = replace(DECODE, num_heads_kv=2, num_pages=10, lengths="token")
    on_gpu = OnGpu(case)
    q = gpu.empty((5, 3, 40, 640), "bfloat16")[:, :2, 8:24, 64:]
    kv = gpu.empty((10, 80, 3, 640), "bfloat16")[:, 8:72, 1:, :576]
    gpu.assign(q, on_gpu.q)
    gpu.assign(kv, on_gpu.kv)
    indices = gpu.upload(np.full((5, 3, 2, 400), 7, np.int32))[:, 1:, :, 50:350]
    indices[...] = on_gpu.indices
    out = gpu.empty((5, 3, 20, 544), "bfloat16")[:, :2, 2:18, 16:528]
    lse = gpu.empty((16, 2, 5), "float32")
    lse = lse.permute(2, 0, 1) if hasattr(lse, "permute") else lse.transpose(2, 0, 1)
    on_gpu.check_decode(*on_gpu.decode(q=q, kv_cache=kv, indices=indices, out=out, lse=lse))


def test_strides_of_prefill() -> None:
    case = replace(PREFILL, num_heads_kv=2, num_pages=300, lengths="token", sinks=True)
    on_gpu = OnGpu(case)
    q = gpu.empty((150, 2, 40, 640), "bfloat16")[:, 1, 8:24, 64:]
    kv = gpu.empty((300, 1, 3, 640), "bfloat16")[:, :, 1:, :576]
    gpu.assign(q, on_gpu.q[:, 0])
    gpu.assign(kv, on_gpu.kv)
    indices = gpu.upload(np.full((150, 3, 400), 7, np.int32))[:, 1:, 50:350]
    indices[...] = on_gpu.indices[:, 0]
    out = gpu.empty((150, 20, 544), "bfloat16")[:, 2:18, 16:528]
    max_logits, lse = (gpu.empty((16, 150), "float32").T for _ in range(2))
    options = {"q": q, "kv": kv[:, 0], "indices": indices, "out": out, "max_logits": max_logits, "lse": lse}
    on_gpu.check_prefill(*on_gpu.prefill(**options))


# Plans, graphs, determinism ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, "request", "token"])
@pytest.mark.parametrize("heads", [8, 128])
def test_a_plan_serves_many_calls(heads: int, lengths: str | None) -> None:
    on_gpu = OnGpu(replace(DECODE, num_heads_q=heads, lengths=lengths, sinks=True))
    plan = plan_sparse_decode(**on_gpu.of_plan)
    for _ in range(3):
        on_gpu.check_decode(*on_gpu.decode(plan=plan))


def test_a_plan_of_other_shapes_is_refused() -> None:
    on_gpu = OnGpu(DECODE)
    plan = plan_sparse_decode(**on_gpu.of_plan)
    with pytest.raises(PlanMismatchError):
        on_gpu.decode(plan=plan, indices=gpu.upload(on_gpu.host.indices[..., :100]))


@pytest.mark.parametrize("heads", [8, 128])
@pytest.mark.parametrize("batch", [1, 70])
def test_same_bits_every_run(heads: int, batch: int) -> None:
    decode = OnGpu(replace(DECODE, num_heads_q=heads, batch=batch, lengths="token", sinks=True, topk=700))
    prefill = OnGpu(replace(PREFILL, num_heads_q=heads, batch=2 * batch, lengths="token", sinks=True, topk=700))
    for call in (decode.decode, prefill.prefill):
        first = [gpu.bits_of(result) for result in call()]
        for _ in range(RUNS):
            for result, bits in zip(call(), first, strict=True):
                np.testing.assert_array_equal(gpu.bits_of(result), bits)


@pytest.mark.parametrize("heads", [8, 64])
def test_fixed_split_gives_the_same_bits_in_any_batch(heads: int) -> None:
    on_gpu = OnGpu(replace(DECODE, num_heads_q=heads, batch=40, seqlen_q=1, topk=1000, lengths="request"))

    def decode(begin: int, end: int) -> list[np.ndarray]:
        part = {
            **{name: getattr(on_gpu, name)[begin:end] for name in ("q", "indices")},
            "kv_cache": on_gpu.kv, "topk_length": on_gpu.lengths[begin:end],
        }  # fmt: skip
        plan = plan_sparse_decode(**part, fixed_split_tokens=256)
        return [gpu.bits_of(result) for result in mla_sparse_decode(**part, plan=plan)]

    everything = decode(0, 40)
    for begin, end in ((0, 1), (3, 9), (39, 40)):
        for part, whole in zip(decode(begin, end), everything, strict=True):
            np.testing.assert_array_equal(part, whole[begin:end])


@pytest.mark.parametrize("heads", [8, 128])
@pytest.mark.parametrize("lengths", ["request", "token"])
def test_graph_replayed_after_lengths_changed(heads: int, lengths: str) -> None:
    case = replace(DECODE, num_heads_q=heads, lengths=lengths, sinks=True, topk=900)
    on_gpu = OnGpu(case)
    on_gpu.kv = gpu.upload(np.where(np.isnan(on_gpu.host.kv), on_gpu.host.kv.dtype.type(0.5), on_gpu.host.kv))
    outputs, plan = on_gpu.outputs(), plan_sparse_decode(**on_gpu.of_plan)

    def step() -> None:
        plan.update(on_gpu.lengths)
        on_gpu.decode(**outputs, plan=plan)
        on_gpu.decode(**outputs, plan=plan)

    replay = gpu.capture(step)
    for seed in range(4):
        other = replace(case, seed=seed).build()
        lengths_now = np.zeros_like(other.lengths) if seed == 3 else other.lengths
        gpu.assign(on_gpu.lengths, gpu.upload(lengths_now))
        replay()
        host = replace(on_gpu.host, kv=np.where(np.isnan(on_gpu.host.kv), on_gpu.host.kv.dtype.type(0.5),
                                                on_gpu.host.kv), lengths=lengths_now)  # fmt: skip
        on_gpu.exact = exact_sparse(host)
        on_gpu.check_decode(**outputs)


@pytest.mark.parametrize("heads", [8, 128])
@pytest.mark.parametrize("topk", [300, 1100])  # of the second clusters share some query tokens
def test_graph_of_prefill_replayed_after_lengths_changed(heads: int, topk: int) -> None:
    case = replace(PREFILL, num_heads_q=heads, lengths="token", sinks=True, topk=topk)
    on_gpu = OnGpu(case)
    clean = np.where(np.isnan(on_gpu.host.kv), on_gpu.host.kv.dtype.type(0.5), on_gpu.host.kv)
    on_gpu.kv = gpu.upload(clean)
    outputs = on_gpu.prefill_outputs()
    on_gpu.lengths = on_gpu.lengths.reshape(-1)
    replay = gpu.capture(partial(on_gpu.prefill, **outputs))
    for seed in range(3):
        lengths = replace(case, seed=seed).build().lengths
        gpu.assign(on_gpu.lengths, gpu.upload(lengths.reshape(-1)))
        replay()
        on_gpu.exact = exact_sparse(replace(on_gpu.host, kv=clean, lengths=lengths))
        on_gpu.check_prefill(**outputs)


def test_work_waits_for_what_is_queued_before_it() -> None:
    on_gpu = OnGpu(replace(PREFILL, lengths="token", sinks=True, topk=700))
    decode = OnGpu(replace(DECODE, lengths="token", sinks=True))
    gpu.synchronize()
    with gpu.delayed_stream() as stream:
        results = on_gpu.prefill(stream=stream)
        decoded = decode.decode(stream=stream)
    on_gpu.check_prefill(*results)
    decode.check_decode(*decoded)


# Around it -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (3, 2, 700)])
@pytest.mark.parametrize("page_size", [1, 16, 61])
def test_slots_of(shape: tuple[int, ...], page_size: int) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(-5, 300, shape, dtype=np.int32)
    table = rng.integers(-2, 40, (3, 5), dtype=np.int32)
    requests = np.array([2, -1, 0], np.int32)
    for options in ({}, {"requests": requests}):
        there = {name: gpu.upload(value) for name, value in options.items()}
        slots = slots_of(gpu.upload(tokens), gpu.upload(table), page_size, **there)
        np.testing.assert_array_equal(gpu.download(slots), slots_of(tokens, table, page_size, **options))


def test_flash_mla() -> None:
    prefill = OnGpu(replace(PREFILL, lengths="request", sinks=True))
    given = prefill.of_prefill
    out, _, lse = flash_mla.flash_mla_sparse_fwd(
        given["q"], prefill.kv[:, 0], given["indices"], 576**-0.5, 512, prefill.sinks, prefill.lengths
    )
    unseen = np.isneginf(prefill.exact[2][:, 0])
    assert unseen.any()
    lse = gpu.download(lse)
    assert (lse[unseen] == math.inf).all()
    lse[unseen] = -math.inf
    check(prefill.case, prefill.exact, gpu.download(out)[:, None], lse[:, None])
    decode = OnGpu(replace(DECODE, lengths="request", sinks=True))
    meta, _ = flash_mla.get_mla_metadata()
    for _ in range(2):
        out, lse = flash_mla.flash_mla_with_kvcache(
            decode.q, decode.kv, None, None, 512, meta, indices=decode.indices[:, :, 0], attn_sink=decode.sinks,
            topk_length=decode.lengths,
        )  # fmt: skip
        lse = gpu.download(lse).swapaxes(1, 2)
        assert (lse[0] == math.inf).all()
        lse[0] = -math.inf
        check(decode.case, decode.exact, gpu.download(out), lse)


@pytest.mark.parametrize("name", ["q", "kv", "indices", "topk_length", "attn_sink"])
def test_a_bad_argument_is_refused_and_nothing_written(name: str) -> None:
    on_gpu = OnGpu(replace(PREFILL, lengths="request", sinks=True, batch=9))
    outputs = on_gpu.prefill_outputs()
    on_cpu = {
        "q": on_gpu.host.q[:, 0], "kv": on_gpu.host.kv, "indices": on_gpu.host.indices[:, 0],
        "topk_length": on_gpu.host.lengths, "attn_sink": on_gpu.host.sinks,
    }  # fmt: skip
    with pytest.raises(InvalidArgumentError):
        on_gpu.prefill(**outputs, **{name: on_cpu[name]})
    gpu.synchronize()
    assert all(np.isnan(gpu.download(output)).all() for output in outputs.values())
