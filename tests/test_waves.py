"""How a prefill deals out its query tokens."""

from __future__ import annotations

import itertools

import pytest

from cupy_mla.schedule.pieces import TILE_TOKENS
from cupy_mla.schedule.waves import CLUSTERS, Waves, deal_out

NUM_SMS = 132


@pytest.mark.parametrize(
    ("tokens", "blocks", "waves"),
    [
        (4096, 1, Waves(132, 4092, 4, 8)),
        (4096, 2, Waves(66, 4092, 4, 8)),
        (4092, 1, Waves(132, 4092)),
        (256, 1, Waves(132, 256)),  # most SMs are busy in the last wave
        (132 + 20, 1, Waves(132, 132, 20, 4)),
        (132 + 38, 1, Waves(132, 132, 38, 3)),
        (132 + 66, 1, Waves(132, 132, 66, 2)),
        (132 + 67, 1, Waves(132, 132 + 67)),
        (1, 1, Waves(0, 0, 1, 8)),
        (3, 200, Waves(1, 3)),
    ],
)
def test_long_query_tokens(tokens: int, blocks: int, waves: Waves) -> None:
    assert deal_out(tokens, 2048, blocks, NUM_SMS) == waves


def test_short_query_tokens_are_shared_by_fewer_or_not_at_all() -> None:
    clusters = [deal_out(1, tiles * TILE_TOKENS, 1, NUM_SMS).cluster for tiles in (32, 16, 15, 10, 9, 8, 1, 0)]
    assert clusters == [8, 8, 4, 4, 1, 1, 1, 1]


def test_what_no_kernel_shares_stays_whole() -> None:
    assert deal_out(136, 2048, 1, NUM_SMS, may_share=False) == Waves(132, 136)


def test_every_token_is_dealt_out_and_what_is_shared_runs_at_once() -> None:
    numbers_of_tokens = 1, 7, 66, 100, 131, 132, 133, 1000
    for tokens, blocks, sms in itertools.product(numbers_of_tokens, (1, 2, 3, 8, 150), (78, 114, 132)):
        waves = deal_out(tokens, 1000, blocks, sms)
        assert waves.whole + waves.rest == tokens
        assert (waves.parts > 0) == (waves.whole > 0)
        if waves.rest:
            assert waves.cluster in CLUSTERS
            assert waves.whole % max(sms // blocks, 1) == 0
            assert waves.rest * waves.cluster * blocks <= sms
