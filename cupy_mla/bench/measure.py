"""The protocol: all sides of a case are timed in turn, and what fails takes nothing else with it.

GPU time of all kernels of a call with a cold L2: a CUDA graph of 64 to 1,024 calls (4 above 200 MB of cache) over
copies of the cache; plans and the peers' metadata are made before. In each of five rounds every side's graph is
replayed once; the median counts. Sustained: three rounds of 0.3 s back to back for each side, also in turn. On the CPU:
wall time, the median of three.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import MlaError
from ..lab.accuracy import LSE_BOUNDS, OUT_BOUNDS
from ..lab.libraries import NUMPY, ArrayLibrary
from ..lab.timing import CPU_REPEATS, REPLAYS, WARM_UP_REPLAYS, Timer, make_timer
from .grid import BenchCase
from .inputs import Call, Inputs
from .rows import OURS, Measurement, Row

SUSTAINED_SECONDS = 0.3
SUSTAINED_ROUNDS = 3
MAX_FAILURE_CHARACTERS = 400  # of a failure in a row; the whole of it goes to the log

_log = logging.getLogger(__name__)


class TimeLimitError(MlaError, TimeoutError):
    """A case took, or would take, longer than it may."""


class Deadline:
    """So many seconds from now."""

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._end = clock() + limit

    @property
    def remaining(self) -> float:
        return self._end - self._clock()

    def check(self, needed: float = 0.0) -> None:
        """Refuse to go on when the time is up, or would be.

        Raises
        ------
        TimeLimitError
            Fewer than ``needed`` seconds are left, or none.
        """
        if self.remaining <= 0:
            raise TimeLimitError(f"the limit of {self.limit:g} s for a case has passed")
        if needed > self.remaining:
            left = "" if needed > self.limit else f"{self.remaining:.3g} s that are left of the "
            raise TimeLimitError(f"it would take {needed:.3g} s, beyond the {left}limit of {self.limit:g} s for a case")


class Side(Protocol):
    """An implementation to time: this package or a peer."""

    name: str

    def unsupported(self, case: BenchCase) -> str | None:
        """Why it cannot run a case, or None."""

    def prepare(self, inputs: Inputs) -> Call:
        """Everything that is done once a step; returns the call on one of the caches."""


@dataclass(slots=True)
class Lane:
    """One side of one case, ready to be timed, and where its times go."""

    measurement: Measurement
    timer: Timer
    calls: int


def measure(
    cases: Sequence[BenchCase],
    sides: Sequence[Side],
    library: ArrayLibrary,
    *,
    sustained: bool = False,
    limit: float = math.inf,
) -> list[Row]:
    """Time cases together: all sides of all of them in turn, so that they meet the same clocks and temperature.

    Parameters
    ----------
    cases
        One, or several to be compared with each other; all their arrays exist at the same time.
    sides
        This package and its peers.
    library
        Who makes the arrays.
    sustained
        Also measure back to back.
    limit
        Seconds for each case, checked between steps and before a long one; a kernel that runs is not interrupted.

    Returns
    -------
    A row for each case; failures are in them, none is raised.
    """
    deadline = Deadline(limit * len(cases))
    rows, lanes = [], []
    for case in cases:
        row = Row(case, peers={side.name: Measurement() for side in sides if side.name != OURS})
        rows.append(row)
        try:
            deadline.check()
            inputs = Inputs(case, library)
            row.calls, row.copies = inputs.calls, len(inputs.caches)
        except Exception as error:
            for measurement in row.measurements.values():
                _note_failure(measurement, f"{case.name}: arrays", error)
            continue
        for side in sides:
            lane = _prepare(row.measurements[side.name], side, inputs, deadline)
            if lane is not None:
                lanes.append(lane)
    rounds = CPU_REPEATS if library is NUMPY else REPLAYS
    for lane, seconds in in_turn(lanes, rounds, [1] * len(lanes), deadline):
        times = [value * 1e6 for value in seconds]
        lane.measurement.us = statistics.median(times)
        lane.measurement.fastest_us, lane.measurement.slowest_us = min(times), max(times)
    if sustained:
        timed = [lane for lane in lanes if lane.measurement.us is not None]
        replays = [sustained_replays(lane) for lane in timed]
        for lane, seconds in in_turn(timed, SUSTAINED_ROUNDS, replays, deadline):
            lane.measurement.sustained_us = statistics.median(seconds) * 1e6
    return rows


def _prepare(measurement: Measurement, side: Side, inputs: Inputs, deadline: Deadline) -> Lane | None:
    """Check the result of a side, and make its timer; None when there is nothing to time."""
    where = f"{inputs.case.name}: {side.name}"
    try:
        measurement.skipped = side.unsupported(inputs.case)
        if measurement.skipped is not None:
            return None
        deadline.check()
        call = side.prepare(inputs)
        seconds, (out, lse, *_) = _first_calls(call, inputs)
        _check(measurement, side, inputs, out, lse)
        repeats = CPU_REPEATS if inputs.library is NUMPY else WARM_UP_REPLAYS + REPLAYS
        deadline.check(seconds * inputs.calls * repeats)
        return Lane(measurement, make_timer(inputs.library, call, inputs.caches, inputs.calls), inputs.calls)
    except Exception as error:
        _note_failure(measurement, where, error)
        return None


def _first_calls(call: Call, inputs: Inputs) -> tuple[float, tuple[object, ...]]:
    """About how many seconds a call takes once everything is loaded, with the host's part; and its result."""
    if inputs.library is not NUMPY:
        call(inputs.caches[0])  # compiles and loads
        inputs.library.synchronize()
    start = time.perf_counter()
    result = call(inputs.caches[0])
    inputs.library.synchronize()
    return time.perf_counter() - start, result


def _check(measurement: Measurement, side: Side, inputs: Inputs, out: object, lse: object) -> None:
    """Record the error. Ours has bounds; beyond them the row counts as failed, whatever its time."""
    if side.name != OURS:  # what the peers return as lse differs (base 2, other axes), or is nothing
        measurement.error, _ = inputs.errors(out)
        return
    measurement.error, lse_error = inputs.errors(out, lse, as_rounded=True)
    bound, lse_bound = OUT_BOUNDS[inputs.case.dtype], LSE_BOUNDS[inputs.stored_case.computes]
    # Not-a-number is above every bound.
    if not measurement.error <= bound:
        measurement.failure = f"relative error {measurement.error:.2e}, bound {bound:.0e}"
    elif not lse_error <= lse_bound:
        measurement.failure = f"lse error {lse_error:.2e}, bound {lse_bound:.0e}"


def in_turn(
    lanes: Sequence[Lane], rounds: int, replays: Sequence[int], deadline: Deadline
) -> list[tuple[Lane, list[float]]]:
    """Seconds of a call in each round, the lanes run one after the other in every round.

    A lane that fails takes no further part. When the time is up after a round, the rounds so far count; lanes without
    a single time get that as their failure.
    """
    times: list[list[float]] = [[] for _ in lanes]
    running = set(range(len(lanes)))
    for number in range(rounds):
        if number and deadline.remaining <= 0:
            break
        for index in sorted(running):
            try:
                if number == 0:
                    deadline.check()
                times[index].append(lanes[index].timer.seconds(replays[index]))
            except Exception as error:
                _note_failure(lanes[index].measurement, "replay", error)
                running.discard(index)
    return [(lanes[index], times[index]) for index in sorted(running)]


def sustained_replays(lane: Lane) -> int:
    """Replays that take `SUSTAINED_SECONDS`."""
    assert lane.measurement.us is not None
    return max(1, math.ceil(SUSTAINED_SECONDS / (lane.measurement.us * 1e-6 * lane.calls)))


def _note_failure(measurement: Measurement, where: str, error: Exception) -> None:
    _log.info("%s", where, exc_info=error)
    measurement.failure = f"{type(error).__name__}: {error}"[:MAX_FAILURE_CHARACTERS]
