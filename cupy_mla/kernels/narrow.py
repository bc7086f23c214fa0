"""The narrow kernel: 16 or 32 query rows a CTA, the rows of wgmma's N, operands swapped (kernels_cu/decode/narrow)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..gpu import hopper
from ..schedule.pieces import TILE_COST, PieceCosts
from .cost import CostModel
from .family import (
    ALL_COLUMNS,
    BARRIER_BYTES,
    BOX_BYTES,
    BOX_COLUMNS,
    CLAIM_BYTES,
    ELEMENT_BYTES,
    FLOAT_BYTES,
    FLOAT_PARTIAL_ROWS,
    ColumnParts,
    DecodeFamily,
    KernelConfig,
    Role,
    why_not_dense,
)

if TYPE_CHECKING:
    from ..call.problem import DecodeProblem
    from ..call.sparse_problem import SparseProblem

_ENTRY, _FUNCTION = "decode/narrow/narrow.cu", "mla_decode_narrow"
_CONSUMER_WARPS = 4
_MAX_LATENT_DIM = 512  # of the output, in a consumer's registers
_PROBABILITY_BUFFERS = 2
_SLOT_BYTES = BOX_BYTES + 2 * BARRIER_BYTES  # a KV box and its two barriers
# An SM has four register files of 16,384. One of them holds two of the 16-row kernel's five warps, 144 registers a
# thread, and has room for two warps of the merge more: 384 threads do not fit, and cost 0.9 us at 1 x 4096 x 16 heads.
# Beside the 32-row kernel there is no room.
_COMBINE_THREADS = 256


def narrow_scale_parts(dtype: str, *, is_float: bool) -> ColumnParts | None:
    """``DecodeFamily.scale_parts`` of a share where a warp has as many columns of each box as tokens: of bf16 that is
    not float32.
    """
    if dtype != "bfloat16" or is_float:
        return None
    return ColumnParts(BOX_COLUMNS // _CONSUMER_WARPS, _CONSUMER_WARPS)


@dataclass(frozen=True, slots=True)
class NarrowFamily(DecodeFamily):
    """The family of the narrow kernel for one number of rows.

    Attributes
    ----------
    registers : int
        Most of a thread, at the standard widths; of a rope part of 512, 24 more.
    float_partials : bool
        Whether partial results of few rows are float32.
    """

    registers: int
    float_partials: bool

    def why_unsupported(self, problem: DecodeProblem | SparseProblem) -> str | None:
        """Widths not of whole boxes, or of more boxes than there is room for; other layouts than the dense ones."""
        queries = problem.queries
        widths = queries.latent_dim, queries.rope_dim
        if any(width % BOX_COLUMNS for width in widths):
            return f"takes widths that are multiples of {BOX_COLUMNS}, not {widths[0]} and {widths[1]}"
        if queries.latent_dim > _MAX_LATENT_DIM:
            return f"takes latent widths up to {_MAX_LATENT_DIM}, not {queries.latent_dim}"
        if sum(widths) > self.max_boxes * BOX_COLUMNS:
            return f"takes latent and rope widths up to {self.max_boxes * BOX_COLUMNS} together, not {sum(widths)}"
        return why_not_dense(problem)

    def roles(self, config: KernelConfig) -> tuple[Role, ...]:
        """A consumer warpgroup and a producer warp, which share the registers evenly."""
        return (
            Role("consumers", _CONSUMER_WARPS * hopper.WARP_THREADS, self.registers),
            Role("producer", hopper.WARP_THREADS, self.registers),
        )

    def has_float_partials(self, rows: int) -> bool:
        """For few rows, where the kernel has registers for it."""
        return self.float_partials and rows <= FLOAT_PARTIAL_ROWS

    def scale_parts(self, latent_dim: int, dtype: str, rows: int, *, of_share: bool = False) -> ColumnParts | None:
        """Always, so that split results are as accurate as whole ones."""
        parts = narrow_scale_parts(dtype, is_float=self.has_float_partials(rows))
        return ALL_COLUMNS if parts is not None and not of_share else parts

    def shared_memory(self, config: KernelConfig) -> int:
        """The total of decode/narrow/smem.h: as many KV boxes as fit beside a CTA of the merge."""
        boxes = (config.latent_dim + config.rope_dim) // BOX_COLUMNS
        return self._fixed_bytes(boxes) + self._slots(boxes) * _SLOT_BYTES

    @property
    def max_boxes(self) -> int:
        """Most boxes of a tile: a lane of the producer has one, and the ring holds a tile."""
        return max(boxes for boxes in range(1, hopper.WARP_THREADS + 1) if self._slots(boxes) >= boxes)

    def _fixed_bytes(self, boxes: int) -> int:
        """All but the ring of KV boxes, with queries of so many boxes."""
        row_box = self.rows * BOX_COLUMNS * ELEMENT_BYTES
        exchange = _CONSUMER_WARPS * self.rows * FLOAT_BYTES
        return (boxes + _PROBABILITY_BUFFERS) * row_box + exchange + CLAIM_BYTES

    def _slots(self, boxes: int) -> int:
        """KV boxes in the ring."""
        return (hopper.MAX_SHARED_BYTES - hopper.CTA_SHARED_BYTES - self._fixed_bytes(boxes)) // _SLOT_BYTES


NARROW16 = NarrowFamily(
    name="narrow16",
    entry=_ENTRY,
    function=_FUNCTION,
    rows=16,
    cost=CostModel(
        start=5.0,
        tile=1.36,
        item=3.4,
        merge=0.9,
        # A CTA ends 3.2 us later for each of its items, whole or not. 8 x 192 tokens take 7.7 us with 1 and 2 tiles,
        # 6.1 us with 1.5 and 1.5; 128 real requests the same with both, and 1.9 us more with 1/2 and 1.
        pieces=PieceCosts(piece_overhead=3 * TILE_COST // 2, split_overhead=3 * TILE_COST // 2),
    ),
    combine_threads=_COMBINE_THREADS,
    registers=144,
    float_partials=True,
)
NARROW32 = NarrowFamily(
    name="narrow32",
    entry=_ENTRY,
    function=_FUNCTION,
    rows=32,
    cost=CostModel(
        start=6.9,
        tile=1.55,
        item=5.6,
        merge=2.1,
        # 64 x 8192 tokens: 155 us with 1 and 2 tiles, 151 us with 2 and 3.
        pieces=PieceCosts(piece_overhead=2 * TILE_COST, split_overhead=3 * TILE_COST),
    ),
    combine_threads=_COMBINE_THREADS,
    registers=240,
    float_partials=False,
)
