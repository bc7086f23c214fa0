"""What every cache layout answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..arrays.dtypes import ITEM_SIZES
from ..arrays.view import ArrayView
from ..errors import InvalidArgumentError

CACHE_RANK = 4
_CACHE_AXES = "[num_pages, page_size, num_heads_kv, d]"

Floats = npt.NDArray[Any]
Stored = npt.NDArray[Any]
Float32Array = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout(ABC):
    """How the tokens of a cache are stored.

    A cache is an array [num_pages, page_size, num_heads_kv, width] of one of the layout's element types. Its values are
    latent_dim + rope_dim numbers per token and KV head, of which the first latent_dim are also the attention's value.

    Attributes
    ----------
    name
        What arguments, settings and commands call it.
    dtypes
        Element types that an array of it may have; a new one has the first.
    query_dtypes
        Element types of the queries that go with it.
    tma_type
        Element type of a tensor map over its pages: ``CU_TENSOR_MAP_DATA_TYPE_`` and this.
    kernel_type
        What kernels_cu/core/types.h calls the stored type; None: no kernel reads this layout but through a codec.
    codec
        What kernels_cu/codec calls it; None: no kernel reads this layout through a codec.
    needs_scale
        Whether values are stored values times one scale that is kept apart from the cache.
    one_head
        Whether it holds one KV head only.
    has_columns
        Whether an element of a stored token is one of its columns, so that the latent part may be an array of its own.
    """

    needs_scale: ClassVar[bool] = False
    one_head: ClassVar[bool] = True
    has_columns: ClassVar[bool] = True

    name: str
    dtypes: tuple[str, ...]
    query_dtypes: tuple[str, ...] = ("bfloat16", "float8_e4m3fn")
    tma_type: str = "UINT8"
    kernel_type: str | None = None
    codec: str | None = None

    @property
    def page_end_bytes(self) -> int:
        """Bytes of a token that lie at the end of its page, behind the rows of all tokens; 0: a token is its row."""
        return 0

    def row_strides(self, strides: tuple[int, ...]) -> tuple[int, ...]:
        """Of a cache with these strides: from page to page, token's row to row, head to head, element to element."""
        return strides

    def mixes_with(self, other: CacheLayout) -> bool:
        """Whether one kernel of sparse attention reads caches of both layouts in one call."""
        return self is other

    @property
    def dtype(self) -> str:
        """Element type of a new cache."""
        return self.dtypes[0]

    @property
    def defines(self) -> tuple[tuple[str, str], ...]:
        """Macros by which a kernel that reads the layout is compiled for it; empty if there is no such kernel."""
        return () if self.kernel_type is None else (("MLA_DTYPE", self.kernel_type),)

    @abstractmethod
    def supports(self, latent_dim: int, rope_dim: int) -> bool:
        """Whether tokens of these widths can be stored."""

    @abstractmethod
    def fits(self, dtype: str, width: int) -> bool:
        """Whether an array of this element type with this last dimension may be a cache of this layout."""

    @abstractmethod
    def width(self, latent_dim: int, rope_dim: int) -> int:
        """Last dimension of the cache of such tokens, in elements.

        Raises
        ------
        InvalidArgumentError
            Tokens of these widths cannot be stored.
        """

    def token_bytes(self, latent_dim: int, rope_dim: int, num_heads_kv: int = 1) -> int:
        """Bytes that one token of one layer takes, without what pads a page.

        Raises
        ------
        InvalidArgumentError
            Tokens of these widths cannot be stored.
        """
        return num_heads_kv * self.width(latent_dim, rope_dim) * ITEM_SIZES[self.dtype]

    def page_bytes(self, page_size: int, latent_dim: int, rope_dim: int, num_heads_kv: int = 1) -> int:
        """Bytes from the start of one page of a new cache to the next.

        Raises
        ------
        InvalidArgumentError
            Tokens of these widths cannot be stored.
        """
        return page_size * self.token_bytes(latent_dim, rope_dim, num_heads_kv)

    def check(self, cache: ArrayView, name: str, latent_dim: int, rope_dim: int) -> None:
        """Refuse an array that is no cache of such tokens in this layout. (What a GPU asks of addresses and strides of
        any array is not looked at.)

        Raises
        ------
        InvalidArgumentError
            Tokens of these widths cannot be stored; or ``cache``, which the error calls ``name``, has another element
            type, shape or, where the place of a byte depends on the whole page, other strides.
        """
        width = self.width(latent_dim, rope_dim)
        heads_fit = cache.ndim == CACHE_RANK and (not self.one_head or cache.shape[2] == 1)
        if cache.dtype not in self.dtypes or not heads_fit or cache.shape[-1] != width:
            heads = "1" if self.one_head else "num_heads_kv"
            raise InvalidArgumentError(
                name,
                f"{' or '.join(self.dtypes)} [num_pages, page_size, {heads}, {width}] for the layout {self.name}",
                f"{cache.dtype} {list(cache.shape)}",
            )

    def with_page_starts(self, stored: Stored) -> Stored:
        """A cache on the host with its pages where the layout wants them: itself where they are, else a copy."""
        return stored

    @abstractmethod
    def quantise(self, values: Floats, scale: float | np.floating[Any] | None = None) -> Stored:
        """Make a cache of values.

        Parameters
        ----------
        values
            [num_pages, page_size, num_heads_kv, d] floats. NaN stays NaN; what is too large for numbers of 8 or 4
            bits, infinities too, becomes the largest of its sign.
        scale
            Where the layout `needs_scale`, what the stored values are to be multiplied by.

        Returns
        -------
        numpy.ndarray
            The cache [num_pages, page_size, num_heads_kv, width]; bytes without a meaning are 0.

        Raises
        ------
        InvalidArgumentError
            Values of another shape, a scale where none belongs, or none (or no finite one above 0) where one does.
        """

    @abstractmethod
    def dequantise(self, stored: Stored, scale: float | np.floating[Any] | None = None) -> Float32Array:
        """The values of a cache.

        Parameters
        ----------
        stored
            The cache [num_pages, page_size, num_heads_kv, width], with any strides that `check` takes.
        scale
            Where the layout `needs_scale`, what the stored values are multiplied by.

        Returns
        -------
        numpy.ndarray
            [num_pages, page_size, num_heads_kv, d] float32: stored values times their scales, rounded once.

        Raises
        ------
        InvalidArgumentError
            An array that `check` refuses, or a scale as in `quantise`.
        """

    def put(
        self, cache: Stored, pages: Indices, offsets: Indices, values: Floats, scale: float | np.floating[Any] | None
    ) -> None:
        """Store tokens in a cache, each by itself.

        Parameters
        ----------
        cache
            The cache, or of a layout without blocks some of its columns; it is written to.
        pages, offsets
            [num_tokens] page of each token, and its place in the page.
        values
            [num_tokens, num_heads_kv, d] floats; d are the cache's columns.
        scale
            As in `quantise`.

        Raises
        ------
        InvalidArgumentError
            As in `quantise`.
        """
        cache[pages, offsets] = self.quantise(values[:, None], scale)[:, 0]

    @abstractmethod
    def dequantise_tokens(
        self, stored: Stored, slots: Indices, kv_head: int, scale: float | np.floating[Any] | None = None
    ) -> Float32Array:
        """The values of some tokens; no byte of others is read.

        Parameters
        ----------
        stored, scale
            As in `dequantise`; not checked.
        slots
            [n] places of tokens in the cache, ``page * page_size + offset``.
        kv_head
            Their KV head.

        Returns
        -------
        numpy.ndarray
            [n, d] float32.
        """

    def _settled_scale(self, scale: float | np.floating[Any] | None) -> np.float32:
        """The scale as float32; 1 for a layout without."""
        if not self.needs_scale:
            if scale is not None:
                raise InvalidArgumentError("scale", f"None: {self.name} has none beside the cache", str(scale))
            return np.float32(1)
        if scale is None or not (np.isfinite(scale) and np.float32(scale) > 0):
            raise InvalidArgumentError("scale", f"a finite number above 0 for {self.name}", str(scale))
        return np.float32(scale)


def cache_values(values: Floats) -> Floats:
    """The values, if they have the axes of a cache.

    Raises
    ------
    InvalidArgumentError
        There are more or fewer than the four axes of a cache.
    """
    if values.ndim != CACHE_RANK:
        raise InvalidArgumentError("values", _CACHE_AXES, str(list(values.shape)))
    return values
