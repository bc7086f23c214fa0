"""The campaign of ``cupy-mla check --random``: thousands of random problems of every operation, each given by a number.

Problem i of a campaign that starts at seed s is that of seed s + i, so that one of them is run again by its seed alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass

from ..gpu.jit import compiler
from ..schedule.pieces import ceil_div
from .libraries import CUPY, LIBRARY_OF_BACKEND
from .processes import new_processes
from .trial import SEEDS_PER_SETTINGS, Trial, WrongResultError
from .trials import TRIALS

_TASKS_PER_JOB = 4  # at least, where there are so many seeds: none works long when the others are done
_MOST_SEEDS_PER_TASK = 50


@dataclass(frozen=True, slots=True)
class TrialResult:
    """One problem: ``failure`` is empty when all is well, ``share`` its largest error as a share of the bound."""

    seed: int
    operation: str
    share: float
    failure: str = ""


def run_trial(seed: int, backend: str) -> TrialResult:
    """Run the problem of a seed; whatever goes wrong is a failure of it."""
    trial = Trial(seed, LIBRARY_OF_BACKEND[backend])
    operation = trial.pick(*TRIALS)
    failure = ""
    try:
        operation(trial)
    except WrongResultError as wrong:
        failure = str(wrong)
    except Exception as error:  # an operation must not raise on a good problem, whatever it is
        failure = f"{type(error).__name__}: {error}"
    if failure:
        drawn = ", ".join(f"{name}={value}" for name, value in trial.words.items())
        failure = f"{failure} [{trial.settings}; {drawn}]"
    return TrialResult(seed, operation.__name__, trial.share, failure)


def run_campaign(seeds: Sequence[int], backend: str, jobs: int) -> Iterator[TrialResult]:
    """Run the problems of seeds, in several processes where there are many.

    A kernel is compiled by whoever needs it first. So that few wait for the same one, the processes are at problems of
    different settings, which have most kernels for themselves.

    Parameters
    ----------
    seeds
        One for each problem.
    backend
        ``"cuda"`` or ``"numpy"``.
    jobs
        Most processes.

    Raises
    ------
    MissingDependencyError
        ``backend`` is ``"cuda"``, and there is no compiler.
    """
    if LIBRARY_OF_BACKEND[backend] is CUPY:
        compiler.compiler_version()  # without a compiler, fail once and not for each problem
    size = min(ceil_div(len(seeds), jobs * _TASKS_PER_JOB), _MOST_SEEDS_PER_TASK)
    tasks = [seeds[start : start + size] for start in range(0, len(seeds), size)]
    tasks.sort(key=lambda task: task[0] % SEEDS_PER_SETTINGS)
    if len(tasks) == 1 or jobs == 1:
        yield from (run_trial(seed, backend) for seed in seeds)
        return
    with new_processes(jobs) as pool:
        for future in as_completed([pool.submit(_run_task, task, backend) for task in tasks]):
            yield from future.result()


def _run_task(seeds: Sequence[int], backend: str) -> list[TrialResult]:
    return [run_trial(seed, backend) for seed in seeds]
