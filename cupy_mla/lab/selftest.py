"""The self-test of ``cupy-mla check``: a few dozen decodes against float64 on this machine.

The cases share few kernel configurations, so that a first run, which compiles them, still takes less than a minute.
Every cache is poisoned: not-a-number past the end of each sequence and in pages of no request, and page numbers that
do not exist past the end of each row of the block table.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..decode.dense import mla_decode, plan_decode
from ..errors import MlaError
from .accuracy import Accuracy, choose_requests, measure_accuracy
from .cases import NO_PAGE, Case, build_case

_GARBAGE_PAGES = (2**31 - 1, -(2**31), 1 << 20)  # as int32 in a block table: no cache here has such pages
_SPARE_PAGES = 2  # pages of no request, all not-a-number
_COMPARED = 10  # requests of a case that are compared with float64: all but in the largest batches
_PADDING = 64  # values between rows of a strided array; 128 bytes keep the 16-byte alignment


@dataclass(frozen=True, slots=True)
class CheckCase:
    """One decode of the self-test; fields as in ``build_case``. ``strided``: q and cache are views of wider arrays."""

    kv_lengths: tuple[int, ...]
    num_heads_q: int
    num_heads_kv: int = 1
    seqlens_q: int | tuple[int, ...] = 1
    latent_dim: int = 512
    rope_dim: int = 64
    dtype: str = "bfloat16"
    page_size: int = 64
    causal: bool = False
    fixed_split_tokens: int | None = None
    strided: bool = False

    @property
    def name(self) -> str:
        """What is particular about the case, in words."""
        longest = max(self.kv_lengths)
        ragged = not isinstance(self.seqlens_q, int)
        words = [f"{len(self.kv_lengths)} x {longest} tokens", f"{self.num_heads_q} heads"]
        words += [f"{self.num_heads_kv} KV heads"] * (self.num_heads_kv > 1)
        words += ["ragged q"] if ragged else [f"s_q {self.seqlens_q}"] * (self.seqlens_q != 1)
        words += [f"{self.latent_dim} + {self.rope_dim}"] * ((self.latent_dim, self.rope_dim) != (512, 64))
        words += [self.dtype] * (self.dtype != "bfloat16")
        words += [f"page size {self.page_size}"] * (self.page_size != 64)
        words += ["causal"] * self.causal
        words += [f"split every {self.fixed_split_tokens}"] * (self.fixed_split_tokens is not None)
        words += ["strided"] * self.strided
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
    *(CheckCase(_EDGES, heads, strided=True) for heads in (16, 128)),
    *(CheckCase((3000, 700, 64, 1), heads, fixed_split_tokens=512) for heads in (16, 128)),
)


def run_checks(backend: str, cases: Sequence[CheckCase] = CHECK_CASES) -> Iterator[CheckResult]:
    """Run the cases one by one on ``cuda`` or ``numpy``; each twice, since results must be the same bits."""
    for check_case in cases:
        case = build_check(check_case, backend)
        try:
            plan = plan_decode(*case.tensors, **case.plan_options, fixed_split_tokens=check_case.fixed_split_tokens)
            first = mla_decode(*case.tensors, **case.options, plan=plan, validate=True)
            again = mla_decode(*case.tensors, **case.options, plan=plan)
            accuracy = measure_accuracy(case, *first, choose_requests(case, _COMPARED))
        except MlaError as error:
            yield CheckResult(check_case, None, str(error))
            continue
        yield CheckResult(check_case, accuracy, "" if _same_bits(case, first, again) else "two runs differ")


def build_check(check_case: CheckCase, backend: str) -> Case:
    """The poisoned case, on ``backend``."""
    case = build_case(
        check_case.kv_lengths,
        num_heads_q=check_case.num_heads_q,
        num_heads_kv=check_case.num_heads_kv,
        latent_dim=check_case.latent_dim,
        rope_dim=check_case.rope_dim,
        seqlens_q=check_case.seqlens_q,
        dtype=check_case.dtype,
        page_size=check_case.page_size,
        causal=check_case.causal,
    )
    case = _poisoned(case).on(backend)
    if not check_case.strided:
        return case
    return replace(case, q=_with_gaps(case.q), kv_cache=_with_gaps(case.kv_cache))


def _poisoned(case: Case) -> Case:
    page_size = case.kv_cache.shape[1]
    spare = np.full((_SPARE_PAGES, *case.kv_cache.shape[1:]), np.nan, dtype=case.kv_cache.dtype)
    cache = np.concatenate([case.kv_cache, spare])
    table = np.concatenate([case.block_table, np.full((case.batch, 1), NO_PAGE, dtype=np.int32)], axis=1)
    for row, length in zip(table, case.kv_lengths, strict=True):
        last_page, used = divmod(int(length), page_size)
        if used:
            cache[row[last_page], used:] = np.nan
    unused = table == NO_PAGE
    table[unused] = np.resize(np.array([*_GARBAGE_PAGES, len(cache) - 1], dtype=np.int32), int(unused.sum()))
    return replace(case, kv_cache=cache, block_table=table)


def _with_gaps(array: Any) -> Any:
    """The same values as a view of an array whose last dimension is wider, with not-a-number in between."""
    xp = np if isinstance(array, np.ndarray) else importlib.import_module("cupy")
    bits = array.view(np.uint16)
    not_a_number = np.uint16(0x7FFF)  # in bfloat16 and float16
    wide = xp.full((*array.shape[:-1], array.shape[-1] + _PADDING), not_a_number, dtype=np.uint16)
    wide[..., : array.shape[-1]] = bits
    return wide[..., : array.shape[-1]].view(array.dtype)


def _same_bits(case: Case, first: tuple[Any, Any], again: tuple[Any, Any]) -> bool:
    def bits(index: int, result: tuple[Any, Any]) -> tuple[bytes, bytes]:
        out, lse = case.request_result(index, *result)
        return out.tobytes(), lse.tobytes()

    return all(bits(index, first) == bits(index, again) for index in range(case.batch))
