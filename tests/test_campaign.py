"""The campaign of random problems: it finds what is wrong, and says how to see it again. NumPy backend."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cupy_mla.cli import main
from cupy_mla.lab import cache_trials, campaign, trials
from cupy_mla.lab.trial import SEEDS_PER_SETTINGS, Settings, Trial

SEEDS = range(110)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["check", "--backend", "numpy", *arguments])


def test_every_operation_is_drawn_and_right() -> None:
    results = list(campaign.run_campaign(SEEDS, "numpy", jobs=1))
    assert [result.seed for result in results] == list(SEEDS)
    assert [result.failure for result in results] == [""] * len(results)
    assert {result.operation for result in results} == {trial.__name__ for trial in trials.TRIALS}
    assert any(0 < result.share < 1 for result in results)


@pytest.mark.parametrize("number", range(8))
def test_other_settings_are_right(number: int) -> None:
    seeds = range(number * SEEDS_PER_SETTINGS, number * SEEDS_PER_SETTINGS + 12)
    assert [result.failure for result in campaign.run_campaign(seeds, "numpy", jobs=1)] == [""] * len(seeds)


def test_settings_are_shared_by_neighbours_and_differ_further_on() -> None:
    assert Settings.of(0) == Settings.of(SEEDS_PER_SETTINGS - 1)
    settings = {Settings.of(number * SEEDS_PER_SETTINGS) for number in range(20)}
    assert len({(s.latent_dim, s.rope_dim) for s in settings}) == 3
    assert {s.dtype for s in settings} == {"bfloat16", "float16"}
    assert {s.causal for s in settings} == {False, True}
    assert len({s.page_size for s in settings}) > 4


def test_processes_give_the_results_of_one() -> None:
    seeds = range(100)
    alone, many = (
        {(result.seed, result.operation, result.failure) for result in campaign.run_campaign(seeds, "numpy", jobs)}
        for jobs in (1, 2)
    )
    assert len(many) == len(seeds)
    assert alone == many


def spoiled(function: Callable[..., Any], spoil: Callable[[Any], None]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        results = function(*arguments, **options)
        spoil(results)
        return results

    return call


def spoil_first_out(results: Any) -> None:
    if results[0].size:
        results[0][...] *= 1.01


def spoil_last_lse(results: Any) -> None:
    results[-1].flat[-1:] += 1e-3


def spoil_max_logits(results: Any) -> None:
    results[1].flat[:1] += 1


def forget_slot(result: Any) -> None:
    result.flat[result.size // 2] += 1


@pytest.mark.parametrize(
    ("operation", "name", "spoil", "what"),
    [
        ("dense", "mla_decode", spoil_first_out, "out"),
        ("dense", "mla_decode", spoil_last_lse, "lse"),
        ("sparse_decode", "mla_sparse_decode", spoil_first_out, "out"),
        ("sparse_prefill", "mla_sparse_prefill", spoil_max_logits, "max_logits"),
        ("sparse_prefill", "mla_sparse_prefill", spoil_last_lse, "lse"),
        ("merges", "merge_states", spoil_first_out, "out"),
        ("merges", "merge_states", spoil_last_lse, "lse"),
        ("slots", "slots_of", forget_slot, "slots"),
    ],
)
def test_a_wrong_result_is_found(
    operation: str, name: str, spoil: Callable[[Any], None], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, name, spoiled(getattr(trials, name), spoil))
    results = [result for result in campaign.run_campaign(SEEDS, "numpy", jobs=1) if result.operation == operation]
    failed = [result for result in results if result.failure.startswith(f"{what}:")]
    assert len(failed) > len(results) / 4  # not those without anything to spoil


@pytest.mark.parametrize(
    ("operation", "name", "what"),
    [
        ("appends", "append_tokens", "cache"),
        ("page_copies", "copy_pages", "cache"),
        ("conversions", "quantise_cache", "cache"),
        ("conversions", "dequantise_cache", "values"),
    ],
)
def test_a_byte_that_is_written_where_nobody_asked_is_found(
    operation: str, name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, spoiled = getattr(cache_trials, name), 0

    def clumsy(*arrays: Any, **options: Any) -> None:
        nonlocal spoiled
        function(*arrays, **options)
        written = arrays[1 if what == "values" else 0]
        first = written[0] if isinstance(written, tuple) else written
        first.view(f"u{first.itemsize}")[-1:, -1, -1, -1] ^= 1
        spoiled += len(first) > 0

    monkeypatch.setattr(cache_trials, name, clumsy)
    results = [result for result in campaign.run_campaign(SEEDS, "numpy", jobs=1) if result.operation == operation]
    failed = [result for result in results if result.failure.startswith(f"{what}: 1 of ")]
    assert len(failed) == spoiled > 3  # of no values none is wrong


def test_an_exception_is_a_failure_of_its_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_memory_error(*arguments: Any, **options: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(trials, "merge_states", raise_memory_error)
    counts = Counter(
        result.failure.partition(" [")[0]
        for result in campaign.run_campaign(SEEDS, "numpy", jobs=1)
        if result.operation == "merges"
    )
    assert set(counts) == {"MemoryError: no room"}


def test_the_command_says_how_to_run_a_failure_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "slots_of", spoiled(trials.slots_of, forget_slot))
    monkeypatch.setattr("cupy_mla.commands.check.usual_jobs", lambda: 1)
    result = run("--random", "30", "--seed", "7")
    assert result.exit_code == 1
    assert "seeds 7 to 36" in result.output
    again = re.findall(r"again: cupy-mla check (.*)", result.output)
    failures = re.findall(r"FAILED  (.*)", result.output)
    assert len(again) == len(failures) > 0
    alone = CliRunner().invoke(main, ["check", *again[0].split()])
    assert alone.exit_code == 1
    assert failures[0] in alone.output


def test_the_command_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cupy_mla.commands.check.usual_jobs", lambda: 1)
    result = run("--random", "20")
    assert result.exit_code == 0, result.output
    assert "20 of 20 problems passed" in result.output
    assert run("--seed", "1").exit_code == 2
    assert run("--random", "0").exit_code == 2


def test_trials_are_the_same_everywhere() -> None:
    first, again = (Trial(5, campaign.LIBRARY_OF_BACKEND["numpy"]) for _ in range(2))
    for trial in (first, again):
        trials.TRIALS[0](trial)
    assert first.words == again.words
    assert first.share == again.share
    assert np.isfinite(first.share)
