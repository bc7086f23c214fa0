"""The arrays of a case to time, and how far a result is from float64.

torch makes them where it is there and sees the GPU (the peers take torch tensors), else CuPy; NumPy on the CPU. There
are enough copies of the cache for every timed call to find its own in device memory and not in the L2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..call.options import AUTO, FP8
from ..decode.rounded_queries import round_queries
from ..lab.accuracy import choose_requests, measure_accuracy
from ..lab.build import deal_pages, dense_case, make_values, sparse_case, store_cache, store_q
from ..lab.cases import Case
from ..lab.libraries import CUPY, NUMPY, ArrayLibrary, TorchLibrary
from ..lab.sparse_cases import ChosenOf, SparseCase
from ..lab.spec import KV_SCALE, CaseSpec
from ..lab.timing import graph_shape
from .grid import BenchCase

REQUESTS_COMPARED = 2  # with float64: the longest and the shortest

# From one of `Inputs.caches` to out and lse (None where a peer gives none), and what else a function returns.
Call = Callable[[Any], tuple[Any, ...]]


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
        [batch, seqlen_q, h, d], or [total_q, h, d] when ragged or of prefill.
    caches : list
        Copies with the same values: [num_pages, page_size, 1, width], or pairs (latent, rope); of a case with two
        caches, pairs of the two.
    block_table : array or None
        [batch, pages of the longest] int32; 0 past a request's last page (not every peer takes another number there).
        None with ``topk``, as the next two.
    cache_seqlens : array or None
        [batch] int32.
    cu_seqlens_q : array or None
        [batch + 1] int32 when ragged.
    indices : array or None
        With ``topk``: [batch, seqlen_q, topk] int32, of prefill [s_q, topk]; -1 where there is no further token.
    stored_case : Case or SparseCase
        q and the first cache as the case stores them.
    calls : int
        Calls in a CUDA graph (1 on the CPU); call i reads ``caches[i % len(caches)]``.
    library : ArrayLibrary
    """

    def __init__(self, case: BenchCase, library: ArrayLibrary) -> None:
        self.case = case
        self.spec = spec = case.spec
        self.library = library
        read_bytes = spec.cache_bytes if spec.topk is None else spec.work.bytes
        self.calls, copies = (1, 1) if library is NUMPY else graph_shape(read_bytes)
        table, unused = deal_pages(spec)
        self._table = np.maximum(table, 0)
        self.q, self._packed = make_values(spec, library)
        self.caches = store_cache(self._packed, spec, library, copies)
        self.block_table: Any = None
        self.cache_seqlens: Any = None
        self.cu_seqlens_q: Any = None
        self.indices: Any = None
        self.stored_case: Case | SparseCase
        stored = store_q(self.q, spec, library), self.caches[0]
        if spec.topk is None:
            self.stored_case = dense = dense_case(spec, *stored, self._table, library)
            self.block_table, self.cache_seqlens = dense.block_table, dense.cache_seqlens
            self.cu_seqlens_q = dense.cu_seqlens_q
        else:
            self.stored_case = sparse = sparse_case(spec, *stored, self._table, unused, library)
            self.indices = sparse.indices
        if spec.extra is not None:
            second = self.stored_case.cold[1]
            self.caches = list(zip(self.caches, store_cache(second, spec.extra, library, copies), strict=True))

    def errors(self, out: Any, lse: Any = None, *, as_rounded: bool = False) -> tuple[float, float]:
        """How far a result is from float64, over the shortest and the longest request (of prefill, query token).

        Parameters
        ----------
        out, lse
            As the function of the case returns them, of the library that made q; None: the lse is not compared.
        as_rounded
            Of a case that computes "fp8": from float64 on the queries as our kernels round them.

        Returns
        -------
        Relative Frobenius error of out, and largest ``|lse - lse64| / (1 + |lse64|)``, each of the worst request.
        """
        requests = choose_requests(self.stored_case, REQUESTS_COMPARED)
        if self.library.name == "torch":
            return self._torch_errors(out, lse, requests, as_rounded)
        stored = self.stored_case.cold
        packed = replace(self.stored_case, q=self.q).with_cold(
            self._packed if self.spec.extra is None else (self._packed, stored[1])
        )
        if isinstance(packed, Case) and not as_rounded:
            packed = replace(packed, compute=AUTO)
        if lse is None:
            *rows, heads, _ = self.q.shape
            by_token = self.spec.ragged or self.case.prefill
            shape = (*rows, heads) if self.case.prefill else (heads, *rows) if by_token else (rows[0], heads, rows[1])
            return measure_accuracy(packed, out, np.zeros(shape, np.float32), requests).out_error, 0.0
        accuracy = measure_accuracy(packed, out, lse, requests)
        return accuracy.out_error, accuracy.lse_error

    def _torch_errors(self, out: Any, lse: Any, requests: list[int], as_rounded: bool) -> tuple[float, float]:
        """The same on the GPU, whose float64 products are a hundred times those of the host."""
        from .torch_reference import attention64, relative_errors

        spec = self.spec
        worst = [0.0, 0.0]
        places = self._dense_places(requests) if spec.topk is None else self._sparse_places(requests)
        for rows, lse_rows, keys in places:
            found_lse = None if lse is None else lse[lse_rows]
            q = self._rounded(self.q[rows]) if as_rounded and self.case.compute == FP8 else self.q[rows]
            sinks = getattr(self.stored_case, "attn_sink", None)
            exact = attention64(q, keys, spec.scale, spec.latent_dim, spec.causal, sinks)
            found = relative_errors((out[rows], found_lse), exact)
            # numpy.maximum, unlike max, keeps a not-a-number.
            worst = [float(np.maximum(*pair)) for pair in zip(worst, found, strict=True)]
        return worst[0], worst[1]

    def _rounded(self, q: Any) -> Any:
        """Queries as ``compute="fp8"`` takes them, in float32."""
        return self.library.upload(round_queries([self.library.download(q).astype(np.float32)])[0])

    def _dense_places(self, requests: list[int]) -> Iterator[tuple[Any, Any, Any]]:
        """Of each request that has query tokens: where they are in q and out, and in lse; its keys."""
        spec = self.spec
        for request in requests:
            rows = slice(int(spec.q_starts[request]), int(spec.q_starts[request + 1]))
            if rows.start == rows.stop:
                continue  # without query tokens there is no result
            tokens = np.arange(spec.lengths[request])
            slots = self._table[request, tokens // spec.page_size].astype(np.int64) * spec.page_size
            place: Any = (rows, (slice(None), rows)) if spec.ragged else (request, request)
            yield *place, self._keys(spec, self._packed, slots + tokens % spec.page_size)

    def _sparse_places(self, requests: list[int]) -> Iterator[tuple[Any, Any, Any]]:
        """The same of each query token."""
        for request in requests:
            for token in range(1 if self.case.prefill else self.case.seqlen_q):
                one = slice(token, token + 1)
                place: Any = ((request, one), (request, slice(None), one))
                if self.case.prefill:
                    place = (slice(request, request + 1), (request, slice(None), None))
                yield *place, self._chosen_keys(request, token)

    def _chosen_keys(self, request: int, token: int) -> Any:
        """[n, d]: what a query token attends to, of both caches."""
        case = self.stored_case
        assert isinstance(case, SparseCase)
        lists: list[tuple[CaseSpec, Any, SparseCase | ChosenOf]] = [(self.spec, self._packed, case)]
        if self.spec.extra is not None and case.extra is not None:
            lists.append((self.spec.extra, case.extra.kv_cache, case.extra))
        keys = []
        for spec, packed, chosen in lists:
            slots = self.library.download(chosen.indices[request]).reshape(-1, chosen.indices.shape[-1])[token]
            if chosen.topk_length is not None:
                lengths = self.library.download(chosen.topk_length[request]).reshape(-1)
                slots = slots[: int(lengths[min(token, len(lengths) - 1)])]
            keys.append(self._keys(spec, packed, slots[slots >= 0].astype(np.int64)))
        return keys[0] if len(keys) == 1 else self._join(keys)

    @staticmethod
    def _join(keys: list[Any]) -> Any:
        import torch

        return torch.cat([part.to(torch.float64) for part in keys])

    def _keys(self, spec: CaseSpec, packed: Any, slots: npt.NDArray[np.int64]) -> Any:
        """[n, d]: the values of tokens of a cache."""
        layout = spec.cache_layout
        pages, places = np.unique(slots // spec.page_size, return_inverse=True)
        if layout.dtype == spec.dtype:
            values = packed[self.library.upload(pages)]
        else:
            scale = KV_SCALE if layout.needs_scale else None
            stored = layout.with_page_starts(self.library.take_pages(packed, pages))
            values = self.library.upload(layout.dequantise(stored, scale))
        rows = places.reshape(-1) * spec.page_size + slots % spec.page_size
        return values.reshape(-1, spec.head_dim)[self.library.upload(rows)]
