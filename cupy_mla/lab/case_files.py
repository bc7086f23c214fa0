"""Cases from files, and results into files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..call.options import OPTIONS as CALL_OPTIONS
from ..call.options import ROPE_OF
from ..errors import InvalidArgumentError
from .array_files import read_arrays, write_arrays
from .cases import OPTIONS, TENSORS, Case, parts_of
from .random_values import Array

_TYPES_OF_BITS: dict[Any, Any] = {
    np.dtype(np.uint16): ml_dtypes.bfloat16,
    np.dtype(np.uint8): ml_dtypes.float8_e4m3fn,
}
_INDEX_RANKS = {"block_table": 2, "cache_seqlens": 1, "cu_seqlens_q": 1}


def load_case(path: Path) -> Case:
    """Read a case from an .npz or .safetensors file, as NumPy arrays.

    The file holds q, kv_cache, block_table and cache_seqlens, and may hold cu_seqlens_q, softmax_scale, causal,
    head_dim_v, kv_scale and compute (single values, of kv_scale also two; in a safetensors file they may be metadata,
    whose other entries are ignored). Where it holds q_rope or kv_rope too, q or kv_cache is the pair with it. Values
    stored as uint16 are taken as the bits of bfloat16, those stored as uint8 as the bits of e4m3; index arrays may be
    int64.

    Raises
    ------
    InvalidArgumentError
        The file is not readable, an array is missing or unknown, lengths are not of the rank or range they must have,
        or a single value is not of its kind. Everything else about the arrays is for ``mla_decode`` to check.
    """
    found = read_arrays(path, metadata=_SETTINGS)
    for name in TENSORS:
        if name not in found:
            raise InvalidArgumentError("input", f"an array {name}", f"{path} with {sorted(found)}")
    known = (*TENSORS, *ROPE_OF.values(), "cu_seqlens_q", *_SETTINGS)
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise InvalidArgumentError("input", f"only {', '.join(known)}", f"also {', '.join(unknown)}")
    indices = {name: _index_array(name, found[name]) for name in _INDEX_RANKS if name in found}
    kv_lengths = indices["cache_seqlens"].astype(np.int64)
    q, kv_cache = (_floats(name, found) for name in ROPE_OF)
    first_q = parts_of(q)[0]
    if "cu_seqlens_q" in indices:
        q_lengths = np.diff(indices["cu_seqlens_q"]).astype(np.int64)
    else:
        q_lengths = np.full_like(kv_lengths, first_q.shape[1] if first_q.ndim > 1 else 0)
    if len(q_lengths) != len(kv_lengths) or (q_lengths < 0).any():
        raise InvalidArgumentError("cu_seqlens_q", "batch + 1 values that never fall", str(indices["cu_seqlens_q"]))
    return Case(
        q=q,
        kv_cache=kv_cache,
        block_table=indices["block_table"],
        cache_seqlens=indices["cache_seqlens"],
        kv_lengths=kv_lengths,
        q_lengths=q_lengths,
        cu_seqlens_q=indices.get("cu_seqlens_q"),
        **_settings(found),
    )


def _floats(name: str, found: dict[str, Array]) -> Any:
    """An array of values, or the pair (latent, rope)."""
    parts = [found[part] for part in (name, ROPE_OF[name]) if part in found]
    values = tuple(part.view(_TYPES_OF_BITS.get(part.dtype, part.dtype)) for part in parts)
    return values if len(values) > 1 else values[0]


def _index_array(name: str, array: Array) -> Array:
    """As int32; a file made with a framework's default integers holds int64."""
    if array.ndim != _INDEX_RANKS[name]:
        raise InvalidArgumentError(name, f"{_INDEX_RANKS[name]} dimension(s)", f"shape {array.shape}")
    if array.dtype.kind != "i" or not np.array_equal(array, array.astype(np.int32)):
        raise InvalidArgumentError(name, "int32, or int64 with values that fit", str(array.dtype))
    return np.ascontiguousarray(array, dtype=np.int32)


def _settings(found: dict[str, Array]) -> dict[str, Any]:
    """The single values of a file; text where they come from safetensors metadata."""
    settings = {}
    for name in _SETTINGS.keys() & found.keys():
        kind, read = _SETTINGS[name]
        array = found[name]
        try:
            settings[name] = read(array.item() if array.size == 1 else array.tolist())
        except (ValueError, TypeError, OverflowError) as error:  # many values; complex, a date; infinite
            got = repr(array.item()) if array.size == 1 else f"shape {array.shape}"
            raise InvalidArgumentError(name, f"a single value ({kind})", got) from error
    return settings


def _whole_number(value: Any) -> int:
    number = int(value)
    if number != float(value):  # int() cuts 512.7 to 512
        raise ValueError(value)
    return number


def _truth(value: Any) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    text = str(value).lower()
    if text not in words:
        raise ValueError(text)
    return words[text]


def _scales(value: Any) -> float | tuple[float, float]:
    if not isinstance(value, list):
        return float(value)
    latent, rope = value
    return float(latent), float(rope)


_READERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "float": ("a number", float),
    "int": ("a whole number", _whole_number),
    "bool": ("true or false", _truth),
    "str": ("a word", str),
}
_SETTINGS = {option.name: _READERS[option.type] for option in CALL_OPTIONS if option.name in OPTIONS}
_SETTINGS["kv_scale"] = "a number, or two of latent and rope", _scales


def save_result(path: Path, out: Array, lse: Array) -> None:
    """Write ``out`` and ``lse`` of mla_decode, on the host, into an .npz or .safetensors file.

    NumPy stores bfloat16 in an .npz as two-byte raw values: read it with ``array.view(ml_dtypes.bfloat16)``.

    Raises
    ------
    InvalidArgumentError
        Wrong suffix, or the file cannot be written.
    """
    write_arrays(path, {"out": out, "lse": lse})
