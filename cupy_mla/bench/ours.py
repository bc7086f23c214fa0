"""This package's side of the benchmark."""

from __future__ import annotations

from typing import Any

from ..decode.dense import mla_decode, plan_decode
from .grid import BenchCase
from .inputs import Call, Inputs
from .rows import OURS


class OurSide:
    """``mla_decode`` with a plan and outputs made before, as every layer of a step but the first calls it."""

    name = OURS

    def unsupported(self, case: BenchCase) -> str | None:
        return None

    def prepare(self, inputs: Inputs) -> Call:
        """Plan, and return the call on one of the caches."""
        case = inputs.case
        q = inputs.stored_q
        tensors = (inputs.block_table, inputs.cache_seqlens)
        options: dict[str, Any] = {
            "head_dim_v": case.latent_dim,
            "causal": case.causal,
            "cu_seqlens_q": inputs.cu_seqlens_q,
        }
        plan = plan_decode(
            q,
            inputs.caches[0],
            *tensors,
            **options,
            max_seqlen_q=None if case.ragged is None else case.seqlen_q,
            fixed_split_tokens=case.fixed_split_tokens,
        )
        options |= {"softmax_scale": inputs.spec.scale, "plan": plan}
        out, lse = mla_decode(q, inputs.caches[0], *tensors, **options)

        def call(cache: Any) -> tuple[Any, Any]:
            # Validation would synchronise, which a capture cannot.
            return mla_decode(q, cache, *tensors, **options, out=out, lse=lse, validate=False)

        return call
