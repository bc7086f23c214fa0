"""The arrays of a case to time, and how far a result is from float64.

torch makes them where it is there and sees the GPU (the peers take torch tensors), else CuPy; NumPy on the CPU. There
are enough copies of the cache for every timed call to find its own in device memory and not in the L2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ..lab.accuracy import measure_accuracy
from ..lab.build import deal_pages, make_values, store_cache, store_q
from ..lab.cases import Case
from ..lab.libraries import CUPY, NUMPY, ArrayLibrary, TorchLibrary
from ..lab.timing import graph_shape
from .grid import BenchCase

# From one of `Inputs.caches` to out and lse (None where a peer gives none).
Call = Callable[[Any], tuple[Any, Any]]


def choose_library(backend: str) -> ArrayLibrary:
    """The library for a backend, ``cuda`` or ``numpy``."""
    if backend == "numpy":
        return NUMPY
    try:
        import torch
    except ImportError:
        return CUPY
    return TorchLibrary() if torch.cuda.is_available() else CUPY


class Inputs:
    """Everything that a call on a case needs.

    Attributes
    ----------
    case : BenchCase
    spec : CaseSpec
        What the arrays are made from.
    q : array
        [batch, seqlen_q, h, d], or [total_q, h, d] when ragged.
    caches : list
        Copies with the same values: [num_pages, page_size, 1, d], or pairs (latent, rope).
    block_table : array
        [batch, pages of the longest] int32; 0 past a request's last page (not every peer takes another number there).
    cache_seqlens : array
        [batch] int32.
    cu_seqlens_q : array or None
        [batch + 1] int32 when ragged.
    stored_case : Case
        q and the first cache as the case stores them.
    calls : int
        Calls in a CUDA graph (1 on the CPU); call i reads ``caches[i % len(caches)]``.
    library : ArrayLibrary
    """

    def __init__(self, case: BenchCase, library: ArrayLibrary) -> None:
        self.case = case
        self.spec = spec = case.spec
        self.library = library
        self.calls, copies = (1, 1) if library is NUMPY else graph_shape(spec.cache_bytes)
        self._table = np.maximum(deal_pages(spec)[0], 0)
        self.block_table = library.upload(self._table)
        self.cache_seqlens = library.upload(spec.kv_lengths.astype(np.int32))
        self.cu_seqlens_q = library.upload(spec.q_starts.astype(np.int32)) if spec.ragged else None
        self.q, packed = make_values(spec, library)
        self.caches = store_cache(packed, spec, library, copies)
        self._packed_case = Case(
            q=self.q,
            kv_cache=packed,
            block_table=self.block_table,
            cache_seqlens=self.cache_seqlens,
            kv_lengths=spec.kv_lengths,
            q_lengths=spec.q_lengths,
            cu_seqlens_q=self.cu_seqlens_q,
            head_dim_v=spec.latent_dim,
            softmax_scale=spec.scale,
            causal=spec.causal,
            library=library,
        )
        self.stored_case = replace(self._packed_case, q=store_q(self.q, spec, library), kv_cache=self.caches[0])

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
        by_length = np.argsort(self.spec.kv_lengths, kind="stable")
        requests = sorted({int(by_length[0]), int(by_length[-1])})
        if self.library.name == "torch":
            return self._torch_errors(out, lse, requests)
        if lse is None:
            rows, heads = self.spec.q_shape[:-2], self.spec.num_heads_q
            blank = np.zeros((heads, *rows) if self.spec.ragged else (rows[0], heads, rows[1]), np.float32)
            return measure_accuracy(self._packed_case, out, blank, requests).out_error, 0.0
        accuracy = measure_accuracy(self._packed_case, out, lse, requests)
        return accuracy.out_error, accuracy.lse_error

    def _torch_errors(self, out: Any, lse: Any, requests: list[int]) -> tuple[float, float]:
        """The same on the GPU, whose float64 products are a hundred times those of the host."""
        from .torch_reference import attention64, relative_errors

        spec = self.spec
        worst = [0.0, 0.0]
        for request in requests:
            rows = slice(int(spec.q_starts[request]), int(spec.q_starts[request + 1]))
            if rows.start == rows.stop:
                continue  # without query tokens there is no result
            pages = self.library.upload(self._table[request, : spec.page_counts[request]]).long()
            keys = self._packed_case.kv_cache[pages].reshape(-1, spec.head_dim)[: spec.lengths[request]]
            index: Any = rows if spec.ragged else request
            exact = attention64(self.q[index], keys, spec.scale, spec.latent_dim, spec.causal)
            found_lse = None if lse is None else (lse[:, rows] if spec.ragged else lse[request])
            found = relative_errors((out[index], found_lse), exact)
            # numpy.maximum, unlike max, keeps a not-a-number.
            worst = [float(np.maximum(*pair)) for pair in zip(worst, found, strict=True)]
        return worst[0], worst[1]
