"""The self-test of ``cupy-mla check``: a few dozen decodes against float64 on this machine.

The cases share few kernel configurations, so that a first run, which compiles them, still takes less than a minute.
Every case is poisoned (`CaseSpec`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..decode.dense import mla_decode, plan_decode
from ..errors import MlaError
from .accuracy import Accuracy, choose_requests, measure_accuracy
from .build import build_case
from .cases import Case
from .libraries import ArrayLibrary
from .spec import DEFAULT_DTYPE, DEFAULT_HEAD_DIM_V, DEFAULT_PAGE_SIZE, DEFAULT_ROPE_DIM, CaseSpec

_WIDTHS = (DEFAULT_HEAD_DIM_V, DEFAULT_ROPE_DIM)
_COMPARED = 10  # requests of a case that are compared with float64: all but in the largest batches


@dataclass(frozen=True)
class CheckCase(CaseSpec):
    """One decode of the self-test: a poisoned case, and where its plan cuts requests."""

    poison: bool = True
    fixed_split_tokens: int | None = None

    @property
    def name(self) -> str:
        """What is particular about the case, in words."""
        words = [f"{self.batch} x {max(self.lengths)} tokens", f"{self.num_heads_q} heads"]
        words += [f"{self.num_heads_kv} KV heads"] * (self.num_heads_kv > 1)
        words += ["ragged q"] if self.ragged else [f"s_q {self.seqlens_q}"] * (self.seqlens_q != 1)
        words += [f"{self.latent_dim} + {self.rope_dim}"] * ((self.latent_dim, self.rope_dim) != _WIDTHS)
        words += [self.dtype] * (self.dtype != DEFAULT_DTYPE)
        words += [f"page size {self.page_size}"] * (self.page_size != DEFAULT_PAGE_SIZE)
        words += ["causal"] * self.causal
        words += [f"split every {self.fixed_split_tokens}"] * (self.fixed_split_tokens is not None)
        words += ["padded"] * self.padded
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """``accuracy`` is None when the decode raised; ``problem`` then says what."""

    case: CheckCase
    accuracy: Accuracy | None
    problem: str = ""

    @property
    def passed(self) -> bool:
        return self.accuracy is not None and self.accuracy.passed and not self.problem


# Lengths around a tile (64) and a page, an empty request, and one that is long enough to be split.
_EDGES = (0, 1, 63, 64, 65, 140, 1000)
_HEADS = (1, 3, 8, 12, 16, 32, 63, 64, 96, 126, 128)
_RAGGED = (1, 4, 0, 2, 16, 3, 1)

CHECK_CASES: tuple[CheckCase, ...] = (
    *(CheckCase(_EDGES, heads) for heads in _HEADS),
    # Split over many CTAs, and merged.
    CheckCase((30_000,), 16),
    CheckCase((10_000,), 128),
    *(CheckCase((5000, 17, 3000), heads) for heads in (16, 64)),
    # More requests than CTAs.
    *(CheckCase(tuple(range(1, 600, 3)), heads) for heads in (16, 64)),
    # Several query tokens: rows of several tokens in one tile, masked at the bottom right or not at all.
    *(CheckCase(_EDGES, heads, seqlens_q=2, causal=True) for heads in (8, 16, 64, 128)),
    CheckCase((2, 3, 700), 16, seqlens_q=16, causal=True),
    CheckCase((4000, 70), 128, seqlens_q=3, causal=True),
    CheckCase(_EDGES, 128, seqlens_q=3),
    CheckCase(_EDGES, 16, seqlens_q=_RAGGED, causal=True),
    CheckCase(_EDGES, 64, seqlens_q=_RAGGED, causal=True),
    CheckCase(_EDGES, 128, seqlens_q=_RAGGED),
    # Several KV heads.
    CheckCase((200, 64, 1), 128, num_heads_kv=2),
    CheckCase((200, 64, 1), 128, num_heads_kv=8),
    # Other element types, pages and widths.
    *(CheckCase(_EDGES, heads, dtype="float16") for heads in (16, 128)),
    *(CheckCase(_EDGES, 128, page_size=page_size) for page_size in (16, 128)),
    CheckCase(_EDGES, 16, page_size=32),
    CheckCase(_EDGES, 64, rope_dim=0),
    CheckCase(_EDGES, 64, latent_dim=256),
    # Views of wider arrays, and splits of a fixed length.
    *(CheckCase(_EDGES, heads, padded=True) for heads in (16, 128)),
    *(CheckCase((3000, 700, 64, 1), heads, fixed_split_tokens=512) for heads in (16, 128)),
)


def run_checks(library: ArrayLibrary, cases: Sequence[CheckCase] = CHECK_CASES) -> Iterator[CheckResult]:
    """Run the cases one by one on arrays of a library; each twice, since results must be the same bits."""
    for check_case in cases:
        case = build_case(check_case, library)
        try:
            plan = plan_decode(*case.tensors, **case.plan_options, fixed_split_tokens=check_case.fixed_split_tokens)
            first = mla_decode(*case.tensors, **case.options, plan=plan, validate=True)
            again = mla_decode(*case.tensors, **case.options, plan=plan)
            accuracy = measure_accuracy(case, *first, choose_requests(case, _COMPARED))
        except MlaError as error:
            yield CheckResult(check_case, None, str(error))
            continue
        yield CheckResult(check_case, accuracy, "" if _same_bits(case, first, again) else "two runs differ")


def _same_bits(case: Case, first: tuple[Any, Any], again: tuple[Any, Any]) -> bool:
    def bits(index: int, result: tuple[Any, Any]) -> tuple[bytes, bytes]:
        out, lse = case.request_result(index, *result)
        return out.tobytes(), lse.tobytes()

    return all(bits(index, first) == bits(index, again) for index in range(case.batch))
