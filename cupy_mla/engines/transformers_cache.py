"""Layers of transformers' caches with room behind each request's tokens, so that any token may begin a page.

The kernels read pages of 64 tokens. A request's tokens lie one behind the other in such a cache, from wherever its left
padding ends; pages that begin there reach up to 63 tokens past the request's last one. With that much room behind
each row, a step copies nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicIndexedLayer, DynamicLayer, StaticLayer

PAGE_SIZE = 64  # the kernels' fastest
ROOM = PAGE_SIZE - 1
# How much longer than asked for a growing row is made: in the long run, each token is copied eight times.
_LEAST_GROWTH, _GROWTH_SHARE = 256, 8


class RoomyDynamicLayer(DynamicLayer):
    """A growing layer that appends in place: memory is taken ahead, and tokens are copied only when it is used up."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.keys, self.values = _appended(self.keys, key_states), _appended(self.values, value_states)
        return self.keys, self.values


class RoomyIndexedLayer(RoomyDynamicLayer, DynamicIndexedLayer):
    """The like for sparse attention, whose indexer has keys of its own beside."""


class RoomyStaticLayer(StaticLayer):
    """A layer of fixed size with room behind its rows."""

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        self.max_cache_len += ROOM
        super().lazy_initialization(key_states, value_states)
        self.max_cache_len -= ROOM

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys[:, :, : self.max_cache_len], values[:, :, : self.max_cache_len]


def _appended(tokens: Any, new: Any) -> Any:
    """Both one behind the other, [batch, 1, tokens, width]: in the memory of the first if that has enough room."""
    if torch.is_grad_enabled() and new.requires_grad:
        return torch.cat((tokens, new), dim=2)
    batch, heads, length, width = tokens.shape
    end = length + new.shape[2]
    row = row_tokens(tokens)
    read_only = tokens.is_inference() and not torch.is_inference_mode_enabled()
    if row < end + ROOM or not length or read_only:
        row = end + max(_LEAST_GROWTH, end // _GROWTH_SHARE) + ROOM
        longer = new.new_empty(batch, heads, row, width)
        longer[:, :, :length] = tokens
    else:
        longer = tokens.as_strided((batch, heads, end, width), tokens.stride())
    longer[:, :, length:end] = new
    return longer[:, :, :end]


def row_tokens(tokens: Any) -> int:
    """From a row of [batch, 1, tokens, width] to the next, in tokens."""
    return int(tokens.stride(0) // tokens.shape[3])


def _roomy_like(layer: Any) -> Any:
    """An empty layer with room, in place of one that is empty; None for a kind that there is none for."""
    if type(layer) in (DynamicLayer, DynamicIndexedLayer):
        return RoomyDynamicLayer() if type(layer) is DynamicLayer else RoomyIndexedLayer()
    return RoomyStaticLayer(layer.max_cache_len) if type(layer) is StaticLayer else None


def has_room(cache: Any, layer_idx: int) -> bool:
    """Whether a layer of a cache has room behind its rows. One that holds nothing yet is replaced by one that has."""
    if not isinstance(cache, Cache):
        return False
    if cache.layer_class_to_replicate is not None:
        cache.layers.extend(cache.layer_class_to_replicate() for _ in range(len(cache.layers), layer_idx + 1))
    layer = cache.layers[layer_idx]
    if not layer.is_initialized and not cache.offloading:
        layer = cache.layers[layer_idx] = _roomy_like(layer) or layer
    return isinstance(layer, RoomyDynamicLayer | RoomyStaticLayer)
