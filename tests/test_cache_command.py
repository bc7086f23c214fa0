"""``cupy-mla cache``, and what else the kernel cache must survive."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from cupy_mla.cli import main
from cupy_mla.gpu.jit import cache, compiler, module
from cupy_mla.gpu.jit.compiler import CompiledKernel, ResourceUsage
from cupy_mla.gpu.jit.source import KernelSource
from cupy_mla.shown import tables

USAGE = ResourceUsage(registers=168, spill_stores=0, spill_loads=0, stack_frame=0, static_smem=0, barriers=0)
KERNEL = CompiledKernel(bytes(range(256)) * 4, "ptxas info: fine", USAGE, (), 1.0)
DESCRIPTION = {"function": "mla_decode", "defines": {"MLA_ROWS": "16"}, "compiler": "NVRTC 12.9"}
needs_nvrtc = pytest.mark.skipif(compiler.why_unavailable() is not None, reason="needs NVRTC")


def digest_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path, set_environment: Callable[..., Any]) -> Path:
    """Two kernels, of which the second is damaged; what a killed process left; a file of somebody's."""
    for number in range(2):
        cache.fetch(digest_of(number), lambda: KERNEL, tmp_path, lambda: DESCRIPTION)
    (tmp_path / digest_of(1) / cache.CUBIN_NAME).write_bytes(b"tampered")
    (tmp_path / f"{digest_of(2)}.partial-0a1b").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    set_environment(CUPY_MLA_CACHE_DIR=str(tmp_path))
    return tmp_path


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["cache", *arguments])


def test_it_lists(folder: Path) -> None:
    result = run()
    assert result.exit_code == 0, result.output
    assert result.output.count("mla_decode rows=16") == 2
    assert "NVRTC 12.9" in result.output
    assert f"2 kernels, 0.0 MB in {folder}, 1 damaged" in result.output
    assert run("list").output == result.output


def test_it_lists_on_a_narrow_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_console", lambda width: Console(width=40))
    lines = run().output.splitlines()
    assert sum(line.startswith("mla_decode rows=16") for line in lines) == 2
    assert sum("compiled by: NVRTC 12.9" in line for line in lines) == 2
    assert sum(line.endswith("damaged") and ": damaged" not in line for line in lines[:-1]) == 1  # it has no title
    assert not any(line.rstrip().endswith(":") for line in lines)


def test_it_checks(folder: Path) -> None:
    result = run("check")
    assert result.exit_code == 1
    assert digest_of(1)[:12] in result.output
    assert digest_of(0)[:12] not in result.output
    cache.fetch(digest_of(1), lambda: KERNEL, folder)  # compiled anew
    result = run("check")
    assert result.exit_code == 0
    assert "2 kernels, 0.0 MB" in result.output


def test_it_clears_what_is_its_own(folder: Path) -> None:
    result = run("clear")
    assert result.exit_code == 0
    assert f"2 kernels removed from {folder}, and 1 leftovers" in result.output
    assert {path.name for path in folder.iterdir()} == {"notes.txt", cache.LOCK_FOLDER}
    assert "0 kernels removed" in run("clear").output
    assert cache.fetch(digest_of(0), lambda: KERNEL, folder).path is not None


def test_there_need_be_no_folder(tmp_path: Path, set_environment: Callable[..., Any]) -> None:
    set_environment(CUPY_MLA_CACHE_DIR=str(tmp_path / "none"))
    for action in ("list", "check", "clear"):
        result = run(action)
        assert result.exit_code == 0, result.output
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("action", ["list", "check", "clear"])
def test_a_folder_that_cannot_be_looked_at_is_one_line(
    action: str, tmp_path: Path, set_environment: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(CUPY_MLA_CACHE_DIR=str(tmp_path))

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    result = run(action)
    assert result.exit_code == 3
    assert len(result.stderr.splitlines()) == 1
    assert "Permission denied" in result.stderr


def test_an_unknown_action_is_refused(folder: Path) -> None:
    assert run("burn").exit_code == 2
    assert len(cache.list_entries(folder)) == 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    name=st.sampled_from([cache.CUBIN_NAME, cache.RECORD_NAME]),
    place=st.integers(0, 1 << 16),
    change=st.one_of(st.binary(max_size=8), st.none()),
    cut=st.booleans(),
)
def test_whatever_is_damaged_is_never_loaded_as_something_else(
    name: str, place: int, change: bytes | None, cut: bool, tmp_path: Path
) -> None:
    """Bytes replaced, removed or cut off anywhere: the entry is either what it was or absent, and is repaired."""
    digest = digest_of(9)
    cache.fetch(digest, lambda: KERNEL, tmp_path, lambda: DESCRIPTION)
    path = tmp_path / digest / name
    contents = path.read_bytes()
    place %= len(contents)
    if change is None:
        path.unlink()
    else:
        path.write_bytes(contents[:place] + change + (b"" if cut else contents[place + len(change) :]))
    found = cache.read_entry(tmp_path, digest)
    assert found is None or found.cubin == KERNEL.cubin
    assert cache.fetch(digest, lambda: KERNEL, tmp_path).cubin == KERNEL.cubin
    repaired = cache.read_entry(tmp_path, digest)
    assert repaired is not None
    assert repaired.cubin == KERNEL.cubin


@needs_nvrtc
@pytest.mark.parametrize("name", ['it\'s "quoted"', "spaces and ü", os.fsdecode(b"no utf-8 \xff")])
def test_folders_may_have_any_name(name: str, tmp_path: Path) -> None:
    root = tmp_path / name / "kernels"
    (root / "core").mkdir(parents=True)
    (root / "core" / "factor.h").write_text("#define FACTOR 3.0f\n")
    (root / "scale.cu").write_text(
        '#include "core/factor.h"\nextern "C" __global__ void scale(float* x) { x[threadIdx.x] *= FACTOR; }\n'
    )
    source = KernelSource("scale.cu", "scale")
    built = module.get_cubin(source, cache_dir=tmp_path / name / "cache", root=root)
    found = module.get_cubin(source, cache_dir=tmp_path / name / "cache", root=root)
    assert found.from_cache
    assert found.cubin == built.cubin
    record = json.loads((found.path.parent / cache.RECORD_NAME).read_text()) if found.path else {}
    assert record["function"] == "scale"


def test_what_is_loaded_is_what_was_verified(tmp_path: Path) -> None:
    kernel = cache.fetch(digest_of(3), lambda: KERNEL, tmp_path)
    assert kernel.path is not None
    kernel.path.write_bytes(b"swapped after the check")
    with module._cubin_file(kernel) as path:
        assert path.read_bytes() == KERNEL.cubin
        assert path.parent.stat().st_mode & 0o077 == 0
    assert not path.exists()
