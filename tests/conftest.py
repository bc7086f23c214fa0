"""Fixtures for all tests, and the mark of those that need a Hopper GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cupy_mla import settings
from cupy_mla.gpu.device import why_unsupported

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_configure(config: pytest.Config) -> None:
    # A program that Inductor kept from another state of the code has the size of that code's plans in it.
    os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    config.addinivalue_line("markers", "gpu: runs kernels; skipped without a Hopper GPU (all of tests/gpu is marked)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(GPU_TESTS):
            item.add_marker(pytest.mark.gpu)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    reason = why_unsupported() if on_gpu else None
    if reason is not None:
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=f"needs a Hopper GPU: {reason}"))


@pytest.fixture(autouse=True)
def first_gpu(request: pytest.FixtureRequest) -> None:
    """Each test on a GPU begins with the first one current. JAX leaves current the last that it has set up, and torch,
    whose streams for captures are of the GPU that was current at the first, then captures nothing of what runs there.
    """
    if request.node.get_closest_marker("gpu") is not None:
        from cupy.cuda import runtime

        runtime.setDevice(0)


@pytest.fixture
def set_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., settings.Settings]]:
    """Function that sets environment variables (None removes one) and re-reads the settings; undone at the end."""

    def change(**variables: str | None) -> settings.Settings:
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        return settings.reload_settings()

    yield change
    monkeypatch.undo()
    settings.get_settings.cache_clear()
