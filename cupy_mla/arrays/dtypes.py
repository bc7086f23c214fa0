"""Element types, by the names that NumPy, torch and DLPack agree on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InvalidArgumentError

# Bytes per element of every type that is taken in.
ITEM_SIZES = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
}
# What kernels_cu/core/types.h calls those that kernels compute with.
KERNEL_TYPES = {"bfloat16": "Bf16", "float16": "Fp16", "float32": "Fp32"}
# Types that NumPy has only through ml_dtypes.
_ML_DTYPES = frozenset({"bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn"})
_NUMPY_DTYPES: dict[np.dtype[Any], str] = {}
_NUMPY_OF_NAME: dict[str, np.dtype[Any]] = {}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy type of an element type name; bfloat16, FP8 and FP4 come from ml_dtypes."""
    dtype = _NUMPY_OF_NAME.get(name)
    if dtype is None:
        if name in _ML_DTYPES:
            import ml_dtypes

            dtype = np.dtype(getattr(ml_dtypes, name))
        else:
            dtype = np.dtype(name)
        _NUMPY_OF_NAME[name] = dtype
    return dtype


def known_dtype(dtype_name: str, name: str) -> str:
    """The name itself, if it is one of a type that is taken in.

    Raises
    ------
    InvalidArgumentError
        It is not; ``argument`` is ``name``.
    """
    if dtype_name not in ITEM_SIZES:
        raise InvalidArgumentError(name, "an element type among " + ", ".join(ITEM_SIZES), dtype_name)
    return dtype_name


def dtype_of_numpy(dtype: np.dtype[Any], name: str) -> str:
    """The name of a NumPy type.

    Raises
    ------
    InvalidArgumentError
        Nothing here can use it; ``argument`` is ``name``.
    """
    dtype_name = _NUMPY_DTYPES.get(dtype)
    if dtype_name is None:
        if not dtype.isnative:
            raise InvalidArgumentError(name, "an element type in this machine's byte order", str(dtype))
        dtype_name = _NUMPY_DTYPES[dtype] = known_dtype(dtype.name, name)
    return dtype_name
