"""Pages and block tables for users who have no serving engine.

The bookkeeping (which page belongs to whom) is on the host, in NumPy; the tokens are in one array of pages on the CPU
or the GPU. A forked request shares its parent's pages, counted per page; whoever writes to a shared page first takes a
copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import view as arrays
from ..arrays.exchange import as_numpy
from ..arrays.frameworks import current_stream
from ..call.arguments import as_integer, check_output
from ..errors import InvalidArgumentError, MlaError
from ..gpu.device import require_backend, require_cuda
from .append import append_tokens

DTYPES = ("bfloat16", "float16")
DEVICES = ("cpu", "cuda")
NUM_HEADS_KV = 1  # MLA keeps one latent vector per token, shared by all heads
_UNUSED_PAGE = 0  # past the end of a request; a page that exists, for kernels that look ahead


class OutOfPagesError(MlaError, RuntimeError):
    """Not enough free pages. Nothing was changed: free or truncate a request and try again.

    Attributes
    ----------
    needed, free, total
        Pages that the call needs, pages that are free, pages of the cache.
    """

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(
            f"the call needs {needed} more pages, {free} of the cache's {total} are free: "
            "free or truncate requests, or make a cache with a larger num_pages"
        )
        self.needed = needed
        self.free = free
        self.total = total

    def __reduce__(self) -> tuple[type[OutOfPagesError], tuple[int, int, int]]:
        return type(self), (self.needed, self.free, self.total)


class OutOfRequestsError(MlaError, RuntimeError):
    """All ``max_requests`` places are taken. Nothing was changed."""

    def __init__(self, max_requests: int) -> None:
        super().__init__(
            f"all {max_requests} requests are in use: free one, or make a cache with a larger max_requests"
        )
        self.max_requests = max_requests

    def __reduce__(self) -> tuple[type[OutOfRequestsError], tuple[int]]:
        return type(self), (self.max_requests,)


@dataclass(frozen=True, slots=True)
class _PageCopy:
    """Copy-on-write of a request's last, partly filled page."""

    row: int
    page_index: int
    old: int
    new: int


@dataclass(frozen=True, slots=True)
class _AppendPlan:
    """What an append does, worked out before anything is changed."""

    rows: npt.NDArray[np.int64]
    new_lengths: npt.NDArray[np.int64]
    fresh_pages: list[int]
    copies: list[_PageCopy]
    slots: npt.NDArray[np.int64]


class PagedKVCache:
    """A paged MLA cache of one layer, with its page allocator.

    A page holds ``page_size`` tokens of ``latent_dim + rope_dim`` values. Requests are named by integers that are never
    used twice, so that a request that was freed is not mistaken for a later one.

    Work on the GPU goes to the stream given, or to the current stream of the new tokens' framework (CuPy's where there
    are none); a decode on another stream has to be ordered after it by the caller. Not safe for use by several threads
    at once.

    Parameters
    ----------
    num_pages
        Pages of the cache, shared by all requests.
    page_size
        Tokens per page.
    latent_dim, rope_dim
        Widths of the compressed KV vector and of the position part (may be 0), in elements.
    dtype
        ``"bfloat16"`` or ``"float16"``.
    device
        ``"cpu"`` (NumPy arrays) or ``"cuda"`` (CuPy arrays on CuPy's current device).
    max_requests
        Requests that may exist at once.
    max_pages_per_seq
        Width of the block table: a request holds at most ``max_pages_per_seq * page_size`` tokens.
        ``num_pages`` if not given.

    Raises
    ------
    InvalidArgumentError
        A size that is no positive integer, an unknown type or device.
    UnsupportedDeviceError
        ``device`` is not what the setting CUPY_MLA_BACKEND asks for, or there is no Hopper GPU.

    Examples
    --------
    >>> cache = PagedKVCache(num_pages=8, page_size=4, dtype="float16")
    >>> first = cache.allocate()
    >>> cache.append([first], np.zeros((6, 576), np.float16))
    >>> second = cache.fork(first)
    >>> cache.cache_seqlens([first, second])
    array([6, 6], dtype=int32)
    >>> cache.num_free_pages
    6
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int = 64,
        latent_dim: int = 512,
        rope_dim: int = 64,
        dtype: str = "bfloat16",
        device: str = "cpu",
        max_requests: int = 256,
        max_pages_per_seq: int | None = None,
    ) -> None:
        num_pages = _size(num_pages, "num_pages")
        page_size = _size(page_size, "page_size")
        latent_dim = _size(latent_dim, "latent_dim")
        rope_dim = _size(rope_dim, "rope_dim", least=0)
        max_requests = _size(max_requests, "max_requests")
        max_pages = num_pages if max_pages_per_seq is None else _size(max_pages_per_seq, "max_pages_per_seq")
        if dtype not in DTYPES:
            raise InvalidArgumentError("dtype", "one of " + ", ".join(DTYPES), repr(dtype))
        if device not in DEVICES:
            raise InvalidArgumentError("device", "one of " + ", ".join(DEVICES), repr(device))
        self.num_pages = num_pages
        self.page_size = page_size
        self.latent_dim = latent_dim
        self.rope_dim = rope_dim
        self.dtype = dtype
        self.device = device
        self.max_requests = max_requests
        self.max_pages_per_seq = max_pages
        self._device_id, self._kv_cache = self._make_pages()
        # Reversed, because pages are taken from the end: page 0 is used first.
        self._free_pages = list(range(num_pages - 1, -1, -1))
        self._free_rows = list(range(max_requests - 1, -1, -1))
        self._references = np.zeros(num_pages, np.int32)
        self._table = np.full((max_requests, max_pages), _UNUSED_PAGE, np.int32)
        self._lengths = np.zeros(max_requests, np.int64)
        self._rows: dict[int, int] = {}
        self._next_request = 0

    def __repr__(self) -> str:
        return (
            f"PagedKVCache({self.dtype} on {self.device}, {self.latent_dim} + {self.rope_dim}, "
            f"{self.num_free_pages} of {self.num_pages} pages of {self.page_size} tokens free, "
            f"{len(self._rows)} of {self.max_requests} requests)"
        )

    @property
    def kv_cache(self) -> Any:
        """The pages, [num_pages, page_size, 1, latent_dim + rope_dim]: ``kv_cache`` of ``mla_decode``."""
        return self._kv_cache

    @property
    def num_free_pages(self) -> int:
        """Pages that no request holds."""
        return len(self._free_pages)

    @property
    def requests(self) -> tuple[int, ...]:
        """The requests that exist, oldest first."""
        return tuple(self._rows)

    def length(self, request: int) -> int:
        """Tokens of a request.

        Raises
        ------
        InvalidArgumentError
            There is no such request.
        """
        return int(self._lengths[self._row(request, "request")])

    def allocate(self) -> int:
        """A new, empty request. It takes no page until tokens are appended.

        Raises
        ------
        OutOfRequestsError
            ``max_requests`` exist already.
        """
        if not self._free_rows:
            raise OutOfRequestsError(self.max_requests)
        request = self._next_request
        self._next_request += 1
        self._rows[request] = self._free_rows.pop()
        return request

    def fork(self, request: int, num_tokens: int | None = None) -> int:
        """A new request that starts with the first ``num_tokens`` tokens of another (all of them if not given).

        The pages are shared, also a partly filled last one: nothing is copied until one of the two writes to it.

        Raises
        ------
        InvalidArgumentError
            There is no such request, or it has fewer tokens.
        OutOfRequestsError
            ``max_requests`` exist already.
        """
        row = self._row(request, "request")
        length = self._shorter_length(row, request, num_tokens)
        child = self.allocate()
        child_row = self._rows[child]
        pages = self._table[row, : self._pages_for(length)]
        self._table[child_row, : pages.size] = pages
        self._references[pages] += 1
        self._lengths[child_row] = length
        return child

    def truncate(self, request: int, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens of a request, e.g. after drafted tokens were rejected.

        Raises
        ------
        InvalidArgumentError
            There is no such request, or it has fewer tokens.
        """
        row = self._row(request, "request")
        length = self._shorter_length(row, request, num_tokens)
        first, last = self._pages_for(length), self._pages_for(int(self._lengths[row]))
        self._release(self._table[row, first:last])
        self._table[row, first:last] = _UNUSED_PAGE
        self._lengths[row] = length

    def free(self, request: int) -> None:
        """Give up a request; its pages become free when no fork holds them.

        Raises
        ------
        InvalidArgumentError
            There is no such request (any more).
        """
        self.truncate(request, 0)
        self._free_rows.append(self._rows.pop(request))

    def append(
        self,
        requests: Sequence[int],
        kv_new: Any,
        counts: Sequence[int] | None = None,
        *,
        stream: int | None = None,
    ) -> None:
        """Append new tokens to the ends of requests; one kernel launch on the GPU.

        Parameters
        ----------
        requests
            The requests, each at most once.
        kv_new
            [num_tokens, latent_dim + rope_dim] or the pair (latent [num_tokens, latent_dim],
            rope [num_tokens, rope_dim]), of the cache's type and on its device, the tokens of a request together and
            the requests in the order given. A head dimension of 1 in the middle is taken too.
        counts
            New tokens per request; if not given, the same number for each.
        stream
            Raw CUDA stream; the current stream of ``kv_new``'s framework if not given.

        Raises
        ------
        InvalidArgumentError
            An unknown or repeated request, counts that do not add up, a request that would get longer than
            ``max_pages_per_seq`` pages, or an array of the wrong shape, type or device.
        OutOfPagesError
            Too few free pages. In each case the requests are as they were.
        """
        first = kv_new[0] if isinstance(kv_new, (tuple, list)) and kv_new else kv_new
        view = arrays.view(first, "kv_new", stream)
        if view.ndim < 2:
            raise InvalidArgumentError("kv_new", "shape [num_tokens, d]", str(view.shape))
        if first is not kv_new and view.shape[-1] != self.latent_dim:
            raise InvalidArgumentError("kv_new[0]", f"{self.latent_dim} latent columns", str(view.shape[-1]))
        rows = self._distinct_rows(requests)
        plan = self._plan_append(rows, requests, self._token_counts(counts, len(requests), view.shape[0]))
        if view.device == "cuda" and stream is None:
            stream = current_stream(first, view.device_id)
        with self._on_stream(stream):
            # Copies go into pages that nobody holds yet, so a refusal after them leaves every request as it was.
            for copy in plan.copies:
                self._pages[copy.new] = self._pages[copy.old]
            append_tokens(self._kv_cache, kv_new, self._upload(plan.slots, stream), stream=stream)
        self._commit(plan)

    def block_table(self, requests: Sequence[int] | None = None, *, out: Any = None, stream: int | None = None) -> Any:
        """Pages of a batch of requests, int32 [batch, max_pages_per_seq]: ``block_table`` of ``mla_decode``.

        Parameters
        ----------
        requests
            The batch, in this order; all requests, oldest first, if not given.
        out
            Contiguous int32 array on the cache's device to write into (e.g. the one a CUDA graph reads).
        stream
            Raw CUDA stream; if not given, the current stream of ``out``'s framework, or CuPy's.

        Raises
        ------
        InvalidArgumentError
            There is no such request, or ``out`` does not fit.
        """
        return self._hand_out(self._table[self._batch_rows(requests)], out, stream)

    def cache_seqlens(
        self, requests: Sequence[int] | None = None, *, out: Any = None, stream: int | None = None
    ) -> Any:
        """Lengths of a batch of requests, int32 [batch]: ``cache_seqlens`` of ``mla_decode``.

        Parameters and errors as for ``block_table``.
        """
        return self._hand_out(self._lengths[self._batch_rows(requests)].astype(np.int32), out, stream)

    # The pages and the device ----------------------------------------------------------------------------------------

    def _make_pages(self) -> tuple[int, Any]:
        """Device number and the uninitialised pages."""
        shape = (self.num_pages, self.page_size, NUM_HEADS_KV, self.latent_dim + self.rope_dim)
        element = np.dtype(np.float16)
        if self.dtype == "bfloat16":
            import ml_dtypes

            element = np.dtype(ml_dtypes.bfloat16)
        if self.device == "cpu":
            require_backend("cpu", 0, "the cache")
            return 0, np.empty(shape, element)
        require_cuda()
        import cupy

        device_id = int(cupy.cuda.runtime.getDevice())
        require_backend("cuda", device_id, "the cache")
        return device_id, cupy.empty(shape, np.uint16).view(element)

    @property
    def _pages(self) -> Any:
        # As plain 16-bit integers a page is copied as bytes, whatever the type.
        return self._kv_cache.view(np.uint16)

    @contextmanager
    def _on_stream(self, stream: int | None) -> Iterator[None]:
        """CuPy allocates and copies on this stream: memory given back is then reused in stream order."""
        if self.device == "cpu":
            yield
            return
        import cupy

        with cupy.cuda.Device(self._device_id):
            if stream is None:
                yield
            else:
                with cupy.cuda.ExternalStream(stream, self._device_id):
                    yield

    def _upload(self, host: npt.NDArray[Any], stream: int | None) -> Any:
        """A NumPy array on the cache's device. Called inside ``_on_stream``."""
        if self.device == "cpu":
            return host
        import cupy

        result = cupy.empty(host.shape, host.dtype)
        self._copy_to_device(host, result.data.ptr, stream)
        return result

    def _copy_to_device(self, host: npt.NDArray[Any], pointer: int, stream: int | None) -> None:
        import cupy

        runtime = cupy.cuda.runtime
        raw_stream = cupy.cuda.get_current_stream().ptr if stream is None else stream
        # From pageable memory the call returns when the source has been read, so the source may go away.
        if host.nbytes > 0:
            runtime.memcpyAsync(pointer, host.ctypes.data, host.nbytes, runtime.memcpyHostToDevice, raw_stream)

    def _hand_out(self, host: npt.NDArray[np.int32], out: Any, stream: int | None) -> Any:
        if out is None:
            with self._on_stream(stream):
                return self._upload(host, stream)
        view = arrays.view(out, "out", stream)
        check_output(view, "out", host.shape, "int32", (self.device, self._device_id))
        contiguous = tuple(stride // host.itemsize for stride in host.strides)
        # The stride of a dimension of one element means nothing.
        if any(size > 1 and a != b for size, a, b in zip(view.shape, view.strides, contiguous, strict=True)):
            raise InvalidArgumentError("out", "a contiguous array", f"strides {view.strides}")
        if self.device == "cpu":
            as_numpy(view)[...] = host
        else:
            used = current_stream(out, view.device_id) if stream is None else stream
            self._copy_to_device(host, view.pointer, used)
        return out

    # The bookkeeping -------------------------------------------------------------------------------------------------

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _row(self, request: int, argument: str) -> int:
        try:
            return self._rows[request]
        except (KeyError, TypeError):  # also of what cannot be a key
            raise InvalidArgumentError(argument, "a request that exists", repr(request)) from None

    def _batch_rows(self, requests: Sequence[int] | None) -> npt.NDArray[np.int64]:
        chosen = self._rows if requests is None else requests
        return np.array([self._row(request, "requests") for request in chosen], np.int64)

    def _distinct_rows(self, requests: Sequence[int]) -> npt.NDArray[np.int64]:
        rows = self._batch_rows(requests)
        if len(set(requests)) != len(requests):
            raise InvalidArgumentError("requests", "each request at most once", str(list(requests)))
        return rows

    def _shorter_length(self, row: int, request: int, num_tokens: int | None) -> int:
        length = int(self._lengths[row])
        if num_tokens is None:
            return length
        num_tokens = as_integer(num_tokens, "num_tokens")
        if not 0 <= num_tokens <= length:
            raise InvalidArgumentError("num_tokens", f"0 to {length}, the length of request {request}", str(num_tokens))
        return num_tokens

    def _release(self, pages: npt.NDArray[np.int32]) -> None:
        """One holder fewer for each page (a request holds a page at most once)."""
        self._references[pages] -= 1
        self._free_pages.extend(pages[self._references[pages] == 0].tolist())

    @staticmethod
    def _token_counts(counts: Sequence[int] | None, batch: int, num_tokens: int) -> npt.NDArray[np.int64]:
        if counts is None:
            if num_tokens % max(1, batch) != 0 or (batch == 0 and num_tokens > 0):
                raise InvalidArgumentError(
                    "kv_new", f"a multiple of {batch} tokens, one per request (or counts given)", str(num_tokens)
                )
            return np.full(batch, num_tokens // max(1, batch), np.int64)
        numbers = [as_integer(count, "counts") for count in counts]
        if len(numbers) != batch or any(count < 0 for count in numbers) or sum(numbers) != num_tokens:
            raise InvalidArgumentError(
                "counts", f"{batch} non-negative numbers that add up to {num_tokens} tokens", str(numbers)
            )
        return np.array(numbers, np.int64)

    def _plan_append(
        self, rows: npt.NDArray[np.int64], requests: Sequence[int], counts: npt.NDArray[np.int64]
    ) -> _AppendPlan:
        lengths = self._lengths[rows]
        new_lengths = lengths + counts
        capacity = self.max_pages_per_seq * self.page_size
        for index in np.flatnonzero(new_lengths > capacity)[:1]:
            raise InvalidArgumentError(
                "kv_new",
                f"at most {capacity} tokens in a request (max_pages_per_seq * page_size)",
                f"{new_lengths[index]} in request {requests[index]}",
            )
        pages_before = -(-lengths // self.page_size)
        pages_after = -(-new_lengths // self.page_size)
        shared = self._shared_last_pages(rows, lengths, counts)
        num_fresh = int((pages_after - pages_before).sum())
        needed = num_fresh + len(shared)
        if needed > len(self._free_pages):
            raise OutOfPagesError(needed, len(self._free_pages), self.num_pages)
        taken = self._free_pages[len(self._free_pages) - needed :][::-1]
        fresh_pages, copy_pages = taken[:num_fresh], taken[num_fresh:]

        # Entries past a request's end may hold anything: writing them before the append is certain harms nobody.
        begin = 0
        for index in np.flatnonzero(pages_after > pages_before):
            first, last = int(pages_before[index]), int(pages_after[index])
            self._table[rows[index], first:last] = fresh_pages[begin : begin + last - first]
            begin += last - first
        last_index = np.minimum(lengths // self.page_size, self.max_pages_per_seq - 1)
        last_page = self._table[rows, last_index].astype(np.int64)
        copies = []
        for index, new in zip(shared, copy_pages, strict=True):
            copies.append(_PageCopy(int(rows[index]), int(last_index[index]), int(last_page[index]), new))
            last_page[index] = new
        slots = self._slots(rows, lengths, counts, last_index, last_page)
        return _AppendPlan(rows, new_lengths, fresh_pages, copies, slots)

    def _shared_last_pages(
        self, rows: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
    ) -> list[int]:
        """Which requests (as indices into ``rows``) need a copy of their partly filled last page.

        Of several holders of one page that are appended to together, the last that is left writes in place.
        """
        partial = np.flatnonzero((lengths % self.page_size != 0) & (counts > 0))
        pages = self._table[rows[partial], lengths[partial] // self.page_size]
        copied: list[int] = []
        holders: dict[int, int] = {}
        several = self._references[pages] > 1
        for index, page in zip(partial[several].tolist(), pages[several].tolist(), strict=True):
            left = holders.get(page, int(self._references[page]))
            if left > 1:
                copied.append(index)
                holders[page] = left - 1
        return copied

    def _slots(
        self,
        rows: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        last_index: npt.NDArray[np.int64],
        last_page: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.int64]:
        """Slot (page * page_size + offset) of every new token, int64 [num_tokens]."""
        request = np.repeat(np.arange(rows.size), counts)
        first_token = np.cumsum(counts) - counts
        position = np.arange(request.size) - first_token[request] + lengths[request]
        page_index = position // self.page_size
        page = np.where(page_index == last_index[request], last_page[request], self._table[rows[request], page_index])
        return page * self.page_size + position % self.page_size

    def _commit(self, plan: _AppendPlan) -> None:
        needed = len(plan.fresh_pages) + len(plan.copies)
        del self._free_pages[len(self._free_pages) - needed :]
        self._references[plan.fresh_pages] = 1
        for copy in plan.copies:
            self._table[copy.row, copy.page_index] = copy.new
            self._references[copy.old] -= 1
            self._references[copy.new] = 1
        self._lengths[plan.rows] = plan.new_lengths


def _size(value: Any, name: str, least: int = 1) -> int:
    size = as_integer(value, name)
    if size < least:
        raise InvalidArgumentError(name, f"at least {least}", str(size))
    return size
