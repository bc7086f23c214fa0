"""The README's Python examples run as they stand."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from cupy_mla import device

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
GPU_FRAMEWORKS = ("torch", "cupy")


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example: str) -> None:
    for framework in GPU_FRAMEWORKS:
        if f"import {framework}\n" in example:
            reason = device.why_unsupported()
            if reason is not None:
                pytest.skip(f"needs a GPU: {reason}")
            if importlib.util.find_spec(framework) is None:
                pytest.skip(f"{framework} is not installed")
    namespace: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), namespace)
    assert namespace["out"].shape[-1] == 512  # type: ignore[attr-defined]
