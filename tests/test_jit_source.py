"""jit.source: the digest follows everything the cubin depends on, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cupy_mla.errors import CompilationError
from cupy_mla.gpu.jit.source import KernelSource, digest, kernels_root, read_files

VERSION = "NVRTC 12.9"
SOURCE = KernelSource("scale/scale.cu", "scale", (("FACTOR", "3"),))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A kernel folder: the entry includes a header beside it, which includes one of another folder, and so on."""
    for name, text in {
        "scale/scale.cu": '#include "params.h"\nextern "C" __global__ void scale(float* x) { *x *= FACTOR; }\n',
        "scale/params.h": '#pragma once\n  #  include "core/types.h"\n',
        "core/types.h": '#pragma once\n#include "../ptx/warp.h"\n',
        "ptx/warp.h": '#pragma once\n#include "../core/types.h"\n',  # a cycle: it must end
        "core/unused.h": "#pragma once\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_all_headers_are_found(root: Path) -> None:
    assert set(read_files(SOURCE, root)) == {"scale/scale.cu", "scale/params.h", "core/types.h", "ptx/warp.h"}


def test_digest_is_stable(root: Path) -> None:
    assert digest(SOURCE, VERSION, root) == digest(SOURCE, VERSION, root)


@pytest.mark.parametrize("edited", ["scale/scale.cu", "scale/params.h", "core/types.h", "ptx/warp.h"])
def test_digest_follows_an_edited_file(root: Path, edited: str) -> None:
    before = digest(SOURCE, VERSION, root)
    with (root / edited).open("a") as file:
        file.write("// edited\n")
    assert digest(SOURCE, VERSION, root) != before


def test_digest_ignores_a_file_that_is_not_included(root: Path) -> None:
    before = digest(SOURCE, VERSION, root)
    (root / "core/unused.h").write_text("// edited\n")
    assert digest(SOURCE, VERSION, root) == before


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(SOURCE, defines=(("FACTOR", "4"),)),
        dataclasses.replace(SOURCE, defines=(("FACTOR", "3"), ("MORE", ""))),
        dataclasses.replace(SOURCE, defines=()),
        dataclasses.replace(SOURCE, defines=(("FACTO", "R3"),)),  # the same letters, cut elsewhere
        dataclasses.replace(SOURCE, function="other"),
        dataclasses.replace(SOURCE, arch="sm_100a"),
    ],
    ids=str,
)
def test_digest_follows_defines_function_and_architecture(root: Path, other: KernelSource) -> None:
    assert digest(other, VERSION, root) != digest(SOURCE, VERSION, root)


def test_digest_follows_the_compiler(root: Path) -> None:
    assert digest(SOURCE, "NVRTC 13.0", root) != digest(SOURCE, VERSION, root)


def test_digest_follows_the_options(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(SOURCE, VERSION, root)
    monkeypatch.setattr("cupy_mla.gpu.jit.source.COMPILE_OPTIONS", ("-G",))
    assert digest(SOURCE, VERSION, root) != before


def test_digest_is_the_same_in_another_folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "kernels"
    root.rename(elsewhere)
    moved = digest(SOURCE, VERSION, elsewhere)
    elsewhere.rename(root)
    assert moved == digest(SOURCE, VERSION, root)


def test_an_include_that_is_not_there_is_left_to_the_compiler(root: Path) -> None:
    (root / "scale/params.h").write_text('#ifdef HOST\n#include "host_only.h"\n#endif\n')
    assert set(read_files(SOURCE, root)) == {"scale/scale.cu", "scale/params.h"}


def test_a_missing_entry_file_is_named(root: Path) -> None:
    with pytest.raises(CompilationError, match=r"scale/none\.cu"):
        digest(KernelSource("scale/none.cu", "scale"), VERSION, root)


def test_the_kernel_folder_is_found() -> None:
    assert (kernels_root() / "core" / "types.h").is_file()


def test_a_broken_installation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cupy_mla.gpu.jit.source._WHEEL_ROOT", tmp_path / "a")
    monkeypatch.setattr("cupy_mla.gpu.jit.source._CHECKOUT_ROOT", tmp_path / "b")
    with pytest.raises(CompilationError, match="reinstall cupy-mla"):
        kernels_root()
