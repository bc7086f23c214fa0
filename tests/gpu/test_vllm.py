"""Our backend for vLLM in CUDA graphs: plans that are made before a replay, rows that fill a graph up, e4m3 caches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import vllm_stand_in

torch = pytest.importorskip("torch")

LATENT, ROPE, BLOCK, SCALE = 512, 64, 64, 0.07
SPREAD = SCALE * (LATENT + ROPE) ** 0.5  # standard deviation of the scores of normal queries and keys
BATCH, PAGES = 6, 40  # requests, the last two of which fill the graph up; pages of each
MAX_ERROR = 4e-3  # of one row of heads that may see a few keys only
LENGTHS = [[2500, 64, 1, 777, 0, 0], [5, 2560, 640, 63, 0, 0], [1999, 1, 65, 0, 0, 0]]


@pytest.mark.parametrize("cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize(("new", "heads"), [(1, 128), (1, 16), (2, 16)])
def test_replays_after_planning(cache_dtype: str, new: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = vllm_stand_in.make(monkeypatch, heads=heads, scale=SCALE, cache_dtype=cache_dtype, device="cuda")
    torch.manual_seed(0)
    table = torch.randperm(BATCH * PAGES, device="cuda").int().view(BATCH, PAGES)
    table[4:] = -1
    cache = torch.randn(BATCH * PAGES, BLOCK, LATENT + ROPE, device="cuda").bfloat16()
    scale = torch.tensor(0.02, device="cuda")
    exact = cache.double()
    if cache_dtype == "fp8":
        cache = (cache.float() / scale).to(torch.float8_e4m3fn)
        exact = cache.double() * 0.02
    # What "split" leaves out of lse grows with the scores: 1e-3 is its bound where their standard deviation is one.
    size = 1 / SPREAD if cache_dtype == "fp8" else 1.0
    latent = (size * torch.randn(heads, BATCH * new, LATENT, device="cuda")).bfloat16().transpose(0, 1)
    rope = (size * torch.randn(BATCH * new, heads, ROPE, device="cuda")).bfloat16()
    seq_lens = torch.tensor(LENGTHS[0], device="cuda", dtype=torch.int32)

    def run(metadata: Any) -> Any:
        return stand_in.attention.forward_mqa((latent, rope), cache, metadata, SimpleNamespace(_k_scale=scale))

    metadata = stand_in.metadata(table, seq_lens, new)
    run(metadata)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run(metadata)
    for lengths in LENGTHS:
        seq_lens.copy_(torch.tensor(lengths))
        stand_in.metadata(table, seq_lens, new)
        graph.replay()
        for request, length in enumerate(lengths):
            keys = exact[table[request, : -(-length // BLOCK)].long()].flatten(0, 1)
            for token in range(new):
                row, seen = request * new + token, max(length - new + token + 1, 0)
                if not seen:
                    assert (out[row] == 0).all()
                    assert lse[row].isneginf().all()
                    continue
                scores = torch.cat([latent[row], rope[row]], -1).double() @ keys[:seen].T * SCALE
                expected = scores.softmax(-1) @ keys[:seen, :LATENT]
                assert (out[row] - expected).norm() / expected.norm() < MAX_ERROR
                torch.testing.assert_close(lse[row].double(), scores.logsumexp(-1), atol=1e-3, rtol=0)
