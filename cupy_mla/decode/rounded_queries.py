"""Queries as ``compute="fp8"`` takes them: rounded to e4m3, with a power of two for each token and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..layouts.codes import E4M3

Array = npt.NDArray[Any]


def round_queries(parts: Sequence[Array], scales: tuple[float, float] = (1.0, 1.0)) -> list[Array]:
    """The values that the kernels multiply with (kernels_cu/decode/fp8/query.h).

    Parameters
    ----------
    parts
        Latent part and, if there is one, rope part, [..., width] float32 or float64. A row of both has one power of
        two, which brings its largest magnitude to above 224, and to 448 at most.
    scales
        Of the two parts of the cache: where they differ, the rope part is rounded as a multiple of their ratio, by
        which it is multiplied first.

    Returns
    -------
    New arrays like them. e4m3 queries come back as they were; a row with an infinity or NaN is NaN.
    """
    dtype = parts[0].dtype
    ratio = np.float32(scales[1]) / np.float32(scales[0])
    factors = (1, 1) if ratio == 1 else (1, ratio)
    parts = [part * dtype.type(factor) for part, factor in zip(parts, factors, strict=False)]
    largest = np.maximum.reduce([np.abs(part).max(axis=-1, keepdims=True, initial=0) for part in parts])
    mantissas, exponents = np.frexp(largest / dtype.type(E4M3.largest))  # mantissas from 1/2 to below 1
    powers = np.ldexp(dtype.type(1), exponents - (mantissas == 0.5))
    powers[largest == 0] = 1
    powers[~np.isfinite(largest)] = np.nan
    rounded = [E4M3.decode(E4M3.encode((part / powers).astype(np.float32))).astype(dtype) * powers for part in parts]
    return [part / dtype.type(factor) for part, factor in zip(rounded, factors, strict=False)]
