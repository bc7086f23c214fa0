"""The kernel for e4m3 caches: 16 or 32 query rows a CTA, operands swapped (kernels_cu/decode/fp8)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..call.options import AUTO, EXACT, SPLIT
from ..call.problem import DecodeProblem
from ..gpu.hopper import WARPGROUP_THREADS
from ..layouts import FP8_E4M3
from ..schedule.pieces import TILE_COST, TILE_TOKENS, PieceCosts
from .cost import CostModel
from .family import (
    ATOM_TOKENS,
    BARRIER_BYTES,
    BOX_COLUMNS,
    CLAIM_BYTES,
    ELEMENT_BYTES,
    FLOAT_BYTES,
    STANDARD_DIMS,
    STANDARD_PAGE_SIZES,
    DecodeFamily,
    KernelConfig,
    Role,
)
from .structs import FP8_PARAMS

if TYPE_CHECKING:
    from ..call.sparse_problem import SparseProblem

_REGISTERS = {16: (152, 160, 40), 32: (200, 144, 24)}  # by rows: of the scores, values and loader roles
# Two warpgroups share the values' columns in boxes of 128; the rope columns are one row of the 64-byte swizzle.
_LATENT_DIMS = (256, 512)
_ROPE_DIMS = (0, 64)
_STAGES = 5
_PROBABILITY_BUFFERS = {16: 4, 32: 2}  # by rows
_SCORES_WARPS = 4
_FLAG_BYTES = 4
_FLOAT_PARTIAL_ROWS = 4  # as of the narrow kernel
_COMBINE_THREADS = 256


@dataclass(frozen=True, slots=True)
class Fp8Family(DecodeFamily):
    """The family of the fp8 kernel for one number of rows and one way to compute.

    Attributes
    ----------
    compute : str
        ``"split"`` or ``"exact"``, as in `cupy_mla.mla_decode`.
    """

    compute: str

    def why_unsupported(self, problem: DecodeProblem | SparseProblem) -> str | None:
        """Other layouts, ways to compute, widths, and pages that share a swizzle atom."""
        queries = problem.queries
        if problem.layout is not FP8_E4M3 or not isinstance(problem, DecodeProblem):
            return f"takes caches of {FP8_E4M3.name}, not {problem.layout.name}"
        if problem.compute not in (AUTO, self.compute):
            return f"computes {self.compute}, not {problem.compute}"
        if queries.latent_dim not in _LATENT_DIMS:
            return f"takes latent widths of {_LATENT_DIMS}, not {queries.latent_dim}"
        if queries.rope_dim not in _ROPE_DIMS:
            return f"takes rope widths of {_ROPE_DIMS}, not {queries.rope_dim}"
        if problem.keys.page_size % ATOM_TOKENS:
            return f"takes page sizes that are multiples of {ATOM_TOKENS}, not {problem.keys.page_size}"
        return None

    @property
    def params(self) -> np.dtype[np.void]:
        """Fp8Params of decode/fp8/params.h."""
        return FP8_PARAMS

    def roles(self, config: KernelConfig) -> tuple[Role, ...]:
        """One warpgroup for the scores, two for the values, one of which a warp loads tiles."""
        scores, values, loader = _REGISTERS[self.rows]
        return (
            Role("scores", WARPGROUP_THREADS, scores),
            Role("values", 2 * WARPGROUP_THREADS, values),
            Role("loader", WARPGROUP_THREADS, loader),
        )

    def copies_whole_tokens(self, config: KernelConfig) -> bool:
        """Always."""
        return True

    def has_float_partials(self, rows: int) -> bool:
        """For few rows, as the narrow kernel."""
        return self.rows == BOX_COLUMNS // 4 and rows <= _FLOAT_PARTIAL_ROWS

    def defines(self, config: KernelConfig) -> tuple[tuple[str, str], ...]:
        """The macros of decode/config.h and decode/fp8/schedule.h."""
        own = (*FP8_E4M3.defines, ("MLA_SPLIT_QUERY", str(int(self.compute == SPLIT))))
        return (*DecodeFamily.defines(self, config), *own)

    def shared_memory(self, config: KernelConfig) -> int:
        """The total of decode/fp8/smem.h."""
        width = config.latent_dim + config.rope_dim
        buffers = _PROBABILITY_BUFFERS[self.rows]
        tiles = _STAGES * TILE_TOKENS * width
        query = self.rows * width * ELEMENT_BYTES
        probabilities = buffers * self.rows * BOX_COLUMNS * ELEMENT_BYTES
        # Of each row: a value of each scores warp, factors of each P, the factor of Q, the inverse of the sum.
        floats = (_SCORES_WARPS + buffers + 2) * self.rows * FLOAT_BYTES
        barriers = 2 * (_STAGES + buffers + 1) * BARRIER_BYTES
        return tiles + query + probabilities + floats + barriers + buffers * _FLAG_BYTES + CLAIM_BYTES

    def standard_configs(self) -> list[KernelConfig]:
        """All pages and widths for the split kernel, which is chosen unasked; DeepSeek's width in pages of 64 else."""
        dims, page_sizes = (STANDARD_DIMS, STANDARD_PAGE_SIZES) if self.compute == SPLIT else (STANDARD_DIMS[:1], (64,))
        partials = (False, True) if self.has_float_partials(1) else (False,)
        return [
            KernelConfig(self, latent, rope, dtype, page_size, causal, float_partials)
            for float_partials, (latent, rope), dtype, page_size, causal in itertools.product(
                partials, dims, FP8_E4M3.query_dtypes, page_sizes, (False, True)
            )
        ]


def _family(rows: int, compute: str, cost: CostModel) -> Fp8Family:
    return Fp8Family(
        name=f"fp8_{compute}{rows}",
        entry="decode/fp8/fp8.cu",
        function="mla_decode_fp8",
        rows=rows,
        cost=cost,
        combine_threads=_COMBINE_THREADS,
        compute=compute,
    )


# Tiles: 128 x 8192 tokens on an H200, 148, 157, 173 and 189 us with burst clocks, 128 tiles a CTA. The rest is that of
# the narrow kernel.
_PIECES16 = PieceCosts(piece_overhead=3 * TILE_COST // 2, split_overhead=3 * TILE_COST // 2)
_PIECES32 = PieceCosts(piece_overhead=2 * TILE_COST, split_overhead=3 * TILE_COST)
FP8_SPLIT16 = _family(16, SPLIT, CostModel(start=5.5, tile=1.14, item=3.4, merge=0.9, pieces=_PIECES16))
FP8_EXACT16 = _family(16, EXACT, CostModel(start=5.5, tile=1.21, item=3.4, merge=0.9, pieces=_PIECES16))
FP8_SPLIT32 = _family(32, SPLIT, CostModel(start=7.0, tile=1.33, item=5.6, merge=2.1, pieces=_PIECES32))
FP8_EXACT32 = _family(32, EXACT, CostModel(start=7.0, tile=1.46, item=5.6, merge=2.1, pieces=_PIECES32))
