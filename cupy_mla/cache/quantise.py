"""16-bit rows beside caches that hold fewer bits of each value: what is rounded how, for kernels and for NumPy.

The kernels are kernels_cu/cache/quantise.cu and dequantise.cu; NumPy's side are the layouts themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays.exchange import as_numpy
from ..arrays.view import ArrayView, view
from ..call.arguments import KV_SCALE_DTYPE, check_kv_scale, check_kv_scale_array, is_number, misaligned
from ..errors import InvalidArgumentError
from ..kernels.append import CHUNK_VALUES
from ..layouts import DENSE_LAYOUTS, FP8_E4M3, CacheLayout, find_layout, infer_layout
from ..layouts.block_scaled import BlockScaled
from ..layouts.codes import E2M1, E4M3, E8M0, Codes
from .segments import Segment, check_same_place, match_segments

_BFLOAT16_BITS = 16
# Of kernels_cu/cache/blocks.h; None: float32.
_CODES = {E4M3: 0, E2M1: 1}
_SCALE_FORMATS: dict[Codes | None, int] = {None: 0, E8M0: 1, E4M3: 2}


@dataclass(frozen=True, slots=True, eq=False)
class Quantiser:
    """How tokens are rounded, and how they are read again.

    Attributes
    ----------
    layout
        That of the cache.
    scale
        Of a layout with one scale for a whole cache, that scale as one float32 in an array, or None: then
        ``scale_value`` counts.
    scale_value
        The same as a number.
    """

    layout: CacheLayout
    scale: ArrayView | None
    scale_value: float

    def factor(self) -> float | None:
        """That scale, read now; None of a layout that has its scales in the cache."""
        if not self.layout.needs_scale:
            return None
        return self.scale_value if self.scale is None else float(as_numpy(self.scale).reshape(()))


def settle_quantiser(
    caches: list[ArrayView],
    rows: list[ArrayView],
    kv_scale: Any,
    layout: CacheLayout | str | None,
    stream: int | None,
) -> Quantiser | None:
    """What the types of the cache and of the rows ask for; None: the rows are copied as they are.

    Raises
    ------
    InvalidArgumentError
        The layout is unknown, in doubt, or none of the cache; or there is a scale where none belongs, or none where one
        does.
    """
    stored, dtype = caches[0].dtype, rows[0].dtype
    found = None if layout is None else find_layout(layout)
    if found is not None and stored not in found.dtypes:
        raise InvalidArgumentError("kv_cache", f"{' or '.join(found.dtypes)} for the layout {found.name}", stored)
    if stored == dtype or dtype not in DENSE_LAYOUTS or stored in DENSE_LAYOUTS:
        if kv_scale is not None and not (found is not None and found.needs_scale):
            expected = "None: rows of the cache's own type are copied as they are"
            raise InvalidArgumentError("kv_scale", expected, type(kv_scale).__name__)
        return None
    if found is None:
        pair = len(caches) == 2  # only this one has the two parts apart
        found = FP8_E4M3 if pair and stored in FP8_E4M3.dtypes else infer_layout(stored, caches[0].shape[-1])
    if not found.needs_scale:
        if kv_scale is not None:
            expected = f"None: the layout {found.name} has its scales in the cache"
            raise InvalidArgumentError("kv_scale", expected, type(kv_scale).__name__)
        return Quantiser(found, None, 1.0)
    if kv_scale is None:
        expected = f"a number, or one {KV_SCALE_DTYPE} in an array, for the layout {found.name}"
        raise InvalidArgumentError("kv_scale", expected, "None")
    if is_number(kv_scale):
        return Quantiser(found, None, check_kv_scale(kv_scale))
    scale = view(kv_scale, "kv_scale", stream)
    check_kv_scale_array(scale)
    check_same_place(scale, "kv_scale", caches[0])
    if scale.pointer % scale.itemsize:
        raise misaligned("kv_scale", scale.pointer, scale.itemsize)
    return Quantiser(found, scale, 1.0)


def quantised_segments(
    layout: CacheLayout, caches: list[ArrayView], rows: list[ArrayView], rows_name: str = "kv_new"
) -> list[Segment]:
    """The columns that are rounded, and then those that stay 16-bit.

    Parameters
    ----------
    rows_name
        What errors call the rows.

    Raises
    ------
    InvalidArgumentError
        The cache is none of the layout, or the sides differ in device, number of heads or widths.
    """
    if not isinstance(layout, BlockScaled):
        return match_segments(caches, rows, rows[0].dtype, rows_name)
    if len(caches) != 1:
        raise InvalidArgumentError("kv_cache", f"one array for the layout {layout.name}", "a pair")
    [cache] = caches
    layout.check(cache, "kv_cache", layout.latent_dim, layout.rope_dim)
    widths = [part.shape[-1] for part in rows]
    uncoded = layout.latent_dim + layout.rope_dim - layout.coded
    expected = [layout.coded, uncoded] if len(rows) == 2 else [layout.coded + uncoded]
    if widths != expected or rows[0].shape[1] != 1:
        words = " and ".join(f"[num_tokens, {width}]" for width in expected)
        got = " and ".join(str(list(part.shape)) for part in rows)
        raise InvalidArgumentError(rows_name, f"{words} for the layout {layout.name}", got)
    for part in rows:
        check_same_place(part, rows_name, cache)
        if part.dtype != rows[0].dtype:
            raise InvalidArgumentError(rows_name, f"one type, {rows[0].dtype}", part.dtype)
    token_bytes, _, _ = layout.steps(cache)
    segments = [Segment(cache, 0, rows[0], 0, layout.coded, 8 // layout.codes.per_byte, token_bytes)]
    if uncoded:
        column = 0 if len(rows) == 2 else layout.coded
        segments.append(Segment(cache, layout.uncoded_start, rows[-1], column, uncoded, _BFLOAT16_BITS, token_bytes))
    return segments


def put_numpy(
    quantiser: Quantiser,
    segments: list[Segment],
    pages: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
    values: list[npt.NDArray[np.float32]],
) -> None:
    """Store tokens at their places, on the CPU; ``values`` are [num_tokens, num_heads_kv, width] of each segment."""
    layout, scale = quantiser.layout, quantiser.factor()
    if isinstance(layout, BlockScaled):
        layout.put(as_numpy(segments[0].cache), pages, offsets, np.concatenate(values, axis=-1), None)
        return
    for segment, part in zip(segments, values, strict=True):
        columns = slice(segment.cache_column, segment.cache_column + segment.width)
        layout.put(as_numpy(segment.cache)[..., columns], pages, offsets, part, scale)


def pack_quantiser(fields: Any, quantiser: Quantiser, segments: list[Segment]) -> None:
    """Fill in what a ``structs.BLOCKS_PARAMS`` has beside segments and places."""
    layout, cache = quantiser.layout, segments[0].cache
    fields["rows_page_steps"][: len(segments)] = [segment.rows_page_step for segment in segments]
    fields["kv_scale"] = 0 if quantiser.scale is None else quantiser.scale.pointer
    fields["kv_scale_value"] = quantiser.scale_value
    if not isinstance(layout, BlockScaled):
        return
    _, first_scales, scale_bytes = layout.steps(cache)
    fields["scales"] = cache.pointer + first_scales
    fields["scales_page_stride"], fields["scales_token_stride"] = cache.strides[0], scale_bytes
    fields["block_shift"] = (layout.block // CHUNK_VALUES).bit_length() - 1
    fields["codes"], fields["scale_format"] = _CODES[layout.codes], _SCALE_FORMATS[layout.scales]
    fields["second_is_plain"] = len(segments) > 1
