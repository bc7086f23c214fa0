"""Every kernel compiles for sm_90a into code without spills, stack frames, serialised wgmma or any other warning.

Needs the NVRTC library, no GPU. Cubins come from the cache where it has them: their digest covers every source file, so
a kept report is as good as a new one.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace

import pytest

from cupy_mla.gpu import hopper
from cupy_mla.gpu.jit import compiler
from cupy_mla.gpu.jit.compiler import CompiledKernel
from cupy_mla.gpu.jit.module import get_cubin
from cupy_mla.gpu.jit.source import kernels_root
from cupy_mla.kernels.catalogue import all_kernels, standard_configs
from cupy_mla.kernels.choose import FAMILIES
from cupy_mla.kernels.combine import combine_source, gathered_combine_source
from cupy_mla.kernels.family import ColumnParts, KernelConfig
from cupy_mla.kernels.fp8 import FP8_EXACT64, FP8_SPLIT64
from cupy_mla.kernels.gathered import GATHERED_WIDE64, GatheredConfig
from cupy_mla.kernels.gathered_fp8 import GATHERED_FP8_NARROW16, GATHERED_FP8_NARROW32
from cupy_mla.kernels.gathered_fp8_wide import GATHERED_FP8_WIDE64
from cupy_mla.kernels.gathered_narrow import GATHERED_NARROW16, GATHERED_NARROW32
from cupy_mla.kernels.narrow import NARROW16, NARROW32
from cupy_mla.kernels.token_pages import TOKEN_PAGES_NARROW16, TOKEN_PAGES_NARROW32, TOKEN_PAGES_WIDE64
from cupy_mla.kernels.wide import WIDE64
from cupy_mla.layouts import FP8_DS_MLA, FP8_E4M3
from cupy_mla.schedule.pieces import ceil_div

needs_nvrtc = pytest.mark.skipif(
    compiler.why_unavailable() is not None, reason=f"no compiler: {compiler.why_unavailable()}"
)

# What a GPU compiles when it meets them: the ends of what `describe_decode` lets pass.
OTHER_CONFIGS: list[KernelConfig] = [
    KernelConfig(family, latent, rope, "bfloat16", 64, True)
    for family, latent, rope in (
        (WIDE64, 128, 64),
        (WIDE64, 256, 0),
        (NARROW16, 64, 0),
        (NARROW16, 512, 512),
        (NARROW32, 64, 960),
        (NARROW32, 384, 64),
        (NARROW32, 512, 512),
    )
]
# The same of gathered tokens, with pages that have gaps between them.
OTHER_CONFIGS += [
    GatheredConfig(family, latent, rope, "bfloat16", page_size, causal=False, planned=planned)
    for family, latent, rope, page_size, planned in (
        (GATHERED_NARROW16, 512, 64, 61, True),
        (GATHERED_NARROW16, 64, 0, 1, False),
        (GATHERED_NARROW16, 512, 256, 64, True),
        (GATHERED_NARROW32, 384, 64, 2, False),
        (GATHERED_NARROW32, 64, 0, 61, False),
        (GATHERED_NARROW32, 512, 128, 1, False),
        (GATHERED_NARROW32, 512, 128, 256, True),
    )
]
# Few rows of bf16 in the kernels of more, which are given them where they are asked for by name.
OTHER_CONFIGS += [
    KernelConfig(NARROW32, 512, 64, "bfloat16", 64, True, refined=True),
    KernelConfig(WIDE64, 512, 64, "bfloat16", 64, False, scale_parts=ColumnParts(256, 2), refined=True),
    KernelConfig(WIDE64, 512, 0, "bfloat16", 16, True, scale_parts=ColumnParts(256, 2), refined=True),
    KernelConfig(WIDE64, 512, 64, "bfloat16", 64, True, scale_parts=ColumnParts(256, 2), refined=True),
    GatheredConfig(GATHERED_NARROW32, 512, 64, "bfloat16", 1, causal=False, planned=False, refined=True),
    GatheredConfig(GATHERED_WIDE64, 512, 64, "bfloat16", 1, causal=False, planned=False, refined=True),
    GatheredConfig(GATHERED_WIDE64, 512, 0, "bfloat16", 64, causal=False, planned=False, refined=True),
    GatheredConfig(GATHERED_WIDE64, 256, 0, "float16", 61, causal=False, planned=False),
    GatheredConfig(GATHERED_WIDE64, 128, 0, "bfloat16", 1, causal=False, planned=False),
    GatheredConfig(
        GATHERED_WIDE64, 512, 64, "bfloat16", 1, causal=False, scale_parts=ColumnParts(256, 2), refined=True
    ),
    GatheredConfig(
        *(GATHERED_WIDE64, 512, 64, "bfloat16", 1),
        causal=True,
        scale_parts=ColumnParts(256, 2),
        refined=True,
        by_request=True,
    ),
]
# Query tokens that clusters share.
OTHER_CONFIGS += [
    GatheredConfig(family, latent, rope, dtype, page_size, causal=False, planned=False, clustered=True, refined=refined)
    for family, latent, rope, dtype, page_size, refined in (
        (GATHERED_NARROW16, 64, 0, "bfloat16", 1, True),
        (GATHERED_NARROW16, 512, 256, "float16", 64, False),
        (GATHERED_NARROW32, 384, 64, "bfloat16", 2, True),
        (GATHERED_NARROW32, 512, 128, "float16", 256, False),
        (GATHERED_WIDE64, 512, 64, "bfloat16", 61, False),
        (GATHERED_WIDE64, 512, 0, "float16", 64, False),
        (GATHERED_WIDE64, 128, 64, "float16", 1, False),
        (GATHERED_WIDE64, 256, 0, "bfloat16", 61, False),
        (GATHERED_WIDE64, 128, 0, "bfloat16", 1, False),
    )
]
# FP8 caches of other widths and with gaps between pages.
OTHER_CONFIGS += [
    GatheredConfig(family, latent, rope, "bfloat16", page_size, causal=False, planned=planned, layout=layout)
    for family, layout, latent, rope, page_size, planned in (
        (GATHERED_FP8_NARROW16, FP8_E4M3, 64, 0, 61, True),
        (GATHERED_FP8_NARROW16, FP8_E4M3, 512, 128, 1, False),
        (GATHERED_FP8_NARROW32, FP8_E4M3, 320, 64, 2, True),
        (GATHERED_FP8_NARROW32, FP8_E4M3, 512, 128, 1, True),
        (GATHERED_FP8_NARROW32, FP8_DS_MLA, 512, 64, 69, True),
        (GATHERED_FP8_WIDE64, FP8_E4M3, 512, 64, 61, True),
        (GATHERED_FP8_WIDE64, FP8_E4M3, 512, 0, 1, False),
        (GATHERED_FP8_WIDE64, FP8_DS_MLA, 512, 64, 69, True),
    )
]
# Few rows in the wide kernels, which are chosen by name alone: partial results with powers of two.
SCALED_CONFIGS: list[KernelConfig] = [
    *(
        KernelConfig(WIDE64, latent, 64, "bfloat16", 64, causal, scale_parts=WIDE64.scale_parts(latent, "bfloat16", 8))
        for latent, causal in ((512, False), (512, True), (256, False), (128, True))
    ),
    GatheredConfig(
        GATHERED_WIDE64, 512, 64, "bfloat16", 1, causal=False, scale_parts=WIDE64.scale_parts(512, "bfloat16", 8)
    ),
    GatheredConfig(
        *(GATHERED_FP8_WIDE64, 512, 64, "bfloat16", 1),
        causal=False,
        scale_parts=WIDE64.scale_parts(512, "bfloat16", 8),
        layout=FP8_DS_MLA,
    ),
]
OTHER_CONFIGS += SCALED_CONFIGS
# Masks that go by places in whole requests, of which the cache has a shard: in every kernel of dense decode.
OTHER_CONFIGS += [
    replace(
        next(config for config in family.standard_configs() if config.causal),
        scale_parts=family.scale_parts(512, "bfloat16", family.rows, of_share=True),
        sharded=True,
    )
    for family in FAMILIES
]
# Of many rows in the wide kernel, other widths and masks than the standard ones.
OTHER_CONFIGS += [
    KernelConfig(
        *(WIDE64, latent, rope, "bfloat16", page_size, causal),
        scale_parts=WIDE64.scale_parts(latent, "bfloat16", 64, of_share=sharded),
        sharded=sharded,
    )
    for latent, rope, page_size, causal, sharded in (
        (128, 64, 64, True, False),
        (128, 0, 16, False, False),
        (256, 0, 64, True, False),
        (512, 64, 1, False, False),
        (512, 64, 2, True, True),
        (512, 64, 64, True, True),
        (512, 0, 64, True, True),
        (512, 64, 16, True, True),
    )
]
# These have no register to spare.
OTHER_CONFIGS += [
    KernelConfig(WIDE64, 512, 64, "bfloat16", 64, True, sharded=True),
    KernelConfig(WIDE64, 512, 64, "bfloat16", 64, True, scale_parts=ColumnParts(256, 2), refined=True, sharded=True),
    KernelConfig(FP8_SPLIT64, 512, 64, "bfloat16", 64, True, sharded=True),
    *(
        KernelConfig(FP8_EXACT64, latent, rope, "bfloat16", page_size, True, sharded=sharded, two_scales=rope > 0)
        for latent, rope, page_size, sharded in (
            (512, 0, 128, False),
            (512, 64, 16, False),
            (512, 64, 64, True),
            (256, 64, 64, True),
            (256, 0, 32, False),
        )
    ),
]
# What the narrow kernels have of a shard: partial results with powers of two.
SHARE_CONFIGS = [
    KernelConfig(
        *(family, latent, rope, "bfloat16", page_size, causal),
        scale_parts=family.scale_parts(latent, "bfloat16", 16, of_share=True),
        refined=refined,
        sharded=causal,
    )
    for family in (NARROW16, NARROW32)
    for latent, rope, page_size in ((512, 64, 64), (512, 0, 16), (256, 64, 128), (64, 0, 64), (512, 512, 64))
    for causal, refined in ((False, False), (True, False), (False, True), (True, True))
]
OTHER_CONFIGS += SHARE_CONFIGS
# The same of chosen tokens of 16 bits, and of dense decode by the kernels that gather them.
OTHER_CONFIGS += [
    GatheredConfig(
        *(family, 512, rope, "bfloat16", page_size),
        causal=by_request,
        scale_parts=family.scale_parts(512, "bfloat16", 64, of_share=True),
        refined=rope == 0,
        by_request=by_request,
        sharded=by_request,
    )
    for families, rope, page_size, by_request in (
        ((GATHERED_NARROW16, GATHERED_NARROW32, GATHERED_WIDE64), 64, 1, False),
        ((GATHERED_NARROW16, GATHERED_NARROW32, GATHERED_WIDE64), 0, 64, False),
        ((TOKEN_PAGES_NARROW16, TOKEN_PAGES_NARROW32, TOKEN_PAGES_WIDE64), 64, 1, True),
    )
    for family in families
]
STANDARD = {config.name: config for config in standard_configs()}
SOURCES = {kernel.name: kernel.source for kernel in all_kernels()} | {c.name: c.source() for c in OTHER_CONFIGS}
SOURCES |= {f"combine of {c.name}": combine_source(c) for c in (*SCALED_CONFIGS[1:3], *SHARE_CONFIGS[:1])}
SOURCES |= {f"combine of {c.name}": gathered_combine_source(c) for c in SCALED_CONFIGS[-1:]}


@pytest.fixture(scope="module")
def compilations() -> Iterator[Mapping[str, Future[CompiledKernel]]]:
    """All compilations, under way. In processes: NVRTC takes one program at a time in each."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield {name: pool.submit(get_cubin, source) for name, source in SOURCES.items()}
        pool.shutdown(cancel_futures=True)


@needs_nvrtc
@pytest.mark.parametrize("name", SOURCES)
def test_kernel_compiles_cleanly(name: str, compilations: Mapping[str, Future[CompiledKernel]]) -> None:
    kernel = compilations[name].result()
    assert kernel.problems == ()
    assert kernel.warnings == ()
    if config := STANDARD.get(name):
        of_thread = ceil_div(kernel.usage.registers, hopper.REGISTER_UNIT) * hopper.REGISTER_UNIT
        assert of_thread * config.threads <= config.registers


def test_every_standard_configuration_is_compiled() -> None:
    assert {config.source() for config in standard_configs()} <= set(SOURCES.values())


def test_every_kernel_file_is_compiled() -> None:
    """A kernel file that nothing here names would be compiled by nobody before a user's GPU does."""
    files = {path.relative_to(kernels_root()).as_posix() for path in kernels_root().rglob("*.cu")}
    assert files == {source.entry for source in SOURCES.values()}


@needs_nvrtc
@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if "combine" in source.entry])
def test_the_compiler_has_no_say_in_the_roundings_of_a_merge(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No product and sum become an fma by its choice, which was another for one octet a lane than for two, and how many
    there are depends on the batch.
    """
    read, options = compiler._read, compiler.compile_options
    monkeypatch.setattr(compiler, "_read", lambda *given: read(*given[:2], "PTX" if given[2] == "CUBIN" else given[2]))

    def ptx(may_fuse: bool) -> str:
        option = f"--fmad={str(may_fuse).lower()}"
        monkeypatch.setattr(compiler, "compile_options", lambda source: (*options(source), option))
        return compiler.compile_source(SOURCES[name]).cubin.decode()

    fused = ptx(True)
    assert "fma.rn.f32" in fused
    assert fused.replace(".rn", "") == ptx(False).replace(".rn", "")
    products = set(re.findall(r"mul\.f32\s+(%f\d+),", fused))  # what the assembler may still fuse
    terms = set(re.findall(r"%f\d+", " ".join(re.findall(r"(?:add|sub)\.f32\s+%f\d+, ([^;]+);", fused))))
    assert products
    assert not products & terms
