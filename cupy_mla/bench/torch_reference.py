"""Attention of one request in float64 with torch, on whatever device its tensors are on."""

from __future__ import annotations

import math
from typing import Any


def attention64(
    q: Any, keys: Any, scale: float, head_dim_v: int, causal: bool, attn_sink: Any = None
) -> tuple[Any, Any]:
    """The exact result for one request.

    Parameters
    ----------
    q
        [s_q, h, d] torch tensor.
    keys
        [length, d] torch tensor, the first ``head_dim_v`` columns are the values.
    scale, causal
        Factor on the scores; mask aligned to the bottom right.
    attn_sink
        [h] torch tensor: one more score of each head, of a key without a value; lse is without it. None: no sinks.

    Returns
    -------
    out [s_q, h, head_dim_v] and lse [h, s_q], float64; 0 and -inf for a query that sees nothing.
    """
    import torch

    seqlen_q, num_heads, _ = q.shape
    length = keys.shape[0]
    keys = keys.double()
    scores = scale * (q.double().flatten(0, 1) @ keys.T)  # [s_q * h, length]
    if causal:
        visible = length - seqlen_q + 1 + torch.arange(seqlen_q, device=q.device).repeat_interleave(num_heads)
        scores.masked_fill_(torch.arange(length, device=q.device) >= visible[:, None], -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = scores.sub_(torch.where(lse.isneginf(), 0.0, lse)[:, None]).exp_()
    out = weights @ keys[:, :head_dim_v]
    if attn_sink is not None:
        out /= 1 + torch.exp(attn_sink.double().repeat(seqlen_q) - lse)[:, None]
        out.nan_to_num_(nan=0.0)  # neither a key nor a sink
    return out.view(seqlen_q, num_heads, head_dim_v), lse.view(seqlen_q, num_heads).T


def relative_errors(found: tuple[Any, Any], exact: tuple[Any, Any]) -> tuple[float, float]:
    """Relative Frobenius error of out, and largest ``|lse - exact| / (1 + |exact|)``, 0 for an lse of None."""
    out_norm = float(exact[0].norm())
    difference = float((found[0].double() - exact[0]).norm())
    out_error = difference / out_norm if out_norm else (0.0 if difference == 0.0 else math.inf)
    if found[1] is None:
        return out_error, 0.0
    seen = ~exact[1].isneginf()
    if not bool((found[1].isneginf() == ~seen).all()):
        return out_error, math.inf
    errors = (found[1].double() - exact[1])[seen].abs() / (1 + exact[1][seen].abs())
    return out_error, float(errors.max()) if errors.numel() else 0.0
