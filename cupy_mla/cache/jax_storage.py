"""The memory of a paged cache in JAX: an array that is never written to, but given up for another."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays.dtypes import numpy_dtype
from ..arrays.frameworks import CPU
from ..call.arguments import has_scale_of_each_part
from ..call.traced import scale_as_array
from ..errors import InvalidArgumentError
from ..layouts import CacheLayout
from .jax_append import append_tokens
from .storage import NUM_HEADS_KV, split_columns


class JaxStorage:
    """Pages in an array of JAX. Appends and copies give the old array up: XLA writes to its memory.

    Attributes
    ----------
    pages
        [num_layers * num_pages, page_size, 1, width], zeros: layer by layer.
    location
        Device and its number.

    Raises
    ------
    InvalidArgumentError
        Pages of the layout would need gaps between them, which arrays of JAX have not.
    """

    def __init__(
        self,
        location: tuple[str, int],
        layout: CacheLayout,
        num_layers: int,
        num_pages: int,
        page_size: int,
        page_bytes: int,
        width: int,
    ) -> None:
        shape = (num_layers * num_pages, page_size, NUM_HEADS_KV, width)
        dtype = numpy_dtype(layout.dtype)
        if page_bytes != page_size * width * dtype.itemsize:
            raise InvalidArgumentError("layout", "one without gaps between pages, for arrays of JAX", layout.name)
        jax = sys.modules["jax"]
        self.location = location
        self._num_layers, self._num_pages, self._page_size = num_layers, num_pages, page_size
        self._device = jax.devices(location[0])[location[1]]
        self.pages = jax.numpy.zeros(shape, dtype, device=self._device)
        self._description = _describe(self.pages)  # a program may have been given the array by then

    def replace(self, pages: Any) -> None:
        """Take what a program made of the pages.

        Raises
        ------
        InvalidArgumentError
            It is no array of JAX of the same shape, type and device.
        """
        said = _describe(pages)
        if said != self._description:
            raise InvalidArgumentError("pages", self._description, said)
        self.pages = pages

    def copy_pages(self, old: Sequence[int], new: Sequence[int], stream: int | None) -> None:
        """Copy pages to others, in every layer; one by one, as a program is compiled for a number of them."""
        for pair in zip(old, new, strict=True):
            self.pages = _copying()(self.pages, *pair, self._num_pages)

    def append(self, layer: int, kv_new: Any, slots: Any, kv_scale: Any, layout: CacheLayout, latent_dim: int) -> None:
        """Write new tokens to a layer."""
        first = layer * self._num_pages * self._page_size
        appending = _appending(layout.name, latent_dim, self.location[0])
        self.pages = appending(self.pages, kv_new, slots, first, scale_as_array(kv_scale))

    def upload(self, host: npt.NDArray[Any], stream: int | None) -> Any:
        """A NumPy array as one of JAX; int64 as int32, which JAX has always."""
        narrow = host.astype(np.int32) if host.dtype == np.int64 else host.copy()
        return sys.modules["jax"].device_put(narrow, self._device)


def _describe(array: Any) -> str:
    jax = sys.modules["jax"]
    if not isinstance(array, jax.Array):
        return type(array).__name__
    return f"{array.dtype} {list(array.shape)} on {', '.join(map(str, array.devices()))}"


@functools.cache
def _copying() -> Any:
    jax = sys.modules["jax"]

    def copy(pages: Any, old: Any, new: Any, num_pages: int) -> Any:
        first = jax.numpy.arange(0, pages.shape[0], num_pages)
        return pages.at[first + new].set(pages[first + old])

    return jax.jit(copy, donate_argnums=0, static_argnums=3)


@functools.cache
def _appending(layout: str, latent_dim: int, device: str) -> Any:
    jax = sys.modules["jax"]

    def append(pages: Any, kv_new: Any, slots: Any, first: Any, kv_scale: Any) -> Any:
        # Slots before the first page stand for tokens that are not stored: they stay before it.
        moved = jax.numpy.where(slots < 0, slots, slots + first)
        platform = CPU if device == CPU else device
        if has_scale_of_each_part(kv_scale) and not isinstance(kv_new, tuple):
            kv_new = split_columns(kv_new, latent_dim)
        return append_tokens(pages, kv_new, moved, kv_scale=kv_scale, layout=layout, platform=platform)

    return jax.jit(append, donate_argnums=0)
