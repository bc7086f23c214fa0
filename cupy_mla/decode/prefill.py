"""Sparse MLA prefill: every query token attends to tokens of its own."""

from __future__ import annotations

import math
from typing import Any

from ..arrays.exchange import as_numpy, empty_like, finish, keep_imported
from ..arrays.frameworks import check_stream, current_stream
from ..arrays.sketch import pointer_of
from ..call.known import KnownCalls
from ..call.problem import LSE_DTYPE
from ..call.sparse import describe_sparse_prefill, validate_lengths
from ..call.sparse_options import (
    SPARSE_PREFILL,
    SPARSE_PREFILL_ARRAYS,
    SparseOptions,
    SparsePrefillArrays,
    sparse_option_names,
)
from ..call.sparse_problem import SparseInputs, SparseProblem
from ..gpu.device import require_backend
from ..settings import get_settings, wants_validation
from .gathered import PrefillCall, SparseStrides, prepare_prefill
from .reference_sparse import sparse_reference

Results = tuple[Any, Any, Any]

# Places in the tuples that calls are recognised by.
_FIRST_OUTPUT = SPARSE_PREFILL_ARRAYS.index("out")
_VALIDATE = sparse_option_names(SPARSE_PREFILL).index("validate")

_known: KnownCalls[PrefillCall] = KnownCalls(SPARSE_PREFILL_ARRAYS)


def mla_sparse_prefill(
    q: Any,
    kv: Any,
    indices: Any,
    *,
    softmax_scale: float | None = None,
    head_dim_v: int = 512,
    attn_sink: Any = None,
    topk_length: Any = None,
    layout: str | None = None,
    kv_scale: Any = None,
    out: Any = None,
    max_logits: Any = None,
    lse: Any = None,
    empty_lse: float = -math.inf,
    stream: int | None = None,
    validate: bool | None = None,
    strict: bool = True,
) -> Results:
    """Attention of each query token to the tokens that its indices name.

    ``out = softmax(scale * q @ k^T) @ k[..., :head_dim_v]`` over the keys ``k`` of these tokens. CUDA arrays run on the
    Hopper kernel, on the caller's current stream and without a host synchronisation; CPU arrays run on the NumPy
    reference backend.

    Parameters
    ----------
    q
        [s_q, num_heads_q, d_qk] bfloat16 or float16. Any strides with a contiguous last dimension. s_q may be 0.
    kv
        [s_kv, num_heads_kv, d_qk] of q's type, or pages of a cache [num_pages, page_size, num_heads_kv, d_qk]. The
        first ``head_dim_v`` columns are also the value. Or tokens in another layout, of bytes (`cupy_mla.layouts`),
        beside queries of bfloat16.
    indices
        [s_q, num_heads_kv, topk] int32: tokens of ``kv``, of pages the slots ``page * page_size + offset``; or
        [s_q, topk], the same for all kv heads. -1 and every other number outside of ``kv`` name no token. A token named
        twice counts twice. topk may be any number, also 0.
    softmax_scale
        Factor on the scores; None: ``d_qk ** -0.5``.
    head_dim_v
        Width of the output.
    attn_sink
        [num_heads_q] float32, natural logarithm: one more score of each head, of a key without a value. ``out`` is
        multiplied by exp(lse) / (exp(lse) + exp(sink)); max_logits and lse are without it. -inf has no effect, +inf
        gives out = 0. None: no sinks.
    topk_length
        [s_q] int32: so many leading indices of a query token count, the others are not read. None: all.
    layout, kv_scale
        Of ``kv``, as in `cupy_mla.mla_sparse_decode`.
    out, max_logits, lse
        Arrays to write to, of the shapes returned; None: new ones of q's framework.
    empty_lse
        The lse of a query token without a token: -inf, the neutral element of a merge, or +inf, as FlashMLA has it.
    stream
        ``cudaStream_t`` to run on; None: the current stream of q's framework.
    validate
        Check topk_length; on a GPU it is read back for it (synchronises). None: on the CPU yes, on a GPU as the setting
        CUPY_MLA_VALIDATE says. Without it, a length is taken as clamped to 0 and topk.
    strict
        As in `cupy_mla.mla_decode`.

    Returns
    -------
    out
        [s_q, num_heads_q, head_dim_v] of q's type; 0 for a query token without a token.
    max_logits
        [s_q, num_heads_q] float32: the largest scaled score; -inf without a token.
    lse
        [s_q, num_heads_q] float32: natural logarithm of the sum of exponentials of the scaled scores.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value. Nothing was written.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    arrays = (q, kv, indices, topk_length, attn_sink, kv_scale, out, max_logits, lse)
    return run_prefill(arrays, (head_dim_v, softmax_scale, empty_lse, validate, strict, layout), stream)


def run_prefill(arrays: tuple[Any, ...], options: tuple[Any, ...], stream: int | None = None) -> Results:
    """`mla_sparse_prefill` on what it was given, unchecked; on the way of every interface but XLA's.

    Parameters
    ----------
    arrays
        One for each field of `SparsePrefillArrays`, in their order.
    options
        One for each of the leading fields of `SparseOptions`, in their order.
    stream
        As in `mla_sparse_prefill`.

    Returns
    -------
    out, max_logits, lse
        As in `mla_sparse_prefill`.

    Raises
    ------
    InvalidArgumentError
        An argument has a wrong rank, shape, type, device, stride, alignment or value. Nothing was written.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    if stream is not None:
        check_stream(stream)
    settings = get_settings()
    found = None
    if options[_VALIDATE] is False or (options[_VALIDATE] is None and not settings.validate):
        found = _known.find(arrays, options, None, settings)
        if found is not None and found[2] is not None:
            return _launch(found[2], found[1], arrays, stream)
    given, checked = SparsePrefillArrays(*arrays), SparseOptions(*options)
    problem, inputs = describe_sparse_prefill(given, checked, stream)
    on_gpu = require_backend(*inputs.location, "q")
    if wants_validation(checked.validate, on_gpu):
        validate_lengths(problem, inputs, stream)
    scale = problem.queries.default_softmax_scale if checked.softmax_scale is None else checked.softmax_scale
    if not on_gpu:
        return _prefill_on_cpu(problem, inputs, scale, checked.empty_lse, arrays)
    if problem.queries.total_q == 0:
        return _finished(arrays, _outputs(problem, arrays, stream), stream)
    strides = SparseStrides.of(problem, inputs)
    call = prepare_prefill(problem, inputs.location[1], scale, checked.empty_lse, strides, inputs.kv_scale_value)
    if found is not None:
        _known.remember(found[0], call, settings)
    return _launch(call, inputs.addresses(*SPARSE_PREFILL_ARRAYS), arrays, stream, inputs)


def prefill_shapes(problem: SparseProblem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of out, and of max_logits and lse."""
    queries = problem.queries
    return (queries.batch, queries.num_heads_q, queries.head_dim_v), (queries.batch, queries.num_heads_q)


def _prefill_on_cpu(
    problem: SparseProblem, inputs: SparseInputs, scale: float, empty_lse: float, arrays: tuple[Any, ...]
) -> Results:
    out, max_logits, lse = results = _outputs(problem, arrays)
    sparse_reference(
        problem, inputs, scale, out=as_numpy(out)[:, None], lse=as_numpy(lse)[..., None],
        max_logits=as_numpy(max_logits), empty_lse=empty_lse,
    )  # fmt: skip
    return _finished(arrays, results)


def _launch(
    call: PrefillCall,
    addresses: tuple[int, ...],
    arrays: tuple[Any, ...],
    given_stream: int | None,
    inputs: SparseInputs | None = None,
) -> Results:
    """Queue a prepared call; makes the outputs that were not given."""
    stream = current_stream(arrays[0], call.device_id) if given_stream is None else given_stream
    results = arrays[_FIRST_OUTPUT:]
    if 0 in addresses[_FIRST_OUTPUT:]:
        results = _outputs(call.problem, arrays, given_stream)
        addresses = (*addresses[:_FIRST_OUTPUT], *map(pointer_of, results))
    call(addresses, stream)
    if inputs is None:  # recognised, which only arrays of torch and CuPy are
        return results
    keep_imported(inputs.views(), stream)
    return _finished(arrays, results, stream)


def _outputs(problem: SparseProblem, arrays: tuple[Any, ...], stream: int | None = None) -> Results:
    """out, max_logits and lse as given, or new ones."""
    out_shape, row_shape = prefill_shapes(problem)
    out, max_logits, lse = (
        empty_like(arrays[0], shape, dtype, stream) if given is None else given
        for given, shape, dtype in zip(
            arrays[_FIRST_OUTPUT:],
            (out_shape, row_shape, row_shape),
            (problem.queries.dtype, LSE_DTYPE, LSE_DTYPE),
            strict=True,
        )
    )
    return out, max_logits, lse


def _finished(arrays: tuple[Any, ...], results: Results, stream: int | None = None) -> Results:
    """Those that were not given in the framework of q."""
    out, max_logits, lse = (
        result if given is not None else finish(arrays[0], result, stream)
        for given, result in zip(arrays[_FIRST_OUTPUT:], results, strict=True)
    )
    return out, max_logits, lse
