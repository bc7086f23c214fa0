"""The FP8 layouts of the KV cache in NumPy: bytes per token, quantise and dequantise.

Values are e4m3 (float8_e4m3fn: largest 448, no infinity) times a scale; the layouts differ in how many values share a
scale and in what stays in bfloat16. Everything is little-endian, for one KV head. Values to quantise must be finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .errors import InvalidArgumentError

E4M3_MAX = 448.0
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)  # 2 to the power of (byte - 127), no sign, no zero
_E8M0_EXPONENTS = (-127, 127)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOAT32 = np.dtype("<f4")
_BFLOAT16_BYTES, _FLOAT32_BYTES = 2, 4

Floats = npt.NDArray[Any]
Float32Array = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TensorScaled:
    """``fp8_e4m3``: all values in e4m3, one float32 scale for the whole cache, kept apart from it."""

    name: str = "fp8_e4m3"

    def supports(self, latent_dim: int, rope_dim: int) -> bool:
        """Any widths."""
        return True

    def bytes_per_token(self, latent_dim: int, rope_dim: int) -> int:
        """Bytes that one token of one layer takes."""
        return latent_dim + rope_dim

    def quantise(self, values: Floats) -> tuple[npt.NDArray[Any], np.float32]:
        """``[..., d]`` floats to ``[..., d]`` float8_e4m3fn and the scale that multiplies them, chosen so that the
        largest magnitude becomes 448."""
        exact = np.asarray(values, np.float32)
        scale = _scales(np.abs(exact).max(initial=0.0))
        return (exact / scale).astype(_E4M3), np.float32(scale)

    def dequantise(self, stored: npt.NDArray[Any], scale: float | np.float32) -> Float32Array:
        """``[..., d]`` float8_e4m3fn and the scale to ``[..., d]`` float32.

        Raises
        ------
        InvalidArgumentError
            Values of another type, such as the bytes of the other layouts.
        """
        if stored.dtype != _E4M3:
            raise InvalidArgumentError("stored", str(_E4M3), str(stored.dtype))
        return stored.astype(np.float32) * np.float32(scale)


@dataclass(frozen=True, slots=True)
class _InBlocks:
    """A layout of tokens of one width, whose e4m3 values share a scale block by block."""

    name: str
    latent_dim: int
    rope_dim: int
    block: int

    @property
    def num_blocks(self) -> int:
        """Scales of a token."""
        return self.latent_dim // self.block

    def supports(self, latent_dim: int, rope_dim: int) -> bool:
        """Whether tokens of these widths can be stored."""
        return (latent_dim, rope_dim) == (self.latent_dim, self.rope_dim)


@dataclass(frozen=True, slots=True)
class BlockScaled(_InBlocks):
    """``fp8_ds_mla`` (DeepSeek V3.2): a token is 512 e4m3 values, 4 float32 scales (one for each 128 of them), and 64
    bfloat16 values with the position."""

    name: str = "fp8_ds_mla"
    latent_dim: int = 512
    rope_dim: int = 64
    block: int = 128

    def bytes_per_token(self, latent_dim: int, rope_dim: int) -> int:
        """Bytes that one token of one layer takes.

        Raises
        ------
        InvalidArgumentError
            Other widths than the layout's.
        """
        _require_widths(self, latent_dim, rope_dim)
        return latent_dim + self.num_blocks * _FLOAT32_BYTES + rope_dim * _BFLOAT16_BYTES

    def quantise(self, values: Floats) -> Bytes:
        """``[..., 576]`` floats to ``[..., 656]`` bytes.

        Raises
        ------
        InvalidArgumentError
            The last axis is not 576.
        """
        latent, rope = _split(self, values)
        blocks = latent.reshape(*latent.shape[:-1], self.num_blocks, self.block)
        scales = _scales(np.abs(blocks).max(axis=-1))
        quantised = (blocks / scales[..., None]).astype(_E4M3).reshape(latent.shape)
        return np.concatenate([_raw(quantised), _raw(scales.astype(_FLOAT32)), _raw(rope.astype(_BFLOAT16))], axis=-1)

    def dequantise(self, stored: Bytes) -> Float32Array:
        """``[..., 656]`` bytes to ``[..., 576]`` float32.

        Raises
        ------
        InvalidArgumentError
            The last axis is not 656, or not of bytes.
        """
        _require_bytes(stored, self.bytes_per_token(self.latent_dim, self.rope_dim))
        scales_end = self.latent_dim + self.num_blocks * _FLOAT32_BYTES
        scales = _typed(stored[..., self.latent_dim : scales_end], _FLOAT32)
        latent = _typed(stored[..., : self.latent_dim], _E4M3) * np.repeat(scales, self.block, axis=-1)
        return np.concatenate([latent, _typed(stored[..., scales_end:], _BFLOAT16)], axis=-1)


@dataclass(frozen=True, slots=True)
class PageScaled(_InBlocks):
    """``fp8_model1`` (head dimension 512 = 448 + 64): a page is, for each token, 448 e4m3 and 64 bfloat16 values, then
    for each token 8 bytes of which 7 are e8m0 scales (one for each 64 e4m3 values); pages start at multiples of 576."""

    name: str = "fp8_model1"
    latent_dim: int = 448
    rope_dim: int = 64
    block: int = 64
    scale_bytes: int = 8

    @property
    def value_bytes(self) -> int:
        """Bytes of a token's values, without its scales; also what the start of a page is a multiple of."""
        return self.latent_dim + self.rope_dim * _BFLOAT16_BYTES

    def bytes_per_token(self, latent_dim: int, rope_dim: int) -> int:
        """Bytes that one token of one layer takes, without the padding at the end of a page.

        Raises
        ------
        InvalidArgumentError
            Other widths than the layout's.
        """
        _require_widths(self, latent_dim, rope_dim)
        return self.value_bytes + self.scale_bytes

    def page_bytes(self, page_size: int) -> int:
        """Bytes from the start of one page to the next."""
        used = page_size * (self.value_bytes + self.scale_bytes)
        return -(-used // self.value_bytes) * self.value_bytes

    def quantise(self, values: Floats) -> Bytes:
        """``[num_pages, page_size, 512]`` floats to ``[num_pages, page_bytes(page_size)]`` bytes; padding is 0.

        Raises
        ------
        InvalidArgumentError
            Another shape.
        """
        if values.ndim != 3:
            raise InvalidArgumentError("values", "[num_pages, page_size, 512]", str(list(values.shape)))
        latent, rope = _split(self, values)
        num_pages, page_size, _ = latent.shape
        blocks = latent.reshape(num_pages, page_size, self.num_blocks, self.block)
        # Rounded up to a power of two, so that no value exceeds the largest e4m3.
        exponents = np.clip(np.ceil(np.log2(_scales(np.abs(blocks).max(axis=-1)))), *_E8M0_EXPONENTS)
        scales = np.exp2(exponents.astype(np.float32))
        quantised = (blocks / scales[..., None]).astype(_E4M3).reshape(latent.shape)
        pages = np.zeros((num_pages, self.page_bytes(page_size)), np.uint8)
        tokens, tails = self._sections(pages, page_size)
        tokens[..., : self.latent_dim] = _raw(quantised)
        tokens[..., self.latent_dim :] = _raw(rope.astype(_BFLOAT16))
        tails[..., : self.num_blocks] = _raw(scales.astype(_E8M0))
        return pages

    def dequantise(self, stored: Bytes, page_size: int) -> Float32Array:
        """``[num_pages, page_bytes(page_size)]`` bytes to ``[num_pages, page_size, 512]`` float32.

        Raises
        ------
        InvalidArgumentError
            Another shape, or not bytes.
        """
        width = self.page_bytes(page_size)
        if stored.ndim != 2:
            raise InvalidArgumentError("stored", f"uint8 [num_pages, {width}]", f"{stored.dtype} {list(stored.shape)}")
        _require_bytes(stored, width)
        tokens, tails = self._sections(stored, page_size)
        scales = _typed(tails[..., : self.num_blocks], _E8M0)
        latent = _typed(tokens[..., : self.latent_dim], _E4M3) * np.repeat(scales, self.block, axis=-1)
        return np.concatenate([latent, _typed(tokens[..., self.latent_dim :], _BFLOAT16)], axis=-1)

    def _sections(self, pages: Bytes, page_size: int) -> tuple[Bytes, Bytes]:
        """Views of the values [num_pages, page_size, 576] and of the scales [num_pages, page_size, 8]."""
        values_end = page_size * self.value_bytes
        values = pages[:, :values_end].reshape(len(pages), page_size, self.value_bytes)
        scales_end = values_end + page_size * self.scale_bytes
        return values, pages[:, values_end:scales_end].reshape(len(pages), page_size, self.scale_bytes)


FP8_E4M3, FP8_DS_MLA, FP8_MODEL1 = TensorScaled(), BlockScaled(), PageScaled()
FP8_LAYOUTS: dict[str, TensorScaled | BlockScaled | PageScaled] = {
    layout.name: layout for layout in (FP8_E4M3, FP8_DS_MLA, FP8_MODEL1)
}


def _scales(largest: Any) -> Float32Array:
    """The scale that makes each largest magnitude 448; 1 where all values are 0, or too small for a float32 scale."""
    scales = np.asarray(largest, np.float32) / np.float32(E4M3_MAX)
    return np.where(scales >= np.finfo(np.float32).tiny, scales, np.float32(1.0))


def _split(layout: _InBlocks, values: Floats) -> tuple[Float32Array, Float32Array]:
    width = layout.latent_dim + layout.rope_dim
    if values.ndim == 0 or values.shape[-1] != width:
        raise InvalidArgumentError("values", f"{width} as the last axis for {layout.name}", str(list(values.shape)))
    exact = np.asarray(values, np.float32)
    return exact[..., : layout.latent_dim], exact[..., layout.latent_dim :]


def _raw(array: npt.NDArray[Any]) -> Bytes:
    """The bytes of the last axis."""
    return np.ascontiguousarray(array).view(np.uint8)


def _typed(stored: Bytes, dtype: np.dtype[Any]) -> Float32Array:
    """Bytes of the last axis read as values of a type."""
    return np.ascontiguousarray(stored).view(dtype).astype(np.float32)


def _require_widths(layout: _InBlocks, latent_dim: int, rope_dim: int) -> None:
    if not layout.supports(latent_dim, rope_dim):
        expected = f"{layout.latent_dim}+{layout.rope_dim} for {layout.name}"
        raise InvalidArgumentError("latent_dim+rope_dim", expected, f"{latent_dim}+{rope_dim}")


def _require_bytes(stored: Bytes, width: int) -> None:
    if stored.dtype != np.uint8 or stored.ndim == 0 or stored.shape[-1] != width:
        raise InvalidArgumentError("stored", f"uint8 [..., {width}]", f"{stored.dtype} {list(stored.shape)}")
