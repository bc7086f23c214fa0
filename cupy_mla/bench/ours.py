"""This package's side of the benchmark."""

from __future__ import annotations

from typing import Any

from ..lab.timing import prepare_call
from .grid import BenchCase
from .inputs import Call, Inputs
from .rows import OURS


class OurSide:
    """The function of a case with a plan and outputs made before, as every layer of a step but the first calls it."""

    name = OURS

    def unsupported(self, case: BenchCase) -> str | None:
        return None

    def prepare(self, inputs: Inputs) -> Call:
        """Plan, and return the call on one of the caches."""
        case = inputs.case
        options: dict[str, Any] = {"fixed_split_tokens": case.fixed_split_tokens}
        if case.ragged is not None:
            options["max_seqlen_q"] = case.seqlen_q
        return prepare_call(inputs.stored_case, **({} if case.prefill else options))
