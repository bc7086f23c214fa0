"""Pages and block tables for users who have no serving engine.

The bookkeeping (which page belongs to whom) is on the host; the tokens are in one array of pages on the CPU or the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import view as arrays
from ..arrays.capture import is_captured
from ..arrays.dtypes import numpy_dtype
from ..arrays.exchange import as_numpy
from ..arrays.frameworks import CPU, CUDA, current_stream
from ..call.arguments import as_integer, check_output
from ..errors import InvalidArgumentError
from ..gpu.device import require_backend, require_cuda
from ..layouts import BF16, DENSE_LAYOUTS, CacheLayout, find_layout
from .allocator import PageAllocator
from .append import append_tokens

NUM_HEADS_KV = 1  # MLA keeps one latent vector per token, shared by all heads


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
        ``"bfloat16"`` (if neither it nor ``layout`` is given) or ``"float16"``: the dense layout of that type.
    device
        ``"cpu"`` (NumPy arrays) or ``"cuda"`` (CuPy arrays on CuPy's current device).
    max_requests
        Requests that may exist at once.
    max_pages_per_seq
        Width of the block table: a request holds at most ``max_pages_per_seq * page_size`` tokens.
        ``num_pages`` if not given.
    layout
        How tokens are stored, by name or as an object of `cupy_mla.layouts`: ``"bf16"`` or ``"fp16"``. Instead of
        ``dtype``.

    Raises
    ------
    InvalidArgumentError
        A size that is no positive integer, an unknown type, layout or device, a layout that no kernel appends to, or a
        layout beside a type.
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
        dtype: str | None = None,
        device: str = "cpu",
        max_requests: int = 256,
        max_pages_per_seq: int | None = None,
        *,
        layout: CacheLayout | str | None = None,
    ) -> None:
        num_pages = _size(num_pages, "num_pages")
        page_size = _size(page_size, "page_size")
        latent_dim = _size(latent_dim, "latent_dim")
        rope_dim = _size(rope_dim, "rope_dim", least=0)
        max_requests = _size(max_requests, "max_requests")
        max_pages = num_pages if max_pages_per_seq is None else _size(max_pages_per_seq, "max_pages_per_seq")
        stored_as = _settled_layout(dtype, layout)
        if device not in (CPU, CUDA):
            raise InvalidArgumentError("device", f"{CPU} or {CUDA}", repr(device))
        self.num_pages = num_pages
        self.page_size = page_size
        self.latent_dim = latent_dim
        self.rope_dim = rope_dim
        self.layout = stored_as
        self.dtype = stored_as.dtype
        self.device = device
        self.max_requests = max_requests
        self.max_pages_per_seq = max_pages
        self._device_id, self._kv_cache = self._make_pages()
        self._allocator = PageAllocator(num_pages, page_size, max_requests, max_pages)

    def __repr__(self) -> str:
        return (
            f"PagedKVCache({self.dtype} on {self.device}, {self.latent_dim} + {self.rope_dim}, "
            f"{self.num_free_pages} of {self.num_pages} pages of {self.page_size} tokens free, "
            f"{len(self.requests)} of {self.max_requests} requests)"
        )

    @property
    def kv_cache(self) -> Any:
        """The pages, [num_pages, page_size, 1, latent_dim + rope_dim]: ``kv_cache`` of ``mla_decode``."""
        return self._kv_cache

    @property
    def num_free_pages(self) -> int:
        """Pages that no request holds."""
        return len(self._allocator.free_pages)

    @property
    def requests(self) -> tuple[int, ...]:
        """The requests that exist, oldest first."""
        return self._allocator.requests

    def length(self, request: int) -> int:
        """Tokens of a request.

        Raises
        ------
        InvalidArgumentError
            There is no such request.
        """
        return self._allocator.length(request)

    def allocate(self) -> int:
        """A new, empty request. It takes no page until tokens are appended.

        Raises
        ------
        OutOfRequestsError
            There are ``max_requests`` already.
        """
        return self._allocator.allocate()

    def fork(self, request: int, num_tokens: int | None = None) -> int:
        """A new request that starts with the first ``num_tokens`` tokens of another (all of them if not given).

        The pages are shared, also a partly filled last one: nothing is copied until one of the two writes to it.

        Raises
        ------
        InvalidArgumentError
            There is no such request, or it has fewer tokens.
        OutOfRequestsError
            There are ``max_requests`` already.
        """
        return self._allocator.fork(request, num_tokens)

    def truncate(self, request: int, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens of a request, e.g. after drafted tokens were rejected.

        Raises
        ------
        InvalidArgumentError
            There is no such request, or it has fewer tokens.
        """
        self._allocator.truncate(request, num_tokens)

    def free(self, request: int) -> None:
        """Give up a request; its pages become free when no fork holds them.

        Raises
        ------
        InvalidArgumentError
            There is no such request (any more).
        """
        self._allocator.free(request)

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
            ``max_pages_per_seq`` pages, an array of the wrong shape, type or device, or a stream that is captured in a
            CUDA graph.
        OutOfPagesError
            Too few free pages. In each case the requests are as they were.
        """
        first = kv_new[0] if isinstance(kv_new, (tuple, list)) and kv_new else kv_new
        view = arrays.view(first, "kv_new", stream)
        if view.ndim < 2:
            raise InvalidArgumentError("kv_new", "shape [num_tokens, d]", str(view.shape))
        if first is not kv_new and view.shape[-1] != self.latent_dim:
            raise InvalidArgumentError("kv_new[0]", f"{self.latent_dim} latent columns", str(view.shape[-1]))
        plan = self._allocator.plan_append(requests, counts, view.shape[0])
        if view.device == CUDA and stream is None:
            stream = current_stream(first, view.device_id)
        with self._on_stream(stream):
            slots = self._upload(plan.slots, stream)
            # Copies go into pages that nobody holds yet, so a refusal after them leaves every request as it was.
            for copy in plan.copies:
                self._pages[copy.new] = self._pages[copy.old]
            append_tokens(self._kv_cache, kv_new, slots, stream=stream)
        self._allocator.commit(plan)

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
            There is no such request, ``out`` does not fit, or the stream is captured in a CUDA graph.
        """
        return self._hand_out(self._allocator.block_table(requests), out, stream)

    def cache_seqlens(
        self, requests: Sequence[int] | None = None, *, out: Any = None, stream: int | None = None
    ) -> Any:
        """Lengths of a batch of requests, int32 [batch]: ``cache_seqlens`` of ``mla_decode``.

        Parameters and errors as for ``block_table``.
        """
        return self._hand_out(self._allocator.cache_seqlens(requests), out, stream)

    # The pages and the device ----------------------------------------------------------------------------------------

    def _make_pages(self) -> tuple[int, Any]:
        """Device number and the uninitialised pages."""
        width = self.layout.width(self.latent_dim, self.rope_dim)
        shape = (self.num_pages, self.page_size, NUM_HEADS_KV, width)
        element = numpy_dtype(self.dtype)
        if self.device == CPU:
            require_backend(CPU, 0, "the cache")
            return 0, np.empty(shape, element)
        require_cuda()
        import cupy

        device_id = int(cupy.cuda.runtime.getDevice())
        require_backend(CUDA, device_id, "the cache")
        return device_id, cupy.empty(shape, np.uint16).view(element)

    @property
    def _pages(self) -> Any:
        # As plain 16-bit integers a page is copied as bytes, whatever the type.
        return self._kv_cache.view(np.uint16)

    @contextmanager
    def _on_stream(self, stream: int | None) -> Iterator[None]:
        """CuPy allocates and copies on this stream: memory given back is then reused in stream order."""
        if self.device == CPU:
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
        if self.device == CPU:
            return host
        import cupy

        result = cupy.empty(host.shape, host.dtype)
        self._copy_to_device(host, result.data.ptr, stream)
        return result

    def _copy_to_device(self, host: npt.NDArray[Any], pointer: int, stream: int | None) -> None:
        import cupy

        runtime = cupy.cuda.runtime
        raw_stream = cupy.cuda.get_current_stream().ptr if stream is None else stream
        if is_captured(raw_stream):  # a replay would copy what is worked out now, from memory that is gone
            expected = (
                "one that is not captured in a CUDA graph: pages and lengths are worked out on the host "
                "(block_table(out=) and cache_seqlens(out=) before a replay, cupy_mla.append_tokens inside)"
            )
            raise InvalidArgumentError("stream", expected, "one that is")
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
        if self.device == CPU:
            as_numpy(view)[...] = host
        else:
            used = current_stream(out, view.device_id) if stream is None else stream
            self._copy_to_device(host, view.pointer, used)
        return out


def _settled_layout(dtype: str | None, layout: CacheLayout | str | None) -> CacheLayout:
    if layout is not None:
        if dtype is not None:
            raise InvalidArgumentError("layout", f"None beside dtype={dtype!r}", repr(layout))
        found = find_layout(layout)
        if found not in DENSE_LAYOUTS.values():
            names = " or ".join(dense.name for dense in DENSE_LAYOUTS.values())
            raise InvalidArgumentError("layout", names, f"{found.name}, which no kernel appends to yet")
        return found
    if dtype is None:
        return BF16
    if dtype not in DENSE_LAYOUTS:
        raise InvalidArgumentError("dtype", "one of " + ", ".join(DENSE_LAYOUTS), repr(dtype))
    return DENSE_LAYOUTS[dtype]


def _size(value: Any, name: str, least: int = 1) -> int:
    size = as_integer(value, name)
    if size < least:
        raise InvalidArgumentError(name, f"at least {least}", str(size))
    return size
