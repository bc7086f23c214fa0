"""The self-test of ``cupy-mla check``: small calls of every kind against float64 on this machine.

They run in several processes: a first run spends its time on compiling. Every case is poisoned (`CaseSpec`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..call.options import AUTO, EXACT, FP8, SPLIT
from ..errors import MlaError
from ..layouts import FP8_DS_MLA, FP8_DS_MLA_NO_ROPE, FP8_E4M3, FP8_MODEL1
from ..schedule.text import counted
from .accuracy import Accuracy, choose_requests, measure_accuracy
from .build import build_case
from .cases import Case
from .libraries import LIBRARY_OF_BACKEND
from .processes import new_processes
from .sparse_cases import SparseCase
from .spec import DEFAULT_DTYPE, DEFAULT_HEAD_DIM_V, DEFAULT_PAGE_SIZE, DEFAULT_ROPE_DIM, PACKED, STRIDED, CaseSpec

_WIDTHS = (DEFAULT_HEAD_DIM_V, DEFAULT_ROPE_DIM)
_COMPARED = 10  # requests of a case that are compared with float64: all but in the largest batches


@dataclass(frozen=True)
class CheckCase(CaseSpec):
    """One call of the self-test: a poisoned case, and where its plan cuts requests."""

    poison: bool = True
    fixed_split_tokens: int | None = None

    @property
    def name(self) -> str:
        """What is particular about the case, in words."""
        words = [f"{self.batch} x {max(self.lengths)} tokens", counted(self.num_heads_q, "head")]
        words += [f"{'prefill' if self.prefill else 'sparse'}, top {self.topk}"] * (self.topk is not None)
        words += [f"{self.num_heads_kv} KV heads"] * (self.num_heads_kv > 1)
        words += ["ragged q"] if self.ragged else [f"s_q {self.seqlens_q}"] * (self.seqlens_q != 1)
        words += [f"{self.latent_dim} + {self.rope_dim}"] * ((self.latent_dim, self.rope_dim) != _WIDTHS)
        words += [self.dtype] * (self.dtype != DEFAULT_DTYPE)
        words += [str(self.layout)] * (self.layout is not None) + [self.compute] * (self.compute != AUTO)
        words += [f"page size {self.page_size}"] * (self.page_size != DEFAULT_PAGE_SIZE)
        words += ["causal"] * self.causal
        words += [f"split every {self.fixed_split_tokens}"] * (self.fixed_split_tokens is not None)
        words += ["padded"] * self.padded + [self.storage] * (self.storage != PACKED)
        words += ["topk_length"] * self.topk_length + ["sinks"] * self.attn_sink
        if self.extra_topk is not None:
            words += [f"and top {self.extra_topk} of a second cache", f"its page size {self.extra_page_size}"]
            words += ["extra_topk_length"] * self.extra_topk_length
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


def _window_and_compressed(heads: int) -> CheckCase:
    """DeepSeek V4's call: tokens of a window, and of a compressed cache."""
    return CheckCase(
        _EDGES, heads, seqlens_q=2, rope_dim=0, layout=FP8_MODEL1.name, page_size=256, topk=128, attn_sink=True,
        extra_topk=512, extra_page_size=2, extra_topk_length=True,
    )  # fmt: skip


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
    # An e4m3 cache with one scale, all ways to compute.
    *(
        CheckCase(_EDGES, heads, layout=FP8_E4M3.name, compute=compute)
        for compute in (EXACT, SPLIT, FP8)
        for heads in (3, 16, 32, 64, 128)
    ),
    CheckCase((30_000,), 16, layout=FP8_E4M3.name),
    CheckCase(_EDGES, 16, layout=FP8_E4M3.name, page_size=16, padded=True),
    CheckCase(_EDGES, 16, layout=FP8_E4M3.name, seqlens_q=_RAGGED, causal=True, storage=STRIDED),
    CheckCase((3000, 700, 64, 1), 16, layout=FP8_E4M3.name, fixed_split_tokens=512),
    # Tokens that hold their scales.
    *(CheckCase(_EDGES, heads, layout=FP8_DS_MLA.name) for heads in (3, 16, 32, 128)),
    CheckCase(_EDGES, 16, layout=FP8_DS_MLA.name, seqlens_q=_RAGGED, causal=True, page_size=16, storage=STRIDED),
    *(CheckCase(_EDGES, heads, layout=FP8_MODEL1.name, rope_dim=0) for heads in (16, 64)),
    CheckCase(_EDGES, 16, layout=FP8_DS_MLA_NO_ROPE.name, rope_dim=0),
    # Chosen tokens: decode with plans that cut and that do not, lengths, sinks, pages of any size.
    *(CheckCase(_EDGES, heads, topk=200) for heads in (1, 16, 32, 128)),
    *(CheckCase((5000, 17, 3000), heads, topk=2048, topk_length=True, attn_sink=True) for heads in (16, 64)),
    *(CheckCase(_EDGES, heads, topk=130, seqlens_q=2, topk_length=True) for heads in (8, 128)),
    CheckCase(tuple(range(1, 600, 3)), 16, topk=64),
    CheckCase(_EDGES, 16, topk=200, dtype="float16", padded=True),
    CheckCase(_EDGES, 64, topk=200, page_size=61, storage=STRIDED),
    CheckCase(_EDGES, 128, topk=200, page_size=1, rope_dim=0),
    CheckCase((200, 64, 1), 128, topk=100, num_heads_kv=2),
    CheckCase((3000, 700, 64, 1), 16, topk=2048, fixed_split_tokens=512),
    # The same over FP8 caches.
    *(CheckCase(_EDGES, heads, topk=200, layout=FP8_DS_MLA.name, attn_sink=True) for heads in (3, 16, 32, 128)),
    CheckCase((5000, 17, 3000), 16, topk=2048, topk_length=True, layout=FP8_DS_MLA.name),
    CheckCase(_EDGES, 64, topk=200, layout=FP8_DS_MLA_NO_ROPE.name, rope_dim=0),
    CheckCase(_EDGES, 16, topk=200, layout=FP8_E4M3.name),
    *(CheckCase(_EDGES, heads, topk=200, layout=FP8_MODEL1.name, rope_dim=0, page_size=256) for heads in (16, 64)),
    # Two caches.
    *(CheckCase(_EDGES, heads, topk=130, attn_sink=True, extra_topk=99, extra_page_size=16) for heads in (16, 32, 128)),
    CheckCase((3000, 700, 64, 1), 64, topk=300, topk_length=True, extra_topk=900, extra_topk_length=True, rope_dim=0),
    *(_window_and_compressed(heads) for heads in (16, 64)),
    # Prefill: a row of indices for each query token.
    *(
        CheckCase((1000,), heads, seqlens_q=20, topk=140, prefill=True, topk_length=True, attn_sink=True)
        for heads in (16, 32, 128)
    ),
    CheckCase((100,), 64, seqlens_q=200, topk=200, prefill=True, dtype="float16", rope_dim=0),
    CheckCase((1000,), 16, seqlens_q=20, topk=140, prefill=True, topk_length=True, layout=FP8_DS_MLA.name),
    # Views of wider arrays, and splits of a fixed length.
    *(CheckCase(_EDGES, heads, padded=True) for heads in (16, 128)),
    *(CheckCase((3000, 700, 64, 1), heads, fixed_split_tokens=512) for heads in (16, 128)),
)


def run_checks(backend: str, cases: Sequence[CheckCase] = CHECK_CASES, *, jobs: int = 1) -> Iterator[CheckResult]:
    """Run the cases, and give their results in order.

    Parameters
    ----------
    backend
        ``"cuda"`` or ``"numpy"``.
    jobs
        Most processes; 1 runs them in this one.
    """
    jobs = min(jobs, len(cases))
    if jobs <= 1:
        yield from (_run_check(case, backend) for case in cases)
        return
    with new_processes(jobs) as pool:
        yield from pool.map(partial(_run_check, backend=backend), cases)


def _run_check(check_case: CheckCase, backend: str) -> CheckResult:
    """Run one twice, since results must be the same bits."""
    case = build_case(check_case, LIBRARY_OF_BACKEND[backend])
    try:
        plan: Any = case.plan(fixed_split_tokens=check_case.fixed_split_tokens)
        out, lse, *_ = first = case.run(plan, validate=True)
        again = case.run(plan)
        accuracy = measure_accuracy(case, out, lse, choose_requests(case, _COMPARED))
    except MlaError as error:
        return CheckResult(check_case, None, str(error))
    return CheckResult(check_case, accuracy, "" if _same_bits(case, first, again) else "two runs differ")


def _same_bits(case: Case | SparseCase, first: tuple[Any, ...], again: tuple[Any, ...]) -> bool:
    def bits(index: int, result: tuple[Any, ...]) -> tuple[bytes, bytes]:
        out, lse = case.request_result(index, *result[:2])
        return out.tobytes(), lse.tobytes()

    return all(bits(index, first) == bits(index, again) for index in range(case.batch))
