"""The package keeps its order: imports run downward only, nothing heavy is imported early, each thing has one place."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import cupy_mla
from cupy_mla.gpu.jit.source import kernels_root

PACKAGE = Path(cupy_mla.__file__).parent
KERNELS = kernels_root()
ROOT = "cupy_mla"

# From the ground up: folders, and modules of the package's top level. A module imports only from rows above its own and
# from its own folder; no cycle is allowed anywhere. A new folder needs a place here and in CONTRIBUTING's diagram.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("settings", "shown"),
    ("arrays",),
    ("gpu",),
    ("layouts",),
    ("fp8_layouts",),  # the former address of some of them
    ("call",),
    ("schedule",),
    ("kernels",),
    ("decode",),
    ("cache",),
    ("torch_ops", "jax_ops"),
    ("torch_rules",),
    ("torch_compile",),
    ("flash_mla",),
    ("parallel",),
    ("engines",),
    ("lab",),
    ("bench",),
    (ROOT,),  # what users import: names from the rows above
    ("commands",),
    ("cli",),
    ("__main__",),
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Imported inside functions only: they are slow to import, optional, or both.
LAZY = {"cupy", "cupyx", "cuda", "torch", "jax", "tvm_ffi", "rich", "matplotlib", "safetensors", "IPython"}
LAZY |= {"transformers", "vllm"}
# But by modules that run inside an engine only, and are made of its classes. No other module imports them.
ENGINES = {"engines.transformers": {"torch", "transformers"}, "engines.vllm": {"torch", "vllm"}}
# NumPy is most of it. CPU time, not wall time, so that a busy machine does not matter; with bytecode, as installed.
IMPORT_SECONDS = 0.3
IMPORT_RATIO = 1.0  # ours to NumPy's, whatever the machine's speed
IMPORT_TRIES = 5

MODULE_FILES = sorted(PACKAGE.rglob("*.py"))
KERNEL_FILES = sorted(path for suffix in ("*.h", "*.cu") for path in KERNELS.rglob(suffix))


def module_name(path: Path) -> str:
    """The name below the package, e.g. "jit.cache"; the package itself is "cupy_mla"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or ROOT


MODULES = {module_name(path): path for path in MODULE_FILES}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def rank_of(name: str) -> int | None:
    """The row of a module: that of its folder, or its own at the top level."""
    return RANKS.get(name.partition(".")[0])


def imported_modules(name: str) -> set[str]:
    """The package's modules that a module imports anywhere, in functions and for type checking too."""
    found: set[str] = set()
    path = MODULES[name]
    package = [ROOT, *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # "from .jit import source" imports a module, "from .errors import MlaError" a name of one.
            targets = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target == ROOT or target.startswith(f"{ROOT}."):
                below = target.removeprefix(ROOT).removeprefix(".")
                while below and below not in MODULES:
                    below = below.rpartition(".")[0]
                found.add(below or ROOT)
    return found - {name}


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downward(name: str) -> None:
    rank = rank_of(name)
    assert rank is not None, f"{name} has no place in LAYERS"
    for imported in sorted(imported_modules(name)):
        other = rank_of(imported)
        assert other is not None, f"{imported} has no place in LAYERS"
        same_folder = name.partition(".")[0] == imported.partition(".")[0]
        assert other < rank or same_folder, f"{name} imports {imported}, which does not lie below it"


def test_there_is_no_import_cycle() -> None:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in done:
            for imported in sorted(imported_modules(name)):
                visit(imported, (*trail, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_the_diagram_shows_the_layers() -> None:
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    diagram = text.partition("## Architecture\n")[2].partition("kernels_cu/")[0]
    rows = [re.findall(r"\w+", row) for row in re.findall(r"^    (\w.*?)  ", diagram, re.MULTILINE)]
    assert {name for row in rows for name in row} == RANKS.keys() - {ROOT, "__main__"}
    assert [RANKS[row[0]] for row in rows] == sorted((RANKS[row[0]] for row in rows), reverse=True)


def module_level_imports(tree: ast.Module) -> Iterator[str]:
    """Top-level names of what is imported when the module is; not in functions, not for type checking only."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]
        pending.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("name", MODULES)
def test_heavy_packages_are_imported_in_functions(name: str) -> None:
    assert not (LAZY - of_engine(name)) & set(module_level_imports(tree_of(MODULES[name])))


def of_engine(name: str) -> set[str]:
    """What a module of an engine may import with itself: its name begins with the engine's."""
    return set().union(*(packages for engine, packages in ENGINES.items() if name.startswith(engine)))


def test_engines_are_imported_by_themselves_alone() -> None:
    for name in MODULES:
        for imported in imported_modules(name):
            engines = [engine for engine in ENGINES if imported.startswith(engine)]
            assert all(name.startswith(engine) for engine in engines), f"{name} imports {imported}"
    assert {engine for engine in ENGINES if engine in MODULES} == ENGINES.keys()


def test_importing_the_package_imports_nothing_heavy() -> None:
    # Some packages put a module of theirs into every process (.pth files): only what the import adds counts.
    script = (
        "import sys; before = set(sys.modules); import cupy_mla; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert not LAZY & set(output.split())


def test_importing_the_package_is_quick(tmp_path: Path) -> None:
    script = (
        "from time import process_time as now; start = now(); import numpy; middle = now(); import cupy_mla; "
        "print(middle - start, now() - middle)"
    )
    command = [sys.executable, "-c", script]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)  # the first try compiles, and is slow
    tries = [
        [float(word) for word in subprocess.check_output(command, env=environment, text=True).split()]
        for _ in range(IMPORT_TRIES)
    ]
    assert min(map(sum, tries)) < IMPORT_SECONDS
    numpy_seconds, own_seconds = map(min, zip(*tries, strict=True))
    assert own_seconds < IMPORT_RATIO * numpy_seconds


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"settings"}))
def test_only_settings_reads_the_environment(name: str) -> None:
    readers = {"environ", "environb", "getenv", "getenvb"}
    for node in ast.walk(tree_of(MODULES[name])):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in readers, f"line {node.lineno} reads the environment: settings.py does that"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            assert not readers & {alias.name for alias in node.names}


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def relative(path: Path) -> str:
    return path.relative_to(KERNELS).as_posix()


@pytest.mark.parametrize("path", KERNEL_FILES, ids=relative)
def test_only_ptx_headers_contain_asm(path: Path) -> None:
    if not relative(path).startswith("ptx/"):
        assert not re.search(r"\b(asm|__asm__)\b", without_comments(path.read_text()))


@pytest.mark.parametrize("path", KERNEL_FILES, ids=relative)
def test_kernels_include_only_files_of_the_project(path: Path) -> None:
    """Otherwise the cache's digest could not follow them, and NVRTC would need CUDA's headers."""
    for line in re.findall(r"^[ \t]*#[ \t]*include\b.*", without_comments(path.read_text()), flags=re.MULTILINE):
        match = re.search(r'"([^"]+)"', line)
        assert match, f"not a quoted include: {line}"
        assert any((folder / match.group(1)).is_file() for folder in (path.parent, KERNELS)), f"not there: {line}"
