"""How far a result is from float64, request by request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..call.options import EXACT, SPLIT
from .cases import Case
from .random_values import Array
from .sparse_cases import SparseCase

# The contract's bounds: relative Frobenius error of out by type, and |lse - lse64| / (1 + |lse64|) by way to compute.
# Sums in FP8 tensor cores have 13 fraction bits.
OUT_BOUNDS = {"bfloat16": 3e-3, "float16": 1e-3}
LSE_BOUNDS = {EXACT: 1e-5, SPLIT: 2e-3}


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Errors of the worst of the requests compared.

    Attributes
    ----------
    out_error, out_bound
        Relative Frobenius error of one request's out, and what it may be.
    lse_error, lse_bound
        Largest |lse - lse64| / (1 + |lse64|), and what it may be.
    requests
        The requests that were compared.
    """

    out_error: float
    out_bound: float
    lse_error: float
    lse_bound: float
    requests: tuple[int, ...]

    @property
    def passed(self) -> bool:
        """Both errors are within their bounds (not-a-number is not)."""
        return self.out_error <= self.out_bound and self.lse_error <= self.lse_bound


def decode_float64(request: Case | SparseCase) -> tuple[Array, Array]:
    """The oracle: out [1, s_q, h_q, d_v] and lse [1, h_q, s_q] of a host case of one request, in float64."""
    return request.exact()


def measure_accuracy(case: Case | SparseCase, out: Any, lse: Any, requests: Sequence[int]) -> Accuracy:
    """Compare the result of a case with float64 for the given requests.

    Parameters
    ----------
    case, out, lse
        Of one library.
    requests
        Indices in [0, batch).
    """
    out_error = lse_error = 0.0
    compared = [index for index in requests if case.q_lengths[index] > 0]  # without query tokens there is no result
    for index in compared:
        expected_out, expected_lse = decode_float64(case.request(index))
        request_out, request_lse = case.request_result(index, out, lse)
        # numpy.maximum, unlike max, keeps a not-a-number.
        out_error = float(np.maximum(out_error, _relative_error(request_out, expected_out[0])))
        lse_error = float(np.maximum(lse_error, _lse_error(request_lse, expected_lse[0])))
    return Accuracy(out_error, OUT_BOUNDS[case.dtype], lse_error, LSE_BOUNDS[case.computes], tuple(compared))


def choose_requests(case: Case | SparseCase, count: int, seed: int = 0) -> list[int]:
    """``count`` requests worth comparing: the longest, the shortest, and others at random; in order, none twice."""
    by_length = np.argsort(case.kv_lengths, kind="stable")
    if count >= case.batch:
        return list(range(case.batch))
    others = np.random.default_rng(seed).permutation(by_length[1:-1])
    return sorted(int(index) for index in [by_length[-1], by_length[0], *others][:count])


def _relative_error(out: Array, expected: Array) -> float:
    error = float(np.linalg.norm(out.astype(np.float64) - expected))
    size = float(np.linalg.norm(expected))
    if size == 0.0:  # nothing visible (or no rows): only exact zeros will do
        return 0.0 if error == 0.0 else float("inf")
    return error / size


def _lse_error(lse: Array, expected: Array) -> float:
    nothing_visible = np.isneginf(expected)
    if not np.array_equal(np.isneginf(lse), nothing_visible):
        return float("inf")
    finite = expected[~nothing_visible]
    errors = np.abs(lse[~nothing_visible].astype(np.float64) - finite) / (1.0 + np.abs(finite))
    return float(errors.max(initial=0.0))
