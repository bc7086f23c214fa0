"""Kernel configurations: from a problem to the kernel that is compiled and launched for it.

Shared memory is added up here and again in the kernels' headers; the compiler refuses a configuration whose two sums
differ (``MLA_SHARED_BYTES``).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..gpu import hopper
from ..schedule.make import choose_parts
from ..schedule.pieces import TILE_COST, TILE_TOKENS, CostModel, ceil_div
from .structs import ELEMENT_TAGS

if TYPE_CHECKING:
    from ..call.problem import DecodeProblem
    from ..gpu.jit.source import KernelSource

BOX_COLUMNS = 64  # columns of one swizzled copy-engine box: core/smem_descriptor.h, kBoxColumns

WIDE_ROWS = 64  # rows of wgmma's M
FEW_ROWS, MORE_ROWS = 16, 32  # rows of wgmma's N, the operands swapped

_NARROW_THREADS = 160  # one consumer warpgroup, one producer warp
_NARROW_CONSUMER_WARPS = 4
_NARROW_PROBABILITY_BUFFERS = 2
_WIDE_STAGES = 3
_WIDE_MAX_REGISTER_STEPS = 31
_WIDE_THREADS = 384
# Two warpgroups share the values' columns, in a width that wgmma has; a stage has one rope box, which P replaces.
_WIDE_LATENT_DIMS = (128, 256, 512)
_WIDE_ROPE_DIMS = (0, BOX_COLUMNS)
_STEP_COLUMNS = 16
_ATOM_TOKENS = 8  # rows after which the 128-byte swizzle repeats
_ELEMENT_BYTES = 2
_FLOAT_BYTES = 4
_BOX_BYTES = TILE_TOKENS * BOX_COLUMNS * _ELEMENT_BYTES
_LOADER_STATE_BYTES = 32
_WIDE_LOADER_WARPS = 4  # where a page does not hold a swizzle atom's tokens
_BARRIER_BYTES = 8
_CLAIM_BYTES = 8

_COSTS = {  # by rows
    FEW_ROWS: CostModel(piece_overhead=3 * TILE_COST // 2, split_overhead=3 * TILE_COST // 2),
    MORE_ROWS: CostModel(piece_overhead=2 * TILE_COST, split_overhead=3 * TILE_COST),
    WIDE_ROWS: CostModel(piece_overhead=4 * TILE_COST, split_overhead=5 * TILE_COST, packs=True),
}
# Partial results of so few rows are float32: no more bytes than 16 bits are for twice the rows. For 16 rows they would
# cost 0.7 to 2.3 us of 8 to 45 (1 x 4096 to 1 x 131072 tokens).
FLOAT_PARTIAL_ROWS = 4
_NARROW_COMBINE_THREADS, _WIDE_COMBINE_THREADS = 256, 640
_FLOAT_COMBINE_REGISTERS, _COMBINE_REGISTERS = 80, 96


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """One compiled form of a dense decode kernel.

    Attributes
    ----------
    kernel : str
        ``"wide"`` or ``"narrow"``: kernels_cu/decode/wide/wide.cu, narrow.cu.
    rows : int
        Query rows of a CTA.
    latent_dim, rope_dim : int
        Widths in elements.
    dtype : str
        ``"bfloat16"`` or ``"float16"``.
    page_size : int
        Tokens per page.
    causal : bool
        Whether the mask of speculative decoding is compiled in.
    float_partials : bool
        Whether partial results are float32, not of ``dtype``: decode/config.h says why.
    """

    kernel: str
    rows: int
    latent_dim: int
    rope_dim: int
    dtype: str
    page_size: int
    causal: bool
    float_partials: bool = False

    @property
    def name(self) -> str:
        """A short unique name, e.g. ``wide64_bfloat16_512+64_page64``."""
        suffix = ("_causal" if self.causal else "") + ("_float" if self.float_partials else "")
        return f"{self.kernel}{self.rows}_{self.dtype}_{self.latent_dim}+{self.rope_dim}_page{self.page_size}{suffix}"

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return _WIDE_THREADS if self.kernel == "wide" else _NARROW_THREADS

    @property
    def partial_dtype(self) -> str:
        """Type of partial results."""
        return "float32" if self.float_partials else self.dtype

    @property
    def combine_threads(self) -> int:
        """Threads of a CTA of the merge.

        An SM has four register files of 16,384. One of them holds two of the 16-row kernel's five warps, 144 registers
        a thread, and has room for two warps more: 384 threads do not fit, and cost 0.9 us at 1 x 4096 x 16 heads. The
        other kernels leave no room; after the wide one, whose merges are the largest, 640 threads fill the SM.
        """
        return _WIDE_COMBINE_THREADS if self.kernel == "wide" else _NARROW_COMBINE_THREADS

    @property
    def combine_registers(self) -> int:
        """Most registers of a thread of the merge, as a CTA of the 16-row kernel leaves room for: with float32 partial
        results it takes 176. Fewer would be spilled."""
        return _FLOAT_COMBINE_REGISTERS if self.float_partials else _COMBINE_REGISTERS

    @property
    def cost(self) -> CostModel:
        """What a piece costs besides its tiles: 64 rows of queries and of output are most of a tile's bytes again.

        Measured on an H200. 64 rows: 128 real requests, 128 heads, 103 us with 2 and 3 tiles, 92 us with 4 and 5. 32
        rows: 64 x 8192 tokens, 155 us with 1 and 2, 151 us with 2 and 3. 16 rows: a CTA ends 3.2 us later for each of
        its items, whole or not; 8 x 192 tokens take 7.7 us with 1 and 2, 6.1 us with 1.5 and 1.5, and 128 real
        requests the same with both, 1.9 us more with 1/2 and 1.
        """
        return _COSTS[self.rows]

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a tile that surely lie in one page: what one copy-engine box takes."""
        return math.gcd(self.page_size, TILE_TOKENS)

    @property
    def group_tokens(self) -> int:
        """Tokens of a chunk in one swizzle atom."""
        return min(self.chunk_tokens, _ATOM_TOKENS)

    @property
    def copies_whole_tokens(self) -> bool:
        """Whether one copy of a chunk brings all latent columns: where a stage holds whole tiles and no swizzle atom is
        shared by pages. Else one copy brings one box."""
        return self.kernel == "wide" and self.group_tokens == _ATOM_TOKENS

    @property
    def shared_memory(self) -> int:
        """Bytes of dynamic shared memory: the totals in decode/wide/smem.h and decode/narrow/smem.h."""
        return self._wide_shared_memory() if self.kernel == "wide" else self._narrow_shared_memory()

    def _wide_shared_memory(self) -> int:
        boxes = self.latent_dim // BOX_COLUMNS + max(self.rope_dim // BOX_COLUMNS, 1)
        steps = (self.latent_dim + self.rope_dim) // _STEP_COLUMNS
        shared_steps = max(steps - _WIDE_MAX_REGISTER_STEPS, 0)
        ring = _WIDE_STAGES * boxes * _BOX_BYTES
        query = shared_steps * self.rows * _STEP_COLUMNS * _ELEMENT_BYTES
        factors = _WIDE_STAGES * self.rows * _FLOAT_BYTES
        barriers = 3 * _WIDE_STAGES * _BARRIER_BYTES
        loader_warps = 1 if self.copies_whole_tokens else _WIDE_LOADER_WARPS
        return ring + query + factors + loader_warps * _LOADER_STATE_BYTES + barriers + _CLAIM_BYTES

    def _narrow_shared_memory(self) -> int:
        row_box = self.rows * BOX_COLUMNS * _ELEMENT_BYTES
        boxes = (self.latent_dim + self.rope_dim) // BOX_COLUMNS
        exchange = _NARROW_CONSUMER_WARPS * self.rows * _FLOAT_BYTES
        fixed = (boxes + _NARROW_PROBABILITY_BUFFERS) * row_box + exchange + _CLAIM_BYTES
        slot = _BOX_BYTES + 2 * _BARRIER_BYTES
        # As many KV boxes as fit beside a CTA of the merge.
        return fixed + (hopper.MAX_SHARED_BYTES - hopper.CTA_SHARED_BYTES - fixed) // slot * slot

    def source(self) -> KernelSource:
        """What the run-time compiler is given."""
        from ..gpu.jit.source import KernelSource

        return KernelSource(
            entry=f"decode/{self.kernel}/{self.kernel}.cu",
            function=f"mla_decode_{self.kernel}",
            defines=(
                ("MLA_DTYPE", ELEMENT_TAGS[self.dtype]),
                ("MLA_LATENT", str(self.latent_dim)),
                ("MLA_ROPE", str(self.rope_dim)),
                ("MLA_PAGE_SIZE", str(self.page_size)),
                ("MLA_CAUSAL", str(int(self.causal))),
                ("MLA_ROWS", str(self.rows)),
                ("MLA_FLOAT_PARTIALS", str(int(self.float_partials))),
                ("MLA_SHARED_BYTES", str(self.shared_memory)),
            ),
        )


def choose_config(
    problem: DecodeProblem,
    num_sms: int,
    max_seqlen_k: int | None = None,
    fixed_split_tokens: int | None = None,
) -> KernelConfig:
    """The configuration that serves a problem: the one that should take the least time.

    Rows are the query heads and tokens that share a kv head. With a fixed split, which promises the same bits in any
    batch, they alone decide; of ragged queries those of one token, as how many tokens a request has, on average or at
    most, depends on the batch. A mask is compiled in only where it can hide anything: one query token sees every key.
    Widths that the wide kernel is not made for are left to the narrow one.

    Parameters
    ----------
    problem
        Shapes and settings.
    num_sms
        Multiprocessors of the GPU.
    max_seqlen_k
        Largest length there will be, in tokens; None: what the block table can hold.
    fixed_split_tokens
        The fixed split, if there is one.
    """
    fits_wide = problem.latent_dim in _WIDE_LATENT_DIMS and problem.rope_dim in _WIDE_ROPE_DIMS
    kernels = [kernel for kernel in _KERNEL_TIMES if fits_wide or kernel[0] != "wide"]
    if fixed_split_tokens is not None:
        rows = problem.group_heads * (1 if problem.ragged else problem.seqlen_q)
        kernel = next((kernel for kernel in kernels if rows <= kernel[1]), kernels[-1])
    else:
        tokens = ceil_div(problem.total_q, max(problem.batch, 1))  # of a request, on average when ragged
        if problem.seqlen_q <= 2 * tokens:  # else the longest request is an exception, or its length is not known
            tokens = problem.seqlen_q
        rows = problem.group_heads * tokens
        tokens_k = problem.max_seqlen_k if max_seqlen_k is None else min(max_seqlen_k, problem.max_seqlen_k)
        requests = problem.batch * problem.num_heads_kv
        kernel = min(kernels, key=lambda kernel: _estimate_time(kernel, rows, requests, tokens_k, num_sms))
    return KernelConfig(
        kernel=kernel[0],
        rows=kernel[1],
        latent_dim=problem.latent_dim,
        rope_dim=problem.rope_dim,
        dtype=problem.dtype,
        page_size=problem.page_size,
        causal=problem.causal and problem.seqlen_q > 1,
        float_partials=kernel[1] == FEW_ROWS and rows <= FLOAT_PARTIAL_ROWS,
    )


@dataclass(frozen=True, slots=True)
class _KernelTimes:
    """Microseconds of a call with nothing to do, of a merge, and, on the SM that has most of them, of each KV tile and
    of each item after the first."""

    start: float
    tile: float
    item: float
    merge: float


# Fitted to batches of 1 to 64 on an H200, from 64 to 131,072 tokens (kernels_cu/DESIGN.md has the table). Few rows a
# CTA: many CTAs, each soon done, for a small batch; many rows a CTA: the cache is read fewer times, for a large one.
_KERNEL_TIMES = {
    ("narrow", FEW_ROWS): _KernelTimes(start=5.0, tile=1.36, item=3.4, merge=0.9),
    ("narrow", MORE_ROWS): _KernelTimes(start=6.9, tile=1.55, item=5.6, merge=2.1),
    ("wide", WIDE_ROWS): _KernelTimes(start=8.5, tile=1.7, item=8.3, merge=5.5),
}


def _estimate_time(kernel: tuple[str, int], rows: int, requests: int, tokens_k: int, num_sms: int) -> float:
    """About how long a decode takes in which all requests are as long as the longest may be, whole or cut."""
    times = _KERNEL_TIMES[kernel]
    row_blocks = ceil_div(rows, kernel[1])
    blocks_per_job, num_parts = choose_parts(num_sms, row_blocks)
    jobs = requests * ceil_div(row_blocks, blocks_per_job)
    tiles = ceil_div(tokens_k, TILE_TOKENS)
    items = ceil_div(jobs, num_parts)
    whole = times.tile * items * tiles
    cut = times.tile * ceil_div(jobs * tiles, num_parts) + times.merge
    return times.start + times.item * max(items - 1, 0) + min(whole, cut)


# What the models in use need: (latent, rope) of DeepSeek V2/V3/R1 and Kimi K2, without rope, and a small MLA.
STANDARD_DIMS = ((512, 64), (512, 0), (256, 64))
STANDARD_DTYPES = ("bfloat16", "float16")
STANDARD_PAGE_SIZES = (16, 32, 64, 128)


def standard_configs() -> list[KernelConfig]:
    """The configurations that `cupy-mla compile` prepares ahead of time and the tests compile."""
    kernels = [
        ("wide", WIDE_ROWS, False),
        ("narrow", FEW_ROWS, False),
        ("narrow", FEW_ROWS, True),
        ("narrow", MORE_ROWS, False),
    ]
    return [
        KernelConfig(kernel, rows, latent, rope, dtype, page_size, causal, float_partials)
        for (kernel, rows, float_partials), (latent, rope), dtype, page_size, causal in itertools.product(
            kernels, STANDARD_DIMS, STANDARD_DTYPES, STANDARD_PAGE_SIZES, (False, True)
        )
    ]
