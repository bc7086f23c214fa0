"""Which tokens of a request lie on which rank, where a cache is sharded along the sequence over several GPUs.

Token t lies on rank ``t // interleave % world``, behind the tokens before it that lie there: what vLLM and SGLang call
decode context parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import InvalidArgumentError

# Of kernels_cu/core/shard.h: a shard is one word of a plan.
MAX_WORLD = 2**8 - 1
MAX_INTERLEAVE = 2**16 - 1
RANK_SHIFT, INTERLEAVE_SHIFT = 8, 16
WHOLE_KEYS = 0  # the word of keys that are not sharded


@dataclass(frozen=True, slots=True)
class Shard:
    """The tokens of one rank.

    Attributes
    ----------
    world
        Ranks that share the cache.
    rank
        Which of them, from 0.
    interleave
        Tokens in a row that lie on the same rank.

    Raises
    ------
    InvalidArgumentError
        A number is out of range; ``argument`` is ``cp_world``, ``cp_rank`` or ``cp_interleave``.
    """

    world: int
    rank: int
    interleave: int = 1

    def __post_init__(self) -> None:
        for name, least, most in (
            ("world", 1, MAX_WORLD),
            ("rank", 0, self.world - 1),
            ("interleave", 1, MAX_INTERLEAVE),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise InvalidArgumentError(f"cp_{name}", f"{least} to {most}", str(value))

    def count(self, tokens: Any) -> Any:
        """How many of a request's first ``tokens`` tokens the rank has: of a number, or of an array of any framework
        that has ``//``, ``%`` and ``clip``.
        """
        full_round = self.world * self.interleave
        rest = tokens % full_round - self.rank * self.interleave
        if isinstance(tokens, int):
            return tokens // full_round * self.interleave + min(max(rest, 0), self.interleave)
        return tokens // full_round * self.interleave + rest.clip(0, self.interleave)

    def longest_request(self, tokens: int) -> int:
        """The longest request of which the rank has at most so many tokens."""
        rounds, rest = divmod(tokens, self.interleave)
        return rounds * self.world * self.interleave + self.rank * self.interleave + rest

    def has(self, tokens: Any) -> Any:
        """Whether the rank has a token: of a number, or of each of an array."""
        return tokens // self.interleave % self.world == self.rank

    @property
    def word(self) -> int:
        """As kernels_cu/core/shard.h reads it."""
        return self.world | self.rank << RANK_SHIFT | self.interleave << INTERLEAVE_SHIFT
