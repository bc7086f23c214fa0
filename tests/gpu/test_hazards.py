"""Values that nobody checked: lengths, pages and indices outside of everything give what the NumPy backend gives.

The cache lies between NaN, so that a page read outside of it would show; scripts/races.py runs the same calls under
compute-sanitizer, which sees every access.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases_dense import DTYPES

from cupy_mla import InvalidArgumentError, mla_decode, mla_sparse_decode, mla_sparse_prefill, plan_decode
from cupy_mla.kernels.choose import DENSE_FAMILIES, GATHERED_DENSE_FAMILIES
from cupy_mla.kernels.family import DecodeFamily

from . import gpu_arrays as gpu

INT32 = np.iinfo(np.int32)
BATCH, COLUMNS, PAGES, PAGE_SIZE = 6, 5, 12, 64
MARGIN = 2  # pages of NaN on either side of the cache
LENGTHS = np.array([-1, INT32.min, COLUMNS * PAGE_SIZE + 1, INT32.max, 130, 0], np.int32)


def arrays(heads: int, page_size: int = PAGE_SIZE) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    columns, pages = (count * PAGE_SIZE // page_size for count in (COLUMNS, PAGES))
    table = rng.integers(0, pages, (BATCH, columns)).astype(np.int32)
    table[:, 1] = [-1, pages, INT32.max, INT32.min, pages, -7]
    pool = np.full((pages + 2 * MARGIN, page_size, 1, 576), np.nan, DTYPES["bfloat16"])
    pool[MARGIN:-MARGIN] = rng.standard_normal((pages, page_size, 1, 576))
    q = rng.standard_normal((BATCH, 2, heads, 576)).astype(DTYPES["bfloat16"])
    return {"q": q, "pool": pool, "block_table": table, "cache_seqlens": LENGTHS}


@pytest.mark.parametrize("family", DENSE_FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("split", [None, 64])
def test_dense(family: DecodeFamily, split: int | None) -> None:
    host = arrays(16, 1 if family.gathers else PAGE_SIZE)
    given = {name: gpu.upload(array) for name, array in host.items()}
    given["kv_cache"] = given.pop("pool")[MARGIN:-MARGIN]
    plan = plan_decode(**given, causal=True, kernel=family.name, fixed_split_tokens=split, validate=False)
    out, lse = mla_decode(**given, causal=True, plan=plan, validate=False)
    host["kv_cache"] = host.pop("pool")[MARGIN:-MARGIN]
    expected, expected_lse = mla_decode(**host, causal=True, validate=False)
    for request in range(BATCH):
        got, exact = gpu.download(out)[request], expected[request].astype(np.float64)
        assert np.linalg.norm(got - exact) <= 5e-3 * np.linalg.norm(exact)
    np.testing.assert_allclose(gpu.download(lse), expected_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "place"), [("cache_seqlens", "[0]"), ("block_table", "[2, 1]")])
def test_validation_names_the_request(name: str, place: str) -> None:
    host = arrays(16)
    good = {"cache_seqlens": np.full(BATCH, 130, np.int32), "block_table": np.zeros((BATCH, COLUMNS), np.int32)}
    if name == "block_table":
        good[name][2, 1] = PAGES
    else:
        good[name][0] = -1
    given = {key: gpu.upload(array) for key, array in {**host, **good}.items()}
    given["kv_cache"] = given.pop("pool")[MARGIN:-MARGIN]
    out = gpu.empty((BATCH, 2, 16, 512), "bfloat16")
    with pytest.raises(InvalidArgumentError) as caught:
        mla_decode(**given, out=out, validate=True)
    assert caught.value.argument == name + place
    assert np.isnan(gpu.download(out)).all()  # nothing was launched


@pytest.mark.parametrize("kernel", [family.name for family in GATHERED_DENSE_FAMILIES])
def test_sparse(kernel: str) -> None:
    rng = np.random.default_rng(1)
    host = arrays(16)
    indices = rng.integers(0, PAGES * PAGE_SIZE, (BATCH, 2, 200), dtype=np.int32)
    indices[:, :, ::3] = rng.choice([-1, PAGES * PAGE_SIZE, INT32.max, INT32.min], indices[:, :, ::3].shape)
    lengths = np.array([-1, INT32.min, 201, INT32.max, 130, 0], np.int32)
    from cupy_mla import plan_sparse_decode

    def call(q: Any, cache: Any, indices: Any, lengths: Any) -> Any:
        plan = plan_sparse_decode(q, cache, indices, topk_length=lengths, kernel=kernel, validate=False)
        return mla_sparse_decode(q, cache, indices, topk_length=lengths, plan=plan, validate=False)

    cache = gpu.upload(host["pool"])[MARGIN:-MARGIN]
    out, lse = call(gpu.upload(host["q"]), cache, gpu.upload(indices), gpu.upload(lengths))
    expected, expected_lse = call(host["q"], host["pool"][MARGIN:-MARGIN], indices, lengths)
    for request in range(BATCH):
        got, exact = gpu.download(out)[request], expected[request].astype(np.float64)
        assert np.linalg.norm(got - exact) <= 5e-3 * np.linalg.norm(exact)
    np.testing.assert_allclose(gpu.download(lse), expected_lse, rtol=1e-4, atol=1e-4)
    rows, rows_lse = mla_sparse_prefill(
        gpu.upload(host["q"][:, 0]), gpu.upload(host["pool"])[MARGIN:-MARGIN], gpu.upload(indices[:, 0]),
        topk_length=gpu.upload(lengths), validate=False,
    )[::2]  # fmt: skip
    assert np.isfinite(gpu.download(rows)).all()
    np.testing.assert_allclose(gpu.download(rows_lse), expected_lse[:, :, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_special_stream_handles(stream: int) -> None:
    """cudaStreamLegacy and cudaStreamPerThread are numbers like those of other streams."""
    host = arrays(16)
    host["cache_seqlens"] = np.full(BATCH, 130, np.int32)
    host["block_table"] = np.tile(np.arange(COLUMNS, dtype=np.int32), (BATCH, 1))
    given = {name: gpu.upload(array) for name, array in host.items()}
    given["kv_cache"] = given.pop("pool")[MARGIN:-MARGIN]
    gpu.synchronize()
    plan = plan_decode(**given, stream=stream)
    plan.update(given["cache_seqlens"], stream=stream)
    expected = gpu.download(mla_decode(**given)[0])
    for planned in (plan, None):
        out, _ = mla_decode(**given, plan=planned, stream=stream, validate=True)
        gpu.synchronize()
        np.testing.assert_array_equal(gpu.download(out), expected)
