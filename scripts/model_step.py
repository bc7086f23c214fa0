"""A decode step of all layers of a model with a PagedKVCache, in a CUDA graph: time of the host and of the GPU.

A step is what a serving loop does between two tokens: room for the new tokens (pages, lengths and slots, worked out
on the host and copied to the GPU), then one graph of the plan, and for each layer an append and a decode. Reported are
the host's time for the first and for the launch of the graph, the GPU's time of the graph, and the host's time of the
same step without a graph. Without a Hopper GPU a small step runs on the CPU, and only the bookkeeping is timed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cupy_mla import PagedKVCache, mla_decode, plan_decode
from cupy_mla.commands.command import Command
from cupy_mla.gpu.device import why_unsupported

STEPS, WARM_UP = 100, 5
PAGE_SIZE = 64
KV_SCALE = 0.02  # of normal values: 448 times it is beyond nine standard deviations
ON_CPU = {"layers": 2, "batch": 2, "length": 100, "heads": 4}  # so small that NumPy takes no time


def microseconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e6


class ModelStep:
    """The step of a batch of requests of one length."""

    def __init__(self, torch: Any, device: str, layers: int, batch: int, length: int, heads: int, layout: str) -> None:
        max_pages = -(-(length + STEPS + WARM_UP + PAGE_SIZE) // PAGE_SIZE)
        scale = KV_SCALE if layout == "fp8_e4m3" else None
        self.cache = PagedKVCache(
            batch * max_pages,
            PAGE_SIZE,
            num_layers=layers,
            layout=layout,
            kv_scale=scale,
            framework="torch",
            device=device,
            max_requests=batch,
            max_pages_per_seq=max_pages,
        )
        requests = [self.cache.allocate() for _ in range(batch)]
        self.cache.step(requests, [length] * batch)  # what lies in the cache does not matter
        self.step = self.cache.step(requests)
        self.rows = torch.randn(layers, batch, 576, device=device).bfloat16()
        self.q = torch.randn(layers, batch, 1, heads, 576, device=device).bfloat16()
        self.shared = self.step.block_table, self.step.cache_seqlens
        self.plan = plan_decode(self.q[0], self.cache.layers[0], *self.shared, kv_scale=scale)
        self.outs = [mla_decode(self.q[0], self.cache.layers[0], *self.shared, kv_scale=scale)] * layers

    def run(self) -> None:
        self.plan.update(self.step.cache_seqlens)
        for layer, kv_cache in enumerate(self.cache.layers):
            self.step.append(layer, self.rows[layer])
            out, lse = self.outs[layer]
            options = {"plan": self.plan, "out": out, "lse": lse, "kv_scale": self.cache.kv_scales[layer]}
            mla_decode(self.q[layer], kv_cache, *self.shared, **options)


def time_on_gpu(torch: Any, model: ModelStep) -> dict[str, float]:
    """Microseconds of each part of a step."""
    model.run()
    torch.cuda.synchronize()
    eager = []
    for _ in range(WARM_UP):
        eager.append(microseconds(model.run))
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.run()
    times: dict[str, list[float]] = {"bookkeeping": [], "launch": [], "GPU": []}
    for _ in range(STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times["bookkeeping"].append(microseconds(model.step.advance))
        start.record()
        times["launch"].append(microseconds(graph.replay))
        end.record()
        end.synchronize()
        times["GPU"].append(start.elapsed_time(end) * 1e3)
    medians = {name: statistics.median(values[WARM_UP:]) for name, values in times.items()}
    return {**medians, "without a graph": statistics.median(eager)}


@click.command(cls=Command)
@click.option("--layers", type=click.IntRange(min=1), default=61, show_default=True, help="DeepSeek-V3 has 61.")
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Requests.")
@click.option("--length", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens of each.")
@click.option("--heads", type=click.IntRange(min=1), default=16, show_default=True, help="Query heads.")
@click.option("--layout", type=click.Choice(["bf16", "fp8_e4m3"]), default="bf16", show_default=True)
def main(layers: int, batch: int, length: int, heads: int, layout: str) -> None:
    """Print what a decode step of all layers costs, in microseconds."""
    try:
        import torch
    except ImportError as error:
        raise click.ClickException("this needs torch") from error
    reason = why_unsupported()
    if reason is not None:
        click.echo(f"on the CPU, with {ON_CPU}: {reason}", err=True)
        model = ModelStep(torch, "cpu", **ON_CPU, layout=layout)
        model.run()
        times = {"bookkeeping": statistics.median(microseconds(model.step.advance) for _ in range(STEPS))}
    else:
        times = time_on_gpu(torch, ModelStep(torch, "cuda", layers, batch, length, heads, layout))
        click.echo(f"{layers} layers, {batch} requests of {length} tokens, {heads} heads, {layout}: us a step")
    for name, value in times.items():
        click.echo(f"{name:>16} {value:10.1f}")


if __name__ == "__main__":
    main()
