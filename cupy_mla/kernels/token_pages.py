"""The kernels of gathered tokens in dense decode: over pages of one token, whose list is the block table, and over rows
that hold their scales, in pages of any size.

TMA brings pages of one token token by token, and tiles of rows as no product wants them. These kernels gather tokens,
and are else those of sparse decode: their jobs are the requests of a dense plan (decode/gathered/params.h: by request).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..layouts import DENSE_LAYOUTS, FP8_DS_MLA, FP8_DS_MLA_NO_ROPE, LAYOUTS
from ..layouts.block_scaled import BlockScaled
from ..schedule.pieces import TILE_TOKENS
from .family import STANDARD_DIMS, DecodeFamily, KernelConfig
from .gathered import GATHERED_WIDE64, GatheredConfig, GatheredWideFamily
from .gathered_fp8 import GATHERED_FP8_NARROW16, GATHERED_FP8_NARROW32, GatheredFp8NarrowFamily, why_no_codec
from .gathered_fp8_wide import GATHERED_FP8_WIDE64, GatheredFp8WideFamily
from .gathered_narrow import GATHERED_NARROW16, GATHERED_NARROW32, GatheredNarrowFamily
from .structs import GATHER_PARAMS

if TYPE_CHECKING:
    from ..call.problem import DecodeProblem
    from ..call.sparse_problem import SparseProblem

_PAGE_SIZE = 1
_ROW_PAGE_SIZES = (1, 64)  # the latter's block table has pages, not tokens
_ROW_DTYPE = "bfloat16"
_ROW_LAYOUTS = tuple(layout for layout in LAYOUTS.values() if isinstance(layout, BlockScaled))
_WIDE_ROW_LAYOUTS: tuple[BlockScaled, ...] = (FP8_DS_MLA, FP8_DS_MLA_NO_ROPE)  # that were timed with 64 rows


class _OfTokenPages(DecodeFamily):
    """What the families have in common."""

    @property
    def params(self) -> np.dtype[np.void]:
        """GatherParams of decode/gathered/params.h."""
        return GATHER_PARAMS

    @property
    def gathers(self) -> bool:
        """Always."""
        return True

    def configure(self, problem: DecodeProblem, rows: int) -> KernelConfig:
        """As for every kernel of dense decode."""
        queries = problem.queries
        return self._config(
            *(queries.latent_dim, queries.rope_dim, queries.dtype),
            causal=queries.causal and queries.seqlen_q > 1,
            float_partials=self.has_float_partials(rows),
            scale_parts=self.scale_parts(
                queries.latent_dim, queries.dtype, rows, of_share=problem.keys.cp_share
            ),
            refined=self.refines(queries.dtype, rows),
            sharded=problem.keys.shard is not None,
        )

    def standard_configs(self) -> list[KernelConfig]:
        """What `cupy-mla compile` prepares ahead of time and the tests compile."""
        return [
            self._config(latent, rope, dtype, causal=causal, float_partials=float_partials, refined=refined)
            for (latent, rope), dtype, causal in itertools.product(STANDARD_DIMS, DENSE_LAYOUTS, (False, True))
            for float_partials, refined in self.standard_forms(dtype)
        ]

    def _config(self, latent: int, rope: int, dtype: str, **options: Any) -> KernelConfig:
        return GatheredConfig(self, latent, rope, dtype, _PAGE_SIZE, by_request=True, **options)


@dataclass(frozen=True, slots=True)
class TokenPagesWideFamily(_OfTokenPages, GatheredWideFamily):
    """The wide one."""

    def why_unsupported(self, problem: DecodeProblem | SparseProblem) -> str | None:
        """Larger pages, other layouts than the dense ones, and widths that it does not take in sparse decode."""
        return _why_not_token_pages(problem) or GatheredWideFamily.why_unsupported(self, problem)


@dataclass(frozen=True, slots=True)
class TokenPagesNarrowFamily(_OfTokenPages, GatheredNarrowFamily):
    """A narrow one."""

    def why_unsupported(self, problem: DecodeProblem | SparseProblem) -> str | None:
        """Larger pages, other layouts than the dense ones, and widths that it does not take in sparse decode."""
        return _why_not_token_pages(problem) or GatheredNarrowFamily.why_unsupported(self, problem)


class RowPagesFamily(_OfTokenPages):
    """What the families for pages of rows that hold their scales have in common."""

    @property
    def layouts(self) -> tuple[BlockScaled, ...]:
        """Of the rows."""
        return _ROW_LAYOUTS

    @property
    def page_sizes(self) -> tuple[int, ...]:
        """Of standard configurations."""
        return _ROW_PAGE_SIZES

    def why_unsupported(self, problem: DecodeProblem | SparseProblem) -> str | None:
        """Other layouts."""
        return why_no_codec(problem, self.layouts)

    def configure(self, problem: DecodeProblem, rows: int) -> KernelConfig:
        """As for every kernel of dense decode."""
        queries, layout = problem.queries, problem.layout
        assert isinstance(layout, BlockScaled)
        return self._row_config(
            *(layout, queries.dtype, problem.keys.page_size),
            causal=queries.causal and queries.seqlen_q > 1,
            float_partials=self.has_float_partials(rows),
            scale_parts=self.scale_parts(queries.latent_dim, queries.dtype, rows),
            sharded=problem.keys.shard is not None,
        )

    def standard_configs(self) -> list[KernelConfig]:
        """What `cupy-mla compile` prepares ahead of time and the tests compile; of 656 bytes all, else pages of 64."""
        partials = (False, True) if self.has_float_partials(1) else (False,)
        return [
            self._row_config(layout, _ROW_DTYPE, page_size, causal=causal, float_partials=float_partials)
            for layout in self.layouts
            for float_partials, page_size, causal in itertools.product(partials, self.page_sizes, (False, True))
            if layout is FP8_DS_MLA or (page_size == TILE_TOKENS and not float_partials)
        ]

    def _row_config(self, layout: BlockScaled, dtype: str, page_size: int, **options: Any) -> KernelConfig:
        widths = layout.latent_dim, layout.rope_dim
        return GatheredConfig(self, *widths, dtype, page_size, by_request=True, layout=layout, **options)


@dataclass(frozen=True, slots=True)
class RowPagesWideFamily(RowPagesFamily, GatheredFp8WideFamily):
    """The wide one."""

    @property
    def layouts(self) -> tuple[BlockScaled, ...]:
        """Fewer: those that were timed."""
        return _WIDE_ROW_LAYOUTS


@dataclass(frozen=True, slots=True)
class RowPagesNarrowFamily(RowPagesFamily, GatheredFp8NarrowFamily):
    """A narrow one."""


def _why_not_token_pages(problem: DecodeProblem | SparseProblem) -> str | None:
    page_size = problem.keys.page_size
    return None if page_size == _PAGE_SIZE else f"takes pages of {_PAGE_SIZE} token, not of {page_size}"


def _values(family: DecodeFamily, name: str, **times: Any) -> dict[str, Any]:
    """Of the family of gathered tokens, but for its name, and for times of its cost model."""
    values = {field.name: getattr(family, field.name) for field in fields(family)}
    return values | {"name": name, "cost": replace(family.cost, **times)}


TOKEN_PAGES_NARROW16 = TokenPagesNarrowFamily(**_values(GATHERED_NARROW16, "token_pages16"))
TOKEN_PAGES_NARROW32 = TokenPagesNarrowFamily(**_values(GATHERED_NARROW32, "token_pages32"))
TOKEN_PAGES_WIDE64 = TokenPagesWideFamily(**_values(GATHERED_WIDE64, "token_pages64"))
# Of narrow ones, from sparse calls of 1, 16 and 128 requests and 2048 tokens; of the wide one, from 128 x 8192, 16 x
# 4096, 64 x 256 and 1 x 4096 tokens with 64 and 128 heads.
ROW_PAGES16 = RowPagesNarrowFamily(
    **_values(GATHERED_FP8_NARROW16, "row_pages16", start=6.5, tile=1.7, item=3.4, merge=2.2)
)
ROW_PAGES32 = RowPagesNarrowFamily(
    **_values(GATHERED_FP8_NARROW32, "row_pages32", start=8.5, tile=1.9, item=5.6, merge=2.7)
)
ROW_PAGES64 = RowPagesWideFamily(
    **_values(GATHERED_FP8_WIDE64, "row_pages64", start=11.0, tile=2.45, item=5.0, merge=5.5)
)
