"""The arrays of a case, made where they are used, and how far a result is from float64.

torch makes them where it is there and sees the GPU (the peers take torch tensors), else CuPy; NumPy on the CPU. Values
are normal, pages are in random order, and there are enough copies of the cache for every timed call to find its own in
device memory and not in the L2.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ..lab.accuracy import measure_accuracy
from ..lab.case_arrays import DTYPES, Array, random_normal, to_device
from ..lab.cases import Case, page_table
from ..lab.timing import graph_shape
from .grid import BenchCase

LAYERS_IN_POOL = 2  # of storage "strided": the pages of so many layers lie side by side
_Q_SEED, _CACHE_SEED, _PAGE_SEED = 0, 1, 2


class ArrayLibrary(Protocol):
    """What is needed of an array library, all on one device."""

    name: str

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        """A contiguous array of normal values."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A contiguous array of anything."""

    def assign(self, target: Any, source: Any) -> None:
        """``target[...] = source`` with broadcasting."""

    def upload(self, array: Array) -> Any:
        """A copy of a host array of integers."""


class NumpyLibrary:
    """Arrays in host memory."""

    name = "numpy"

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        return random_normal(shape, dtype, seed, "numpy")

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return np.empty(shape, DTYPES[dtype])

    def assign(self, target: Any, source: Any) -> None:
        target[...] = source

    def upload(self, array: Array) -> Any:
        return array


class CupyLibrary:
    """CuPy arrays; 16-bit values are moved as bits, CuPy's own bfloat16 conversions are young."""

    name = "cupy"

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        return random_normal(shape, dtype, seed, "cuda")

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        import cupy

        return cupy.empty(shape, np.uint16).view(DTYPES[dtype])

    def assign(self, target: Any, source: Any) -> None:
        target.view(np.uint16)[...] = source.view(np.uint16)

    def upload(self, array: Array) -> Any:
        return to_device(array)


class TorchLibrary:
    """torch tensors on its current CUDA device, or another one."""

    name = "torch"

    def __init__(self, device: str = "cuda") -> None:
        self._device = device

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        import torch

        generator = torch.Generator(self._device).manual_seed(seed)
        return self.empty(shape, dtype).normal_(generator=generator)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)

    def assign(self, target: Any, source: Any) -> None:
        target.copy_(source)

    def upload(self, array: Array) -> Any:
        import torch

        return torch.tensor(array, device=self._device)


def choose_library(backend: str) -> ArrayLibrary:
    """The library for a backend, ``cuda`` or ``numpy``."""
    if backend == "numpy":
        return NumpyLibrary()
    try:
        import torch
    except ImportError:
        return CupyLibrary()
    return TorchLibrary() if torch.cuda.is_available() else CupyLibrary()


class Inputs:
    """Everything that a call on a case needs.

    Attributes
    ----------
    case : BenchCase
    q : array
        [batch, seqlen_q, h, d], or [total_q, h, d] when ragged.
    q_parts : (array, array) or None
        Contiguous copies of q's latent and rope part, for storage ``split``.
    caches : list
        Copies with the same values: [num_pages, page_size, 1, d], or pairs (latent, rope) for storage ``split``.
    block_table : array
        [batch, pages of the longest] int32; 0 past a request's last page (not every peer takes another number there).
    cache_seqlens : array
        [batch] int32.
    cu_seqlens_q : array or None
        [batch + 1] int32 when ragged.
    lengths : ndarray
        [batch] int64, the lengths on the host.
    softmax_scale : float
    head_dim_v : int
    calls : int
        Calls in a CUDA graph (1 on the CPU); call i reads ``caches[i % len(caches)]``.
    library : ArrayLibrary
    """

    def __init__(self, case: BenchCase, library: ArrayLibrary) -> None:
        self.case = case
        self.library = library
        self.lengths = case.kv_lengths
        self.softmax_scale = case.softmax_scale
        self.head_dim_v = case.latent_dim
        self.calls, copies = (1, 1) if library.name == "numpy" else graph_shape(case.cache_bytes)
        pages = np.random.default_rng(_PAGE_SEED).permutation(case.cache_shape[0])
        self._table = np.maximum(page_table(case.page_counts, pages), 0)
        self.block_table = library.upload(self._table)
        self.cache_seqlens = library.upload(self.lengths.astype(np.int32))
        self._starts = np.concatenate([[0], np.cumsum(case.q_lengths)]).astype(np.int32)
        self.cu_seqlens_q = None if case.ragged is None else library.upload(self._starts)
        self.q = library.normal(case.q_shape, case.dtype, _Q_SEED)
        self.q_parts = self._split(self.q, 1)[0] if case.storage == "split" else None
        self._packed = library.normal(case.cache_shape, case.dtype, _CACHE_SEED)
        self.caches = self._make_caches(copies)

    def _make_caches(self, copies: int) -> list[Any]:
        case, library = self.case, self.library
        if case.storage == "split":
            return self._split(self._packed, copies)
        if case.storage == "strided":
            num_pages, *page_shape = case.cache_shape
            pool = library.empty((copies, num_pages, LAYERS_IN_POOL, *page_shape), case.dtype)
            views = [pool[copy][:, 0] for copy in range(copies)]
            for cache in views:
                library.assign(cache, self._packed)
            return views
        others = library.empty((copies - 1, *case.cache_shape), case.dtype)
        if copies > 1:
            library.assign(others, self._packed)
        return [self._packed, *(others[copy] for copy in range(copies - 1))]

    def _split(self, packed: Any, copies: int) -> list[Any]:
        """Pairs (latent, rope) with the values of a packed array."""
        latent_dim = self.case.latent_dim
        parts = []
        for columns in (slice(0, latent_dim), slice(latent_dim, None)):
            source = packed[..., columns]
            pool = self.library.empty((copies, *source.shape), self.case.dtype)
            self.library.assign(pool, source)
            parts.append(pool)
        return [(parts[0][copy], parts[1][copy]) for copy in range(copies)]

    def errors(self, out: Any, lse: Any = None) -> tuple[float, float]:
        """How far a result is from float64, over the shortest and the longest request.

        Parameters
        ----------
        out, lse
            As ``mla_decode`` returns them, of the library that made q; None: the lse is not compared.

        Returns
        -------
        Relative Frobenius error of out, and largest ``|lse - lse64| / (1 + |lse64|)``, each of the worst request.
        """
        by_length = np.argsort(self.lengths, kind="stable")
        requests = sorted({int(by_length[0]), int(by_length[-1])})
        if self.library.name == "torch":
            return self._torch_errors(out, lse, requests)
        if lse is None:
            shape = self.case.q_shape[:-1]
            blank = np.zeros(
                shape[::-1] if self.case.ragged is not None else (shape[0], shape[2], shape[1]), np.float32
            )
            return measure_accuracy(self._packed_case(), out, blank, requests).out_error, 0.0
        accuracy = measure_accuracy(self._packed_case(), out, lse, requests)
        return accuracy.out_error, accuracy.lse_error

    def _packed_case(self) -> Case:
        return Case(
            q=self.q,
            kv_cache=self._packed,
            block_table=self.block_table,
            cache_seqlens=self.cache_seqlens,
            kv_lengths=self.lengths,
            q_lengths=self.case.q_lengths,
            cu_seqlens_q=self.cu_seqlens_q,
            head_dim_v=self.head_dim_v,
            softmax_scale=self.softmax_scale,
            causal=self.case.causal,
        )

    def _torch_errors(self, out: Any, lse: Any, requests: list[int]) -> tuple[float, float]:
        """The same on the GPU, whose float64 products are a hundred times those of the host."""
        from .torch_reference import attention64, relative_errors

        worst = [0.0, 0.0]
        for request in requests:
            rows = slice(int(self._starts[request]), int(self._starts[request + 1]))
            if rows.start == rows.stop:
                continue  # without query tokens there is no result
            pages = self.library.upload(self._table[request, : self.case.page_counts[request]]).long()
            keys = self._packed[pages].reshape(-1, self.case.head_dim)[: int(self.lengths[request])]
            ragged = self.case.ragged is not None
            exact = attention64(
                self.q[rows] if ragged else self.q[request], keys, self.softmax_scale, self.head_dim_v, self.case.causal
            )
            found_lse = None if lse is None else (lse[:, rows] if ragged else lse[request])
            found = relative_errors((out[rows] if ragged else out[request], found_lse), exact)
            # numpy.maximum, unlike max, keeps a not-a-number.
            worst = [float(np.maximum(*pair)) for pair in zip(worst, found, strict=True)]
        return worst[0], worst[1]
