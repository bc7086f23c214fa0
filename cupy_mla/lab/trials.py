"""The trials of the campaign: one random problem of each operation, against float64 or bit by bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..cache.slots import slots_of
from ..call.options import EXACT, FP8, SPLIT
from ..decode.dense import mla_decode, plan_decode
from ..decode.merge import merge_states
from ..decode.prefill import mla_sparse_prefill
from ..decode.sparse import mla_sparse_decode, plan_sparse_decode
from ..kernels.choose import DENSE_FAMILIES, FP8_FAMILIES, GATHERED_DENSE_FAMILIES
from ..kernels.family import DecodeFamily
from ..kernels.fp8 import Fp8Family
from ..layouts import CacheLayout
from ..schedule.pieces import TILE_TOKENS, ceil_div
from .accuracy import LSE_BOUNDS
from .cache_trials import CODED_LAYOUTS, E4M3_FACTOR, E4M3_TYPE, appends, conversions, page_copies
from .trial import Array, Trial, attention

_INT32 = np.iinfo(np.int32)
_SHOWS = 100.0  # in place of tokens that nobody may read
_LONGEST, _LONG = 300, 4000
_LONG_CHANCE = 0.03
_MERGE_TYPES = ("bfloat16", "float16", "float32")


def dense(trial: Trial) -> None:
    """`mla_decode` over a paged cache, 16-bit or e4m3."""
    settings, rng = trial.settings, trial.rng
    heads, kv_heads = trial.heads()
    batch, ragged = trial.up_to(6), trial.chance(0.25)
    fp8 = settings.dtype == "bfloat16" and settings.page_size % 8 == 0 and trial.chance(0.25)
    counts = rng.integers(0, 5, batch) if ragged else np.full(batch, trial.pick(1, 1, 1, 2, 3, 5))
    most = _LONG if trial.chance(_LONG_CHANCE) else _LONGEST
    lengths = np.array([trial.length(most) for _ in range(batch)])
    trial.words |= {"heads": heads, "kv_heads": kv_heads, "lengths": lengths.tolist(), "tokens": counts.tolist()}
    cache, table, exact_cache, scales = _paged_cache(trial, lengths, kv_heads, fp8)
    q = trial.values((int(counts.sum()), heads, settings.width), settings.dtype)
    shaped = q if ragged else q.reshape(batch, int(counts[0]), heads, settings.width)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    arrays = [trial.maybe_pair(trial.stored(shaped)), trial.maybe_pair(cache), table, lengths.astype(np.int32)]
    arrays = [trial.upload(array) for array in arrays]
    options: dict[str, Any] = {"head_dim_v": settings.latent_dim, "causal": settings.causal}
    if ragged:
        options |= {"cu_seqlens_q": trial.upload(starts), "max_seqlen_q": int(counts.max(initial=0)) or None}
    if fp8:
        number = trial.chance(0.5)
        given = scales[0] if len(scales) == 1 else scales
        options["kv_scale"] = given if number else trial.upload(np.array(scales, np.float32))
    plan = _dense_plan(trial, arrays, options, lengths)
    softmax_scale = trial.pick(None, settings.width**-0.5 * float(rng.uniform(0.5, 2)))
    empty_lse = trial.pick(-math.inf, math.inf)
    out, lse = mla_decode(
        *arrays, **options, softmax_scale=softmax_scale, plan=plan, empty_lse=empty_lse, validate=trial.chance(0.3)
    )
    out, lse = trial.download(out), trial.download(lse)
    factor = settings.width**-0.5 if softmax_scale is None else softmax_scale
    for request in range(batch):
        rows = slice(starts[request], starts[request + 1])
        got_out = out[rows] if ragged else out[request]
        got_lse = lse[:, rows].T if ragged else lse[request].T
        _compare_request(
            trial, q[rows].astype(np.float64), exact_cache[request], factor, (got_out, got_lse), kv_heads, empty_lse,
            LSE_BOUNDS[SPLIT if fp8 else EXACT],
        )  # fmt: skip


def sparse_decode(trial: Trial) -> None:
    """`mla_sparse_decode`: tokens that indices name, of one cache or of two."""
    batch, seqlen_q = trial.up_to(4), trial.pick(1, 1, 2, 3)
    drawn = _Sparse(trial, (batch, seqlen_q))
    arrays, options = drawn.arrays(trial), drawn.options(trial)
    plan = None
    if trial.chance(0.6):
        split = trial.pick(None, None, TILE_TOKENS * trial.up_to(3))
        kernel = "auto" if drawn.layout else trial.pick("auto", *(family.name for family in GATHERED_DENSE_FAMILIES))
        of_call = "attn_sink", "softmax_scale", "empty_lse"
        plan_options = {name: value for name, value in options.items() if name not in of_call}
        plan = plan_sparse_decode(*arrays, **plan_options, fixed_split_tokens=split, kernel=kernel)
        trial.words |= {"split": split, "kernel": kernel}
    out, lse = map(trial.download, mla_sparse_decode(*arrays, **options, plan=plan))
    drawn.compare(trial, out, lse.swapaxes(1, 2), None)


def sparse_prefill(trial: Trial) -> None:
    """`mla_sparse_prefill`: query tokens with tokens of their own."""
    drawn = _Sparse(trial, (trial.up_to(8),))
    arrays, options = drawn.arrays(trial), drawn.options(trial)
    out, logits, lse = map(trial.download, mla_sparse_prefill(*arrays, **options))
    drawn.compare(trial, out, lse, logits)


def merges(trial: Trial) -> None:
    """`merge_states` of shards, some of which saw nothing."""
    rng, dtype = trial.rng, trial.pick(*_MERGE_TYPES)
    ragged = trial.chance(0.3)
    shape = (trial.up_to(6), trial.up_to(64)) if ragged else (trial.up_to(3), trial.up_to(3), trial.up_to(128))
    states, d_v = trial.up_to(6), trial.settings.latent_dim
    outs = np.array(trial.values((states, *shape, d_v), dtype))
    lses = (rng.standard_normal((states, *shape)) * 3).astype(np.float32)
    unseen = rng.random(lses.shape) < trial.pick(0.0, 0.3, 0.9)
    lses[unseen] = rng.choice(np.array([-np.inf, np.inf], np.float32), int(unseen.sum()))
    outs[unseen] = np.nan
    trial.words |= {"states": states, "shape": shape, "dtype": dtype}
    given = np.ascontiguousarray(lses.swapaxes(-1, -2))
    if trial.chance(0.5):
        results = merge_states(trial.upload(trial.stored(outs)), trial.upload(given))
    else:
        results = merge_states([trial.upload(out) for out in outs], [trial.upload(np.array(lse)) for lse in given])
    out, lse = map(trial.download, results)
    known = np.where(unseen, -np.inf, lses.astype(np.float64))
    top = known.max(axis=0)
    weights = np.exp(known - np.where(np.isneginf(top), 0, top))
    total = weights.sum(axis=0)
    summed = (weights[..., None] * np.where(unseen[..., None], 0, outs.astype(np.float64))).sum(axis=0)
    exact = summed / np.where(total == 0, 1, total)[..., None]
    exact_lse = np.where(total == 0, -np.inf, top + np.log(np.where(total == 0, 1, total)))
    trial.compare_out("out", out, exact, dtype)
    trial.compare_lse("lse", lse.swapaxes(-1, -2), exact_lse)


def slots(trial: Trial) -> None:
    """`slots_of`: token numbers of requests, some of which are none."""
    rng, page_size = trial.rng, trial.settings.page_size
    num_requests, columns = trial.up_to(6), trial.up_to(20)
    table = rng.integers(-1, 50, (num_requests, columns), dtype=np.int32)
    by_request = trial.chance(0.5)
    count = trial.up_to(10) if by_request else num_requests
    tokens = rng.integers(-5, columns * page_size + 5, (count, trial.up_to(3), trial.up_to(300)), dtype=np.int32)
    requests = rng.integers(-1, num_requests + 1, count, dtype=np.int32) if by_request else None
    trial.words |= {"tokens": tokens.shape, "table": table.shape, "requests": by_request}
    expected = np.full(tokens.shape, -1, np.int32)
    for place, token in np.ndenumerate(tokens):
        row = place[0] if requests is None else requests[place[0]]
        if 0 <= row < num_requests and 0 <= token < columns * page_size and table[row, token // page_size] >= 0:
            expected[place] = table[row, token // page_size] * page_size + token % page_size
    got = slots_of(trial.upload(tokens), trial.upload(table), page_size, requests=trial.upload(requests))
    trial.compare_equal("slots", trial.download(got), expected)


TRIALS: tuple[Callable[[Trial], None], ...] = (
    *(dense, dense, dense, dense),
    *(sparse_decode, sparse_decode, sparse_prefill),
    *(merges, appends, page_copies, conversions, slots),
)


# Parts of trials -----------------------------------------------------------------------------------------------------


def _paged_cache(
    trial: Trial, lengths: Array, kv_heads: int, fp8: bool
) -> tuple[Array, Array, list[Array], tuple[float, ...]]:
    """Pages in any order with poison between, the table, each request's keys [tokens, kv heads, width], the scale
    of e4m3, or those of latent and rope part."""
    rng, settings = trial.rng, trial.settings
    counts = ceil_div(lengths, settings.page_size)
    num_pages, columns = int(counts.sum()) + 3, int(counts.max()) + trial.pick(0, 1, 5) or 1
    dtype = E4M3_TYPE if fp8 else settings.dtype
    scale = 1 / E4M3_FACTOR if fp8 else 1.0
    scales = trial.pick((scale,), (scale, 0.3 * scale)) if fp8 and settings.rope_dim else (scale,)
    of_columns = np.repeat(np.broadcast_to(scales, 2), (settings.latent_dim, settings.rope_dim))
    cache = trial.store((num_pages, settings.page_size, kv_heads, settings.width), dtype)
    order = rng.permutation(num_pages)
    table = rng.choice(np.array([-1, num_pages, _INT32.max, _INT32.min, 0], np.int32), (len(lengths), columns))
    exact, taken = [], 0
    for request, (length, pages) in enumerate(zip(lengths, counts, strict=True)):
        table[request, :pages] = order[taken : taken + pages]
        taken += int(pages)
        tokens = np.arange(length)
        keys = trial.values((int(length), kv_heads, settings.width), dtype, 1 / scale)
        cache[table[request, tokens // settings.page_size], tokens % settings.page_size] = keys
        exact.append(keys.astype(np.float64) * of_columns)
    trial.words |= {"cache": dtype, "strides": cache.strides}
    return cache, table, exact, scales


def _dense_plan(trial: Trial, arrays: list[Any], options: dict[str, Any], lengths: Array) -> Any:
    if trial.chance(0.3):
        return None
    fp8 = "kv_scale" in options
    # Of those that "auto" may take.
    known = [family for family in FP8_FAMILIES if isinstance(family, Fp8Family) and family.compute != FP8]
    families = [family for family in (known if fp8 else DENSE_FAMILIES) if _serves(trial, family)]
    chosen: dict[str, Any] = {
        "fixed_split_tokens": trial.pick(None, None, TILE_TOKENS * trial.up_to(4)),
        "kernel": trial.pick("auto", *(family.name for family in families)),
        "max_seqlen_k": trial.pick(None, int(lengths.max())),
    }
    trial.words |= chosen
    if trial.chance(0.3):  # planned for other lengths before
        others = trial.upload(np.minimum(lengths, trial.rng.integers(0, 99, len(lengths))).astype(np.int32))
        plan = plan_decode(arrays[0], arrays[1], arrays[2], others, **options, **chosen)
        plan.update(arrays[3], options.get("cu_seqlens_q"))
        return plan
    return plan_decode(arrays[0], arrays[1], arrays[2], arrays[3], **options, **chosen)


def _serves(trial: Trial, family: DecodeFamily) -> bool:
    """Whether a family takes pages of the size drawn, as some are made for those of one token, and q as it is."""
    if isinstance(family, Fp8Family) and family.compute == FP8:
        return False
    return not family.gathers or trial.settings.page_size == 1


def _compare_request(
    trial: Trial, q: Array, keys: Array, scale: float, got: tuple[Array, Array], kv_heads: int, empty_lse: float,
    lse_bound: float,
) -> None:  # fmt: skip
    """One request of dense decoding: out and lse [tokens, heads]."""
    out, lse = np.zeros(got[0].shape), np.full(got[1].shape, empty_lse)
    group, visible = q.shape[1] // kv_heads, None
    if trial.settings.causal:
        visible = [len(keys) - len(q) + token + 1 for token in range(len(q))]
    for head in range(kv_heads):
        heads = slice(head * group, (head + 1) * group)
        out[:, heads], head_lse, _ = attention(q[:, heads], keys[:, head], trial.settings.latent_dim, scale, visible)
        lse[:, heads] = np.where(np.isneginf(head_lse), empty_lse, head_lse)
    trial.compare_out("out", got[0], out, trial.settings.dtype)
    trial.compare_lse("lse", got[1], lse, lse_bound)


class _Chosen:
    """A drawn cache of pages of a size, and what each query token attends to of it.

    Of 16 bits, with poison where nothing may be read; or in a layout of fewer, with values that would show.
    """

    def __init__(
        self, trial: Trial, queries: tuple[int, ...], kv_heads: int, page_size: int, layout: CacheLayout | None
    ) -> None:
        rng, settings = trial.rng, trial.settings
        self.layout = layout
        self.num_pages, self.topk, self.page_size = trial.up_to(6), trial.up_to(250) - 1, page_size
        num_slots = self.num_pages * page_size
        self.indices = rng.integers(0, num_slots, (*queries, kv_heads, self.topk), dtype=np.int32)
        none = rng.choice(np.array([-1, num_slots, _INT32.min, _INT32.max], np.int32), self.indices.shape)
        self.indices = np.where(rng.random(self.indices.shape) < trial.pick(0, 0.2, 0.2, 0.2, 1), none, self.indices)
        self.lengths = None
        if trial.chance(0.5):
            shape = trial.pick(queries, queries[:1])
            self.lengths = rng.integers(0, self.topk + 1, shape, dtype=np.int32)
        shape = self.num_pages, page_size, kv_heads, settings.width
        self.kv: Array = trial.store(shape, settings.dtype)
        for query in np.ndindex(queries):
            for head in range(kv_heads):
                chosen = np.unique(self.slots(query, head))
                values = trial.values((chosen.size, settings.width), settings.dtype)
                fresh = np.isnan(self.kv[chosen // page_size, chosen % page_size, head, 0])
                chosen, values = chosen[fresh], values[fresh]
                self.kv[chosen // page_size, chosen % page_size, head] = values
        if layout is not None:
            scale = 1 / E4M3_FACTOR if layout.needs_scale else None
            values = np.where(np.isnan(self.kv), _SHOWS, self.kv).astype(np.float32)
            self.kv = layout.with_page_starts(layout.quantise(values, scale))
            self.exact = layout.dequantise(self.kv, scale)
        else:
            self.exact = self.kv

    @property
    def words(self) -> dict[str, Any]:
        """What is particular about it."""
        lengths = None if self.lengths is None else self.lengths.tolist()
        return {"pages": self.num_pages, "topk": self.topk, "lengths": lengths, "strides": self.kv.strides}

    def slots(self, query: tuple[int, ...], head: int) -> Array:
        """Slots that a query token attends to, as often as it does."""
        count = self.topk if self.lengths is None else int(self.lengths[query[: self.lengths.ndim]])
        slots = self.indices[(*query, head)][:count]
        inside: Array = slots[(slots >= 0) & (slots < self.num_pages * self.page_size)]
        return inside

    def keys(self, query: tuple[int, ...], head: int) -> Array:
        """[n, width] float64."""
        slots = self.slots(query, head)
        keys: Array = self.exact[slots // self.page_size, slots % self.page_size, head].astype(np.float64)
        return keys

    def uploaded(self, trial: Trial) -> tuple[Any, Any]:
        """The cache, and the indices; with or without an axis of one kv head."""
        shared = self.indices.shape[-2] == 1 and trial.chance(0.5)
        indices = np.ascontiguousarray(self.indices[..., 0, :] if shared else self.indices)
        return trial.upload(self.kv), trial.upload(indices)


class _Sparse:
    """A drawn sparse problem: ``queries`` is [batch, seqlen_q] of decode, perhaps over two caches, [s_q] of prefill."""

    def __init__(self, trial: Trial, queries: tuple[int, ...]) -> None:
        rng, settings = trial.rng, trial.settings
        self.queries = queries
        heads, self.kv_heads = trial.heads()
        self.layout: CacheLayout | None = None
        if settings.dtype == "bfloat16" and trial.chance(0.4):
            self.kv_heads, self.layout = 1, trial.pick(*CODED_LAYOUTS[settings.latent_dim, settings.rope_dim])
        self.q = trial.values((*queries, heads, settings.width), settings.dtype)
        self.main = _Chosen(trial, queries, self.kv_heads, settings.page_size, self.layout)
        self.extra = None
        if len(queries) > 1 and trial.chance(0.3):
            page_size = trial.pick(settings.page_size, 2)
            self.extra = _Chosen(trial, queries, self.kv_heads, page_size, self.layout)
        self.sinks = None
        if trial.chance(0.4):
            self.sinks = rng.standard_normal(heads).astype(np.float32)
            self.sinks[rng.random(heads) < 0.2] = trial.pick(-np.inf, np.inf)
        self.scale = trial.pick(None, settings.width**-0.5 * float(rng.uniform(0.5, 2)))
        self.empty_lse = trial.pick(-math.inf, math.inf)
        trial.words |= {"queries": queries, "heads": heads, "kv_heads": self.kv_heads, **self.main.words}
        trial.words |= {"layout": None if self.layout is None else self.layout.name}
        trial.words |= {"sinks": self.sinks is not None, "extra": None if self.extra is None else self.extra.words}

    def arrays(self, trial: Trial) -> list[Any]:
        return [trial.upload(trial.stored(self.q)), *self.main.uploaded(trial)]

    def options(self, trial: Trial) -> dict[str, Any]:
        options = {
            "topk_length": trial.upload(self.main.lengths), "attn_sink": trial.upload(self.sinks),
            "softmax_scale": self.scale, "head_dim_v": trial.settings.latent_dim, "empty_lse": self.empty_lse,
            "validate": trial.chance(0.3),
        }  # fmt: skip
        if self.extra is not None:
            options["extra_kv_cache"], options["extra_indices"] = self.extra.uploaded(trial)
            options["extra_topk_length"] = trial.upload(self.extra.lengths)
        if self.layout is not None:
            options |= {"layout": self.layout.name, "kv_scale": 1 / E4M3_FACTOR if self.layout.needs_scale else None}
            options |= {"extra_layout": self.layout.name} if self.extra is not None else {}
        return options

    def compare(self, trial: Trial, out: Array, lse: Array, logits: Array | None) -> None:
        """Results of [*queries, heads]."""
        settings, group = trial.settings, self.q.shape[-2] // self.kv_heads
        scale = settings.width**-0.5 if self.scale is None else self.scale
        all_exact = np.zeros(out.shape)
        for query in np.ndindex(self.queries):
            for head in range(self.kv_heads):
                heads = slice(head * group, (head + 1) * group)
                keys = self.main.keys(query, head)
                if self.extra is not None:
                    keys = np.concatenate([keys, self.extra.keys(query, head)])
                exact, exact_lse, top = attention(
                    self.q[query][None, heads].astype(np.float64), keys, settings.latent_dim, scale
                )
                if self.sinks is not None and len(keys):
                    with np.errstate(over="ignore"):
                        exact /= 1 + np.exp(self.sinks[heads].astype(np.float64) - exact_lse[0])[None, :, None]
                all_exact[query][heads] = exact[0]
                wanted = np.where(np.isneginf(exact_lse[0]), self.empty_lse, exact_lse[0])
                trial.compare_lse("lse", lse[query][heads], wanted)
                if logits is not None:
                    trial.compare_lse("max_logits", logits[query][heads], top[0])
        for request in range(self.queries[0]):
            trial.compare_out("out", out[request], all_exact[request], settings.dtype)
