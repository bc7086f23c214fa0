"""Decodes over an FP8 cache, with what float64 makes of them. Bytes that no request owns are NaN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cupy_mla.layouts import FP8_DS_MLA

LATENT, ROPE = 512, 64
NAN_CODE = 0xFF  # in every number of every layout
LARGEST_E4M3 = 448
OUTLIER_COLUMNS = slice(7, None, 200)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
# How queries and keys are drawn beside normal values: errors of FP8 tensor cores depend on it.
KINDS = ("normal", "mean", "outliers in k", "outliers in q", "outliers in both", "peaked", "q and k with a mean")


@dataclass(frozen=True)
class Fp8Case:
    """One decode: ``lengths`` tokens of each request, ``heads`` query heads over one KV head."""

    lengths: tuple[int, ...]
    heads: int
    seqlen_q: int = 1
    page_size: int = 64
    causal: bool = False
    kind: str = "normal"
    kv_scale: float | tuple[float, float] | None = 0.5  # or of the latent and of the rope part
    seed: int = 0

    @property
    def has_rows(self) -> bool:
        """Whether tokens are 656 bytes with their scales: where there is no scale for the cache."""
        return self.kv_scale is None

    @property
    def column_scales(self) -> np.ndarray:
        """What the stored value of each column is multiplied by."""
        return np.repeat(np.broadcast_to(np.float32(self.kv_scale), 2), (LATENT, ROPE))

    def build(self) -> dict[str, Any]:
        """Arguments of `mla_decode` as NumPy arrays, without the scale."""
        rng = np.random.default_rng(self.seed)
        pages = [-(-length // self.page_size) for length in self.lengths]
        num_pages = sum(pages) + 2
        order = rng.permutation(num_pages)
        table = np.full((len(self.lengths), max(*pages, 1) + 1), 2**31 - 1, np.int32)
        width = FP8_DS_MLA.width(LATENT, ROPE) if self.has_rows else LATENT + ROPE
        cache = np.full((num_pages, self.page_size, 1, width), NAN_CODE, np.uint8)
        used = 0
        for request, (length, count) in enumerate(zip(self.lengths, pages, strict=True)):
            table[request, :count] = order[used : used + count]
            used += count
            values = rng.standard_normal((length, LATENT + ROPE), np.float32)
            if "mean" in self.kind:
                values += 2 if "q" in self.kind else 1
            if self.kind in ("outliers in k", "outliers in both"):
                values[:, OUTLIER_COLUMNS] *= 20
            if not length:
                continue
            if self.kv_scale is None:
                codes = FP8_DS_MLA.quantise(values[:, None, None])[:, 0, 0]
            else:
                codes = (values / self.column_scales).astype(E4M3).view(np.uint8)
            for page in range(count):
                part = codes[page * self.page_size : (page + 1) * self.page_size]
                cache[table[request, page], : len(part), 0] = part
        q = rng.standard_normal((len(self.lengths), self.seqlen_q, self.heads, LATENT + ROPE), np.float32)
        if self.kind in ("outliers in q", "outliers in both"):
            q[..., OUTLIER_COLUMNS] *= 20
        if self.kind == "q and k with a mean":
            q += 1
        if self.kind == "peaked":
            q *= 4
        return {
            "q": q.astype(BF16),
            "kv_cache": cache if self.has_rows else cache.view(E4M3),
            "block_table": table,
            "cache_seqlens": np.array(self.lengths, np.int32),
        }

    def exact(self, arrays: dict[str, Any], compute: str = "exact") -> tuple[np.ndarray, np.ndarray]:
        """out [batch, seqlen_q, heads, d_v] and lse [batch, heads, seqlen_q] in float64; "fp8": of rounded queries."""
        q = arrays["q"].astype(np.float64)
        if compute == "fp8":
            factors = self.column_scales / self.column_scales[0]
            q = rounded_to_e4m3(q * factors) / factors
        q = q * (LATENT + ROPE) ** -0.5
        out = np.zeros((*q.shape[:-1], LATENT))
        lse = np.full((len(self.lengths), self.heads, self.seqlen_q), -np.inf)
        for request, length in enumerate(self.lengths):
            tokens = np.arange(length)
            pages = arrays["block_table"][request, tokens // self.page_size]
            keys = arrays["kv_cache"][pages, tokens % self.page_size, 0]
            if self.kv_scale is None:
                keys = FP8_DS_MLA.dequantise(keys[:, None, None])[:, 0, 0].astype(np.float64)
            else:
                keys = keys.astype(np.float64) * self.column_scales
            for token in range(self.seqlen_q):
                seen = max(length - self.seqlen_q + token + 1, 0) if self.causal else length
                if not seen:
                    continue
                scores = q[request, token] @ keys[:seen].T
                highest = scores.max(axis=1, keepdims=True)
                weights = np.exp(scores - highest)
                total = weights.sum(axis=1, keepdims=True)
                out[request, token] = weights @ keys[:seen, :LATENT] / total
                lse[request, :, token] = (highest + np.log(total))[:, 0]
        return out, lse


def rounded_to_e4m3(q: np.ndarray) -> np.ndarray:
    """What e4m3 holds of each row over the smallest power of two by which no value passes 448."""
    power = 2.0 ** np.ceil(np.log2(np.abs(q).max(axis=-1, keepdims=True) / LARGEST_E4M3))
    return (q / power).astype(E4M3).astype(q.dtype) * power


def relative_error(out: np.ndarray, exact: np.ndarray) -> float:
    """Of the worst request, by the Frobenius norm; NaN where there is any."""
    errors = [0.0]
    for ours, theirs in zip(out.astype(np.float64), exact, strict=True):
        size = np.linalg.norm(theirs)
        errors.append(float(np.linalg.norm(ours - theirs) / size) if size else float(np.abs(ours).max()))
    return float(np.max(errors))
