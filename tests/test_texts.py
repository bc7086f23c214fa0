"""What every file keeps to: its length, its words, no path of somebody's machine, and each error with its condition."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, KERNELS = ROOT / "cupy_mla", ROOT / "kernels_cu"
FOLDERS = ("cupy_mla", "kernels_cu", "scripts", "tests", ".ci")  # the last is not in a source distribution
SUFFIXES = {".py", ".h", ".cu", ".cpp", ".sh", ".md", ".toml", ".ipynb"}
MAX_LINES = 400  # what can be read, and held in mind, at once
OLD_WORDS = {"copy engine": "TMA", "the house": "the package, or the architecture", "is told": "is reported"}

FILES = sorted(
    path
    for path in (*ROOT.glob("*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")))
    if (path.suffix in SUFFIXES or path == ROOT / ".ci" / "run") and path != Path(__file__)
)
CODE = [path for path in FILES if path.is_relative_to(PACKAGE) or path.is_relative_to(KERNELS)]
CODE = [path for path in CODE if path.suffix in (".py", ".h", ".cu", ".md")]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_are_files() -> None:
    assert len(CODE) > 100
    assert {name_of(path) for path in FILES} >= {"README.md", "pyproject.toml", "scripts/setup.sh", "tests/conftest.py"}


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_a_file_can_be_read_at_once(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_path_belongs_to_one_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w.])/(?:home|root|work|workspace|mnt|Users)/\S*", text)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_words(path: Path) -> None:
    text = " ".join(path.read_text(encoding="utf-8").lower().split())
    for old, new in OLD_WORDS.items():
        assert old not in text, f"write {new}"


# --- errors


def public_functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Name, function and docstring (of a constructor, its class's) of what others may call.

    Methods of derived classes are left out: the class that they come from says what they raise.
    """
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node, ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not node.bases:
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    if method.name in ("__init__", "__post_init__"):
                        yield node.name, method, ast.get_docstring(node) or ""
                    elif not method.name.startswith("_"):
                        yield f"{node.name}.{method.name}", method, ast.get_docstring(method) or ""


def own_raises(body: list[ast.stmt]) -> Iterator[str]:
    """Exceptions that these statements name and raise; not those of ``try`` blocks, which may be caught."""
    for node in body:
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield ast.unparse(node.exc.func)
        elif isinstance(node, ast.Try):
            for part in (node.orelse, node.finalbody, *(handler.body for handler in node.handlers)):
                yield from own_raises(part)
        elif not isinstance(node, ast.FunctionDef | ast.ClassDef):
            for part in (getattr(node, "body", []), getattr(node, "orelse", [])):
                yield from own_raises(part)


MODULES = [path for path in CODE if path.suffix == ".py" and path.parent.name != "commands"]  # those: help for users


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_errors_are_documented_with_their_condition(path: Path) -> None:
    for name, function, text in public_functions(path):
        entries = dict(re.findall(r"^([\w, ]+)\n((?:    .*\n?)+)", text.partition("Raises\n------\n")[2], re.MULTILINE))
        for raised in own_raises(function.body):
            if raised.endswith("Error"):
                assert any(raised in entry for entry in entries), f"{name} does not say when it raises {raised}"
        for entry, condition in entries.items():
            if entry.endswith(("Error", "Exception")):
                words = condition.split()
                assert len(words) > 3, f"{name} does not say when it raises {entry}"
                assert words[0] not in ("As", "See"), f"{name} sends elsewhere for {entry}"
