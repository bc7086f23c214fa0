"""A decode case: the arguments of one mla_decode call with what the host knows about them.

Cases are built from a `CaseSpec` (build.py) or loaded (case_files.py), with any array library. A case also says how
much work it is, and gives single requests of itself back as small host cases, for checks against float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..arrays.dtypes import ITEM_SIZES
from ..call.options import ARRAYS, DECODE, OPTIONAL_ARRAYS, PLAN, option_names
from ..layouts import DENSE_LAYOUTS
from ..schedule.pieces import ceil_div
from .libraries import NUMPY, ArrayLibrary
from .random_values import Array
from .spec import DEFAULT_HEAD_DIM_V
from .work import IntArray, Work, count_work

NO_PAGE = -1  # fills the block table past a request's last page; never read as a page
TENSORS = tuple(name for name in ARRAYS if name not in OPTIONAL_ARRAYS)


@dataclass(frozen=True, slots=True)
class Case:
    """Arguments of ``mla_decode`` (shapes there) and the host's copy of the lengths.

    Attributes
    ----------
    q, kv_cache, block_table, cache_seqlens, cu_seqlens_q, head_dim_v, softmax_scale, causal
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
    library: ArrayLibrary = NUMPY

    @property
    def batch(self) -> int:
        return len(self.kv_lengths)

    @property
    def dtype(self) -> str:
        """Element type of q and cache."""
        return str(parts_of(self.q)[0].dtype).removeprefix("torch.")

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
            layout=DENSE_LAYOUTS[self.dtype],
            item_size=ITEM_SIZES[self.dtype],
        )

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
        num_pages = ceil_div(kv_length, parts_of(self.kv_cache)[0].shape[1])
        pages = self.library.download(self.block_table[index])[:num_pages].astype(np.int64)
        # An empty request still needs a cache and a table that are well formed.
        pages = pages if num_pages else np.zeros(1, dtype=np.int64)
        return Case(
            q=each_part(lambda part: self.library.download(self._rows(part, index))[None], self.q),
            kv_cache=each_part(lambda part: self.library.take_pages(part, pages), self.kv_cache),
            block_table=np.arange(len(pages), dtype=np.int32)[None],
            cache_seqlens=np.array([kv_length], dtype=np.int32),
            kv_lengths=self.kv_lengths[index : index + 1],
            q_lengths=self.q_lengths[index : index + 1],
            head_dim_v=self.head_dim_v,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
        )

    def request_result(self, index: int, out: Any, lse: Any) -> tuple[Array, Array]:
        """One request's part of a result of ``mla_decode``: out [s_q, h_q, d_v] and lse [h_q, s_q], on the host."""
        lse_of_request = lse[index] if self.cu_seqlens_q is None else lse[:, self._span(index)]
        return self.library.download(self._rows(out, index)), self.library.download(lse_of_request)

    def _options(self, function: str) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in OPTIONS if name in option_names(function)}
        return {"cu_seqlens_q": self.cu_seqlens_q, **options}

    def _rows(self, array: Any, index: int) -> Any:
        return array[index] if self.cu_seqlens_q is None else array[self._span(index)]

    def _span(self, index: int) -> slice:
        begin = int(self.q_lengths[:index].sum())
        return slice(begin, begin + int(self.q_lengths[index]))


OPTIONS = tuple(name for name in option_names(DECODE) if name in Case.__dataclass_fields__)


def parts_of(array: Any) -> tuple[Any, ...]:
    """The arrays of a pair (latent, rope), or the one that is no pair."""
    return array if isinstance(array, tuple) else (array,)


def each_part(function: Callable[[Any], Any], array: Any) -> Any:
    """The same of each array of a pair, as a pair; or of the one that is no pair."""
    return tuple(map(function, array)) if isinstance(array, tuple) else function(array)
