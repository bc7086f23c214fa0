"""Dense decode beside FlashMLA on one Hopper GPU: microseconds of all kernels of a call, cold L2.

CUDA graphs of 64 calls (4 above 200 MB of cache) over copies of the KV cache that hold 256 MB in all, replayed in turn
with the peer's; the median of 5 replays. Plans (and the peer's metadata) are made once, before. The peer needs torch
and a folder with FlashMLA as the vLLM wheel packs it (vllm/_flashmla_C*.so and vllm/third_party/flashmla); without
torch, ours alone is timed through CuPy.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cupy_mla import mla_decode, plan_decode
from cupy_mla.timing import REPLAYS, WARM_UP_REPLAYS, graph_shape, replay_graph

try:
    import torch
except ImportError:
    torch = None

PAGE_SIZE = 64
LATENT_DIM, HEAD_DIM = 512, 576
SCALE = HEAD_DIM**-0.5
SUSTAINED_SECONDS = 0.3
SUSTAINED_ROUNDS = 3
CHECKED_REQUESTS = 2


@dataclass(frozen=True)
class BenchCase:
    """One row of the table, with the ratio that it is to reach."""

    batch: int
    length: int
    heads: int
    seqlen_q: int
    wanted: float

    @property
    def name(self) -> str:
        return f"b{self.batch}_k{self.length}_h{self.heads}_q{self.seqlen_q}"

    @property
    def cache_bytes(self) -> int:
        return self.batch * self.length * HEAD_DIM * 2

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.seqlen_q * self.heads * self.length * (HEAD_DIM + LATENT_DIM)

    @property
    def bytes(self) -> int:
        return self.cache_bytes + self.batch * self.seqlen_q * self.heads * (HEAD_DIM + LATENT_DIM) * 2


CASES = tuple(
    BenchCase(*row)
    for row in (
        (128, 8192, 16, 1, 1.06),
        (128, 8192, 64, 1, 1.06),
        (128, 4096, 32, 1, 1.06),
        (64, 8192, 32, 1, 1.08),
        (128, 8192, 128, 1, 1.14),
        (128, 16384, 128, 1, 1.14),
        (128, 8192, 128, 2, 1.14),
        (128, 16384, 64, 2, 1.14),
        (32, 8192, 128, 1, 1.12),
        (32, 8192, 16, 1, 1.15),
        (16, 4096, 128, 1, 1.25),
        (16, 4096, 16, 1, 1.45),
        (4, 8192, 128, 1, 1.4),
        (4, 8192, 16, 1, 1.6),
        (1, 1024, 128, 1, 1.6),
        (1, 4096, 128, 1, 1.6),
        (1, 4096, 16, 1, 2.1),
        (1, 32768, 16, 1, 2.2),
        (1, 131072, 16, 1, 1.4),
        (1, 131072, 128, 1, 1.2),
    )
)


@dataclass
class Row:
    """What was measured of one case; times in microseconds of a call."""

    case: str
    ours_us: float = math.nan
    peer_us: float | None = None
    ratio: float | None = None
    wanted: float = math.nan
    tflops: float = math.nan
    gigabytes_per_second: float = math.nan
    error: float = math.nan
    peer_error: float | None = None
    sustained_ours_us: float | None = None
    sustained_peer_us: float | None = None
    sustained_ratio: float | None = None
    failure: str | None = None


class Inputs:
    """Random arrays of a case on the GPU, and copies of its cache."""

    def __init__(self, case: BenchCase) -> None:
        self.case = case
        self.calls, self.copies = graph_shape(case.cache_bytes)
        columns = -(-case.length // PAGE_SIZE)
        num_pages = case.batch * columns
        random = np.random.default_rng(0)
        table = random.permutation(num_pages).astype(np.int32).reshape(case.batch, columns)
        lengths = np.full(case.batch, case.length, np.int32)
        q_shape = (case.batch, case.seqlen_q, case.heads, HEAD_DIM)
        kv_shape = (num_pages, PAGE_SIZE, 1, HEAD_DIM)
        if torch is not None:
            torch.manual_seed(0)
            self.q = torch.randn(q_shape, dtype=torch.bfloat16, device="cuda")
            pool = torch.empty((self.copies, *kv_shape), dtype=torch.bfloat16, device="cuda")
            pool[0].normal_()
            for copy in pool[1:]:
                copy.copy_(pool[0])
            self.block_table, self.lengths = torch.from_numpy(table).cuda(), torch.from_numpy(lengths).cuda()
        else:
            import cupy
            import ml_dtypes

            bfloat16 = np.dtype(ml_dtypes.bfloat16)

            def on_gpu(shape: tuple[int, ...]) -> Any:
                values = random.standard_normal(shape, np.float32).astype(bfloat16)
                return cupy.asarray(values.view(np.uint16))

            self.q = on_gpu(q_shape).view(bfloat16)
            bits = cupy.empty((self.copies, *kv_shape), np.uint16)
            bits[0] = on_gpu(kv_shape)
            bits[1:] = bits[0]
            pool = bits.view(bfloat16)
            self.block_table, self.lengths = cupy.asarray(table), cupy.asarray(lengths)
        self.caches = [pool[index] for index in range(self.copies)]
        self.table = table

    def error(self, out: Any) -> float:
        """Relative error of the first and the last request, all heads, first query, against float64."""
        requests = sorted({0, self.case.batch - 1})[:CHECKED_REQUESTS]
        difference, norm = 0.0, 0.0
        for request in requests:
            if torch is not None:
                pages = torch.from_numpy(self.table[request]).cuda().long()
                keys = self.caches[0][pages].reshape(-1, HEAD_DIM)[: self.case.length].double()
                q = self.q[request, 0].double()
                weights = torch.softmax(SCALE * (q @ keys.T), -1)
                exact = weights @ keys[:, :LATENT_DIM]
                difference += float(((out[request, 0].double() - exact) ** 2).sum())
                norm += float((exact**2).sum())
            else:
                keys = self.caches[0][self.table[request].tolist()].get().reshape(-1, HEAD_DIM)
                keys = keys[: self.case.length].astype(np.float64)
                scores = SCALE * (self.q[request, 0].get().astype(np.float64) @ keys.T)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                exact = weights @ keys[:, :LATENT_DIM] / weights.sum(-1, keepdims=True)
                difference += float(((out[request, 0].get().astype(np.float64) - exact) ** 2).sum())
                norm += float((exact**2).sum())
        return math.sqrt(difference / norm)


Call = Callable[[Any], tuple[Any, Any]]


def our_call(inputs: Inputs) -> Call:
    """A decode of one cache with a plan and outputs made before."""
    plan = plan_decode(inputs.q, inputs.caches[0], inputs.block_table, inputs.lengths)
    out, lse = mla_decode(inputs.q, inputs.caches[0], inputs.block_table, inputs.lengths, plan=plan)

    def call(cache: Any) -> tuple[Any, Any]:
        return mla_decode(
            inputs.q, cache, inputs.block_table, inputs.lengths, plan=plan, out=out, lse=lse, validate=False
        )

    return call


def peer_call(inputs: Inputs, flash_mla: Any) -> Call:
    """FlashMLA's decode of one cache, its metadata filled by a first call."""
    metadata, _ = flash_mla.get_mla_metadata()

    def call(cache: Any) -> tuple[Any, Any]:
        out, lse = flash_mla.flash_mla_with_kvcache(
            inputs.q, cache, inputs.block_table, inputs.lengths, LATENT_DIM, metadata, softmax_scale=SCALE
        )
        return out, lse

    call(inputs.caches[0])
    return call


def load_peer(folder: str | None) -> Any:
    """FlashMLA's Python interface, or None."""
    if folder is None or torch is None:
        return None
    sys.path.insert(0, folder)
    try:
        from vllm.third_party.flashmla import flash_mla_interface  # type: ignore[import-not-found]
    except (ImportError, OSError) as error:
        click.echo(f"FlashMLA is not timed: {error}", err=True)
        return None
    return flash_mla_interface


class TorchGraph:
    """A CUDA graph of the calls of one side."""

    def __init__(self, inputs: Inputs, call: Call) -> None:
        self.calls = inputs.calls
        for cache in inputs.caches[:2]:
            call(cache)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for index in range(inputs.calls):
                call(inputs.caches[index % inputs.copies])
        for _ in range(WARM_UP_REPLAYS):
            self.graph.replay()
        torch.cuda.synchronize()

    def seconds(self, replays: int = 1) -> float:
        """GPU seconds of a call, over so many replays back to back."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / replays / self.calls


def in_turn(graphs: list[TorchGraph], rounds: int, replays: list[int]) -> list[float]:
    """Median seconds of a call of each graph, the graphs timed one after the other in every round."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        for index, graph in enumerate(graphs):
            times[index].append(graph.seconds(replays[index]))
    return [statistics.median(values) for values in times]


def measure(case: BenchCase, flash_mla: Any, sustained: bool) -> Row:
    """Time one case, ours and the peer's."""
    inputs = Inputs(case)
    ours = our_call(inputs)
    row = Row(case.name, wanted=case.wanted, error=inputs.error(ours(inputs.caches[0])[0]))
    if torch is None:
        caches = [inputs.caches[index % inputs.copies] for index in range(inputs.calls)]
        replays = replay_graph([partial(ours, cache) for cache in caches])
        seconds = [statistics.median(replays) / inputs.calls]
    else:
        graphs = [TorchGraph(inputs, ours)]
        if flash_mla is not None:
            peer = peer_call(inputs, flash_mla)
            row.peer_error = inputs.error(peer(inputs.caches[0])[0])
            graphs.append(TorchGraph(inputs, peer))
        seconds = in_turn(graphs, REPLAYS, [1] * len(graphs))
        if sustained:
            replay_counts = [max(1, math.ceil(SUSTAINED_SECONDS / (value * inputs.calls))) for value in seconds]
            long = in_turn(graphs, SUSTAINED_ROUNDS, replay_counts)
            row.sustained_ours_us = long[0] * 1e6
            if len(long) > 1:
                row.sustained_peer_us, row.sustained_ratio = long[1] * 1e6, long[1] / long[0]
    row.ours_us = seconds[0] * 1e6
    row.tflops, row.gigabytes_per_second = case.flops / seconds[0] / 1e12, case.bytes / seconds[0] / 1e9
    if len(seconds) > 1:
        row.peer_us, row.ratio = seconds[1] * 1e6, seconds[1] / seconds[0]
    return row


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


COLUMNS: tuple[tuple[str, int, Callable[[Row], str]], ...] = (
    ("us", 9, lambda row: number(row.ours_us, 1)),
    ("us peer", 9, lambda row: number(row.peer_us, 1)),
    ("ratio", 7, lambda row: number(row.ratio, 3)),
    ("wanted", 7, lambda row: number(row.wanted, 2)),
    ("TFLOPS", 7, lambda row: number(row.tflops, 0)),
    ("GB/s", 6, lambda row: number(row.gigabytes_per_second, 0)),
    ("error", 9, lambda row: f"{row.error:.1e}"),
)
SUSTAINED_COLUMNS: tuple[tuple[str, int, Callable[[Row], str]], ...] = (
    ("sust. us", 9, lambda row: number(row.sustained_ours_us, 1)),
    ("peer", 9, lambda row: number(row.sustained_peer_us, 1)),
    ("ratio", 7, lambda row: number(row.sustained_ratio, 3)),
)
NAME_WIDTH = 24


@click.command(help=__doc__)
@click.option("--peers", type=click.Path(exists=True, file_okay=False), help="Folder with FlashMLA, see above.")
@click.option("--cases", "substring", default="", help="Only cases whose name has this in it, e.g. h16 or b1_.")
@click.option("--sustained", is_flag=True, help="Also 0.3 s back to back, ours and the peer's in turn.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Also write the rows to this file.")
def main(peers: str | None, substring: str, sustained: bool, json_path: str | None) -> None:
    flash_mla = load_peer(peers)
    columns = COLUMNS + (SUSTAINED_COLUMNS if sustained else ())
    click.echo(f"{'case':<{NAME_WIDTH}}" + "".join(f"{title:>{width}}" for title, width, _ in columns))
    rows: list[Row] = []
    for case in CASES:
        if substring not in case.name:
            continue
        try:
            row = measure(case, flash_mla, sustained)
            click.echo(f"{case.name:<{NAME_WIDTH}}" + "".join(f"{text(row):>{width}}" for _, width, text in columns))
        except Exception as error:  # a case that fails must not cost the others their numbers
            row = Row(case.name, wanted=case.wanted, failure=f"{type(error).__name__}: {error}")
            click.echo(f"{case.name:<{NAME_WIDTH}}failed: {row.failure}")
            traceback.print_exc()
        rows.append(row)
        if torch is not None:
            torch.cuda.empty_cache()
        if json_path is not None:
            Path(json_path).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if any(row.failure for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
