"""The shell scripts find their places whatever the folder, the home and CDPATH are; nothing is installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP = ROOT / "scripts" / "setup.sh"
NO_HOME = "/dev/null"  # nobody can write into it, root neither

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def run_bash(script: str, folder: Path, **variables: str) -> list[str]:
    """Lines that a bash script prints when it is run in a folder with these variables."""
    environment = {name: value for name, value in os.environ.items() if name not in ("VENV", "CUPY_CACHE_DIR")}
    command = ["bash", "-c", script]
    result = subprocess.run(command, cwd=folder, env={**environment, **variables}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("folder", [ROOT, ROOT / "scripts", ROOT / "tests", Path("/")], ids=str)
@pytest.mark.parametrize("cdpath", [None, ".", str(ROOT), "/:/tmp"])
def test_the_checkout_is_found_from_any_folder(folder: Path, cdpath: str | None) -> None:
    path = os.path.relpath(SETUP, folder)
    variables = {} if cdpath is None else {"CDPATH": cdpath}
    assert run_bash(f'source {path}; echo "$ROOT"; echo "$VENV"', folder, **variables) == [str(ROOT), f"{ROOT}/.venv"]


@pytest.mark.parametrize(("venv", "below"), [("env", "env"), ("a folder/env", "a folder/env"), ("-env", "-env")])
def test_a_relative_place_is_that_of_the_caller(venv: str, below: str, tmp_path: Path) -> None:
    lines = run_bash(f'source "{SETUP}"; cd /; echo "$VENV"; echo "$CUPY_CACHE_DIR"', tmp_path, VENV=venv)
    assert lines == [f"{tmp_path}/{below}", f"{tmp_path}/{below}/cupy"]


def test_the_environment_is_made_once_without_a_home(tmp_path: Path) -> None:
    """From two folders, with pip stood in for."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    script = f'source "{SETUP}"; pip_install() {{ echo "pip $*"; }}; ensure_environment test; echo "$VENV"'
    variables = {"PYTHON": sys.executable, "HOME": NO_HOME, "CDPATH": "."}
    place = str(tmp_path / "two" / "env")
    assert run_bash(script, tmp_path / "one", VENV=place, **variables) == [f"pip -e {ROOT}[test]", place]
    assert run_bash(script, tmp_path / "two", VENV="env", **variables) == [place]


def test_what_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    command = ["bash", "-c", f'source "{SETUP}"; ensure_environment test']
    result = subprocess.run(command, cwd=tmp_path, env={**os.environ, "VENV": "mine"}, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"{tmp_path}/mine is there and is not a virtual environment" in result.stderr
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_the_gpu_round_runs_in_the_checkout(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\npwd -P\necho "$@"\n')
    python.chmod(0o755)
    (tmp_path / "scripts").mkdir()  # where CDPATH would lead
    script = "bash scripts/gpu_round.sh targets"
    lines = run_bash(script, ROOT, CDPATH=str(tmp_path), PYTHON=str(python), TEST_SECONDS="0")
    assert lines == [str(ROOT), "scripts/tune.py targets"]
