"""Arrays whose memory is not what they mean, arrays that are gone, and files that lie about their size."""

from __future__ import annotations

import io
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import cupy_mla
from cupy_mla import InvalidArgumentError
from cupy_mla.cli import main

PACKAGE = Path(cupy_mla.__file__).parent
HEADS = 4


def arguments(framework: Any) -> dict[str, Any]:
    zeros = framework.zeros
    return {
        "q": zeros((2, 1, HEADS, 576), dtype=framework.float16),
        "kv_cache": zeros((3, 64, 1, 576), dtype=framework.float16),
        "block_table": zeros((2, 2), dtype=framework.int32),
        "cache_seqlens": zeros((2,), dtype=framework.int32),
    }


@pytest.mark.parametrize("name", ["q", "kv_cache"])
def test_a_lazy_sign_is_named(name: str) -> None:
    torch = pytest.importorskip("torch")
    given = arguments(torch)
    given[name] = torch._neg_view(given[name])
    with pytest.raises(InvalidArgumentError, match=rf"^{name}: .*resolve_neg") as caught:
        cupy_mla.mla_decode(**given)
    assert caught.value.argument == name
    cupy_mla.mla_decode(**{**given, name: given[name].resolve_neg()})


def test_parts_of_conjugated_tensors_are_named() -> None:
    torch = pytest.importorskip("torch")
    lse = torch.zeros(2, HEADS, 1, dtype=torch.complex64).conj().imag
    assert lse.is_neg()
    with pytest.raises(InvalidArgumentError, match=r"^lse: .*resolve_neg"):
        cupy_mla.mla_decode(**arguments(torch), lse=lse)
    outs = torch.zeros(2, 2, 1, HEADS, 512, dtype=torch.float16)
    with pytest.raises(InvalidArgumentError, match=r"^lses: .*resolve_neg"):
        cupy_mla.merge_states(outs, torch.zeros(2, 2, HEADS, 1, dtype=torch.complex64).conj().imag)


@pytest.mark.parametrize(
    ("name", "move"),
    [
        ("kv_cache", lambda negated, pages, stored: cupy_mla.copy_pages(negated, source=pages)),
        ("source", lambda negated, pages, stored: cupy_mla.copy_pages(pages, source=negated)),
        ("values", lambda negated, pages, stored: cupy_mla.quantise_cache(stored, negated)),
        ("values", lambda negated, pages, stored: cupy_mla.dequantise_cache(stored, negated)),
    ],
)
def test_a_lazy_sign_is_named_where_pages_are_moved(name: str, move: Callable[..., None]) -> None:
    torch = pytest.importorskip("torch")
    pages, stored = torch.zeros(3, 64, 1, 576, dtype=torch.float16), torch.zeros(3, 64, 1, 656, dtype=torch.uint8)
    with pytest.raises(InvalidArgumentError, match=rf"^{name}: .*resolve_neg"):
        move(torch._neg_view(pages), pages.clone(), stored)


def test_a_lazy_sign_tells_calls_apart() -> None:
    """Those that are recognised, too: the same shapes and strides with another sign are not the same call."""
    torch = pytest.importorskip("torch")
    from cupy_mla.arrays.sketch import Sketches

    plain = torch.zeros(2, HEADS, 1, dtype=torch.complex64).imag
    lazy = torch.zeros(2, HEADS, 1, dtype=torch.complex64).conj().imag
    sketches = Sketches()
    first, second = (sketches.sketch((tensor,)) for tensor in (plain, lazy))
    assert first is not None
    assert second is not None
    assert first[2] != second[2]


def test_a_deleted_array_is_named() -> None:
    jax = pytest.importorskip("jax")
    given = arguments(jax.numpy)
    given["q"].delete()
    with pytest.raises(InvalidArgumentError, match=r"^q: expected an array that is still there") as caught:
        cupy_mla.mla_decode(**given)
    assert "deleted" in caught.value.got


def test_a_donated_array_is_named() -> None:
    jax = pytest.importorskip("jax")
    given = arguments(jax.numpy)
    jax.jit(lambda cache: cache + 1, donate_argnums=0)(given["kv_cache"]).block_until_ready()
    if not given["kv_cache"].is_deleted():
        pytest.skip("this JAX does not donate on the CPU")
    with pytest.raises(InvalidArgumentError, match=r"^kv_cache: expected an array that is still there"):
        cupy_mla.mla_decode(**given)


# Files ----------------------------------------------------------------------------------------------------------------


def member(shape: str, data: bytes, descr: str = "'<f2'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def case_with(path: Path, contents: bytes) -> Any:
    good = io.BytesIO()
    arrays = arguments(np)
    np.savez(good, **{name: arrays[name] for name in ("kv_cache", "block_table", "cache_seqlens")})
    path.write_bytes(good.getvalue())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("q.npy", contents)
    return CliRunner().invoke(main, ["decode", "--backend", "numpy", "--input", str(path)])


@pytest.mark.parametrize(
    "contents",
    [
        member("(1000000000000, 1, 4, 576)", b"1234"),  # more than there is memory for
        member("(2, 1, 4, 576)", b"1234"),
        member("(-1, 4)", b"1234"),
        member("(2, 1, 4, 576)", b"0" * 2 * 4 * 576 * 2 + b"more"),
        member("(2,)", b"", "'|O'"),
        member("(2,)", b"1234", "object"),
        member("__import__('os').abort()", b""),
        b"\x93NUMPY\x09\x00\x10\x00 of another version",
        b"no array",
        b"",
    ],
)
def test_a_file_that_lies_is_one_line(contents: bytes, tmp_path: Path) -> None:
    result = case_with(tmp_path / "odd.npz", contents)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    assert "odd.npz" in result.stderr


def test_a_good_file_is_still_read(tmp_path: Path) -> None:
    contents = io.BytesIO()
    np.lib.format.write_array(contents, arguments(np)["q"])
    assert case_with(tmp_path / "good.npz", contents.getvalue()).exit_code == 0


def test_nothing_is_unpickled() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        unsafe = r"^\s*(import|from) (pickle|shelve|marshal|dill|joblib)\b|allow_pickle=True"
        assert not re.search(unsafe, text, re.MULTILINE), path
        assert "np.load(" not in text or "allow_pickle=False" in text, path
