"""What kernels of gathered tokens are given besides addresses, and prepared calls of prefill."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays.dtypes import ITEM_SIZES
from ..arrays.view import ArrayView, contiguous_strides
from ..call.memo import remembered
from ..call.sparse_options import SPARSE_PREFILL_ARRAYS
from ..call.sparse_problem import SparseInputs, SparseProblem
from ..gpu.device import describe_device
from ..gpu.jit.module import load
from ..gpu.launch import Grid, Launch
from ..kernels.choose import choose_gathered_config
from ..kernels.gathered import GatheredConfig
from ..kernels.structs import GATHER_PARAMS, KV_UNIT, MAX_SLOTS, words_of
from ..layouts import CacheLayout
from ..schedule.pieces import ceil_div
from ..schedule.waves import deal_out
from .prepared import CALLS_KEPT

_LOG2_E = math.log2(math.e)
# Of prefill's arrays: the field whose first stride leads from query token to query token, and bytes of an element.
_TOKEN_STRIDES = {
    "q": ("q_strides", 2),
    "indices": ("indices_strides", 4),
    "topk_length": ("topk_length_stride", 4),
    "out": ("out_strides", 2),
    "max_logits": ("max_logits_strides", 4),
    "lse": ("lse_strides", 4),
}
_PREFILL_WORDS = words_of(
    GATHER_PARAMS, *("kv_scale_at" if name == "kv_scale" else name for name in SPARSE_PREFILL_ARRAYS)
)

Strides = tuple[int, ...]
Offsets = tuple[int, ...]  # bytes from each of SPARSE_PREFILL_ARRAYS to what a launch is given


@dataclass(frozen=True, slots=True)
class SparseStrides:
    """Where elements of a call's arrays lie, in elements from one another; outputs that are not there are contiguous.

    Attributes
    ----------
    q, out, lse
        Of request, token and head.
    kv
        Of page, token and head; where slots are equally far apart (`GatheredKeys.page_size` 1), of a slot, 0 and head.
    indices
        Of request, token and kv head.
    max_logits
        Of query token and head.
    num_slots
        Tokens that the cache has room for.
    extra_kv, extra_indices, num_extra_slots
        Of a second cache, as kv, indices and num_slots.
    """

    q: Strides
    kv: Strides
    indices: Strides
    out: Strides
    lse: Strides
    max_logits: Strides
    num_slots: int
    extra_kv: Strides = (0, 0, 0)
    extra_indices: Strides = (0, 0, 0)
    num_extra_slots: int = 0

    @staticmethod
    def of(problem: SparseProblem, inputs: SparseInputs) -> SparseStrides:
        """Those of inputs."""
        queries = problem.queries
        out = contiguous_strides(queries.out_shape) if inputs.out is None else inputs.out.strides
        lse = contiguous_strides(queries.lse_shape) if inputs.lse is None else inputs.lse.strides
        logits = (queries.num_heads_q, 1) if inputs.max_logits is None else inputs.max_logits.strides
        strides = SparseStrides(
            q=inputs.q.strides[:3],
            kv=_cache_strides(inputs.kv, problem.layout, problem.keys.page_size),
            indices=inputs.indices.strides[:3],
            out=out[:3],
            lse=(lse[0], lse[2], lse[1]),
            max_logits=logits,
            num_slots=inputs.num_slots,
        )
        if inputs.extra_kv is None or inputs.extra_indices is None or problem.extra_layout is None:
            return strides
        return replace(
            strides,
            extra_kv=_cache_strides(inputs.extra_kv, problem.extra_layout, problem.keys.extra_page_size),
            extra_indices=inputs.extra_indices.strides[:3],
            num_extra_slots=inputs.num_extra_slots,
        )


def _cache_strides(kv: ArrayView, layout: CacheLayout, page_size: int | None) -> Strides:
    """`SparseStrides.kv` of a cache with a page size as `GatheredKeys` has it."""
    page, token, head, _ = layout.row_strides(kv.strides)
    if page_size == 1:
        page, token = (page if kv.shape[1] == 1 else token), 0
    return page, token, head


def gather_params(
    problem: SparseProblem, softmax_scale: float, empty_lse: float, strides: SparseStrides, kv_scale: float = 1.0
) -> npt.NDArray[Any]:
    """All of a GATHER_PARAMS but addresses and what depends on the schedule."""
    queries = problem.queries
    params = np.zeros(1, GATHER_PARAMS)
    params["q_strides"], params["indices_strides"] = strides.q, strides.indices
    params["out_strides"], params["lse_strides"] = strides.out, strides.lse
    params["extra_indices_strides"] = strides.extra_indices
    for prefix, cache, layout in (("", strides.kv, problem.layout), ("extra_", strides.extra_kv, problem.extra_layout)):
        if layout is None:
            continue
        page, token, head = (step * ITEM_SIZES[layout.dtype] for step in cache)
        params[prefix + "kv_stride_page"], params[prefix + "kv_stride_token"] = page // KV_UNIT, token // KV_UNIT
        params[prefix + "kv_stride_head"] = head if queries.num_heads_kv > 1 else 0
    params["kv_scale_value"] = kv_scale
    params["num_slots"] = min(strides.num_slots, MAX_SLOTS)
    params["extra_num_slots"] = min(strides.num_extra_slots, MAX_SLOTS)
    params["topk"], params["group_heads"] = problem.keys.topk, queries.group_heads
    params["scale_log2"], params["empty_lse"] = softmax_scale * _LOG2_E, empty_lse
    return params


class PrefillCall:
    """The launches of one kind of prefill call: CTAs take the query tokens in turn, clusters of them share the rest.

    Attributes
    ----------
    problem : SparseProblem
        Shapes.
    device_id : int
        The GPU.

    Parameters
    ----------
    softmax_scale
        Factor on the scores.
    empty_lse
        The lse of a query token without a token.
    strides
        Of the arrays.
    kv_scale
        What the values of a cache with one scale are multiplied by where a call has no address of it.
    """

    def __init__(
        self,
        problem: SparseProblem,
        device_id: int,
        softmax_scale: float,
        empty_lse: float,
        strides: SparseStrides,
        kv_scale: float = 1.0,
    ) -> None:
        self.problem, self.device_id = problem, device_id
        queries = problem.queries
        num_sms = describe_device(device_id).num_sms
        config = choose_gathered_config(problem, num_sms, planned=False)
        assert isinstance(config, GatheredConfig)
        params = gather_params(problem, softmax_scale, empty_lse, strides, kv_scale)
        params["topk_length_stride"] = 1
        params["max_logits_strides"] = strides.max_logits
        self._lock = threading.Lock()  # the packed arguments are shared by all threads
        row_blocks, kv_heads = ceil_div(queries.group_heads, config.rows), queries.num_heads_kv
        may_share = config.family.shares_tokens(config)
        waves = deal_out(queries.total_q, problem.keys.topk, row_blocks * kv_heads, num_sms, may_share=may_share)
        self._launches: list[tuple[Launch, memoryview, Offsets]] = []
        if waves.whole:
            self._add(config, params, (row_blocks, waves.parts, kv_heads), waves.whole)
        if waves.rest:
            grid = row_blocks * waves.cluster, waves.rest, kv_heads
            self._add(replace(config, clustered=True), params, grid, waves.rest, waves.whole, waves.cluster)

    def _add(
        self,
        config: GatheredConfig,
        params: npt.NDArray[Any],
        grid: Grid,
        tokens: int,
        first: int = 0,
        cluster: int = 1,
    ) -> None:
        """A launch for so many query tokens from one on; beside the one for those before it."""
        own = params.copy()
        own["num_tokens"] = tokens
        launch = Launch(
            load(config.source(), self.device_id),
            grid,
            (config.threads, 1, 1),
            config.shared_memory,
            (own,),
            programmatic=first > 0,
            cluster=cluster,
        )
        offsets = dict.fromkeys(SPARSE_PREFILL_ARRAYS, 0)
        for name, (strides, item_bytes) in _TOKEN_STRIDES.items():
            offsets[name] = first * int(own[strides].flat[0]) * item_bytes
        self._launches.append((launch, own.view(np.uint64).data, tuple(offsets.values())))

    def __call__(self, addresses: tuple[int, ...], stream: int) -> None:
        """Queue the kernels, given the address of each array of `SparsePrefillArrays`; 0 for one that is not there.

        Raises
        ------
        DriverError
            The driver refused the launch.
        """
        with self._lock:
            for launch, words, offsets in self._launches:
                for word, address, offset in zip(_PREFILL_WORDS, addresses, offsets, strict=True):
                    words[word] = address and address + offset
                launch(stream)


@remembered(CALLS_KEPT)
def prepare_prefill(
    problem: SparseProblem,
    device_id: int,
    softmax_scale: float,
    empty_lse: float,
    strides: SparseStrides,
    kv_scale: float = 1.0,
) -> PrefillCall:
    """The prepared call of a kind; the same object whenever it is asked for again.

    Raises
    ------
    CompilationError, UnsupportedDeviceError, DriverError, MissingDependencyError
        The kernel cannot be compiled or loaded.
    """
    return PrefillCall(problem, device_id, softmax_scale, empty_lse, strides, kv_scale)
