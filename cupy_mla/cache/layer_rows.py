"""New tokens of the layers of a `PagedKVCache`, as they are given."""

from __future__ import annotations

from typing import Any

from ..arrays import view as arrays
from ..errors import InvalidArgumentError
from .segments import first_part


def rows_of_layers(kv_new: Any, num_layers: int) -> list[Any]:
    """The new tokens of each of several layers.

    Raises
    ------
    InvalidArgumentError
        They are not one for each; ``argument`` is ``kv_new``.
    """
    if not isinstance(kv_new, (tuple, list)):
        shape = arrays.view(kv_new, "kv_new").shape
        if len(shape) < 3 or shape[0] != num_layers:
            raise InvalidArgumentError("kv_new", f"[{num_layers} layers, num_tokens, d]", str(list(shape)))
    elif len(kv_new) != num_layers:
        raise InvalidArgumentError("kv_new", f"{num_layers} items, one for each layer", str(len(kv_new)))
    return [kv_new[layer] for layer in range(num_layers)]


def view_first(kv_new: Any, latent_dim: int, stream: int | None) -> arrays.ArrayView:
    """A view of the new tokens of a layer, or of the latent part of a pair.

    Raises
    ------
    InvalidArgumentError
        It is no array of rows, or none of the latent width.
    """
    first = first_part(kv_new)
    view = arrays.view(first, "kv_new", stream)
    if view.ndim < 2:
        raise InvalidArgumentError("kv_new", "shape [num_tokens, d]", str(view.shape))
    if first is not kv_new and view.shape[-1] != latent_dim:
        raise InvalidArgumentError("kv_new[0]", f"{latent_dim} latent columns", str(view.shape[-1]))
    return view
