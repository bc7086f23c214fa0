"""Prepared calls of dense decode whose kernels gather tokens by their addresses: over pages of one token, and over rows
that hold their scales; and which calls are these."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from ..arrays.dtypes import ITEM_SIZES
from ..call.memo import remembered
from ..gpu.launch import is_capturing
from ..kernels.structs import COMBINE_PARAMS, GATHER_PARAMS, KV_UNIT, MAX_SLOTS, words_of
from .blueprint import DenseBlueprint, PlanMemory
from .prepared import CALLS_KEPT, FLAG_BYTES, ONE_EACH, CallStrides, DecodeCall, Scales

_Q, _Q_ROPE, _KV, _KV_ROPE, _INDICES, _OUT, _LSE, _PARTIAL_OUT, _PARTIAL_LSE, _PLAN = words_of(
    GATHER_PARAMS,
    *("q", "q_rope", "kv", "kv_rope", "indices", "out", "lse", "partial_out", "partial_lse", "plan"),
)
_C_OUT, _C_LSE, _C_PARTIAL_OUT, _C_PARTIAL_LSE, _C_PLAN = words_of(
    COMBINE_PARAMS, "out", "lse", "partial_out", "partial_lse", "plan"
)
assert GATHER_PARAMS.fields is not None
_PLAN_IS_SETTLED = GATHER_PARAMS.fields["plan_is_settled"][1] // FLAG_BYTES


class TokenPagesCall(DecodeCall):
    """The launches of one kind of call; parameters as of `DecodeCall`."""

    def _say_where(self, params: npt.NDArray[Any]) -> None:
        """Write where queries and keys lie from one another: to a kernel of gathered tokens, by request."""
        strides, problem = self._strides, self.kind.problem
        queries, layout = problem.queries, problem.layout
        params["q_strides"] = strides.q_latent
        if strides.q_rope is not None:
            params["q_rope_strides"] = strides.q_rope
        params["indices_strides"] = strides.block_table, 0, 0
        for part, pages in (("kv", strides.kv_latent), ("kv_rope", strides.kv_rope)):
            if pages is not None:
                page, token, head, _ = (step * ITEM_SIZES[layout.dtype] for step in layout.row_strides(pages.strides))
                params[f"{part}_stride_page"] = page // KV_UNIT
                params[f"{part}_stride_head"] = head if queries.num_heads_kv > 1 else 0
                if part == "kv":  # of pages of one token the kernels do not look at it
                    params["kv_stride_token"] = token // KV_UNIT
        params["num_slots"] = min(strides.kv_latent.shape[0] * problem.keys.page_size, MAX_SLOTS)
        params["seqlen_q"] = queries.seqlen_q

    def _leading_arguments(self) -> tuple[npt.NDArray[Any], ...]:
        """None: the addresses are among the parameters."""
        return ()

    def __call__(self, addresses: tuple[int, ...], plan: PlanMemory, stream: int) -> None:
        """Queue the kernels, given addresses in the order of `Addresses`.

        Raises
        ------
        DriverError
            The driver refused a launch.
        """
        q_latent, q_rope, kv_latent, kv_rope, block_table, *_, out, lse = addresses
        words, combine, combine_words = self._words, self._combine, self._combine_words
        self._lock.acquire()  # a with statement takes twice the time
        try:
            words[_Q] = q_latent
            words[_Q_ROPE] = q_rope
            words[_KV] = kv_latent
            words[_KV_ROPE] = kv_rope
            words[_INDICES] = block_table
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
                if plan.pieces is None:
                    combine(stream)
                else:
                    plan.pieces[...] = self.combine_params
        finally:
            self._lock.release()


@remembered(CALLS_KEPT)
def prepare(
    kind: DenseBlueprint, softmax_scale: float, empty_lse: float, strides: CallStrides, kv_scales: Scales = ONE_EACH
) -> DecodeCall:
    """The prepared call of a kind and of these strides; the same object whenever it is asked for again.

    Raises
    ------
    CompilationError, UnsupportedDeviceError, DriverError, MissingDependencyError
        A kernel cannot be compiled or loaded.
    """
    made = TokenPagesCall if kind.config.family.gathers else DecodeCall
    return made(kind, softmax_scale, empty_lse, strides, kv_scales)
