"""Merging partial attention results over any number of KV shards."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays.dtypes import KERNEL_TYPES
from ..arrays.exchange import as_numpy, empty_like, finish, keep_imported
from ..arrays.frameworks import CUDA, check_stream, current_stream
from ..arrays.view import ArrayView, view
from ..call.arguments import misaligned
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
        `mla_decode` returned for each of n shards of the KV, stacked.
    lses
        [n, batch, num_heads_q, seqlen_q] or [n, num_heads_q, total_q] float32, natural logarithms; -inf: nothing seen.
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
    outs_view, lses_view = view(outs, "outs", stream), view(lses, "lses", stream)
    out_shape, lse_shape = _check(outs_view, lses_view)
    if not require_backend(*outs_view.location, "outs"):
        return _merge_on_cpu(outs, lses, out_shape, lse_shape, outs_view.dtype)
    device_id = outs_view.device_id
    info = require_supported(device_id)
    out = empty_like(outs, out_shape, outs_view.dtype, stream)
    lse = empty_like(outs, lse_shape, "float32", stream)
    if stream is None:
        stream = current_stream(outs, device_id)
    out_view, lse_view = view(out, "out", stream), view(lse, "lse", stream)
    if 0 not in out_shape:
        params = np.zeros(1, MERGE_STATES_PARAMS)
        # Row indices (batch, token, head); a ragged array has one batch.
        params["sizes"] = (out_shape[0] if len(out_shape) == 4 else 1, *out_shape[-3:-1])
        params["outs"] = outs_view.pointer
        params["outs_strides"] = (outs_view.strides[0], *_rows(outs_view.strides[1:]))
        params["out"], params["out_strides"] = out_view.pointer, _rows(out_view.strides)
        params["lses"] = lses_view.pointer
        params["lses_strides"] = (lses_view.strides[0], *_lse_rows(lses_view.strides[1:]))
        params["lse"], params["lse_strides"] = lse_view.pointer, _lse_rows(lse_view.strides)
        params["num_states"], params["d_v"] = outs_view.shape[0], out_shape[-1]
        step = STORE_ALIGNMENT // outs_view.itemsize
        offsets = (*outs_view.strides[:-1], *out_view.strides[:-1])
        params["aligned"] = all(offset % step == 0 for offset in offsets) and not (
            (outs_view.pointer | out_view.pointer) % STORE_ALIGNMENT
        )
        rows = int(np.prod(out_shape[:-1]))
        geometry = merge_states_geometry(info.num_sms, rows, out_shape[-1])
        kernel = load(merge_states_source(outs_view.dtype), device_id)
        launch_kernel(kernel, geometry.grid, geometry.block, geometry.shared_memory, stream, (params,))
        keep_imported((outs_view, lses_view), stream)
    return finish(outs, out, stream), finish(outs, lse, stream)


def _rows(strides: tuple[int, ...]) -> tuple[int, int, int]:
    """Batch, token and head strides of [(batch,) tokens, heads, d_v]."""
    return (strides[0] if len(strides) == 4 else 0, strides[-3], strides[-2])


def _lse_rows(strides: tuple[int, ...]) -> tuple[int, int, int]:
    """Batch, token and head strides of [(batch,) heads, tokens]."""
    return (strides[0] if len(strides) == 3 else 0, strides[-1], strides[-2])


def _check(outs: ArrayView, lses: ArrayView) -> tuple[tuple[int, ...], tuple[int, ...]]:
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


def _merge_on_cpu(
    outs: Any, lses: Any, out_shape: tuple[int, ...], lse_shape: tuple[int, ...], dtype: str
) -> tuple[Any, Any]:
    by_row = np.swapaxes(as_numpy(lses), -1, -2)  # the reference takes both in the same axis order
    merged, merged_lse = merge_states_reference(as_numpy(outs), by_row)
    out, lse = empty_like(outs, out_shape, dtype), empty_like(outs, lse_shape, "float32")
    as_numpy(out)[...] = merged
    as_numpy(lse)[...] = np.swapaxes(merged_lse, -1, -2)
    return finish(outs, out), finish(outs, lse)
