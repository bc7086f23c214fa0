"""A case's arrays, made where they are used from its `CaseSpec`; all of it, or the parts that a benchmark repeats."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..layouts.block_scaled import BlockScaled
from ..schedule.pieces import ceil_div
from .cases import NO_PAGE, Case
from .libraries import NUMPY, ArrayLibrary, empty_cache_like
from .random_values import Array, host_normal
from .sparse_cases import ChosenOf, SparseCase
from .spec import KV_SCALE, SPLIT, STRIDED, CaseSpec
from .tokens import choose_tokens
from .work import IntArray

# A view's gaps. Rows keep the alignment of 16 bytes that TMA needs.
PADDING_COLUMNS = 64
PADDING_TOKENS = 3
LAYERS_IN_POOL = 2
_TOKEN_AXIS_OF_Q, _TOKEN_AXIS_OF_CACHE = 0, 1

_SPARE_COLUMNS = 2  # of a poisoned block table, past the last page of the longest request
# Bits of not-a-number and of infinity. In 8 bits there is but the first, and bytes of any layout have no meaning then.
_POISON = {"bfloat16": (0x7FFF, 0x7F80), "float16": (0x7FFF, 0x7C00)}
_BYTE_POISON = (0xFF, 0xFF)
_INFINITY_EVERY = 3  # values
_INT32 = np.iinfo(np.int32)

_QUANTISED_TOKENS = 1 << 14  # made on the host; a larger cache has their pages several times


def build_case(spec: CaseSpec, library: ArrayLibrary = NUMPY) -> Case | SparseCase:
    """The case that a spec describes: normal random values, pages in random order, poison if the spec asks for it."""
    table, unused = deal_pages(spec)
    q, cache = make_values(spec, library)
    if spec.poison:
        _poison_cache(cache, spec, table, unused, library)
    q, cache = store_q(q, spec, library), store_cache(cache, spec, library)[0]
    if spec.topk is None:
        return dense_case(spec, q, cache, table, library)
    return sparse_case(spec, q, cache, table, unused, library)


def dense_case(spec: CaseSpec, q: Any, cache: Any, table: Array, library: ArrayLibrary) -> Case:
    """A case of dense decoding over arrays that were made: q and a cache as the spec stores them, a block table on the
    host."""
    return Case(
        q=q,
        kv_cache=cache,
        block_table=library.upload(table),
        cache_seqlens=library.upload(spec.kv_lengths.astype(np.int32)),
        kv_lengths=spec.kv_lengths,
        q_lengths=spec.q_lengths,
        cu_seqlens_q=library.upload(spec.q_starts.astype(np.int32)) if spec.ragged else None,
        head_dim_v=spec.latent_dim,
        softmax_scale=spec.softmax_scale,
        causal=spec.causal,
        kv_scale=KV_SCALE if spec.cache_layout.needs_scale else None,
        compute=spec.compute,
        layout=spec.layout,
        library=library,
    )


def sparse_case(
    spec: CaseSpec, q: Any, cache: Any, table: Array, unused: Array, library: ArrayLibrary
) -> SparseCase:
    """A case of sparse attention over arrays that were made; ``unused`` are the pages of no request."""
    chosen = choose_tokens(spec, table, unused)
    extra, extra_counts = make_extra(spec, library)
    counts = chosen.counts if extra_counts is None else chosen.counts + extra_counts
    return SparseCase(
        q=q,
        kv_cache=cache,
        indices=library.upload(chosen.indices),
        topk_length=None if chosen.topk_length is None else library.upload(chosen.topk_length),
        attn_sink=None if chosen.attn_sink is None else library.upload(chosen.attn_sink),
        counts=counts,
        work=spec.work_of(chosen.counts, extra_counts),
        prefill=spec.prefill,
        head_dim_v=spec.latent_dim,
        softmax_scale=spec.softmax_scale,
        layout=spec.layout,
        kv_scale=KV_SCALE if spec.cache_layout.needs_scale else None,
        extra=extra,
        library=library,
    )


def make_extra(spec: CaseSpec, library: ArrayLibrary) -> tuple[ChosenOf | None, IntArray | None]:
    """The second cache of a case and what is chosen of it, and how many tokens that is; None of both without one."""
    if spec.extra is None:
        return None, None
    table, unused = deal_pages(spec.extra)
    cache = make_cache(spec.extra, library)
    if spec.poison:
        _poison_cache(cache, spec.extra, table, unused, library)
    chosen = choose_tokens(spec.extra, table, unused, length_of_request=True)
    lengths = None if chosen.topk_length is None else library.upload(chosen.topk_length)
    stored = store_cache(cache, spec.extra, library)[0]
    extra = ChosenOf(stored, library.upload(chosen.indices), lengths, spec.extra.layout)
    return extra, chosen.counts


def deal_pages(spec: CaseSpec) -> tuple[Array, Array]:
    """The block table [batch, columns] int32 on the host, and the pages of no request.

    Past a request's last page the table has NO_PAGE, or poison.
    """
    rng = np.random.default_rng(spec.seed)
    counts = spec.page_counts
    used, total = int(counts.sum()), spec.num_pages
    order = rng.permutation(total)
    columns = max(int(counts.max(initial=0)) + _SPARE_COLUMNS * spec.poison, 1)
    table = np.full((spec.batch, columns), NO_PAGE, dtype=np.int32)
    if spec.poison:
        table = rng.choice(np.array([NO_PAGE, total, _INT32.max, _INT32.min, *range(total)], np.int32), table.shape)
    table[np.arange(columns) < counts[:, None]] = order[:used]
    return table, order[used:]


def make_values(spec: CaseSpec, library: ArrayLibrary) -> tuple[Any, Any]:
    """q and cache, packed and contiguous."""
    # Two streams of values from one seed: the query must not repeat the cache.
    return library.normal(spec.q_shape, spec.dtype, 2 * spec.seed), make_cache(spec, library)


def make_cache(spec: CaseSpec, library: ArrayLibrary) -> Any:
    """The cache alone."""
    if spec.cache_layout.dtype != spec.dtype:
        return _quantised(spec, library)
    return library.normal(spec.cache_shape, spec.dtype, 2 * spec.seed + 1)


def _quantised(spec: CaseSpec, library: ArrayLibrary) -> Any:
    """A cache of a layout that is not of q's type."""
    layout, widths = spec.cache_layout, (spec.latent_dim, spec.rope_dim)
    num_pages, *page_shape, width = spec.cache_shape
    made = min(num_pages, ceil_div(_QUANTISED_TOKENS, spec.page_size))
    values = host_normal((made, *page_shape, spec.head_dim), spec.dtype, 2 * spec.seed + 1).astype(np.float32)
    pages = library.upload(layout.quantise(values, KV_SCALE if layout.needs_scale else None))
    page_bytes = layout.page_bytes(spec.page_size, *widths, spec.num_heads_kv)  # with what pads a page
    memory = library.empty((num_pages, page_bytes), layout.dtype)
    cache = memory[:, : int(np.prod(page_shape)) * width].reshape(spec.cache_shape)
    for first in range(0, num_pages, made):
        library.assign(cache[first : first + made], pages[: num_pages - first])
    return cache


def store_q(packed: Any, spec: CaseSpec, library: ArrayLibrary) -> Any:
    """A packed q as the spec stores it: itself, a view or a pair (latent, rope)."""
    return _store(packed, spec, _TOKEN_AXIS_OF_Q, library, 1)[0]


def store_cache(packed: Any, spec: CaseSpec, library: ArrayLibrary, copies: int = 1) -> list[Any]:
    """Copies of a packed cache as the spec stores it; one that it stores as it is, is itself the first of them."""
    return _store(packed, spec, _TOKEN_AXIS_OF_CACHE, library, copies)


def _store(packed: Any, spec: CaseSpec, token_axis: int, library: ArrayLibrary, copies: int) -> list[Any]:
    if spec.storage == SPLIT:
        columns = slice(0, spec.latent_dim), slice(spec.latent_dim, None)
        parts = [_copies(packed[..., part], spec, token_axis, library, copies) for part in columns]
        return list(zip(*parts, strict=True))
    if spec.padded or (spec.storage == STRIDED and token_axis == _TOKEN_AXIS_OF_CACHE):
        return _copies(packed, spec, token_axis, library, copies)
    others = [empty_cache_like(library, packed) for _ in range(copies - 1)]
    for other in others:
        library.assign(other, packed)
    return [packed, *others]


def _copies(source: Any, spec: CaseSpec, token_axis: int, library: ArrayLibrary, copies: int) -> list[Any]:
    """Views of one array that holds all copies, and poison between them."""
    shape = list(source.shape)
    cut: list[Any] = [slice(extent) for extent in shape]
    if spec.padded:
        shape[token_axis] += PADDING_TOKENS
        shape[-1] += PADDING_COLUMNS
    if spec.storage == STRIDED and token_axis == _TOKEN_AXIS_OF_CACHE:
        shape.insert(1, LAYERS_IN_POOL)
        cut.insert(1, 0)
    dtype = spec.cache_layout.dtype if token_axis == _TOKEN_AXIS_OF_CACHE else spec.dtype
    memory = library.empty((copies, *shape), dtype)
    if shape != list(source.shape):
        _poison(memory, dtype, library)
    views = [memory[(copy, *cut)] for copy in range(copies)]
    for view in views:
        library.assign(view, source)
    return views


def _poison_cache(packed: Any, spec: CaseSpec, table: Array, unused: Array, library: ArrayLibrary) -> None:
    layout = spec.cache_layout
    # Where a page ends with a part of its tokens, a token is not its row.
    of_tokens = layout.fields(packed) if isinstance(layout, BlockScaled) else (packed,)
    for part in of_tokens:
        for row, length in zip(table, spec.lengths, strict=True):
            pages, tokens = divmod(length, spec.page_size)
            if tokens:
                _poison(part[int(row[pages]), tokens:], layout.dtype, library)
        for page in unused:
            _poison(part[int(page)], layout.dtype, library)


def _poison(target: Any, dtype: str, library: ArrayLibrary) -> None:
    """Not-a-number, and infinities between."""
    not_a_number, infinity = _POISON.get(dtype, _BYTE_POISON)
    library.fill(target, not_a_number)
    library.fill(target[..., ::_INFINITY_EVERY], infinity)
