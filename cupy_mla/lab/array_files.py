"""Named arrays in .npz and .safetensors files, bfloat16 included.

NumPy stores a bfloat16 array in an .npz as two-byte raw values (V2); they are read back as bfloat16.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError, MissingDependencyError
from .files import written_beside

Array = npt.NDArray[Any]

NPZ, SAFETENSORS = SUFFIXES = (".npz", ".safetensors")

_RAW_BFLOAT16 = np.dtype("V2")
_NPY_START = b"\x93NUMPY"
_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# What NumPy and ml_dtypes have of a safetensors file's types. FP8 may be stored as U8.
_SAFETENSORS_TYPES = {
    *("BF16", "F16", "F32", "F64", "BOOL"),
    *("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"),
}


def check_suffix(path: Path, argument: str) -> None:
    """Refuse a file of another kind, or of one whose library is not there.

    Raises
    ------
    InvalidArgumentError
        ``path`` does not end in .npz or .safetensors; ``argument`` is whose value it is.
    MissingDependencyError
        It ends in .safetensors, and the package of that name is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise InvalidArgumentError(argument, "a file name ending in " + " or ".join(SUFFIXES), str(path))
    if path.suffix == SAFETENSORS:
        _require_safetensors()


def read_arrays(path: Path, argument: str = "input", metadata: Container[str] = ()) -> dict[str, Array]:
    """All arrays of a file by name, in C order and this machine's byte order.

    Of a safetensors file's text metadata, the entries named in ``metadata`` come too, as zero-dimensional arrays;
    others (frameworks write their own) are ignored.

    Raises
    ------
    InvalidArgumentError
        The file is missing or is not what its suffix says.
    MissingDependencyError
        It ends in .safetensors, and the package of that name is not installed.
    """
    check_suffix(path, argument)
    try:
        return _read_npz(path) if path.suffix == NPZ else _read_safetensors(path, metadata)
    except MemoryError:
        raise
    except Exception as error:  # zipfile, zlib, safetensors and NumPy have many kinds; for the user it is one thing
        raise InvalidArgumentError(argument, f"a readable {path.suffix} file", f"{path} ({error})") from error


def write_arrays(path: Path, arrays: Mapping[str, Array], argument: str = "save") -> None:
    """Write arrays by name into an .npz or .safetensors file, as a whole.

    Raises
    ------
    InvalidArgumentError
        Wrong suffix, or the file cannot be written.
    MissingDependencyError
        It ends in .safetensors, and the package of that name is not installed.
    """
    check_suffix(path, argument)
    with written_beside(path, argument) as partial:
        if path.suffix == NPZ:
            with partial.open("wb") as file:
                np.savez(file, **dict(arrays))  # type: ignore[arg-type]
        else:
            _write_safetensors(partial, arrays)


def _read_npz(path: Path) -> dict[str, Array]:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            single = file.read(len(_NPY_START)) == _NPY_START
        raise ValueError("one array without a name, as in an .npy file" if single else "no archive of arrays")
    _check_sizes(path)
    with np.load(path, allow_pickle=False) as archive:
        return {name: _plain(archive[name]) for name in archive.files}


def _check_sizes(path: Path) -> None:
    """Refuse arrays whose headers promise other sizes than there are bytes, before there is memory for them."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                read_header = _HEADER_READERS.get(np.lib.format.read_magic(file))
                if read_header is None:
                    raise ValueError(f"{member.filename}: a version of the format that is not known")
                shape, _, dtype = read_header(file)
                if dtype.hasobject:
                    raise ValueError(f"{member.filename}: Python objects, which are not read from files")
                promised, there = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
                if promised != there:
                    raise ValueError(f"{member.filename}: {list(shape)} {dtype} is {promised} bytes, {there} are there")


def _plain(array: Array) -> Array:
    if array.dtype == _RAW_BFLOAT16:
        array = array.view(ml_dtypes.bfloat16)
    return np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")


def _read_safetensors(path: Path, metadata: Container[str]) -> dict[str, Array]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        texts = (file.metadata() or {}).items()
        arrays: dict[str, Array] = {name: np.array(text) for name, text in texts if name in metadata}
        for name in file.keys():  # noqa: SIM118, it is no dictionary
            dtype = file.get_slice(name).get_dtype()
            if dtype not in _SAFETENSORS_TYPES:
                raise ValueError(f"{name} has the type {dtype}")
            arrays[name] = file.get_tensor(name)
    return arrays


def _write_safetensors(path: Path, arrays: Mapping[str, Array]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _require_safetensors() -> None:
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("safetensors", "safetensors", "a .safetensors file") from error
