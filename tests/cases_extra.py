"""Random sparse cases with a second cache, and the float64 formula for both together. NumPy only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from cases_sparse import SparseArrays, SparseCase, exact_sparse
from cases_sparse_fp8 import Fp8SparseArrays, Fp8SparseCase, as_e4m3

OF_EXTRA = {"kv_cache": "extra_kv_cache", "indices": "extra_indices", "topk_length": "extra_topk_length"}


def as_it_is(array: Any) -> Any:
    return array


@dataclass(frozen=True)
class ExtraCase:
    """A case, and one whose cache, indices and lengths are those of the second list; both 16-bit, or both FP8."""

    main: SparseCase
    extra: SparseCase

    @classmethod
    def of(cls, main: SparseCase, **changes: Any) -> ExtraCase:
        """The second list is as the first one, but for these changes and its random numbers."""
        return cls(main, replace(main, **{"seed": main.seed + 100, "sinks": False, **changes}))

    def build(self) -> ExtraArrays:
        if isinstance(self.main, Fp8SparseCase):
            assert isinstance(self.extra, Fp8SparseCase)
            return ExtraArrays(self.main.build_fp8(), self.extra.build_fp8())
        return ExtraArrays(self.main.build(), self.extra.build())


@dataclass(frozen=True)
class ExtraArrays:
    """Arrays of both lists; queries and sinks are those of the first."""

    main: SparseArrays | Fp8SparseArrays
    extra: SparseArrays | Fp8SparseArrays

    def exact(self, scale: float | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `exact_sparse`: the results of each list alone, merged, and then the sinks."""
        first, second = (part.exact if isinstance(part, Fp8SparseArrays) else part for part in (self.main, self.extra))
        second = replace(second, q=first.q, sinks=None)
        of_lists = [exact_sparse(arrays, scale) for arrays in (replace(first, sinks=None), second)]
        largest = np.maximum(of_lists[0][1], of_lists[1][1])
        lses = np.stack([lse for _, _, lse in of_lists])
        top = lses.max(axis=0)
        weights = np.exp(lses - np.where(np.isneginf(top), 0, top))
        total = weights.sum(axis=0)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            lse = np.where(np.isneginf(top), 0, top) + np.log(total)
            sinks = -np.inf if first.sinks is None else first.sinks.astype(np.float64)
            total = total + np.exp(sinks - np.where(np.isneginf(top), 0, top))
            summed = sum(weight[..., None] * out for weight, (out, _, _) in zip(weights, of_lists, strict=True))
            out = np.where(np.isneginf(lse)[..., None], 0, summed / total[..., None])
        return out, largest, lse

    def arguments(
        self, convert: Callable[[Any], Any] = as_it_is, convert_cache: Callable[[Any], Any] = as_e4m3
    ) -> dict[str, Any]:
        """As `mla_sparse_decode` takes them; on the CPU also of widths that no kernel has."""
        main, extra = (self._of(part, convert, convert_cache) for part in (self.main, self.extra))
        others = {ours: extra[name] for name, ours in OF_EXTRA.items()}
        if "layout" in extra:
            others["extra_layout"] = extra["layout"]
        return {**main, **others}

    @staticmethod
    def _of(
        part: SparseArrays | Fp8SparseArrays, convert: Callable[[Any], Any], convert_cache: Callable[[Any], Any]
    ) -> dict[str, Any]:
        if isinstance(part, Fp8SparseArrays):
            return part.arguments(convert, convert_cache)
        optional = {"topk_length": part.lengths, "attn_sink": part.sinks}
        indices = part.indices if part.case.num_heads_kv > 1 else part.indices[:, :, 0]
        return {
            "q": convert(part.q),
            "kv_cache": convert(part.kv),
            "indices": convert(indices),
            **{name: None if array is None else convert(array) for name, array in optional.items()},
            "head_dim_v": part.case.latent_dim,
        }


def of_plan(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of a decode that a plan takes."""
    return {name: value for name, value in arguments.items() if name not in ("attn_sink", "softmax_scale")}
