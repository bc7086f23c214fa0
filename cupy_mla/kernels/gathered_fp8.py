"""The kernels of gathered tokens for FP8 caches (kernels_cu/decode/gathered_fp8): they read rows through a codec."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..gpu import hopper
from ..layouts import FP4_V41, FP8_DS_MLA, FP8_DS_MLA_NO_ROPE, FP8_E4M3, FP8_MODEL1, FP8_V41, CacheLayout
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
    DecodeFamily,
    KernelConfig,
    Role,
)
from .gathered import GatheredConfig, gathered_defines

if TYPE_CHECKING:
    from ..call.problem import DecodeProblem
    from ..call.sparse_problem import SparseProblem

# Layouts that these kernels are compiled for, with their widths.
STANDARD_LAYOUTS: tuple[tuple[CacheLayout, int, int], ...] = (
    (FP8_DS_MLA, 512, 64),
    (FP8_DS_MLA_NO_ROPE, 512, 0),
    (FP8_E4M3, 512, 64),
    (FP8_MODEL1, 512, 0),
    (FP8_V41, 512, 0),
    (FP4_V41, 512, 0),
)
_LAYOUTS = tuple(layout for layout, _, _ in STANDARD_LAYOUTS)
# Tokens of a page of the cache and of the second one: of slots that are all equally far apart; and as DeepSeek V4's
# caches are served, whose second one has a token for every 4 or 128.
_SLOT_PAGES = (1, 1)
_V4_PAGES = ((256, 64), (256, 2))
_V4_LAYOUTS = ((FP8_MODEL1, FP8_MODEL1), (FP8_V41, FP4_V41))

_ROLES = ("scores", "values", "loaders")  # a warpgroup each
_MAX_ROPE_DIM = 128
_SLAB_TOKENS = 16  # of a tile: those of one scores warp
_LINE_BYTES = 128  # rows of whole lines are padded by half a line
_BUFFERS = 2  # of P and of what goes with it
_WARPS = 4  # of a warpgroup
_WORD_BYTES = 4
# Of the merge, by rows: beside a CTA of 16 rows, 112 registers a thread on average, there is room for them; beside one
# of 32 rows there is none.
_COMBINE_THREADS = {16: 224, 32: 256}
# Planned, float32 partials, pages: slots that are all equally far apart, as in every contiguous cache, or that are not.
_STANDARD_FORMS = ((False, False, 1), (True, False, 1), (True, True, 1), (True, False, 64))


def fp8_defines(family: DecodeFamily, config: KernelConfig) -> tuple[tuple[str, str], ...]:
    """The macros of decode/config.h, decode/gathered/work.h and codec/codec.h."""
    assert isinstance(config, GatheredConfig)
    assert config.layout.codec is not None
    defines = *gathered_defines(family, config), *FP8_E4M3.defines, ("MLA_CODEC", config.layout.codec)
    if config.extra_layout in (None, config.layout):
        return defines
    assert config.extra_layout is not None
    assert config.extra_layout.codec is not None
    return (*defines, ("MLA_EXTRA_CODEC", config.extra_layout.codec))


def fp8_extra_configs(family: DecodeFamily) -> list[KernelConfig]:
    """Standard configurations with a second cache: of the same layout, and of DeepSeek V4's two."""
    pairs = [(layout, layout, latent, rope) for layout, latent, rope in STANDARD_LAYOUTS]
    pairs += [(FP8_V41, FP4_V41, latent, rope) for layout, latent, rope in STANDARD_LAYOUTS if layout is FP8_V41]
    return [
        GatheredConfig(family, latent, rope, dtype, page, causal=False, layout=layout, extra_page_size=extra_page,
                       extra_layout=extra_layout)
        for layout, extra_layout, latent, rope in pairs
        for page, extra_page in (_SLOT_PAGES, *(_V4_PAGES if (layout, extra_layout) in _V4_LAYOUTS else ()))
        for dtype in FP8_E4M3.query_dtypes
    ]  # fmt: skip


def why_no_codec(
    problem: DecodeProblem | SparseProblem, layouts: tuple[CacheLayout, ...] = _LAYOUTS
) -> str | None:
    """Why a kernel that reads rows through a codec cannot serve a problem; None when it can.

    Parameters
    ----------
    problem
        What is asked for.
    layouts
        What the kernel reads.
    """
    for layout in (problem.layout, getattr(problem, "extra_layout", None)):
        if layout is not None and layout not in layouts:
            names = " or ".join(known.name for known in layouts)
            return f"takes a cache in the layout {names}, not {layout.name}"
    return None


@dataclass(frozen=True, slots=True)
class GatheredFp8NarrowFamily(DecodeFamily):
    """The family of the narrow kernel for one number of rows (decode/gathered_fp8/narrow.cu).

    Attributes
    ----------
    registers : tuple of int
        Of a thread of the scores, values and loader warpgroup.
    float_partials : bool
        Whether few rows leave float32 partial results.
    """

    registers: tuple[int, int, int]
    float_partials: bool

    def why_unsupported(self, problem: DecodeProblem | SparseProblem) -> str | None:
        """Other layouts than those that have a codec; wider rope parts than registers hold Q of while it is loaded."""
        if problem.queries.rope_dim > _MAX_ROPE_DIM:
            return f"takes rope widths up to {_MAX_ROPE_DIM}, not {problem.queries.rope_dim}"
        return why_no_codec(problem)

    def roles(self, config: KernelConfig) -> tuple[Role, ...]:
        """Three warpgroups."""
        return tuple(
            Role(name, hopper.WARPGROUP_THREADS, registers)
            for name, registers in zip(_ROLES, self.registers, strict=True)
        )

    def has_float_partials(self, rows: int) -> bool:
        """For few rows, where the kernel has registers for it."""
        return self.float_partials and rows <= FLOAT_PARTIAL_ROWS

    def refines(self, dtype: str, rows: int) -> bool:
        """Never: probabilities are fp16."""
        return False

    def shared_memory(self, config: KernelConfig) -> int:
        """The total of decode/gathered_fp8/narrow_smem.h: as many slabs as fit beside a CTA of the merge."""
        assert isinstance(config, GatheredConfig)
        latent_boxes, rope_boxes = config.latent_dim // BOX_COLUMNS, config.rope_dim // BOX_COLUMNS
        row_box = self.rows * BOX_COLUMNS * ELEMENT_BYTES
        row_floats = _WARPS + 2 * _BUFFERS + 1  # exchanged, factors and inverse sums, the scale of Q
        freed_groups = latent_boxes // 2 if latent_boxes % 2 == 0 else latent_boxes
        barriers = freed_groups + 3 * _BUFFERS
        fixed = (
            (latent_boxes + rope_boxes + _BUFFERS) * row_box
            + latent_boxes * BOX_BYTES
            + row_floats * self.rows * FLOAT_BYTES
            + barriers * BARRIER_BYTES
            + _BUFFERS * _WORD_BYTES
            + CLAIM_BYTES
        )
        page_end_bytes = config.layout.page_end_bytes
        layouts = (config.layout, config.extra_layout or config.layout)
        row_bytes = max(layout.width(config.latent_dim, config.rope_dim) for layout in layouts) - page_end_bytes
        half_line = _LINE_BYTES // 2
        pads = half_line not in (row_bytes % _LINE_BYTES, 4 * row_bytes % _LINE_BYTES)
        pitch = (row_bytes + half_line - 1) // _LINE_BYTES * _LINE_BYTES + half_line if pads else row_bytes
        slab = _SLAB_TOKENS * (pitch + page_end_bytes) + 2 * BARRIER_BYTES + _WORD_BYTES
        return fixed + (hopper.MAX_SHARED_BYTES - hopper.CTA_SHARED_BYTES - fixed) // slab * slab

    def defines(self, config: KernelConfig) -> tuple[tuple[str, str], ...]:
        """The macros of decode/config.h, decode/gathered/work.h and codec/codec.h."""
        return fp8_defines(self, config)

    def standard_configs(self) -> list[KernelConfig]:
        """What `cupy-mla compile` prepares ahead of time and the tests compile."""
        return [
            GatheredConfig(
                self, latent, rope, dtype, page_size, causal=False, float_partials=float_partials, planned=planned,
                layout=layout,
            )
            for (planned, float_partials, page_size), (layout, latent, rope) in itertools.product(
                _STANDARD_FORMS, STANDARD_LAYOUTS
            )
            for dtype in FP8_E4M3.query_dtypes
            if self.float_partials or not float_partials
        ] + fp8_extra_configs(self)  # fmt: skip


def _narrow(
    rows: int, registers: tuple[int, int, int], cost: CostModel, *, float_partials: bool
) -> GatheredFp8NarrowFamily:
    return GatheredFp8NarrowFamily(
        name=f"gathered_fp8_narrow{rows}",
        entry="decode/gathered_fp8/narrow.cu",
        function="mla_gathered_fp8_narrow",
        rows=rows,
        cost=cost,
        combine_threads=_COMBINE_THREADS[rows],
        registers=registers,
        float_partials=float_partials,
    )


# Times from 1 to 512 query tokens with 640 to 2048 tokens each, in the layouts of DeepSeek V3.2, V4 and V4.1; pieces as
# for 16-bit caches.
GATHERED_FP8_NARROW16 = _narrow(
    16,
    (144, 152, 40),
    CostModel(
        start=6.0,
        tile=1.9,
        item=4.6,
        merge=1.8,
        pieces=PieceCosts(piece_overhead=3 * TILE_COST // 2, split_overhead=3 * TILE_COST // 2),
    ),
    float_partials=True,
)
GATHERED_FP8_NARROW32 = _narrow(
    32,
    (208, 240, 56),
    CostModel(
        start=8.6,
        tile=2.2,
        item=5.6,
        merge=1.8,
        pieces=PieceCosts(piece_overhead=2 * TILE_COST, split_overhead=3 * TILE_COST),
    ),
    float_partials=False,
)
