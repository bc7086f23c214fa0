"""The self-test of caches that are sharded along the sequence: all shards in one process, or one in each of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ..cache.slots import slots_of
from ..call.shard import Shard
from ..decode.dense import mla_decode
from ..decode.merge import merge_states
from ..decode.sparse import mla_sparse_decode
from ..errors import MlaError
from ..layouts import FP8_DS_MLA, FP8_E4M3
from ..parallel import cp_decode, cp_sparse_decode, local_slots
from ..schedule.pieces import ceil_div
from ..schedule.text import counted
from .accuracy import choose_requests, measure_accuracy
from .build import build_case
from .cases import Case
from .launched import library_of
from .libraries import LIBRARY_OF_BACKEND
from .processes import new_processes
from .random_values import Array
from .selftest import CheckCase, CheckResult
from .shards import shards_of
from .sparse_cases import SparseCase
from .spec import KV_SCALE
from .tokens import NO_TOKEN

_COMPARED = 10  # requests


@dataclass(frozen=True)
class ShardedCase(CheckCase):
    """A case and how its tokens are shared out."""

    cp_interleave: int = 1

    @property
    def name(self) -> str:
        return f"{super().name}, {counted(self.cp_interleave, 'token')} in a row"


# Empty requests, shards without a token, ends around a tile and a page.
_EDGES = (0, 1, 63, 64, 65, 1000, 5003)
_RAGGED = (1, 4, 0, 2, 16, 3, 1)

_CASES: tuple[ShardedCase, ...] = (
    *(ShardedCase(_EDGES, heads, cp_interleave=count) for heads in (16, 128) for count in (1, 16, 64)),
    *(ShardedCase(_EDGES, heads, seqlens_q=3, causal=True, cp_interleave=16) for heads in (16, 64, 128)),
    *(ShardedCase(_EDGES, heads, seqlens_q=_RAGGED, causal=True) for heads in (16, 128)),
    ShardedCase(_EDGES, 64, seqlens_q=2),
    ShardedCase(_EDGES, 32, dtype="float16", page_size=16, seqlens_q=4, causal=True, cp_interleave=5),
    ShardedCase(_EDGES, 16, page_size=1, seqlens_q=2, causal=True),
    *(
        ShardedCase(_EDGES, heads, layout=layout.name, seqlens_q=count, causal=True, cp_interleave=64)
        for layout in (FP8_E4M3, FP8_DS_MLA)
        for heads in (16, 128)
        for count in (1, 2)
    ),
    ShardedCase((30_000,), 16, cp_interleave=64),
    ShardedCase(tuple(range(1, 600, 3)), 64, cp_interleave=64),
    # Chosen tokens, of which some ranks may have none.
    *(ShardedCase(_EDGES, heads, topk=200, cp_interleave=count) for heads, count in ((16, 1), (64, 16), (128, 64))),
    ShardedCase(_EDGES, 32, topk=700, seqlens_q=2),
    ShardedCase(_EDGES, 16, topk=130, layout=FP8_E4M3.name, cp_interleave=16),
    *(
        ShardedCase((5000, 17, 3000), heads, topk=2048, layout=FP8_DS_MLA.name, cp_interleave=64)
        for heads in (16, 128)
    ),
)


def sharded_cases(world: int) -> list[ShardedCase]:
    """The cases, with as many heads at least that each rank has as many."""
    return [replace(case, num_heads_q=ceil_div(case.num_heads_q, world) * world) for case in _CASES]


def check_shards(world: int, backend: str, cases: Sequence[ShardedCase], *, jobs: int) -> Iterator[CheckResult]:
    """Attend to the shards of all ranks one after another, merge, and give the results of the cases in order.

    Parameters
    ----------
    world
        Ranks.
    backend
        ``"cuda"`` or ``"numpy"``.
    jobs
        Processes that share the cases.
    """
    with new_processes(min(jobs, len(cases))) as pool:
        yield from pool.map(partial(_check_shards, world=world, backend=backend), cases)


def _check_shards(case: ShardedCase, world: int, backend: str) -> CheckResult:
    library, (host, tokens) = LIBRARY_OF_BACKEND[backend], _host_case(case)
    total_seqlens, chosen = library.upload(host.cache_seqlens), None if tokens is None else library.upload(tokens)
    states = []
    try:
        for shard, share in shards_of(host, world, case.cp_interleave):
            local = share.on(library)
            if chosen is None:
                options: dict[str, Any] = {**local.options, **of_shard(shard, total_seqlens)}
                states.append(mla_decode(*local.tensors, **options))
            else:
                states.append(mla_sparse_decode(local.q, **_of_chosen(local, shard, chosen), cp_world=world))
        outs, lses = zip(*states, strict=True)
        return _compared(case, host, tokens, *map(library.download, merge_states(outs, lses)))
    except MlaError as error:
        return CheckResult(case, None, str(error))


def check_ranks(
    group: Any, backend: str, cases: Sequence[ShardedCase], *, exchange: str
) -> Iterator[CheckResult]:
    """Run `cp_decode` and `cp_sparse_decode` in all processes of a torch process group, of which each calls this and
    gets the results.
    """
    from torch import distributed

    world, rank, library = group.size(), group.rank(), library_of(backend)
    of_group = {"group": group, "exchange": exchange}
    for case in cases:
        host, tokens = _host_case(case)
        shard, share = list(shards_of(host, world, case.cp_interleave))[rank]
        local, heads = share.on(library), case.num_heads_q // world
        q = local.q[..., rank * heads : (rank + 1) * heads, :]
        inputs = q, *local.tensors[1:-1], library.upload(host.cache_seqlens)
        try:
            if tokens is None:
                options: dict[str, Any] = {**local.options, "cp_interleave": case.cp_interleave, **of_group}
                result: Any = cp_decode(*inputs, **options)
            else:
                result = cp_sparse_decode(q, **_of_chosen(local, shard, library.upload(tokens)), **of_group)
            result = tuple(map(library.download, result))
        except MlaError as error:
            result = str(error)
        of_ranks: list[Any] = [None] * world
        distributed.all_gather_object(of_ranks, result, group=group)
        problem = next((result for result in of_ranks if isinstance(result, str)), None)
        if problem is not None:
            yield CheckResult(case, None, problem)
            continue
        out, lse = (np.concatenate(parts, axis=-2) for parts in zip(*of_ranks, strict=True))
        yield _compared(case, host, tokens, out, lse)


def of_shard(shard: Shard, total_seqlens: Any) -> dict[str, Any]:
    """Arguments of `mla_decode` and `plan_decode` for the tokens of one rank."""
    return {**_ranks(shard), "total_seqlens": total_seqlens}


def _ranks(shard: Shard) -> dict[str, int]:
    return {"cp_world": shard.world, "cp_rank": shard.rank, "cp_interleave": shard.interleave}


def _of_chosen(local: Case, shard: Shard, tokens: Any) -> dict[str, Any]:
    """Arguments of sparse decode besides q: those of the tokens that a rank has."""
    indices, counts = local_slots(tokens, local.block_table, local.kv_cache.shape[1], **_ranks(shard))
    of_cache = {"kv_cache": local.kv_cache, "layout": local.layout, "kv_scale": local.kv_scale}
    return {**of_cache, "indices": indices, "topk_length": counts, "head_dim_v": local.head_dim_v}


def _host_case(case: ShardedCase) -> tuple[Case, Array | None]:
    """The case as one of dense decoding, and the tokens [batch, seqlen_q, topk] that it chooses of each request."""
    host = build_case(replace(case, topk=None))
    assert isinstance(host, Case)
    if case.topk is None:
        return host, None
    rng = np.random.default_rng(case.seed)
    tokens = np.full((case.batch, int(case.q_lengths.max()), case.topk), NO_TOKEN, np.int32)
    for request, query in np.ndindex(tokens.shape[:2]):
        chosen = rng.permutation(case.lengths[request])[: case.topk]
        tokens[request, query, : chosen.size] = chosen
    return host, tokens


def _compared(case: ShardedCase, host: Case, tokens: Array | None, out: Array, lse: Array) -> CheckResult:
    whole: Case | SparseCase = host
    if tokens is not None:
        counts = (tokens != NO_TOKEN).sum(-1)
        whole = SparseCase(
            host.q,
            host.kv_cache,
            slots_of(tokens, host.block_table, case.page_size),
            counts,
            case.work_of(counts, None),
            layout=host.layout,
            kv_scale=KV_SCALE if case.cache_layout.needs_scale else None,
        )
    return CheckResult(case, measure_accuracy(whole, out, lse, choose_requests(whole, _COMPARED)), "")
