"""torch's scaled_dot_product_attention over a cache gathered into one array: what there is without any package."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..grid import DECODE, BenchCase
from ..inputs import Call, Inputs
from .base import Peer, beyond

_NO_TOKEN_YET = 1  # a softmax over nothing is NaN: a query that sees no token sees one, and its result is cleared


class TorchPeer(Peer):
    """Gather, then attention of every request at once; the gather is part of the call.

    MLA has one kv head, so the heads of q become further rows of it and nothing is repeated.
    """

    name = "torch"

    def unsupported(self, case: BenchCase) -> str | None:
        return beyond(case, DECODE) or (None if case.kv_lengths.any() else "no cached token at all")

    def prepare(self, inputs: Inputs) -> Call:
        from torch.nn.functional import scaled_dot_product_attention

        case = inputs.case
        tokens = int(inputs.spec.kv_lengths.max())
        q_rows, unpad = _padded_query(inputs)
        mask, blind = _mask(inputs, tokens)
        first = inputs.caches[0]
        slots = [_slots(inputs, part, tokens) for part in (first if isinstance(first, tuple) else (first,))]

        def call(cache: Any) -> tuple[Any, Any]:
            keys = _gather(cache if isinstance(cache, tuple) else (cache,), slots)
            keys = keys.view(case.batch, 1, tokens, inputs.spec.head_dim)
            values = keys[..., : case.latent_dim]
            out = scaled_dot_product_attention(q_rows, keys, values, attn_mask=mask, scale=inputs.spec.scale)
            if blind is not None:
                out = out.masked_fill(blind, 0)
            out = out.reshape(-1, case.num_heads_q, case.latent_dim)
            return (out.view(case.batch, case.seqlen_q, *out.shape[1:]) if unpad is None else out[unpad]), None

        return call


def _padded_query(inputs: Inputs) -> tuple[Any, Any]:
    """q as [batch, 1, seqlen_q * h, d], and when ragged the rows [total_q] of its tokens among batch * seqlen_q."""
    import torch

    case = inputs.case
    rows = (case.batch, 1, case.seqlen_q * case.num_heads_q, inputs.spec.head_dim)
    if case.ragged is None:
        return inputs.q.reshape(rows), None
    token = np.arange(case.seqlen_q)
    unpad = torch.tensor(np.flatnonzero(token < inputs.spec.q_lengths[:, None]), device=inputs.q.device)
    padded = inputs.q.new_zeros(case.batch * case.seqlen_q, *inputs.q.shape[1:])
    padded[unpad] = inputs.q
    return padded.view(rows), unpad


def _mask(inputs: Inputs, tokens: int) -> tuple[Any, Any]:
    """What is added to the scores [batch, 1, rows, tokens], and where a row of q sees no token [batch, 1, rows, 1].

    None where it would change nothing. ``rows`` is seqlen_q * h, or 1 where all of a request see the same.
    """
    import torch

    case = inputs.case
    lengths = inputs.spec.kv_lengths[:, None]
    visible = lengths
    if case.causal:
        behind = inputs.spec.q_lengths[:, None] - np.arange(1, case.seqlen_q + 1)  # query tokens after this one
        visible = np.clip(lengths - behind, 0, lengths)
        if case.seqlen_q > 1:
            visible = np.repeat(visible, case.num_heads_q, axis=1)
    seen = torch.tensor(visible, device=inputs.q.device)[:, None, :, None]
    blind = seen == 0 if (visible == 0).any() else None
    if (visible == tokens).all():
        return None, blind
    hidden = torch.arange(tokens, device=inputs.q.device) >= seen.clamp(min=_NO_TOKEN_YET)
    mask = torch.zeros(hidden.shape, dtype=inputs.q.dtype, device=inputs.q.device)
    return mask.masked_fill_(hidden, float("-inf")), blind


def _rows_per_page(part: Any) -> int:
    """Distance of two pages of a cache in rows of it: more than the page size when it is a view into a pool."""
    page_stride, row_stride = part.stride()[:2]
    return int(page_stride // row_stride)


def _slots(inputs: Inputs, part: Any, tokens: int) -> Any:
    """[batch * tokens] int64: the row, among all rows of ``part``, of every token of every request.

    Behind a request's end it is its first token's (of an empty request row 0): memory past the end may hold NaN, which
    no mask keeps out of a product with zero.
    """
    import torch

    case = inputs.case
    position = torch.arange(tokens, device=inputs.q.device)
    length = torch.tensor(inputs.spec.kv_lengths, device=inputs.q.device)[:, None]
    position = torch.where(position < length, position, 0)
    page = inputs.block_table.long().gather(1, position // case.page_size)
    page = torch.where(length > 0, page, 0)
    return (page * _rows_per_page(part) + position % case.page_size).flatten()


def _gather(parts: tuple[Any, ...], slots: list[Any]) -> Any:
    """[batch * tokens, d]: the tokens, one behind the other."""
    import torch

    gathered = []
    for part, rows in zip(parts, slots, strict=True):
        pages, page_size, _, width = part.shape
        count = (pages - 1) * _rows_per_page(part) + page_size
        gathered.append(part.as_strided((count, width), (part.stride(1), 1)).index_select(0, rows))
    return gathered[0] if len(gathered) == 1 else torch.cat(gathered, -1)


def load() -> TorchPeer:
    """torch itself.

    Raises
    ------
    ImportError
        It is not installed.
    """
    import torch

    return TorchPeer(str(torch.__version__))
