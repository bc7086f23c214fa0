"""Merging partial attention results over any number of KV shards."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays.dtypes import KERNEL_TYPES
from ..arrays.exchange import as_numpy, empty_like, finish, keep_imported, stacked
from ..arrays.frameworks import CUDA, check_stream, current_stream
from ..arrays.view import ArrayView, view
from ..call.arguments import misaligned
from ..call.problem import LSE_DTYPE
from ..errors import InvalidArgumentError
from ..gpu.device import require_backend, require_supported
from ..gpu.jit.module import load
from ..gpu.launch import launch_kernel
from ..kernels.combine import OCTET, STORE_ALIGNMENT, merge_states_geometry, merge_states_source
from ..kernels.structs import MERGE_STATES_PARAMS
from .reference import merge_states_reference

_RANKS = (4, 5)  # ragged [n, total_q, heads, d_v], or [n, batch, seqlen_q, heads, d_v]


def merge_states(outs: Any, lses: Any, *, stream: int | None = None) -> tuple[Any, Any]:
    """Merge partial results: ``lse = log(sum_i exp(lse_i))``, ``out = sum_i exp(lse_i - lse) * out_i``.

    Parameters
    ----------
    outs
        [n, batch, seqlen_q, num_heads_q, d_v] or [n, total_q, num_heads_q, d_v], bfloat16, float16 or float32: what
        `mla_decode` returned for each of n shards of the KV, stacked. Or a list or tuple of n such arrays of one
        framework, which are then copied into one.
    lses
        [n, batch, num_heads_q, seqlen_q] or [n, num_heads_q, total_q] float32, natural logarithms. -inf, or
        FlashMLA's +inf: nothing seen, and ``outs`` are not looked at. Or a list or tuple of n.
    stream
        ``cudaStream_t``; None: the current stream of the framework of ``outs``.

    Returns
    -------
    out
        Of the shape of one of ``outs`` and its type.
    lse
        Of the shape of one of ``lses``. Where every shard saw nothing, out = 0 and lse = -inf.

    Raises
    ------
    InvalidArgumentError
        Wrong rank, shape, type, device, or (on CUDA) a last dimension that is not contiguous or a multiple of 8; a
        stream that is no number.
    UnsupportedDeviceError
        The arrays are on a GPU that is not Hopper, or the backend that the settings ask for cannot take them.
    """
    check_stream(stream)
    outs, lses = stacked(outs, "outs", stream), stacked(lses, "lses", stream)
    outs_view, lses_view = view(outs, "outs", stream), view(lses, "lses", stream)
    out_shape, lse_shape = check_states(outs_view, lses_view)
    on_gpu = require_backend(*outs_view.location, "outs")
    out = empty_like(outs, out_shape, outs_view.dtype, stream)
    lse = empty_like(outs, lse_shape, LSE_DTYPE, stream)
    if stream is None and on_gpu:
        stream = current_stream(outs, outs_view.device_id)
    merge_views(outs_view, lses_view, view(out, "out", stream), view(lse, "lse", stream), stream)
    if on_gpu and stream is not None:
        keep_imported((outs_view, lses_view), stream)
    return finish(outs, out, stream), finish(outs, lse, stream)


def merge_views(outs: ArrayView, lses: ArrayView, out: ArrayView, lse: ArrayView, stream: int | None) -> None:
    """`merge_states` of arrays that were checked, into others; on the CPU without a stream."""
    if 0 in out.shape:
        return
    if stream is None:
        by_row = np.swapaxes(as_numpy(lses), -1, -2)  # the reference takes both in the same axis order
        as_numpy(out)[...], merged_lse = merge_states_reference(as_numpy(outs), by_row)
        as_numpy(lse)[...] = np.swapaxes(merged_lse, -1, -2)
        return
    params = np.zeros(1, MERGE_STATES_PARAMS)
    # Row indices (batch, token, head); a ragged array has one batch.
    params["sizes"] = (out.shape[0] if out.ndim == 4 else 1, *out.shape[-3:-1])
    params["outs"] = outs.pointer
    params["outs_strides"] = (outs.strides[0], *_rows(outs.strides[1:]))
    params["out"], params["out_strides"] = out.pointer, _rows(out.strides)
    params["lses"] = lses.pointer
    params["lses_strides"] = (lses.strides[0], *_lse_rows(lses.strides[1:]))
    params["lse"], params["lse_strides"] = lse.pointer, _lse_rows(lse.strides)
    params["num_states"], params["d_v"] = outs.shape[0], out.shape[-1]
    step = STORE_ALIGNMENT // outs.itemsize
    offsets = (*outs.strides[:-1], *out.strides[:-1])
    params["aligned"] = all(offset % step == 0 for offset in offsets) and not (
        (outs.pointer | out.pointer) % STORE_ALIGNMENT
    )
    rows = int(np.prod(out.shape[:-1]))
    geometry = merge_states_geometry(require_supported(outs.device_id).num_sms, rows, out.shape[-1])
    kernel = load(merge_states_source(outs.dtype), outs.device_id)
    launch_kernel(kernel, geometry.grid, geometry.block, geometry.shared_memory, stream, (params,))


def _rows(strides: tuple[int, ...]) -> tuple[int, int, int]:
    """Batch, token and head strides of [(batch,) tokens, heads, d_v]."""
    return (strides[0] if len(strides) == 4 else 0, strides[-3], strides[-2])


def _lse_rows(strides: tuple[int, ...]) -> tuple[int, int, int]:
    """Batch, token and head strides of [(batch,) heads, tokens]."""
    return (strides[0] if len(strides) == 3 else 0, strides[-1], strides[-2])


def check_states(outs: ArrayView, lses: ArrayView) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a merged out and lse.

    Raises
    ------
    InvalidArgumentError
        Rank, shape, type or device are wrong, or on CUDA the last dimension or the alignment of an address.
    """
    if outs.ndim not in _RANKS:
        raise InvalidArgumentError("outs", "4 or 5 dimensions", f"{outs.ndim}")
    if outs.shape[0] == 0:
        raise InvalidArgumentError("outs", "at least one partial result", "none")
    if outs.dtype not in KERNEL_TYPES:
        raise InvalidArgumentError("outs", "bfloat16, float16 or float32", outs.dtype)
    out_shape = outs.shape[1:]
    lse_shape = (*out_shape[:-3], out_shape[-2], out_shape[-3])
    if lses.shape != (outs.shape[0], *lse_shape):
        raise InvalidArgumentError("lses", f"shape {[outs.shape[0], *lse_shape]}", f"{list(lses.shape)}")
    if lses.dtype != "float32":
        raise InvalidArgumentError("lses", "float32", lses.dtype)
    if lses.location != outs.location:
        raise InvalidArgumentError("lses", f"an array on {outs.location}", f"one on {lses.location}")
    if outs.device == CUDA:
        if out_shape[-1] % OCTET:
            raise InvalidArgumentError("outs", f"a last dimension that is a multiple of {OCTET}", str(out_shape[-1]))
        if outs.strides[-1] != 1 and out_shape[-1] > 1:
            raise InvalidArgumentError("outs", "a contiguous last dimension", f"stride {outs.strides[-1]}")
        for name, array in (("outs", outs), ("lses", lses)):
            if array.pointer % array.itemsize:
                raise misaligned(name, array.pointer, array.itemsize)
    return out_shape, lse_shape
