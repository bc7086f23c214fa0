"""What trials of the campaign are drawn with: settings, values, storage; and how results are compared.

A trial is one random problem, given by one number, its seed. Trials whose seeds are neighbours share what kernels are
compiled for, so that thousands of them need few kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays.dtypes import numpy_dtype
from ..call.options import EXACT
from ..kernels.family import STANDARD_DIMS, STANDARD_PAGE_SIZES
from .accuracy import LSE_BOUNDS, OUT_BOUNDS
from .libraries import NUMPY, ArrayLibrary

Array = npt.NDArray[Any]

SEEDS_PER_SETTINGS = 2000
_UNUSUAL_PAGE_SIZES = (1, 48, 256)
_POOL_VALUES = 1 << 21
_POISON = 0xFF  # as every byte: a NaN in bfloat16, float16, float32 and e4m3
_ROW_UNIT = 8  # elements; strides of rows are multiples of 16 bytes of 16-bit values, of e4m3 twice as many
_FLOAT32_BOUND = 1e-6
_TILE = 64


@dataclass(frozen=True, slots=True)
class Settings:
    """What kernels are compiled for; of ``SEEDS_PER_SETTINGS`` neighbouring seeds."""

    latent_dim: int
    rope_dim: int
    dtype: str
    page_size: int
    causal: bool

    @staticmethod
    def of(seed: int) -> Settings:
        number = seed // SEEDS_PER_SETTINGS
        rng = np.random.default_rng(number)
        latent_dim, rope_dim = STANDARD_DIMS[number % len(STANDARD_DIMS)]
        page_sizes = STANDARD_PAGE_SIZES if rng.random() < 0.7 else _UNUSUAL_PAGE_SIZES
        return Settings(
            latent_dim, rope_dim, "float16" if rng.random() < 0.3 else "bfloat16", int(rng.choice(page_sizes)),
            bool(rng.random() < 0.5),
        )  # fmt: skip

    @property
    def width(self) -> int:
        """Of a key."""
        return self.latent_dim + self.rope_dim


class WrongResultError(Exception):
    """A result is not what it should be; the text says how."""


class Trial:
    """Draws for one seed, arrays of a library, and comparisons.

    Attributes
    ----------
    seed, settings, library, rng
        As their names say; every draw comes from ``rng``, so that a seed gives the same trial everywhere.
    words
        What was drawn, for people who look at a failure.
    share
        The largest error so far, as a share of its bound.
    """

    def __init__(self, seed: int, library: ArrayLibrary) -> None:
        self.seed, self.library = seed, library
        self.settings = Settings.of(seed)
        self.rng = np.random.default_rng([seed, 1])
        self.words: dict[str, Any] = {}
        self.share = 0.0

    # Draws -----------------------------------------------------------------------------------------------------------

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, *options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def up_to(self, most: int, least: int = 1) -> int:
        """Small numbers as often as large ones: uniform in the logarithm."""
        return int(np.exp(self.rng.uniform(np.log(least), np.log(most + 1))))

    def length(self, most: int) -> int:
        """Tokens of a request: none, few, around the end of a tile, or any."""
        kind = self.rng.random()
        if kind < 0.1:
            return 0
        if kind < 0.4:
            return min(max(_TILE * int(self.rng.integers(1, 5)) + int(self.rng.integers(-1, 2)), 0), most)
        return int(self.rng.integers(1, most + 1))

    def heads(self) -> tuple[int, int]:
        """Query heads and kv heads."""
        kv_heads = self.pick(1, 1, 1, 1, 2, 4)
        return kv_heads * self.up_to(128 // kv_heads), kv_heads

    def values(self, shape: tuple[int, ...], dtype: str, factor: float = 1.0) -> Array:
        """Normal values: a piece of a fixed row of them."""
        count = int(np.prod(shape))
        pool = _pool(dtype, factor)
        start = int(self.rng.integers(pool.size - min(count, pool.size) + 1))
        if count > pool.size - start:
            return np.resize(pool[start:], shape)
        return pool[start : start + count].reshape(shape)

    def store(self, shape: tuple[int, ...], dtype: str, *, may_pad: bool = True) -> Array:
        """An array full of poison, perhaps a view of a larger one: wider rows, more of the second axis from the end."""
        padded = list(shape)
        if may_pad and self.chance(0.4):
            unit = _ROW_UNIT * 2 // numpy_dtype(dtype).itemsize
            padded[-1] += unit * int(self.rng.integers(0, 5))
            padded[0] += int(self.rng.integers(0, 3))
            if len(shape) > 2:
                padded[1] += int(self.rng.integers(0, 3))
        memory = np.full(int(np.prod(padded)) * numpy_dtype(dtype).itemsize, _POISON, np.uint8)
        whole = memory.view(numpy_dtype(dtype)).reshape(padded)
        return whole[tuple(slice(extent) for extent in shape)]

    def stored(self, values: Array) -> Array:
        """A copy of values in a store."""
        array = self.store(values.shape, str(values.dtype))
        array[...] = values
        return array

    def maybe_pair(self, packed: Array) -> Any:
        """The array, or its latent and rope columns apart."""
        latent = self.settings.latent_dim
        if self.settings.rope_dim == 0 or self.chance(0.7):
            return packed
        return self.stored(packed[..., :latent]), self.stored(packed[..., latent:])

    def upload(self, array: Any) -> Any:
        """On the library's device, with its strides; None stays None, a pair a pair."""
        if array is None or self.library is NUMPY:
            return array
        if isinstance(array, tuple):
            return tuple(map(self.upload, array))
        return _upload(array)

    def download(self, array: Any) -> Array:
        if self.library is NUMPY:
            return np.asarray(array)
        import cupy

        return np.asarray(cupy.asnumpy(array.view(f"u{array.dtype.itemsize}")).view(array.dtype))

    # Comparisons -----------------------------------------------------------------------------------------------------

    def compare_out(self, name: str, out: Array, exact: Array, dtype: str) -> None:
        """The relative Frobenius error of all of out, [..., d_v] of one request.

        Raises
        ------
        WrongResultError
            It is above the bound of the type.
        """
        error, size = (float(np.linalg.norm(part)) for part in (out.astype(np.float64) - exact, exact))
        self._note(name, error, OUT_BOUNDS.get(dtype, _FLOAT32_BOUND) * size)

    def compare_lse(self, name: str, lse: Array, exact: Array, bound: float = LSE_BOUNDS[EXACT]) -> None:
        """Errors of logarithms, in proportion where they are large; infinite ones are equal.

        Raises
        ------
        WrongResultError
            One is above the bound.
        """
        finite = np.isfinite(exact)
        if not np.array_equal(lse[~finite], exact[~finite].astype(lse.dtype)):
            raise WrongResultError(f"{name}: {lse[~finite][:4]} instead of {exact[~finite][:4]}")
        errors = np.abs(lse[finite] - exact[finite]) / (1 + np.abs(exact[finite]))
        self._note(name, float(errors.max(initial=0.0)), bound)

    def compare_equal(self, name: str, got: Array, exact: Array) -> None:
        """Bit by bit.

        Raises
        ------
        WrongResultError
            Any bit of any element differs.
        """
        wrong = np.flatnonzero(bits_of(got) != bits_of(exact))
        if wrong.size:
            raise WrongResultError(f"{name}: {wrong.size} of {got.size} elements differ, the first at {int(wrong[0])}")

    def _note(self, name: str, error: float, bound: float) -> None:
        if not error <= bound:  # also where it is no number
            raise WrongResultError(f"{name}: error {error:.3g}, bound {bound:.3g}")
        if bound > 0:
            self.share = max(self.share, error / bound)


def bits_of(array: Array) -> Array:
    """The elements as integers, in a row."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(f"u{flat.itemsize}")


def attention(
    q: Array, keys: Array, d_v: int, scale: float, visible: Sequence[int] | None = None
) -> tuple[Array, Array, Array]:
    """float64 out [tokens, heads, d_v], lse and largest scores [tokens, heads]; nothing shared with the package.

    Parameters
    ----------
    q, keys
        [tokens, heads, width] and [keys, width] in float64.
    visible
        How many leading keys each token sees; None: all.
    """
    tokens, heads, _ = q.shape
    out, lse = np.zeros((tokens, heads, d_v)), np.full((tokens, heads), -np.inf)
    logits = np.full((tokens, heads), -np.inf)
    for token in range(tokens):
        seen = keys[: len(keys) if visible is None else max(visible[token], 0)]
        if len(seen) == 0:
            continue
        scores = scale * (q[token] @ seen.T)
        logits[token] = scores.max(axis=1)
        weights = np.exp(scores - logits[token][:, None])
        total = weights.sum(axis=1)
        out[token] = weights @ seen[:, :d_v] / total[:, None]
        lse[token] = logits[token] + np.log(total)
    return out, lse, logits


def _upload(array: Array) -> Any:
    """The memory that a view spans, and the same view of it."""
    import cupy

    strides, itemsize = array.strides, array.itemsize
    span = sum((extent - 1) * step for extent, step in zip(array.shape, strides, strict=True)) + itemsize
    if array.size == 0:
        return cupy.empty(array.shape, np.uint8 if itemsize == 1 else f"u{itemsize}").view(array.dtype)
    memory = np.lib.stride_tricks.as_strided(array.view(np.uint8)[(0,) * (array.ndim - 1)][:1], (span,), (1,))
    on_device = cupy.asarray(memory)
    return cupy.ndarray(array.shape, array.dtype, on_device.data, strides=strides)


@functools.cache
def _pool(dtype: str, factor: float) -> Array:
    values = np.random.default_rng(0).standard_normal(_POOL_VALUES, np.float32) * np.float32(factor)
    return values.astype(numpy_dtype(dtype))
