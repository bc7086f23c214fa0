"""Pages and block tables for users who have no serving engine.

The bookkeeping (which page belongs to whom) is on the host, once for all layers of a model; the tokens are in one array
of pages on the CPU or the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..arrays.frameworks import CPU, CUDA, check_stream, current_stream
from ..call.arguments import has_scale_of_each_part, shard_of
from ..errors import InvalidArgumentError
from ..layouts import CacheLayout
from .allocator import AppendPlan, as_counts, as_list
from .append import append_tokens
from .layer_rows import rows_of_layers, view_first
from .requests import Requests
from .segments import first_part
from .storage import JAX, Storage, settle_device, settle_framework, settle_layout, size, split_columns, spread

if TYPE_CHECKING:
    from .jax_storage import JaxStorage
    from .step import CacheStep


class PagedKVCache(Requests):
    """A paged MLA cache of all layers of a model, with its page allocator.

    A page holds ``page_size`` tokens of ``latent_dim + rope_dim`` values, and every layer has as many pages: a block
    table is that of all layers. Requests are named by integers that are never used twice, so that a request that was
    freed is not mistaken for a later one.

    Work on the GPU goes to the stream given, or to the current stream of the new tokens' framework (of the cache's
    where there are none); a decode on another stream has to be ordered after it by the caller. Not safe for use by
    several threads at once.

    Parameters
    ----------
    num_pages
        Pages of each layer, shared by all requests.
    page_size
        Tokens per page.
    latent_dim, rope_dim
        Widths of the compressed KV vector and of the position part (may be 0), in elements.
    dtype
        ``"bfloat16"`` (if neither it nor ``layout`` is given) or ``"float16"``: the dense layout of that type. Also as
        a type of torch, NumPy or JAX, e.g. ``torch.bfloat16``.
    device
        ``"cpu"``, ``"cuda"`` (the current device), ``"cuda:1"``, or a ``torch.device``.
    max_requests
        Requests that may exist at once.
    max_pages_per_seq
        Width of the block table: a request holds at most ``max_pages_per_seq * page_size`` tokens.
        ``num_pages`` if not given.
    layout
        How tokens are stored, by name or as an object of `cupy_mla.layouts`, instead of ``dtype``: ``"bf16"``,
        ``"fp16"``, ``"fp8_e4m3"`` or any other.
    num_layers
        Layers of the model.
    framework
        Whose arrays the cache is made of: ``"torch"``, ``"jax"``, ``"cupy"`` or ``"numpy"``. If not given, torch where
        ``dtype`` or ``device`` is torch's, else NumPy on the CPU and CuPy on a GPU.
    kv_scale
        For ``fp8_e4m3``: what stored values are multiplied by, a number or one float32 on the cache's device; or two,
        of latent and rope part, in an array; or a list of one for each layer, where two may be a pair of numbers.
    cp_world, cp_rank, cp_interleave
        Of a cache that is sharded along the sequence: ranks, which of them this one is, and tokens in a row that lie on
        the same rank. Each rank is given all new tokens and stores its own; lengths to append, fork and truncate are
        those of whole requests. See `cupy_mla.parallel`.

    Raises
    ------
    InvalidArgumentError
        A size that is no positive integer, an unknown type, layout, device or framework, a layout beside a type, or a
        scale where none belongs or none where one does.
    MissingDependencyError
        The framework is not installed.
    UnsupportedDeviceError
        ``device`` is not what the setting CUPY_MLA_BACKEND asks for, or there is no Hopper GPU.

    Examples
    --------
    >>> import numpy as np
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
        dtype: Any = None,
        device: Any = CPU,
        max_requests: int = 256,
        max_pages_per_seq: int | None = None,
        *,
        layout: CacheLayout | str | None = None,
        num_layers: int = 1,
        framework: str | None = None,
        kv_scale: Any = None,
        cp_world: int = 1,
        cp_rank: int = 0,
        cp_interleave: int = 1,
    ) -> None:
        self.shard = shard_of(cp_world, cp_rank, cp_interleave)
        pages = size(num_pages, "num_pages")
        super().__init__(
            pages,
            size(page_size, "page_size"),
            size(max_requests, "max_requests"),
            pages if max_pages_per_seq is None else size(max_pages_per_seq, "max_pages_per_seq"),
            self.shard if self.shard.world > 1 else None,
        )
        self.latent_dim = size(latent_dim, "latent_dim")
        self.rope_dim = size(rope_dim, "rope_dim", least=0)
        self.num_layers = size(num_layers, "num_layers")
        self.layout = settle_layout(dtype, layout)
        self.dtype = self.layout.dtype
        self.framework = settle_framework(framework, device, dtype)
        self.kv_scales = self._settled_scales(kv_scale)
        self.storage = self._make_storage(settle_device(device, self.framework))

    def __repr__(self) -> str:
        made_of = f"{self.layout.name} in {self.framework} on {self.device}"
        return (
            f"PagedKVCache({made_of}, {self.latent_dim} + {self.rope_dim}, {self.num_layers} layers, "
            f"{self.num_free_pages} of {self.num_pages} pages of {self.page_size} tokens free, "
            f"{len(self.requests)} of {self.max_requests} requests)"
        )

    @property
    def kv_cache(self) -> Any:
        """The pages of a cache of one layer, [num_pages, page_size, 1, width]: ``kv_cache`` of ``mla_decode``. The
        width is ``latent_dim + rope_dim``, or the bytes of a token.

        Raises
        ------
        InvalidArgumentError
            There are more layers.
        """
        if self.num_layers > 1:
            raise InvalidArgumentError("kv_cache", "layers[i] or pages of a cache of many layers", "kv_cache")
        return self.storage.pages

    @property
    def layers(self) -> tuple[Any, ...]:
        """The pages of each layer, [num_pages, page_size, 1, width]: ``kv_cache`` of ``mla_decode``.

        Raises
        ------
        InvalidArgumentError
            The cache is one of JAX, where a part of an array is a copy: see `pages`.
        """
        if not isinstance(self.storage, Storage):
            raise InvalidArgumentError("layers", "pages, for a cache of JAX (a part would be a copy)", "layers")
        return self.storage.layers

    @property
    def pages(self) -> Any:
        """The pages of all layers in one array, [num_layers * num_pages, page_size, 1, width].

        Page p of layer i is page ``i * num_pages + p`` here: ``block_table + i * num_pages`` names those of a layer. In
        JAX, set it to what a compiled program made of the array that it was given (and gave up).

        Raises
        ------
        InvalidArgumentError
            Set to another array in another framework than JAX, or to one of another shape, type or device.
        """
        return self.storage.pages

    @pages.setter
    def pages(self, pages: Any) -> None:
        if isinstance(self.storage, Storage):
            raise InvalidArgumentError("pages", "a cache of JAX (others are written in place)", self.framework)
        self.storage.replace(pages)

    @property
    def device(self) -> str:
        """``"cpu"``, or e.g. ``"cuda:0"``."""
        device, number = self.storage.location
        return device if device == CPU else f"{device}:{number}"

    def append(
        self,
        requests: Sequence[int],
        kv_new: Any,
        counts: Sequence[int] | None = None,
        *,
        stream: int | None = None,
    ) -> None:
        """Append new tokens to the ends of requests, in every layer; one kernel launch for each on the GPU.

        Parameters
        ----------
        requests
            The requests, each at most once.
        kv_new
            [num_tokens, latent_dim + rope_dim] or the pair (latent [num_tokens, latent_dim],
            rope [num_tokens, rope_dim]) on the cache's device, the tokens of a request together and the requests in the
            order given; of the cache's type, or of bfloat16 or float16, which FP8 layouts are rounded from. A head
            dimension of 1 in the middle is taken too. With several layers: that for each, in a list or, as an array,
            with the layers as its first axis.
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
        rows = [kv_new] if self.num_layers == 1 else rows_of_layers(kv_new, self.num_layers)
        views = [view_first(row, self.latent_dim, stream) for row in rows]
        num_tokens = views[0].shape[0]
        for view in views[1:]:
            if view.shape[0] != num_tokens:
                raise InvalidArgumentError("kv_new", f"{num_tokens} tokens in every layer", str(view.shape[0]))
        plan = self._allocator.plan_append(requests, counts, num_tokens)
        if stream is None and self.framework != JAX and views[0].device == CUDA:
            stream = current_stream(first_part(rows[0]), views[0].device_id)
        # Copies and tokens go to pages that nobody holds yet, or behind the end of a request: a refusal after them
        # leaves every request as it was.
        slots = self.storage.upload(plan.slots, stream)
        self._copy_pages(plan, stream)
        for layer, row in enumerate(rows):
            self.write(layer, row, slots, stream=stream)
        self._allocator.commit(plan)

    def step(
        self, requests: Sequence[int], counts: Sequence[int] | None = None, *, stream: int | None = None
    ) -> CacheStep:
        """Make room for new tokens of a batch in every layer, for a model that computes them layer by layer.

        Parameters
        ----------
        requests
            The batch, each request at most once.
        counts
            New tokens of each; one each if not given.
        stream
            Raw CUDA stream; the current stream of the cache's framework if not given.

        Returns
        -------
        CacheStep
            Writes the tokens, has the arrays that all layers share, and makes room for the next ones.

        Raises
        ------
        InvalidArgumentError
            An unknown or repeated request, counts that are no such numbers, a request that would get longer than
            ``max_pages_per_seq`` pages, or a stream that is captured in a CUDA graph.
        OutOfPagesError
            Too few free pages. In each case the requests are as they were.
        """
        from .step import CacheStep

        check_stream(stream)
        batch = as_list(requests, "requests", "requests, e.g. [request]")
        return CacheStep(self, batch, [1] * len(batch) if counts is None else as_counts(counts), stream)

    def make_room(self, requests: Sequence[int], counts: Sequence[int], stream: int | None = None) -> AppendPlan:
        """Lengthen requests by tokens that are to be written: the bookkeeping of `step`.

        Raises
        ------
        InvalidArgumentError, OutOfPagesError
            As in `step`.
        """
        numbers = as_counts(counts)
        plan = self._allocator.plan_append(requests, numbers, sum(numbers))
        self._copy_pages(plan, stream)
        self._allocator.commit(plan)
        return plan

    def write(self, layer: int, kv_new: Any, slot_mapping: Any, *, stream: int | None = None) -> None:
        """Write tokens to slots of one layer: what `append` and `CacheStep.append` do, without the bookkeeping.

        Parameters
        ----------
        layer
            Which one, from 0.
        kv_new
            New tokens of that layer, as in `append`.
        slot_mapping
            int64 [num_tokens], as in ``append_tokens`` (JAX: int32).
        stream
            Raw CUDA stream; the current stream of ``kv_new``'s framework if not given.

        Raises
        ------
        InvalidArgumentError
            There is no such layer, or an array has the wrong shape, type or device.
        """
        if not 0 <= size(layer, "layer", least=0) < self.num_layers:
            raise InvalidArgumentError("layer", f"0 to {self.num_layers - 1}", str(layer))
        scale = self.kv_scales[layer]
        if isinstance(self.storage, Storage):
            layout = self.layout
            pages = self.storage.layers[layer]
            if has_scale_of_each_part(scale):
                pages = split_columns(pages, self.latent_dim)
            append_tokens(pages, kv_new, slot_mapping, kv_scale=scale, layout=layout, stream=stream)
        else:
            self.storage.append(layer, kv_new, slot_mapping, scale, self.layout, self.latent_dim)

    @property
    def tables_changed(self) -> int:
        """How often an append has changed the pages of a request: whether block tables are still what they were."""
        return self._allocator.tables_changed

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
        """Tokens that this cache has of a batch of requests, int32 [batch]: ``cache_seqlens`` of ``mla_decode``.

        Parameters and errors as for ``block_table``.
        """
        return self._hand_out(self._allocator.cache_seqlens(requests), out, stream)

    def total_seqlens(
        self, requests: Sequence[int] | None = None, *, out: Any = None, stream: int | None = None
    ) -> Any:
        """Lengths of a batch of requests on all ranks, int32 [batch]: ``total_seqlens`` of ``mla_decode``.

        Parameters and errors as for ``block_table``.
        """
        return self._hand_out(self._allocator.total_seqlens(requests), out, stream)

    # The pages and the device ----------------------------------------------------------------------------------------

    def _make_storage(self, location: tuple[str, int]) -> Storage | JaxStorage:
        width = self.layout.width(self.latent_dim, self.rope_dim)
        page_bytes = self.layout.page_bytes(self.page_size, self.latent_dim, self.rope_dim)
        shape = (self.num_layers, self.num_pages, self.page_size, page_bytes, width)
        if self.framework == JAX:
            from .jax_storage import JaxStorage

            return JaxStorage(location, self.layout, *shape)
        return Storage(self.framework, location, self.layout, *shape)

    def _settled_scales(self, kv_scale: Any) -> tuple[Any, ...]:
        if (kv_scale is None) == self.layout.needs_scale:
            words = "a number, or one float32 in an array," if self.layout.needs_scale else "None"
            raise InvalidArgumentError("kv_scale", f"{words} for the layout {self.layout.name}", repr(kv_scale))
        return spread(kv_scale, self.num_layers, "kv_scale")

    def _copy_pages(self, plan: AppendPlan, stream: int | None) -> None:
        if plan.copies:
            self.storage.copy_pages([copy.old for copy in plan.copies], [copy.new for copy in plan.copies], stream)

    def _hand_out(self, host: Any, out: Any, stream: int | None) -> Any:
        check_stream(stream)
        if out is None:
            return self.storage.upload(host, stream)
        if not isinstance(self.storage, Storage):
            raise InvalidArgumentError("out", "None for a cache of JAX, whose arrays are not written to", "an array")
        return self.storage.fill(out, host, stream)
