"""Sparse attention to FP8 caches on the GPU: every kernel against float64 on the dequantised cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from cases_dense import frobenius_error
from cases_sparse import exact_sparse
from cases_sparse_fp8 import KINDS, NAN_BYTE, Fp8SparseArrays, Fp8SparseCase, without_padding

from cupy_mla import mla_sparse_decode, mla_sparse_prefill, plan_sparse_decode
from cupy_mla.kernels.choose import GATHERED_FP8_FAMILIES

from . import gpu_arrays as gpu

MAX_ERROR = 3e-3
RUNS = 5
KERNELS = tuple(family.name for family in GATHERED_FP8_FAMILIES)
DECODE = Fp8SparseCase(batch=5, seqlen_q=2, num_pages=40, page_size=64, topk=300)
PREFILL = Fp8SparseCase(batch=150, num_pages=3000, page_size=1, topk=130)
# And their rope width.
LAYOUTS = {"fp8_ds_mla": 64, "fp8_ds_mla_no_rope": 0, "fp8_e4m3": 64, "fp8_model1": 0, "fp8_v41": 0, "fp4_v41": 0}

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("kernel")]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every test runs on each of the kernels that serve its layout."""

    yield from gpu.on_gathered_kernel(request.param, monkeypatch)


@lru_cache(maxsize=32)  # for each of the kernels
def build(case: Fp8SparseCase) -> tuple[Fp8SparseArrays, tuple[np.ndarray, ...]]:
    arrays = case.build_fp8()
    return arrays, exact_sparse(arrays.exact)


def check(case: Fp8SparseCase, exact: tuple[np.ndarray, ...], out: np.ndarray, lse: np.ndarray) -> None:
    """out [batch, seqlen_q, heads, d_v] and lse [batch, seqlen_q, heads] of every query token."""
    exact_out, _, exact_lse = exact
    assert np.isfinite(out).all(), f"{np.count_nonzero(~np.isfinite(out))} values are not finite"
    for place in np.ndindex(out.shape[:2]):
        error = frobenius_error(out[place], exact_out[place])
        assert error < MAX_ERROR, f"query token {place}: relative error {error:.2e}"
    unseen = np.isneginf(exact_lse)
    assert (out[unseen] == 0).all()
    np.testing.assert_array_equal(np.isneginf(lse), unseen)
    np.testing.assert_allclose(lse, exact_lse, rtol=case.lse_tolerance, atol=case.lse_tolerance)


def outputs(case: Fp8SparseCase) -> dict[str, Any]:
    shape = case.batch, case.seqlen_q, case.num_heads_q, case.latent_dim
    out = gpu.empty(shape, "bfloat16")
    return {"out": out, "lse": gpu.empty((case.batch, case.num_heads_q, case.seqlen_q), "float32")}


def run_decode(case: Fp8SparseCase, **options: Any) -> None:
    arrays, exact = build(case)
    out, lse = mla_sparse_decode(**{**arrays.arguments(gpu.upload, gpu.as_e4m3), **outputs(case), **options})
    gpu.synchronize()
    check(case, exact, gpu.download(out), gpu.download(lse).swapaxes(1, 2))


def run_prefill(case: Fp8SparseCase) -> None:
    arrays, exact = build(case)
    given = arrays.arguments(gpu.upload, gpu.as_e4m3)
    given["kv"] = given.pop("kv_cache")
    for name in ("q", "indices"):
        given[name] = given[name][:, 0]
    if given["topk_length"] is not None:
        given["topk_length"] = given["topk_length"].reshape(-1)
    out, largest, lse = mla_sparse_prefill(**given)
    gpu.synchronize()
    check(case, exact, gpu.download(out)[:, None], gpu.download(lse)[:, None])
    np.testing.assert_allclose(
        gpu.download(largest)[:, None], exact[1], rtol=case.lse_tolerance, atol=case.lse_tolerance
    )


@pytest.mark.parametrize(
    ("layout", "heads"),
    [*(("fp8_ds_mla", heads) for heads in (1, 4, 5, 16, 17, 32, 63, 128)), ("fp8_ds_mla_no_rope", 40), ("fp8_e4m3", 3)]
    + [(layout, heads) for layout in ("fp8_model1", "fp8_v41", "fp4_v41") for heads in (1, 20, 128)],
)
def test_heads(layout: str, heads: int) -> None:
    run_decode(replace(DECODE, num_heads_q=heads, layout=layout, rope_dim=LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_scales(layout: str, kind: str) -> None:
    case = replace(DECODE, num_heads_q=24, kind=kind, layout=layout, rope_dim=LAYOUTS[layout], sinks=kind == "any")
    run_decode(case)


@pytest.mark.parametrize("topk", [0, 1, 15, 17, 64, 65, 640, 2048])
def test_topk(topk: int) -> None:
    run_decode(replace(DECODE, topk=topk))


@pytest.mark.parametrize(("page_size", "gap"), [(1, 0), (64, 0), (256, 0), (2, 1), (61, 1), (64, 1), (576, 1)])
def test_page_sizes(page_size: int, gap: int) -> None:
    num_pages = max(1200 // page_size, 1)
    case = replace(DECODE, page_size=page_size, num_pages=num_pages)
    stored = build(case)[0].stored
    larger = np.full((num_pages, page_size + gap, *stored.shape[2:]), NAN_BYTE, np.uint8)
    larger[:, gap:] = stored
    run_decode(case, kv_cache=gpu.upload(larger)[:, gap:])


@pytest.mark.parametrize("page_size", [1, 2, 61, 64, 256])
@pytest.mark.parametrize("heads", [16, 64])
def test_pages_that_end_with_scales(heads: int, page_size: int) -> None:
    num_pages = max(1200 // page_size, 1)
    case = replace(DECODE, page_size=page_size, num_pages=num_pages, num_heads_q=heads)
    run_decode(replace(case, layout="fp8_model1", rope_dim=0))


def test_nan_of_what_is_not_coded_or_of_a_scale_shows() -> None:
    case = replace(DECODE, layout="fp8_model1", rope_dim=0, batch=20, invalid=0.0)
    arrays, _ = build(case)
    slot = int(arrays.exact.indices[7, 1, 0, 5])
    choosing = (arrays.exact.indices[:, :, 0] == slot).any(axis=2)
    for field in (1, 2):  # scales, bfloat16 values
        memory = arrays.memory.copy()
        changed = replace(arrays, memory=memory, stored=without_padding(memory, arrays.stored.shape))
        case.cache_layout.fields(changed.stored)[field][slot // case.page_size, slot % case.page_size] = NAN_BYTE
        out, _ = mla_sparse_decode(**changed.arguments(gpu.upload, gpu.as_e4m3))
        gpu.synchronize()
        np.testing.assert_array_equal(np.isnan(gpu.download(out)).any(axis=(2, 3)), choosing)


@pytest.mark.parametrize("batch", [1, 16, 128])
@pytest.mark.parametrize("heads", [8, 64])
def test_batches(batch: int, heads: int) -> None:
    run_decode(replace(DECODE, batch=batch, num_heads_q=heads, lengths="token", sinks=True))


@pytest.mark.parametrize("layout", ["fp8_ds_mla", "fp8_model1"])
def test_parts_of_many_items(layout: str) -> None:
    """Some twenty items a CTA, more than the kernel for 64 rows keeps in shared memory, and some without tokens."""
    case = replace(DECODE, batch=1300, num_heads_q=3, topk=40, layout=layout, rope_dim=LAYOUTS[layout])
    run_decode(replace(case, lengths="token", sinks=True))


@pytest.mark.parametrize("invalid", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("lengths", [None, "token"])
def test_indices_that_name_no_token(invalid: float, lengths: str | None) -> None:
    run_decode(replace(DECODE, invalid=invalid, lengths=lengths, sinks=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [16, 72])
def test_prefill(layout: str, heads: int) -> None:
    case = replace(
        PREFILL, num_heads_q=heads, kind="mixed any", layout=layout, rope_dim=LAYOUTS[layout], lengths="token"
    )
    run_prefill(replace(case, sinks=True))


@pytest.mark.parametrize("heads", [8, 64])
def test_results_are_the_same_every_time(heads: int) -> None:
    case = replace(DECODE, num_heads_q=heads, batch=3, topk=2048, kind="mixed")
    given = build(case)[0].arguments(gpu.upload, gpu.as_e4m3)
    plan = plan_sparse_decode(**{name: value for name, value in given.items() if name != "attn_sink"})
    results = []
    for _ in range(RUNS):
        results.append(mla_sparse_decode(**given, **outputs(case), plan=plan))
    gpu.synchronize()
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(gpu.bits_of(ours), gpu.bits_of(first))


@pytest.mark.parametrize("heads", [8, 64])
def test_a_fixed_split_makes_results_batch_invariant(heads: int) -> None:
    case = replace(DECODE, num_heads_q=heads, topk=640, kind="any", lengths="request")
    given = build(case)[0].arguments(gpu.upload, gpu.as_e4m3)

    def run(requests: slice) -> list[np.ndarray]:
        of_batch = ("q", "indices", "topk_length")
        part = {name: value[requests] if name in of_batch else value for name, value in given.items()}
        of_plan = {name: value for name, value in part.items() if name != "attn_sink"}
        results = mla_sparse_decode(**part, plan=plan_sparse_decode(**of_plan, fixed_split_tokens=128))
        gpu.synchronize()
        return [gpu.bits_of(result) for result in results]

    for alone, together in zip(run(slice(4, 5)), run(slice(0, 5)), strict=True):
        np.testing.assert_array_equal(alone[0], together[4])


@pytest.mark.parametrize("heads", [16, 64])
def test_nan_of_a_chosen_token_shows_where_it_is_chosen(heads: int) -> None:
    case = replace(DECODE, num_heads_q=heads, batch=20, invalid=0.0)
    arrays, _ = build(case)
    slot = int(arrays.exact.indices[7, 1, 0, 5])
    for byte in (3, 513):  # of a value, of a scale
        stored = arrays.stored.copy()
        stored.reshape(case.num_slots, -1)[slot, byte // 4 * 4 : byte // 4 * 4 + 4] = NAN_BYTE
        out, _ = mla_sparse_decode(**{**arrays.arguments(gpu.upload, gpu.as_e4m3), "kv_cache": gpu.upload(stored)})
        gpu.synchronize()
        choosing = (arrays.exact.indices[:, :, 0] == slot).any(axis=2)
        np.testing.assert_array_equal(np.isnan(gpu.download(out)).any(axis=(2, 3)), choosing)


def test_cache_beyond_32_bits() -> None:
    """Bytes past 2^32, of which the last slots are chosen."""
    case = replace(DECODE, num_pages=500, page_size=1)
    arrays, exact = build(case)
    slots = 2**32 // 656 + 1000
    given = arrays.arguments(gpu.upload, gpu.as_e4m3)
    last = given["kv_cache"]
    if gpu.torch is not None:
        cache = gpu.torch.full((slots, 1, 1, 656), NAN_BYTE, dtype=gpu.torch.uint8, device="cuda")
    else:
        cache = gpu.cupy.full((slots, 1, 1, 656), NAN_BYTE, dtype="uint8")
    cache[slots - 500 :] = last
    indices = arrays.exact.indices[:, :, 0]
    moved = np.where((indices >= 0) & (indices < 500), indices + slots - 500, -1).astype(np.int32)
    out, lse = mla_sparse_decode(**{**given, "kv_cache": cache, "indices": gpu.upload(moved)})
    gpu.synchronize()
    check(case, exact, gpu.download(out), gpu.download(lse).swapaxes(1, 2))
