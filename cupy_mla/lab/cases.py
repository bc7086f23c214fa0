"""A decode case: the arguments of one mla_decode call with what the host knows about them.

Cases are built from a `CaseSpec` (build.py) or loaded (case_files.py), with any array library. A case also runs itself,
says how much work it is, and gives single requests of itself back as small host cases, for checks against float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays.dtypes import ITEM_SIZES
from ..call.options import (
    ARRAYS,
    AUTO,
    DECODE,
    EXACT,
    OPTIONAL_ARRAYS,
    OUTPUTS,
    PLAN,
    SPLIT,
    option_names,
    read_call,
)
from ..layouts import CacheLayout, find_layout, infer_layout
from ..schedule.pieces import ceil_div
from .libraries import NUMPY, ArrayLibrary
from .random_values import Array
from .spec import DEFAULT_HEAD_DIM_V
from .work import IntArray, Work, count_work

if TYPE_CHECKING:
    from ..decode.plan import DecodePlan

NO_PAGE = -1  # fills the block table past a request's last page; never read as a page
TENSORS = tuple(name for name in ARRAYS if name not in OPTIONAL_ARRAYS)


@dataclass(frozen=True, slots=True)
class Case:
    """Arguments of ``mla_decode`` (shapes there) and the host's copy of the lengths.

    Attributes
    ----------
    q, kv_cache, block_table, cache_seqlens, cu_seqlens_q, head_dim_v, softmax_scale, causal, kv_scale, compute,
    layout
        As in ``mla_decode``: q and kv_cache are arrays or pairs (latent, rope); all arrays are of one library.
    kv_lengths, q_lengths
        [batch] int64 on the host: cached tokens and query tokens of each request.
    library
        The arrays' library.
    """

    q: Any
    kv_cache: Any
    block_table: Any
    cache_seqlens: Any
    kv_lengths: IntArray
    q_lengths: IntArray
    cu_seqlens_q: Any = None
    head_dim_v: int = DEFAULT_HEAD_DIM_V
    softmax_scale: float | None = None
    causal: bool = False
    kv_scale: float | tuple[float, float] | None = None
    compute: str = AUTO
    layout: str | None = None
    library: ArrayLibrary = NUMPY

    @property
    def batch(self) -> int:
        return len(self.kv_lengths)

    @property
    def dtype(self) -> str:
        """Element type of q and out."""
        return dtype_of(self.q)

    @property
    def cache_layout(self) -> CacheLayout:
        """That of the cache."""
        if self.layout is not None:
            return find_layout(self.layout)
        return infer_layout(dtype_of(self.kv_cache), sum(part.shape[-1] for part in parts_of(self.kv_cache)))

    @property
    def computes(self) -> str:
        """How exact results are: ``exact``, or ``split`` where that may be how they are computed."""
        may_split = self.cache_layout.needs_scale and self.compute != EXACT
        return SPLIT if may_split else EXACT

    @property
    def tensors(self) -> tuple[Any, Any, Any, Any]:
        """The positional arguments of ``mla_decode`` and ``plan_decode``."""
        return self.q, self.kv_cache, self.block_table, self.cache_seqlens

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of ``mla_decode`` that belong to the case."""
        return self._options(DECODE)

    @property
    def plan_options(self) -> dict[str, Any]:
        """The keyword arguments of ``plan_decode`` that belong to the case."""
        return self._options(PLAN)

    @property
    def cold(self) -> Any:
        """What a call is to find in device memory, not in L2: the cache."""
        return self.kv_cache

    def with_cold(self, cold: Any) -> Case:
        """The same case over another cache like its own."""
        return replace(self, kv_cache=cold)

    @property
    def read_bytes(self) -> int:
        """As much as a call can read of the cache."""
        return sum(int(part.nbytes) for part in parts_of(self.kv_cache))

    @property
    def work(self) -> Work:
        parts = parts_of(self.q)
        return count_work(
            self.kv_lengths,
            self.q_lengths,
            num_heads_q=parts[0].shape[-2],
            num_heads_kv=parts_of(self.kv_cache)[0].shape[2],
            head_dim=sum(part.shape[-1] for part in parts),
            head_dim_v=self.head_dim_v,
            causal=self.causal,
            layout=self.cache_layout,
            item_size=ITEM_SIZES[self.dtype],
        )

    def plan(self, **options: Any) -> DecodePlan:
        """A plan for the case; ``options`` are others of ``plan_decode``."""
        from ..decode.dense import plan_decode

        settings: dict[str, Any] = {**self.plan_options, **options}
        return plan_decode(*self.tensors, **settings)

    def run(
        self, plan: DecodePlan | None = None, *, results: tuple[Any, ...] | None = None, validate: bool | None = None
    ) -> tuple[Any, ...]:
        """Call ``mla_decode``.

        Parameters
        ----------
        plan
            From `plan`, or None.
        results
            ``out`` and ``lse`` of an earlier call, to be written to.
        validate
            As in ``mla_decode``.

        Returns
        -------
        ``out`` and ``lse``.
        """
        from ..decode.dense import mla_decode

        settings: dict[str, Any] = {**self.options, **dict(zip(OUTPUTS, results or (), strict=False))}
        return mla_decode(*self.tensors, plan=plan, validate=validate, **settings)

    def exact(self) -> tuple[Array, Array]:
        """In float64, of a host case: out [batch, s_q, h_q, d_v] and lse [batch, h_q, s_q]."""
        from ..call.describe import describe_decode
        from ..decode.reference import mla_decode_reference

        problem, inputs = describe_decode(*read_call(*self.tensors, **self.options))
        scale = problem.queries.default_softmax_scale if self.softmax_scale is None else self.softmax_scale
        out, lse = mla_decode_reference(problem, inputs, scale, dtype=np.float64)
        return out, lse

    def on(self, library: ArrayLibrary) -> Case:
        """The same case with arrays of another library (itself when they are); from the host with their strides."""
        if library is self.library:
            return self

        def move(array: Any) -> Any:
            return library.upload(self.library.download(array))

        return replace(
            self,
            q=each_part(move, self.q),
            kv_cache=each_part(move, self.kv_cache),
            block_table=move(self.block_table),
            cache_seqlens=move(self.cache_seqlens),
            cu_seqlens_q=None if self.cu_seqlens_q is None else move(self.cu_seqlens_q),
            library=library,
        )

    def request(self, index: int) -> Case:
        """One request as a host case of batch 1, q [1, its query tokens, h_q, d_qk], with only its own pages."""
        kv_length = int(self.kv_lengths[index])
        layout = self.cache_layout
        num_pages = ceil_div(kv_length, parts_of(self.kv_cache)[0].shape[1])
        pages = self.library.download(self.block_table[index])[:num_pages].astype(np.int64)
        # An empty request still needs a cache and a table that are well formed.
        pages = pages if num_pages else np.zeros(1, dtype=np.int64)
        return Case(
            q=each_part(lambda part: self.library.download(self._rows(part, index))[None], self.q),
            kv_cache=each_part(
                lambda part: layout.with_page_starts(self.library.take_pages(part, pages)), self.kv_cache
            ),
            block_table=np.arange(len(pages), dtype=np.int32)[None],
            cache_seqlens=np.array([kv_length], dtype=np.int32),
            kv_lengths=self.kv_lengths[index : index + 1],
            q_lengths=self.q_lengths[index : index + 1],
            head_dim_v=self.head_dim_v,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            kv_scale=self.kv_scale,
            compute=self.compute,
            layout=self.layout,
        )

    def request_result(self, index: int, out: Any, lse: Any) -> tuple[Array, Array]:
        """One request's part of a result of ``mla_decode``: out [s_q, h_q, d_v] and lse [h_q, s_q], on the host."""
        lse_of_request = lse[index] if self.cu_seqlens_q is None else lse[:, self._span(index)]
        return self.library.download(self._rows(out, index)), self.library.download(lse_of_request)

    def _options(self, function: str) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in OPTIONS if name in option_names(function)}
        return {"cu_seqlens_q": self.cu_seqlens_q, "kv_scale": self.kv_scale, **options}

    def _rows(self, array: Any, index: int) -> Any:
        return array[index] if self.cu_seqlens_q is None else array[self._span(index)]

    def _span(self, index: int) -> slice:
        begin = int(self.q_lengths[:index].sum())
        return slice(begin, begin + int(self.q_lengths[index]))


OPTIONS = tuple(name for name in option_names(DECODE) if name in Case.__dataclass_fields__)


def parts_of(array: Any) -> tuple[Any, ...]:
    """The arrays of a pair (latent, rope), or the one that is no pair."""
    return array if isinstance(array, tuple) else (array,)


def dtype_of(array: Any) -> str:
    """Element type of an array of any library, or of a pair."""
    return str(parts_of(array)[0].dtype).removeprefix("torch.")


def each_part(function: Callable[[Any], Any], array: Any) -> Any:
    """The same of each array of a pair, as a pair; or of the one that is no pair."""
    return tuple(map(function, array)) if isinstance(array, tuple) else function(array)
