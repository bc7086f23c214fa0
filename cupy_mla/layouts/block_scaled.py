"""The layouts in bytes, whose values share a scale block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..arrays.dtypes import numpy_dtype
from ..arrays.events import unheeded
from ..arrays.view import ArrayView, view
from ..errors import InvalidArgumentError
from .base import CacheLayout, Float32Array, Floats, Indices, Stored, cache_values
from .codes import E2M1, Bytes, Codes, e4m3_scales, largest_magnitudes, power_of_two_scales

_BFLOAT16_BYTES = 2
_FLOAT32 = np.dtype("<f4")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScaled(CacheLayout):
    """Tokens of one pair of widths: the first values in e4m3 or e2m1 with a scale for each block, the rest in bfloat16.

    A token is its codes, its scales and its bfloat16 values, one behind the other. Where `scales_end_page`, the scales
    of all its tokens come behind the tokens of a page.

    Attributes
    ----------
    latent_dim, rope_dim
        The widths.
    coded
        How many leading values have codes.
    codes
        Their format.
    block
        How many of them share a scale.
    scales
        Format of the scales; None: float32.
    scale_bytes
        Bytes of a token's scales, with any that have no meaning.
    scales_end_page
        Whether the scales are at the end of each page, not in its tokens.
    page_multiple
        Bytes; pages start at multiples of it, from the start of the cache.
    """

    has_columns: ClassVar[bool] = False

    dtypes: tuple[str, ...] = ("uint8", "float8_e4m3fn")
    latent_dim: int
    rope_dim: int
    coded: int
    codes: Codes
    block: int
    scales: Codes | None
    scale_bytes: int
    scales_end_page: bool = False
    page_multiple: int = 1

    @property
    def _token_width(self) -> int:
        uncoded = self.latent_dim + self.rope_dim - self.coded
        return self.coded // self.codes.per_byte + self.scale_bytes + uncoded * _BFLOAT16_BYTES

    @property
    def page_end_bytes(self) -> int:
        """The scales, where they are there."""
        return self.scale_bytes if self.scales_end_page else 0

    def row_strides(self, strides: tuple[int, ...]) -> tuple[int, ...]:
        """Rows are without what lies at the page's end."""
        page, _, *others = strides
        return (page, self._token_width - self.page_end_bytes, *others) if self.scales_end_page else strides

    def mixes_with(self, other: CacheLayout) -> bool:
        """Layouts in which the same values have codes, with scales: they differ in how a row is read, not in what of it
        is multiplied."""
        widths = self.latent_dim, self.rope_dim, self.coded
        return isinstance(other, BlockScaled) and widths == (other.latent_dim, other.rope_dim, other.coded)

    def supports(self, latent_dim: int, rope_dim: int) -> bool:
        """The layout's own widths."""
        return (latent_dim, rope_dim) == (self.latent_dim, self.rope_dim)

    def fits(self, dtype: str, width: int) -> bool:
        """Arrays of bytes with a token's bytes as the last dimension."""
        return dtype in self.dtypes and width == self._token_width

    def width(self, latent_dim: int, rope_dim: int) -> int:
        """Bytes of a token; of other widths than the layout's none can be stored."""
        if not self.supports(latent_dim, rope_dim):
            expected = f"{self.latent_dim}+{self.rope_dim} for {self.name}"
            raise InvalidArgumentError("latent_dim+rope_dim", expected, f"{latent_dim}+{rope_dim}")
        return self._token_width

    def page_bytes(self, page_size: int, latent_dim: int, rope_dim: int, num_heads_kv: int = 1) -> int:
        """Bytes from the start of one page of a new cache to the next, a multiple of `page_multiple`."""
        used = page_size * self.token_bytes(latent_dim, rope_dim, num_heads_kv)
        return used + -used % self.page_multiple

    def check(self, cache: ArrayView, name: str, latent_dim: int, rope_dim: int) -> None:
        """As for every layout; pages must start at multiples of `page_multiple`, and be without gaps if their end holds
        the scales."""
        CacheLayout.check(self, cache, name, latent_dim, rope_dim)
        num_pages, page_size, _, width = cache.shape
        page_stride, token_stride, _, byte_stride = cache.strides
        if num_pages == 0:
            return  # its strides mean nothing
        if self.scales_end_page and (byte_stride != 1 or (page_size > 1 and token_stride != width)):
            expected = f"pages without gaps for the layout {self.name}"
            raise InvalidArgumentError(name, expected, f"strides {cache.strides}")
        if num_pages > 1 and page_stride % self.page_multiple:
            raise InvalidArgumentError(
                name, f"a page stride that is a multiple of {self.page_multiple} bytes", f"{page_stride} bytes"
            )

    @property
    def uncoded_start(self) -> int:
        """Where a token's bfloat16 values begin, in bytes from its first code."""
        return self.coded // self.codes.per_byte + (0 if self.scales_end_page else self.scale_bytes)

    def steps(self, cache: ArrayView) -> tuple[int, int, int]:
        """Of a cache that `check` takes, in bytes: from a token to the next, from a page's start to its first token's
        scales, and from those to the next token's."""
        _, page_size, _, width = cache.shape
        if self.scales_end_page:
            value_bytes = width - self.scale_bytes
            return value_bytes, page_size * value_bytes, self.scale_bytes
        return cache.strides[1], self.coded // self.codes.per_byte, cache.strides[1]

    def fields(self, pages: Bytes) -> tuple[Bytes, Bytes, Bytes]:
        """Views of the codes, scales and bfloat16 bytes of every token, each [num_pages, page_size, bytes].

        Parameters
        ----------
        pages
            A cache [num_pages, page_size, 1, width] of uint8 that `check` takes.
        """
        num_pages, page_size, _, width = pages.shape
        codes_end = self.coded // self.codes.per_byte
        if not self.scales_end_page:
            tokens = pages[:, :, 0]
            scales_end = codes_end + self.scale_bytes
            return tokens[..., :codes_end], tokens[..., codes_end:scales_end], tokens[..., scales_end:]
        value_bytes = width - self.scale_bytes
        flat = pages.reshape(num_pages, page_size * width)
        tokens = flat[:, : page_size * value_bytes].reshape(num_pages, page_size, value_bytes)
        scales = flat[:, page_size * value_bytes :].reshape(num_pages, page_size, self.scale_bytes)
        return tokens[..., :codes_end], scales, tokens[..., codes_end:]

    @unheeded
    def quantise(self, values: Floats, scale: float | np.floating[Any] | None = None) -> Stored:
        """To bytes; ``values`` are [num_pages, page_size, 1, latent_dim + rope_dim].

        Scales are DeepSeek's powers of two, or with e2m1 the smallest e4m3 by which no value passes 6. An e2m1 cannot
        be NaN: the scale of a block that has one is.
        """
        self._settled_scale(scale)
        num_pages, page_size, heads, width = cache_values(values).shape
        if (heads, width) != (1, self.latent_dim + self.rope_dim):
            expected = f"[num_pages, page_size, 1, {self.latent_dim + self.rope_dim}] for {self.name}"
            raise InvalidArgumentError("values", expected, str(list(values.shape)))
        exact = np.asarray(values[:, :, 0], np.float32)
        blocks = exact[..., : self.coded].reshape(num_pages, page_size, self.coded // self.block, self.block)
        largest = largest_magnitudes(blocks)
        if self.codes is E2M1:
            scales = e4m3_scales(largest)
            scales[np.isnan(blocks).any(axis=-1)] = np.nan
        else:
            scales = power_of_two_scales(largest)
        pages = self._new_pages(num_pages, page_size)
        codes, scale_field, uncoded = self.fields(pages)
        codes[...] = self.codes.encode(blocks / scales[..., None]).reshape(codes.shape)
        encoded = _raw(scales.astype(_FLOAT32)) if self.scales is None else self.scales.encode(scales)
        scale_field[..., : encoded.shape[-1]] = encoded
        uncoded[...] = _raw(exact[..., self.coded :].astype(numpy_dtype("bfloat16")))
        return pages

    def _new_pages(self, num_pages: int, page_size: int) -> Bytes:
        memory = np.zeros((num_pages, self.page_bytes(page_size, self.latent_dim, self.rope_dim)), np.uint8)
        return memory[:, : page_size * self._token_width].reshape(num_pages, page_size, 1, self._token_width)

    def with_page_starts(self, stored: Stored) -> Stored:
        """As for every layout."""
        if stored.strides[0] % self.page_multiple == 0:
            return stored
        pages = self._new_pages(*stored.shape[:2])
        pages[...] = stored.view(np.uint8)
        return pages.view(stored.dtype)

    def put(
        self, cache: Stored, pages: Indices, offsets: Indices, values: Floats, scale: float | np.floating[Any] | None
    ) -> None:
        """As for every layout; of a token the scales may lie apart from the codes."""
        tokens = self.quantise(values[:, None], scale)
        for target, source in zip(self.fields(cache.view(np.uint8)), self.fields(tokens), strict=True):
            target[pages, offsets] = source[:, 0]

    @unheeded
    def dequantise(self, stored: Stored, scale: float | np.floating[Any] | None = None) -> Float32Array:
        """From bytes."""
        self._settled_scale(scale)
        self.check(view(stored, "stored"), "stored", self.latent_dim, self.rope_dim)
        return self._values(*self.fields(stored.view(np.uint8)))[:, :, None]

    @unheeded
    def dequantise_tokens(
        self, stored: Stored, slots: Indices, kv_head: int, scale: float | np.floating[Any] | None = None
    ) -> Float32Array:
        """From bytes."""
        pages, offsets = np.divmod(slots, stored.shape[1])
        codes, scale_field, uncoded = self.fields(stored.view(np.uint8))
        return self._values(codes[pages, offsets], scale_field[pages, offsets], uncoded[pages, offsets])

    def _values(self, codes: Bytes, scale_field: Bytes, uncoded: Bytes) -> Float32Array:
        """[..., d] of what `fields` found of tokens."""
        tokens = codes.shape[:-1]
        num_blocks = self.coded // self.block
        if self.scales is None:
            scales = _typed(scale_field, _FLOAT32)
        else:
            scales = self.scales.decode(scale_field[..., :num_blocks])
        values = np.empty((*tokens, self.latent_dim + self.rope_dim), np.float32)
        blocks = self.codes.decode(codes).reshape(*tokens, num_blocks, self.block)
        blocks *= scales[..., None]
        values[..., : self.coded] = blocks.reshape(*tokens, self.coded)
        values[..., self.coded :] = _typed(uncoded, numpy_dtype("bfloat16"))
        return values


def _raw(array: Floats) -> Bytes:
    """The bytes of the last axis."""
    return np.ascontiguousarray(array).view(np.uint8)


def _typed(stored: Bytes, dtype: np.dtype[Any]) -> Float32Array:
    """Bytes of the last axis read as numbers of a type."""
    return np.ascontiguousarray(stored).view(dtype).astype(np.float32)
