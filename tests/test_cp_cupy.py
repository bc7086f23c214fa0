"""Context-parallel decode through a communicator as cupyx.distributed has it.

Without a GPU there are no CuPy arrays and no NCCL: arrays of NumPy, whose methods CuPy's have too, and a stand-in for
the communicator over gloo.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cases_chosen import attend_to_chosen
from cases_dense import DenseCase, frobenius_error
from gloo_ranks import Ranks

torch = pytest.importorskip("torch")

from cupy_mla import InvalidArgumentError, PlanMismatchError  # noqa: E402
from cupy_mla.lab.shards import shards_of  # noqa: E402
from cupy_mla.parallel import (  # noqa: E402
    cp_decode,
    cp_sparse_decode,
    local_slots,
    plan_cp_decode,
    plan_cp_sparse_decode,
)

WORLDS = (2, 4)
LENGTHS = (300, 64, 3, 0, 1, 129)
SHORTER = (7, 64, 2, 0, 0, 128)
MAX_ERROR, LSE_TOLERANCE = 3e-3, 1e-5


class Communicator:
    """The collectives of cupyx.distributed that are used, and what that library asks of arrays there."""

    def __init__(self, group: Any) -> None:
        self._group, self._n_devices, self.rank = group, group.size(), group.rank()

    def all_gather(self, in_array: Any, out_array: Any, count: int) -> None:
        assert count == in_array.size
        sent, received = self._tensors(in_array, out_array)
        torch.distributed.all_gather_into_tensor(received.view(-1), sent.view(-1), group=self._group)

    def all_to_all(self, in_array: Any, out_array: Any) -> None:
        assert in_array.shape[0] == out_array.shape[0] == self._n_devices
        sent, received = self._tensors(in_array, out_array)
        torch.distributed.all_to_all_single(received, sent, group=self._group)

    def _tensors(self, *arrays: Any) -> list[Any]:
        assert all(array.flags.c_contiguous and array.dtype.char in "bBiIlLqQefd" for array in arrays)
        return [torch.from_numpy(array) for array in arrays]


@dataclass(frozen=True)
class Call:
    """A case and how it is called."""

    case: DenseCase
    interleave: int = 1
    gathered: bool = False
    lengths: tuple[int, ...] | None = None  # that a plan made for the case's is updated with; None: no plan


def on_rank(rank: int, group: Any, call: Call) -> tuple[np.ndarray, np.ndarray]:
    """out and lse of a rank's heads."""
    world = group.size()
    arrays = call.case.build()
    (_, local) = list(shards_of(arrays, world, call.interleave))[rank]
    heads = call.case.num_heads_q // world
    q = arrays.q if call.gathered else arrays.q[..., rank * heads : (rank + 1) * heads, :]
    inputs = q, local.kv_cache, local.block_table
    options = {"causal": call.case.causal, "cu_seqlens_q": arrays.cu_seqlens_q, "layout": call.case.layout}
    options = {**options, "head_dim_v": call.case.latent_dim, "cp_interleave": call.interleave}
    options = {**options, "gathered": call.gathered, "group": Communicator(group), "kv_scale": arrays.kv_scale}
    total = arrays.cache_seqlens
    if call.lengths is not None:
        options["plan"] = plan_cp_decode(*inputs, total, **options)
        cp_decode(*inputs, total, **options)
        total = np.array(call.lengths, np.int32)
        options["plan"].update(total, arrays.cu_seqlens_q)
    out, lse = cp_decode(*inputs, total, **options)
    assert isinstance(out, np.ndarray)
    return out.astype(np.float64), lse


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(WORLDS, tmp_path_factory.mktemp("ranks")) as started:
        yield started


def small(**changes: Any) -> DenseCase:
    sizes = {"lengths": LENGTHS, "num_heads_q": 8, "latent_dim": 64, "rope_dim": 64, "page_size": 16}
    return DenseCase(**{**sizes, **changes})


CALLS = [
    *(Call(small(seqlens_q=count, causal=True), 5, gathered) for count in (1, 3) for gathered in (False, True)),
    Call(small(seqlens_q=(2, 0, 3, 1, 2, 4), causal=True), 16),
    Call(small(num_heads_kv=2, dtype="float16"), 64),
    *(Call(small(seqlens_q=count, causal=True), 16, lengths=SHORTER) for count in (1, 2)),
    Call(DenseCase(LENGTHS, num_heads_q=4, seqlens_q=2, causal=True, layout="fp8_e4m3"), 16),
    Call(DenseCase(LENGTHS, num_heads_q=4, layout="fp8_ds_mla")),
]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_ranks_together_give_the_whole(call: Call, world: int, ranks: Ranks) -> None:
    results = ranks.run(world, on_rank, call)
    out = np.concatenate([out for out, _ in results], axis=-2)
    lse = np.concatenate([lse for _, lse in results], axis=-2)
    arrays = call.case.build()
    if call.lengths is not None:
        arrays.cache_seqlens[:] = arrays.kv_lengths[:] = call.lengths
    exact_out, exact_lse = arrays.exact()
    assert frobenius_error(out, exact_out) < MAX_ERROR
    np.testing.assert_allclose(lse, exact_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


CHOSEN = np.array([[[299, 7, -1, 130, 0, 12]], [[63, 62, 0, 1, 2, 3]]], np.int32)


def sparse_case() -> Any:
    return DenseCase((300, 64), num_heads_q=4, page_size=16).build()


def sparse_on_rank(rank: int, group: Any) -> tuple[np.ndarray, np.ndarray]:
    """out and lse of a rank's heads."""
    arrays = sparse_case()
    (shard, local) = list(shards_of(arrays, group.size(), 5))[rank]
    heads = arrays.q.shape[-2] // group.size()
    q = arrays.q[..., rank * heads : (rank + 1) * heads, :]
    sharding = {"cp_world": shard.world, "cp_rank": rank, "cp_interleave": 5}
    indices, counts = local_slots(CHOSEN, local.block_table, 16, **sharding)
    inputs, named = (q, local.kv_cache, indices), {"topk_length": counts, "group": Communicator(group)}
    plan = plan_cp_sparse_decode(*inputs, **named)
    return cp_sparse_decode(*inputs, **named, plan=plan)


@pytest.mark.parametrize("world", WORLDS)
def test_chosen_tokens(world: int, ranks: Ranks) -> None:
    results = ranks.run(world, sparse_on_rank)
    out = np.concatenate([out for out, _ in results], axis=-2).astype(np.float64)
    arrays = sparse_case()
    exact_out, exact_lse = attend_to_chosen(arrays, CHOSEN)
    assert frobenius_error(out, exact_out) < MAX_ERROR
    lse = np.concatenate([lse for _, lse in results], axis=-2)
    np.testing.assert_allclose(lse, exact_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


class Alone:
    """Says how many there are; is never used."""

    _n_devices, rank = 2, 1


@pytest.mark.parametrize(
    ("argument", "expected", "changes"),
    [
        ("exchange", "a2a for CuPy arrays", {"exchange": "ag_rs"}),
        ("exchange", "a2a for CuPy arrays", {"exchange": "direct"}),
        ("exchange", "a2a or ag_rs or direct", {"exchange": "ring"}),
        ("q", "a CuPy array", {"q": torch.zeros(6, 1, 8, 128, dtype=torch.float16)}),
        ("q", "an array", {"q": [1]}),
        ("q", "an array [*rows, heads, width]", {"q": np.zeros((8, 128), np.float16)}),
        ("q", "that 2 ranks divide", {"q": np.zeros((6, 1, 3, 128), np.float16), "gathered": True}),
        ("total_seqlens", "a CuPy array [batch]", {"total_seqlens": torch.zeros(6, dtype=torch.int32)}),
        ("total_seqlens", "int32 [6]", {"total_seqlens": np.zeros(6, np.int64)}),
        ("total_seqlens", "int32 [6]", {"total_seqlens": np.zeros(5, np.int32)}),
        ("total_seqlens", "an array", {"total_seqlens": 3}),
    ],
)  # fmt: skip
def test_wrong_arguments(argument: str, expected: str, changes: dict[str, Any]) -> None:
    arrays = small().build()
    given = {"q": arrays.q, "kv_cache": arrays.kv_cache, "block_table": arrays.block_table}
    given = {**given, "total_seqlens": arrays.cache_seqlens, "head_dim_v": 64, "group": Alone()}
    with pytest.raises(InvalidArgumentError) as caught:
        plan_cp_decode(**{**given, **changes})
    assert caught.value.argument == argument
    assert expected in str(caught.value)


def test_a_plan_is_for_its_queries() -> None:
    arrays = small().build()
    inputs = arrays.kv_cache, arrays.block_table, arrays.cache_seqlens
    named = {"head_dim_v": 64, "group": Alone()}
    plan = plan_cp_decode(arrays.q, *inputs, **named)
    with pytest.raises(PlanMismatchError, match="a plan for q"):
        cp_decode(arrays.q[:, :, :4], *inputs, **named, plan=plan)
