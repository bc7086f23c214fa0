"""The kernels of gathered tokens: every query token attends to tokens of its own, which indices name.

One kernel file serves several schedules. *Planned*: query tokens are requests of a plan, as for sparse decode, cut
where the load asks for it and merged (`combine.gathered_combine_source`). *Static*: a CTA takes every so many-th query
token, as for sparse prefill; the grid is (row blocks of a kv head, parts, kv heads), and any number of parts is right.
*Clustered*: a cluster of CTAs shares each query token, as for those that would keep few SMs busy in a prefill's last
wave (`schedule.waves`). *By request*: they are kernels of dense decode (token_pages.py).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..gpu import hopper
from ..gpu.jit.source import KernelSource
from ..layouts import BF16, DENSE_LAYOUTS, CacheLayout
from ..schedule.pieces import TILE_TOKENS
from .family import (
    ATOM_TOKENS,
    BARRIER_BYTES,
    BOX_BYTES,
    BOX_COLUMNS,
    CLAIM_BYTES,
    ELEMENT_BYTES,
    FLOAT_BYTES,
    STANDARD_DIMS,
    ColumnParts,
    DecodeFamily,
    KernelConfig,
    Role,
)
from .wide import STAGES, VALUES_WARPGROUPS, WIDE64, WideFamily, wide_scale_parts

if TYPE_CHECKING:
    from ..call.sparse_problem import SparseProblem

NO_EXTRA = 0  # extra_page_size without a second cache
# Of one token: slots that are all equally far apart, as in every contiguous cache whatever its pages.
STANDARD_PAGES = ((1, True), (1, False), (64, True))  # page size, planned

_VALUES_WARPS = TILE_TOKENS // ATOM_TOKENS  # each gathers an atom's rows of a tile
_GATHER_STATE_BYTES = 16

# Prefill of 64 rows whose columns are all latent has a kernel of its own, whose loaders are a warpgroup.
_PREFILL_ENTRY, _PREFILL_FUNCTION = "decode/gathered/prefill.cu", "mla_gathered_prefill"
# Registers of scores, values and loaders: whether the latent part is wider than so many columns.
_WIDE_LATENT_DIM = 256
_PREFILL_REGISTERS = {True: (168, 160, 24), False: (168, 128, 88)}
_MAX_REGISTER_STEPS = 27  # of Q
_STEP_COLUMNS = 16
_LOADER_WARPS = 4
_LOADER_STATE_BYTES = 32
_VALID_BYTES = TILE_TOKENS // 8  # a bit for each token


@dataclass(frozen=True, slots=True)
class GatheredConfig(KernelConfig):
    """One compiled form of a kernel of gathered tokens.

    Attributes
    ----------
    planned : bool
        Whether it takes its work from a plan.
    clustered : bool
        Without a plan, whether the CTAs of a cluster share a query token.
    layout : CacheLayout
        Of the cache.
    by_request : bool
        Whether a job has all query tokens of a request, as in dense decode, and a mask of dense decode.
    extra_page_size : int
        Tokens per page of a second cache; 0: there is none.
    extra_layout : CacheLayout or None
        Of the second cache.
    """

    planned: bool = True
    clustered: bool = False
    layout: CacheLayout = BF16
    by_request: bool = False
    extra_page_size: int = NO_EXTRA
    extra_layout: CacheLayout | None = None

    @property
    def suffix(self) -> str:
        """The end of the name: a layout that is not that of the type, and the schedule."""
        layout = f"_{self.layout.name}" if self.layout.codec is not None else ""
        if self.by_request:
            return layout + self.mask_suffix + self.partial_suffix + self.refined_suffix
        extra = ""
        if self.extra_layout is not None:
            other = f"_{self.extra_layout.name}" if self.extra_layout is not self.layout else ""
            extra = f"_extra{self.extra_page_size}{other}"
        planned = "_planned" if self.planned else "_clustered" if self.clustered else "_static"
        return layout + extra + planned + self.partial_suffix + self.refined_suffix


def gathered_config(family: DecodeFamily, problem: SparseProblem, planned: bool) -> GatheredConfig:
    """The configuration of a family for a problem."""
    queries = problem.queries
    rows, of_share = queries.group_heads, problem.keys.cp_share
    scale_parts = family.scale_parts(queries.latent_dim, queries.dtype, rows, of_share=of_share)
    return GatheredConfig(
        family,
        latent_dim=queries.latent_dim,
        rope_dim=queries.rope_dim,
        dtype=queries.dtype,
        page_size=problem.keys.page_size,
        causal=False,
        float_partials=planned and family.has_float_partials(rows),
        scale_parts=scale_parts if planned else None,
        refined=family.refines(queries.dtype, rows),
        planned=planned,
        layout=problem.layout,
        extra_page_size=problem.keys.extra_page_size or NO_EXTRA,
        extra_layout=problem.extra_layout,
    )


def gathered_defines(family: DecodeFamily, config: KernelConfig) -> tuple[tuple[str, str], ...]:
    """The macros of decode/config.h and decode/gathered/work.h."""
    assert isinstance(config, GatheredConfig)
    defines = dict(DecodeFamily.defines(family, config))
    own = {
        "GATHERED": True,
        "PLANNED": config.planned,
        "CLUSTERED": config.clustered,
        "BY_REQUEST": config.by_request,
        "EXTRA_PAGE_SIZE": config.extra_page_size,
    }
    return tuple({**defines, **{f"MLA_{name}": str(int(value)) for name, value in own.items()}}.items())


def with_clustered(configs: list[GatheredConfig]) -> list[KernelConfig]:
    """Configurations, and of those without a plan the same for clusters."""
    return [*configs, *(replace(config, clustered=True) for config in configs if not config.planned)]


def dense_extra_configs(family: DecodeFamily) -> list[KernelConfig]:
    """Standard configurations with a second cache, of 16 bits: of DeepSeek V4, whose keys are all latent."""
    return [
        GatheredConfig(
            family, 512, 0, layout.dtype, 1, causal=False, layout=layout, extra_page_size=1, extra_layout=layout
        )
        for layout in DENSE_LAYOUTS.values()
    ]


@dataclass(frozen=True, slots=True)
class GatheredWideFamily(WideFamily):
    """The family of the wide kernel of gathered tokens (kernels_cu/decode/gathered/wide.cu)."""

    def shares_tokens(self, config: KernelConfig) -> bool:
        """But where probabilities are refined: no register is left (decode/gathered/cluster.h)."""
        return not config.refined

    def roles(self, config: KernelConfig) -> tuple[Role, ...]:
        """Those of the wide kernel; in its prefill without a rope part, a warpgroup that gathers besides."""
        if not _is_latent_prefill(config):
            return WideFamily.roles(self, config)
        scores, values, loaders = _PREFILL_REGISTERS[config.latent_dim > _WIDE_LATENT_DIM]
        return (
            Role("scores", hopper.WARPGROUP_THREADS, scores),
            Role("values", VALUES_WARPGROUPS * hopper.WARPGROUP_THREADS, values),
            Role("loaders", hopper.WARPGROUP_THREADS, loaders),
        )

    def source(self, config: KernelConfig) -> KernelSource:
        """One of two kernels."""
        if not _is_latent_prefill(config):
            return WideFamily.source(self, config)
        return KernelSource(_PREFILL_ENTRY, _PREFILL_FUNCTION, self.defines(config))

    def shared_memory(self, config: KernelConfig) -> int:
        """The total of decode/wide/smem.h, or of decode/gathered/prefill_smem.h."""
        if not _is_latent_prefill(config):
            return WideFamily.shared_memory(self, config)
        boxes = STAGES * (config.latent_dim // BOX_COLUMNS + 1)  # a tile, P
        shared_steps = max(config.latent_dim // _STEP_COLUMNS - _MAX_REGISTER_STEPS, 0)
        return (
            boxes * BOX_BYTES
            + shared_steps * self.rows * _STEP_COLUMNS * ELEMENT_BYTES
            + STAGES * self.rows * FLOAT_BYTES
            + _LOADER_WARPS * _LOADER_STATE_BYTES
            + STAGES * _VALID_BYTES
            + 3 * STAGES * BARRIER_BYTES
            + CLAIM_BYTES
        )

    def scale_parts(self, latent_dim: int, dtype: str, rows: int, *, of_share: bool = False) -> ColumnParts | None:
        """For shares too: of so few tokens as are chosen, many rows do not even out the roundings."""
        return wide_scale_parts(latent_dim, dtype, rows, of_share=of_share)

    def loader_bytes(self, config: KernelConfig) -> int:
        """A state of each values warp, and its byte of valid bits for each stage."""
        return _VALUES_WARPS * (_GATHER_STATE_BYTES + STAGES)

    def defines(self, config: KernelConfig) -> tuple[tuple[str, str], ...]:
        """The macros of decode/config.h and decode/gathered/work.h."""
        return gathered_defines(self, config)

    def standard_configs(self) -> list[KernelConfig]:
        """What `cupy-mla compile` prepares ahead of time and the tests compile."""
        configs = [
            GatheredConfig(self, latent, rope, dtype, page_size, causal=False, planned=planned)
            for (latent, rope), dtype, (page_size, planned) in itertools.product(
                STANDARD_DIMS, DENSE_LAYOUTS, STANDARD_PAGES
            )
        ]
        return with_clustered(configs) + dense_extra_configs(self)


def _is_latent_prefill(config: KernelConfig) -> bool:
    assert isinstance(config, GatheredConfig)
    return not config.planned and config.rope_dim == 0


# The tile from 128 requests of 2048 tokens with 64 heads; the rest as for the wide kernel, whose tiles TMA brings.
GATHERED_WIDE64 = GatheredWideFamily(
    name="gathered_wide64",
    entry="decode/gathered/wide.cu",
    function="mla_gathered_wide",
    rows=WIDE64.rows,
    cost=replace(WIDE64.cost, tile=2.4),
    combine_threads=WIDE64.combine_threads,
)
