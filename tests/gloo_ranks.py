"""Processes that are the ranks of gloo groups, started once for many tests; each runs what it is sent."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

SECONDS = 120  # for a task, the first of which waits for all processes to start


class Ranks:
    """As many processes as ranks; ``run`` sends a function of (rank, group) to the first ranks of them, which are a
    group. Use it in a ``with`` statement.
    """

    def __init__(self, worlds: tuple[int, ...], folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "gloo_ranks"])
        self._connections, self._processes = [], []
        for rank in range(max(worlds)):
            here, there = context.Pipe()
            arguments = (rank, worlds, str(folder / "rendezvous"), there)
            self._processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self._processes[-1].start()
            self._connections.append(here)

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returned on each rank of a group."""
        for connection in self._connections[:world]:
            connection.send((world, function, arguments))
        results = []
        for rank, connection in enumerate(self._connections[:world]):
            assert connection.poll(SECONDS), f"rank {rank} of {world} does not answer"
            result, error = connection.recv()
            assert error is None, f"rank {rank} of {world}:\n{error}"
            results.append(result)
        return results

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()


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
