"""Processes that are the ranks of gloo groups, started once for many tests; each runs what it is sent."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

SECONDS = 120  # for a task, the first of which waits for all processes to start


class Ranks:
    """As many processes as ranks; ``run`` sends a function of (rank, group) to the first ranks of them, which are a
    group. Use it in a ``with`` statement.
    """

    def __init__(self, worlds: tuple[int, ...], folder: Path) -> None:
        self._worlds, self._folder, self._starts = worlds, folder, 0
        self._connections: list[Any] = []
        self._processes: list[Any] = []

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returned on each rank of a group. Where it fails on one, the others may wait for that one
        for ever: all are killed, and started anew for the next call.
        """
        if not self._processes:
            self._start()
        try:
            for connection in self._connections[:world]:
                connection.send((world, function, arguments))
            return self._answers(world)
        except BaseException:
            self._stop(0)
            raise

    def _answers(self, world: int) -> list[Any]:
        results: dict[int, Any] = {}
        ranks = {connection: rank for rank, connection in enumerate(self._connections[:world])}
        while len(results) < world:
            silent = {connection: rank for connection, rank in ranks.items() if rank not in results}
            answers = wait(list(silent), SECONDS)
            assert answers, f"of {world} ranks {list(silent.values())} do not answer"
            for connection in answers:
                rank = ranks[connection]
                results[rank], error = connection.recv()
                assert error is None, f"rank {rank} of {world}:\n{error}"
        return [results[rank] for rank in range(world)]

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "gloo_ranks"])
        self._starts += 1
        rendezvous = str(self._folder / f"rendezvous{self._starts}")
        for rank in range(max(self._worlds)):
            here, there = context.Pipe()
            self._processes.append(
                context.Process(target=_serve, args=(rank, self._worlds, rendezvous, there), daemon=True)
            )
            self._processes[-1].start()
            self._connections.append(here)

    def _stop(self, seconds: float) -> None:
        """Kill those that have not ended after so long."""
        for process in self._processes:
            process.join(seconds)
            if process.is_alive():
                process.kill()
        self._connections, self._processes = [], []

    def __enter__(self) -> Ranks:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.send(None)
        self._stop(10)


def _serve(rank: int, worlds: tuple[int, ...], rendezvous: str, connection: Any) -> None:
    import torch
    import torch.distributed as distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=max(worlds),
        timeout=timedelta(seconds=SECONDS),
    )
    groups = {world: distributed.new_group(list(range(world))) for world in worlds}
    while (task := connection.recv()) is not None:
        world, function, arguments = task
        try:
            connection.send((function(rank, groups[world], *arguments), None))
        except Exception:
            connection.send((None, traceback.format_exc()))
    distributed.destroy_process_group()
