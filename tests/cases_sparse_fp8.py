"""Random sparse cases over FP8 caches whose unused bytes are NaN. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from cases_sparse import SparseArrays, SparseCase

from cupy_mla.arrays.dtypes import numpy_dtype
from cupy_mla.layouts import LAYOUTS, CacheLayout
from cupy_mla.layouts.block_scaled import BlockScaled
from cupy_mla.layouts.codes import E8M0

NAN_BYTE = 0xFF  # of it, e4m3, bfloat16 and float32 are NaN
LARGE, TINY = 2.0**16, 2.0**-14  # what values are multiplied by that fp16 does not hold
# By what the values of tokens are multiplied; scales are powers of two but where they are "any".
KINDS = ("powers", "any", "large", "tiny", "mixed", "mixed any", "wide")
WIDE = 2.0**18  # what bfloat16 values of some tokens are multiplied by, in the last kind
# Of an lse, absolute and relative. Where scales are any, a value is rounded to fp16, which over few tokens shows.
LSE_TOLERANCES = {"any": 1e-3, "mixed any": 1e-3}
LSE_TOLERANCE = 2e-4


def as_e4m3(array: np.ndarray) -> np.ndarray:
    """Bytes of NumPy's as e4m3."""
    return array.view(numpy_dtype("float8_e4m3fn"))


def without_padding(memory: Any, shape: tuple[int, ...]) -> Any:
    """A view of pages [num_pages, bytes], of any library, as the cache of this shape that they hold."""
    return memory[:, : int(np.prod(shape[1:]))].reshape(shape)


@dataclass(frozen=True)
class Fp8SparseCase(SparseCase):
    """A case whose cache is in an FP8 layout, and of what kind its scales are."""

    layout: str = "fp8_ds_mla"
    kind: str = "powers"

    @property
    def lse_tolerance(self) -> float:
        """Of a GPU."""
        return LSE_TOLERANCES.get(self.kind, LSE_TOLERANCE)

    @property
    def cache_layout(self) -> CacheLayout:
        return LAYOUTS[self.layout]

    def build_fp8(self) -> Fp8SparseArrays:
        """Arrays of the case. Slots that no query token counts hold NaN bytes, and so do bytes without a meaning."""
        arrays = self.build()  # values of used tokens, NaN elsewhere
        layout = self.cache_layout
        flat = arrays.kv.reshape(self.num_slots, -1).astype(np.float32)
        used = np.flatnonzero(~np.isnan(flat).any(axis=1))
        widths = self.latent_dim, self.rope_dim
        shape = self.num_pages, self.page_size, 1, layout.width(*widths)
        memory = np.full((self.num_pages, layout.page_bytes(self.page_size, *widths)), NAN_BYTE, np.uint8)
        stored = without_padding(memory, shape)
        scale = None
        if isinstance(layout, BlockScaled):
            self._store_blocks(layout, stored, used, flat[used])
        else:
            scale = 2.0**-6 * {"large": LARGE, "tiny": TINY, "any": 0.7}.get(self.kind, 1.0)
            tokens = layout.quantise(flat[used][None, :, None] * np.float32(scale), scale)
            stored.reshape(self.num_slots, -1)[used] = tokens.view(np.uint8)[0, :, 0]
        flat[used] = layout.dequantise_tokens(stored, used, 0, scale)
        largest = np.abs(flat[used]).max(initial=1.0)
        q = (arrays.q.astype(np.float32) / min(largest, LARGE)).astype(arrays.q.dtype) if largest > 100 else arrays.q
        exact = replace(arrays, q=q, kv=flat.reshape(self.num_pages, self.page_size, 1, -1))
        return Fp8SparseArrays(exact, stored, memory, scale)

    def _store_blocks(self, layout: BlockScaled, stored: np.ndarray, used: np.ndarray, values: np.ndarray) -> None:
        """Tokens in their places, with scales of the case's kind."""
        if not used.size:
            return
        rng = np.random.default_rng(self.seed + 1)
        factors = {"large": [LARGE], "tiny": [TINY], "mixed": [LARGE, 1, 1, TINY]}.get(self.kind.split()[0], [1])
        factor = rng.choice(factors, used.size)
        pages, offsets = np.divmod(used, self.page_size)
        codes, scales, uncoded = layout.fields(stored)
        new_codes, new_scales, new_uncoded = (
            field[0] for field in layout.fields(layout.quantise(values[None, :, None]))
        )
        if layout.scales is None:
            general = np.ones((used.size, layout.scale_bytes // 4))
            if "any" in self.kind:
                general = rng.uniform(0.5, 2.0, general.shape)
            numbers = np.ascontiguousarray(new_scales).view(np.float32) * factor[:, None] * general
            new_scales = numbers.astype(np.float32).view(np.uint8)
        elif layout.scales is E8M0:  # others have no room for such factors
            new_scales = (new_scales.astype(np.int32) + np.log2(factor).astype(np.int32)[:, None]).astype(np.uint8)
        if self.kind == "wide":
            values = np.ascontiguousarray(new_uncoded).view(numpy_dtype("bfloat16")).astype(np.float32)
            values *= rng.choice([1, 1, WIDE], (used.size, 1))
            new_uncoded = values.astype(numpy_dtype("bfloat16")).view(np.uint8)
        meant = layout.coded // layout.block if layout.scales is not None else layout.scale_bytes
        codes[pages, offsets] = new_codes
        scales[pages, offsets, :meant] = new_scales[:, :meant]
        uncoded[pages, offsets] = new_uncoded


@dataclass(frozen=True)
class Fp8SparseArrays:
    """Arrays with the dequantised values as their cache, which float64 formulas take; and the cache as it is stored."""

    exact: SparseArrays
    stored: np.ndarray
    memory: np.ndarray  # [pages, bytes] that the cache is a view of, with what pads its pages
    kv_scale: float | None = None

    def arguments(self, convert: Any = lambda array: array, convert_cache: Any = as_e4m3) -> dict[str, Any]:
        """As `mla_sparse_decode` takes them; ``convert_cache`` makes e4m3 of bytes where the layout has no others."""
        arrays = self.exact
        cache = without_padding(convert(self.memory), self.stored.shape)
        optional = {"topk_length": arrays.lengths, "attn_sink": arrays.sinks}
        return {
            "q": convert(arrays.q),
            "kv_cache": convert_cache(cache) if self.kv_scale is not None else cache,
            "indices": convert(arrays.indices[:, :, 0]),
            **{name: None if array is None else convert(array) for name, array in optional.items()},
            "head_dim_v": arrays.case.latent_dim,
            "layout": arrays.case.layout,
            "kv_scale": self.kv_scale,
        }
