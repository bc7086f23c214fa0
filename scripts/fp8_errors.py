#!/usr/bin/env python3
"""Errors of dense decode over an e4m3 cache, by way to compute and kind of data: `--help`.

    python scripts/fp8_errors.py                              # emulated, on any machine
    python scripts/fp8_errors.py --peers-path build/peers     # on a Hopper GPU also measured, beside vLLM's kernel

Needs torch. Everything is compared with float64 on the dequantised cache: `out` by the Frobenius norm, `lse` by its
largest difference, of an lse above 100 as a part of it in hundreds. vLLM's kernel takes e4m3 queries; it is compared on
the queries as rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cupy_mla import mla_decode
from cupy_mla.bench.torch_reference import attention64
from cupy_mla.gpu.device import why_unsupported
from cupy_mla.shown.tables import print_table

LATENT, ROPE, HEADS, PAGE_SIZE = 512, 64, 16, 64
WIDTH = LATENT + ROPE
SOFTMAX_SCALE = WIDTH**-0.5
KV_SCALE = 0.5
LENGTHS = (8192, 32768, 131072)
KINDS = ("normal", "mean", "outliers in K", "outliers in q", "outliers in both", "peaked")
COMPUTES = ("exact", "split")
MEAN, OUTLIER_FACTOR, PEAKED_FACTOR = 1.0, 20.0, 4.0
LSE_UNIT = 100.0
OUTLIER_COLUMNS = slice(7, None, 200)

# Of the emulation: kernels_cu/decode/fp8. FP8 tensor cores add the products of 32 columns to a sum with FRACTION_BITS
# below the largest of them; after PROMOTED_STEPS such steps the sum is added to a float32 one.
EMULATED_HEADS = 4
STEP_COLUMNS, PROMOTED_STEPS, FRACTION_BITS = 32, 3, 13
LARGEST_E4M3, LOW_PART, OUTLIER = 448.0, 16.0, 8.0
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Errors:
    """Relative error of out, and largest error of lse, in proportion where it is above `LSE_UNIT`."""

    out: float
    lse: float


@dataclass(frozen=True)
class Data:
    """One request of one query token."""

    q: Any  # [1, 1, HEADS, 576] bfloat16
    cache: Any  # [pages, PAGE_SIZE, 1, 576] float8_e4m3fn, in order
    block_table: Any
    cache_seqlens: Any

    @property
    def arguments(self) -> tuple[Any, Any, Any, Any]:
        return self.q, self.cache, self.block_table, self.cache_seqlens

    @property
    def stored(self) -> Any:
        """[tokens, 576] float32: values without their scale."""
        return self.cache.float().flatten(0, 2)

    def compare(self, out: Any, lse: Any, q: Any = None) -> Errors:
        """Out [1, 1, heads, 512] and lse [1, heads, 1] of the leading heads, for these queries or others."""
        queries = (self.q if q is None else q)[0, :, : out.shape[2]].float()
        exact_out, exact_lse = attention64(queries, self.stored * KV_SCALE, SOFTMAX_SCALE, LATENT, False)
        difference = (out[0].double() - exact_out).norm() / exact_out.norm()
        lse_difference = (lse[0].double() - exact_lse).abs() / (exact_lse.abs() / LSE_UNIT).clamp(min=1)
        return Errors(float(difference), float(lse_difference.max()))


def make_data(kind: str, length: int, device: str = "cuda", seed: int = 0) -> Data:
    """Normal values, changed as the kind says."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(length, WIDTH, generator=generator, device=device)
    q = torch.randn(1, 1, HEADS, WIDTH, generator=generator, device=device)
    if kind == "mean":
        values += MEAN
    if kind in ("outliers in K", "outliers in both"):
        values[:, OUTLIER_COLUMNS] *= OUTLIER_FACTOR
    if kind in ("outliers in q", "outliers in both"):
        q[..., OUTLIER_COLUMNS] *= OUTLIER_FACTOR
    if kind == "peaked":
        q *= PEAKED_FACTOR
    pages = length // PAGE_SIZE
    cache = (values / KV_SCALE).to(torch.float8_e4m3fn).view(pages, PAGE_SIZE, 1, WIDTH)
    table = torch.arange(pages, dtype=torch.int32, device=device)[None]
    return Data(q.bfloat16(), cache, table, torch.tensor([length], dtype=torch.int32, device=device))


def ours(data: Data, compute: str) -> Errors:
    """The error of one way to compute."""
    return data.compare(*mla_decode(*data.arguments, kv_scale=KV_SCALE, compute=compute))


def theirs(data: Data, operators: Any) -> Errors:
    """The error of vLLM's kernel, given its operators."""
    import torch

    q = data.q.to(torch.float8_e4m3fn)
    one, scale = (torch.full((1,), value, device="cuda") for value in (1.0, KV_SCALE))
    schedule = operators.get_mla_decoding_metadata_dense_fp8(data.cache_seqlens, HEADS, 1)
    lengths, table = data.cache_seqlens, data.block_table
    out, lse = operators.fwd_kvcache_mla_fp8(
        q, data.cache, LATENT, lengths, table, SOFTMAX_SCALE, False, *schedule, one, scale
    )
    return data.compare(out, lse, q)


def emulated(data: Data, compute: str) -> Errors:
    """The error of a way to compute, rounded where the kernel rounds."""
    import torch

    q, stored = data.q[0, 0, :EMULATED_HEADS].float(), data.stored
    # A power of two for each row brings its largest value into the upper half of e4m3's range.
    power = torch.exp2(torch.ceil(torch.log2(q.abs().amax(1, keepdim=True) / LARGEST_E4M3)))
    has_outlier = bool((q.square().amax(1) * WIDTH > OUTLIER**2 * q.square().sum(1)).any())
    if compute == "exact" or has_outlier:
        scores = q @ stored.T
    else:
        high = (q / power).to(torch.float8_e4m3fn).float()
        low = ((q / power - high) * LOW_PART).to(torch.float8_e4m3fn).float()
        scores = (multiply_e4m3(high, stored) + multiply_e4m3(low, stored) / LOW_PART) * power
    scores *= KV_SCALE * SOFTMAX_SCALE
    highest = scores.amax(1, keepdim=True)
    weights = torch.exp(scores - highest)
    total = weights.sum(1, keepdim=True)
    out = weights.half().float() @ stored[:, :LATENT] * KV_SCALE / total
    return data.compare(out.bfloat16()[None, None], (highest + total.log())[None])


def multiply_e4m3(a: Any, stored: Any) -> Any:
    """[heads, tokens] float32: products of rows as FP8 tensor cores add them up."""
    import torch

    sums = torch.zeros(len(a), len(stored), device=a.device)
    for first in range(0, len(stored), TOKENS_AT_ONCE):
        tokens = slice(first, first + TOKENS_AT_ONCE)
        for group in range(0, WIDTH, STEP_COLUMNS * PROMOTED_STEPS):
            partial = torch.zeros_like(sums[:, tokens])
            for column in range(group, min(group + STEP_COLUMNS * PROMOTED_STEPS, WIDTH), STEP_COLUMNS):
                columns = slice(column, column + STEP_COLUMNS)
                products = a[:, None, columns] * stored[None, tokens, columns]
                largest = torch.maximum(products.abs().amax(2), partial.abs()).clamp(min=torch.finfo(a.dtype).tiny)
                unit = torch.exp2(torch.floor(torch.log2(largest)) - FRACTION_BITS)
                partial = (torch.trunc(products / unit[..., None]).sum(2) + torch.trunc(partial / unit)) * unit
            sums[:, tokens] += partial
    return sums


@click.command()
@click.option("--peers-path", type=click.Path(path_type=Path), help="Folder to look for vLLM's FlashMLA in first.")
def main(peers_path: Path | None) -> None:
    from cupy_mla.bench.peers import add_peers_path
    from cupy_mla.bench.peers.flash_mla import load_fp8

    if peers_path is not None:
        add_peers_path(peers_path)
    reason, operators = why_unsupported(), load_fp8()
    columns = {f"{compute}, emulated": (emulated, compute) for compute in COMPUTES}
    if reason is None:
        columns |= {compute: (ours, compute) for compute in COMPUTES}
    if reason is None and not isinstance(operators, str):
        columns["vllm"] = theirs, operators
    lines = []
    for kind in KINDS:
        for length in LENGTHS:
            data = make_data(kind, length, "cpu" if reason else "cuda")
            found = [measure(data, way) for measure, way in columns.values()]
            lines.append((kind, f"{length:,}", *(f"{errors.out:.1e} {errors.lse:.1e}" for errors in found)))
    print_table(("data", "tokens", *(f"{name}: out, lse" for name in columns)), lines, texts=1)
    for missing in (reason, operators):
        if isinstance(missing, str):
            click.echo(missing, err=True)


if __name__ == "__main__":
    main()
