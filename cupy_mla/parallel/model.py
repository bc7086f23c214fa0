"""A model of the time that a context-parallel decode takes, for any number of ranks: what was measured on one H200 and
between two, put together.

Where its figures come from: the decode is the cost model by which kernels are chosen (kernels/cost.py). Collectives
were measured on two H200 of one host, NCCL 2.28 in CUDA graphs, and are taken to depend on the bytes that a rank
receives alone, whatever the number of ranks: for more than two ranks of a host that is the least they take, over a
network it does not hold. Copies and merges are lines through what they took on one H200.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..arrays.dtypes import ITEM_SIZES
from ..call.problem import LSE_DTYPE
from ..call.shard import Shard
from ..decode.support import problem_of
from ..gpu import hopper
from ..kernels.choose import choose_config, load_of
from ..layouts import DENSE_LAYOUTS, find_layout
from .exchange import ROWS_OF_REQUEST

# us against bytes that each of two ranks received: 1, 16 and 128 requests, 64 heads of the other rank.
_REQUESTS = np.array([1, 16, 128])
_GATHER_BYTES, _GATHER_US = _REQUESTS * 64 * 576 * 2, (9.5, 26.5, 61.5)
_EXCHANGE_BYTES, _EXCHANGE_US = _REQUESTS * 64 * 512 * 2, (11.5, 18.4, 58.2)
# us of a copy that makes heads of several ranks lie together, and of a merge by its rows and the rows that it reads.
_COPY_START, _COPY_BYTES_PER_US = 3.0, 1.9e6
_MERGE_START, _MERGE_PER_ROW, _MERGE_PER_ROW_READ = 3.0, 1.5e-3, 1.2e-4


@dataclass(frozen=True, slots=True)
class CallSize:
    """What the time of a call depends on.

    Attributes
    ----------
    batch, tokens
        Requests, and tokens of each on all ranks.
    num_heads_q
        Query heads of all ranks together.
    seqlen_q, causal, page_size, dtype, latent_dim, rope_dim
        As in ``mla_decode``.
    layout
        Name of the cache's layout; None: the dense one of ``dtype``.
    """

    batch: int
    tokens: int
    num_heads_q: int
    seqlen_q: int = 1
    causal: bool = False
    page_size: int = 64
    dtype: str = "bfloat16"
    latent_dim: int = 512
    rope_dim: int = 64
    layout: str | None = None

    @property
    def rows(self) -> int:
        """Query rows of all heads."""
        return self.batch * self.seqlen_q * self.num_heads_q


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Microseconds of the parts of a call on the slowest rank.

    Attributes
    ----------
    gather, exchange
        Collectives: queries of all heads to all ranks, results to the ranks whose heads they are of.
    decode
        All heads over the rank's tokens.
    copies
        Queries and results of several query tokens to where kernels and collectives want them; or, where ranks are
        requests, their pages.
    merge
        Results of all ranks.
    """

    gather: float
    decode: float
    copies: float
    exchange: float
    merge: float

    @property
    def total(self) -> float:
        """One after the other, as they run."""
        return self.gather + self.decode + self.copies + self.exchange + self.merge


def model_times(size: CallSize, world: int, interleave: int = 1) -> StepTimes:
    """About how long `cp_decode` takes on so many H200 of one host; of one rank, a decode alone.

    Raises
    ------
    InvalidArgumentError
        No kernel takes such a call, or a number is out of range.
    """
    tokens = Shard(world, 0, interleave).count(size.tokens)  # no rank has more than the first
    if world == 1:
        return StepTimes(0.0, _decode_us(size, tokens), 0.0, 0.0, 0.0)
    own_heads = size.num_heads_q // world
    are_requests = size.seqlen_q > 1 and size.seqlen_q * own_heads >= ROWS_OF_REQUEST
    called = replace(size, batch=size.batch * world, num_heads_q=own_heads) if are_requests else size
    item_size, received = ITEM_SIZES[size.dtype], (world - 1) / world
    query_bytes = size.rows * (size.latent_dim + size.rope_dim) * item_size
    result_bytes = size.rows * (size.latent_dim * item_size + ITEM_SIZES[LSE_DTYPE])
    copies: list[int] = [] if size.seqlen_q == 1 else [0] if are_requests else [query_bytes, result_bytes]
    rows = size.rows / world
    return StepTimes(
        gather=_collective_us(query_bytes * received, _GATHER_BYTES, _GATHER_US),
        decode=_decode_us(called, tokens),
        copies=sum(_COPY_START + copied / _COPY_BYTES_PER_US for copied in copies),
        exchange=_collective_us(result_bytes * received, _EXCHANGE_BYTES, _EXCHANGE_US),
        merge=_MERGE_START + rows * (_MERGE_PER_ROW + world * _MERGE_PER_ROW_READ),
    )


def _collective_us(received: float, measured_bytes: np.ndarray, measured_us: tuple[float, ...]) -> float:
    """On the lines between what was measured; the last one goes on, and nothing is quicker than the first."""
    (*_, before, last), (*_, us_before, us_last) = measured_bytes, measured_us
    if received > last:
        return float(us_last + (received - last) * (us_last - us_before) / (last - before))
    return float(np.interp(received, measured_bytes, measured_us))


def _decode_us(size: CallSize, tokens: int) -> float:
    """By the cost model of the kernel that would run."""
    layout = DENSE_LAYOUTS[size.dtype] if size.layout is None else find_layout(size.layout)
    sizes = {
        "num_heads_q": size.num_heads_q,
        "num_heads_kv": 1,
        "latent_dim": size.latent_dim,
        "rope_dim": size.rope_dim,
        "page_size": size.page_size,
        "batch": size.batch,
        "seqlen_q": size.seqlen_q,
        "max_seqlen_k": tokens,
    }
    problem = problem_of(sizes, size.dtype, layout, size.causal)
    config = choose_config(problem, hopper.COMMON_SMS)
    return config.family.cost.call_time(load_of(problem, tokens), config.family.rows, hopper.COMMON_SMS)
