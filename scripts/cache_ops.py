"""The speed of what writes, copies and converts pages of a KV cache on one Hopper GPU, beside its memory's bandwidth.

Bytes are those that must be read and written, each once. Tokens are appended in pages that lie anywhere, as those of
prompts are; "scattered", each to a place of its own, is the worst that can come. The target is 80% of the bandwidth on
large batches; one decode step's append for 128 requests is to take less than 5 us. Exits with 1 if one is missed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cupy_mla import append_tokens, copy_pages, dequantise_cache, quantise_cache
from cupy_mla.bench import time_call
from cupy_mla.bench.ceilings import published_ceilings
from cupy_mla.gpu.device import describe_device, why_unsupported
from cupy_mla.layouts import DENSE_LAYOUTS, LAYOUTS, CacheLayout
from cupy_mla.shown.tables import print_table

PAGE_SIZE, LATENT, ROPE = 64, 512, 64
LARGE_TOKENS = 1 << 20
STEP_TOKENS = 128
WANTED_SHARE, WANTED_STEP_US = 0.8, 5.0
SCALE = 0.02


@click.command(help=__doc__)
def main() -> None:
    reason = why_unsupported()
    if reason is not None:
        raise click.ClickException(f"these are timed on a Hopper GPU: {reason}")
    bandwidth = bytes_per_second()
    lines, missed = [], 0
    for name, layout in LAYOUTS.items():
        for operation, call, cold, moved in operations(layout):
            seconds = time_call(call, cold).seconds
            step = operation == "append 128"
            share = moved / seconds / bandwidth
            met = seconds * 1e6 < WANTED_STEP_US if step else share >= WANTED_SHARE
            missed += not met
            wanted = f"{WANTED_STEP_US} us" if step else f"{WANTED_SHARE:.0%}"
            figures = f"{seconds * 1e6:.1f}", f"{moved / seconds / 1e9:.0f}", f"{share:.0%}"
            lines.append((name, operation, *figures, wanted, "yes" if met else "NO"))
    print_table(("layout", "operation", "us", "GB/s", "of HBM", "wanted", "met"), lines, texts=2)
    sys.exit(1 if missed else 0)


def bytes_per_second() -> float:
    """What the memory of this GPU can move, by its maker."""
    name = describe_device(0).name
    published = published_ceilings(name)
    if published is None:
        raise click.ClickException(f"the bandwidth of {name} is not known")
    return published.read_gigabytes_per_second * 1e9


def operations(layout: CacheLayout) -> list[tuple[str, Callable[[Any], object], Any, int]]:
    """Name, call on what is cold, that, and the bytes that it must move."""
    import torch

    rope = ROPE if layout.supports(LATENT, ROPE) else 0
    width, token = LATENT + rope, layout.token_bytes(LATENT, rope)
    num_pages = LARGE_TOKENS // PAGE_SIZE
    scale = {"kv_scale": SCALE} if layout.needs_scale else {}
    named = {**scale, "layout": layout}

    def new_cache() -> Any:
        page_bytes = layout.page_bytes(PAGE_SIZE, LATENT, rope)
        memory = torch.zeros(num_pages, page_bytes, dtype=torch.uint8, device="cuda")[:, : PAGE_SIZE * token]
        dtype = getattr(torch, layout.dtype)
        return memory.unflatten(1, (PAGE_SIZE, 1, token)).view(dtype)

    cache = new_cache()
    dense = layout.dtype in DENSE_LAYOUTS
    values_type = getattr(torch, layout.dtype) if dense else torch.bfloat16
    values = torch.randn(num_pages, PAGE_SIZE, 1, width, device="cuda", dtype=values_type)
    value_bytes = width * values.element_size()
    slots = torch.randperm(LARGE_TOKENS, device="cuda")
    order = torch.randperm(num_pages, device="cuda", dtype=torch.int32)
    in_pages = (order.long()[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device="cuda")).view(-1)
    some = slots[:STEP_TOKENS].contiguous()
    other = new_cache()
    made: list[tuple[str, Callable[[Any], object], Any, int]] = [
        (
            "append 128",
            lambda rows: append_tokens(cache, rows, some, **named),
            values.view(-1, width)[:STEP_TOKENS].clone(),
            STEP_TOKENS * (token + value_bytes),
        ),
        (
            "append",
            lambda rows: append_tokens(cache, rows, in_pages, **named),
            values.view(-1, width),
            LARGE_TOKENS * (token + value_bytes),
        ),
        (
            "append scattered",
            lambda rows: append_tokens(cache, rows, slots, **named),
            values.view(-1, width),
            LARGE_TOKENS * (token + value_bytes),
        ),
        ("copy pages", lambda source: copy_pages(cache, order, source=source), other, 2 * LARGE_TOKENS * token),
    ]
    if not dense:
        moved = LARGE_TOKENS * (token + value_bytes)
        made += [
            ("quantise", lambda given: quantise_cache(cache, given, **named), values, moved),
            ("dequantise", lambda stored: dequantise_cache(stored, values, **named), other, moved),
        ]
    return made


if __name__ == "__main__":
    main()
