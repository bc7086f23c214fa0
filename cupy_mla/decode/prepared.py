"""Prepared decode calls: everything about a call but its addresses, packed once and launched for every layer.

Per call only addresses are written into the packed arguments. A prepared call therefore keeps no array alive and is
right for any memory with the same strides.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays.dtypes import ITEM_SIZES
from ..arrays.frameworks import CUDA
from ..arrays.view import ArrayView, contiguous_strides
from ..call.arguments import KV_SCALE_DTYPE, PARTS_OF_A_TOKEN, has_rounding_ratio
from ..call.memo import Memo
from ..call.problem import DecodeInputs, DecodeProblem
from ..gpu.launch import Launch, is_capturing
from ..kernels.combine import STORE_ALIGNMENT, combine_geometry
from ..kernels.halves import second_half
from ..kernels.structs import COMBINE_PARAMS, DECODE_PARAMS, FP8_PARAMS, HALF_SHARE_UNIT, words_of
from ..kernels.tensor_maps import TENSOR_MAP, PageSteps, TensorMap, kv_tensor_map
from .blueprint import DenseBlueprint, PlanMemory

_LOG2_E = math.log2(math.e)
FLAG_BYTES = 4
ELEMENT_BYTES = 2
# CTAs of a job read the same tiles; two of them on neighbouring SMs take up to 3% less time (kernels_cu/TRIED.md). SMs
# come in pairs; larger clusters do not fill a GPU.
PAIR = 2
CALLS_KEPT = 4096  # as many as describe.py remembers good combinations
_CACHES_KEPT = 512  # KV caches (one a layer) whose tensor maps a prepared call has at hand


_Q_LATENT, _Q_ROPE, _BLOCK_TABLE, _OUT, _LSE, _PARTIAL_OUT, _PARTIAL_LSE, _PLAN = words_of(
    DECODE_PARAMS, "q_latent", "q_rope", "block_table", "out", "lse", "partial_out", "partial_lse", "plan"
)
_LATENT_SCALE, _ROPE_SCALE = words_of(FP8_PARAMS, "latent_scale_at", "rope_scale_at")
_C_OUT, _C_LSE, _C_PARTIAL_OUT, _C_PARTIAL_LSE, _C_PLAN = words_of(
    COMBINE_PARAMS, "out", "lse", "partial_out", "partial_lse", "plan"
)
assert DECODE_PARAMS.fields is not None
_PLAN_IS_SETTLED = DECODE_PARAMS.fields["plan_is_settled"][1] // FLAG_BYTES

_SCALE_BYTES = ITEM_SIZES[KV_SCALE_DTYPE]

Strides = tuple[int, ...]
Scales = tuple[float, float]  # of the latent and the rope part
ONE_EACH: Scales = (1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Pages:
    """Shape and strides (in elements) of one part of a paged cache."""

    shape: tuple[int, ...]
    strides: Strides

    @staticmethod
    def of(array: ArrayView) -> Pages:
        return Pages(array.shape, array.strides)


@dataclass(frozen=True, slots=True)
class CallStrides:
    """Strides of a call's arrays, in elements; those of q, out and lse are batch (0 when ragged), token, head.

    q_rope and kv_rope are None when there is no rope part; of a layout without columns kv_latent is of the whole cache.
    rope_scale are the bytes from the latent part's scale to the rope part's, 0 where they share one.
    """

    q_latent: Strides
    q_rope: Strides | None
    kv_latent: Pages
    kv_rope: Pages | None
    block_table: int
    out: Strides
    lse: Strides
    rope_scale: int = 0

    @staticmethod
    def of(problem: DecodeProblem, inputs: DecodeInputs) -> CallStrides:
        """Of inputs; an out or an lse that is not there is going to be contiguous."""
        ragged = problem.queries.ragged
        out = contiguous_strides(problem.queries.out_shape) if inputs.out is None else inputs.out.strides
        lse = contiguous_strides(problem.queries.lse_shape) if inputs.lse is None else inputs.lse.strides
        return CallStrides(
            q_latent=_query_strides(inputs.q_latent.strides, ragged),
            q_rope=None if inputs.q_rope is None else _query_strides(inputs.q_rope.strides, ragged),
            kv_latent=Pages.of(inputs.kv_latent),
            kv_rope=None if inputs.kv_rope is None else Pages.of(inputs.kv_rope),
            block_table=inputs.block_table.strides[0],
            out=_query_strides(out, ragged),
            lse=_lse_strides(lse, ragged),
            rope_scale=0 if inputs.kv_scale is None else _SCALE_BYTES * (inputs.kv_scale.shape == (PARTS_OF_A_TOKEN,)),
        )


class DecodeCall:
    """The launches of one kind of call: the decode kernel, and the merge of partial results where there can be any.

    Parameters
    ----------
    kind
        What the plans of such calls have in common.
    softmax_scale
        Factor on the scores.
    empty_lse
        The lse of a query that sees no key.
    strides
        Strides of the arrays.
    kv_scales
        What the values of an FP8 cache are multiplied by where a call has no address of it.
    """

    def __init__(
        self,
        kind: DenseBlueprint,
        softmax_scale: float,
        empty_lse: float,
        strides: CallStrides,
        kv_scales: Scales = ONE_EACH,
    ) -> None:
        config, shape, problem = kind.config, kind.shape, kind.problem
        self.kind = kind
        self._strides = strides
        self._lock = threading.Lock()  # the packed arguments are shared by all threads
        self._places: tuple[int, ...] | None = None  # the addresses in them, but the cache's
        self._maps: Memo[tuple[int, int], tuple[TensorMap, TensorMap]] = Memo(_CACHES_KEPT)

        params = np.zeros(1, config.family.params)
        self._is_scaled = problem.layout.needs_scale
        if self._is_scaled:
            params["latent_scale_value"], params["rope_scale_value"] = kv_scales
        self._say_where(params)
        params["out_strides"], params["lse_strides"] = strides.out, strides.lse
        params["num_parts"], params["blocks_per_job"] = shape.num_parts, shape.blocks_per_job
        params["group_heads"], params["scale_log2"] = problem.queries.group_heads, softmax_scale * _LOG2_E
        params["empty_lse"] = empty_lse
        if shape.may_claim:
            params["second_half"] = half = second_half(kind.location[1])
            num_second = sum(int(word).bit_count() for word in half)
            params["second_half_share"] = num_second * HALF_SHARE_UNIT // kind.num_sms
        self.params = params
        self._words = params.view(np.uint64).data
        self._flags = params.view(np.int32).data
        has_two_scales = strides.rope_scale > 0 or has_rounding_ratio(kv_scales)
        self._decode = Launch(
            kind.two_scales_kernel if has_two_scales else kind.decode_kernel,
            (shape.blocks_per_job, shape.num_parts, 1),
            (config.threads, 1, 1),
            config.shared_memory,
            (*self._leading_arguments(), params),
            programmatic=True,
            cluster=PAIR if shape.blocks_per_job % PAIR == 0 else 1,
        )
        self.combine_params = np.zeros(1, COMBINE_PARAMS)
        self._combine_words = self.combine_params.view(np.uint64).data
        self.combine_params["empty_lse"] = empty_lse
        self._combine = self._prepare_combine()

    def _say_where(self, params: npt.NDArray[Any]) -> None:
        """Write where queries and keys lie from one another."""
        strides = self._strides
        params["q_latent_strides"] = strides.q_latent
        if strides.q_rope is not None:
            params["q_rope_strides"] = strides.q_rope
        params["block_table_stride"] = strides.block_table
        for part, pages in (("latent", strides.kv_latent), ("rope", strides.kv_rope)):
            if pages is not None:
                steps = PageSteps.of(pages.shape, pages.strides)
                params[f"{part}_page_step"], params[f"{part}_head_step"] = steps.page, steps.head

    def _leading_arguments(self) -> tuple[npt.NDArray[Any], ...]:
        """What the kernel takes ahead of its parameters: tensor maps. Each launch is pointed at those of its cache."""
        no_map = np.zeros(1, TENSOR_MAP)
        return no_map, no_map

    def _prepare_combine(self) -> Launch | None:
        kind, strides, params = self.kind, self._strides, self.combine_params
        if kind.combine_kernel is None:
            return None
        params["out_strides"], params["lse_strides"] = strides.out, strides.lse
        params["merges_offset"], params["slot_rows"] = kind.merges_offset, kind.shape.rows_per_job
        params["rows"], params["group_heads"] = kind.config.rows, kind.problem.queries.group_heads
        params["d_v"] = kind.problem.queries.head_dim_v
        # The address of out is a multiple of it; `check_output` sees to that.
        params["aligned"] = all(step * ELEMENT_BYTES % STORE_ALIGNMENT == 0 for step in strides.out)
        geometry = combine_geometry(kind.config.family, kind.shape, kind.num_sms)
        return Launch(
            kind.combine_kernel, geometry.grid, geometry.block, geometry.shared_memory, (params,), programmatic=True
        )

    def __call__(self, addresses: tuple[int, ...], plan: PlanMemory, stream: int) -> None:
        """Queue the kernels, given addresses in the order of `Addresses`.

        Raises
        ------
        DriverError
            The driver refused a launch.
        """
        q_latent, q_rope, kv_latent, kv_rope, block_table, _, _, _, kv_scale, _, out, lse = addresses
        maps = self._maps.get((kv_latent, kv_rope)) or self._make_maps(kv_latent, kv_rope)
        partial_out, partial_lse, made = plan.partial_out, plan.partial_lse, plan.pointer
        places = q_latent, q_rope, block_table, kv_scale, out, lse, partial_out, partial_lse, made
        self._lock.acquire()  # a with statement takes twice the time
        try:
            arguments, combine = self._decode.addresses, self._combine
            arguments[0] = maps[0].address
            arguments[1] = maps[1].address
            if places != self._places:  # a step's layers often have all but their caches in the same places
                words, combine_words = self._words, self._combine_words
                self._places = None  # until all are written
                words[_Q_LATENT] = q_latent
                words[_Q_ROPE] = q_rope
                words[_BLOCK_TABLE] = block_table
                words[_OUT] = combine_words[_C_OUT] = out
                words[_LSE] = combine_words[_C_LSE] = lse
                words[_PARTIAL_OUT] = combine_words[_C_PARTIAL_OUT] = partial_out
                words[_PARTIAL_LSE] = combine_words[_C_PARTIAL_LSE] = partial_lse
                words[_PLAN] = combine_words[_C_PLAN] = made
                if self._is_scaled:
                    words[_LATENT_SCALE] = kv_scale
                    words[_ROPE_SCALE] = kv_scale + self._strides.rope_scale
                self._places = places
            # What was captured may not have run yet when a call runs that is not.
            self._flags[_PLAN_IS_SETTLED] = plan.is_settled and (not plan.updated_in_capture or is_capturing(stream))
            self._decode(stream)
            if not plan.is_settled and plan.updated_in_capture is not None:
                plan.is_settled = is_capturing(stream) == plan.updated_in_capture
            if combine is not None:
                if plan.pieces is None:
                    combine(stream)
                else:
                    plan.pieces[...] = self.combine_params
        finally:
            self._lock.release()

    def _make_maps(self, kv_latent: int, kv_rope: int) -> tuple[TensorMap, TensorMap]:
        config, strides = self.kind.config, self._strides
        latent = kv_tensor_map(self._pages(kv_latent, strides.kv_latent), config)
        rope = latent  # an argument that the kernel does not look at
        if strides.kv_rope is not None:
            rope = kv_tensor_map(self._pages(kv_rope, strides.kv_rope), config)
        return self._maps.keep((kv_latent, kv_rope), (latent, rope))

    def _pages(self, pointer: int, pages: Pages) -> ArrayView:
        return ArrayView(
            pointer, pages.shape, pages.strides, self.kind.problem.layout.dtype, CUDA, self.kind.location[1], None
        )


def _query_strides(strides: Strides, ragged: bool) -> Strides:
    """Batch, token and head strides of q or out; a ragged array's batch stride is 0."""
    return (0, *strides[:2]) if ragged else strides[:3]


def _lse_strides(strides: Strides, ragged: bool) -> Strides:
    """Batch, token and head strides of lse [batch, heads, tokens] or [heads, tokens]."""
    return (0, strides[1], strides[0]) if ragged else (strides[0], strides[2], strides[1])
