"""Settings from the environment."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cupy_mla.errors import InvalidArgumentError
from cupy_mla.settings import Settings, get_settings, one_thread_each, read_settings


def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    settings = read_settings({})
    assert settings == Settings(tmp_path / ".cache" / "cupy_mla", validate=False, backend="auto")


def test_cache_dir_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert read_settings({"XDG_CACHE_HOME": str(tmp_path)}).cache_dir == tmp_path / "cupy_mla"
    both = {"XDG_CACHE_HOME": "/elsewhere", "CUPY_MLA_CACHE_DIR": str(tmp_path)}
    assert read_settings(both).cache_dir == tmp_path
    assert read_settings({"XDG_CACHE_HOME": "relative"}) == read_settings({})
    assert read_settings({"CUPY_MLA_CACHE_DIR": "~/kernels"}).cache_dir == Path.home() / "kernels"
    monkeypatch.chdir(tmp_path)
    assert read_settings({"CUPY_MLA_CACHE_DIR": "here"}).cache_dir == tmp_path / "here"


def test_without_a_home_the_cache_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache_dir = read_settings({}).cache_dir
    assert cache_dir.stat().st_mode & 0o077 == 0
    assert read_settings({}).cache_dir == cache_dir  # one for all processes
    assert [*tmp_path.iterdir()] == [cache_dir]


@pytest.mark.parametrize("kind", ["other mode", "file", "link"])
def test_a_folder_that_someone_planted_is_not_used(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    planted = tmp_path / f"cupy_mla-{os.getuid()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if kind == "other mode":
        planted.mkdir()
        planted.chmod(0o777)
    elif kind == "file":
        planted.touch()
    else:
        planted.symlink_to(elsewhere)
    cache_dir = read_settings({}).cache_dir
    assert cache_dir not in (planted, elsewhere)
    assert cache_dir.stat().st_mode & 0o077 == 0


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_home_that_cannot_be_written_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    monkeypatch.setattr(Path, "home", lambda: home)
    assert not read_settings({}).cache_dir.is_relative_to(home)


def test_a_home_that_the_system_says_cannot_be_written_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert read_settings({}).cache_dir == tmp_path / ".cache" / "cupy_mla"
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
    assert not read_settings({}).cache_dir.is_relative_to(tmp_path / ".cache")


def test_processes_of_one_thread_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    with one_thread_each():
        assert (os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"]) == ("1", "1")
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "OPENBLAS_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("word", ["1", "true", "YES", " on "])
def test_validate_on(word: str):
    assert read_settings({"CUPY_MLA_VALIDATE": word}).validate is True


@pytest.mark.parametrize("word", ["", "0", "False", "no", "off"])
def test_validate_off(word: str):
    assert read_settings({"CUPY_MLA_VALIDATE": word}).validate is False


@pytest.mark.parametrize("backend", ["auto", "cuda", "numpy", "NumPy"])
def test_backend(backend: str):
    assert read_settings({"CUPY_MLA_BACKEND": backend}).backend == backend.lower()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CUPY_MLA_VALIDATE", "maybe"),
        ("CUPY_MLA_BACKEND", "rocm"),
        ("CUPY_MLA_VALIDATE", "2"),
        ("CUPY_MLA_CACHE_DIR", "~nosuchuser/x"),
    ],
)
def test_wrong_values_are_refused(variable: str, value: str):
    with pytest.raises(InvalidArgumentError, match=value) as caught:
        read_settings({variable: value})
    assert caught.value.argument == variable


def test_settings_are_read_once(set_environment: Callable[..., Settings]):
    first = set_environment(CUPY_MLA_BACKEND="numpy", CUPY_MLA_VALIDATE=None)
    assert first.backend == "numpy"
    assert get_settings() is first
    assert set_environment(CUPY_MLA_BACKEND="cuda").backend == "cuda"
    assert get_settings().backend == "cuda"
