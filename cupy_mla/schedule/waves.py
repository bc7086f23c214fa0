"""How a prefill deals out its query tokens: whole ones in turn, and the rest of the last wave by clusters of CTAs."""

from __future__ import annotations

from dataclasses import dataclass

from .pieces import TILE_TOKENS, ceil_div

# CTAs of a cluster: 8 are the most that every GPU with clusters takes. 5 and 6 are slower than 4; where 7 fit, so do 8.
CLUSTERS = (8, 4, 3, 2)
# Measured on an H200 (kernels_cu/TRIED_PREFILL.md): tiles that take as long as a launch for clusters and the merge of
# what their CTAs find; and tiles that each CTA should have.
MERGE_TILES = 7
CTA_TILES = 2
# Of all SMs, those that clusters of more than two CTAs can count on: a cluster's are all in one part of the chip, which
# has 18 or fewer. Of 132 at hand clusters of 8 and 4 filled 120, those of 3 117.
_SHARE_OF_SMS = 7 / 8


@dataclass(frozen=True, slots=True)
class Waves:
    """What becomes of query tokens.

    Attributes
    ----------
    parts
        CTAs of a row block and kv head that take the first tokens in turn.
    whole
        How many these are; none where `parts` is 0.
    rest
        Tokens after them, each of which a cluster shares.
    cluster
        CTAs of each cluster.
    """

    parts: int
    whole: int
    rest: int = 0
    cluster: int = 1


def deal_out(tokens: int, topk: int, blocks: int, num_sms: int, *, may_share: bool = True) -> Waves:
    """Query tokens to CTAs.

    A CTA is as busy with the last of its tokens as with any other, however few CTAs have so many. So the tokens that
    are over once all CTAs have equally many are cut, if there are SMs for it.

    Parameters
    ----------
    tokens
        Query tokens.
    topk
        Indices of each.
    blocks
        CTAs that share a token in any case: row blocks of all kv heads.
    num_sms
        Multiprocessors of the GPU, one CTA each.
    may_share
        Whether there is a kernel whose CTAs share a token.
    """
    parts = max(num_sms // blocks, 1)
    rest, tiles = tokens % parts, ceil_div(topk, TILE_TOKENS)
    for cluster in CLUSTERS if may_share and rest else ():
        room = num_sms if cluster == min(CLUSTERS) else int(num_sms * _SHARE_OF_SMS)
        fits = rest * blocks * cluster <= room
        if fits and tiles >= CTA_TILES * cluster and tiles - ceil_div(tiles, cluster) >= MERGE_TILES:
            whole = tokens - rest
            return Waves(min(parts, whole), whole, rest, cluster)
    return Waves(min(parts, tokens), tokens)
