"""Arguments of a decode call to its description, with the checks that a kind of call needs once.

Checking a call costs more than launching it, and an engine makes the same call for every layer of every step. So
`describe_decode` remembers which combinations of shapes, strides, types, devices and options it has found good, and
looks at nothing else but addresses when one comes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..arrays.frameworks import CUDA
from ..arrays.view import ArrayView, view
from ..errors import InvalidArgumentError
from ..layouts import DENSE_LAYOUTS, CacheLayout
from .arguments import (
    COPY_ALIGNMENT,
    KV_SCALE_DTYPE,
    NUMPY_WAY_OUT,
    check_cuda_widths,
    check_kv_scale_array,
    check_output,
    check_plan_view,
    check_rows,
    is_number,
    is_pair_of_numbers,
    misaligned,
    place_name,
    scale_values,
    settled_strides,
    sharded_places,
)
from .cache_layout import layout_of
from .memo import shared_memo
from .options import AUTO, EXACT, DecodeArrays, DecodeOptions
from .problem import (
    INDEX_DTYPE,
    LSE_DTYPE,
    MAX_TOKENS,
    DecodeInputs,
    DecodeProblem,
    PagedKeys,
    Queries,
)

# What the CUDA kernels of dense decoding are written for.
CUDA_PAGE_MULTIPLE = 16

_KV_RANK = 4
_Q_RANK = 4
_RAGGED_Q_RANK = 3
# Engines use a few dozen combinations; ragged batches may bring a new one every step.
_MAX_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class _Part:
    """Where the latent or the rope columns of an argument are."""

    index: int  # which array of the argument
    offset: int  # bytes from that array's first element
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, arrays: Sequence[ArrayView]) -> ArrayView:
        array = arrays[self.index]
        return ArrayView(
            array.pointer + self.offset,
            self.shape,
            self.strides,
            array.dtype,
            array.device,
            array.device_id,
            array.owner,
        )


@dataclass(frozen=True, slots=True)
class _Checked:
    """A combination of shapes, strides, types and options that was found good."""

    problem: DecodeProblem
    q_latent: _Part
    q_rope: _Part | None
    kv_latent: _Part
    kv_rope: _Part | None


_checked = shared_memo(_MAX_REMEMBERED)


def describe_decode(
    arrays: DecodeArrays, options: DecodeOptions, stream: int | None = None
) -> tuple[DecodeProblem, DecodeInputs]:
    """Check the arrays of a dense decode call against its options, and describe it. Reads no array's contents.

    Parameters
    ----------
    arrays, options
        What the call was given.
    stream
        CUDA stream that will use the arrays; see `cupy_mla.arrays.view`.

    Returns
    -------
    problem, inputs
        The description and the views. The same `DecodeProblem` object comes back for the same kind of call.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value; its name, what was expected
        and what came are in the error.
    """
    scale = arrays.kv_scale
    call = _Call(
        _views(arrays.q, "q", stream),
        _views(arrays.kv_cache, "kv_cache", stream),
        view(arrays.block_table, "block_table", stream),
        view(arrays.cache_seqlens, "cache_seqlens", stream),
        _view_of(arrays, "cu_seqlens_q", stream),
        _view_of(arrays, "total_seqlens", stream),
        None if is_number(scale) or is_pair_of_numbers(scale) else _view_of(arrays, "kv_scale", stream),
        options,
    )
    q, kv = call.q, call.kv
    key = (
        *map(_layout_key, (*q, *kv, call.table, call.lengths)),
        *(None if array is None else _layout_key(array) for array in (call.starts, call.totals, call.kv_scale)),
        (len(q), len(kv), options.head_dim_v, options.causal, options.max_seqlen_q, options.compute, options.layout),
        (options.strict, options.cp_world, options.cp_rank, options.cp_interleave),
    )
    checked: _Checked = _checked.get(key) or _checked.keep(key, _check(call))
    if q[0].device == CUDA:
        _check_addresses(call)
    queries = checked.problem.queries
    inputs = DecodeInputs(
        checked.q_latent.of(q),
        None if checked.q_rope is None else checked.q_rope.of(q),
        checked.kv_latent.of(kv),
        None if checked.kv_rope is None else checked.kv_rope.of(kv),
        call.table,
        call.lengths,
        call.starts,
        None if checked.problem.keys.shard is None else call.totals,
        call.kv_scale,
        _view_of(arrays, "plan", stream),
        _view_of(arrays, "out", stream),
        _view_of(arrays, "lse", stream),
        scale_values(scale, checked.problem.layout),
    )
    if inputs.plan is not None:
        check_plan_view(inputs.plan, inputs.location)
    if inputs.out is not None:
        check_output(inputs.out, "out", queries.out_shape, queries.dtype, inputs.location, contiguous_rows=True)
    if inputs.lse is not None:
        check_output(inputs.lse, "lse", queries.lse_shape, LSE_DTYPE, inputs.location)
    return checked.problem, inputs


# ---------------------------------------------------------------------------------------------------------------------
# Most of what is below runs once per kind of call


@dataclass(slots=True, eq=False)
class _Call:
    """The inputs of a call as views, and its options."""

    q: Sequence[ArrayView]
    kv: Sequence[ArrayView]
    table: ArrayView
    lengths: ArrayView
    starts: ArrayView | None
    totals: ArrayView | None
    kv_scale: ArrayView | None
    options: DecodeOptions

    def arrays(self) -> list[tuple[str, ArrayView]]:
        named = _named("q", self.q) + _named("kv_cache", self.kv)
        named += [("block_table", self.table), ("cache_seqlens", self.lengths)]
        if self.starts is not None:
            named.append(("cu_seqlens_q", self.starts))
        if self.totals is not None:
            named.append(("total_seqlens", self.totals))
        if self.kv_scale is not None:
            named.append(("kv_scale", self.kv_scale))
        return named


def _view_of(arrays: DecodeArrays, name: str, stream: int | None) -> ArrayView | None:
    array = getattr(arrays, name)
    return None if array is None else view(array, name, stream)


def _views(argument: Any, name: str, stream: int | None) -> Sequence[ArrayView]:
    if not isinstance(argument, (tuple, list)):
        return (view(argument, name, stream),)
    if len(argument) != 2:
        raise InvalidArgumentError(name, "an array or a pair (latent, rope)", f"{len(argument)} items")
    latent, rope = argument
    if rope is None:
        return (view(latent, f"{name}[0]", stream),)
    return view(latent, f"{name}[0]", stream), view(rope, f"{name}[1]", stream)


def _layout_key(array: ArrayView) -> tuple[Any, ...]:
    return array.shape, array.strides, array.dtype, array.device, array.device_id


def _named(name: str, views: Sequence[ArrayView]) -> list[tuple[str, ArrayView]]:
    if len(views) == 1:
        return [(name, views[0])]
    return [(f"{name}[{index}]", array) for index, array in enumerate(views)]


def _check(call: _Call) -> _Checked:
    ragged = call.starts is not None
    q_axes = "[total_q, num_heads_q, width]" if ragged else "[batch, seqlen_q, num_heads_q, width]"
    kv_axes = "[num_pages, page_size, num_heads_kv, width]"
    q_rank = _RAGGED_Q_RANK if ragged else _Q_RANK
    is_empty = 0 in call.q[0].shape[:-2] or 0 in call.lengths.shape  # no request or no query token
    for name, array in _named("q", call.q):
        axes = q_axes + (" because cu_seqlens_q is given" if ragged else "")
        _check_rank(array, name, q_rank, axes, may_be_empty=q_rank - 2)
    for name, array in _named("kv_cache", call.kv):
        _check_rank(array, name, _KV_RANK, kv_axes, may_be_empty=int(is_empty))
    _check_rank(call.table, "block_table", 2, "[batch, max_pages_per_seq]", may_be_empty=2 * is_empty)
    _check_rank(call.lengths, "cache_seqlens", 1, "[batch]", may_be_empty=1)
    if call.starts is not None:
        _check_rank(call.starts, "cu_seqlens_q", 1, "[batch + 1]")
    layout = _check_types(call)
    _check_devices(call)

    first_q = call.q[0]
    latent_dim, rope_dim, q_latent, q_rope = _split(call.q, "q", call.options.head_dim_v)
    if layout.has_columns:
        kv_latent_dim, kv_rope_dim, kv_latent, kv_rope = _split(call.kv, "kv_cache", call.options.head_dim_v)
    else:
        layout.check(call.kv[0], "kv_cache", latent_dim, rope_dim)
        kv_latent_dim, kv_rope_dim, kv_rope = latent_dim, rope_dim, None
        kv_latent = _Part(0, 0, call.kv[0].shape, settled_strides(call.kv[0]))
    if (kv_latent_dim, kv_rope_dim) != (latent_dim, rope_dim):
        raise InvalidArgumentError(
            "kv_cache",
            f"width {latent_dim + rope_dim} ({latent_dim} latent + {rope_dim} rope) as in q",
            f"{kv_latent_dim + kv_rope_dim} ({kv_latent_dim} + {kv_rope_dim})",
        )
    _, page_size, num_heads_kv, _ = call.kv[0].shape
    num_heads_q = first_q.shape[-2]
    if num_heads_q % num_heads_kv:
        raise InvalidArgumentError("q", f"a number of heads that {num_heads_kv} KV heads divide", str(num_heads_q))

    batch = call.lengths.shape[0] if ragged else first_q.shape[0]
    if call.lengths.shape != (batch,):
        raise InvalidArgumentError("cache_seqlens", f"shape [{batch}], one per request", str(list(call.lengths.shape)))
    if call.table.shape[0] != batch:
        raise InvalidArgumentError("block_table", f"shape [{batch}, max_pages_per_seq]", str(list(call.table.shape)))
    if call.starts is not None and call.starts.shape != (batch + 1,):
        raise InvalidArgumentError(
            "cu_seqlens_q", f"shape [{batch + 1}], one more than requests", str(list(call.starts.shape))
        )
    seqlen_q, total_q = _query_counts(call)
    shard = (call.options.cp_world, call.options.cp_rank, call.options.cp_interleave)
    shard = sharded_places(shard, call.totals, call.options.causal, batch, seqlen_q)
    queries = Queries(
        batch=batch,
        seqlen_q=seqlen_q,
        total_q=total_q,
        num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv,
        latent_dim=latent_dim,
        rope_dim=rope_dim,
        dtype=first_q.dtype,
        causal=call.options.causal,
        ragged=ragged,
    )
    keys = PagedKeys(page_size, call.table.shape[1], *shard, cp_share=call.options.cp_world > 1)
    if keys.max_seqlen_k > MAX_TOKENS:
        raise InvalidArgumentError(
            "block_table", f"at most {MAX_TOKENS // page_size} pages per sequence", str(keys.max_pages_per_seq)
        )
    _check_strides(call, layout)
    if first_q.device == CUDA or call.options.strict:
        check_cuda_widths(queries)
        _check_page_size(page_size)
    problem = DecodeProblem(queries, keys, layout, call.options.compute)
    return _Checked(problem, q_latent, q_rope, kv_latent, kv_rope)


def _check_rank(array: ArrayView, name: str, rank: int, axes: str, *, may_be_empty: int = 0) -> None:
    """The first ``may_be_empty`` extents may be 0."""
    if array.ndim != rank:
        raise InvalidArgumentError(name, f"{rank} dimensions {axes}", f"{array.ndim}: {list(array.shape)}")
    # A rope part of width 0 is a way to say that there is none.
    extents = array.shape[may_be_empty:-1] if name.endswith("[1]") else array.shape[may_be_empty:]
    if 0 in extents:
        raise InvalidArgumentError(name, f"{axes} with no extent of 0", str(list(array.shape)))


def _check_types(call: _Call) -> CacheLayout:
    """The layout that the types of the arrays mean."""
    first_q = _named("q", call.q)[0][0]
    dtype, stored = call.q[0].dtype, call.kv[0].dtype
    if dtype not in DENSE_LAYOUTS:
        raise InvalidArgumentError(first_q, " or ".join(DENSE_LAYOUTS), dtype)
    layout = layout_of(call.kv, dtype, call.options.layout)
    if dtype not in layout.query_dtypes:
        raise InvalidArgumentError(first_q, f"{' or '.join(layout.query_dtypes)} for a cache of {stored}", dtype)
    for name, array in _named("q", call.q):
        if array.dtype != dtype:
            raise InvalidArgumentError(name, f"{dtype}, the type of q", array.dtype)
    for name, array in _named("kv_cache", call.kv):
        if array.dtype not in layout.dtypes:
            expected = f"{dtype}, the type of q" if layout.dtype == dtype else f"{stored}, as the latent part"
            raise InvalidArgumentError(name, expected, array.dtype)
    if not layout.needs_scale and call.options.compute not in (AUTO, EXACT):
        raise InvalidArgumentError("compute", f"{AUTO} or {EXACT} for a cache of {stored}", call.options.compute)
    if call.kv_scale is not None:
        check_kv_scale_array(call.kv_scale, of_parts=True)
    for name, array in call.arrays():
        if not name.startswith(("q", "kv_cache", "kv_scale")) and array.dtype != INDEX_DTYPE:
            raise InvalidArgumentError(name, INDEX_DTYPE, array.dtype)
    return layout


def _check_devices(call: _Call) -> None:
    location = call.q[0].location
    for name, array in call.arrays():
        if array.location != location:
            raise InvalidArgumentError(
                name, f"an array on q's device, {place_name(location)}", f"one on {place_name(array.location)}"
            )


def _split(views: Sequence[ArrayView], name: str, head_dim_v: int) -> tuple[int, int, _Part, _Part | None]:
    """Widths and places of the latent and the rope columns."""
    first = views[0]
    width = first.shape[-1]
    strides = settled_strides(first)
    if len(views) == 1:
        if not 1 <= head_dim_v <= width:
            raise InvalidArgumentError("head_dim_v", f"1 to {width}, the width of {name}", str(head_dim_v))
        rope_dim = width - head_dim_v
        latent = _Part(0, 0, (*first.shape[:-1], head_dim_v), strides)
        if rope_dim == 0:
            return head_dim_v, 0, latent, None
        offset = head_dim_v * first.itemsize
        return head_dim_v, rope_dim, latent, _Part(0, offset, (*first.shape[:-1], rope_dim), strides)
    rope = views[1]
    if width != head_dim_v:
        raise InvalidArgumentError("head_dim_v", f"{width}, the width of {name}[0]", str(head_dim_v))
    if rope.shape[:-1] != first.shape[:-1]:
        raise InvalidArgumentError(
            f"{name}[1]", f"shape {[*first.shape[:-1], 'rope width']} as in {name}[0]", str(list(rope.shape))
        )
    latent = _Part(0, 0, first.shape, strides)
    if rope.shape[-1] == 0:
        return width, 0, latent, None
    return width, rope.shape[-1], latent, _Part(1, 0, rope.shape, settled_strides(rope))


def _query_counts(call: _Call) -> tuple[int, int]:
    """seqlen_q (the maximum) and total_q."""
    bound = call.options.max_seqlen_q
    if call.starts is not None:
        total_q = call.q[0].shape[0]
        return (total_q if bound is None else min(bound, total_q)), total_q
    batch, seqlen_q = call.q[0].shape[:2]
    if bound is not None and bound != seqlen_q:
        raise InvalidArgumentError("max_seqlen_q", f"{seqlen_q} as in q (there is no cu_seqlens_q)", str(bound))
    return seqlen_q, batch * seqlen_q


def _check_strides(call: _Call, layout: CacheLayout) -> None:
    for name, array in _named("q", call.q) + _named("kv_cache", call.kv):
        strides = layout.row_strides(array.strides) if name == "kv_cache" else array.strides
        check_rows(array.shape, strides, array.itemsize, array.device == CUDA or call.options.strict, name)
    for name, array in call.arrays():
        if array.dtype == INDEX_DTYPE and 0 not in array.shape and array.shape[-1] > 1 and array.strides[-1] != 1:
            raise InvalidArgumentError(name, "a contiguous last dimension", f"strides {array.strides}")


def _check_page_size(page_size: int) -> None:
    if page_size != 1 and page_size % CUDA_PAGE_MULTIPLE:
        raise InvalidArgumentError(
            "kv_cache", f"a page size of 1 or a multiple of {CUDA_PAGE_MULTIPLE} {NUMPY_WAY_OUT}", str(page_size)
        )


def _check_addresses(call: _Call) -> None:
    for name, array in call.arrays():
        alignment = array.itemsize if array.dtype in (INDEX_DTYPE, KV_SCALE_DTYPE) else COPY_ALIGNMENT
        if array.pointer % alignment:
            raise misaligned(name, array.pointer, alignment)
