"""Layouts of the KV cache: how many bytes a token takes, what they mean, and which arrays hold them."""

from .base import CacheLayout
from .table import (
    BF16,
    DENSE_LAYOUTS,
    FP4_V41,
    FP8_DS_MLA,
    FP8_DS_MLA_NO_ROPE,
    FP8_E4M3,
    FP8_MODEL1,
    FP8_V41,
    FP16,
    LAYOUTS,
    SPARSE_LAYOUTS,
    find_layout,
    infer_layout,
)

__all__ = [
    "BF16",
    "DENSE_LAYOUTS",
    "FP4_V41",
    "FP8_DS_MLA",
    "FP8_DS_MLA_NO_ROPE",
    "FP8_E4M3",
    "FP8_MODEL1",
    "FP8_V41",
    "FP16",
    "LAYOUTS",
    "SPARSE_LAYOUTS",
    "CacheLayout",
    "find_layout",
    "infer_layout",
]
