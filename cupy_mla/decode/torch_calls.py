"""What runs for `cupy_mla.torch_ops` where a function of the package does not do as it is, and what comes out of each.

Of tensors without memory, which torch.compile traces a program with, only shapes and types are known.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ..arrays.exchange import empty_like
from ..arrays.frameworks import CPU, CUDA, current_stream
from ..arrays.sketch import pointer_of
from ..arrays.view import ArrayView
from ..call.arguments import COPY_ALIGNMENT
from ..call.describe import describe_decode
from ..call.options import DecodeArrays, DecodeOptions
from ..call.sparse import describe_sparse_decode
from ..call.sparse_options import SparseDecodeArrays, SparseOptions
from ..errors import InvalidArgumentError
from .blueprint import Blueprint
from .dense import describe_plan
from .plan import plan_kind
from .plan_arrays import plan_array_bytes
from .sparse import describe_sparse_plan
from .sparse_plan import sparse_plan_kind

Values = tuple[Any, ...]


# Plans ---------------------------------------------------------------------------------------------------------------


def run_plan(arrays: Values, options: Values) -> Any:
    """`plan_decode` into a tensor."""
    given, checked = DecodeArrays(*arrays), DecodeOptions(*options)
    problem, inputs, kind = describe_plan(given, checked)
    addresses = inputs.addresses()
    lengths = inputs.planned_lengths.pointer, addresses.cu_seqlens_q
    return _fill_plan(_first(given.q), plan_array_bytes(problem, checked, kind), kind, lengths)


def run_sparse_plan(arrays: Values, options: Values) -> Any:
    """`plan_sparse_decode` into a tensor."""
    given, checked = SparseDecodeArrays(*arrays), SparseOptions(*options)
    problem, inputs, kind = describe_sparse_plan(given, checked)
    lengths, extra_lengths = inputs.addresses("topk_length", "extra_topk_length")
    return _fill_plan(given.q, plan_array_bytes(problem, checked, kind), kind, (lengths, 0), extra_lengths)


def _fill_plan(
    q: Any, size: int, kind: Blueprint[Any] | None, lengths: tuple[int, int], extra_lengths: int = 0
) -> Any:
    torch = sys.modules["torch"]
    if kind is None:
        return q.new_zeros((size,), dtype=torch.uint8)
    plan = empty_like(q, (size,), "uint8")
    kind.launch_planner(*lengths, pointer_of(plan), current_stream(q, kind.location[1]), extra_lengths)
    return plan


def fake_plan(arrays: Values, options: Values) -> Any:
    """Of `run_plan`."""

    def size_of() -> int:
        checked = DecodeOptions(*options)
        problem, inputs = describe_decode(DecodeArrays(*map(_view_of_fake, arrays)), checked)
        return plan_array_bytes(problem, checked, plan_kind(problem, inputs.location, checked))

    return _fake_plan(arrays, size_of)


def fake_sparse_plan(arrays: Values, options: Values) -> Any:
    """Of `run_sparse_plan`."""

    def size_of() -> int:
        checked = SparseOptions(*options)
        problem, inputs = describe_sparse_decode(SparseDecodeArrays(*map(_view_of_fake, arrays)), checked)
        kind = sparse_plan_kind(problem, inputs.location, checked)
        return plan_array_bytes(problem, checked, kind)

    return _fake_plan(arrays, size_of)


def _fake_plan(arrays: Values, size_of: Callable[[], int]) -> Any:
    torch = sys.modules["torch"]
    tensors = [part for array in arrays for part in (array if isinstance(array, tuple) else (array,))]
    extents = [extent for tensor in tensors if tensor is not None for extent in (*tensor.shape, *tensor.stride())]
    is_known = all(type(extent) is int for extent in extents)
    size = size_of() if is_known else torch.library.get_ctx().new_dynamic_size()  # else when it runs
    return _first(arrays[0]).new_empty((size,), dtype=torch.uint8)


# Results -------------------------------------------------------------------------------------------------------------


def fake_decode(arrays: Values, options: Values) -> tuple[Any, Any]:
    """out and lse of dense and of sparse decoding.

    Raises
    ------
    InvalidArgumentError
        q has neither 3 nor 4 dimensions.
    """
    q, head_dim_v = _first(arrays[0]), options[0]
    if q.dim() not in (3, 4):
        raise InvalidArgumentError("q", "[batch, seqlen_q, heads, width] or [total_q, heads, width]", f"{q.dim()} dims")
    *batch, tokens, heads, _width = q.shape
    out = q.new_empty((*batch, tokens, heads, head_dim_v))
    return out, q.new_empty((*batch, heads, tokens), dtype=sys.modules["torch"].float32)


def fake_prefill(arrays: Values, options: Values) -> tuple[Any, Any, Any]:
    """out, max_logits and lse of sparse prefill.

    Raises
    ------
    InvalidArgumentError
        q has other than 3 dimensions.
    """
    q, head_dim_v = arrays[0], options[0]
    if q.dim() != 3:
        raise InvalidArgumentError("q", "[s_q, heads, width]", f"{q.dim()} dims")
    tokens, heads, _width = q.shape
    rows = [q.new_empty((tokens, heads), dtype=sys.modules["torch"].float32) for _ in range(2)]
    return q.new_empty((tokens, heads, head_dim_v)), rows[0], rows[1]


def fake_slots(token_indices: Any, *arguments: Any, **options: Any) -> Any:
    """Of `slots_of`."""
    return token_indices.new_empty(token_indices.shape)


def fake_local_slots(token_indices: Any, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """Of `local_slots`."""
    return fake_slots(token_indices), token_indices.new_empty(token_indices.shape[:-1])


def fake_nothing(*arguments: Any, **options: Any) -> None:
    """Of operators that write to what they are given."""
    return None


def fake_merge(outs: Any, lses: Any) -> tuple[Any, Any]:
    """Of `merge_states`."""
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _view_of_fake(array: Any) -> Any:
    """A view of a tensor without memory, as aligned as any; of a pair, a pair."""
    if array is None:
        return None
    if isinstance(array, tuple):
        return tuple(map(_view_of_fake, array))
    device = CUDA if array.is_cuda else CPU
    dtype = str(array.dtype).removeprefix("torch.")
    device_id = (array.device.index or 0) if device == CUDA else 0
    return ArrayView(COPY_ALIGNMENT, tuple(array.shape), tuple(array.stride()), dtype, device, device_id, array)


def _first(array: Any) -> Any:
    return array[0] if isinstance(array, tuple) else array
