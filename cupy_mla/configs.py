"""Kernel configurations: from a problem to the kernel that is compiled and launched for it.

Shared memory is added up here and again in the kernels' headers; the compiler refuses a configuration whose two sums
differ (``MLA_SHARED_BYTES``).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .schedule import TILE_TOKENS

if TYPE_CHECKING:
    from .jit.source import KernelSource
    from .problem import DecodeProblem

BOX_COLUMNS = 64  # columns of one swizzled copy-engine box: core/smem_descriptor.h, kBoxColumns
MAX_SHARED_BYTES = 232_448  # dynamic shared memory that a Hopper block can opt in to

WIDE_ROWS = 64  # rows of wgmma's M
NARROW_ROWS = (16, 32)  # rows of wgmma's N, the operands swapped

_NARROW_THREADS = 160  # one consumer warpgroup, one producer warp
_NARROW_CONSUMER_WARPS = 4
_NARROW_PROBABILITY_BUFFERS = 2
_WIDE_STAGES = 3
_WIDE_MAX_REGISTER_STEPS = 31
_WIDE_THREADS = 384
_WIDE_LATENT_MULTIPLE = 128  # two values warpgroups take whole boxes each
MAX_LATENT_DIM = 512  # 2 * 256 columns: wgmma's widest N, twice
_STEP_COLUMNS = 16
_ELEMENT_BYTES = 2
_FLOAT_BYTES = 4
_BOX_BYTES = TILE_TOKENS * BOX_COLUMNS * _ELEMENT_BYTES
_LOADER_STATE_BYTES = 32
_BARRIER_BYTES = 8

DTYPE_TAGS = {"bfloat16": "Bf16", "float16": "Fp16"}


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """One compiled form of a dense decode kernel.

    Attributes
    ----------
    kernel : str
        ``"wide"`` or ``"narrow"``: kernels_cu/decode/wide.cu, narrow.cu.
    rows : int
        Query rows of a CTA.
    latent_dim, rope_dim : int
        Widths in elements.
    dtype : str
        ``"bfloat16"`` or ``"float16"``.
    page_size : int
        Tokens per page.
    causal : bool
        Whether the mask of speculative decoding is compiled in.
    """

    kernel: str
    rows: int
    latent_dim: int
    rope_dim: int
    dtype: str
    page_size: int
    causal: bool

    @property
    def name(self) -> str:
        """A short unique name, e.g. ``wide64_bfloat16_512+64_page64``."""
        causal = "_causal" if self.causal else ""
        return f"{self.kernel}{self.rows}_{self.dtype}_{self.latent_dim}+{self.rope_dim}_page{self.page_size}{causal}"

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return _WIDE_THREADS if self.kernel == "wide" else _NARROW_THREADS

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a tile that surely lie in one page: what one copy-engine box takes."""
        return math.gcd(self.page_size, TILE_TOKENS)

    @property
    def boxes_per_load(self) -> int:
        """Boxes of 64 latent columns that one copy-engine instruction loads: all where a stage holds whole tiles."""
        whole_tiles = self.kernel == "wide" and self.chunk_tokens == TILE_TOKENS
        return self.latent_dim // BOX_COLUMNS if whole_tiles else 1

    @property
    def shared_memory(self) -> int:
        """Bytes of dynamic shared memory: the totals in decode/wide_smem.h and decode/narrow_smem.h."""
        return self._wide_shared_memory() if self.kernel == "wide" else self._narrow_shared_memory()

    def _wide_shared_memory(self) -> int:
        boxes = self.latent_dim // BOX_COLUMNS + max(self.rope_dim // BOX_COLUMNS, 1)
        steps = (self.latent_dim + self.rope_dim) // _STEP_COLUMNS
        shared_steps = max(steps - _WIDE_MAX_REGISTER_STEPS, 0)
        ring = _WIDE_STAGES * boxes * _BOX_BYTES
        query = shared_steps * self.rows * _STEP_COLUMNS * _ELEMENT_BYTES
        factors = _WIDE_STAGES * self.rows * _FLOAT_BYTES
        barriers = 3 * _WIDE_STAGES * _BARRIER_BYTES
        return ring + query + factors + _LOADER_STATE_BYTES + barriers

    def _narrow_shared_memory(self) -> int:
        row_box = self.rows * BOX_COLUMNS * _ELEMENT_BYTES
        boxes = (self.latent_dim + self.rope_dim) // BOX_COLUMNS
        fixed = (boxes + _NARROW_PROBABILITY_BUFFERS) * row_box + _NARROW_CONSUMER_WARPS * self.rows * _FLOAT_BYTES
        slot = _BOX_BYTES + 2 * _BARRIER_BYTES
        return fixed + (MAX_SHARED_BYTES - fixed) // slot * slot  # as many KV boxes as fit

    def source(self) -> KernelSource:
        """What the run-time compiler is given."""
        from .jit.source import KernelSource

        return KernelSource(
            entry=f"decode/{self.kernel}.cu",
            function=f"mla_decode_{self.kernel}",
            defines=(
                ("MLA_DTYPE", DTYPE_TAGS[self.dtype]),
                ("MLA_LATENT", str(self.latent_dim)),
                ("MLA_ROPE", str(self.rope_dim)),
                ("MLA_PAGE_SIZE", str(self.page_size)),
                ("MLA_CAUSAL", str(int(self.causal))),
                ("MLA_ROWS", str(self.rows)),
                ("MLA_SHARED_BYTES", str(self.shared_memory)),
            ),
        )


def choose_config(problem: DecodeProblem) -> KernelConfig:
    """The configuration that serves a problem.

    Rows are the query heads and tokens that share a kv head. Up to 32 rows, swapped operands waste no tensor work on
    padding and leave room for a deeper ring; beyond, 64 rows a CTA read the cache the fewest times.
    A mask is compiled in only where it can hide anything: one query token sees every key.
    """
    tokens = -(-problem.total_q // max(problem.batch, 1))  # of a request, on average when ragged
    rows = problem.group_heads * tokens
    fitting = [narrow for narrow in NARROW_ROWS if rows <= narrow]
    return KernelConfig(
        kernel="narrow" if fitting else "wide",
        rows=fitting[0] if fitting else WIDE_ROWS,
        latent_dim=problem.latent_dim,
        rope_dim=problem.rope_dim,
        dtype=problem.dtype,
        page_size=problem.page_size,
        causal=problem.causal and problem.seqlen_q > 1,
    )


# What the models in use need: (latent, rope) of DeepSeek V2/V3/R1 and Kimi K2, without rope, and a small MLA.
STANDARD_DIMS = ((512, 64), (512, 0), (256, 64))
STANDARD_PAGE_SIZES = (16, 32, 64, 128)


def standard_configs() -> list[KernelConfig]:
    """The configurations that `cupy-mla compile` prepares ahead of time and the tests compile."""
    kernels = [("wide", WIDE_ROWS), *(("narrow", rows) for rows in NARROW_ROWS)]
    return [
        KernelConfig(kernel, rows, latent, rope, dtype, page_size, causal)
        for (kernel, rows), (latent, rope), dtype, page_size, causal in itertools.product(
            kernels, STANDARD_DIMS, DTYPE_TAGS, STANDARD_PAGE_SIZES, (False, True)
        )
    ]
