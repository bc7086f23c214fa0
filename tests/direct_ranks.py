"""What a rank does whose results go by the direct exchange, all on the same GPU: slow, as the GPU gives one process
after the other its turn, but right.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from cases_chosen import choose_tokens
from cases_dense import DenseCase

os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"  # the ranks of these tests share one GPU
LENGTHS = (900, 64, 3, 0, 1, 129)
SHORTER = (7, 64, 2, 0, 0, 128)
TOPK = 70


@dataclass(frozen=True)
class Call:
    """A call, and how its queries are given."""

    heads: int = 16
    requests: int = len(LENGTHS)  # the first
    seqlens_q: Any = 1
    gathered: bool = False
    sparse: bool = False
    layers: int = 3  # that follow one another in the graph

    @property
    def case(self) -> DenseCase:
        causal = not self.sparse
        return DenseCase(LENGTHS[: self.requests], num_heads_q=self.heads, seqlens_q=self.seqlens_q, causal=causal)


def planned_exchange(rank: int, group: Any) -> str:
    """How the results of ranks go that ask for the direct exchange."""
    import torch

    from cupy_mla.parallel import plan_cp_decode

    q = torch.zeros(1, 1, 1, 576, dtype=torch.bfloat16, device="cuda")
    cache = torch.zeros(1, 64, 1, 576, dtype=torch.bfloat16, device="cuda")
    table, total = torch.zeros(1, 1, dtype=torch.int32, device="cuda"), torch.ones(1, dtype=torch.int32, device="cuda")
    return plan_cp_decode(q, cache, table, total, group=group, exchange="direct").exchange


def on_rank(rank: int, group: Any, call: Call) -> list[tuple[np.ndarray, np.ndarray]]:
    """out and lse of a rank's heads: of a call, and of replays of a graph with these lengths and with shorter ones."""
    import torch

    from cupy_mla.lab.libraries import TorchLibrary
    from cupy_mla.lab.shards import shards_of
    from cupy_mla.parallel import (
        cp_decode,
        cp_sparse_decode,
        local_slots,
        plan_cp_decode,
        plan_cp_sparse_decode,
    )

    world, arrays = group.size(), call.case.build()
    _, share = list(shards_of(arrays, world, 16))[rank]
    local, own = share.on(TorchLibrary()), call.heads // world
    q = local.q if call.gathered else local.q[..., rank * own : (rank + 1) * own, :].contiguous()
    named = {"group": group, "gathered": call.gathered, "exchange": "direct"}
    if call.sparse:
        tokens = torch.from_numpy(choose_tokens(LENGTHS, call.seqlens_q, TOPK)).cuda()
        sharding = {"cp_world": world, "cp_rank": rank, "cp_interleave": 16}
        indices, counts = local_slots(tokens, local.block_table, 64, **sharding)
        plan: Any = plan_cp_sparse_decode(q, local.kv_cache, indices, topk_length=counts, **named)
    else:
        named.update(causal=True, cu_seqlens_q=local.cu_seqlens_q, cp_interleave=16)
        total = torch.from_numpy(arrays.cache_seqlens).cuda()
        plan = plan_cp_decode(q, local.kv_cache, local.block_table, total, **named)
    assert plan.exchange == "direct"

    def work() -> Any:
        if call.sparse:
            indices, counts = local_slots(tokens, local.block_table, 64, **sharding)
            inputs = q, local.kv_cache, indices
            return [cp_sparse_decode(*inputs, topk_length=counts, **named, plan=plan) for _ in range(call.layers)]
        plan.update(total, local.cu_seqlens_q)
        inputs = q, local.kv_cache, local.block_table, total
        return [cp_decode(*inputs, **named, plan=plan) for _ in range(call.layers)]

    def found(layers: Any) -> tuple[np.ndarray, np.ndarray]:
        torch.cuda.synchronize()
        first, *others = [(out.float().cpu().numpy(), lse.cpu().numpy()) for out, lse in layers]
        for other in others:
            for one, two in zip(first, other, strict=True):
                np.testing.assert_array_equal(one, two)
        return first

    results = [found(work())]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers = work()
    for shorter in (False, True, False):
        if call.sparse:
            tokens.copy_(torch.from_numpy(choose_tokens(LENGTHS, call.seqlens_q, TOPK, 5 if shorter else TOPK)))
        else:
            total.copy_(torch.tensor((SHORTER if shorter else LENGTHS)[: call.requests], dtype=torch.int32))
        torch.cuda.synchronize()
        graph.replay()
        results.append(found(layers))
    return results
