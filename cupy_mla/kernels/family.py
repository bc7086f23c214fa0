"""What a family of decode kernels is, and one compiled form of it.

A family is one kernel file, made for so many query rows a CTA; a configuration is what it is compiled for. Shared
memory is added up in Python and again in the kernels' headers; the compiler refuses a configuration whose two sums
differ (``MLA_SHARED_BYTES``).
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..gpu.jit.source import KernelSource
from ..layouts import DENSE_LAYOUTS
from ..schedule.pieces import TILE_TOKENS
from .cost import CostModel
from .structs import DECODE_PARAMS

if TYPE_CHECKING:
    from ..call.problem import DecodeProblem
    from ..call.sparse_problem import SparseProblem

# Of core/smem_descriptor.h and decode/config.h.
BOX_COLUMNS = 64  # columns of one swizzled box that TMA writes
ATOM_TOKENS = 8  # rows after which the 128-byte swizzle repeats
ELEMENT_BYTES = 2
FLOAT_BYTES = 4
FEWEST_ROWS = 16  # query rows of a CTA of the smallest kernels
# Partial results of so few rows of a kv head may be float32: no more bytes than 16 bits are for twice the rows. For 16
# rows they would cost 0.7 to 2.3 us of 8 to 45 (1 x 4096 to 1 x 131072 tokens).
FLOAT_PARTIAL_ROWS = 4
BOX_BYTES = TILE_TOKENS * BOX_COLUMNS * ELEMENT_BYTES
BARRIER_BYTES = 8
CLAIM_BYTES = 8
_EXPONENTS_BYTES = 4  # of the parts of a row
_REFINED_ROWS = 8  # over more, the mean of the rounding counts

# What the models in use need: (latent, rope) of DeepSeek V2/V3/R1 and Kimi K2, without rope, and a small MLA.
STANDARD_DIMS = ((512, 64), (512, 0), (256, 64))
STANDARD_PAGE_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Role:
    """Threads of a CTA that do the same work, and the most registers that each of them has for it."""

    name: str
    threads: int
    registers: int


@dataclass(frozen=True, slots=True)
class ColumnParts:
    """Parts of a row's columns, each in one warp: column c is in part ``c // columns % count``.

    ``in_lse``: the power of two of a part is in the row's lse, of which there is one for each part.
    """

    columns: int
    count: int
    in_lse: bool = False


# One part, whose power of two is in the lse: core/partial_format.h.
ALL_COLUMNS = ColumnParts(columns=1, count=1, in_lse=True)


@dataclass(frozen=True, slots=True)
class DecodeFamily(ABC):
    """A decode kernel: what it serves, what it takes of an SM, and what its work costs.

    Attributes
    ----------
    name : str
        What users call it, e.g. ``"wide64"``.
    entry, function : str
        Its file in the kernel folder and its ``extern "C"`` function.
    rows : int
        Query rows of a CTA.
    cost : CostModel
        By which it is chosen and its work is cut.
    combine_threads : int
        Threads of a CTA of the merge that runs after it: as many as its CTAs leave room for, or as fill an SM.
    """

    name: str
    entry: str
    function: str
    rows: int
    cost: CostModel
    combine_threads: int

    @abstractmethod
    def why_unsupported(self, problem: DecodeProblem | SparseProblem) -> str | None:
        """Why the kernel cannot serve a problem, in words for the user; None when it can."""

    @abstractmethod
    def roles(self, config: KernelConfig) -> tuple[Role, ...]:
        """The threads of a CTA, by what they do."""

    @abstractmethod
    def shared_memory(self, config: KernelConfig) -> int:
        """Bytes of dynamic shared memory of a CTA."""

    def combine_shape(self, num_sms: int, rows: int, pieces: int, tiles: int) -> tuple[int, int]:
        """How many CTAs the merge that runs after it has, and their threads.

        Parameters
        ----------
        num_sms
            Multiprocessors of the GPU.
        rows
            Most rows that are merged.
        pieces, tiles
            Of each row, and of each of its pieces, about.
        """
        return num_sms, self.combine_threads

    def for_two_scales(self, config: KernelConfig) -> KernelConfig:
        """What serves calls of the same plan whose cache has a scale for each part, if their ratio may be no power of
        two.
        """
        return config

    def source(self, config: KernelConfig) -> KernelSource:
        """What the run-time compiler is given for a configuration."""
        return KernelSource(self.entry, self.function, self.defines(config))

    @property
    def params(self) -> np.dtype[np.void]:
        """Its by-value parameters: a struct that begins with the fields of DecodeParams."""
        return DECODE_PARAMS

    @property
    def gathers(self) -> bool:
        """Whether a kernel of dense decode brings tokens one by one, by their addresses; else TMA brings pages."""
        return False

    def copies_whole_tokens(self, config: KernelConfig) -> bool:
        """Whether one copy of a chunk brings all latent columns; else it brings one box."""
        return False

    @property
    def tile_parts(self) -> int:
        """Copies of whole tokens that bring their latent columns, one after the other."""
        return 1

    def shares_tokens(self, config: KernelConfig) -> bool:
        """Of gathered tokens without a plan, whether a cluster of CTAs can share a query token."""
        return False

    def has_float_partials(self, rows: int) -> bool:
        """Whether partial results are float32 when so many query rows share a kv head: decode/config.h says why."""
        return False

    @property
    def refined_rows(self) -> int:
        """How many rows `refines` takes for few."""
        return _REFINED_ROWS

    def refines(self, dtype: str, rows: int) -> bool:
        """Whether probabilities keep what bf16 leaves out of them when so many query rows share a kv head:
        decode/work_item.h says how.
        """
        return dtype == "bfloat16" and rows <= self.refined_rows

    def scale_parts(self, latent_dim: int, dtype: str, rows: int, *, of_share: bool = False) -> ColumnParts | None:
        """Parts of a row of partial results that are fp16 with a power of two each, when so many query rows share a kv
        head (core/partial_format.h); None: they are not. ``of_share``: results are merged with those of other ranks.
        """
        return None

    def configure(self, problem: DecodeProblem, rows: int) -> KernelConfig:
        """The configuration for a problem whose kv heads have so many query rows each.

        A mask is compiled in only where it can hide anything: one query token sees every key.
        """
        queries = problem.queries
        return KernelConfig(
            self,
            latent_dim=queries.latent_dim,
            rope_dim=queries.rope_dim,
            dtype=queries.dtype,
            page_size=problem.keys.page_size,
            causal=queries.causal and queries.seqlen_q > 1,
            float_partials=self.has_float_partials(rows),
            scale_parts=self.scale_parts(
                queries.latent_dim, queries.dtype, rows, of_share=problem.keys.cp_share
            ),
            refined=self.refines(queries.dtype, rows),
            sharded=problem.keys.shard is not None,
        )

    def defines(self, config: KernelConfig) -> tuple[tuple[str, str], ...]:
        """The macros of decode/config.h."""
        return (
            *DENSE_LAYOUTS[config.dtype].defines,
            ("MLA_LATENT", str(config.latent_dim)),
            ("MLA_ROPE", str(config.rope_dim)),
            ("MLA_GATHERED", "0"),
            ("MLA_PAGE_SIZE", str(config.page_size)),
            ("MLA_CAUSAL", str(int(config.causal))),
            ("MLA_ROWS", str(self.rows)),
            ("MLA_FLOAT_PARTIALS", str(int(config.float_partials))),
            ("MLA_REFINED_ROWS", str(self.refined_rows if config.refined else 0)),
            *scale_defines(config.scale_parts),
            *((("MLA_SHARDED", "1"),) if config.sharded else ()),
            ("MLA_SHARED_BYTES", str(config.shared_memory)),
        )

    def standard_configs(self) -> list[KernelConfig]:
        """What `cupy-mla compile` prepares ahead of time and the tests compile."""
        return [
            KernelConfig(
                self, latent, rope, dtype, page_size, causal, float_partials, refined=refined,
                scale_parts=None if float_partials else self.scale_parts(latent, dtype, self.rows),
            )
            for (latent, rope), dtype, page_size, causal in itertools.product(
                STANDARD_DIMS, DENSE_LAYOUTS, STANDARD_PAGE_SIZES, (False, True)
            )
            for float_partials, refined in self.standard_forms(dtype)
        ]  # fmt: skip

    def standard_forms(self, dtype: str) -> list[tuple[bool, bool]]:
        """``float_partials`` and ``refined`` of standard configurations: of many rows, and of few where the family is
        chosen for them unasked.
        """
        few = [(False, True)] if self.refines(dtype, 1) else []
        fewer = [(True, self.refines(dtype, 1))]
        return [(False, False), *(few + fewer if self.has_float_partials(1) else [])]


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """One compiled form of a decode kernel.

    Attributes
    ----------
    family : DecodeFamily
        The kernel.
    latent_dim, rope_dim : int
        Widths in elements.
    dtype : str
        ``"bfloat16"`` or ``"float16"``.
    page_size : int
        Tokens per page.
    causal : bool
        Whether the mask of speculative decoding is compiled in.
    float_partials : bool
        Whether partial results are float32, not of ``dtype``.
    scale_parts : ColumnParts or None
        Parts of a row of partial results that are fp16 with a power of two each, where ``dtype`` is bfloat16.
    refined : bool
        Whether probabilities keep what bf16 leaves out of them.
    sharded : bool
        Whether the mask goes by places in requests of which the cache has a shard.
    two_scales : bool
        Whether the sums of rope columns are multiplied by the ratio of two scales, not q.
    """

    family: DecodeFamily
    latent_dim: int
    rope_dim: int
    dtype: str
    page_size: int
    causal: bool
    float_partials: bool = False
    scale_parts: ColumnParts | None = None
    refined: bool = False
    sharded: bool = False
    two_scales: bool = False

    @property
    def name(self) -> str:
        """A short unique name, e.g. ``wide64_bfloat16_512+64_page64``."""
        return f"{self.family.name}_{self.dtype}_{self.latent_dim}+{self.rope_dim}_page{self.page_size}{self.suffix}"

    @property
    def suffix(self) -> str:
        """The end of the name: what besides type, widths and page size it is compiled for."""
        return self.mask_suffix + self.partial_suffix + self.refined_suffix + ("_two_scales" if self.two_scales else "")

    @property
    def mask_suffix(self) -> str:
        """What the name of a kernel says of the mask."""
        return ("_causal" if self.causal else "") + ("_sharded" if self.sharded else "")

    @property
    def rows(self) -> int:
        """Query rows of a CTA."""
        return self.family.rows

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return sum(role.threads for role in self.family.roles(self))

    @property
    def registers(self) -> int:
        """Most registers of a CTA, of all its threads together."""
        return sum(role.threads * role.registers for role in self.family.roles(self))

    @property
    def shared_memory(self) -> int:
        """Bytes of dynamic shared memory of a CTA."""
        return self.family.shared_memory(self)

    @property
    def partial_dtype(self) -> str:
        """Type of partial results."""
        if self.float_partials:
            return "float32"
        return self.dtype if self.scale_parts is None else "float16"

    @property
    def partial_suffix(self) -> str:
        """What the name of a kernel says of partial results that are not of ``dtype``."""
        if self.scale_parts is not None:
            parts = self.scale_parts
            if parts == ALL_COLUMNS:
                return "_scaled"
            return f"_{'marked' if parts.in_lse else 'scaled'}{parts.columns}x{parts.count}"
        return "_float" if self.float_partials else ""

    @property
    def refined_suffix(self) -> str:
        """What the name of a kernel says of probabilities."""
        return "_refined" if self.refined else ""

    @property
    def partial_lse_bytes(self) -> int:
        """Of a row of partial results: its lse, and the exponents of its parts; or its lses."""
        parts = self.scale_parts
        if parts is None or parts.in_lse:
            return FLOAT_BYTES * (1 if parts is None else parts.count)
        return FLOAT_BYTES + _EXPONENTS_BYTES

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a tile that surely lie in one page: what TMA writes at once."""
        return math.gcd(self.page_size, TILE_TOKENS)

    @property
    def group_tokens(self) -> int:
        """Tokens of a chunk in one swizzle atom."""
        return min(self.chunk_tokens, ATOM_TOKENS)

    @property
    def copies_whole_tokens(self) -> bool:
        """Whether one copy of a chunk brings all latent columns; else it brings one box."""
        return self.family.copies_whole_tokens(self)

    def source(self) -> KernelSource:
        """What the run-time compiler is given."""
        return self.family.source(self)


def scale_defines(parts: ColumnParts | None) -> tuple[tuple[str, str], ...]:
    """The macros of core/partial_format.h."""
    parts = parts or ColumnParts(columns=1, count=0)
    return (
        ("MLA_SCALE_COLUMNS", str(parts.columns)),
        ("MLA_SCALE_PARTS", str(parts.count)),
        ("MLA_POWER_IN_LSE", str(int(parts.in_lse))),
    )


def why_not_dense(problem: DecodeProblem | SparseProblem) -> str | None:
    """Why a kernel that multiplies tiles as the cache stores them cannot serve a problem; None when it can."""
    layout, dtype = problem.layout, problem.queries.dtype
    if layout not in DENSE_LAYOUTS.values():
        dense = " or ".join(other.name for other in DENSE_LAYOUTS.values())
        return f"takes a cache in the layout {dense}, not {layout.name}"
    if dtype not in layout.query_dtypes:
        return f"takes queries of {' or '.join(layout.query_dtypes)} for the layout {layout.name}, not {dtype}"
    return None
