"""Arguments of a sparse call to its description, with all checks; decode and prefill become one form."""

from __future__ import annotations

import numpy as np

from ..arrays.exchange import as_numpy
from ..arrays.frameworks import CUDA
from ..arrays.view import ArrayView, contiguous_strides, view
from ..errors import InvalidArgumentError
from ..layouts import DENSE_LAYOUTS, SPARSE_LAYOUTS, CacheLayout, find_layout, infer_layout, name_cache_type
from .arguments import (
    COPY_ALIGNMENT,
    check_cuda_widths,
    check_kv_scale_array,
    check_output,
    check_plan_view,
    check_rows,
    is_number,
    misaligned,
    place_name,
    scale_value,
    settled_strides,
)
from .problem import INDEX_DTYPE, LSE_DTYPE, MAX_TOKENS, Queries
from .sparse_options import SparseDecodeArrays, SparseOptions, SparsePrefillArrays
from .sparse_problem import GatheredKeys, SparseInputs, SparseProblem

# Strides of pages and tokens are 32-bit numbers of 16 bytes in the kernels.
CUDA_MAX_KV_STRIDE = COPY_ALIGNMENT * 2**32

_Q_AXES, _PREFILL_Q_AXES = ("batch", "seqlen_q", "num_heads_q", "width"), ("s_q", "num_heads_q", "width")
_KV_AXES, _FLAT_KV_AXES = ("num_pages", "page_size", "num_heads_kv", "width"), ("s_kv", "num_heads_kv", "width")


def describe_sparse_decode(
    arrays: SparseDecodeArrays, options: SparseOptions, stream: int | None = None
) -> tuple[SparseProblem, SparseInputs]:
    """Check the arrays of a sparse decode call against its options, and describe it. Reads no array's contents.

    Parameters
    ----------
    arrays, options
        What the call was given.
    stream
        CUDA stream that will use the arrays; see `cupy_mla.arrays.view`.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value; its name, what was expected
        and what came are in the error.
    """
    call = _Call(arrays, "kv_cache", options, stream)
    _check_rank(call.q, "q", _Q_AXES, may_be_empty=2)
    _check_rank(call.kv, "kv_cache", _KV_AXES, may_be_empty=int(0 in call.q.shape))
    batch, seqlen_q = call.q.shape[:2]
    call.check_keys()
    indices = call.indices_by_head((batch, seqlen_q))
    tokens_per_length = call.check_lengths({(batch,): seqlen_q, (batch, seqlen_q): 1})
    problem = call.describe(batch, seqlen_q, indices.shape[-1], tokens_per_length)
    queries = problem.queries
    plan, out, lse = (call.view(name) for name in ("plan", "out", "lse"))
    if plan is not None:
        check_plan_view(plan, call.q.location)
    if out is not None:
        check_output(out, "out", queries.out_shape, queries.dtype, call.q.location, contiguous_rows=True)
    if lse is not None:
        check_output(lse, "lse", queries.lse_shape, LSE_DTYPE, call.q.location)
    return problem, SparseInputs(
        q=_settled(call.q), kv=_settled(call.kv), indices=indices, topk_length=call.topk_length,
        attn_sink=call.attn_sink, kv_scale=call.kv_scale, plan=plan, out=out, lse=lse,
        kv_scale_value=scale_value(arrays.kv_scale, problem.layout),
    )  # fmt: skip


def describe_sparse_prefill(
    arrays: SparsePrefillArrays, options: SparseOptions, stream: int | None = None
) -> tuple[SparseProblem, SparseInputs]:
    """Check the arrays of a sparse prefill call against its options, and describe it. Reads no array's contents.

    Parameters
    ----------
    arrays, options
        What the call was given.
    stream
        CUDA stream that will use the arrays; see `cupy_mla.arrays.view`.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value; its name, what was expected
        and what came are in the error.
    """
    call = _Call(arrays, "kv", options, stream)
    _check_rank(call.q, "q", _PREFILL_Q_AXES, may_be_empty=1)
    kv_axes = _KV_AXES if call.kv.ndim == len(_KV_AXES) else _FLAT_KV_AXES
    _check_rank(call.kv, "kv", kv_axes, may_be_empty=int(0 in call.q.shape))
    if call.kv.ndim == len(_FLAT_KV_AXES):
        call.kv = _with_axis(call.kv, 1)
    call.check_keys()
    s_q, heads, _ = call.q.shape
    indices = _with_axis(call.indices_by_head((s_q,)), 1)
    tokens_per_length = call.check_lengths({(s_q,): 1})
    problem = call.describe(s_q, 1, indices.shape[-1], tokens_per_length)
    queries = problem.queries
    outputs = {name: call.view(name) for name in ("out", "max_logits", "lse")}
    for name, output in outputs.items():
        if output is None:
            continue
        if name == "out":
            shape = (s_q, heads, queries.head_dim_v)
            check_output(output, name, shape, queries.dtype, call.q.location, contiguous_rows=True)
        else:
            check_output(output, name, (s_q, heads), LSE_DTYPE, call.q.location)
    out, lse = outputs["out"], outputs["lse"]
    return problem, SparseInputs(
        q=_with_axis(call.q, 1), kv=_settled(call.kv), indices=indices, topk_length=call.topk_length,
        attn_sink=call.attn_sink, kv_scale=call.kv_scale, out=None if out is None else _with_axis(out, 1),
        max_logits=outputs["max_logits"], lse=None if lse is None else _with_axis(lse, 2),
        kv_scale_value=scale_value(arrays.kv_scale, problem.layout),
    )  # fmt: skip


def validate_lengths(problem: SparseProblem, inputs: SparseInputs, stream: int | None = None) -> None:
    """Read topk_length back to the host and check it. Waits for the device.

    Indices may have any values: what is outside of the cache is no token.

    Raises
    ------
    InvalidArgumentError
        ``topk_length[i]`` is negative or more than there are indices.
    """
    if inputs.topk_length is None:
        return
    lengths = as_numpy(inputs.topk_length, stream)
    wrong = np.argwhere((lengths < 0) | (lengths > problem.keys.topk))
    if wrong.size:
        place = tuple(int(index) for index in wrong[0])
        name = f"topk_length[{', '.join(map(str, place))}]"
        raise InvalidArgumentError(name, f"0 to {problem.keys.topk}, the indices of a query", str(lengths[place]))


class _Call:
    """The inputs of a call as views, and the checks that decode and prefill share."""

    def __init__(
        self,
        arrays: SparseDecodeArrays | SparsePrefillArrays,
        kv_name: str,
        options: SparseOptions,
        stream: int | None,
    ) -> None:
        self._arrays, self._stream, self._kv_name, self._options = arrays, stream, kv_name, options
        self.q, self.kv, self.indices = (self._required(name) for name in ("q", kv_name, "indices"))
        self.topk_length, self.attn_sink = self.view("topk_length"), self.view("attn_sink")
        self.kv_scale = None if is_number(arrays.kv_scale) else self.view("kv_scale")

    def view(self, name: str) -> ArrayView | None:
        return None if getattr(self._arrays, name) is None else self._required(name)

    def _required(self, name: str) -> ArrayView:
        array = view(getattr(self._arrays, name), name, self._stream)
        # Strides of an array without elements may be anything.
        return _of_shape(array, array.shape, contiguous_strides(array.shape)) if 0 in array.shape else array

    def check_keys(self) -> None:
        """Whether q and the keys go together."""
        q, kv, head_dim_v = self.q, self.kv, self._options.head_dim_v
        heads, width = q.shape[-2:]
        if q.dtype not in DENSE_LAYOUTS:
            raise InvalidArgumentError("q", " or ".join(DENSE_LAYOUTS), q.dtype)
        layout = self._layout()
        if q.dtype not in layout.query_dtypes:
            expected = f"{' or '.join(layout.query_dtypes)} for a cache in the layout {layout.name}"
            raise InvalidArgumentError("q", expected, q.dtype)
        if layout in DENSE_LAYOUTS.values() and kv.shape[-1] != width:
            raise InvalidArgumentError(self._kv_name, f"width {width} as in q", str(kv.shape[-1]))
        if not 1 <= head_dim_v <= width:
            raise InvalidArgumentError("head_dim_v", f"1 to {width}, the width of q", str(head_dim_v))
        if not layout.supports(head_dim_v, width - head_dim_v):
            expected = f"a width that the layout {layout.name} has, of which head_dim_v are the value's"
            raise InvalidArgumentError("q", expected, f"{width}, with head_dim_v {head_dim_v}")
        layout.check(kv, self._kv_name, head_dim_v, width - head_dim_v)
        if heads % kv.shape[2]:
            raise InvalidArgumentError("q", f"a number of heads that {kv.shape[2]} KV heads divide", str(heads))
        if self.kv_scale is not None:
            check_kv_scale_array(self.kv_scale)

    def _layout(self) -> CacheLayout:
        """The layout that is named, or else that the cache's type and width mean."""
        q, kv, given = self.q, self.kv, self._options.layout
        if given is None and kv.dtype == q.dtype:
            return DENSE_LAYOUTS[q.dtype]
        coded = [dtype for layout in SPARSE_LAYOUTS for dtype in layout.dtypes if dtype not in DENSE_LAYOUTS]
        if given is None and kv.dtype not in coded:
            got = name_cache_type(kv.dtype, kv.shape[-1])
            raise InvalidArgumentError(self._kv_name, f"{q.dtype}, the type of q", got)
        layout = infer_layout(kv.dtype, kv.shape[-1], self._kv_name) if given is None else find_layout(given)
        if layout not in SPARSE_LAYOUTS and (q.device == CUDA or self._options.strict):
            expected = "a cache in the layout " + " or ".join(readable.name for readable in SPARSE_LAYOUTS)
            raise InvalidArgumentError(self._kv_name, expected, f"{layout.name}, which no kernel reads yet")
        return layout

    def indices_by_head(self, queries: tuple[int, ...]) -> ArrayView:
        """``indices`` with an axis of kv heads, given the shape of the query tokens. An array without serves all."""
        indices, heads = self.indices, self.kv.shape[2]
        if indices.dtype != INDEX_DTYPE:
            raise InvalidArgumentError("indices", INDEX_DTYPE, indices.dtype)
        if indices.shape[:-1] not in (queries, (*queries, heads)):
            shape, by_head = [*queries, "topk"], [*queries, heads, "topk"]
            raise InvalidArgumentError("indices", f"shape {shape} or {by_head}", str(list(indices.shape)))
        if indices.shape[-1] > MAX_TOKENS:
            raise InvalidArgumentError("indices", f"at most {MAX_TOKENS} of a query token", str(indices.shape[-1]))
        if indices.shape[-1] > 1 and indices.strides[-1] != 1:
            raise InvalidArgumentError("indices", "a contiguous last dimension", f"strides {indices.strides}")
        if indices.ndim == len(queries) + 1:
            return _with_axis(indices, len(queries), extent=heads)
        return _settled(indices)

    def check_lengths(self, shapes: dict[tuple[int, ...], int]) -> int | None:
        """How many query tokens share a length: given the shapes it may have, and that for each."""
        lengths = self.topk_length
        if lengths is None:
            return None
        if lengths.dtype != INDEX_DTYPE:
            raise InvalidArgumentError("topk_length", INDEX_DTYPE, lengths.dtype)
        if lengths.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise InvalidArgumentError("topk_length", f"shape {expected}", str(list(lengths.shape)))
        _check_contiguous(lengths, "topk_length")
        return shapes[lengths.shape]

    def describe(self, batch: int, seqlen_q: int, topk: int, tokens_per_length: int | None) -> SparseProblem:
        """The problem, after all checks that are left but those of outputs."""
        q, kv, latent_dim = self.q, self.kv, self._options.head_dim_v
        heads, width = q.shape[-2:]
        sink = self.attn_sink
        if sink is not None:
            if sink.shape != (heads,) or sink.dtype != LSE_DTYPE:
                raise InvalidArgumentError(
                    "attn_sink", f"{LSE_DTYPE} [{heads}], one per head", f"{sink.dtype} {list(sink.shape)}"
                )
            _check_contiguous(sink, "attn_sink")
        queries = Queries(
            batch=batch, seqlen_q=seqlen_q, total_q=batch * seqlen_q, num_heads_q=heads, num_heads_kv=kv.shape[2],
            latent_dim=latent_dim, rope_dim=width - latent_dim, dtype=q.dtype, causal=False,
            ragged=False,
        )  # fmt: skip
        by_tma = q.device == CUDA or self._options.strict
        self._check_places(by_tma)
        if by_tma:
            check_cuda_widths(queries)
        keys = GatheredKeys(topk, _page_size(kv), tokens_per_length)
        return SparseProblem(queries, keys, self._layout())

    def _check_places(self, by_tma: bool) -> None:
        """Devices, strides and addresses."""
        rows = [("q", self.q), (self._kv_name, self.kv)]
        words = [(name, getattr(self, name)) for name in ("indices", "topk_length", "attn_sink", "kv_scale")]
        arrays = [(name, array) for name, array in (*rows, *words) if array is not None]
        location = self.q.location
        for name, array in arrays:
            if array.location != location:
                raise InvalidArgumentError(
                    name, f"an array on q's device, {place_name(location)}", f"one on {place_name(array.location)}"
                )
        for name, array in rows:
            check_rows(array.shape, array.strides, array.itemsize, by_tma, name)
        if not by_tma:
            return
        for extent, step in zip(self.kv.shape[:2], self.kv.strides[:2], strict=True):
            if extent > 1 and step * self.kv.itemsize >= CUDA_MAX_KV_STRIDE:
                expected = f"pages and tokens less than {CUDA_MAX_KV_STRIDE} bytes apart"
                raise InvalidArgumentError(self._kv_name, expected, f"strides {self.kv.strides}")
        if self.q.device != CUDA:
            return
        for name, array in arrays:
            alignment = COPY_ALIGNMENT if array is self.q or array is self.kv else array.itemsize
            if array.pointer % alignment:
                raise misaligned(name, array.pointer, alignment)


def _check_rank(array: ArrayView, name: str, axes: tuple[str, ...], *, may_be_empty: int) -> None:
    """The first ``may_be_empty`` extents may be 0."""
    expected = f"[{', '.join(axes)}]"
    if array.ndim != len(axes):
        raise InvalidArgumentError(name, f"{len(axes)} dimensions {expected}", f"{array.ndim}: {list(array.shape)}")
    if 0 in array.shape[may_be_empty:]:
        raise InvalidArgumentError(name, f"{expected} with no extent of 0", str(list(array.shape)))


def _check_contiguous(array: ArrayView, name: str) -> None:
    step = 1
    for extent, stride in zip(reversed(array.shape), reversed(array.strides), strict=True):
        if extent > 1 and stride != step:
            raise InvalidArgumentError(name, "a contiguous array", f"strides {array.strides}")
        step *= extent


def _settled(array: ArrayView) -> ArrayView:
    return _of_shape(array, array.shape, settled_strides(array))


def _with_axis(array: ArrayView, axis: int, extent: int = 1) -> ArrayView:
    """A view with one more axis, along which nothing changes."""
    shape, strides = array.shape, settled_strides(array)
    return _of_shape(array, (*shape[:axis], extent, *shape[axis:]), (*strides[:axis], 0, *strides[axis:]))


def _of_shape(array: ArrayView, shape: tuple[int, ...], strides: tuple[int, ...]) -> ArrayView:
    return ArrayView(array.pointer, shape, strides, array.dtype, array.device, array.device_id, array.owner)


def _page_size(kv: ArrayView) -> int:
    """The page size as far as addresses depend on it: 1 where slots are equally far apart."""
    page_size = kv.shape[1]
    strides = settled_strides(kv)
    return 1 if strides[0] == page_size * strides[1] else page_size
