"""Whether a Hopper GPU would take a call, found out by its shapes alone and without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..arrays.frameworks import CUDA
from ..arrays.view import ArrayView, contiguous_strides
from ..call.arguments import as_boolean, as_integer
from ..call.describe import describe_decode
from ..call.options import DecodeArrays, DecodeOptions
from ..call.problem import INDEX_DTYPE, PLAN_ALIGNMENT, DecodeProblem
from ..call.sparse import describe_sparse_decode
from ..call.sparse_options import SparseDecodeArrays, SparseOptions
from ..errors import InvalidArgumentError
from ..gpu import hopper
from ..kernels.choose import choose_config, choose_gathered_config
from ..layouts import DENSE_LAYOUTS, CacheLayout, find_layout
from ..layouts.base import CACHE_RANK
from ..schedule.pieces import ceil_div
from .plan import schedule_shape

_DEFAULT_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Support:
    """Whether a call is taken: true or false in a condition.

    Attributes
    ----------
    kernel
        Name of the kernel that would run, on a GPU with as many SMs as an H100 SXM or H200; None if none would.
    reason
        Why none would, in words; None if one would.
    """

    kernel: str | None
    reason: str | None

    def __bool__(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        return f"supported: kernel {self.kernel}" if self else f"not supported: {self.reason}"


def is_supported(
    num_heads_q: int = 128,
    *,
    num_heads_kv: int = 1,
    latent_dim: int = 512,
    rope_dim: int = 64,
    dtype: str = "bfloat16",
    layout: CacheLayout | str | None = None,
    page_size: int = 64,
    batch: int = 1,
    seqlen_q: int = 1,
    causal: bool = False,
    max_seqlen_k: int = _DEFAULT_TOKENS,
    topk: int | None = None,
    extra_topk: int | None = None,
    extra_page_size: int = 64,
    extra_layout: CacheLayout | str | None = None,
) -> Support:
    """Say whether a Hopper GPU takes a decode of these shapes, and why not. No GPU and no array is needed.

    Parameters
    ----------
    num_heads_q, num_heads_kv
        Query heads and KV heads.
    latent_dim, rope_dim
        Widths of the latent part, which is the output's width too, and of the rope part.
    dtype
        Element type of q, ``"bfloat16"`` or ``"float16"``.
    layout
        Layout of the cache, by name or as an object of `cupy_mla.layouts`; None: the dense one of ``dtype``.
    page_size
        Tokens per page.
    batch, seqlen_q
        Requests, and query tokens of each.
    causal
        As in ``mla_decode``.
    max_seqlen_k
        Tokens of the longest request.
    topk
        For ``mla_sparse_decode``: chosen tokens of each query; None: ``mla_decode``.
    extra_topk, extra_page_size, extra_layout
        The same of a second cache, its page size and its layout (None: as the first); ``extra_topk`` None: there is
        none.

    Raises
    ------
    InvalidArgumentError
        A size is no integer or negative, ``causal`` no truth value, there is no such layout, or ``extra_topk`` is given
        without ``topk``.

    Examples
    --------
    >>> print(is_supported(num_heads_q=16))
    supported: kernel narrow16_bfloat16_512+64_page64_scaled
    >>> bool(is_supported(latent_dim=100))
    False
    """
    sizes = {
        name: _size(value, name)
        for name, value in (
            ("num_heads_q", num_heads_q),
            ("num_heads_kv", num_heads_kv),
            ("latent_dim", latent_dim),
            ("rope_dim", rope_dim),
            ("page_size", page_size),
            ("batch", batch),
            ("seqlen_q", seqlen_q),
            ("max_seqlen_k", max_seqlen_k),
        )
    }
    chosen = None if topk is None else _size(topk, "topk")
    causal = as_boolean(causal, "causal")
    found = DENSE_LAYOUTS.get(dtype) if layout is None else find_layout(layout)
    if found is None:
        return Support(None, str(InvalidArgumentError("dtype", "one of " + ", ".join(DENSE_LAYOUTS), repr(dtype))))
    extra = None
    if extra_topk is not None:
        if chosen is None:
            raise InvalidArgumentError("extra_topk", "None without topk", str(extra_topk))
        other = found if extra_layout is None else find_layout(extra_layout, "extra_layout")
        extra = _size(extra_topk, "extra_topk"), _size(extra_page_size, "extra_page_size"), other
    try:
        if chosen is not None:
            return Support(_sparse_kernel(sizes, dtype, found, chosen, extra), None)
        return Support(_kernel(sizes, dtype, found, causal), None)
    except InvalidArgumentError as error:
        return Support(None, str(error))


def _size(value: Any, name: str) -> int:
    size = as_integer(value, name)
    if size < 0:
        raise InvalidArgumentError(name, "0 or more", str(size))
    return size


def _kernel(sizes: dict[str, int], dtype: str, layout: CacheLayout, causal: bool) -> str:
    """Name of the kernel that serves the call; raises as the call itself would on a GPU."""
    problem = problem_of(sizes, dtype, layout, causal)
    config = choose_config(problem, hopper.COMMON_SMS)
    schedule_shape(problem, config, hopper.COMMON_SMS)
    return config.name


def problem_of(sizes: dict[str, int], dtype: str, layout: CacheLayout, causal: bool) -> DecodeProblem:
    """The problem of a dense call on a GPU, of which only sizes are known.

    Parameters
    ----------
    sizes
        Those arguments of `is_supported` that are sizes of dense calls, all of them.
    dtype, causal
        As in `is_supported`.
    layout
        Of the cache.

    Raises
    ------
    InvalidArgumentError
        There is no such call.
    """
    latent, batch, page_size = sizes["latent_dim"], sizes["batch"], sizes["page_size"]
    q, kv_cache = _q(sizes, dtype), _cache(sizes, layout, page_size)
    scale = 1.0 if layout.needs_scale else None
    table = _array(INDEX_DTYPE, batch, _max_pages(sizes, page_size))
    lengths = _array(INDEX_DTYPE, batch)
    named = None if layout in DENSE_LAYOUTS.values() else layout.name
    options = DecodeOptions(head_dim_v=latent, causal=causal, layout=named)
    problem, _ = describe_decode(DecodeArrays(q, kv_cache, table, lengths, kv_scale=scale), options)
    return problem


def _sparse_kernel(
    sizes: dict[str, int], dtype: str, layout: CacheLayout, topk: int, extra: tuple[int, int, CacheLayout] | None
) -> str:
    """The same of a sparse call; ``extra`` is number of indices, page size and layout of a second cache."""
    rows = sizes["batch"], sizes["seqlen_q"]
    kv_cache, indices = _cache(sizes, layout, sizes["page_size"]), _array(INDEX_DTYPE, *rows, topk)
    arrays = SparseDecodeArrays(_q(sizes, dtype), kv_cache, indices, kv_scale=1.0 if layout.needs_scale else None)
    extra_layout = None
    if extra is not None:
        extra_topk, page_size, other = extra
        arrays.extra_kv_cache = _cache(sizes, other, page_size)
        arrays.extra_indices = _array(INDEX_DTYPE, *rows, extra_topk)
        extra_layout = other.name
    options = SparseOptions(head_dim_v=sizes["latent_dim"], layout=layout.name, extra_layout=extra_layout)
    problem, _ = describe_sparse_decode(arrays, options)
    return choose_gathered_config(problem, hopper.COMMON_SMS, planned=True).name


def _q(sizes: dict[str, int], dtype: str) -> ArrayView:
    width = sizes["latent_dim"] + sizes["rope_dim"]
    return _array(dtype, sizes["batch"], sizes["seqlen_q"], sizes["num_heads_q"], width)


def _max_pages(sizes: dict[str, int], page_size: int) -> int:
    return max(1, ceil_div(sizes["max_seqlen_k"], max(page_size, 1)))


def _cache(sizes: dict[str, int], layout: CacheLayout, page_size: int) -> ArrayView:
    latent, rope = sizes["latent_dim"], sizes["rope_dim"]
    width = layout.width(latent, rope)
    pages = max(1, sizes["batch"] * _max_pages(sizes, page_size))
    cache = _array(layout.dtype, pages, page_size, sizes["num_heads_kv"], width)
    if layout.one_head:
        cache.strides = (layout.page_bytes(page_size, latent, rope) // cache.itemsize, width, width, 1)
    return cache


def _array(dtype: str, *shape: int) -> ArrayView:
    """One that is nowhere: as aligned as any, and so are its rows."""
    alignment = PLAN_ALIGNMENT if len(shape) == CACHE_RANK else 1
    rows = (*shape[:-1], ceil_div(shape[-1], alignment) * alignment)
    return ArrayView(PLAN_ALIGNMENT, shape, contiguous_strides(rows), dtype, CUDA, 0, None)
