"""The narrow kernels of gathered tokens: 16 or 32 query rows a CTA (kernels_cu/decode/gathered/narrow.cu).

Prefill has kernels of its own: of 16 rows two scores warpgroups take tiles in turn (narrow_prefill.cu); of 32 rows they
lie along wgmma's M, with Q in registers, unless tiles have more than nine boxes or P is refined (row_prefill.cu).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..gpu import hopper
from ..gpu.jit.source import KernelSource
from ..layouts import DENSE_LAYOUTS
from ..schedule.pieces import TILE_COST, PieceCosts
from .cost import CostModel
from .family import (
    BARRIER_BYTES,
    BOX_BYTES,
    BOX_COLUMNS,
    CLAIM_BYTES,
    ELEMENT_BYTES,
    FLOAT_BYTES,
    FLOAT_PARTIAL_ROWS,
    STANDARD_DIMS,
    ColumnParts,
    DecodeFamily,
    KernelConfig,
    Role,
    why_not_dense,
)
from .gathered import GatheredConfig, dense_extra_configs, gathered_defines, with_clustered
from .narrow import narrow_scale_parts

if TYPE_CHECKING:
    from ..call.problem import DecodeProblem
    from ..call.sparse_problem import SparseProblem

_ENTRY, _FUNCTION = "decode/gathered/narrow.cu", "mla_gathered_narrow"
_PREFILL_ENTRY, _PREFILL_FUNCTION = "decode/gathered/narrow_prefill.cu", "mla_gathered_narrow_prefill"
_ROLES = ("scores", "values", "loaders")
# Of these roles, and registers of a thread of each; where scores warpgroups take turns, for so many rows.
_WARPGROUPS, _TURN_WARPGROUPS = (1, 1, 1), (2, 1, 1)
_TURN_REGISTERS = (128, 152, 104)
_TURN_ROWS = 16
# Of prefill kernels whose rows lie along M.
_ROW_ENTRY, _ROW_FUNCTION = "decode/gathered/row_prefill.cu", "mla_gathered_row_prefill"
_ROW_REGISTERS = (240, 208, 56)
_REGISTER_BOXES = 9  # of Q
_ROW_VALUES = 2  # of a row, that the CTAs of a cluster leave for each other
_ZEROS_BYTES = 16
_MAX_LATENT_DIM = 512  # of the output, in the registers of the values warpgroup
_MAX_GROUP_BOXES = 4
_RING_BOXES = 18  # with a plan, where two tiles are not more
_BUFFERS = 2  # of P and of what goes with it
_WARPS = 4  # of a warpgroup
_WORD_BYTES = 4
_HANDED_ITEMS = 2  # of which a scores warpgroup hands sums, largest scores and maxima to the other
# Beside a CTA of 16 rows, 96 registers a thread on average, there is room for them; beside one of 32 rows there is not.
_COMBINE_THREADS = 256


@dataclass(frozen=True, slots=True)
class GatheredNarrowFamily(DecodeFamily):
    """The family of the narrow kernel of gathered tokens, for one number of rows.

    Attributes
    ----------
    registers : tuple of int
        Of a thread of the scores, values and loader warpgroups.
    float_partials : bool
        Whether few rows leave float32 partial results.
    """

    registers: tuple[int, int, int]
    float_partials: bool

    def why_unsupported(self, problem: DecodeProblem | SparseProblem) -> str | None:
        """Other layouts than the dense ones; widths that are not whole boxes, or of more than there is room for."""
        queries = problem.queries
        widths = queries.latent_dim, queries.rope_dim
        if any(width % BOX_COLUMNS for width in widths):
            return f"takes widths that are multiples of {BOX_COLUMNS}, not {widths[0]} and {widths[1]}"
        if widths[0] > _MAX_LATENT_DIM:
            return f"takes latent widths up to {_MAX_LATENT_DIM}, not {widths[0]}"
        boxes = sum(widths) // BOX_COLUMNS
        if any(self._groups(boxes, planned) * _group_boxes(boxes) < boxes for planned in (False, True)):
            return f"has no room for a tile of widths {widths[0]} and {widths[1]}"
        return why_not_dense(problem)

    def shares_tokens(self, config: KernelConfig) -> bool:
        """Yes: decode/gathered/cluster.h."""
        return True

    def roles(self, config: KernelConfig) -> tuple[Role, ...]:
        """Three warpgroups, or four."""
        warpgroups, registers = _WARPGROUPS, self.registers
        if self._takes_turns(_is_planned(config)):
            warpgroups, registers = _TURN_WARPGROUPS, _TURN_REGISTERS
        elif self._has_rows_along_m(config):
            registers = _ROW_REGISTERS
        return tuple(
            Role(name, count * hopper.WARPGROUP_THREADS, each)
            for name, count, each in zip(_ROLES, warpgroups, registers, strict=True)
        )

    def source(self, config: KernelConfig) -> KernelSource:
        """One of three kernels."""
        if self._has_rows_along_m(config):
            return KernelSource(_ROW_ENTRY, _ROW_FUNCTION, self.defines(config))
        if self._takes_turns(_is_planned(config)):
            return KernelSource(_PREFILL_ENTRY, _PREFILL_FUNCTION, self.defines(config))
        return DecodeFamily.source(self, config)

    def has_float_partials(self, rows: int) -> bool:
        """For few rows, where the kernel has registers for it."""
        return self.float_partials and rows <= FLOAT_PARTIAL_ROWS

    def scale_parts(self, latent_dim: int, dtype: str, rows: int, *, of_share: bool = False) -> ColumnParts | None:
        """Of shares: with the merge of the ranks, partial results of bf16 would be one rounding too many for the
        promised error.
        """
        return narrow_scale_parts(dtype, is_float=self.has_float_partials(rows)) if of_share else None

    def shared_memory(self, config: KernelConfig) -> int:
        """The total of decode/gathered/narrow_smem.h: as many groups of KV boxes as fit, most beside a merge."""
        boxes, planned = (config.latent_dim + config.rope_dim) // BOX_COLUMNS, _is_planned(config)
        if self._has_rows_along_m(config):
            fixed = self._row_bytes()
            group_bytes = _group_bytes(boxes, frees_boxes=True)
            return fixed + (hopper.MAX_SHARED_BYTES - fixed) // group_bytes * group_bytes
        takes_turns = self._takes_turns(planned)
        group_bytes = _group_bytes(boxes, frees_boxes=takes_turns)
        return self._fixed_bytes(boxes, takes_turns) + self._groups(boxes, planned) * group_bytes

    def defines(self, config: KernelConfig) -> tuple[tuple[str, str], ...]:
        """The macros of decode/config.h and decode/gathered/work.h."""
        return gathered_defines(self, config)

    def standard_configs(self) -> list[KernelConfig]:
        """What `cupy-mla compile` prepares ahead of time and the tests compile."""
        configs = [
            GatheredConfig(
                self, latent, rope, dtype, 1, causal=False, planned=planned, float_partials=float_partials,
                refined=refined,
            )
            for (latent, rope), dtype, planned in itertools.product(STANDARD_DIMS, DENSE_LAYOUTS, (False, True))
            for float_partials, refined in self.standard_forms(dtype)
            if planned or not float_partials
        ]  # fmt: skip
        return with_clustered(configs) + dense_extra_configs(self)

    def _takes_turns(self, planned: bool) -> bool:
        return not planned and self.rows == _TURN_ROWS

    def _has_rows_along_m(self, config: KernelConfig) -> bool:
        fits = config.latent_dim + config.rope_dim <= _REGISTER_BOXES * BOX_COLUMNS and not config.refined
        return fits and not _is_planned(config) and self.rows != _TURN_ROWS

    def _buffer_bytes(self) -> int:
        """Of P, and of what goes with it, but for words that say whether factors are 1."""
        return self.rows * (BOX_COLUMNS * ELEMENT_BYTES + 2 * FLOAT_BYTES) + 3 * BARRIER_BYTES

    def _row_bytes(self) -> int:
        """All but the ring where rows lie along M: a word of each scores warp for each buffer."""
        of_buffers = _BUFFERS * (self._buffer_bytes() + _WARPS * _WORD_BYTES)
        return of_buffers + _ZEROS_BYTES + _ROW_VALUES * self.rows * FLOAT_BYTES + CLAIM_BYTES

    def _fixed_bytes(self, boxes: int, takes_turns: bool) -> int:
        """All but the ring: queries, P, what goes between warps and between warpgroups."""
        row_box = self.rows * BOX_COLUMNS * ELEMENT_BYTES
        of_rows = self.rows * FLOAT_BYTES  # a value of each
        exchange = _WARPS * of_rows
        fixed = boxes * row_box + exchange + _BUFFERS * (self._buffer_bytes() + _WORD_BYTES) + CLAIM_BYTES
        if not takes_turns:
            return fixed
        # The second warpgroup's own exchange; two barriers for turns and two for queries; maxima; what is handed over.
        return fixed + exchange + 4 * BARRIER_BYTES + of_rows + _HANDED_ITEMS * (2 * exchange + of_rows)

    def _groups(self, boxes: int, planned: bool) -> int:
        """Groups in the ring."""
        takes_turns = self._takes_turns(planned)
        spared = 0 if takes_turns else hopper.CTA_SHARED_BYTES
        room = hopper.MAX_SHARED_BYTES - spared - self._fixed_bytes(boxes, takes_turns)
        groups = max(room, 0) // _group_bytes(boxes, frees_boxes=takes_turns)
        wanted = max(_RING_BOXES, 2 * boxes) // _group_boxes(boxes)
        return min(groups, wanted) if planned else groups


def _is_planned(config: KernelConfig) -> bool:
    assert isinstance(config, GatheredConfig)
    return config.planned


def _group_boxes(boxes: int) -> int:
    """Boxes of a tile that are announced and freed together."""
    return next(divisor for divisor in range(_MAX_GROUP_BOXES, 0, -1) if boxes % divisor == 0)


def _group_bytes(boxes: int, *, frees_boxes: bool) -> int:
    """Of a group, its barriers and the bits of its tile's tokens."""
    barriers = 1 + (_group_boxes(boxes) if frees_boxes else 1)
    barriers += barriers % 2  # what follows is read 16 bytes at once
    return _group_boxes(boxes) * BOX_BYTES + barriers * BARRIER_BYTES + _WARPS * _WORD_BYTES


# Start, tile and merge from 1, 16 and 128 requests of 2048 tokens; the rest as in the dense narrow kernel.
GATHERED_NARROW16 = GatheredNarrowFamily(
    name="gathered_narrow16",
    entry=_ENTRY,
    function=_FUNCTION,
    rows=16,
    cost=CostModel(
        start=4.0,
        tile=2.2,
        item=3.4,
        merge=2.2,
        pieces=PieceCosts(piece_overhead=3 * TILE_COST // 2, split_overhead=3 * TILE_COST // 2),
    ),
    combine_threads=_COMBINE_THREADS,
    registers=(96, 136, 56),
    float_partials=True,
)
GATHERED_NARROW32 = GatheredNarrowFamily(
    name="gathered_narrow32",
    entry=_ENTRY,
    function=_FUNCTION,
    rows=32,
    cost=CostModel(
        start=6.0,
        tile=2.3,
        item=5.6,
        merge=2.2,
        pieces=PieceCosts(piece_overhead=2 * TILE_COST, split_overhead=3 * TILE_COST),
    ),
    combine_threads=_COMBINE_THREADS,
    registers=(184, 240, 80),
    float_partials=False,
)
