"""The kernels for e4m3 caches: 16 or 32 query rows a CTA, operands swapped, or 64 (kernels_cu/decode/fp8)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..call.options import AUTO, EXACT, FP8, SPLIT
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
    FEWEST_ROWS,
    FLOAT_BYTES,
    FLOAT_PARTIAL_ROWS,
    STANDARD_DIMS,
    STANDARD_PAGE_SIZES,
    DecodeFamily,
    KernelConfig,
    Role,
)
from .structs import FP8_PARAMS

if TYPE_CHECKING:
    from ..call.sparse_problem import SparseProblem

_NAMES = {SPLIT: "split", EXACT: "exact", FP8: "query"}  # by way to compute
# Of the scores, values and loader roles, by rows, and where a values thread has more than 64 accumulators.
_REGISTERS = {16: (152, 112, 40), 32: (200, 144, 24), 64: (200, 144, 24)}
_MANY_ACCUMULATORS = (136, 176, 24)
_TURNS = (128, 96, 32)  # where two scores warpgroups take turns
_WIDE_ROWS = 64
# Two warpgroups share the values' columns in boxes of 128; the rope columns are one row of the 64-byte swizzle.
_LATENT_DIMS = (256, 512)
_ROPE_DIMS = (0, 64)
_STAGES = 5
_WIDE_STAGES = {1: 4, 2: 3}  # at 64 rows, by parts of Q
_PROBABILITY_BUFFERS = {16: 4, 32: 2, 64: 2}  # by rows
_TURN_BUFFERS = 2
_SHORT_PARTS = 2
_HANDED_VALUES = 5  # of a row, from one to the other, for each of two items
_SCORES_WARPS = 4
_FLAG_BYTES = 4
_COMBINE_THREADS = 256
# As many as fit beside a CTA of 16 rows. Few rows in few pieces of several tiles are merged sooner so
# (kernels_cu/TRIED_FP8_ROWS16.md).
_BESIDE_THREADS, _FEW_ROWS, _FEW_PIECES = 128, 256, 64
_WIDE_COMBINE_THREADS = 640  # as of the wide kernel for 16-bit caches: none fits beside it


@dataclass(frozen=True, slots=True)
class Fp8Family(DecodeFamily):
    """The family of the fp8 kernel for one number of rows and one way to compute.

    Attributes
    ----------
    compute : str
        ``"split"``, ``"exact"`` or ``"fp8"``, as in `cupy_mla.mla_decode`.
    scores_warpgroups : int
        1, or 2 that take tiles in turn.
    """

    compute: str
    scores_warpgroups: int = 1

    def why_unsupported(self, problem: DecodeProblem | SparseProblem) -> str | None:
        """Other layouts, ways to compute, widths, and pages that share a swizzle atom."""
        queries = problem.queries
        if problem.layout is not FP8_E4M3 or not isinstance(problem, DecodeProblem):
            return f"takes caches of {FP8_E4M3.name}, not {problem.layout.name}"
        if problem.compute != self.compute and (problem.compute != AUTO or self.compute == FP8):
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
        """One or two warpgroups for the scores, two for the values; a warp of the last loads tiles."""
        many = self.rows == _WIDE_ROWS and config.latent_dim > _LATENT_DIMS[0]
        scores, values, loader = _MANY_ACCUMULATORS if many else _TURNS if self._takes_turns else _REGISTERS[self.rows]
        return (
            Role("scores", self.scores_warpgroups * WARPGROUP_THREADS, scores),
            Role("values", 2 * WARPGROUP_THREADS, values),
            Role("loader", WARPGROUP_THREADS, loader),
        )

    @property
    def _takes_turns(self) -> bool:
        return self.scores_warpgroups > 1

    def copies_whole_tokens(self, config: KernelConfig) -> bool:
        """Always."""
        return True

    @property
    def tile_parts(self) -> int:
        """Two where calls are short."""
        return _SHORT_PARTS if self._is_short else 1

    @property
    def _is_short(self) -> bool:
        """Whether it is the kernel of short calls."""
        return self.rows == FEWEST_ROWS and self.compute == EXACT and not self._takes_turns

    def has_float_partials(self, rows: int) -> bool:
        """For few rows, as the narrow kernel."""
        return self.rows == FEWEST_ROWS and rows <= FLOAT_PARTIAL_ROWS

    def combine_shape(self, num_sms: int, rows: int, pieces: int, tiles: int) -> tuple[int, int]:
        """Of few rows, after the kernel of 16, CTAs that fit beside its own, if it takes long enough for that."""
        is_narrow = self.rows == FEWEST_ROWS and not self._takes_turns
        is_beside = is_narrow and tiles > 1 and rows <= _FEW_ROWS and pieces <= _FEW_PIECES
        return num_sms, _BESIDE_THREADS if is_beside else self.combine_threads

    def refines(self, dtype: str, rows: int) -> bool:
        """Never: probabilities are fp16."""
        return False

    def for_two_scales(self, config: KernelConfig) -> KernelConfig:
        """Where all is exact, two scales have kernels of their own."""
        return replace(config, two_scales=self.compute == EXACT and config.rope_dim > 0)

    def defines(self, config: KernelConfig) -> tuple[tuple[str, str], ...]:
        """The macros of decode/config.h and decode/fp8/schedule.h."""
        own = (
            *FP8_E4M3.defines,
            ("MLA_SPLIT_QUERY", str(int(self.compute != EXACT))),
            ("MLA_QUERY_PARTS", str(self._query_parts)),
            ("MLA_SCORES_WARPGROUPS", str(self.scores_warpgroups)),
            *((("MLA_TWO_SCALES", "1"),) if config.two_scales else ()),
        )
        return (*DecodeFamily.defines(self, config), *own)

    @property
    def _query_parts(self) -> int:
        """Queries are a sum of so many e4m3 values."""
        return 1 if self.compute == FP8 else 2

    def shared_memory(self, config: KernelConfig) -> int:
        """The total of decode/fp8/smem.h."""
        width = config.latent_dim + config.rope_dim
        wide = self.rows == _WIDE_ROWS
        buffers = _TURN_BUFFERS if self._takes_turns else _PROBABILITY_BUFFERS[self.rows]
        sums = self.scores_warpgroups  # places of them
        stages = _WIDE_STAGES[self._query_parts] if wide else _STAGES
        tiles = stages * TILE_TOKENS * width
        query = self.rows * width * (self._query_parts if wide else ELEMENT_BYTES)
        probabilities = buffers * self.rows * BOX_COLUMNS * ELEMENT_BYTES
        # Of each row: a value of each scores warp where they share rows (and its maximum, where no registers are left
        # for it), factors of each P, the factor of Q, the inverse sum; of turns the maximum, and what is handed over.
        shares = not wide or self.compute == EXACT
        row_floats = _SCORES_WARPS * (shares * self.scores_warpgroups + (shares and wide)) + buffers + 1 + sums
        barriers = stages * (self.tile_parts + 1) + 2 * (buffers + sums)
        if self._takes_turns:
            row_floats += 1 + sums * _HANDED_VALUES
            barriers += self.scores_warpgroups
        votes = self.compute != EXACT or self._is_short
        flags = _FLAG_BYTES * (buffers * (1 if shares else _SCORES_WARPS) + votes)
        floats = row_floats * self.rows * FLOAT_BYTES
        return tiles + query + probabilities + floats + barriers * BARRIER_BYTES + flags + CLAIM_BYTES

    def standard_configs(self) -> list[KernelConfig]:
        """All pages and widths for the split kernel, which is chosen unasked; DeepSeek's width in pages of 64 else."""
        dims, page_sizes = (STANDARD_DIMS, STANDARD_PAGE_SIZES) if self.compute == SPLIT else (STANDARD_DIMS[:1], (64,))
        partials = (False, True) if self.has_float_partials(1) else (False,)
        scales = (False, True) if self.compute == EXACT else (False,)
        return [
            KernelConfig(self, latent, rope, dtype, page_size, causal, float_partials, two_scales=two_scales)
            for two_scales, float_partials, (latent, rope), dtype, page_size, causal in itertools.product(
                scales, partials, dims, FP8_E4M3.query_dtypes, page_sizes, (False, True)
            )
        ]


def _family(rows: int, compute: str, cost: CostModel, scores_warpgroups: int = 1) -> Fp8Family:
    form = "" if rows < _WIDE_ROWS else "_wide_exact" if compute == EXACT else "_wide"
    return Fp8Family(
        name=f"fp8_{_NAMES[compute] if scores_warpgroups == 1 else 'turns'}{rows}",
        entry=f"decode/fp8/{form.lstrip('_') or 'fp8'}.cu",
        function=f"mla_decode_fp8{form}",
        rows=rows,
        cost=cost,
        combine_threads=_WIDE_COMBINE_THREADS if rows == _WIDE_ROWS else _COMBINE_THREADS,
        compute=compute,
        scores_warpgroups=scores_warpgroups,
    )


# Fitted to 72 cases on an H200, so that the best of the kernels that were measured is taken
# (kernels_cu/TRIED_FP8_ROWS16.md, "The choice"); with rounded queries as an earlier form of split ones.
_PIECES16 = PieceCosts(piece_overhead=3 * TILE_COST // 2, split_overhead=3 * TILE_COST // 2)
_PIECES32 = PieceCosts(piece_overhead=2 * TILE_COST, split_overhead=3 * TILE_COST)
_PIECES64 = PieceCosts(piece_overhead=4 * TILE_COST, split_overhead=5 * TILE_COST, packs=True)
FP8_SPLIT16 = _family(16, SPLIT, CostModel(start=3.9, tile=0.85, item=2.7, merge=2.1, pieces=_PIECES16))
FP8_EXACT16 = _family(16, EXACT, CostModel(start=3.2, tile=1.3, item=2.5, merge=2.2, pieces=_PIECES16))
FP8_TURNS16 = _family(16, EXACT, CostModel(start=3.9, tile=1.16, item=3.1, merge=1.8, pieces=_PIECES16), 2)
FP8_SPLIT32 = _family(32, SPLIT, CostModel(start=6.6, tile=1.36, item=3.6, merge=2.2, pieces=_PIECES32))
FP8_EXACT32 = _family(32, EXACT, CostModel(start=7.6, tile=1.61, item=7.2, merge=2.1, pieces=_PIECES32))
FP8_EXACT64 = _family(64, EXACT, CostModel(start=7.5, tile=2.25, item=8.5, merge=4.3, pieces=_PIECES64))
FP8_SPLIT64 = _family(64, SPLIT, CostModel(start=7.3, tile=2.11, item=8.5, merge=4.2, pieces=_PIECES64))
FP8_QUERY16 = _family(16, FP8, CostModel(start=4.5, tile=1.08, item=3.4, merge=0.9, pieces=_PIECES16))
FP8_QUERY32 = _family(32, FP8, CostModel(start=5.8, tile=1.12, item=5.6, merge=2.1, pieces=_PIECES32))
FP8_QUERY64 = _family(64, FP8, CostModel(start=6.7, tile=1.45, item=8.3, merge=5.5, pieces=_PIECES64))
