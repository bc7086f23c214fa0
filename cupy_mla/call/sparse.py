"""Arguments of a sparse call to its description, with all checks; decode and prefill become one form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..arrays.exchange import as_numpy
from ..arrays.frameworks import CUDA
from ..arrays.view import ArrayView, view
from ..errors import InvalidArgumentError
from ..layouts import DENSE_LAYOUTS, find_layout
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
)
from .problem import LSE_DTYPE, Queries
from .sparse_options import SparseDecodeArrays, SparseOptions, SparsePrefillArrays
from .sparse_problem import GatheredKeys, SparseInputs, SparseProblem
from .token_list import (
    EXTRA_NAMES,
    TokenList,
    TokenListNames,
    check_contiguous,
    runs_kernels,
    settled,
    with_axis,
    without_elements,
)

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
    main, extra = call.main_list(), call.extra_list(arrays)
    queries, sharing = (batch, seqlen_q), {(batch,): seqlen_q, (batch, seqlen_q): 1}
    indices, tokens_per_length = main.indices_by_head(queries), main.check_lengths(sharing)
    keys = GatheredKeys(indices.shape[-1], main.page_size, tokens_per_length, cp_share=options.cp_world > 1)
    extra_indices = None
    if extra is not None:
        extra_indices = extra.indices_by_head(queries)
        keys = replace(
            keys,
            extra_topk=extra_indices.shape[-1],
            extra_page_size=extra.page_size,
            extra_tokens_per_length=extra.check_lengths(sharing),
        )
    problem = call.describe(batch, seqlen_q, keys, main, extra)
    plan, out, lse = (call.view(name) for name in ("plan", "out", "lse"))
    if plan is not None:
        check_plan_view(plan, call.q.location)
    if out is not None:
        check_output(
            out, "out", problem.queries.out_shape, problem.queries.dtype, call.q.location, contiguous_rows=True
        )
    if lse is not None:
        check_output(lse, "lse", problem.queries.lse_shape, LSE_DTYPE, call.q.location)
    return problem, SparseInputs(
        q=settled(call.q), kv=settled(main.kv), indices=indices, topk_length=main.lengths,
        attn_sink=call.attn_sink, kv_scale=call.kv_scale, extra_kv=None if extra is None else settled(extra.kv),
        extra_indices=extra_indices, extra_topk_length=None if extra is None else extra.lengths,
        plan=plan, out=out, lse=lse, kv_scale_value=call.scale_value(problem),
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
        call.kv = with_axis(call.kv, 1)
    main = call.main_list()
    s_q, heads, _ = call.q.shape
    indices = with_axis(main.indices_by_head((s_q,)), 1)
    keys = GatheredKeys(indices.shape[-1], main.page_size, main.check_lengths({(s_q,): 1}))
    problem = call.describe(s_q, 1, keys, main)
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
        q=with_axis(call.q, 1), kv=settled(main.kv), indices=indices, topk_length=main.lengths,
        attn_sink=call.attn_sink, kv_scale=call.kv_scale, out=None if out is None else with_axis(out, 1),
        max_logits=outputs["max_logits"], lse=None if lse is None else with_axis(lse, 2),
        kv_scale_value=call.scale_value(problem),
    )  # fmt: skip


def validate_lengths(problem: SparseProblem, inputs: SparseInputs, stream: int | None = None) -> None:
    """Read topk_length and extra_topk_length back to the host and check them. Waits for the device.

    Indices may have any values: what is outside of the cache is no token.

    Raises
    ------
    InvalidArgumentError
        ``topk_length[i]`` or ``extra_topk_length[i]`` is negative or more than there are indices.
    """
    keys = problem.keys
    lists = ("topk_length", inputs.topk_length, keys.topk), (
        "extra_topk_length", inputs.extra_topk_length, keys.extra_topk or 0,
    )  # fmt: skip
    for name, array, topk in lists:
        if array is None:
            continue
        lengths = as_numpy(array, stream)
        wrong = np.argwhere((lengths < 0) | (lengths > topk))
        if wrong.size:
            place = tuple(int(index) for index in wrong[0])
            where = f"{name}[{', '.join(map(str, place))}]"
            raise InvalidArgumentError(where, f"0 to {topk}, the indices of a query", str(lengths[place]))


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
        self.attn_sink = self.view("attn_sink")
        self.kv_scale = None if is_number(arrays.kv_scale) else self.view("kv_scale")
        self._by_kernel = runs_kernels(self.q, options.strict)

    def view(self, name: str) -> ArrayView | None:
        return None if getattr(self._arrays, name) is None else self._required(name)

    def _required(self, name: str) -> ArrayView:
        return without_elements(view(getattr(self._arrays, name), name, self._stream))

    def main_list(self) -> TokenList:
        """The tokens of the call's cache, checked as keys of q."""
        if self.q.dtype not in DENSE_LAYOUTS:
            raise InvalidArgumentError("q", " or ".join(DENSE_LAYOUTS), self.q.dtype)
        names = TokenListNames(self._kv_name)
        return self._token_list(names, self.kv, self.indices, self.view("topk_length"), self._options.layout)

    def extra_list(self, arrays: SparseDecodeArrays) -> TokenList | None:
        """The same of the second cache; None if there is none."""
        kv, indices, lengths = EXTRA_NAMES[:3]
        if arrays.extra_kv_cache is None:
            for name in (indices, lengths):
                if getattr(arrays, name) is not None:
                    raise InvalidArgumentError(name, f"None without {kv}", "an array")
            if self._options.extra_layout is not None:
                raise InvalidArgumentError(EXTRA_NAMES.layout, f"None without {kv}", repr(self._options.extra_layout))
            return None
        if arrays.extra_indices is None:
            raise InvalidArgumentError(indices, f"an array beside {kv}", "None")
        cache = self._required(kv)
        _check_rank(cache, kv, _KV_AXES, may_be_empty=int(0 in self.q.shape))
        if cache.shape[2] != self.kv.shape[2]:
            expected = f"{self.kv.shape[2]} KV heads as in {self._kv_name}"
            raise InvalidArgumentError(kv, expected, str(cache.shape[2]))
        layout = self._options.extra_layout
        if layout is None and self._options.layout is not None and cache.dtype not in DENSE_LAYOUTS:
            named = find_layout(self._options.layout)
            layout = named.name if named.fits(cache.dtype, cache.shape[-1]) else None
        return self._token_list(EXTRA_NAMES, cache, self._required(indices), self.view(lengths), layout)

    def _token_list(
        self, names: TokenListNames, kv: ArrayView, indices: ArrayView, lengths: ArrayView | None, layout: str | None
    ) -> TokenList:
        tokens = TokenList(names, self.q, kv, indices, lengths, layout, self._by_kernel)
        tokens.check_keys(self._options.head_dim_v)
        if self.q.shape[-2] % kv.shape[2]:
            expected = f"a number of heads that {kv.shape[2]} KV heads divide"
            raise InvalidArgumentError("q", expected, str(self.q.shape[-2]))
        if self.kv_scale is not None:
            check_kv_scale_array(self.kv_scale)
        return tokens

    def scale_value(self, problem: SparseProblem) -> float:
        """The scale of the caches that have one for all their values, where it is a number."""
        layout, extra = problem.layout, problem.extra_layout
        return scale_value(self._arrays.kv_scale, extra if extra is not None and extra.needs_scale else layout)

    def describe(
        self, batch: int, seqlen_q: int, keys: GatheredKeys, main: TokenList, extra: TokenList | None = None
    ) -> SparseProblem:
        """The problem, after all checks that are left but those of outputs."""
        q, latent_dim = self.q, self._options.head_dim_v
        heads, width = q.shape[-2:]
        sink = self.attn_sink
        if sink is not None:
            if sink.shape != (heads,) or sink.dtype != LSE_DTYPE:
                raise InvalidArgumentError(
                    "attn_sink", f"{LSE_DTYPE} [{heads}], one per head", f"{sink.dtype} {list(sink.shape)}"
                )
            check_contiguous(sink, "attn_sink")
        queries = Queries(
            batch=batch, seqlen_q=seqlen_q, total_q=batch * seqlen_q, num_heads_q=heads, num_heads_kv=main.kv.shape[2],
            latent_dim=latent_dim, rope_dim=width - latent_dim, dtype=q.dtype, causal=False,
            ragged=False,
        )  # fmt: skip
        lists = [main] if extra is None else [main, extra]
        self._check_places(lists)
        if self._by_kernel:
            check_cuda_widths(queries)
            if extra is not None and not extra.layout.mixes_with(main.layout):
                expected = f"a cache that a kernel reads beside one in the layout {main.layout.name}"
                raise InvalidArgumentError(extra.names.kv, expected, f"one in the layout {extra.layout.name}")
        return SparseProblem(queries, keys, main.layout, None if extra is None else extra.layout)

    def _check_places(self, lists: list[TokenList]) -> None:
        """Devices, strides and addresses."""
        named = [("q", self.q), *(pair for tokens in lists for pair in tokens.arrays())]
        others = [(name, getattr(self, name)) for name in ("attn_sink", "kv_scale")]
        arrays = [*named, *((name, array) for name, array in others if array is not None)]
        location = self.q.location
        for name, array in arrays:
            if array.location != location:
                raise InvalidArgumentError(
                    name, f"an array on q's device, {place_name(location)}", f"one on {place_name(array.location)}"
                )
        check_rows(self.q.shape, self.q.strides, self.q.itemsize, self._by_kernel, "q")
        for tokens in lists:
            kv = tokens.kv
            strides = tokens.layout.row_strides(kv.strides)
            check_rows(kv.shape, strides, kv.itemsize, self._by_kernel, tokens.names.kv)
            if self._by_kernel:
                tokens.check_strides()
        if self.q.device != CUDA:
            return
        rows = [self.q, *(tokens.kv for tokens in lists)]
        for name, array in arrays:
            alignment = COPY_ALIGNMENT if any(array is row for row in rows) else array.itemsize
            if array.pointer % alignment:
                raise misaligned(name, array.pointer, alignment)


def _check_rank(array: ArrayView, name: str, axes: tuple[str, ...], *, may_be_empty: int) -> None:
    """The first ``may_be_empty`` extents may be 0."""
    expected = f"[{', '.join(axes)}]"
    if array.ndim != len(axes):
        raise InvalidArgumentError(name, f"{len(axes)} dimensions {expected}", f"{array.ndim}: {list(array.shape)}")
    if 0 in array.shape[may_be_empty:]:
        raise InvalidArgumentError(name, f"{expected} with no extent of 0", str(list(array.shape)))
