"""Work in several processes. They are not forked: one that has used CUDA or has threads does not survive that."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from ..settings import one_thread_each

_MOST_JOBS = 16  # each of them holds a context of CUDA


def usual_jobs() -> int:
    """Processes that compute on this machine."""
    return min(os.cpu_count() or 1, _MOST_JOBS)


@contextmanager
def new_processes(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of ``jobs`` processes, with one thread each for what NumPy computes."""
    with one_thread_each(), ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool
