"""FlashMLA's public test of sparse decoding, with `cupy_mla.flash_mla` in FlashMLA's place.

TESTS is the folder of that name in a checkout of https://github.com/deepseek-ai/FlashMLA. Cases run in several
processes, each with the seed that it has where the test runs by itself. Nothing of a case is changed but the names of
the two kernels that its timed part looks for in a profile, and the empty Triton kernel that marks a place in it, which
would want a C compiler. Exits with 1 if a case failed.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import random
import sys
import time
import traceback
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cupy_mla.commands.command import CannotRun, Command
from cupy_mla.gpu.device import why_unsupported

TEST = "test_flash_mla_sparse_decoding.py"
KERNELS = {
    "flash_fwd_splitkv_mla_fp8_sparse_kernel": "mla_gathered_fp8",
    "flash_fwd_mla_combine_kernel": "mla_combine",
}
PASSED, FAILED, NO_MEMORY = "passed", "failed", "no memory"
GPU_SHARE = 0.85  # of the GPU's memory, for cases
CONTEXT_GIB, FLUSH_GIB = 0.7, 8  # of a process, and what a timed case fills between its calls
CLASS_GIB = (33, 23, 14, 5.5, 1, 0)  # estimates of a class's cases are above these
ANSWER_SECONDS = 60  # a process that says nothing for so long has died or hangs


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case."""

    case: int
    state: str
    seconds: float
    text: str  # why it did not pass


@click.command(help=__doc__, cls=Command)
@click.argument("tests", type=click.Path(path_type=Path, file_okay=False))
@click.option("--jobs", type=click.IntRange(min=1), default=14, show_default=True, help="Processes.")
@click.option("--seconds", type=float, default=float("inf"), help="Begin no case after so long.")
@click.option("--results", type=click.Path(path_type=Path, dir_okay=False), help="JSON lines to continue and add to.")
def main(tests: Path, jobs: int, seconds: float, results: Path | None) -> None:
    if not (tests / TEST).is_file():
        raise CannotRun(f"{tests} has no {TEST}: git clone https://github.com/deepseek-ai/FlashMLA")
    before = [] if results is None or not results.exists() else map(json.loads, results.read_text().splitlines())
    passed = {each["case"] for each in before if each["state"] == PASSED}
    begun, outcomes, total = time.time(), [], 0
    with contextlib.nullcontext() if results is None else results.open("a", buffering=1) as file:
        for said in run_cases(tests, jobs, passed, begun + seconds):
            if isinstance(said, int):
                total = said
                continue
            outcomes.append(said)
            if said.state != PASSED:
                click.echo(f"case {said.case} {said.state}: {said.text}")
            if file is not None:
                file.write(json.dumps(asdict(said)) + "\n")
    states = Counter(outcome.state for outcome in outcomes)
    passed |= {outcome.case for outcome in outcomes if outcome.state == PASSED}
    click.echo(
        f"{states[PASSED]} of {len(outcomes)} cases passed, {states[FAILED]} failed, {states[NO_MEMORY]} had no memory "
        f"({time.time() - begun:.0f} s); {len(passed)} of all {total} have passed"
    )
    sys.exit(1 if len(outcomes) > states[PASSED] else 0)


def run_cases(tests: Path, jobs: int, passed: set[int], end: float) -> Iterator[Outcome | int]:
    """What becomes of the cases that have not passed; and, of each process once, how many there are in all."""
    import torch  # noqa: F401  # once, for all processes; nothing here may use the GPU, or they could not

    context = multiprocessing.get_context("fork")
    room, reports = Room(context), context.Queue()
    for number in range(jobs):
        context.Process(target=work, args=(number, tests, passed, end, room, reports), daemon=True).start()
    while jobs:
        said = reports.get(timeout=ANSWER_SECONDS)
        if said is None:
            jobs -= 1
        elif isinstance(said, Exception):
            raise said
        else:
            yield said


class Room:
    """The GPU's memory, in GiB, and how far each class of cases has come; shared by all processes."""

    def __init__(self, context: Any) -> None:
        self._used, self._begun = context.Value("d", 0.0, lock=False), context.Array("i", len(CLASS_GIB), lock=False)
        self._changed = context.Condition()

    def take(self, classes: list[Class], most: float) -> Class | None:
        """Wait for room for the first of the classes that has cases left; None: none has."""
        with self._changed:
            while left := [each for each in classes if self._begun[each.index] < len(each.cases)]:
                # A case that is larger than the GPU has it for itself.
                fits = [each for each in left if self._used.value == 0 or self._used.value + each.gib <= most]
                if fits:
                    self._used.value += fits[0].gib
                    return fits[0]
                self._changed.wait(timeout=1)
        return None

    def give_back(self, taken: Class) -> None:
        with self._changed:
            self._used.value -= taken.gib
            self._changed.notify_all()

    def next_case(self, taken: Class) -> int | None:
        """A case of a class that nobody has begun."""
        with self._changed:
            place = self._begun[taken.index]
            self._begun[taken.index] += 1
        return taken.cases[place] if place < len(taken.cases) else None


def work(number: int, tests: Path, passed: set[int], end: float, room: Room, reports: Any) -> None:
    """Run cases, a class after the other, as one of several processes."""
    import torch

    reason = why_unsupported()
    if reason is not None:
        reports.put(CannotRun(f"the test needs a Hopper GPU: {reason}"))
        return
    most = prepare_torch()
    test = load_test(tests)
    cases = [case.to_test_param() for case in test.gen_testcase()]
    reports.put(len(cases))
    classes = classes_of(cases, passed)
    if number % 3:  # some begin with small cases, so that there is work beside the large ones
        classes.reverse()
    release = torch.cuda.empty_cache
    torch.cuda.empty_cache = lambda: None  # ahead of each case: to map memory anew takes longer than most of them
    while time.time() < end and (taken := room.take(classes, most)) is not None:
        while time.time() < end and (place := room.next_case(taken)) is not None:
            reports.put(run_case(test, cases[place], place))
        release()
        room.give_back(taken)
    reports.put(None)


def run_case(test: Any, case: Any, number: int) -> Outcome:
    import torch

    case.seed = number
    printed, begun = io.StringIO(), time.time()
    try:
        with contextlib.redirect_stdout(printed):
            is_right = test.test_flash_mla(case).is_correct
        state, text = (PASSED, "") if is_right else (FAILED, printed.getvalue())
    except torch.OutOfMemoryError as error:
        state, text = NO_MEMORY, str(error)
    except Exception:
        state, text = FAILED, printed.getvalue() + traceback.format_exc()
    return Outcome(number, state, time.time() - begun, text)


@dataclass(frozen=True, slots=True)
class Class:
    """Cases that need about as much memory."""

    index: int
    gib: float  # of a process that runs them
    cases: list[int]


def classes_of(cases: list[Any], passed: set[int]) -> list[Class]:
    """What is to be run, the largest first."""
    members: list[list[int]] = [[] for _ in CLASS_GIB]
    sizes = [estimated_gib(case) for case in cases]
    for number, size in enumerate(sizes):
        if number not in passed:
            members[next(index for index, least in enumerate(CLASS_GIB) if size > least)].append(number)
    for each in members:
        random.Random(0).shuffle(each)
    return [
        Class(index, max(sizes[number] for number in each) + CONTEXT_GIB, each)
        for index, each in enumerate(members)
        if each
    ]


def estimated_gib(case: Any) -> float:
    """What a case needs, with its reference: a little more than was measured."""
    of = case.decode
    chosen = case.topk + (of.extra_topk or 0)
    tokens = 2.7 * (case.s_kv + (of.extra_s_k or 0)) + 4 * (of.block_size + (of.extra_block_size or 0))
    of_query = chosen * (6 * case.d_qk + 10 * case.h_q) + 36 * case.h_q * case.d_v
    bytes_ = of.b * (case.s_q * of_query + 5.4 * tokens * case.d_qk)
    return bytes_ / 2**30 + (FLUSH_GIB if case.num_runs else 0)


def load_test(tests: Path) -> Any:
    """The test's module."""
    from cupy_mla import flash_mla

    sys.path.insert(0, str(tests))
    sys.modules["flash_mla"] = flash_mla
    for name in ("rich", "rich.console", "rich.table"):  # for a table that is not made here
        sys.modules.setdefault(name, types.ModuleType(name))
    text = (tests / TEST).read_text()
    for theirs, ours in KERNELS.items():
        text = text.replace(theirs, ours)
    module = types.ModuleType(TEST.removesuffix(".py"))
    sys.modules[module.__name__] = module
    triton = types.ModuleType("triton")
    triton.jit = EmptyKernel  # type: ignore[attr-defined]
    real, sys.modules["triton"] = sys.modules.get("triton"), triton
    exec(compile(text, str(tests / TEST), "exec"), module.__dict__)
    if real is None:
        del sys.modules["triton"]
    else:
        sys.modules["triton"] = real
    return module


class EmptyKernel:
    """In place of `triton.jit`: a kernel of that name which does nothing."""

    def __init__(self, function: Any) -> None:
        self._name = function.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        import cupy
        import torch

        kernel = cupy.RawKernel(f'extern "C" __global__ void {self._name}() {{}}', self._name)

        def launch() -> None:
            with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
                kernel(grid, (1,), ())

        return launch


def prepare_torch() -> float:
    """As the test's own `main` does; returns GiB of the GPU that there are for cases."""
    import torch

    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("cuda:0")
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(1)
    return GPU_SHARE * torch.cuda.get_device_properties(0).total_memory / 2**30


if __name__ == "__main__":
    main()
