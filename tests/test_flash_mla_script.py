"""scripts/flash_mla_test.py without a GPU, on a stand-in for FlashMLA's test: what it runs, says and keeps."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import queue
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from click.testing import CliRunner

import cupy_mla.flash_mla

torch = pytest.importorskip("torch")
SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(SCRIPTS)
    script = importlib.import_module("flash_mla_test")

# What the script needs of the test: the same names, five cases of what can become of one.
STAND_IN = """
from types import SimpleNamespace

import rich.console
import torch
import triton

import flash_mla


@triton.jit
def marker():
    pass


SEEN = "flash_fwd_splitkv_mla_fp8_sparse_kernel", "flash_fwd_mla_combine_kernel"


class Raw:
    def __init__(self, what, batch, num_runs=0):
        self.what, self.batch, self.num_runs = what, batch, num_runs

    def to_test_param(self):
        of = SimpleNamespace(b=self.batch, extra_topk=None, extra_s_k=None, block_size=64, extra_block_size=None)
        return SimpleNamespace(what=self.what, decode=of, num_runs=self.num_runs, seed=-1, s_q=1, s_kv=2046, topk=2048,
                               h_q=64, d_qk=576, d_v=512)


def gen_testcase():
    others = [Raw("wrong", 74), Raw("raises", 74), Raw("large", 4)]
    return [Raw("right", 4), Raw("right", 321), *others, Raw("right", 74, 10)]


def test_flash_mla(case):
    print("seed", case.seed)
    if case.what == "raises":
        raise ValueError("not this one")
    if case.what == "large":
        raise torch.OutOfMemoryError("no room")
    return SimpleNamespace(is_correct=case.what == "right")
"""


class InPlace:
    """In place of a process: does its work as it is started."""

    def __init__(self, *, target: Any, args: tuple[Any, ...], daemon: bool) -> None:
        self.start = lambda: target(*args)


@pytest.fixture
def tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / script.TEST).write_text(STAND_IN)
    real = multiprocessing.get_context("spawn")
    context = SimpleNamespace(
        Process=InPlace, Queue=queue.Queue, Value=real.Value, Array=real.Array, Condition=real.Condition
    )
    monkeypatch.setattr(script.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(script, "why_unsupported", lambda: None)
    monkeypatch.setattr(script, "prepare_torch", lambda: 100.0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with mock.patch.dict(sys.modules):
        yield tmp_path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(script.main, [str(each) for each in arguments])


def test_every_case_is_run_once_with_its_own_seed_and_what_did_not_pass_is_said(tests: Path) -> None:
    results = tests / "results.jsonl"
    result = run(tests, "--jobs", 3, "--results", results)
    assert result.exit_code == 1
    outcomes = {line["case"]: line for line in map(json.loads, results.read_text().splitlines())}
    assert [outcomes[case]["state"] for case in range(6)] == [
        *("passed", "passed", "failed", "failed", "no memory", "passed"),
    ]
    assert "case 2 failed: seed 2\n" in result.output
    assert "case 3 failed: seed 3\nTraceback" in result.output
    assert "ValueError: not this one" in result.output
    assert "case 4 no memory: no room" in result.output
    assert "3 of 6 cases passed, 2 failed, 1 had no memory" in result.output
    assert "3 of all 6 have passed" in result.output


def test_what_has_passed_is_not_run_again(tests: Path) -> None:
    results = tests / "results.jsonl"
    run(tests, "--results", results)
    (tests / script.TEST).write_text(STAND_IN.replace('case.what == "right"', "True").replace("raise ", "0 and "))
    result = run(tests, "--results", results)
    assert result.exit_code == 0, result.output
    assert "3 of 3 cases passed, 0 failed" in result.output
    assert "6 of all 6 have passed" in result.output
    assert len(results.read_text().splitlines()) == 9


def test_no_case_is_begun_after_the_time_given(tests: Path) -> None:
    assert "0 of 0 cases passed" in run(tests, "--seconds", 0).output


def test_the_test_gets_our_functions_our_names_of_kernels_and_an_empty_kernel(tests: Path) -> None:
    before = sys.modules.get("triton")
    module = script.load_test(tests)
    assert module.flash_mla is cupy_mla.flash_mla
    assert module.SEEN == ("mla_gathered_fp8", "mla_combine")
    assert isinstance(module.marker, script.EmptyKernel)
    assert sys.modules.get("triton") is before


def test_the_names_of_kernels_are_those_of_our_kernels() -> None:
    from cupy_mla.kernels.choose import GATHERED_FAMILIES
    from cupy_mla.kernels.combine import gathered_combine_source

    of_fp8 = [family for family in GATHERED_FAMILIES if family.name.startswith("gathered_fp8")]
    configs = [family.standard_configs()[0] for family in of_fp8]
    assert configs
    for config in configs:
        assert script.KERNELS["flash_fwd_splitkv_mla_fp8_sparse_kernel"] in config.source().function
        assert script.KERNELS["flash_fwd_mla_combine_kernel"] in gathered_combine_source(config).function


def test_classes_have_every_case_that_is_left_and_room_for_their_largest(tests: Path) -> None:
    cases = [case.to_test_param() for case in script.load_test(tests).gen_testcase()]
    classes = script.classes_of(cases, {0})
    assert sorted(case for each in classes for case in each.cases) == [1, 2, 3, 4, 5]
    for each in classes:
        assert each.gib > max(script.estimated_gib(cases[case]) for case in each.cases)
    assert [each.gib for each in classes] == sorted((each.gib for each in classes), reverse=True)


def test_a_class_waits_for_room(tests: Path) -> None:
    large, small = script.Class(0, 50.0, [5, 6]), script.Class(1, 1.0, [7])
    room = script.Room(multiprocessing.get_context("spawn"))
    assert room.take([large, small], most=40.0) is large, "larger than the GPU, but alone on it"
    assert room.next_case(large) == 5
    taken = []
    waiting = threading.Thread(target=lambda: taken.append(room.take([small], most=40.0)), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert not taken
    room.give_back(large)
    waiting.join(60)
    assert taken == [small]
    assert [room.next_case(small), room.next_case(small), room.next_case(large)] == [7, None, 6]
    assert room.take([large, small], most=40.0) is None, "all have been begun"


def test_a_folder_without_the_test_is_refused(tmp_path: Path) -> None:
    result = run(tmp_path / "elsewhere")
    assert result.exit_code == 3
    assert f"has no {script.TEST}: git clone" in result.output


def test_without_a_hopper_gpu_nothing_is_run(tests: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "why_unsupported", lambda: "there is none")
    result = run(tests)
    assert result.exit_code == 3
    assert "needs a Hopper GPU: there is none" in result.output
