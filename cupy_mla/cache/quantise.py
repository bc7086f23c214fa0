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
from ..call.arguments import (
    KV_SCALE_DTYPE,
    PARTS_OF_A_TOKEN,
    check_kv_scale_array,
    has_scale_of_each_part,
    is_number,
    is_pair_of_numbers,
    misaligned,
    scale_values,
)
from ..errors import InvalidArgumentError
from ..layouts import DENSE_LAYOUTS, FP8_E4M3, CacheLayout, find_layout, infer_layout
from ..layouts.block_scaled import BlockScaled
from .segments import Segment, check_same_place, match_segments

_BFLOAT16_BITS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Quantiser:
    """How tokens are rounded, and how they are read again.

    Attributes
    ----------
    layout
        That of the cache.
    scale
        Of a layout with one scale for a whole cache, or one for latent and rope part each, that scale as one float32
        in an array, or two, or None: then ``scale_values`` count.
    scale_values
        The same as numbers, of latent and rope part.
    """

    layout: CacheLayout
    scale: ArrayView | None
    scale_values: tuple[float, float]

    def factors(self) -> tuple[float, float] | tuple[None, None]:
        """These scales, read now; None of a layout that has its scales in the cache."""
        if not self.layout.needs_scale:
            return None, None
        if self.scale is None:
            return self.scale_values
        latent, rope = np.broadcast_to(as_numpy(self.scale), PARTS_OF_A_TOKEN)
        return float(latent), float(rope)


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
        return Quantiser(found, None, (1.0, 1.0))
    if kv_scale is None:
        expected = f"a number, or one {KV_SCALE_DTYPE} in an array, for the layout {found.name}"
        raise InvalidArgumentError("kv_scale", expected, "None")
    is_array = not is_number(kv_scale) and not is_pair_of_numbers(kv_scale)
    scale = view(kv_scale, "kv_scale", stream) if is_array else None
    if scale is not None:
        check_kv_scale_array(scale, of_parts=True)
        check_same_place(scale, "kv_scale", caches[0])
        if scale.pointer % scale.itemsize:
            raise misaligned("kv_scale", scale.pointer, scale.itemsize)
    if has_scale_of_each_part(kv_scale if scale is None else scale) and len(caches) == len(rows) == 1:
        expected = f"a number, or one {KV_SCALE_DTYPE} in an array, unless cache or rows are a pair (latent, rope)"
        raise InvalidArgumentError("kv_scale", expected, "two")
    return Quantiser(found, scale, scale_values(kv_scale, found))


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
    layout = quantiser.layout
    if isinstance(layout, BlockScaled):
        layout.put(as_numpy(segments[0].cache), pages, offsets, np.concatenate(values, axis=-1), None)
        return
    for segment, part, scale in zip(segments, values, quantiser.factors(), strict=False):  # there may be no rope part
        columns = slice(segment.cache_column, segment.cache_column + segment.width)
        layout.put(as_numpy(segment.cache)[..., columns], pages, offsets, part, scale)


def pack_quantiser(fields: Any, quantiser: Quantiser, segments: list[Segment]) -> None:
    """Fill in what a ``structs.BLOCKS_PARAMS`` has beside segments and places."""
    layout, cache = quantiser.layout, segments[0].cache
    fields["rows_page_steps"][: len(segments)] = [segment.rows_page_step for segment in segments]
    scale = quantiser.scale
    if scale is not None:
        fields["kv_scales"] = scale.pointer, scale.pointer + (has_scale_of_each_part(scale) and scale.itemsize)
    fields["kv_scale_values"] = quantiser.scale_values
    if not isinstance(layout, BlockScaled):
        return
    _, first_scales, scale_bytes = layout.steps(cache)
    fields["scales"] = cache.pointer + first_scales
    fields["scales_page_stride"], fields["scales_token_stride"] = cache.strides[0], scale_bytes
