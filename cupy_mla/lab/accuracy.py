"""How far a result is from float64, request by request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..call.describe import describe_decode
from ..call.options import read_call
from ..decode.reference import mla_decode_reference
from .cases import Case
from .random_values import Array

# The contract's bounds: relative Frobenius error of out, and |lse - lse64| <= LSE_BOUND (1 + |lse64|).
OUT_BOUNDS = {"bfloat16": 3e-3, "float16": 1e-3}
LSE_BOUND = 1e-5


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Errors of the worst of the requests compared.

    Attributes
    ----------
    out_error, out_bound
        Relative Frobenius error of one request's out, and what it may be.
    lse_error
        Largest |lse - lse64| / (1 + |lse64|); its bound is ``LSE_BOUND``.
    requests
        The requests that were compared.
    """

    out_error: float
    out_bound: float
    lse_error: float
    requests: tuple[int, ...]

    @property
    def passed(self) -> bool:
        """Both errors are within their bounds (not-a-number is not)."""
        return self.out_error <= self.out_bound and self.lse_error <= LSE_BOUND


def decode_float64(request: Case) -> tuple[Array, Array]:
    """The oracle: out [1, s_q, h_q, d_v] and lse [1, h_q, s_q] of a host case of one request, in float64."""
    problem, inputs = describe_decode(*read_call(*request.tensors, **request.options))
    scale = problem.queries.default_softmax_scale if request.softmax_scale is None else request.softmax_scale
    out, lse = mla_decode_reference(problem, inputs, scale, dtype=np.float64)
    return out, lse


def measure_accuracy(case: Case, out: Any, lse: Any, requests: Sequence[int]) -> Accuracy:
    """Compare the result of ``mla_decode`` on a case with float64 for the given requests.

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
    return Accuracy(out_error, OUT_BOUNDS[case.dtype], lse_error, tuple(compared))


def choose_requests(case: Case, count: int, seed: int = 0) -> list[int]:
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
