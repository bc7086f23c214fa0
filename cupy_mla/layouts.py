"""Layouts of the KV cache: which element types there are, and how many bytes one token takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DenseLayout:
    """One vector of latent and rope values per token and KV head, all of one 16-bit type.

    Attributes
    ----------
    name
        What settings and commands call the layout.
    dtype
        Element type, the same as the query's.
    """

    name: str
    dtype: str

    def bytes_per_token(self, latent_dim: int, rope_dim: int, num_heads_kv: int = 1) -> int:
        """Bytes that one token of one layer takes."""
        return num_heads_kv * (latent_dim + rope_dim) * _DENSE_ITEM_SIZE


_DENSE_ITEM_SIZE = 2

BF16 = DenseLayout("bf16", "bfloat16")
FP16 = DenseLayout("fp16", "float16")

# By element type: a dense cache needs no other description.
DENSE_LAYOUTS = {layout.dtype: layout for layout in (BF16, FP16)}
