"""The main job: run one decode case, check a sample of it against float64, and time it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from .accuracy import Accuracy, choose_requests, measure_accuracy
from .cases import Case
from .sparse_cases import SparseCase
from .timing import Timing, time_decode


@dataclass(frozen=True, slots=True)
class DecodeReport:
    """What came of a case.

    Attributes
    ----------
    out, lse
        The result of the case, in its library.
    first_call_seconds
        The first call, with the compilation or loading of kernels and the validation of the case.
    accuracy, timing
        The sample against float64, and the time of a call.
    tflops, gigabytes_per_second
        The case's work (see ``work.Work``) over that time.
    """

    out: Any
    lse: Any
    first_call_seconds: float
    accuracy: Accuracy
    timing: Timing
    tflops: float
    gigabytes_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return {
            "time_us": self.timing.seconds * 1e6,
            "fastest_us": self.timing.fastest * 1e6,
            "slowest_us": self.timing.slowest * 1e6,
            "first_call_s": self.first_call_seconds,
            "protocol": self.timing.protocol,
            "tflops": self.tflops,
            "gigabytes_per_second": self.gigabytes_per_second,
            "relative_error": self.accuracy.out_error,
            "relative_error_bound": self.accuracy.out_bound,
            "lse_error": self.accuracy.lse_error,
            "lse_error_bound": self.accuracy.lse_bound,
            "requests_checked": list(self.accuracy.requests),
            "passed": self.accuracy.passed,
        }


def run_case(case: Case | SparseCase, *, requests_checked: int, seed: int = 0) -> DecodeReport:
    """Run a case, compare some of its requests with float64, and time it.

    Parameters
    ----------
    case
        Of NumPy or CuPy.
    requests_checked, seed
        How many requests are compared; the seed chooses which (the longest and the shortest always).

    Raises
    ------
    MlaError
        The case is not a valid call, or cannot run here.
    """
    start = time.perf_counter()
    out, lse, *_ = case.run(validate=True)
    case.library.synchronize()
    first_call_seconds = time.perf_counter() - start
    accuracy = measure_accuracy(case, out, lse, choose_requests(case, requests_checked, seed))
    timing = time_decode(case)
    return DecodeReport(
        out=out,
        lse=lse,
        first_call_seconds=first_call_seconds,
        accuracy=accuracy,
        timing=timing,
        tflops=case.work.flops / timing.seconds / 1e12,
        gigabytes_per_second=case.work.bytes / timing.seconds / 1e9,
    )
