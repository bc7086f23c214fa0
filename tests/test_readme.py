"""The README and the pages beside it keep their word: their Python examples run, their commands are taken as they stand
and run in small form, their links lead somewhere.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cupy_mla
from cupy_mla import settings
from cupy_mla.bench import expand_grid, run_bench
from cupy_mla.cli import main
from cupy_mla.gpu import device
from cupy_mla.gpu.jit import compiler
from cupy_mla.lab.array_files import write_arrays
from cupy_mla.lab.build import build_case
from cupy_mla.lab.cases import TENSORS
from cupy_mla.lab.spec import CaseSpec

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "cupy_mla" / "docs"
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")), *sorted(DOCS.glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
TEXT = "\n".join(TEXTS.values())
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WHEEL = f"dist/cupy_mla-{cupy_mla.__version__}-py3-none-any.whl"
CI = ROOT / ".ci" / "run"  # not in a source distribution

# Each starts with a comment that says what it is.
EXAMPLES = dict(re.findall(r"```python\n# ([^\n]+)\n(.*?)```", TEXT, re.DOTALL))
TITLES = {
    *("torch", "torch.compile", "JAX", "CuPy", "NumPy", "FlashMLA", "benchmark", "paged cache"),
    *("sparse decode", "sparse prefill", "sparse decode, FP8", "sparse decode, two caches", "FP8"),
    *("a step of all layers", "JAX scan", "own call", "transformers", "pages"),
    *("context-parallel decode", "context-parallel sparse decode", "context-parallel decode in JAX"),
}

PROGRAMS = ("cupy-mla", "./scripts/", ".ci/run", "python ", ".venv/bin/python ", "pip ", "jupyter ")
NEED_A_GPU = ("./scripts/gpu_round.sh", "./scripts/reliability.sh")
VARIABLE = re.compile(r"[A-Z_]+=\S*$")
FIGURES = ROOT / "scripts" / "figures"
CASE_FILE, EARLIER_RUN = "case.npz", "before.json"  # what the commands find in their folder

# What makes a command small: values in place of those given, and more arguments.
SMALL_VALUES = {
    "check": {"--random": "40", "--context-parallel": "2"},
    "bench": {"--batch": "1,2", "--length": "64", "--heads": "1,2", "--tp": "32,64", "--trace": "1"},
}
SMALL_ARGUMENTS = {"decode": ["--batch", "2", "--tp", "128"], "compile": ["append"]}


def commands() -> list[str]:
    """All command lines, in blocks and in the text, each once and without its comment."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    lines += [code for code in re.findall(r"`([^`\n]+)`", prose) if is_command(code)]
    words = (shlex.split(line, comments=True) for line in lines)
    return list(dict.fromkeys(shlex.join(line) for line in words if line))


def is_command(code: str) -> bool:
    words = [word for word in code.split() if not VARIABLE.match(word)]
    if not words or (len(words) == 1 and not words[0].startswith("./")):
        return False  # the name of a program, of a file, or of the package
    return f"{words[0]} ".startswith(PROGRAMS)


COMMANDS = commands()


# --- examples


def test_there_are_examples() -> None:
    assert EXAMPLES.keys() == TITLES
    assert TEXT.count("```python") == len(TITLES)


@pytest.mark.parametrize("title", EXAMPLES)
def test_example_runs(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands on a Hopper GPU; elsewhere with "cpu" for "cuda"."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave the other frameworks some memory
    code = EXAMPLES[title]
    reason = device.why_unsupported()
    for framework in re.findall(r"^(?:import|from) (torch|jax|cupy|transformers)\b", code, re.MULTILINE):
        if importlib.util.find_spec(framework) is None:
            pytest.skip(f"{framework} is not installed")
        if framework == "cupy" and reason is not None:
            pytest.skip(f"needs a GPU: {reason}")
        if framework == "jax" and (missing := why_not_in_jit(reason)):
            pytest.skip(missing)
    if reason is not None:
        code = code.replace('device="cuda"', 'device="cpu"')
    namespace: dict[str, Any] = {}
    exec(compile(code, f"the example {title}", "exec"), namespace)
    if title == "benchmark":
        assert len(namespace["results"].rows) == 4
        assert not namespace["results"].failed
    elif title == "pages":
        error = (namespace["prefix"] - namespace["values"][namespace["pages"].long()]).abs().max()
        assert 0 < float(error) < 0.5
    elif title == "transformers":
        assert namespace["tokens"].shape == (2, 48)
        assert "cupy_mla+" in namespace["model"].config._attn_implementation
    else:
        out = namespace["out"]
        assert out.shape[-1] == 512
        of_prefill = title == "sparse prefill"
        assert namespace["lse"].shape == (out.shape[:2] if of_prefill else (out.shape[0], out.shape[2], out.shape[1]))
        assert bool(abs(out).max() > 0)


def why_not_in_jit(reason: str | None) -> str | None:
    import jax

    if jax.default_backend() == "cpu":
        return None
    if reason is not None:
        return f"JAX would run it on a GPU that does not do: {reason}"
    return None if importlib.util.find_spec("jax_tvm_ffi") else "jax-tvm-ffi is not installed"


# --- commands


def test_there_are_commands() -> None:
    assert set(main.commands) == {line.split()[1] for line in COMMANDS if line.startswith("cupy-mla ")}
    assert len(COMMANDS) > 25


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_environment: Any) -> None:
    words = [word for word in shlex.split(line) if not VARIABLE.match(word)]
    program, *arguments = words
    if program.startswith("./scripts/"):
        check_shell_script(program, arguments)
    elif program == "pip":
        check_pip(arguments)
    elif program == "jupyter":
        assert arguments[0] == "lab"
        assert (ROOT / arguments[1]).is_file()  # test_notebook.py runs it
    elif program == ".ci/run":
        assert os.access(CI, os.X_OK) or not CI.exists()
    elif program == ".venv/bin/python":
        check_module(arguments)
    elif arguments and arguments[0].startswith("scripts/"):
        check_python_script(ROOT / arguments[0], arguments[1:], monkeypatch)
    else:
        if program == "python":
            assert arguments[:2] == ["-m", "cupy_mla"]  # test_cli.py runs that
            arguments = arguments[2:] or ["--help"]
        set_environment(CUPY_MLA_BACKEND="numpy", CUPY_MLA_CACHE_DIR=str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        run(arguments)


def check_shell_script(program: str, arguments: list[str]) -> None:
    """CI runs them whole, but for those that need a GPU: here they would run these tests."""
    assert os.access(ROOT / program, os.X_OK)
    if CI.exists() and program not in NEED_A_GPU:
        assert f'"$root/{program.removeprefix("./")}"' in CI.read_text()
    if program.endswith("demo.sh"):
        parse(["decode", *arguments])
    for argument in arguments:
        assert not argument.startswith("tests/") or (ROOT / argument).exists()


def check_module(arguments: list[str]) -> None:
    """A tool that CI calls too, or pytest with files that are there."""
    option, module, *rest = arguments
    assert option == "-m"
    if module == "pip":
        check_pip([word for word in rest if word != "-e"])
    elif module == "pytest":
        assert all((ROOT / word).exists() for word in rest)
    elif CI.exists():
        assert f'"$python" -m {" ".join(arguments[1:])}' in CI.read_text()


def check_pip(arguments: list[str]) -> None:
    if arguments[0] == "wheel":
        assert arguments == ["wheel", "--no-deps", "--wheel-dir", "dist", "."]
        return
    action, package = arguments
    assert action == "install"
    name, _, names = package.rstrip("]").partition("[")
    if name in (WHEEL, "."):
        assert set(filter(None, names.split(","))) <= set(extras())
    else:
        assert package == "jax[cuda12]"


def check_python_script(path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments are taken; test_tune.py runs tune.py in small form, the tests below the others."""
    monkeypatch.chdir(ROOT)
    load_script(path, monkeypatch).main.make_context(path.name, list(arguments))


def load_script(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, script)  # its dataclasses look for it there
    spec.loader.exec_module(script)
    return script


def test_host_cost_runs() -> None:
    """Without a GPU too, where torch stands in for it."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    command = [sys.executable, str(ROOT / "scripts" / "host_cost.py")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "mla_decode, plan and outputs given" in output.splitlines()[-1]
    assert "torch.ops, plan and outputs given" in output.splitlines()[-2]


def test_model_step_runs() -> None:
    """Without a GPU the bookkeeping of a small step."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    command = [sys.executable, str(ROOT / "scripts" / "model_step.py"), "--layers", "2", "--batch", "2"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.search(r"bookkeeping +\d", output)


def test_generate_runs() -> None:
    """Without a GPU a small model; its tokens are those of float32."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), "--steps", "4", "--sizes", "2x100"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    errors = {name: float(value) for name, value in re.findall(r"error of the logits, (\w+) \D+16 +(\S+)", output)}
    assert errors.keys() == {"eager", "ours"}
    assert errors["ours"] < 2e-2
    assert re.search(r"2 x +100 +cupy_mla +\d", output)


def test_the_first_number_is_that_of_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    by_heads = load_script(ROOT / "scripts" / "draw_speedup.py", monkeypatch).read_speedups(FIGURES / "scaling.csv")
    lines = [by_tokens for by_batch in by_heads.values() for by_tokens in by_batch.values()]
    speedups = [speedup for line in lines for speedup in line.values()]
    words = " ".join(TEXTS[PAGES[0]].split())
    assert f"**{statistics.median(speedups):.2f} times as fast as" in words
    assert f"at the median of {len(speedups)} cases" in words
    assert f"({min(speedups):.2f} to {max(speedups):.2f} times;" in words


def test_the_first_picture_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "speedup.png"
    main = load_script(ROOT / "scripts" / "draw_speedup.py", monkeypatch).main
    result = CliRunner().invoke(main, [str(FIGURES / "scaling.csv"), str(picture)])
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 10_000
    alone = tmp_path / "alone.csv"  # a run without peers has nothing to be compared with
    lines = (FIGURES / "scaling.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    alone.write_text("".join(line for line in lines if "cupy-mla" in line or line == lines[0]), encoding="utf-8")
    result = CliRunner().invoke(main, [str(alone), str(picture)])
    assert result.exit_code == 1
    assert "no case that another implementation has run" in result.output


def parse(arguments: list[str]) -> None:
    """Refuses what the command does not have, with click's own exceptions."""
    name, *rest = arguments
    main.commands[name].make_context(name, rest)


def run(arguments: list[str]) -> None:
    name, *rest = arguments
    if name == "--help":
        assert CliRunner().invoke(main, arguments).exit_code == 0
        return
    parse(arguments)
    if name == "compile" and compiler.why_unavailable() is not None:
        pytest.skip(f"no compiler: {compiler.why_unavailable()}")
    if "--plot" in rest:
        pytest.importorskip("matplotlib")
    if "--input" in rest:
        case = build_case(CaseSpec((70, 0, 5), 2))
        write_arrays(Path(CASE_FILE), {tensor: getattr(case, tensor) for tensor in TENSORS})
    else:
        rest += SMALL_ARGUMENTS.get(name, [])
    if "--compare" in rest:
        run_bench(expand_grid(batches=[1], lengths=[64], heads=[8]), backend="numpy").write_json(Path(EARLIER_RUN))
    values = SMALL_VALUES.get(name, {})
    rest = [values.get(before, word) for before, word in zip(["", *rest], rest, strict=False)]
    result = CliRunner().invoke(main, [name, *rest])
    assert result.exit_code == 0, result.output
    for option in ("--save", "--json", "--csv", "--plot"):
        if option in rest:
            assert Path(rest[rest.index(option) + 1]).exists()


# --- what it lists


def extras() -> list[str]:
    section = PROJECT.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return re.findall(r"^(\w+) = \[", section, re.MULTILINE)


def section(title: str) -> str:
    return re.split(r"^#+ ", TEXT.partition(f"# {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def test_every_extra_is_listed() -> None:
    rows = re.findall(r"^\| (`[^|]+) \|", section("Extras"), re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(extras())


def test_every_environment_variable_is_listed() -> None:
    source = Path(settings.__file__).read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(CUPY_MLA_\w+)`", section("Environment variables"), re.MULTILINE)
    assert set(listed) == set(re.findall(r"CUPY_MLA_\w+", source))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page: Path) -> None:
    for name in re.findall(r"`((?:cupy_mla|kernels_cu|scripts|tests)/[\w./-]*)`", TEXTS[page]):
        assert (ROOT / name).exists(), name


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^\s)]+)\)", TEXTS[page]) if not link.startswith("https://")]
    assert links or page.name == "CHANGELOG.md"
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link
