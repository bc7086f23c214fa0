"""The NumPy arithmetic of attention to chosen tokens, against a formula that walks query by query and key by key."""

from __future__ import annotations

import numpy as np
import pytest

from cupy_mla.decode.reference_sparse import ChosenKeys, sparse_attention_reference

NUM_SLOTS, WIDTH, VALUE = 40, 24, 16


def formula(q, caches, indices, lengths, scale, sink):
    """out, lse and maximum of every row, in Python's floats (``longdouble``), without any running maximum."""
    num_queries, num_heads, _ = q.shape
    num_heads_kv = caches[0].shape[1]
    out = np.zeros((num_queries, num_heads, VALUE))
    lse = np.full((num_queries, num_heads), -np.inf)
    highest = np.full((num_queries, num_heads), -np.inf)
    for query in range(num_queries):
        for head in range(num_heads):
            kv_head = head // (num_heads // num_heads_kv)
            keys = []
            for cache, chosen, counts in zip(caches, indices, lengths, strict=True):
                row = chosen[query, kv_head] if counts is None else chosen[query, kv_head][: counts[query]]
                keys += [cache[slot, kv_head] for slot in row if 0 <= slot < len(cache)]
            if not keys:
                continue
            stacked = np.array(keys, np.longdouble)
            scores = stacked @ q[query, head].astype(np.longdouble) * scale
            weights = np.exp(scores)
            lse[query, head], highest[query, head] = np.log(weights.sum()), scores.max()
            total = weights.sum() + (0 if sink is None else np.exp(np.longdouble(sink[head])))
            out[query, head] = 0 if np.isinf(total) else weights @ stacked[:, :VALUE] / total
    return out, lse, highest


def problem(rng, num_queries=5, num_heads=4, num_heads_kv=1, topks=(7,), with_lengths=False):
    q = rng.normal(size=(num_queries, num_heads, WIDTH))
    caches = [rng.normal(size=(NUM_SLOTS, num_heads_kv, WIDTH)) for _ in topks]
    # Past both ends of the cache, and duplicates.
    indices = [rng.integers(-8, NUM_SLOTS + 8, (num_queries, num_heads_kv, topk)) for topk in topks]
    lengths = [rng.integers(0, topk + 1, num_queries) if with_lengths else None for topk in topks]
    return q, caches, indices, lengths


def run(q, caches, indices, lengths, sink, dtype=np.float64):
    sources = [
        ChosenKeys(lambda slots, head, cache=cache: cache[slots, head].astype(dtype), len(cache), chosen, counts)
        for cache, chosen, counts in zip(caches, indices, lengths, strict=True)
    ]
    out = np.full((*q.shape[:2], VALUE), np.nan)
    lse, highest = np.full(q.shape[:2], np.nan), np.full(q.shape[:2], np.nan)
    sparse_attention_reference(
        q, sources, 0.3, num_heads_kv=caches[0].shape[1], head_dim_v=VALUE, out=out, lse=lse, max_logits=highest,
        attn_sink=sink, dtype=dtype,
    )  # fmt: skip
    return out, lse, highest


@pytest.mark.parametrize("num_heads_kv", [1, 2])
@pytest.mark.parametrize("topks", [(7,), (7, 3), (1, 0), (0,)])
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("with_sink", [False, True])
def test_against_the_formula(num_heads_kv, topks, with_lengths, with_sink):
    rng = np.random.default_rng(3)
    case = problem(rng, num_heads_kv=num_heads_kv, topks=topks, with_lengths=with_lengths)
    sink = np.array([-np.inf, 0.5, np.inf, -3.0]) if with_sink else None
    for ours, theirs in zip(run(*case, sink), formula(*case, 0.3, sink), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_many_queries_in_steps():
    rng = np.random.default_rng(4)
    case = problem(rng, num_queries=50, topks=(3000,))  # 33 queries a step would pass the bound
    for ours, theirs in zip(run(*case, None), formula(*case, 0.3, None), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11)


def test_only_chosen_tokens_are_seen():
    rng = np.random.default_rng(5)
    q, caches, indices, _ = problem(rng)
    lengths = [np.array([7, 3, 0, 1, 5])]
    chosen = np.unique(np.concatenate([row[0][:count] for row, count in zip(indices[0], lengths[0], strict=True)]))
    poisoned = np.full_like(caches[0], np.nan)
    kept = chosen[(chosen >= 0) & (chosen < NUM_SLOTS)]
    poisoned[kept] = caches[0][kept]
    expected = run(q, caches, indices, lengths, None)
    for ours, theirs in zip(run(q, [poisoned], indices, lengths, None), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_nan_in_a_chosen_token_shows():
    rng = np.random.default_rng(6)
    q, caches, indices, lengths = problem(rng)
    indices[0][2, 0, 4] = 11
    caches[0][11] = np.nan
    out, lse, _ = run(q, caches, indices, lengths, None)
    assert np.isnan(out[2]).all()
    assert np.isnan(lse[2]).all()


def test_works_when_numpy_raises_on_floating_point_events():
    rng = np.random.default_rng(7)
    case = problem(rng, topks=(0,))
    with np.errstate(all="raise"):
        out, lse, highest = run(*case, np.array([np.inf, -np.inf, 0.0, 1.0]))
    assert not out.any()
    assert np.isneginf(lse).all()
    assert np.isneginf(highest).all()
