"""A rank that fails must not leave its test waiting for those that wait for it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from gloo_ranks import Ranks

pytest.importorskip("torch")


def process_of(rank: int, group: Any) -> tuple[int, int]:
    return rank, os.getpid()


def fail_on_one(rank: int, group: Any) -> None:
    if rank == 1:
        raise ValueError("no such number")
    time.sleep(1000)


def test_the_error_of_one_rank_ends_the_call(tmp_path: Path) -> None:
    with Ranks((2, 3), tmp_path) as ranks:
        first = ranks.run(2, process_of)
        with pytest.raises(AssertionError, match=r"rank 1 of 2:\n.*Traceback(.|\n)*no such number"):
            ranks.run(2, fail_on_one)
        second = ranks.run(3, process_of)
    assert [rank for rank, _ in first] == [0, 1]
    assert [rank for rank, _ in second] == [0, 1, 2]
    assert not {process for _, process in first} & {process for _, process in second}
