"""The campaign of ``cupy-mla check --random``: thousands of random problems of every operation, each given by a number.

Problem i of a campaign that starts at seed s is that of seed s + i, so that one of them is run again by its seed alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, replace

from ..gpu.jit.source import KernelSource
from ..kernels.append import dequantise_source, quantise_source
from ..kernels.catalogue import NamedKernel, standard_configs
from ..kernels.choose import FAMILIES
from ..kernels.combine import combine_source, gathered_combine_source
from .cache_trials import CODED_LAYOUTS
from .compile_job import compile_all
from .libraries import LIBRARY_OF_BACKEND
from .processes import new_processes
from .trial import Settings, Trial, WrongResultError
from .trials import TRIALS

_SEEDS_PER_TASK = 50
_ANY_PAGE_SIZE = 64  # of the standard configurations that are taken for other page sizes


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

    Parameters
    ----------
    seeds
        One for each problem.
    backend
        ``"cuda"`` or ``"numpy"``.
    jobs
        Most processes.
    """
    tasks = [seeds[start : start + _SEEDS_PER_TASK] for start in range(0, len(seeds), _SEEDS_PER_TASK)]
    if len(tasks) == 1 or jobs == 1:
        yield from (run_trial(seed, backend) for seed in seeds)
        return
    with new_processes(jobs) as pool:
        for future in as_completed([pool.submit(_run_task, task, backend) for task in tasks]):
            yield from future.result()


def compile_for(seeds: Sequence[int], jobs: int) -> None:
    """Compile the kernels of a campaign on a GPU, in several processes.

    Raises
    ------
    MissingDependencyError
        There is no compiler.
    """
    sources: dict[KernelSource, NamedKernel] = {}
    for settings in {Settings.of(seed) for seed in seeds}:
        for source in _sources(settings):
            sources.setdefault(source, NamedKernel(str(source), source))
    for _ in compile_all(list(sources.values()), jobs):
        pass  # a kernel that does not compile fails where it is used


def _sources(settings: Settings) -> Iterator[KernelSource]:
    for config in standard_configs():
        widths = config.latent_dim, config.rope_dim
        same = widths == (settings.latent_dim, settings.rope_dim) and config.dtype == settings.dtype
        if not same or (config.causal and not settings.causal):
            continue
        if config.family not in FAMILIES:
            strided = replace(config, page_size=settings.page_size)  # pages that are not one behind the other
            yield from (config.source(), strided.source(), gathered_combine_source(config))
        elif config.page_size == _ANY_PAGE_SIZE:
            yield from (replace(config, page_size=settings.page_size).source(), combine_source(config))
    for layout in CODED_LAYOUTS[settings.latent_dim, settings.rope_dim]:
        yield from (quantise_source(settings.dtype, layout), dequantise_source(settings.dtype, layout))


def _run_task(seeds: Sequence[int], backend: str) -> list[TrialResult]:
    return [run_trial(seed, backend) for seed in seeds]
