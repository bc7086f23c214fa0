"""What is timed: one case of dense decoding or sparse attention, described without its arrays, and grids of cases."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..call.arguments import as_boolean, as_integer
from ..call.options import AUTO
from ..call.problem import MAX_TOKENS
from ..errors import InvalidArgumentError
from ..lab.lengths import mid_decode_lengths, read_lengths, shipped_lengths
from ..lab.presets import find_preset
from ..lab.spec import (
    DEFAULT_DTYPE,
    DEFAULT_HEAD_DIM_V,
    DEFAULT_PAGE_SIZE,
    DEFAULT_ROPE_DIM,
    PACKED,
    STORAGES,
    CaseSpec,
)
from ..lab.work import IntArray, Work
from ..layouts import BF16, DENSE_LAYOUTS, find_layout
from ..layouts.block_scaled import BlockScaled
from ..schedule.pieces import TILE_TOKENS

# Small, middle and full batches; memory-bound and compute-bound head counts: under a minute on an H200, with peers.
DEFAULT_BATCHES, DEFAULT_LENGTHS, DEFAULT_HEADS = (1, 16, 128), (1024, 8192), (16, 128)
# A CPU is a thousand times slower.
CPU_BATCHES, CPU_LENGTHS, CPU_HEADS = (1, 2), (64, 256), (8,)

_DEFAULT_WIDTHS = (DEFAULT_HEAD_DIM_V, DEFAULT_ROPE_DIM)
DECODE, SPARSE_DECODE, SPARSE_PREFILL = "decode", "sparse decode", "sparse prefill"
_INTEGERS = ("batch", "num_heads_q", "seqlen_q", "page_size", "latent_dim", "rope_dim", "extra_page_size")
_BOOLEANS = ("causal", "prefill", "attn_sink", "extra_topk_length")


@dataclass(frozen=True, slots=True)
class BenchCase:
    """One call to time. Two cases are equal when they describe the same work, whatever their names.

    Attributes
    ----------
    batch
        Requests.
    lengths
        Cached tokens: one number for all requests, or [batch] numbers.
    num_heads_q
        Query heads; the one kv head is MLA's.
    seqlen_q
        Query tokens of a request; when ragged, the most of any (set from ``ragged``).
    dtype, page_size, causal
        As in ``mla_decode``; tokens of a page.
    storage
        ``packed``: one array [num_pages, page_size, 1, 576]. ``split``: latent and rope part in separate arrays.
        ``strided``: a view into a pool that holds the pages of two layers side by side.
    ragged
        [batch] query tokens of each request, packed in one q [total_q, h, 576]; None: ``seqlen_q`` for each.
    fixed_split_tokens
        As in ``plan_decode`` (the peers have no such setting and run as they do).
    latent_dim, rope_dim
        Widths of the two parts of a cached token.
    layout
        Name of the cache's layout; None: the dense one of ``dtype``.
    compute
        As in ``mla_decode``.
    topk
        How many tokens of its request each query token attends to, chosen at random (`mla_sparse_decode`); None: all
        (`mla_decode`).
    prefill
        One request, each of whose ``seqlen_q`` query tokens is a row of ``mla_sparse_prefill``.
    attn_sink
        Whether there are attention sinks, beside ``topk``.
    extra_topk
        How many tokens of a second cache, which has as many of each request, each query token attends to besides.
    extra_page_size, extra_layout
        Of the second cache.
    extra_topk_length
        Whether only so many of its indices count, another number for each query token.
    name
        Unique within a run; made from the rest unless given.

    Raises
    ------
    InvalidArgumentError
        A value that no case can have.
    """

    batch: int
    lengths: int | tuple[int, ...]
    num_heads_q: int
    seqlen_q: int = 1
    dtype: str = DEFAULT_DTYPE
    page_size: int = DEFAULT_PAGE_SIZE
    storage: str = PACKED
    causal: bool = False
    ragged: tuple[int, ...] | None = None
    fixed_split_tokens: int | None = None
    latent_dim: int = DEFAULT_HEAD_DIM_V
    rope_dim: int = DEFAULT_ROPE_DIM
    layout: str | None = None
    compute: str = AUTO
    topk: int | None = None
    prefill: bool = False
    attn_sink: bool = False
    extra_topk: int | None = None
    extra_page_size: int = DEFAULT_PAGE_SIZE
    extra_layout: str | None = None
    extra_topk_length: bool = False
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        # Python's own types, whatever numbers and arrays came: a case must be hashable, and fit into JSON.
        plain: dict[str, Any] = {argument: as_integer(getattr(self, argument), argument) for argument in _INTEGERS}
        plain |= {argument: as_boolean(getattr(self, argument), argument) for argument in _BOOLEANS}
        plain["lengths"] = _integers(self.lengths, "lengths")
        if self.ragged is not None:
            plain["ragged"] = _integers(self.ragged, "ragged")
        for argument in ("fixed_split_tokens", "topk", "extra_topk"):
            if getattr(self, argument) is not None:
                plain[argument] = as_integer(getattr(self, argument), argument)
        for argument, value in plain.items():
            object.__setattr__(self, argument, value)
        for argument in ("batch", "num_heads_q", "seqlen_q", "page_size", "extra_page_size"):
            if getattr(self, argument) < 1:
                raise InvalidArgumentError(argument, "at least 1", str(getattr(self, argument)))
        for argument in ("lengths", "ragged"):
            values = getattr(self, argument)
            if isinstance(values, tuple) and len(values) != self.batch:
                raise InvalidArgumentError(argument, f"{self.batch} numbers, one a request", f"{len(values)}")
        split = self.fixed_split_tokens
        if split is not None and (split < 1 or split % TILE_TOKENS != 0):
            raise InvalidArgumentError("fixed_split_tokens", f"a multiple of {TILE_TOKENS}", str(split))
        for tokens in self.lengths if isinstance(self.lengths, tuple) else (self.lengths,):
            if not 0 <= tokens <= MAX_TOKENS:
                raise InvalidArgumentError("lengths", f"0 to {MAX_TOKENS} tokens", str(tokens))
        if self.ragged is not None:
            if not isinstance(self.ragged, tuple) or min(self.ragged) < 0 or not any(self.ragged):
                raise InvalidArgumentError("ragged", "numbers from 0 up, not all 0", str(self.ragged))
            object.__setattr__(self, "seqlen_q", max(self.ragged))
        if self.layout in (None, DENSE_LAYOUTS.get(self.dtype, BF16).name):  # by either name the same case
            object.__setattr__(self, "layout", None)
        if self.prefill and split is not None:
            raise InvalidArgumentError("fixed_split_tokens", "nothing beside prefill, which has no plan", str(split))
        assert self.spec  # checks the rest
        if not self.name:
            equal = isinstance(self.lengths, int)
            length = f"k{self.lengths}" if equal else f"mean{round(float(self.kv_lengths.mean()))}"
            object.__setattr__(self, "name", _name(self, length))

    @property
    def spec(self) -> CaseSpec:
        """What its arrays are made from."""
        return CaseSpec(
            lengths=self.lengths if isinstance(self.lengths, tuple) else (self.lengths,) * self.batch,
            num_heads_q=self.num_heads_q,
            seqlens_q=self.seqlen_q if self.ragged is None else self.ragged,
            latent_dim=self.latent_dim,
            rope_dim=self.rope_dim,
            dtype=self.dtype,
            page_size=self.page_size,
            causal=self.causal,
            storage=self.storage,
            layout=self.layout,
            compute=self.compute,
            topk=self.topk,
            prefill=self.prefill,
            attn_sink=self.attn_sink,
            extra_topk=self.extra_topk,
            extra_page_size=self.extra_page_size,
            extra_layout=self.extra_layout,
            extra_topk_length=self.extra_topk_length,
        )

    @property
    def function(self) -> str:
        """What is timed: ``DECODE``, ``SPARSE_DECODE`` or ``SPARSE_PREFILL``."""
        if self.topk is None:
            return DECODE
        return SPARSE_PREFILL if self.prefill else SPARSE_DECODE

    @property
    def kv_lengths(self) -> IntArray:
        """[batch] int64: cached tokens."""
        return self.spec.kv_lengths

    @property
    def cache_bytes(self) -> int:
        return self.spec.cache_bytes

    @property
    def work(self) -> Work:
        """FLOP and bytes by the model of ``work.Work``."""
        return self.spec.work

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BenchCase:
        """A case as `as_dict` wrote it, also after JSON has turned its tuples into lists."""
        fields: dict[str, Any] = {
            _field(name, value): tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**fields)


def _field(name: str, value: Any) -> str:
    """What a field of a file is called now: storages were layouts once."""
    return "storage" if name == "layout" and value in STORAGES else name


def _integers(values: Any, argument: str) -> int | tuple[int, ...]:
    """One number or a sequence of them, of any library."""
    if isinstance(values, (list, tuple)) or getattr(values, "ndim", 0) > 0:
        return tuple(as_integer(value, argument) for value in values)
    return as_integer(values, argument)


def _name(case: BenchCase, tokens: str) -> str:
    """For example ``b128_k8192_h16_q1``, with what differs from the defaults behind it."""
    parts = ["prefill" if case.prefill else f"b{case.batch}", tokens, f"h{case.num_heads_q}", f"q{case.seqlen_q}"]
    parts += [f"top{case.topk}"] * (case.topk is not None)
    if (case.latent_dim, case.rope_dim) != _DEFAULT_WIDTHS:
        parts.append(f"d{case.latent_dim}+{case.rope_dim}")
    if case.dtype != DEFAULT_DTYPE:
        parts.append(DENSE_LAYOUTS[case.dtype].name)
    parts += [str(case.layout)] * (case.layout is not None) + [case.compute] * (case.compute != AUTO)
    if case.page_size != DEFAULT_PAGE_SIZE:
        parts.append(f"p{case.page_size}")
    if case.storage != PACKED:
        parts.append(case.storage)
    if case.extra_topk is not None:
        parts.append(f"extra{case.extra_topk}p{case.extra_page_size}")
        parts += [str(case.extra_layout)] * (case.extra_layout is not None) + ["lengths"] * case.extra_topk_length
    parts += ["sinks"] * case.attn_sink
    parts += ["causal"] * case.causal + ["ragged"] * (case.ragged is not None)
    if case.fixed_split_tokens is not None:
        parts.append(f"cut{case.fixed_split_tokens}")
    return "_".join(parts)


def expand_grid(
    *,
    batches: Sequence[int] = DEFAULT_BATCHES,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    heads: Sequence[int] = DEFAULT_HEADS,
    seqlens_q: Sequence[int] = (1,),
    dtypes: Sequence[str] = (DEFAULT_DTYPE,),
    page_sizes: Sequence[int] = (DEFAULT_PAGE_SIZE,),
    storages: Sequence[str] = (PACKED,),
    splits: Sequence[int | None] = (None,),
    causal: bool = False,
    preset: str | None = None,
    tensor_parallel: Sequence[int] = (1,),
    traces: int = 0,
    layouts: Sequence[str | None] | None = None,
    computes: Sequence[str] = (AUTO,),
    topks: Sequence[int | None] = (None,),
    prefill: bool = False,
    extra_topks: Sequence[int | None] = (None,),
    extra_page_sizes: Sequence[int] = (DEFAULT_PAGE_SIZE,),
    extra_topk_length: bool = False,
    attn_sink: bool = False,
) -> list[BenchCase]:
    """Every combination of the values given, in order, the last axis varying fastest.

    Parameters
    ----------
    batches, lengths, heads, seqlens_q, dtypes, page_sizes, storages, splits, causal, layouts, computes, topks, prefill,
    extra_topks, extra_page_sizes, extra_topk_length, attn_sink
        Values of the fields of `BenchCase`; ``splits`` are its ``fixed_split_tokens``. Storages among ``layouts``, as
        which they were known before, count as ``storages``.
    preset, tensor_parallel
        A model's widths, and its heads on each of so many ranks, in place of ``heads``. Without one, widths are those
        of DeepSeek V3, or of a layout that has its own.
    traces
        So many draws (seeds 0, 1, ...) of real request lengths in mid-decode, from the sample that ships with the
        package, after ``lengths``.

    Raises
    ------
    InvalidArgumentError
        A value that no case can have, an unknown preset, or a batch larger than the sample.
    """
    widths: dict[str, int] = {}
    if preset is not None:
        model = find_preset(preset)
        heads = [model.heads_per_rank(ranks) for ranks in tensor_parallel]
        widths = {"latent_dim": model.latent_dim, "rope_dim": model.rope_dim}
    axes = {
        "seqlen_q": seqlens_q,
        "dtype": dtypes,
        "page_size": page_sizes,
        "storage": _storages(storages, layouts),
        "fixed_split_tokens": splits,
        "layout": [name for name in layouts or () if name not in STORAGES] or [None],
        "compute": computes,
        "topk": topks,
        "extra_topk": extra_topks,
        "extra_page_size": extra_page_sizes,
    }
    flags: dict[str, Any] = {
        "causal": causal,
        "prefill": prefill,
        "attn_sink": attn_sink,
        "extra_topk_length": extra_topk_length,
    }
    sizes = itertools.product(_length_axis(batches, lengths, traces), heads)
    cases = []
    for ((batch, tokens, draw), head_count), values in itertools.product(sizes, itertools.product(*axes.values())):
        options: dict[str, Any] = {**dict(zip(axes, values, strict=True)), **widths}
        layout = None if options["layout"] is None else find_layout(options["layout"])
        if layout is None or not layout.needs_scale:
            options["compute"] = AUTO  # there is but one way
        if preset is None and isinstance(layout, BlockScaled):
            options |= {"latent_dim": layout.latent_dim, "rope_dim": layout.rope_dim}
        case = BenchCase(batch, tokens, head_count, **options, **flags)
        if draw is not None:
            case = replace(case, name=_name(case, f"trace{draw}"))
        cases.append(case)
    return list(dict.fromkeys(cases))


def _storages(storages: Sequence[str], layouts: Sequence[str | None] | None) -> list[str]:
    """Those given as storages and those given as layouts; not the default beside the latter."""
    named = [name for name in layouts or () if name in STORAGES]
    given = [] if named and tuple(storages) == (PACKED,) else list(storages)
    return list(dict.fromkeys([*given, *(str(name) for name in named)]))


def _length_axis(
    batches: Sequence[int], lengths: Sequence[int], traces: int
) -> list[tuple[int, int | tuple[int, ...], int | None]]:
    """(batch, lengths, number of the draw or None), batch by batch."""
    requests = read_lengths(shipped_lengths()) if traces else None
    axis: list[tuple[int, int | tuple[int, ...], int | None]] = []
    for batch in batches:
        axis += [(batch, tokens, None) for tokens in lengths]
        if requests is not None:
            for seed in range(traces):
                drawn = mid_decode_lengths(requests, batch, seed)
                axis.append((batch, tuple(int(tokens) for tokens in drawn), seed))
    return axis
