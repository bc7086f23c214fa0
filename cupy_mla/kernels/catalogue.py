"""All kernels by name: the standard decode configurations and the kernels around them.

What ``cupy-mla compile`` prepares ahead of time, and what the tests compile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..arrays.dtypes import KERNEL_TYPES
from ..gpu.jit.source import KernelSource
from ..layouts import DENSE_LAYOUTS, LAYOUTS
from .append import USUAL_CHUNKS, append_source, chunks_of, dequantise_source, quantise_source
from .choose import FAMILIES, GATHERED_FAMILIES
from .combine import MERGE_STATES_THREADS, combine_source, gathered_combine_source, merge_states_source
from .copy_pages import UNIT_TYPES, copy_pages_source
from .exchange import EXCHANGE_THREADS, PUSH_MERGE_TYPES, PUSH_SOURCE, combine_push_source, push_merge_source
from .family import DecodeFamily, KernelConfig
from .halves import PROBE_SOURCE
from .planner import PLAN_SOURCE, PLAN_THREADS
from .slots import LOCAL_SLOTS_SOURCE, LOCAL_SLOTS_THREADS, SLOTS_SOURCE, SLOTS_THREADS


@dataclass(frozen=True, slots=True)
class NamedKernel:
    """A kernel and what its name is on the command line; ``threads`` is None where the problem decides."""

    name: str
    source: KernelSource
    threads: int | None = None
    shared_memory: int = 0


def standard_configs() -> list[KernelConfig]:
    """The standard configurations of all families."""
    return [config for family in (*FAMILIES, *GATHERED_FAMILIES) for config in family.standard_configs()]


def _forms_of_partials(family: DecodeFamily) -> Iterator[KernelConfig]:
    """The standard configurations, and the same with powers of two in partial results where some calls have these: few
    rows in a kernel of more, and shares of a sharded cache.
    """
    for config in family.standard_configs():
        yield config
        for rows, of_share in itertools.product((1, family.rows), (False, True)):
            parts = family.scale_parts(config.latent_dim, config.dtype, rows, of_share=of_share)
            if parts is not None:
                yield replace(config, float_partials=False, scale_parts=parts)


def all_kernels() -> list[NamedKernel]:
    """The standard decode configurations and the kernels around them."""
    decode = [
        NamedKernel(config.name, config.source(), config.threads, config.shared_memory) for config in standard_configs()
    ]
    sources = {
        f"{name}_{config.dtype}{config.partial_suffix}": source(config)
        for name, source, families in (
            ("combine", combine_source, FAMILIES),
            ("gathered_combine", gathered_combine_source, GATHERED_FAMILIES),
            ("combine_push", combine_push_source, FAMILIES),
        )
        for family in families
        for config in _forms_of_partials(family)
    }
    combine = [NamedKernel(name, source) for name, source in sources.items()]
    merge = [
        NamedKernel(f"merge_states_{dtype}", merge_states_source(dtype), MERGE_STATES_THREADS) for dtype in KERNEL_TYPES
    ]
    others = [
        NamedKernel("plan", PLAN_SOURCE, PLAN_THREADS),
        *(NamedKernel(f"append{end}", append_source(chunks)) for end, chunks in USUAL_CHUNKS.items()),
        *(
            NamedKernel(f"{name}_{dtype}_{layout.name}{end}", source(dtype, layout, chunks))
            for name, source in (("quantise", quantise_source), ("dequantise", dequantise_source))
            for layout in LAYOUTS.values()
            for dtype in DENSE_LAYOUTS
            if layout.dtype not in DENSE_LAYOUTS
            for end, chunks in chunks_of(layout).items()
        ),
        *(NamedKernel(f"copy_pages_{unit_bytes}", copy_pages_source(unit_bytes)) for unit_bytes in UNIT_TYPES),
        NamedKernel("slots", SLOTS_SOURCE, SLOTS_THREADS),
        NamedKernel("local_slots", LOCAL_SLOTS_SOURCE, LOCAL_SLOTS_THREADS),
        NamedKernel("push", PUSH_SOURCE, EXCHANGE_THREADS),
        *(
            NamedKernel(f"push_merge_{dtype}", push_merge_source(dtype), EXCHANGE_THREADS)
            for dtype in PUSH_MERGE_TYPES
        ),
        NamedKernel("probe_latency", PROBE_SOURCE),
    ]
    return [*decode, *combine, *merge, *others]
