"""A `PagedKVCache` of each rank: all are given all tokens, and together they hold each once."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_mla import InvalidArgumentError, OutOfPagesError, PagedKVCache, merge_states, mla_decode
from cupy_mla.call.shard import Shard

WIDTH, LATENT = 96, 64
PAGE_SIZE = 4
SHARDINGS = [(1, 1), (2, 1), (3, 5), (4, 4)]


def caches_of(world: int, interleave: int, **options: Any) -> list[PagedKVCache]:
    sizes = {"num_pages": 80, "page_size": PAGE_SIZE, "latent_dim": LATENT, "rope_dim": WIDTH - LATENT}
    return [
        PagedKVCache(**{**sizes, **options}, cp_world=world, cp_rank=rank, cp_interleave=interleave)
        for rank in range(world)
    ]


def rows_of(cache: PagedKVCache, request: int) -> np.ndarray:
    """The tokens that a cache has of a request."""
    pages = np.asarray(cache.kv_cache)[np.asarray(cache.block_table([request]))[0]]
    return pages.reshape(-1, WIDTH)[: int(np.asarray(cache.cache_seqlens([request]))[0])]


def check_tokens(caches: list[PagedKVCache], interleave: int, request: int, expected: np.ndarray) -> None:
    for rank, cache in enumerate(caches):
        shard = Shard(len(caches), rank, interleave)
        assert cache.length(request) == len(expected) == np.asarray(cache.total_seqlens([request]))[0]
        np.testing.assert_array_equal(rows_of(cache, request), expected[shard.has(np.arange(len(expected)))])


@pytest.mark.parametrize(("world", "interleave"), SHARDINGS)
def test_histories(world: int, interleave: int) -> None:
    """Appends, forks that write, truncation and free: the model is a list of rows for each request."""
    rng = np.random.default_rng(world)
    caches = caches_of(world, interleave, dtype="float16")
    model: dict[int, np.ndarray] = {}
    for _ in range(80):
        action = rng.integers(5) if model else 0
        chosen = int(rng.choice(sorted(model))) if model else -1
        if action == 0 and len(model) < 5:
            [request] = {cache.allocate() for cache in caches}
            model[request] = np.zeros((0, WIDTH), np.float16)
        elif action == 1 and len(model) < 5:
            keep = int(rng.integers(len(model[chosen]) + 1))
            [request] = {cache.fork(chosen, keep) for cache in caches}
            model[request] = model[chosen][:keep]
        elif action == 2:
            keep = int(rng.integers(len(model[chosen]) // 2, len(model[chosen]) + 1))
            for cache in caches:
                cache.truncate(chosen, keep)
            model[chosen] = model[chosen][:keep]
        elif len(model[chosen]) < 30:
            requests = sorted({chosen, int(rng.choice(sorted(model)))})
            counts = [int(rng.integers(0, 8)) for _ in requests]
            rows = rng.standard_normal((sum(counts), WIDTH)).astype(np.float16)
            for cache in caches:
                cache.append(requests, rows, counts)
            for request, new in zip(requests, np.split(rows, np.cumsum(counts)[:-1]), strict=True):
                model[request] = np.concatenate([model[request], new])
        for request, expected in model.items():
            check_tokens(caches, interleave, request, expected)
    for request in model:
        for cache in caches:
            cache.free(request)
    assert all(cache.num_free_pages == cache.num_pages for cache in caches)


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
@pytest.mark.parametrize(("world", "interleave"), SHARDINGS)
def test_steps(world: int, interleave: int, framework: str) -> None:
    """Places are those of whole requests, slots those of the rank; decodes of the ranks merge to that of one cache."""
    torch = pytest.importorskip("torch") if framework == "torch" else None
    if framework == "jax":
        pytest.importorskip("jax")
    rng = np.random.default_rng(0)
    caches = caches_of(world, interleave, framework=framework, page_size=16, num_pages=20)
    whole = PagedKVCache(20, 16, LATENT, WIDTH - LATENT)
    counts = [7, 3, 0, 40]

    def values(num_tokens: int) -> np.ndarray:
        return rng.standard_normal((num_tokens, WIDTH)).astype(ml_dtypes.bfloat16)

    def given(rows: np.ndarray) -> Any:
        if torch is not None:
            return torch.from_numpy(rows.view(np.uint16)).view(torch.bfloat16)
        return rows

    first = values(sum(counts))
    for cache in (*caches, whole):
        requests = [cache.allocate() for _ in counts]
        cache.append(requests, given(first) if cache is not whole else first, counts)
    steps = [cache.step(requests, [2] * len(counts)) for cache in (*caches, whole)]
    for _ in range(3):
        new = values(2 * len(counts))
        for step, cache in zip(steps, (*caches, whole), strict=True):
            step.append(0, given(new) if cache is not whole else new)
            np.testing.assert_array_equal(np.asarray(step.positions), steps[-1].positions)
            np.testing.assert_array_equal(np.asarray(step.total_seqlens), steps[-1].cache_seqlens)
        stored = sum((np.asarray(step.slot_mapping) >= 0).astype(int) for step in steps[:-1])
        np.testing.assert_array_equal(stored, 1)
        q = rng.standard_normal((len(counts), 2, 2, WIDTH)).astype(ml_dtypes.bfloat16)
        results = []
        for rank, (cache, step) in enumerate(zip((*caches, whole), steps, strict=True)):
            sharding = {"cp_world": world, "cp_rank": rank, "cp_interleave": interleave} if cache is not whole else {}
            pages = cache.kv_cache.view(dtype=torch.int16).numpy() if hasattr(cache.kv_cache, "cpu") else cache.kv_cache
            table, lengths, totals = map(np.asarray, (step.block_table, step.cache_seqlens, step.total_seqlens))
            pages = np.asarray(pages).view(ml_dtypes.bfloat16)
            options = {"head_dim_v": LATENT, "causal": True, "strict": False, "total_seqlens": totals}
            out, lse = mla_decode(q, pages, table, lengths, **options, **sharding)
            results.append((out.astype(np.float32), lse))
        out, lse = merge_states(*(list(part) for part in zip(*results[:-1], strict=True)))
        np.testing.assert_allclose(out, results[-1][0], atol=2e-2)
        np.testing.assert_allclose(lse, results[-1][1], rtol=1e-5, atol=1e-5)
        for step in steps:
            step.advance()


def test_pages_run_out_for_one_rank_alone() -> None:
    first, second = caches_of(2, 4, num_pages=2, max_pages_per_seq=5, dtype="float16")
    for cache in (first, second):
        request = cache.allocate()
        cache.append([request], np.zeros((16, WIDTH), np.float16))
    rows = np.ones((1, WIDTH), np.float16)
    with pytest.raises(OutOfPagesError):
        first.append([request], rows)
    second.append([request], rows)  # a token of the other rank
    assert (first.length(request), second.length(request)) == (16, 17)
    assert [int(cache.cache_seqlens()[0]) for cache in (first, second)] == [8, 8]


def test_requests_are_as_long_as_the_shares_allow() -> None:
    first, second = caches_of(2, 1, max_pages_per_seq=2, dtype="float16")
    for cache in (first, second):
        request = cache.allocate()
        cache.append([request], np.zeros((16, WIDTH), np.float16))
    with pytest.raises(InvalidArgumentError, match=r"at most 8 tokens in a request.*9 in request 0"):
        first.append([request], np.zeros((1, WIDTH), np.float16))
    second.append([request], np.zeros((1, WIDTH), np.float16))
    with pytest.raises(InvalidArgumentError, match="9 in request 0"):
        second.append([request], np.zeros((1, WIDTH), np.float16))
