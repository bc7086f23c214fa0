"""Commands over caches that are sharded along the sequence, without a GPU, and the model of their time."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cupy_mla import InvalidArgumentError, merge_states
from cupy_mla.bench.context_parallel import TITLES, shard_rows, size_of
from cupy_mla.bench.grid import BenchCase
from cupy_mla.cli import main
from cupy_mla.commands import context_parallel
from cupy_mla.lab import sharded_check
from cupy_mla.lab.libraries import NUMPY
from cupy_mla.lab.sharded_check import sharded_cases
from cupy_mla.parallel import local_slots
from cupy_mla.parallel.model import CallSize, model_times

# docs/parallel.md: requests, tokens, query tokens; us measured on an H200 of 1, 2, 4 and 8 ranks' decodes and merges.
MEASURED = [
    (1, 131072, 1, (64.2, 40.0, 26.8, 19.9), (3.5, 3.6, 3.5)),
    (1, 1048576, 1, (419.9, 232.1, 122.9, 68.2), (4.0, 3.9, 3.7)),
    (16, 32768, 1, (216.5, 123.3, 68.5, 40.0), (3.7, 3.7, 4.1)),
    (128, 8192, 1, (428.1, 237.2, 126.1, 71.7), (17.7, 10.3, 8.2)),
    (128, 8192, 2, (838.8, 447.8, 228.5, 131.7), (38.8, 19.0, 14.6)),
]
WORLDS = (1, 2, 4, 8)
FEW = slice(6, 8)  # of the cases of the self-test: causal ones


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in two processes."""
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cupy_mla"]
    environment = {**os.environ, "CUPY_MLA_BACKEND": "numpy", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_check, "_CASES", sharded_check._CASES[FEW])


# --- check


@pytest.mark.usefixtures("few")
def test_check_runs_shards_one_after_the_other() -> None:
    result = run("check", "--backend", "numpy", "--context-parallel", "2,3")
    assert result.exit_code == 0
    assert result.output.count("2 of 2 cases passed") == 2
    assert "48 heads" not in result.output
    assert "18 heads" in result.output  # 16 are not for 3 ranks


@pytest.mark.parametrize("exchange", [(), ("--exchange", "ag_rs")], ids=str)
def test_check_runs_in_the_processes_of_torchrun(exchange: tuple[str, ...]) -> None:
    done = torchrun("check", "--context-parallel", *exchange)
    assert done.returncode == 0, done.stderr
    count = len(sharded_cases(2))
    assert done.stdout.count(f"{count} of {count} cases passed") == 1  # one process prints
    assert done.stdout.startswith(f"{count} cases on 2 processes, on CPU")


def test_a_merge_that_forgets_a_rank_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    [case, *_] = sharded_cases(2)
    assert sharded_check._check_shards(case, 2, "numpy").passed
    monkeypatch.setattr(sharded_check, "merge_states", lambda outs, lses: merge_states(outs[1:], lses[1:]))
    assert not sharded_check._check_shards(case, 2, "numpy").passed


def test_a_rank_that_forgets_a_token_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in sharded_cases(2) if case.topk is not None)
    assert sharded_check._check_shards(case, 2, "numpy").passed

    def forget(*arrays: Any, **options: Any) -> Any:
        indices, counts = local_slots(*arrays, **options)
        return indices, np.maximum(counts - 1, 0)

    monkeypatch.setattr(sharded_check, "local_slots", forget)
    assert not sharded_check._check_shards(case, 2, "numpy").passed


def test_a_shard_that_is_refused_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arrays: Any, **options: Any) -> None:
        raise InvalidArgumentError("q", "another", "this")

    monkeypatch.setattr(sharded_check, "mla_decode", refuse)
    result = sharded_check._check_shards(sharded_cases(2)[0], 2, "numpy")
    assert (result.passed, result.problem) == (False, "q: expected another, got this")


# --- bench


def test_bench_shows_the_model_without_a_gpu() -> None:
    sizes = ("--batch", "1,128", "--length", "8192", "--heads", "128")
    result = run("bench", "--backend", "numpy", "--context-parallel", "2,8", *sizes)
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines() if "_k8192_" in line]
    assert [line[:2] for line in lines] == [
        [f"b{batch}_k8192_h128_q1", world] for batch in ("1", "128") for world in ("2", "8")
    ]
    for line in lines:
        assert len(line) == len(TITLES)
        assert all(word.startswith("~") for word in line[2:])
        whole, *parts, total, faster = (float(word[1:].replace(",", "")) for word in line[2:])
        assert sum(parts) == pytest.approx(total, abs=0.3)
        assert whole / total == pytest.approx(faster, abs=0.01)
    assert "by the model" in result.output


def test_bench_without_a_number_of_ranks() -> None:
    result = run("bench", "--backend", "numpy", "--context-parallel", "--batch", "1", "--length", "640", "--heads", "8")
    lines = [line.split() for line in result.output.splitlines() if "_k640_" in line]
    assert [int(line[1]) for line in lines] == list(context_parallel.DEFAULT_WORLDS)


def test_bench_times_the_processes_of_torchrun() -> None:
    sizes = ("--batch", "2", "--length", "320", "--heads", "4", "--seqlen-q", "1,2", "--causal")
    done = torchrun("bench", "--context-parallel", "2", *sizes)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if "_k320_" in line]
    assert len(lines) == 2
    for line in lines:
        assert "~" not in "".join(line)
        _, world, whole, total, faster = line
        assert world == "2"
        assert float(whole.replace(",", "")) / float(total.replace(",", "")) == pytest.approx(float(faster), abs=0.02)


def test_bench_times_what_one_machine_shows() -> None:
    [two, four] = shard_rows(BenchCase(2, 640, 8, seqlen_q=2, causal=True), (2, 4), NUMPY)
    assert (two.world, four.world) == (2, 4)
    assert two.measured == {"whole", "decode", "merge"}
    assert two.whole == four.whole
    assert two.times is not None
    assert two.total == two.times.total
    texts = dict(zip(TITLES, two.texts(), strict=True))
    assert [title for title in TITLES[2:] if "~" not in texts[title]] == ["one GPU us", "decode", "merge"]


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "--context-parallel", "2", "--random", "3"], "--random: expected nothing beside --context-parallel"),
        (["check", "--context-parallel", "2", "--seed", "3"], "--seed: expected nothing beside --context-parallel"),
        (["check", "--context-parallel", "2,4", "--json"], "--json: expected one number of ranks, got 2,4"),
        (["check", "--context-parallel", "2", "--exchange", "direct"], "in the processes of torchrun, got direct"),
        (["check", "--exchange", "a2a"], "--context-parallel in the processes of torchrun, got a2a"),
        (["bench", "--context-parallel", "2", "--exchange", "ag_rs"], "in the processes of torchrun, got ag_rs"),
        (["bench", "--exchange", "a2a"], "in the processes of torchrun, got a2a"),
        (["check", "--context-parallel", "256"], "256 is not in the range 1<=x<=255"),
        (["check", "--context-parallel", "two"], "'two' is not a valid integer"),
        (["bench", "--context-parallel", "2", "--peer", "torch"], "--peer: expected nothing beside --context-parallel"),
        (["bench", "--context-parallel", "2", "--json", "x.json"], "--json: expected nothing beside"),
        (["bench", "--context-parallel", "3"], "share out 16 heads equally, got 3"),
        (["bench", "--context-parallel", "2", "--topk", "64"], "dense decoding of requests that are alike"),
        (["bench", "--context-parallel", "2", "--batch", "2", "--trace", "1"], "requests that are alike"),
    ],
)
def test_refusals(arguments: list[str], words: str) -> None:
    result = run(*arguments, "--backend", "numpy")
    assert result.exit_code == 2
    assert words in result.output


def test_ranks_that_torchrun_did_not_start() -> None:
    assert context_parallel.require_world((), 2) == context_parallel.require_world((2,), 2) == 2
    with pytest.raises(InvalidArgumentError, match="expected 2, as torchrun started, got 4"):
        context_parallel.require_world((4,), 2)


def test_heads_that_ranks_cannot_share() -> None:
    with pytest.raises(InvalidArgumentError, match="share out 8 heads equally, got 3"):
        next(iter(shard_rows(BenchCase(1, 64, 8), (3,), NUMPY)))


# --- the model


@pytest.mark.parametrize(("batch", "tokens", "seqlen_q", "decodes", "merges"), MEASURED)
def test_the_model_is_near_what_was_measured(
    batch: int, tokens: int, seqlen_q: int, decodes: tuple[float, ...], merges: tuple[float, ...]
) -> None:
    size = CallSize(batch, tokens, 128, seqlen_q=seqlen_q, causal=seqlen_q > 1)
    times = [model_times(size, world, 64) for world in WORLDS]
    np.testing.assert_allclose([one.decode for one in times], decodes, rtol=0.12)
    np.testing.assert_allclose([one.merge for one in times[1:]], merges, rtol=0.35)


@pytest.mark.parametrize(("batch", "gather", "exchange"), [(1, 9.5, 11.5), (16, 26.5, 18.4), (128, 61.5, 58.2)])
def test_collectives_of_two_ranks_are_those_measured(batch: int, gather: float, exchange: float) -> None:
    times = model_times(CallSize(batch, 4096, 128), 2)
    assert times.gather == pytest.approx(gather)
    assert times.exchange == pytest.approx(exchange, rel=0.01)  # lse goes with the outputs
    assert times.copies == 0


def test_the_model_of_more_ranks_and_tokens() -> None:
    size = CallSize(128, 8192, 128, seqlen_q=2, causal=True)
    times = [model_times(size, world) for world in WORLDS]
    assert (times[0].gather, times[0].exchange, times[0].copies, times[0].merge) == (0, 0, 0, 0)
    for fewer, more in itertools.pairwise(times):
        assert more.gather > fewer.gather
        assert more.exchange > fewer.exchange
        assert more.decode < fewer.decode
    longer = model_times(CallSize(128, 65536, 128, seqlen_q=2, causal=True), 8)
    assert longer.gather == times[-1].gather
    assert longer.decode > 6 * times[-1].decode


def test_the_model_knows_layouts_and_what_memory_gives() -> None:
    assert model_times(CallSize(128, 8192, 16), 1).total == pytest.approx(272, rel=0.03)  # docs/speed.md
    half = model_times(CallSize(64, 65536, 16, layout="fp8_e4m3"), 2)
    assert half.decode < 0.7 * model_times(CallSize(64, 65536, 16), 2).decode
    with pytest.raises(InvalidArgumentError, match="layout"):
        model_times(CallSize(1, 64, 16, layout="fp5"), 2)
    assert size_of(BenchCase(1, 64, 16, layout="fp8_ds_mla")).layout == "fp8_ds_mla"
