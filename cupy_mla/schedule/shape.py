"""What bounds a schedule besides the lengths (`make` says what the words mean)."""

from __future__ import annotations

from dataclasses import dataclass

from ..call.shard import Shard
from ..errors import InvalidArgumentError
from .pieces import MAX_OVERHEAD, TILE_COST, TILE_TOKENS, PieceCosts, ceil_div, stay_whole

MAX_BLOCKS_PER_JOB = 8
HEAD_BLOCK_SHIFT = 16
MAX_ROW_BLOCKS = 1 << HEAD_BLOCK_SHIFT
# CTAs claim their parts (kernels_cu/decode/claim.h) if some parts have no work and others this many tiles. It takes up
# to 1 us, and gains 2% where a part has 64 tiles or more, 145 us.
CLAIM_TILES = 48

_DEFAULT_COST = PieceCosts()
_MAX_KV_HEADS = 1 << (31 - HEAD_BLOCK_SHIFT)
_MAX_LENGTH = 2**31 - 64  # int32, and so are the ends of the last tile's tokens
_MAX_COST = 2**30  # budgets stay clear of int32's end


@dataclass(frozen=True, slots=True)
class ScheduleShape:
    """All that bounds a schedule besides the lengths.

    Attributes
    ----------
    num_parts
        Parts to fill; the decode kernel has ``num_parts * blocks_per_job`` CTAs.
    blocks_per_job
        Row blocks of a job.
    rows
        Query rows of a row block.
    group_heads
        Query heads per kv head.
    num_heads_kv
        kv heads.
    batch
        Requests.
    seqlen_q
        Query tokens of a request; when ragged, of the longest.
    max_seqlen_k
        Largest length a request may have, in tokens; longer ones are taken for this.
    max_extra_k
        The same of a second list of keys, which follows the first from the next tile on; None: there is no second list.
    causal
        Whether query i of s_q sees keys up to length - s_q + i only.
    ragged
        Whether the number of query tokens differs among requests.
    fixed_split_tokens
        Cut every job after each so many tokens (a multiple of 64) and nowhere else, so that a request is cut the same
        way in any batch. None: cut where the load asks for it.
    total_q
        Query tokens of all requests together; needed when ragged.
    cost
        What pieces cost besides their tiles.
    requests_per_length, requests_per_extra_length
        Requests, one after the other, that share a length, and that share a length of the second list.
    lengths_vary
        Whether requests may be shorter than ``max_seqlen_k`` and ``max_extra_k``.
    shard
        Which tokens of whole requests the keys are, if a causal mask goes by places in these: lengths are those of
        whole requests then, but not ``max_seqlen_k``. None: the keys are all there are.

    Raises
    ------
    InvalidArgumentError
        A number out of range.
    """

    num_parts: int
    blocks_per_job: int
    rows: int
    group_heads: int
    num_heads_kv: int
    batch: int
    seqlen_q: int
    max_seqlen_k: int
    causal: bool = False
    ragged: bool = False
    fixed_split_tokens: int | None = None
    total_q: int | None = None
    cost: PieceCosts = _DEFAULT_COST
    requests_per_length: int = 1
    max_extra_k: int | None = None
    requests_per_extra_length: int = 1
    lengths_vary: bool = True
    shard: Shard | None = None

    def __post_init__(self) -> None:
        shared = "requests_per_length", "requests_per_extra_length"
        for name in ("num_parts", "blocks_per_job", "rows", "group_heads", "num_heads_kv", *shared):
            require(name, "a positive integer", getattr(self, name), getattr(self, name) > 0)
        for name in ("batch", "seqlen_q", "max_seqlen_k"):
            require(name, "a non-negative integer", getattr(self, name), getattr(self, name) >= 0)
        one_list = self.max_extra_k is None
        require("max_extra_k", "None of ragged or causal queries", self.max_extra_k, one_list or not self._has_mask)
        require("max_extra_k", "a non-negative integer", self.max_extra_k, (self.max_extra_k or 0) >= 0)
        require("total_q", "a number, since ragged", self.total_q, not self.ragged or self.total_q is not None)
        check_fixed_split(self.fixed_split_tokens)
        require("num_heads_kv", f"less than {_MAX_KV_HEADS}", self.num_heads_kv, self.num_heads_kv < _MAX_KV_HEADS)
        row_blocks = ceil_div(self.seqlen_q * self.group_heads, self.rows)
        way_out = "; max_seqlen_q says how many query tokens a request has" if self.ragged else ""
        require(
            "q", f"at most {MAX_ROW_BLOCKS} row blocks a request{way_out}", row_blocks, row_blocks <= MAX_ROW_BLOCKS
        )
        cost = ceil_div(self.max_jobs, self.num_parts) * (self.max_tiles * TILE_COST + MAX_OVERHEAD)
        require("max_seqlen_k", "less work for a part", self.max_seqlen_k, cost < _MAX_COST)

    @property
    def rows_per_job(self) -> int:
        """Query rows of a job, and of a partial slot."""
        return self.blocks_per_job * self.rows

    @property
    def jobs_per_request(self) -> int:
        """Jobs of a request with ``seqlen_q`` query tokens."""
        return self.num_heads_kv * ceil_div(self.seqlen_q * self.group_heads, self.rows_per_job)

    @property
    def max_tiles(self) -> int:
        """KV tiles of the longest request."""
        return ceil_div(self.max_seqlen_k, TILE_TOKENS) + ceil_div(self.max_extra_k or 0, TILE_TOKENS)

    @property
    def max_jobs(self) -> int:
        """Most jobs there can be."""
        jobs = self.batch * self.jobs_per_request
        if not self.ragged or self.total_q is None:
            return jobs
        # Only one job of each request and kv head is not full of rows.
        full = self.total_q * self.group_heads // self.rows_per_job
        return min(jobs, self.num_heads_kv * (full + self.batch))

    @property
    def fixed_split_tiles(self) -> int:
        """Tiles of a piece when the split is fixed, else 0."""
        return (self.fixed_split_tokens or 0) // TILE_TOKENS

    @property
    def may_claim(self) -> bool:
        """Whether CTAs may have to claim their parts: work can be long, and a part's CTAs need not be neighbours."""
        # The fullest part may hold more than the mean; one of more than twice as much has few others beside it.
        return self.blocks_per_job == 1 and self.max_jobs * self.max_tiles >= CLAIM_TILES * self.num_parts // 2

    @property
    def max_length(self) -> int:
        """Largest length of a request as a planner is given it, in tokens."""
        if self.shard is None:
            return self.max_seqlen_k
        return min(self.shard.longest_request(self.max_seqlen_k), _MAX_LENGTH)

    @property
    def _has_mask(self) -> bool:
        return self.ragged or self.causal

    @property
    def _max_cuts(self) -> int:
        """Most cuts, when jobs are cut only where one part ends and the next begins."""
        is_known = not self.lengths_vary and not self._has_mask
        if is_known and stay_whole(self.max_jobs, self.max_tiles, self.num_parts, self.cost):
            return 0
        return min(self.num_parts - 1, self.max_jobs * max(self.max_tiles - 1, 0))

    @property
    def _max_fixed_pieces(self) -> int:
        return ceil_div(self.max_tiles, self.fixed_split_tiles)

    @property
    def max_merges(self) -> int:
        """Most jobs that can be in more than one piece. 0: nothing is ever merged, whatever the lengths."""
        if self.fixed_split_tiles:
            return self.max_jobs if self._max_fixed_pieces > 1 else 0
        return min(self._max_cuts, self.max_jobs)

    @property
    def pieces_of_job(self) -> int:
        """About how many pieces each job is cut into of jobs fewer than the parts, as long as they may be."""
        if self.fixed_split_tiles:
            return max(self._max_fixed_pieces, 1)
        return min(ceil_div(self.num_parts, max(self.max_jobs, 1)), max(self.max_tiles, 1))

    @property
    def tiles_of_piece(self) -> int:
        """About how many tiles each of these pieces has."""
        return self.fixed_split_tiles or ceil_div(self.max_tiles, self.pieces_of_job)

    @property
    def max_items(self) -> int:
        """Most pieces."""
        if self.fixed_split_tiles:
            return self.max_jobs * max(self._max_fixed_pieces, 1)
        return self.max_jobs + self._max_cuts

    @property
    def max_slots(self) -> int:
        """Most partial results; each takes ``rows_per_job`` rows of memory."""
        if self.fixed_split_tiles:
            return self.max_merges * self._max_fixed_pieces
        return self._max_cuts + self.max_merges


def require(name: str, expected: str, got: object, condition: bool) -> None:
    """Refuse a number.

    Raises
    ------
    InvalidArgumentError
        ``condition`` is false: ``got`` is not what is expected.
    """
    if not condition:
        raise InvalidArgumentError(name, expected, str(got))


def check_fixed_split(tokens: int | None) -> None:
    """Refuse a fixed split that is not made of whole tiles.

    Raises
    ------
    InvalidArgumentError
        It is neither None nor a positive multiple of a tile's tokens.
    """
    whole = tokens is None or (tokens > 0 and tokens % TILE_TOKENS == 0)
    require("fixed_split_tokens", f"a positive multiple of {TILE_TOKENS}", tokens, whole)


def choose_parts(num_sms: int, row_blocks: int) -> tuple[int, int]:
    """Row blocks per job and number of parts that leave the fewest CTAs of a GPU idle.

    With R row blocks and G of them per job, ceil(R / G) jobs use R / (ceil(R / G) * G) of their CTAs, and
    num_sms // G groups of G CTAs fit the GPU. Among equals the larger G wins: CTAs of a job share what they read in L2.

    Parameters
    ----------
    num_sms
        Multiprocessors of the GPU, one CTA each.
    row_blocks
        Row blocks of one request and kv head: ceil(seqlen_q * group_heads / rows); for ragged batches, of one token.

    Returns
    -------
    blocks_per_job, num_parts : int

    Raises
    ------
    InvalidArgumentError
        ``num_sms`` is not positive.
    """
    require("num_sms", "a positive integer", num_sms, num_sms > 0)
    row_blocks = max(row_blocks, 1)
    best, best_parts, best_jobs = 1, num_sms, row_blocks
    for blocks in range(2, min(MAX_BLOCKS_PER_JOB, row_blocks, num_sms) + 1):
        parts, jobs = num_sms // blocks, ceil_div(row_blocks, blocks)
        # The busy share is row_blocks / num_sms * parts / jobs; compared without division.
        if parts * best_jobs >= best_parts * jobs:
            best, best_parts, best_jobs = blocks, parts, jobs
    return best, best_parts
