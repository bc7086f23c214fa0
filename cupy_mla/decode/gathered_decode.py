"""Prepared calls of sparse decoding: the kernel of gathered tokens with a plan, and the merge of partial results."""

from __future__ import annotations

import threading

import numpy as np

from ..call.memo import remembered
from ..gpu.launch import Launch, is_capturing
from ..kernels.combine import STORE_ALIGNMENT, combine_geometry
from ..kernels.halves import second_half
from ..kernels.structs import GATHER_COMBINE_PARAMS, GATHER_PARAMS, HALF_SHARE_UNIT, words_of
from .blueprint import PlanMemory, SparseBlueprint
from .gathered import SparseStrides, gather_params
from .prepared import CALLS_KEPT, ELEMENT_BYTES, FLAG_BYTES, PAIR

_Q, _KV, _INDICES, _SINK, _SCALE, _OUT, _LSE, _PARTIAL_OUT, _PARTIAL_LSE, _PLAN = words_of(
    GATHER_PARAMS, "q", "kv", "indices", "attn_sink", "kv_scale_at", "out", "lse", "partial_out", "partial_lse", "plan"
)
_EXTRA_KV, _EXTRA_INDICES = words_of(GATHER_PARAMS, "extra_kv", "extra_indices")
_C_SINK, _C_OUT, _C_LSE, _C_PARTIAL_OUT, _C_PARTIAL_LSE, _C_PLAN = words_of(
    GATHER_COMBINE_PARAMS, "attn_sink", "out", "lse", "partial_out", "partial_lse", "plan"
)
assert GATHER_PARAMS.fields is not None
_PLAN_IS_SETTLED = GATHER_PARAMS.fields["plan_is_settled"][1] // FLAG_BYTES


class SparseDecodeCall:
    """The launches of one kind of call: the decode kernel, and the merge of partial results where there can be any.

    Parameters
    ----------
    kind
        What the plans of such calls have in common.
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
        kind: SparseBlueprint,
        softmax_scale: float,
        empty_lse: float,
        strides: SparseStrides,
        kv_scale: float = 1.0,
    ) -> None:
        config, shape, queries = kind.config, kind.shape, kind.problem.queries
        self.kind = kind
        self._strides = strides
        self._lock = threading.Lock()  # the packed arguments are shared by all threads
        params = gather_params(kind.problem, softmax_scale, empty_lse, strides, kv_scale)
        params["num_parts"], params["blocks_per_job"] = shape.num_parts, shape.blocks_per_job
        params["seqlen_q"] = queries.seqlen_q
        if shape.may_claim:
            params["second_half"] = half = second_half(kind.location[1])
            num_second = sum(int(word).bit_count() for word in half)
            params["second_half_share"] = num_second * HALF_SHARE_UNIT // kind.num_sms
        self.params = params
        self._words = params.view(np.uint64).data
        self._flags = params.view(np.int32).data
        self._decode = Launch(
            kind.decode_kernel,
            (shape.blocks_per_job, shape.num_parts, 1),
            (config.threads, 1, 1),
            config.shared_memory,
            (params,),
            programmatic=True,
            cluster=PAIR if shape.blocks_per_job % PAIR == 0 else 1,
        )
        self.combine_params = np.zeros(1, GATHER_COMBINE_PARAMS)
        self._combine_words = self.combine_params.view(np.uint64).data
        self.combine_params["empty_lse"] = empty_lse
        self._combine = self._prepare_combine()

    def _prepare_combine(self) -> Launch | None:
        kind, strides, params = self.kind, self._strides, self.combine_params
        if kind.combine_kernel is None:
            return None
        queries = kind.problem.queries
        params["out_strides"], params["lse_strides"] = strides.out, strides.lse
        params["merges_offset"], params["slot_rows"] = kind.merges_offset, kind.shape.rows_per_job
        params["rows"], params["group_heads"] = kind.config.rows, queries.group_heads
        params["d_v"], params["seqlen_q"] = queries.head_dim_v, queries.seqlen_q
        # The address of out is a multiple of it; `check_output` sees to that.
        params["aligned"] = all(step * ELEMENT_BYTES % STORE_ALIGNMENT == 0 for step in strides.out)
        geometry = combine_geometry(kind.config.family, kind.shape, kind.num_sms)
        return Launch(
            kind.combine_kernel, geometry.grid, geometry.block, geometry.shared_memory, (params,), programmatic=True
        )

    def __call__(self, addresses: tuple[int, ...], plan: PlanMemory, stream: int) -> None:
        """Queue the kernels, given the address of each array of `SparseDecodeArrays`; 0 for one that is not there.

        Raises
        ------
        DriverError
            The driver refused a launch.
        """
        q, kv, indices, _, attn_sink, kv_scale, extra_kv, extra_indices, _, _, out, lse = addresses
        words, combine, combine_words = self._words, self._combine, self._combine_words
        self._lock.acquire()  # a with statement takes twice the time
        try:
            words[_Q], words[_KV], words[_INDICES], words[_SCALE] = q, kv, indices, kv_scale
            words[_EXTRA_KV], words[_EXTRA_INDICES] = extra_kv, extra_indices
            words[_SINK] = combine_words[_C_SINK] = attn_sink
            words[_OUT] = combine_words[_C_OUT] = out
            words[_LSE] = combine_words[_C_LSE] = lse
            words[_PARTIAL_OUT] = combine_words[_C_PARTIAL_OUT] = plan.partial_out
            words[_PARTIAL_LSE] = combine_words[_C_PARTIAL_LSE] = plan.partial_lse
            words[_PLAN] = combine_words[_C_PLAN] = plan.pointer
            # What was captured may not have run yet when a call runs that is not.
            self._flags[_PLAN_IS_SETTLED] = plan.is_settled and (not plan.updated_in_capture or is_capturing(stream))
            self._decode(stream)
            if not plan.is_settled and plan.updated_in_capture is not None:
                plan.is_settled = is_capturing(stream) == plan.updated_in_capture
            if combine is not None:
                combine(stream)
        finally:
            self._lock.release()


@remembered(CALLS_KEPT)
def prepare_sparse_decode(
    kind: SparseBlueprint, softmax_scale: float, empty_lse: float, strides: SparseStrides, kv_scale: float = 1.0
) -> SparseDecodeCall:
    """The prepared call of a kind; the same object whenever it is asked for again.

    Raises
    ------
    CompilationError, UnsupportedDeviceError, DriverError, MissingDependencyError
        A kernel cannot be compiled or loaded.
    """
    return SparseDecodeCall(kind, softmax_scale, empty_lse, strides, kv_scale)
