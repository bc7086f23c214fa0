"""Split results are as accurate as whole ones, whatever the magnitude of the values: in the narrow kernels and the wide
one, and of a rank's share of a cache in the narrow kernels, of few rows in the wide one, and in those of chosen tokens.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases_dense import frobenius_error

from cupy_mla import mla_decode, mla_sparse_decode, plan_decode, plan_sparse_decode, slots_of

from . import gpu_arrays as gpu

pytestmark = pytest.mark.timeout(60)

LATENT, WIDTH, PAGE_SIZE = 512, 576, 64
LENGTHS = (1500, 700, 65)
KERNELS = [("narrow16", 16), ("narrow32", 32), ("wide64", 8)]  # and heads
GATHERED = [("gathered_narrow16", 16), ("gathered_narrow32", 32), ("gathered_wide64", 64)]
COLUMNS = np.arange(LATENT)
FIFTH = 1.2
SHARE = {"cp_world": 2}  # of which the arrays are one rank's
CALLS: list[tuple[str, int, dict[str, int]]] = [
    *((*kernel, SHARE) for kernel in (*KERNELS, *GATHERED)),
    *((*kernel, {}) for kernel in (*KERNELS, ("wide64", 64))),
]


def parts_of(kernel: str) -> np.ndarray:
    """Which columns share a power of two (core/partial_format.h): those of one part, or of one warp of it."""
    return COLUMNS // 256 if kernel.endswith("wide64") else COLUMNS // 16 % 4


def column_factors(magnitude: float, columns: np.ndarray) -> np.ndarray:
    """[WIDTH] powers of two: of what keys are multiplied by, queries divided by, so that scores stay as they are."""
    factors = np.ones(WIDTH)
    factors[:LATENT][columns] = magnitude
    return factors


def inputs(heads: int, factors: np.ndarray) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    pages = [-(-length // PAGE_SIZE) for length in LENGTHS]
    table = np.zeros((len(LENGTHS), max(pages)), np.int32)
    for row, count in enumerate(pages):
        table[row, :count] = sum(pages[:row]) + np.arange(count)
    q = rng.standard_normal((len(LENGTHS), 1, heads, WIDTH)) / factors
    cache = rng.standard_normal((sum(pages), PAGE_SIZE, 1, WIDTH)) * factors
    return q.astype(ml_dtypes.bfloat16), cache.astype(ml_dtypes.bfloat16), table, np.array(LENGTHS, np.int32)


def decode(arrays: tuple[np.ndarray, ...], kernel: str, share: dict[str, int], split: int | None) -> np.ndarray:
    on_gpu, options = [gpu.upload(array) for array in arrays], dict[str, Any](share)
    plan_for, call = plan_decode, mla_decode
    if kernel.startswith("gathered"):
        plan_for, call = plan_sparse_decode, mla_sparse_decode
        table, lengths = arrays[2:]
        tokens = np.arange(table.shape[1] * PAGE_SIZE, dtype=np.int32)[None, None].repeat(len(LENGTHS), 0)
        on_gpu = [*on_gpu[:2], gpu.upload(slots_of(tokens, table, PAGE_SIZE))]
        options["topk_length"] = gpu.upload(lengths)
    plan = plan_for(*on_gpu, kernel=kernel, fixed_split_tokens=split, **options)
    assert plan.blueprint.config.scale_parts is not None
    out: np.ndarray = gpu.download(call(*on_gpu, plan=plan, **options)[0])
    return out


def exact(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    q, cache, table, lengths = (np.asarray(array, np.float64) for array in arrays)
    out = np.zeros((*q.shape[:-1], LATENT))
    for request, length in enumerate(lengths.astype(int)):
        keys = cache[table[request].astype(int)].reshape(-1, WIDTH)[:length]
        scores = WIDTH**-0.5 * q[request, 0] @ keys.T
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[request, 0] = weights / weights.sum(axis=1, keepdims=True) @ keys[:, :LATENT]
    return out


@pytest.mark.parametrize("one_part", [False, True])
@pytest.mark.parametrize("exponent", [-60, -20, -12, 0, 15, 20, 60])
@pytest.mark.parametrize(("kernel", "heads", "share"), CALLS)
def test_split_results_are_as_accurate_as_whole_ones(
    kernel: str, heads: int, share: dict[str, int], exponent: int, one_part: bool
) -> None:
    parts = parts_of(kernel)
    arrays = inputs(heads, column_factors(2.0**exponent, parts == 1 if one_part else COLUMNS >= 0))
    wanted = exact(arrays)
    split, whole = (decode(arrays, kernel, share, tokens) for tokens in (64, PAGE_SIZE * arrays[2].shape[1]))
    judged = np.zeros_like(parts) if kernel.startswith("narrow") and not share else parts  # one power for all columns
    for request in range(len(LENGTHS)):
        for part in range(judged.max() + 1):  # together, the large ones would hide the others
            columns = np.flatnonzero(judged == part)
            errors = [
                frobenius_error(out[request][..., columns], wanted[request][..., columns]) for out in (split, whole)
            ]
            assert errors[0] < FIFTH * errors[1], (request, part)


@pytest.mark.parametrize("magnitude", [1.0, 2.0**-20])  # of values; divided by powers of two, or not
@pytest.mark.parametrize(("kernel", "heads", "share"), CALLS)
def test_a_head_that_is_no_number_is_alone_in_it(
    kernel: str, heads: int, share: dict[str, int], magnitude: float
) -> None:
    arrays = inputs(heads, column_factors(magnitude, COLUMNS >= 0))
    expected = decode(arrays, kernel, share, 64)
    arrays[0][:, :, : heads // 2] = np.nan
    got: Any = decode(arrays, kernel, share, 64)
    assert np.isnan(got[:, :, : heads // 2]).all()
    np.testing.assert_array_equal(got[:, :, heads // 2 :], expected[:, :, heads // 2 :])
