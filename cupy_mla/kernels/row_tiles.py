"""The kernel of dense decode over pages of FP8 rows that hold their scales: tiles come as they are stored
(kernels_cu/decode/row_tiles).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..gpu.hopper import WARPGROUP_THREADS
from ..layouts import FP8_DS_MLA, FP8_DS_MLA_NO_ROPE
from ..layouts.block_scaled import BlockScaled
from ..schedule.pieces import TILE_COST, TILE_TOKENS, PieceCosts
from .cost import CostModel
from .family import (
    BARRIER_BYTES,
    BOX_COLUMNS,
    CLAIM_BYTES,
    ELEMENT_BYTES,
    FEWEST_ROWS,
    FLOAT_BYTES,
    FLOAT_PARTIAL_ROWS,
    KernelConfig,
    Role,
)
from .gathered import GatheredConfig
from .gathered_fp8 import fp8_defines
from .token_pages import RowPagesFamily

if TYPE_CHECKING:
    from ..call.problem import DecodeProblem
    from ..call.sparse_problem import SparseProblem

_LAYOUTS: tuple[BlockScaled, ...] = (FP8_DS_MLA, FP8_DS_MLA_NO_ROPE)
_CHUNK_TOKENS = 16  # at least so many lie behind one another
_PAGE_SIZES = (16, 64)
_SCALES = 4  # of a token
# By rows: scores warpgroups, and registers of scores, values and loader.
_SCORES_WARPGROUPS = {16: 2, 32: 1}
_REGISTERS = {16: (128, 96, 32), 32: (208, 136, 32)}
_STAGES = 4
_BUFFERS = 2  # of P and of what goes with it
_WARPS = 4  # of a warpgroup
_HANDED_ITEMS = 2  # decode/gathered/turn_softmax.h
_WORD_BYTES = 4
_COMBINE_THREADS = 256


@dataclass(frozen=True, slots=True)
class RowTilesFamily(RowPagesFamily):
    """The family for one number of rows."""

    @property
    def layouts(self) -> tuple[BlockScaled, ...]:
        """Those whose rows are 16 bytes longer than a multiple of 128, so that they lie well in shared memory."""
        return _LAYOUTS

    @property
    def page_sizes(self) -> tuple[int, ...]:
        """Without pages of one token: of so many copies each would be too small."""
        return _PAGE_SIZES

    def why_unsupported(self, problem: DecodeProblem | SparseProblem) -> str | None:
        """Other layouts, and pages of which a tile takes many."""
        page_size = problem.keys.page_size
        if page_size % _CHUNK_TOKENS:
            return f"takes page sizes that are multiples of {_CHUNK_TOKENS}, not {page_size}"
        return RowPagesFamily.why_unsupported(self, problem)

    def roles(self, config: KernelConfig) -> tuple[Role, ...]:
        """One or two warpgroups for the scores, two for the values; a warp of the last loads tiles."""
        scores, values, loader = _REGISTERS[self.rows]
        return (
            Role("scores", self._scores_warpgroups * WARPGROUP_THREADS, scores),
            Role("values", 2 * WARPGROUP_THREADS, values),
            Role("loader", WARPGROUP_THREADS, loader),
        )

    @property
    def _scores_warpgroups(self) -> int:
        """Two take turns, where registers suffice for them."""
        return _SCORES_WARPGROUPS[self.rows]

    def has_float_partials(self, rows: int) -> bool:
        """For few rows, as the narrow kernel."""
        return self.rows == FEWEST_ROWS and rows <= FLOAT_PARTIAL_ROWS

    def refines(self, dtype: str, rows: int) -> bool:
        """Never: probabilities are fp16."""
        return False

    def shared_memory(self, config: KernelConfig) -> int:
        """The total of decode/row_tiles/smem.h."""
        assert isinstance(config, GatheredConfig)
        boxes = (config.latent_dim + config.rope_dim) // BOX_COLUMNS
        row_box = self.rows * BOX_COLUMNS * ELEMENT_BYTES
        tile = TILE_TOKENS * (config.layout.width(config.latent_dim, config.rope_dim) + _SCALES * ELEMENT_BYTES)
        warpgroups = self._scores_warpgroups
        # Of each row: exchanged, factors and inverse sums, the scale of Q; of turns maximum, unit, what is handed over.
        row_floats = warpgroups * _WARPS + 2 * _BUFFERS + 1
        barriers = 2 * _STAGES + 3 * _BUFFERS
        if warpgroups > 1:
            row_floats += 2 + _HANDED_ITEMS * (2 * _WARPS + 1)
            barriers += warpgroups
        return (
            _STAGES * tile
            + (boxes + _BUFFERS) * row_box
            + row_floats * self.rows * FLOAT_BYTES
            + barriers * BARRIER_BYTES
            + _BUFFERS * _WORD_BYTES
            + CLAIM_BYTES
        )

    def defines(self, config: KernelConfig) -> tuple[tuple[str, str], ...]:
        """The macros of decode/config.h, decode/gathered/work.h and codec/codec.h."""
        return fp8_defines(self, config)


def _family(rows: int, cost: CostModel) -> RowTilesFamily:
    return RowTilesFamily(
        name=f"row_tiles{rows}",
        entry="decode/row_tiles/row_tiles.cu",
        function="mla_gathered_row_tiles",
        rows=rows,
        cost=cost,
        combine_threads=_COMBINE_THREADS,
    )


# From 28 calls of 1 to 300 requests and 64 to 131,072 tokens with 8 to 128 heads, beside row_pages; items of 32 rows
# as of the kernel for e4m3 caches.
_PIECES16 = PieceCosts(piece_overhead=3 * TILE_COST // 2, split_overhead=3 * TILE_COST // 2)
_PIECES32 = PieceCosts(piece_overhead=2 * TILE_COST, split_overhead=3 * TILE_COST)
ROW_TILES16 = _family(16, CostModel(start=5.5, tile=1.35, item=3.4, merge=4.0, pieces=_PIECES16))
ROW_TILES32 = _family(32, CostModel(start=7.75, tile=1.75, item=5.6, merge=3.75, pieces=_PIECES32))
