"""Settings from the environment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cupy_mla.errors import InvalidArgumentError
from cupy_mla.settings import Settings, get_settings, read_settings


def test_defaults():
    settings = read_settings({})
    assert settings == Settings(Path.home() / ".cache" / "cupy_mla", validate=False, backend="auto")


def test_cache_dir_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert read_settings({"XDG_CACHE_HOME": str(tmp_path)}).cache_dir == tmp_path / "cupy_mla"
    both = {"XDG_CACHE_HOME": "/elsewhere", "CUPY_MLA_CACHE_DIR": str(tmp_path)}
    assert read_settings(both).cache_dir == tmp_path
    assert read_settings({"XDG_CACHE_HOME": "relative"}) == read_settings({})
    assert read_settings({"CUPY_MLA_CACHE_DIR": "~/kernels"}).cache_dir == Path.home() / "kernels"
    monkeypatch.chdir(tmp_path)
    assert read_settings({"CUPY_MLA_CACHE_DIR": "here"}).cache_dir == tmp_path / "here"


def test_without_a_home_the_cache_is_private(monkeypatch: pytest.MonkeyPatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    cache_dir = read_settings({}).cache_dir
    try:
        assert cache_dir.stat().st_mode & 0o077 == 0
    finally:
        cache_dir.rmdir()


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
