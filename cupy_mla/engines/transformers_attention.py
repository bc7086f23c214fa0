"""The attention function and the mask function that transformers calls in models that are enabled.

A step with few new tokens is *absorbed*: queries are taken through the keys' half of ``kv_b_proj`` into the space of
the latent, the kernels attend to the latents as they lie in the cache, and the results go through the values' half.
What any other call does is what the model would do: its keys and values are expanded, and its former attention runs.

The mask of an absorbed step is not a mask but the *range* of tokens that each request sees, int32 [batch, 1, 1, 2]: the
first one and the one after the last. It has four dimensions as transformers leaves such alone, and is made at the same
time as other masks, thus before a compiled forward where `generate` compiles one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import torch_ops as torch_ops  # registers torch.ops.cupy_mla
from .transformers_cache import PAGE_SIZE, ROOM, row_tokens

PREFIX = "cupy_mla+"  # and the name of the former attention
SERVED = "cupy_mla"  # attribute of an attention module: its `Served`
HAS_ROOM = "cupy_mla_has_room"  # argument that goes through an attention module: see `transformers_cache.has_room`
# At DeepSeek's sizes, expanding every latent of the cache costs as much arithmetic as absorbing about so many tokens.
MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Step:
    """What all layers of a step share: where each request's pages are, and the split of the batch.

    Attributes
    ----------
    ranges
        The mask that it was made of.
    row
        Tokens from a request to the next, in the caches that it is for.
    block_table, cache_seqlens, plan
        As the kernels take them. A page's number is that of its first token, as pages overlap.
    """

    ranges: Any
    row: int
    block_table: Any
    cache_seqlens: Any
    plan: Any


@dataclass
class Shared:
    """What attention modules on one device share."""

    step: Step | None = None


@dataclass(frozen=True)
class Served:
    """What an attention module that is enabled has at hand.

    Attributes
    ----------
    shared
        That of all modules on its device.
    first
        Whether it is the first of them in a forward pass, so that a step is made anew.
    former
        Attention function of the model before.
    """

    shared: Shared = field(repr=False)
    first: bool
    former: Callable[..., Any] = field(repr=False)


def register(former: str) -> str:
    """Make known to transformers the attention that stands for ``former``, and say its name."""
    name = PREFIX + former
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, attention_beside(former))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask_beside(ALL_MASK_ATTENTION_FUNCTIONS[former]))
    return name


def attention_of(former: str, module: Any) -> Callable[..., Any]:
    """The function of a registered attention; of eager attention, which each model has its own of."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(former, eager)
    return function


def attention_beside(former: str) -> Callable[..., Any]:
    """An attention function as transformers calls it."""

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **others: Any
    ) -> tuple[Any, None]:
        has_room = others.pop(HAS_ROOM, False)
        served = getattr(module, SERVED, None)
        indices = others.get("indices")  # of sparse attention: [batch, new, topk]
        if served is None:  # another kind of attention in the same model
            ordinary = attention_of(former, module)
        elif attention_mask is not None and attention_mask.dtype == torch.int32:
            return absorbed(module, served, query, key, value, attention_mask, scaling, has_room), None
        elif indices is not None and is_sparse_step(query, key):
            return absorbed_sparse(module, query, key, value, attention_mask, indices, scaling), None
        else:
            ordinary = served.former
            key, value = type(module).expand_kv(module, key, value)
            if indices is not None:
                attention_mask = masked_but_at(indices, attention_mask)
        result: tuple[Any, None] = ordinary(module, query, key, value, attention_mask, scaling=scaling, **others)
        return result

    return attention


def absorbed(
    module: Any, served: Served, query: Any, latent: Any, rope: Any, ranges: Any, scaling: float, has_room: bool
) -> Any:
    """Attention of a few new tokens to latents and ropes [batch, 1, tokens, width]; [batch, new, heads, v_head_dim].

    ``query`` is [batch, heads, new, qk_nope_head_dim + qk_rope_head_dim], ``has_room`` whether caches have room behind
    each row.
    """
    if not has_room:
        latent, rope = (torch.nn.functional.pad(part, (0, 0, 0, ROOM)) for part in (latent, rope))
    q_latent, q_rope = absorbed_queries(module, query)
    arrays = (q_latent, pages(latent))
    options = {"causal": q_latent.shape[1] > 1, "head_dim_v": q_latent.shape[3]}
    ropes = {"q_rope": q_rope, "kv_rope": pages(rope)}
    shared = served.shared
    step = shared.step
    if served.first or step is None or step.ranges is not ranges or step.row != row_tokens(latent):
        step = shared.step = make_step(ranges, row_tokens(latent), arrays, {**options, **ropes})
    out, _ = torch.ops.cupy_mla.mla_decode(
        *arrays, step.block_table, step.cache_seqlens, softmax_scale=scaling, plan=step.plan, **options, **ropes
    )
    return values_of(module, out)


def absorbed_queries(module: Any, query: Any) -> tuple[Any, Any]:
    """Queries [batch, heads, new, width] in the space of the latent, and their rope parts: [batch, new, heads, ...]."""
    batch, heads, seqlen_q, _ = query.shape
    nope = module.qk_nope_head_dim
    of_keys = projections(module, heads)[:, :nope]
    q_nope = query[..., :nope].transpose(0, 1).reshape(heads, batch * seqlen_q, nope)
    q_latent = torch.bmm(q_nope, of_keys).unflatten(1, (batch, seqlen_q)).permute(1, 2, 0, 3)
    return q_latent, query[..., nope:].transpose(1, 2)


def values_of(module: Any, out: Any) -> Any:
    """Results [batch, new, heads, latent_dim] in the space of the values, [batch, new, heads, v_head_dim]."""
    heads = out.shape[2]
    of_values = projections(module, heads)[:, module.qk_nope_head_dim :]
    by_head = out.flatten(0, 1).transpose(0, 1)
    return torch.bmm(by_head, of_values.transpose(1, 2)).transpose(0, 1).unflatten(0, out.shape[:2])


def projections(module: Any, heads: int) -> Any:
    """From the latent to the keys and values of each head, [heads, qk_nope_head_dim + v_head_dim, latent_dim]."""
    return module.kv_b_proj.weight.unflatten(0, (heads, -1))


def pages(tokens: Any) -> Any:
    """A cache [batch, 1, tokens, width] with room as pages [pages, 64, 1, width] that overlap: one from each token."""
    batch, width = tokens.shape[0], tokens.shape[3]
    count = batch * row_tokens(tokens) - ROOM
    return tokens.as_strided((count, PAGE_SIZE, 1, width), (width, width, width, 1))


def make_step(ranges: Any, row: int, arrays: tuple[Any, Any], others: dict[str, Any]) -> Step:
    """The step of requests that see these ranges of rows of so many tokens."""
    batch, device = ranges.shape[0], ranges.device
    first, end = ranges.view(batch, 2).unbind(1)
    rows = torch.arange(0, batch * row, row, dtype=torch.int32, device=device)
    steps = torch.arange(0, row - ROOM, PAGE_SIZE, dtype=torch.int32, device=device)
    block_table, cache_seqlens = (rows + first)[:, None] + steps, end - first
    plan = torch.ops.cupy_mla.plan_decode(*arrays, block_table, cache_seqlens, **others)
    return Step(ranges, row, block_table, cache_seqlens, plan)


def is_sparse_step(query: Any, latent: Any) -> bool:
    """Whether few tokens are new, and the cache has others. A short prompt in a static cache is taken for one too."""
    return query.shape[2] <= MAX_NEW_TOKENS and query.shape[2] < latent.shape[2] and not torch.is_grad_enabled()


def absorbed_sparse(
    module: Any, query: Any, latent: Any, rope: Any, attention_mask: Any, indices: Any, scaling: float
) -> Any:
    """`absorbed`, to the tokens that ``indices`` [batch, new, topk] choose among those that the mask leaves.

    The kernels take latent and rope in one array. So the chosen tokens are copied into one, or all if they are fewer.
    """
    batch, new, topk = indices.shape
    tokens, head_dim_v = latent.shape[2], latent.shape[3]
    seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    seen = seen[:, 0].expand(batch, -1, -1).gather(-1, indices.long())
    if new * topk < tokens:
        rows = indices.reshape(batch, 1, new * topk, 1).long()
        latent, rope = (part.gather(2, rows.expand(-1, -1, -1, part.shape[3])) for part in (latent, rope))
        tokens = new * topk
        indices = torch.arange(tokens, dtype=torch.int32, device=indices.device).view(1, new, topk)
    cache = torch.cat((latent, rope), dim=-1).transpose(1, 2)  # a page for each request
    first = torch.arange(0, batch * tokens, tokens, dtype=torch.int32, device=indices.device)
    out, _ = torch.ops.cupy_mla.mla_sparse_decode(
        torch.cat(absorbed_queries(module, query), dim=-1),
        cache,
        (indices + first[:, None, None]).where(seen, -1),
        head_dim_v=head_dim_v,
        softmax_scale=scaling,
    )
    return values_of(module, out)


def masked_but_at(indices: Any, attention_mask: Any) -> Any:
    """A mask [batch, 1, new, tokens] of either kind that leaves tokens ``indices`` [batch, new, topk] at most."""
    others = torch.ones_like(attention_mask, dtype=torch.bool).scatter(-1, indices.long().unsqueeze(1), False)
    masked = False if attention_mask.dtype == torch.bool else torch.finfo(attention_mask.dtype).min
    return attention_mask.masked_fill(others, masked)


def mask_beside(former: Callable[..., Any]) -> Callable[..., Any]:
    """A mask function as transformers calls it: ranges for a step, else the mask of the former attention."""

    def mask(
        *, batch_size: int, q_length: int, q_offset: Any, mask_function: Any, attention_mask: Any, device: Any,
        **others: Any,
    ) -> Any:  # fmt: skip
        # A cache that holds nothing yet says so by an integer, whatever it is made of.
        is_prompt = not isinstance(q_offset, torch.Tensor) and q_offset == 0
        plainly_causal = mask_function is causal_mask_function and not others.get("kv_offset")
        if getattr(others.get("config"), "index_topk", None) is not None:  # which tokens it chooses depends on the mask
            plainly_causal = False
        if q_length <= MAX_NEW_TOKENS and not is_prompt and plainly_causal and not torch.is_grad_enabled():
            ranges = visible_ranges(batch_size, q_offset + q_length, attention_mask, device)
            if ranges is not None:
                return ranges
        return former(
            batch_size=batch_size, q_length=q_length, q_offset=q_offset, mask_function=mask_function,
            attention_mask=attention_mask, device=device, **others,
        )  # fmt: skip

    return mask


def visible_ranges(batch: int, end: Any, attention_mask: Any, device: Any) -> Any:
    """The ranges of tokens that requests see; None if one sees others than all behind its left padding.

    ``end`` is the number of tokens that the cache is to hold, an integer or a tensor of one, ``attention_mask`` bool
    [batch, tokens] or None. In a graph that is captured or traced nothing can be read back: left padding is taken for
    granted there.
    """
    ranges = torch.empty(batch, 1, 1, 2, dtype=torch.int32, device=device)
    ranges[..., 1] = end
    if attention_mask is None:
        ranges[..., 0] = 0
        return ranges
    first = attention_mask.int().argmax(dim=1)
    ranges[..., 0] = first[:, None, None]
    if torch.compiler.is_compiling() or (first.is_cuda and torch.cuda.is_current_stream_capturing()):
        return ranges
    tokens = attention_mask.shape[1]
    others = (first + attention_mask.sum(dim=1) != tokens) | (ranges[:, 0, 0, 1] != tokens)
    return None if others.any() else ranges
