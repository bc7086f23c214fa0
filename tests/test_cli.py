"""The command line: what each command prints, its exit code, and one line for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result

from cupy_mla.cli import main
from cupy_mla.errors import MissingDependencyError
from cupy_mla.gpu import device
from cupy_mla.gpu.jit import compiler
from cupy_mla.gpu.jit.source import KernelSource
from cupy_mla.kernels.catalogue import NamedKernel
from cupy_mla.lab import accuracy, compile_job
from cupy_mla.lab import selftest as check
from cupy_mla.lab.array_files import read_arrays, write_arrays
from cupy_mla.lab.build import build_case
from cupy_mla.lab.cases import TENSORS
from cupy_mla.lab.compile_job import compile_all, select_kernels
from cupy_mla.lab.spec import CaseSpec

needs_compiler = pytest.mark.skipif(
    compiler.why_unavailable() is not None, reason=f"no compiler: {compiler.why_unavailable()}"
)
# DeepSeek-V3 on 128 ranks: one head, so that the CPU is quick.
QUICK = ["--batch", "3", "--tp", "128", "--backend", "numpy"]
TERMINAL_COLUMNS = 80


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def words_of(text: str) -> str:
    """Without the borders and line breaks of a table."""
    return " ".join(text.replace("│", " ").split())


def assert_mistake(result: Result, *words: str) -> None:
    assert result.exit_code == 2
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("Error: ")
    for word in words:
        assert word in message
    assert "Traceback" not in result.output


def test_help_names_every_command() -> None:
    output = run("--help").output
    assert "..." not in output.partition("Commands:")[2]  # what each does is not cut
    assert set(main.commands) == {"decode", "info", "check", "compile", "cache", "plan", "bench", "memory"}
    for command in main.commands:
        assert f"\n  {command} " in output
        shown = run(command, "--help")
        assert shown.exit_code == 0
        assert all(len(line) <= TERMINAL_COLUMNS for line in shown.output.splitlines())


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "cupy_mla", "plan", "64", "--bogus"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("Usage: python -m cupy_mla plan ")
    done = subprocess.run(command[:-1], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 request, 64 tokens each, 64 in all")


# --- decode ---


def test_decode_runs_the_shipped_lengths() -> None:
    result = run("decode", *QUICK)
    assert result.exit_code == 0
    output = words_of(result.output)
    for words in ("deepseek-v3, 1 heads (TP 128)", "3 requests", "3 of 3 requests", "TFLOPS", "GB/s", "passed"):
        assert words in output


def test_decode_says_that_a_cpu_gets_a_smaller_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "why_unsupported", lambda: "there is no GPU")
    result = run("decode", "--tp", "128")
    assert result.exit_code == 0
    assert "NumPy backend: there is no GPU" in result.output
    assert "16 requests on a CPU instead of 128" in result.output


def test_decode_prints_json_and_nothing_else(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("context_tokens,generated_tokens\n70,0\n5,0\n9,0\n")
    result = run("decode", *QUICK, "--lengths", str(lengths), "--seqlen-q", "2", "--causal", "--json", "--sample", "2")
    facts = json.loads(result.stdout)
    assert facts["backend"] == "numpy"
    assert facts["passed"] is True
    assert (facts["requests"], facts["kv_tokens"]) == (3, 84)
    assert len(facts["requests_checked"]) == 2
    assert facts["relative_error"] < facts["relative_error_bound"]
    assert facts["lse_error"] < facts["lse_error_bound"]
    assert facts["time_us"] > 0
    assert facts["tflops"] > 0
    assert facts["gigabytes_per_second"] > 0


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_decode_takes_a_case_and_saves_the_result(tmp_path: Path, suffix: str) -> None:
    case = build_case(CaseSpec((40, 0, 7), 4, seqlens_q=(2, 1, 1), causal=True, seed=5))
    source, target = tmp_path / f"case{suffix}", tmp_path / f"result{suffix}"
    arrays = {name: getattr(case, name) for name in (*TENSORS, "cu_seqlens_q")}
    write_arrays(source, {**arrays, "causal": np.array(True), "softmax_scale": np.array(0.1)})
    result = run("decode", "--input", str(source), "--save", str(target), "--backend", "numpy")
    assert result.exit_code == 0
    found = read_arrays(target)
    assert found["out"].shape == (4, 4, 512)
    assert found["out"].dtype == np.dtype(ml_dtypes.bfloat16)
    assert found["lse"].shape == (4, 4)
    assert np.isneginf(found["lse"][:, 2]).all()
    expected = accuracy.decode_float64(replace(case.request(0), softmax_scale=0.1))
    np.testing.assert_allclose(found["lse"][:, :2], expected[1][0], rtol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [["plan", str(2**31)], ["plan", "1" * 20], ["bench", "--batch", "1" * 20], ["bench", "--heads", str(2**31)]],
)
def test_numbers_that_are_no_int32_are_refused(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert f"{arguments[-1]} is not in the range" in result.output


def test_decode_exits_with_1_above_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(accuracy.OUT_BOUNDS, "bfloat16", 1e-9)
    result = run("decode", *QUICK)
    assert result.exit_code == 1
    assert "FAILED" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tp", "3"], ["--tp: ", "divisor of the 128 heads"]),
        (["--batch", "5000"], ["--batch: ", "1 to 1024"]),
        (["--batch", "0"], ["--batch"]),
        (["--preset", "gpt-2"], ["--preset"]),
        (["--lengths", "nowhere.csv"], ["--lengths: ", "nowhere.csv"]),
        (["--input", "nowhere.npz"], ["--input: ", "nowhere.npz"]),
        (["--input", "case.pt"], ["--input: ", ".npz or .safetensors"]),
        (["--input", "case.npz", "--batch", "4"], ["--batch", "--input"]),
        (["--input", "case.npz", "--page-size", "64"], ["--page-size", "--input"]),
        (["--save", "result.txt"], ["--save: ", ".npz or .safetensors"]),
        (["--save", "."], ["--save", "is a directory"]),
    ],
)
def test_decode_names_the_wrong_argument(arguments: list[str], words: list[str]) -> None:
    assert_mistake(run("decode", *arguments), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": np.zeros((1, 1, 4, 64), np.float32)}, ["q:"]),
        ({"block_table": np.array([[7]], np.int32)}, ["block_table[0, 0]", "7"]),
        ({"cache_seqlens": np.array([65], np.int32)}, ["cache_seqlens[0]", "65"]),
        ({"head_dim_v": np.int64(2000)}, ["head_dim_v"]),
        ({"head_dim_v": np.float64(512.7)}, ["head_dim_v", "512.7"]),
        ({"head_dim_v": np.float64(np.inf)}, ["head_dim_v", "inf"]),
        ({"softmax_scale": np.complex128(1j)}, ["softmax_scale", "1j"]),
    ],
)
def test_decode_checks_the_case(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    case = build_case(CaseSpec((30,), 4))
    path = tmp_path / "case.npz"
    write_arrays(path, {**{name: getattr(case, name) for name in TENSORS}, **changes})
    assert_mistake(run("decode", "--input", str(path), "--backend", "numpy"), *words)


def test_decode_does_not_run_for_a_result_that_has_no_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run_case(*_: Any, **__: Any) -> None:
        raise AssertionError("ran although the result cannot be kept")

    monkeypatch.setattr("cupy_mla.lab.decode_job.run_case", run_case)
    target = tmp_path / "no" / "folder.npz"
    assert_mistake(run("decode", *QUICK, "--save", str(target)), "save", "folder that exists", str(target))


def test_lengths_beyond_int64_are_one_line(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.csv"
    lengths.write_text(f"context_tokens\n{2**63}\n")
    assert_mistake(run("plan", "--lengths", str(lengths), "--batch", "1"), "lengths", "line 2")


def test_decode_on_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_why_no_cuda", lambda: "there is no GPU")
    result = run("decode", "--backend", "cuda")
    assert result.exit_code == 3
    assert "there is no GPU" in result.stderr
    assert "NumPy backend" in result.stderr


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate 9 TB")

    monkeypatch.setattr("cupy_mla.commands.decode.build_case", out_of_memory)
    result = run("decode", *QUICK)
    assert result.exit_code == 3
    assert result.stderr.strip().endswith("Unable to allocate 9 TB")


def test_a_report_is_printed_although_the_result_cannot_be_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    target = tmp_path / "result.npz"
    target.write_bytes(b"earlier")
    monkeypatch.setattr("os.replace", no_room)
    for arguments in ([], ["--json"]):
        result = run("decode", *QUICK, "--save", str(target), *arguments)
        assert "relative" in result.stdout
        assert_mistake(result, "--save: expected a file that can be written", "No space left on device")
        assert target.read_bytes() == b"earlier"


def test_a_result_does_not_overwrite_its_case(tmp_path: Path) -> None:
    case = build_case(CaseSpec((30,), 4))
    path = tmp_path / "case.npz"
    write_arrays(path, {name: getattr(case, name) for name in TENSORS})
    before = path.read_bytes()
    (tmp_path / "other.npz").symlink_to(path)
    for name in ("case.npz", "other.npz"):
        result = run("decode", "--input", str(path), "--save", str(tmp_path / name), "--backend", "numpy")
        assert_mistake(result, "--save: expected another file than --input")
    assert path.read_bytes() == before


def test_decode_takes_pairs(tmp_path: Path) -> None:
    case = build_case(CaseSpec((30, 0), 4, storage="split"))
    arrays = {name: getattr(case, name) for name in TENSORS[2:]}
    for name, rope in (("q", "q_rope"), ("kv_cache", "kv_rope")):
        arrays[name], arrays[rope] = getattr(case, name)
    path = tmp_path / "case.npz"
    write_arrays(path, arrays)
    result = run("decode", "--input", str(path), "--backend", "numpy")
    assert result.exit_code == 0, result.output
    shapes = "q [2, 1, 4, 512] + [2, 1, 4, 64], bfloat16 cache [1, 64, 1, 512] + [1, 64, 1, 64], bfloat16"
    assert shapes in words_of(result.output)


def test_decode_says_how_to_read_bfloat16(tmp_path: Path) -> None:
    target = tmp_path / "result.npz"
    result = run("decode", *QUICK, "--save", str(target))
    assert f"{target} holds out as raw bits: read it with .view(ml_dtypes.bfloat16)" in result.stderr
    assert ".view(ml_dtypes.bfloat16)" in words_of(run("decode", "--help").output)
    with np.load(target) as archive:
        out = archive["out"].view(ml_dtypes.bfloat16)
    assert np.isfinite(out.astype(np.float32)).all()
    assert abs(out.astype(np.float32)).max() > 0
    assert "raw bits" not in run("decode", *QUICK, "--save", str(target), "--dtype", "float16").stderr


def test_a_small_file_of_lengths_is_drawn_whole(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("context_tokens, generated_tokens\n70, 0\n5, 0\n")
    result = run("decode", "--tp", "128", "--backend", "numpy", "--lengths", str(lengths))
    assert result.exit_code == 0, result.output
    assert "2 requests, 5 to 70 tokens each" in words_of(result.stdout)
    assert f"2 requests: {lengths} has no more" in result.stderr
    assert "2 requests" in run("plan", "--lengths", str(lengths)).output
    assert_mistake(run("plan", "--lengths", str(lengths), "--batch", "3"), "--batch: expected 1 to 2", "got 3")


def test_a_case_that_is_no_number_is_json(tmp_path: Path) -> None:
    case = build_case(CaseSpec((30,), 4))
    case.q[...] = np.nan
    path = tmp_path / "case.npz"
    write_arrays(path, {name: getattr(case, name) for name in TENSORS})
    result = run("decode", "--input", str(path), "--backend", "numpy", "--json")
    assert result.exit_code == 1

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    facts = json.loads(result.stdout, parse_constant=refuse)
    assert facts["relative_error"] is None
    assert facts["passed"] is False


def test_an_error_names_a_value_of_a_file_as_it_is_there(tmp_path: Path) -> None:
    case = build_case(CaseSpec((30,), 4))
    path = tmp_path / "case.npz"
    write_arrays(path, {**{name: getattr(case, name) for name in TENSORS}, "causal": np.int64(2)})
    result = run("decode", "--input", str(path), "--backend", "numpy")
    assert result.stderr.startswith("Error: causal: expected")


# --- what the output can take ---


def run_process(*arguments: str | bytes, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "cupy_mla", *arguments], stderr=subprocess.PIPE, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["plan", "100"], ["memory"], ["--help"]])
def test_an_output_that_takes_nothing_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        result = run_process(*arguments, stdout=full)
    assert result.returncode == 3
    assert result.stderr.decode().splitlines() == ["Error: [Errno 28] No space left on device"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_result_is_kept_although_the_report_cannot_be_printed(tmp_path: Path) -> None:
    target = tmp_path / "result.npz"
    with open("/dev/full", "wb") as full:
        result = run_process("decode", *QUICK, "--save", str(target), stdout=full)
    assert result.returncode == 3
    assert b"Traceback" not in result.stderr
    assert set(read_arrays(target)) == {"out", "lse"}


@pytest.mark.parametrize("name", ["ü.npz".encode(), b"\xff.npz"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_the_output_cannot_show_are_escaped(name: bytes, encoding: str, tmp_path: Path) -> None:
    case = build_case(CaseSpec((30,), 1))
    write_arrays(tmp_path / "case.npz", {tensor: getattr(case, tensor) for tensor in TENSORS})
    (tmp_path / "case.npz").rename(tmp_path / os.fsdecode(name))
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    command = ["decode", "--input", name, "--backend", "numpy"]
    for arguments in (command, [*command, "--json"]):
        result = run_process(*arguments, stdout=subprocess.PIPE, env=environment, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert b"passed" in result.stdout
    missing = run_process("decode", "--input", b"no-" + name, stdout=subprocess.PIPE, env=environment, cwd=tmp_path)
    assert missing.returncode == 2
    assert b"Traceback" not in missing.stderr
    assert b"--input" in missing.stderr


@pytest.mark.parametrize("arguments", [["decode", *QUICK[:-2]], ["bench", "--batch", "1", "--length", "64"], ["check"]])
def test_notes_do_not_get_into_the_output(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(device, "why_unsupported", lambda: "there is no GPU")
    monkeypatch.setattr(check.run_checks, "__defaults__", (check.CHECK_CASES[:1],))
    result = run(*arguments)
    assert "NumPy backend: there is no GPU" in result.stderr
    assert "there is no GPU" not in result.stdout
    assert result.stdout


# --- info and check ---


def test_info_says_what_is_here() -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert {"GPU", "GPU 0"} & facts.keys()
    for name in ("driver", "CuPy", "compiler", "kernel cache", "CUDA arrays", "CPU arrays", "numpy"):
        assert facts[name]
    table = words_of(run("info").output)
    assert "kernel cache" in table
    assert facts["numpy"] in table


def test_info_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "why_unsupported", lambda: "GPU 0 is a toaster")
    assert json.loads(run("info", "--json").stdout)["CUDA arrays"] == "not supported: GPU 0 is a toaster"


def test_info_looks_at_places_that_cannot_be_looked_at(
    tmp_path: Path, set_environment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(CUPY_MLA_CACHE_DIR=str(tmp_path / ("a" * 300)))
    assert "cannot be read (File name too long)" in json.loads(run("info", "--json").stdout)["kernel cache"]

    def forbidden(cache_dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cupy_mla.gpu.jit.cache.count_entries", forbidden)
    assert "cannot be read (Permission denied)" in json.loads(run("info", "--json").stdout)["kernel cache"]


def test_check_runs_on_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = check.CHECK_CASES[:3] + check.CHECK_CASES[-1:]
    monkeypatch.setattr(check, "CHECK_CASES", cases)
    monkeypatch.setattr(check.run_checks, "__defaults__", (cases,))
    result = run("check", "--backend", "numpy")
    assert result.exit_code == 0
    assert "4 of 4 cases passed" in result.output
    result = run("check", "--backend", "numpy", "--json")
    facts = json.loads(result.stdout)
    assert facts["passed"] == len(facts["cases"]) == 4
    assert all(case["passed"] and case["out_error"] <= case["out_bound"] for case in facts["cases"])
    assert "4 cases on CPU" in result.stderr


def test_check_exits_with_1_when_a_case_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = check.CHECK_CASES[:1]
    monkeypatch.setattr(check, "CHECK_CASES", cases)
    monkeypatch.setattr(check.run_checks, "__defaults__", (cases,))
    monkeypatch.setitem(accuracy.OUT_BOUNDS, "bfloat16", 1e-9)
    result = run("check", "--backend", "numpy")
    assert result.exit_code == 1
    assert "FAILED" in result.output
    assert "0 of 1 cases passed" in result.output


# --- compile ---


def test_compile_lists_names() -> None:
    names = run("compile", "--list").output.split()
    assert len(names) == len(set(names)) == len(select_kernels(()))
    assert {"plan", "append", "combine_bfloat16"} <= set(names)
    assert run("compile", "--list", "wide64*_page64").output.split() == [
        name for name in names if name.startswith("wide64") and name.endswith("_page64")
    ]


def test_compile_names_a_pattern_without_a_kernel() -> None:
    assert_mistake(run("compile", "wide65*"), "pattern", "wide65*")


@needs_compiler
def test_compile_reports_and_uses_the_cache(tmp_path: Path, set_environment: Any) -> None:
    set_environment(CUPY_MLA_CACHE_DIR=str(tmp_path))
    first = run("compile", "append", "combine_*", "--jobs", "2")
    assert first.exit_code == 0
    assert "21 kernels, 21 compiled now, 0 with problems" in first.output
    assert "combine_float16_float" in first.output
    assert "combine_bfloat16_scaled256x2" in first.output
    assert "combine_bfloat16_marked256x2" in first.output
    assert "21 kernels, 0 compiled now" in run("compile", "append", "combine_*").output
    assert "1 kernel, 1 compiled now" in run("compile", "append", "--fresh").output
    facts = json.loads(run("compile", "append", "plan", "--json").stdout)
    assert [fact["kernel"] for fact in facts] == ["plan", "append"]
    assert facts[1]["registers"] > 0
    assert facts[1]["problems"] == []


BAD_KERNELS = {
    "local memory": 'extern "C" __global__ void bad(int* p, int n) { int a[512]; '
    "for (int i = 0; i < n; ++i) a[p[i]] = i; p[0] = a[n]; }",
    "nonsense": 'extern "C" __global__ void bad() { nonsense; }',
}


@needs_compiler
@pytest.mark.parametrize("kind", BAD_KERNELS)
def test_compile_exits_with_1_on_a_bad_kernel(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_environment: Any
) -> None:
    set_environment(CUPY_MLA_CACHE_DIR=str(tmp_path / "cache"))
    (tmp_path / "bad.cu").write_text(BAD_KERNELS[kind])
    monkeypatch.setattr("cupy_mla.gpu.jit.source.kernels_root", lambda: tmp_path)
    monkeypatch.setattr("cupy_mla.gpu.jit.compiler.kernels_root", lambda: tmp_path)
    monkeypatch.setattr(compile_job, "all_kernels", lambda: [NamedKernel("bad", KernelSource("bad.cu", "bad"))])
    result = run("compile")
    assert result.exit_code == 1
    assert "1 with problems" in result.output
    assert ("stack frame" if kind == "local memory" else "nonsense") in result.output


def test_compile_without_a_compiler_fails_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise MissingDependencyError("nvidia-cuda-nvrtc-cu12", "cuda12", "compiling kernels")

    monkeypatch.setattr(compiler, "compiler_version", missing)
    with pytest.raises(MissingDependencyError):
        list(compile_all(select_kernels(()), jobs=2))
    result = run("compile")
    assert result.exit_code == 3
    assert result.stderr.strip().splitlines()[-1].startswith("Error: compiling kernels needs nvidia-cuda-nvrtc")


# --- plan ---


def test_plan_draws_given_lengths() -> None:
    result = run("plan", "4096", "64", "--tp", "8", "--sms", "16", "--width", "80")
    assert result.exit_code == 0
    assert "2 requests, 64 to 4,096 tokens each, 4,160 in all; 16 heads, 16 SMs" in result.output
    assert "request 0" in result.output
    assert "[1" in result.output


def test_plan_draws_real_lengths_and_fixed_splits() -> None:
    assert "128 requests" in run("plan").output
    result = run("plan", "--batch", "4", "--fixed-split-tokens", "512", "--seqlen-q", "2", "--causal")
    assert result.exit_code == 0
    assert "4 requests" in result.output


def test_plan_prints_json() -> None:
    result = run("plan", "4096", "64", "--tp", "8", "--sms", "16", "--json")
    facts = json.loads(result.stdout)
    assert (facts["kv_lengths"], facts["num_sms"], facts["num_heads_q"]) == ([4096, 64], 16, 16)
    pieces = [piece for part in facts["parts"] for piece in part]
    assert len(facts["parts"]) == facts["num_parts"]
    assert sum(end - begin for _, _, _, begin, end, _ in pieces) == 64 + 1
    assert facts["merges"] == [[0, 0, 0, sum(not whole for *_, whole in pieces)]]


def test_plan_keeps_to_the_width() -> None:
    for width in (40, 80):
        lines = run("plan", "4096", "1", "--width", str(width)).output.splitlines()
        assert max(map(len, lines)) <= max(width, 60)
    assert "1 job in 1 piece, none of them cut" in run("plan", "1", "--tp", "8").output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fixed-split-tokens", "100"], ["--fixed-split-tokens: ", "multiple of 64"]),
        (["100", "--batch", "3"], ["KV_LENGTH", "--batch"]),
        (["--sms", "0"], ["--sms"]),
        (["ten"], ["ten"]),
        (["--lengths", "nowhere.csv"], ["--lengths: "]),
    ],
)
def test_plan_names_the_wrong_argument(arguments: list[str], words: list[str]) -> None:
    assert_mistake(run("plan", *arguments), *words)
