"""Named arrays in .npz and .safetensors files, bfloat16 included.

A safetensors file is eight bytes of header length, a JSON header and the bytes of the arrays
(https://github.com/huggingface/safetensors#format), so reading and writing it needs no further package.
NumPy stores a bfloat16 array in an .npz as two-byte raw values; they are read back as bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError

Array = npt.NDArray[Any]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_SAFETENSORS_TYPES: dict[str, np.dtype[Any]] = {
    "BF16": _BFLOAT16,
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "BOOL": np.dtype("?"),
}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_ALIGNMENT = 8  # the header is padded with spaces so that the arrays start here
_METADATA = "__metadata__"
SUFFIXES = (".npz", ".safetensors")


def check_suffix(path: Path, argument: str) -> None:
    """Refuse a file that is neither an .npz nor a .safetensors file by its name.

    Raises
    ------
    InvalidArgumentError
        ``path`` ends in something else; the error names ``argument``.
    """
    if path.suffix not in SUFFIXES:
        raise InvalidArgumentError(argument, "a file name ending in " + " or ".join(SUFFIXES), str(path))


def read_arrays(path: Path, argument: str = "input", metadata: Container[str] = ()) -> dict[str, Array]:
    """All arrays of a file by name.

    Arrays of a safetensors file are mapped, not read: several GB cost no memory until they are used. Of its text
    metadata, the entries named in ``metadata`` come too, as zero-dimensional arrays; others (frameworks write their
    own) are ignored.

    Raises
    ------
    InvalidArgumentError
        The file is missing or is not what its suffix says.
    """
    check_suffix(path, argument)
    try:
        return _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path, metadata)
    except MemoryError:
        raise
    except Exception as error:  # zipfile, zlib, json and NumPy have many kinds; for the user it is one thing
        raise InvalidArgumentError(argument, f"a readable {path.suffix} file", f"{path} ({error})") from error


def write_arrays(path: Path, arrays: Mapping[str, Array], argument: str = "save") -> None:
    """Write arrays by name into an .npz or .safetensors file.

    Raises
    ------
    InvalidArgumentError
        Wrong suffix, or the file cannot be written.
    """
    check_suffix(path, argument)
    try:
        if path.suffix == ".npz":
            np.savez(path, **dict(arrays))  # type: ignore[arg-type]
        else:
            _write_safetensors(path, arrays)
    except OSError as error:
        raise InvalidArgumentError(argument, "a file that can be written", f"{path} ({error})") from error


def _read_npz(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return {name: array.view(_BFLOAT16) if array.dtype == np.dtype("V2") else array for name, array in arrays.items()}


def _read_safetensors(path: Path, metadata: Container[str]) -> dict[str, Array]:
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    header_bytes = int(raw[:_LENGTH_BYTES].view("<u8")[0])
    start = _LENGTH_BYTES + header_bytes
    if header_bytes > _MAX_HEADER_BYTES or start > raw.size:
        raise ValueError("the header is longer than the file")
    header = json.loads(raw[_LENGTH_BYTES:start].tobytes())
    texts = header.pop(_METADATA, {}).items()
    arrays: dict[str, Array] = {name: np.array(text) for name, text in texts if name in metadata}
    for name, entry in header.items():
        dtype = _SAFETENSORS_TYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{name} has the type {entry['dtype']}")
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= raw.size - start:
            raise ValueError(f"{name} lies outside the file")
        data = raw[start + begin : start + end]
        arrays[name] = np.frombuffer(data, dtype=dtype).reshape(entry["shape"])  # reshape refuses a wrong size
    return arrays


def _write_safetensors(path: Path, arrays: Mapping[str, Array]) -> None:
    names = {dtype: name for name, dtype in _SAFETENSORS_TYPES.items()}
    header: dict[str, Any] = {}
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    offset = 0
    for name, array in contiguous.items():
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        file.write(text)
        for array in contiguous.values():
            file.write(array.reshape(-1).view(np.uint8).data)
