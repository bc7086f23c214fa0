"""The wide kernel: 64 query rows a CTA, the rows of wgmma's M (kernels_cu/decode/wide)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..gpu.hopper import WARP_THREADS, WARPGROUP_THREADS
from ..schedule.pieces import TILE_COST, PieceCosts
from .cost import CostModel
from .family import (
    ATOM_TOKENS,
    BARRIER_BYTES,
    BOX_BYTES,
    BOX_COLUMNS,
    CLAIM_BYTES,
    ELEMENT_BYTES,
    FLOAT_BYTES,
    ColumnParts,
    DecodeFamily,
    KernelConfig,
    Role,
    why_not_dense,
)

if TYPE_CHECKING:
    from ..call.problem import DecodeProblem
    from ..call.sparse_problem import SparseProblem

VALUES_WARPGROUPS = 2
_FEW_ROWS = 16  # up to these P is refined, and partial results have exponents (kernels_cu/core/partial_format.h)
_ROLES = (Role("scores", WARPGROUP_THREADS, 184), Role("values", VALUES_WARPGROUPS * WARPGROUP_THREADS, 160))
# Two warpgroups share the values' columns, in a width that wgmma has; a stage has one rope box, which P replaces.
_LATENT_DIMS = (128, 256, 512)
_ROPE_DIMS = (0, BOX_COLUMNS)
STAGES = 3
_MAX_REGISTER_STEPS = 31
_STEP_COLUMNS = 16
_LOADER_STATE_BYTES = 32
_ITEM_BYTES = 4  # the number of one, by each scores warp
_LOADER_WARPS = 4  # where a page does not hold a swizzle atom's tokens


def wide_scale_parts(latent_dim: int, dtype: str, rows: int, *, of_share: bool = False) -> ColumnParts | None:
    """``DecodeFamily.scale_parts`` where two warpgroups share the columns: of bf16, for few rows and for shares."""
    if (rows > _FEW_ROWS and not of_share) or dtype != "bfloat16":
        return None
    return ColumnParts(latent_dim // VALUES_WARPGROUPS, VALUES_WARPGROUPS)


@dataclass(frozen=True, slots=True)
class WideFamily(DecodeFamily):
    """The family of the wide kernel."""

    def why_unsupported(self, problem: DecodeProblem | SparseProblem) -> str | None:
        """Widths other than those that two warpgroups can share; other layouts than the dense ones."""
        queries = problem.queries
        if queries.latent_dim not in _LATENT_DIMS:
            return f"takes latent widths of {_LATENT_DIMS}, not {queries.latent_dim}"
        if queries.rope_dim not in _ROPE_DIMS:
            return f"takes rope widths of {_ROPE_DIMS}, not {queries.rope_dim}"
        return why_not_dense(problem)

    def roles(self, config: KernelConfig) -> tuple[Role, ...]:
        """One warpgroup for the scores, two for the values; warps of these load the tiles."""
        return _ROLES

    def copies_whole_tokens(self, config: KernelConfig) -> bool:
        """As a stage holds whole tiles: where no swizzle atom is shared by pages."""
        return config.group_tokens == ATOM_TOKENS

    @property
    def refined_rows(self) -> int:
        """More than in the others: of 64 rows, there are enough that do not exist."""
        return _FEW_ROWS

    def scale_parts(self, latent_dim: int, dtype: str, rows: int, *, of_share: bool = False) -> ColumnParts | None:
        """Of bf16: split results are as accurate as whole ones. Of shares, whose masks take registers, for few rows."""
        if rows <= _FEW_ROWS or of_share:
            return wide_scale_parts(latent_dim, dtype, rows)
        parts = wide_scale_parts(latent_dim, dtype, rows, of_share=True)
        return parts if parts is None else replace(parts, in_lse=True)

    def shared_memory(self, config: KernelConfig) -> int:
        """The total of decode/wide/smem.h."""
        boxes = config.latent_dim // BOX_COLUMNS + max(config.rope_dim // BOX_COLUMNS, 1)
        steps = (config.latent_dim + config.rope_dim) // _STEP_COLUMNS
        shared_steps = max(steps - _MAX_REGISTER_STEPS, 0)
        ring = STAGES * boxes * BOX_BYTES
        query = shared_steps * self.rows * _STEP_COLUMNS * ELEMENT_BYTES
        factors = STAGES * self.rows * FLOAT_BYTES
        barriers = 3 * STAGES * BARRIER_BYTES
        has_lses = config.scale_parts is not None and config.scale_parts.in_lse
        stored = WARPGROUP_THREADS // WARP_THREADS * _ITEM_BYTES if has_lses else 0
        return ring + query + factors + self.loader_bytes(config) + barriers + CLAIM_BYTES + stored

    def loader_bytes(self, config: KernelConfig) -> int:
        """What those who bring the tiles keep in shared memory."""
        return (1 if config.copies_whole_tokens else _LOADER_WARPS) * _LOADER_STATE_BYTES


WIDE64 = WideFamily(
    name="wide64",
    entry="decode/wide/wide.cu",
    function="mla_decode_wide",
    rows=64,
    cost=CostModel(
        start=8.5,
        tile=1.7,
        item=8.3,
        merge=5.5,
        # 64 rows of queries and of output are most of a tile's bytes again. 128 real requests, 128 heads: 103 us with
        # 2 and 3 tiles, 92 us with 4 and 5.
        pieces=PieceCosts(piece_overhead=4 * TILE_COST, split_overhead=5 * TILE_COST, packs=True),
    ),
    combine_threads=640,  # none fits beside it; its merges are the largest, and 640 threads fill the SM
)
