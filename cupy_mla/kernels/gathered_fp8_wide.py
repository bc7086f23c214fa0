"""The kernel for 64 query rows of gathered tokens of FP8 caches (kernels_cu/decode/gathered_fp8/wide.cu)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..gpu import hopper
from ..layouts import FP8_E4M3
from ..layouts.block_scaled import BlockScaled
from ..schedule.pieces import TILE_COST, TILE_TOKENS, PieceCosts, ceil_div
from .cost import CostModel
from .family import (
    BARRIER_BYTES,
    BOX_BYTES,
    BOX_COLUMNS,
    CLAIM_BYTES,
    FLOAT_BYTES,
    ColumnParts,
    DecodeFamily,
    KernelConfig,
    Role,
)
from .gathered import STANDARD_PAGES, GatheredConfig
from .gathered_fp8 import STANDARD_LAYOUTS, fp8_defines, fp8_extra_configs, why_no_codec
from .wide import VALUES_WARPGROUPS, wide_scale_parts

if TYPE_CHECKING:
    from ..call.problem import DecodeProblem
    from ..call.sparse_problem import SparseProblem

# Registers of a thread. All four warpgroups share what they have at entry, 128 each.
_ENTRY_REGISTERS = 4 * 128
_VALUES_REGISTERS = 160
# Of the converters: of codes of the latent part alone, and where they have more to do.
_CONVERTERS_REGISTERS = {False: 104, True: 112}
# A load of a warp is of one token; a stage has one rope box, which P replaces.
_LATENT_DIM = 512
_ROPE_DIMS = (0, BOX_COLUMNS)
_STAGES = 2
_SLABS = 4  # of a tile, which PV frees one by one
_WARPS = 4  # of the converters
_PIECE_STEP = 256  # columns between the two pieces that a lane has of a token
_WORD_BYTES = 4
_ADDRESS_BYTES = 8
# Items of a CTA's part that lie in shared memory, behind their bounds (decode/gathered/part_items.h).
_MAX_PART_ITEMS = 16
_ITEM_BYTES = 32
_BOUNDS_BYTES = 16
_ITEM_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class GatheredFp8WideFamily(DecodeFamily):
    """The family of this kernel."""

    def why_unsupported(self, problem: DecodeProblem | SparseProblem) -> str | None:
        """Other widths; other layouts than those that have a codec."""
        queries = problem.queries
        if queries.latent_dim != _LATENT_DIM:
            return f"takes a latent width of {_LATENT_DIM}, not {queries.latent_dim}"
        if queries.rope_dim not in _ROPE_DIMS:
            return f"takes rope widths of {_ROPE_DIMS}, not {queries.rope_dim}"
        return why_no_codec(problem)

    def roles(self, config: KernelConfig) -> tuple[Role, ...]:
        """One warpgroup for the scores, two for the values, one that converts tokens."""
        assert isinstance(config, GatheredConfig)
        mixes = config.extra_layout not in (None, config.layout)
        codes_rope = config.rope_dim > 0 and not isinstance(config.layout, BlockScaled)
        converters = _CONVERTERS_REGISTERS[mixes or codes_rope or _has_uncoded_values(config)]
        scores = _ENTRY_REGISTERS - VALUES_WARPGROUPS * _VALUES_REGISTERS - converters
        return (
            Role("scores", hopper.WARPGROUP_THREADS, scores),
            Role("values", VALUES_WARPGROUPS * hopper.WARPGROUP_THREADS, _VALUES_REGISTERS),
            Role("converters", hopper.WARPGROUP_THREADS, converters),
        )

    def scale_parts(self, latent_dim: int, dtype: str, rows: int, *, of_share: bool = False) -> ColumnParts | None:
        """As in the wide kernel."""
        return wide_scale_parts(latent_dim, dtype, rows)

    def refines(self, dtype: str, rows: int) -> bool:
        """Never: probabilities are fp16."""
        return False

    def shared_memory(self, config: KernelConfig) -> int:
        """The total of decode/gathered_fp8/wide_smem.h."""
        items = self._part_items(config)
        if items == 0:
            return self._fixed_bytes(config)
        return _aligned(self._fixed_bytes(config)) + _BOUNDS_BYTES + items * _ITEM_BYTES

    def _part_items(self, config: KernelConfig) -> int:
        """How many items of a part there is room for, up to a limit."""
        assert isinstance(config, GatheredConfig)
        room = hopper.MAX_SHARED_BYTES - _aligned(self._fixed_bytes(config)) - _BOUNDS_BYTES
        return max(0, min(_MAX_PART_ITEMS, room // _ITEM_BYTES)) if config.planned else 0

    def _fixed_bytes(self, config: KernelConfig) -> int:
        """Without items of the plan."""
        assert isinstance(config, GatheredConfig)
        latent_boxes, rope_boxes = config.latent_dim // BOX_COLUMNS, config.rope_dim // BOX_COLUMNS
        layouts = [layout for layout in (config.layout, config.extra_layout) if isinstance(layout, BlockScaled)]
        scale_pairs = max((_PIECE_STEP // layout.block for layout in layouts), default=0)  # of a token
        # What is not a code of the latent part goes through shared memory.
        staged_boxes = rope_boxes + _has_uncoded_values(config)
        boxes = _STAGES * (latent_boxes + 1) + latent_boxes + rope_boxes + staged_boxes  # stages, Q, what is on its way
        row_floats = 2 * _STAGES + 1  # factors and inverse sums, the scale of Q
        # Units, scales, an address.
        token_bytes = _STAGES * FLOAT_BYTES + scale_pairs * _WORD_BYTES + _ADDRESS_BYTES
        barriers = _STAGES * (2 + _SLABS) + 1  # and of Q
        return (
            boxes * BOX_BYTES
            + row_floats * self.rows * FLOAT_BYTES
            + token_bytes * TILE_TOKENS
            + _STAGES * _WARPS * _WORD_BYTES
            + barriers * BARRIER_BYTES
            + CLAIM_BYTES
        )

    def defines(self, config: KernelConfig) -> tuple[tuple[str, str], ...]:
        """The macros of decode/config.h, decode/gathered/work.h, decode/gathered/part_items.h and codec/codec.h."""
        return (*fp8_defines(self, config), ("MLA_PART_ITEMS", str(self._part_items(config))))

    def standard_configs(self) -> list[KernelConfig]:
        """What `cupy-mla compile` prepares ahead of time and the tests compile."""
        return [
            GatheredConfig(self, latent, rope, dtype, page_size, causal=False, planned=planned, layout=layout)
            for (page_size, planned), (layout, latent, rope) in itertools.product(STANDARD_PAGES, STANDARD_LAYOUTS)
            for dtype in FP8_E4M3.query_dtypes
        ] + fp8_extra_configs(self)


def _aligned(size: int) -> int:
    return ceil_div(size, _ITEM_ALIGNMENT) * _ITEM_ALIGNMENT


def _has_uncoded_values(config: GatheredConfig) -> bool:
    """Whether the last values of the latent part have no codes; of two caches that is the same."""
    return isinstance(config.layout, BlockScaled) and config.layout.coded < config.latent_dim


# From the same calls as the costs of the narrow kernels, with 64 and 128 heads; pieces as for the wide kernel.
GATHERED_FP8_WIDE64 = GatheredFp8WideFamily(
    name="gathered_fp8_wide64",
    entry="decode/gathered_fp8/wide.cu",
    function="mla_gathered_fp8_wide",
    rows=64,
    cost=CostModel(
        start=9.3,
        tile=2.6,
        item=8.4,
        merge=3.1,
        pieces=PieceCosts(piece_overhead=4 * TILE_COST, split_overhead=5 * TILE_COST, packs=True),
    ),
    combine_threads=640,  # none fits beside it, as with the wide kernel
)
