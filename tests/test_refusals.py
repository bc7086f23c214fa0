"""Every argument of every public function, each way it can be wrong: the error names it, says what was expected and
what came; nothing is written, nothing launched. A function or an argument without a row here fails a test."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fake_gpu import FakeArray, fake_gpu

import cupy_mla
from cupy_mla import InvalidArgumentError, PagedKVCache, PlanMismatchError, flash_mla

BF16 = np.dtype(ml_dtypes.bfloat16)
CANARY = 7
Make = Callable[..., Any]
Changes = dict[str, Any]


def zeros(shape: tuple[int, ...], dtype: str = "bfloat16") -> np.ndarray:
    return np.zeros(shape, BF16 if dtype == "bfloat16" else dtype)


def canary(shape: tuple[int, ...], dtype: str = "bfloat16") -> np.ndarray:
    return np.full(shape, CANARY, BF16 if dtype == "bfloat16" else dtype)


@dataclass
class Target:
    """A public function, a call of it that is good, and how each argument can be wrong.

    Attributes
    ----------
    function
        The function.
    good
        Arguments of a good call, given what makes an array of a shape and a type.
    wrong
        Rows (argument, what is said of what was expected, changes), given what makes an array.
    written
        Names of arguments that the call writes to.
    """

    function: Callable[..., Any]
    good: Callable[[Make], Changes]
    wrong: Callable[[Make], list[tuple[str, str, Changes]]]
    written: tuple[str, ...] = ()
    on_gpu: bool = False
    unchecked: tuple[str, ...] = field(default=())  # arguments that cannot be wrong


def no_array(name: str) -> list[tuple[str, str, Changes]]:
    """Whatever is no array."""
    return [(name, "an array", {name: value}) for value in (3, "text", object(), [1, 2])]


def required(name: str) -> list[tuple[str, str, Changes]]:
    return [*no_array(name), (name, "an array", {name: None})]


def required_pair(name: str) -> list[tuple[str, str, Changes]]:
    """Of an array that may be a pair."""
    parts = [(f"{name}[0]", "an array", {name: [1, 2]}), (name, "a pair", {name: [1, 2, 3]})]
    return [*(row for row in required(name) if row[2][name] != [1, 2]), *parts]


def no_number(name: str) -> list[tuple[str, str, Changes]]:
    return [(name, "a number", {name: value}) for value in ("1", np.ones(1), [1.0])]


def no_integer(name: str) -> list[tuple[str, str, Changes]]:
    return [(name, "an integer", {name: value}) for value in ("1", 1.5, True)]


def no_flag(name: str) -> list[tuple[str, str, Changes]]:
    return [(name, "True or False", {name: value}) for value in ("yes", 2, 0.5)]


def shaped(name: str, dtype: str, make: Make, *shapes: tuple[int, ...]) -> list[tuple[str, str, Changes]]:
    return [(name, "", {name: make(shape, dtype)}) for shape in shapes]


def typed(name: str, shape: tuple[int, ...], make: Make, *dtypes: str) -> list[tuple[str, str, Changes]]:
    return [(name, "", {name: make(shape, dtype)}) for dtype in dtypes]


STREAM = [("stream", "an integer", {"stream": value}) for value in ("0", 1.5, object())]
SCALE = [
    *no_number("softmax_scale"),
    *(("softmax_scale", "above 0", {"softmax_scale": value}) for value in (0.0, -1.0, math.nan, math.inf, 10**400)),
]
EMPTY_LSE = [("empty_lse", "-inf or", {"empty_lse": value}) for value in (0.0, math.nan, None, "inf")]


def no_kernel(other: str) -> list[tuple[str, str, Changes]]:
    """``other``: one that serves other calls."""
    rows = ("one of", "narrow17"), ("a string", 16), ("one that serves this call", other)
    return [("kernel", expected, {"kernel": value}) for expected, value in rows]


SPLIT = [
    *no_integer("fixed_split_tokens"),
    *(("fixed_split_tokens", "multiple of", {"fixed_split_tokens": value}) for value in (0, -64, 65)),
]
WIDTH = [
    *no_integer("head_dim_v"),
    *(("head_dim_v", "1 to 576", {"head_dim_v": value}) for value in (0, -1, 577)),
    ("head_dim_v", "a multiple of 64", {"head_dim_v": 500}),
]
STRICT = [*no_flag("strict"), ("strict", "True or False", {"strict": None})]
VALIDATE = no_flag("validate")


def outputs(make: Make, **shapes: tuple[tuple[int, ...], str]) -> list[tuple[str, str, Changes]]:
    rows = []
    for name, (shape, dtype) in shapes.items():
        other = "float32" if dtype != "float32" else "float16"
        rows += no_array(name)
        rows += shaped(name, dtype, make, shape[1:], (*shape[:-1], shape[-1] + 1))
        rows += typed(name, shape, make, other)
    return rows


LAYOUT = [("layout", "", {"layout": value}) for value in ("fp5", 5)]
NO_SCALE = [("kv_scale", "", {"kv_scale": value}) for value in (1.0, "1")]


# Dense decode: 2 requests of 1 query token, 16 heads, 3 pages of 64 tokens ------------------------------------------


def dense(make: Make) -> Changes:
    return {
        "q": make((2, 1, 16, 576)),
        "kv_cache": make((3, 64, 1, 576)),
        "block_table": make((2, 2), "int32"),
        "cache_seqlens": make((2,), "int32"),
    }


def dense_rows(make: Make) -> list[tuple[str, str, Changes]]:
    pair = {"q": (make((2, 1, 16, 512)), make((2, 1, 16, 64)))}
    return [
        *required_pair("q"),
        *shaped("q", "bfloat16", make, (2, 16, 576), (2, 1, 0, 576), (2, 1, 16, 0)),
        *typed("q", (2, 1, 16, 576), make, "float32", "int32", "float64"),
        ("q", "a pair", {"q": (make((2, 1, 16, 512)),)}),
        ("q[1]", "shape", {"q": (make((2, 1, 16, 512)), make((2, 1, 8, 64)))}),
        ("head_dim_v", "448", {"q": (make((2, 1, 16, 448)), make((2, 1, 16, 128)))}),
        ("q", "rope width", {"q": make((2, 1, 16, 544)), "kv_cache": make((3, 64, 1, 544))}),
        *required_pair("kv_cache"),
        *shaped("kv_cache", "bfloat16", make, (64, 1, 576), (0, 64, 1, 576), (3, 0, 1, 576), (3, 64, 1, 512)),
        *typed("kv_cache", (3, 64, 1, 576), make, "float16", "float32", "uint8"),
        ("kv_cache", "page size", {"kv_cache": make((3, 8, 1, 576))}),
        ("q", "heads that 3", {"kv_cache": make((3, 64, 3, 576))}),
        ("kv_cache[1]", "", {**pair, "kv_cache": (make((3, 64, 1, 512)), make((3, 64, 64)))}),
        *required("block_table"),
        *shaped("block_table", "int32", make, (2,), (3, 2), (2, 0)),
        *typed("block_table", (2, 2), make, "int64", "float32"),
        *required("cache_seqlens"),
        *shaped("cache_seqlens", "int32", make, (3,), (2, 1)),
        *typed("cache_seqlens", (2,), make, "int64", "uint8"),
        *no_array("cu_seqlens_q"),
        ("q", "3 dimensions", {"cu_seqlens_q": make((3,), "int32")}),
        ("cu_seqlens_q", "shape [3]", {"q": make((2, 16, 576)), "cu_seqlens_q": make((2,), "int32")}),
        ("cu_seqlens_q", "int32", {"q": make((2, 16, 576)), "cu_seqlens_q": make((3,), "int64")}),
        *no_integer("max_seqlen_q"),
        *(("max_seqlen_q", "", {"max_seqlen_q": value}) for value in (0, -1, 2)),
        ("kv_scale", "None", {"kv_scale": 1.0}),
        ("kv_scale", "an array", {"kv_scale": "1"}),
        ("compute", "a string", {"compute": 1}),
        *(("compute", "", {"compute": value}) for value in ("fast", "split")),
        *LAYOUT,
        *no_flag("causal"),
        *shard_rows(make),
        *WIDTH,
        *VALIDATE,
        *STRICT,
        *STREAM,
    ]


def shard_rows(make: Make) -> list[tuple[str, str, Changes]]:
    others = {"cp_world": 4, "cp_rank": 1, "cp_interleave": 16}
    ranges = {"cp_world": (1, (0, -1, 256)), "cp_rank": (0, (-1, 4)), "cp_interleave": (1, (0, -1, 2**16))}
    masked = {"q": make((2, 3, 16, 576)), "causal": True, **others}
    return [
        *((name, "an integer", {**others, name: value}) for name in others for value in ("1", 1.5)),
        *((name, f"{least} to", {**others, name: value}) for name, (least, wrong) in ranges.items() for value in wrong),
        ("cp_rank", "0 to 0", {"cp_rank": 1}),
        ("cp_interleave", "1 to 65535", {"cp_interleave": 0}),
        ("total_seqlens", "places in whole requests", masked),
        *no_array("total_seqlens"),
        *shaped("total_seqlens", "int32", make, (3,), (2, 1)),
        *typed("total_seqlens", (2,), make, "int64", "float32"),
    ]


def scale_rows(make: Make) -> list[tuple[str, str, Changes]]:
    e4m3 = {"kv_cache": make((3, 64, 1, 576), "float8_e4m3fn")}
    return [
        ("kv_scale", "a number", {**e4m3, "kv_scale": value})
        for value in (None, make((3,), "float32"), make((1,), "float16"))
    ] + [("kv_scale", "1e-37", {**e4m3, "kv_scale": value}) for value in (0.0, -1.0, math.nan, math.inf)]


def decode_rows(make: Make) -> list[tuple[str, str, Changes]]:
    other = cupy_mla.plan_decode(**{**dense(zeros), "kv_cache": zeros((3, 32, 1, 576))})
    larger = cupy_mla.plan_decode(zeros((3, 1, 16, 576)), zeros((3, 64, 1, 576)), *(
        zeros(shape, "int32") for shape in ((3, 2), (3,))
    ))  # fmt: skip
    return [
        *dense_rows(make),
        *scale_rows(make),
        *SCALE,
        *EMPTY_LSE,
        *(("plan", "a DecodePlan", {"plan": value}) for value in (1, "plan", make((8,), "uint8"))),
        ("plan", "page_size", {"plan": other}),
        ("plan", "batch", {"plan": larger}),
        *outputs(make, out=((2, 1, 16, 512), "bfloat16"), lse=((2, 16, 1), "float32")),
    ]


def plan_rows(make: Make) -> list[tuple[str, str, Changes]]:
    return [
        *dense_rows(make),
        *no_integer("max_seqlen_k"),
        ("max_seqlen_k", "non-negative", {"max_seqlen_k": -1}),
        *SPLIT,
        *no_kernel("token_pages16"),
    ]


# Sparse -------------------------------------------------------------------------------------------------------------


def sparse(make: Make) -> Changes:
    return {"q": make((2, 1, 16, 576)), "kv_cache": make((3, 64, 1, 576)), "indices": make((2, 1, 5), "int32")}


def sparse_rows(make: Make) -> list[tuple[str, str, Changes]]:
    return [
        *required("q"),
        *shaped("q", "bfloat16", make, (2, 16, 576), (2, 1, 0, 576), (2, 1, 16, 0)),
        *typed("q", (2, 1, 16, 576), make, "float32", "int32"),
        *required("kv_cache"),
        *shaped("kv_cache", "bfloat16", make, (64, 1, 576), (0, 64, 1, 576), (3, 64, 1, 512)),
        *typed("kv_cache", (3, 64, 1, 576), make, "float16", "float32"),
        ("q", "heads that 3", {"kv_cache": make((3, 64, 3, 576))}),
        *required("indices"),
        *shaped("indices", "int32", make, (2, 5), (3, 1, 5), (2, 1, 2, 5)),
        *typed("indices", (2, 1, 5), make, "int64", "float32"),
        *no_array("topk_length"),
        *shaped("topk_length", "int32", make, (3,), (2, 2)),
        *typed("topk_length", (2,), make, "int64"),
        *no_integer("cp_world"),
        *(("cp_world", "1 to 255", {"cp_world": value}) for value in (0, 256)),
        *LAYOUT,
        *NO_SCALE,
        *WIDTH,
        *VALIDATE,
        *STRICT,
        *STREAM,
    ]


def extra(make: Make) -> Changes:
    return {"extra_kv_cache": make((4, 2, 1, 576)), "extra_indices": make((2, 1, 7), "int32")}


def extra_rows(make: Make) -> list[tuple[str, str, Changes]]:
    """Of a call with a second cache, and of one without to which a part of it is given."""
    rows = [
        *no_array("extra_kv_cache"),
        *shaped("extra_kv_cache", "bfloat16", make, (2, 1, 576), (0, 2, 1, 576), (4, 2, 1, 512), (4, 2, 2, 576)),
        *typed("extra_kv_cache", (4, 2, 1, 576), make, "float16", "float32"),
        *required("extra_indices"),
        *shaped("extra_indices", "int32", make, (2, 7), (3, 1, 7), (2, 1, 2, 7)),
        *typed("extra_indices", (2, 1, 7), make, "int64", "float32"),
        *no_array("extra_topk_length"),
        *shaped("extra_topk_length", "int32", make, (3,), (2, 2)),
        *typed("extra_topk_length", (2,), make, "int64"),
        *(("extra_layout", "", {"extra_layout": value}) for value in ("fp5", 5)),
    ]
    alone = [
        ("extra_indices", "without", {"extra_indices": make((2, 1, 7), "int32")}),
        ("extra_topk_length", "without", {"extra_topk_length": make((2,), "int32")}),
        ("extra_layout", "without", {"extra_layout": "bf16"}),
    ]
    return [*((name, expected, {**extra(make), **changes}) for name, expected, changes in rows), *alone]


def sink_rows(make: Make) -> list[tuple[str, str, Changes]]:
    return [
        *no_array("attn_sink"),
        *shaped("attn_sink", "float32", make, (15,), (1, 16)),
        *typed("attn_sink", (16,), make, "float16"),
    ]


def sparse_decode_rows(make: Make) -> list[tuple[str, str, Changes]]:
    other = cupy_mla.plan_sparse_decode(**{**sparse(zeros), "indices": zeros((2, 1, 6), "int32")})
    return [
        *sparse_rows(make),
        *extra_rows(make),
        *sink_rows(make),
        *SCALE,
        *EMPTY_LSE,
        *(("plan", "a SparsePlan", {"plan": value}) for value in (1, "plan", cupy_mla.plan_decode(**dense(zeros)))),
        ("plan", "topk", {"plan": other}),
        *outputs(make, out=((2, 1, 16, 512), "bfloat16"), lse=((2, 16, 1), "float32")),
    ]


def prefill(make: Make) -> Changes:
    return {"q": make((2, 16, 576)), "kv": make((30, 1, 576)), "indices": make((2, 1, 5), "int32")}


def prefill_rows(make: Make) -> list[tuple[str, str, Changes]]:
    return [
        *required("q"),
        *shaped("q", "bfloat16", make, (2, 1, 16, 576), (2, 0, 576), (2, 16, 0)),
        *typed("q", (2, 16, 576), make, "float32"),
        *required("kv"),
        *shaped("kv", "bfloat16", make, (30, 576), (0, 1, 576), (30, 1, 512)),
        *typed("kv", (30, 1, 576), make, "float16"),
        *required("indices"),
        *shaped("indices", "int32", make, (2,), (3, 1, 5), (2, 2, 5)),
        *typed("indices", (2, 1, 5), make, "int64"),
        *no_array("topk_length"),
        *shaped("topk_length", "int32", make, (3,), (2, 1)),
        *typed("topk_length", (2,), make, "int64"),
        *sink_rows(make),
        *SCALE,
        *EMPTY_LSE,
        *LAYOUT,
        *NO_SCALE,
        *WIDTH,
        *VALIDATE,
        *STRICT,
        *STREAM,
        *outputs(
            make, out=((2, 16, 512), "bfloat16"), max_logits=((2, 16), "float32"), lse=((2, 16), "float32")
        ),
    ]  # fmt: skip


# Around -------------------------------------------------------------------------------------------------------------


def states(make: Make) -> Changes:
    return {"outs": make((2, 2, 1, 16, 512)), "lses": make((2, 2, 16, 1), "float32")}


def states_rows(make: Make) -> list[tuple[str, str, Changes]]:
    return [
        *(("outs", "an array", {"outs": value}) for value in (3, "text", None)),
        *shaped("outs", "bfloat16", make, (16, 512), (2, 1, 2, 1, 16, 512), (0, 2, 1, 16, 512)),
        *typed("outs", (2, 2, 1, 16, 512), make, "int32", "float64"),
        ("outs", "at least one", {"outs": []}),
        ("outs[1]", "as outs[0]", {"outs": [make((2, 1, 16, 512)), make((2, 1, 8, 512))]}),
        *(("lses", "an array", {"lses": value}) for value in (3, "text", None)),
        *shaped("lses", "float32", make, (2, 2, 1, 16), (3, 2, 16, 1)),
        *typed("lses", (2, 2, 16, 1), make, "float16", "float64"),
        ("lses", "at least one", {"lses": ()}),
        *STREAM,
    ]


def append(make: Make) -> Changes:
    return {"kv_cache": make((3, 16, 1, 576)), "kv_new": make((2, 1, 576)), "slot_mapping": make((2,), "int64")}


def append_rows(make: Make) -> list[tuple[str, str, Changes]]:
    by_table = {"slot_mapping": None, "block_table": make((2, 2), "int32"), "positions": make((2,), "int32")}
    frozen = make((3, 16, 1, 576))
    frozen.flags.writeable = False
    return [
        *required_pair("kv_cache"),
        *shaped("kv_cache", "bfloat16", make, (16, 1, 576), (3, 0, 1, 576)),
        ("kv_cache", "written", {"kv_cache": frozen}),
        ("kv_cache", "a pair", {"kv_cache": (make((3, 16, 1, 512)),)}),
        *required("kv_new"),
        *shaped("kv_new", "bfloat16", make, (2,), (2, 1, 512), (2, 2, 576)),
        *typed("kv_new", (2, 1, 576), make, "float16"),
        *no_array("slot_mapping"),
        *shaped("slot_mapping", "int64", make, (3,), (2, 1)),
        *typed("slot_mapping", (2,), make, "int32"),
        ("block_table", "None beside", {"block_table": make((2, 2), "int32")}),
        ("block_table", "an array", {"slot_mapping": None}),
        *((name, more, {**by_table, **changes}) for name, more, changes in no_array("block_table")),
        ("block_table", "int32", {**by_table, "block_table": make((2, 2), "int64")}),
        ("positions", "an array", {**by_table, "positions": None}),
        ("positions", "int32", {**by_table, "positions": make((3,), "int32")}),
        ("positions", "a multiple", {**by_table, "block_table": make((3, 2), "int32")}),
        ("requests", "int32", {**by_table, "requests": make((1,), "int32")}),
        ("requests", "int32", {**by_table, "requests": make((2,), "int64")}),
        *LAYOUT,
        *NO_SCALE,
        *STREAM,
    ]


def slots(make: Make) -> Changes:
    return {"token_indices": make((2, 5), "int32"), "block_table": make((2, 3), "int32"), "page_size": 16}


def slots_rows(make: Make) -> list[tuple[str, str, Changes]]:
    return [
        *required("token_indices"),
        *shaped("token_indices", "int32", make, ()),
        ("block_table", "3 rows", {"token_indices": make((3, 5), "int32")}),
        *typed("token_indices", (2, 5), make, "int64"),
        *required("block_table"),
        *shaped("block_table", "int32", make, (2,), (2, 0)),
        *typed("block_table", (2, 3), make, "int64"),
        *no_integer("page_size"),
        *(("page_size", "1 or more", {"page_size": value}) for value in (0, -1)),
        *no_array("requests"),
        *shaped("requests", "int32", make, (3,)),
        *typed("requests", (2,), make, "int64"),
        *outputs(make, out=((2, 5), "int32")),
        *STREAM,
    ]


# Whole pages: 3 of 16 tokens ----------------------------------------------------------------------------------------


def page_copies(make: Make) -> Changes:
    pages = {"source_pages": make((2,), "int32"), "target_pages": make((2,), "int32")}
    return {"kv_cache": make((3, 16, 1, 576)), "source": make((3, 16, 1, 576)), **pages, "validate": False}


def page_copies_rows(make: Make) -> list[tuple[str, str, Changes]]:
    return [
        *required_pair("kv_cache"),
        *shaped("kv_cache", "bfloat16", make, (16, 1, 576)),
        *no_array("source")[:3],
        *shaped("source", "bfloat16", make, (16, 1, 576), (3, 8, 1, 576), (3, 16, 1, 512)),
        *typed("source", (3, 16, 1, 576), make, "float16", "uint8"),
        *(row for name in ("source_pages", "target_pages") for row in (
            *no_array(name), *shaped(name, "int32", make, (2, 1)), *typed(name, (2,), make, "int64"),
        )),
        *shaped("target_pages", "int32", make, (3,)),
        *VALIDATE,
        *STREAM,
    ]  # fmt: skip


def conversion(make: Make) -> Changes:
    return {"kv_cache": make((3, 16, 1, 656), "uint8"), "values": make((3, 16, 1, 576))}


def conversion_rows(make: Make) -> list[tuple[str, str, Changes]]:
    e4m3 = {"kv_cache": make((3, 16, 1, 576), "float8_e4m3fn")}
    return [
        *required_pair("kv_cache"),
        *shaped("kv_cache", "uint8", make, (16, 1, 656), (3, 16, 1, 500)),
        ("kv_cache", "an FP8 or FP4 layout", {"kv_cache": make((3, 16, 1, 576))}),
        *required_pair("values"),
        *shaped("values", "bfloat16", make, (16, 1, 576), (2, 16, 1, 576), (3, 8, 1, 576), (3, 16, 1, 512)),
        *typed("values", (3, 16, 1, 576), make, "float32", "uint8"),
        *no_array("pages"),
        *shaped("pages", "int32", make, (2,), (3, 1)),
        *typed("pages", (3,), make, "int64"),
        *NO_SCALE,
        ("kv_scale", "a number", {**e4m3, "kv_scale": make((2,), "float32")}),
        *LAYOUT,
        *VALIDATE,
        *STREAM,
    ]


# FlashMLA's names ---------------------------------------------------------------------------------------------------


def flash(make: Make) -> Changes:
    given = dense(make)
    return {
        "q": given["q"], "k_cache": given["kv_cache"], "block_table": given["block_table"],
        "cache_seqlens": given["cache_seqlens"], "head_dim_v": 512,
        "tile_scheduler_metadata": flash_mla.get_mla_metadata()[0],
    }  # fmt: skip


def flash_rows(make: Make) -> list[tuple[str, str, Changes]]:
    indices = make((2, 1, 5), "int32")
    return [
        *required_pair("q"),
        *required_pair("k_cache"),
        *shaped("k_cache", "bfloat16", make, (64, 1, 576), (3, 64, 1, 512)),
        *required("block_table"),
        *shaped("block_table", "int32", make, (2,), (3, 2)),
        *required("cache_seqlens"),
        *typed("cache_seqlens", (2,), make, "int64"),
        *WIDTH,
        ("tile_scheduler_metadata", "a FlashMLASchedMeta", {"tile_scheduler_metadata": None}),
        ("num_splits", "None, as", {"num_splits": make((3,), "int32")}),
        *SCALE,
        *no_flag("causal"),
        ("causal", "False in sparse", {"causal": True, "indices": indices}),
        *shard_rows(make),
        ("indices", "int32", {"indices": make((2, 1, 5), "int64")}),
        ("topk_length", "int32", {"indices": indices, "topk_length": make((2,), "int64")}),
        ("attn_sink", "float32", {"indices": indices, "attn_sink": make((3,), "float32")}),
        *outputs(make, out=((2, 1, 16, 512), "bfloat16")),
        *no_flag("enable_batch_invariant"),
        ("is_fp8_kvcache", "False: k_cache is not", {"is_fp8_kvcache": True}),
        ("kv_format", "None: the cache itself", {"kv_format": "v41"}),
        ("descale_q", "None but in dense attention", {"descale_q": 1.0}),
        ("descale_k", "None but in dense attention", {"descale_k": make((1,), "float32")}),
    ]


def flash_prefill(make: Make) -> Changes:
    return {**prefill(make), "sm_scale": 0.1}


def flash_prefill_rows(make: Make) -> list[tuple[str, str, Changes]]:
    renamed = [("sm_scale", more, {"sm_scale": changes["softmax_scale"]}) for _, more, changes in SCALE]
    widths = [("d_v", more, {"d_v": changes["head_dim_v"]}) for _, more, changes in WIDTH]
    return [
        *required("q"),
        *required("kv"),
        *required("indices"),
        *renamed,
        *widths,
        *sink_rows(make),
        *no_array("topk_length"),
        *outputs(make, out=((2, 16, 512), "bfloat16")),
    ]


# Plans and pages ----------------------------------------------------------------------------------------------------


def update_rows(make: Make) -> list[tuple[str, str, Changes]]:
    return [
        *required("cache_seqlens"),
        *shaped("cache_seqlens", "int32", make, (3,), (2, 1)),
        *typed("cache_seqlens", (2,), make, "int64"),
        ("cu_seqlens_q", "None, as the plan is not ragged", {"cu_seqlens_q": make((3,), "int32")}),
        *STREAM,
    ]


def sparse_update_rows(make: Make) -> list[tuple[str, str, Changes]]:
    return [
        *no_array("topk_length"),
        ("topk_length", "an array", {"topk_length": None}),
        *shaped("topk_length", "int32", make, (3,), (2, 2)),
        *typed("topk_length", (2,), make, "int64"),
        ("extra_topk_length", "None, as the plan", {"extra_topk_length": make((2,), "int32")}),
        *STREAM,
    ]


def make_cache() -> PagedKVCache:
    cache = PagedKVCache(num_pages=4, page_size=16, max_pages_per_seq=2)
    cache.append([cache.allocate()], zeros((5, 576)))
    return cache


def sizes(*names: str, least: int = 1) -> list[tuple[str, str, Changes]]:
    return [row for name in names for row in (*no_integer(name), (name, "at least", {name: least - 1}))]


PAGES_ROWS = [
    *sizes("num_pages", "page_size", "latent_dim", "max_requests", "max_pages_per_seq", "num_layers"),
    *sizes("rope_dim", least=0),
    *(row for name in ("cp_world", "cp_rank", "cp_interleave") for row in no_integer(name)),
    *(("cp_world", "1 to 255", {"cp_world": value}) for value in (0, 256)),
    *(("cp_rank", "0 to 1", {"cp_world": 2, "cp_rank": value}) for value in (-1, 2)),
    *(("cp_interleave", "1 to 65535", {"cp_interleave": value}) for value in (0, 2**16)),
    *(("dtype", "one of", {"dtype": value}) for value in ("float32", 16)),
    *(("device", "cpu, cuda", {"device": value}) for value in ("gpu", 0, None)),
    ("layout", "None beside", {"dtype": "float16", "layout": "fp16"}),
    ("layout", "", {"layout": "fp5"}),
    ("layout", "", {"layout": 5}),
    *(("framework", "one of", {"framework": value}) for value in ("tensorflow", 3)),
    ("framework", "arrays on cpu", {"framework": "cupy"}),
    ("kv_scale", "None", {"kv_scale": 1.0}),
    *(("kv_scale", "", {"layout": "fp8_e4m3", "kv_scale": value}) for value in (None, [1.0, 2.0])),
]
COUNTS_ROWS = [
    *(("counts", "a list", {"counts": value}) for value in (1, "1")),
    *(("counts", "", {"counts": value}) for value in ([1, 0], [-1], [1.0])),
]
REQUESTS_ROWS = [
    ("requests", "a list", {"requests": 0}),
    ("requests", "a list", {"requests": "0"}),
    ("requests", "a request that exists", {"requests": [9]}),
]
TARGETS: dict[str, Target] = {
    "mla_decode": Target(cupy_mla.mla_decode, dense, decode_rows, ("out", "lse"), on_gpu=True),
    "plan_decode": Target(cupy_mla.plan_decode, dense, plan_rows, on_gpu=True),
    "mla_sparse_decode": Target(
        cupy_mla.mla_sparse_decode, sparse, sparse_decode_rows, ("out", "lse"), on_gpu=True
    ),
    "plan_sparse_decode": Target(
        cupy_mla.plan_sparse_decode,
        sparse,
        lambda make: [*sparse_rows(make), *extra_rows(make), *SPLIT, *no_kernel("gathered_fp8_narrow16")],
        on_gpu=True,
    ),
    "mla_sparse_prefill": Target(
        cupy_mla.mla_sparse_prefill, prefill, prefill_rows, ("out", "max_logits", "lse"), on_gpu=True
    ),
    "merge_states": Target(cupy_mla.merge_states, states, states_rows),
    "append_tokens": Target(cupy_mla.append_tokens, append, append_rows, ("kv_cache",)),
    "slots_of": Target(cupy_mla.slots_of, slots, slots_rows, ("out",)),
    "copy_pages": Target(cupy_mla.copy_pages, page_copies, page_copies_rows, ("kv_cache",)),
    "quantise_cache": Target(cupy_mla.quantise_cache, conversion, conversion_rows, ("kv_cache",)),
    "dequantise_cache": Target(cupy_mla.dequantise_cache, conversion, conversion_rows, ("values",)),
    "flash_mla.flash_mla_with_kvcache": Target(
        flash_mla.flash_mla_with_kvcache, flash, flash_rows, ("out",),
        unchecked=("extra_k_cache", "extra_indices_in_kvcache", "extra_topk_length", "use_legacy"),
    ),
    "flash_mla.flash_mla_sparse_fwd": Target(
        flash_mla.flash_mla_sparse_fwd, flash_prefill, flash_prefill_rows, ("out",), unchecked=("return_log2_lse",)
    ),
    "DecodePlan.update": Target(
        cupy_mla.plan_decode(**dense(zeros)).update, lambda make: {"cache_seqlens": make((2,), "int32")}, update_rows
    ),
    "SparsePlan.update": Target(
        cupy_mla.plan_sparse_decode(**sparse(zeros), topk_length=zeros((2,), "int32")).update,
        lambda make: {"topk_length": make((2,), "int32")}, sparse_update_rows,
    ),
    "PagedKVCache": Target(PagedKVCache, lambda make: {"num_pages": 2}, lambda make: PAGES_ROWS),
    "PagedKVCache.length": Target(
        make_cache().length, lambda make: {"request": 0},
        lambda make: [("request", "a request that exists", {"request": value}) for value in (9, "0", None, [0])],
    ),
    "PagedKVCache.free": Target(
        make_cache().free, lambda make: {"request": 0},
        lambda make: [("request", "a request that exists", {"request": value}) for value in (9, "0", None, [0])],
    ),
    "PagedKVCache.fork": Target(
        make_cache().fork, lambda make: {"request": 0},
        lambda make: [
            ("request", "a request that exists", {"request": 9}), *no_integer("num_tokens"),
            *(("num_tokens", "0 to 5", {"num_tokens": value}) for value in (-1, 6)),
        ],
    ),
    "PagedKVCache.truncate": Target(
        make_cache().truncate, lambda make: {"request": 0, "num_tokens": 5},
        lambda make: [
            ("request", "a request that exists", {"request": 9}), *no_integer("num_tokens"),
            *(("num_tokens", "0 to 5", {"num_tokens": value}) for value in (-1, 6)),
        ],
    ),
    "PagedKVCache.append": Target(
        make_cache().append, lambda make: {"requests": [0], "kv_new": make((1, 576))},
        lambda make: [
            *REQUESTS_ROWS,
            ("requests", "at most once", {"requests": [0, 0], "kv_new": make((2, 576))}),
            *required("kv_new"), *shaped("kv_new", "bfloat16", make, (576,), (1, 512), (33, 576)),
            *typed("kv_new", (1, 576), make, "float16"),
            ("kv_new[0]", "latent", {"kv_new": (make((1, 64)), make((1, 512)))}),
            *COUNTS_ROWS,
            ("counts", "add up to 1", {"counts": [2]}),
            *STREAM,
        ],
    ),
    "PagedKVCache.step": Target(
        make_cache().step, lambda make: {"requests": [0]}, lambda make: [*REQUESTS_ROWS, *COUNTS_ROWS, *STREAM]
    ),
    "PagedKVCache.make_room": Target(
        make_cache().make_room, lambda make: {"requests": [0], "counts": [1]},
        lambda make: [*REQUESTS_ROWS, *COUNTS_ROWS], unchecked=("stream",),
    ),
    "PagedKVCache.write": Target(
        make_cache().write,
        lambda make: {"layer": 0, "kv_new": make((1, 576)), "slot_mapping": make((1,), "int64")},
        lambda make: [
            *no_integer("layer"), ("layer", "0 to 0", {"layer": 1}), ("layer", "", {"layer": -1}), *required("kv_new"),
            *typed("kv_new", (1, 576), make, "int32"), *required("slot_mapping")[:-1],
            *typed("slot_mapping", (1,), make, "int32"), *shaped("slot_mapping", "int64", make, (2,)), *STREAM,
        ],
    ),
    "is_supported": Target(
        cupy_mla.is_supported, lambda make: {},
        lambda make: [
            *(
                row
                for name in (
                    "num_heads_q", "num_heads_kv", "latent_dim", "rope_dim", "page_size", "batch", "seqlen_q",
                    "max_seqlen_k", "topk",
                )
                for row in (*no_integer(name), (name, "0 or more", {name: -1}))
            ),
            *no_flag("causal"), *LAYOUT,
            ("extra_topk", "None without topk", {"extra_topk": 5}),
            *(
                (name, expected, {"topk": 9, "extra_topk": 5, **changes})
                for other in ("extra_topk", "extra_page_size")
                for name, expected, changes in (*no_integer(other), (other, "0 or more", {other: -1}))
            ),
            *(
                ("extra_layout", "", {"topk": 9, "extra_topk": 5, "extra_layout": value}) for value in ("fp5", 5)
            ),
        ],
        unchecked=("dtype",),  # another one is not supported, which is no mistake
    ),
    "PagedKVCache.block_table": Target(
        make_cache().block_table, lambda make: {"requests": [0]},
        lambda make: [*REQUESTS_ROWS, *outputs(make, out=((1, 2), "int32")), *STREAM], ("out",),
    ),
    **{
        f"PagedKVCache.{name}": Target(
            getattr(make_cache(), name), lambda make: {"requests": [0]},
            lambda make: [*REQUESTS_ROWS, *shaped("out", "int32", make, (2,)), *STREAM], ("out",),
        )
        for name in ("cache_seqlens", "total_seqlens")
    },
}  # fmt: skip


def rows_of(make: Make, *, on_gpu: bool) -> list[Any]:
    rows = []
    for name, target in TARGETS.items():
        if on_gpu and not target.on_gpu:
            continue
        for number, (argument, expected, changes) in enumerate(target.wrong(make)):
            rows.append(pytest.param(name, argument, expected, changes, id=f"{name}-{argument}-{number}"))
    return rows


def refuse(target: Target, arguments: Changes, argument: str, expected: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        target.function(**arguments)
    error = caught.value
    assert error.argument == argument
    assert expected in error.expected
    assert error.expected
    assert error.got
    assert str(error).startswith(f"{argument}: expected ")
    assert "\n" not in str(error)
    if isinstance(error, PlanMismatchError):
        assert argument == "plan"


@pytest.mark.parametrize(("name", "argument", "expected", "changes"), rows_of(canary, on_gpu=False))
def test_refused(name: str, argument: str, expected: str, changes: Changes) -> None:
    target = TARGETS[name]
    arguments = {**target.good(zeros), **changes}
    before = {key: np.array(value) for key, value in arguments.items() if isinstance(value, np.ndarray)}
    refuse(target, arguments, argument, expected)
    for key, contents in before.items():
        np.testing.assert_array_equal(arguments[key], contents)  # nothing was written


def integers(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


RAGGED = {"q": zeros((4, 16, 576)), "cache_seqlens": integers(1, 1)}
# Values, which are read on the CPU always: name and place, what is said, changes to a good call.
VALUES: list[tuple[str, str, str, Changes]] = [
    ("mla_decode", "cache_seqlens[1]", "0 to 128", {"cache_seqlens": integers(0, -1)}),
    ("mla_decode", "cache_seqlens[0]", "0 to 128", {"cache_seqlens": integers(129, 0)}),
    (
        "mla_decode", "block_table[1, 0]", "0 to 2",
        {"cache_seqlens": integers(1, 1), "block_table": integers([0, 0], [3, 0])},
    ),
    (
        "mla_decode", "block_table[0, 1]", "0 to 2",
        {"cache_seqlens": integers(65, 1), "block_table": integers([0, -1], [2, 0])},
    ),
    ("mla_decode", "cu_seqlens_q[0]", "0", {**RAGGED, "cu_seqlens_q": integers(1, 2, 4)}),
    ("mla_decode", "cu_seqlens_q[2]", "", {**RAGGED, "cu_seqlens_q": integers(0, 2, 1)}),
    ("mla_decode", "cu_seqlens_q[2]", "at most 4", {**RAGGED, "cu_seqlens_q": integers(0, 2, 5)}),
    ("plan_decode", "cache_seqlens[1]", "0 to 128", {"cache_seqlens": integers(0, -1)}),
    ("mla_sparse_decode", "topk_length[1]", "0 to 5", {"topk_length": integers(0, 6)}),
    ("mla_sparse_decode", "topk_length[0, 0]", "0 to 5", {"topk_length": integers([-1], [0])}),
    ("plan_sparse_decode", "topk_length[0]", "0 to 5", {"topk_length": integers(-1, 5)}),
    (
        "mla_sparse_decode", "extra_topk_length[1]", "0 to 7",
        {**extra(zeros), "extra_topk_length": integers(0, 8)},
    ),
    ("mla_sparse_prefill", "topk_length[1]", "0 to 5", {"topk_length": integers(0, 6)}),
    ("flash_mla.flash_mla_with_kvcache", "cache_seqlens[1]", "0 to 128", {"cache_seqlens": integers(0, -1)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "argument", "expected", "changes"), VALUES)
def test_values_are_refused(name: str, argument: str, expected: str, changes: Changes) -> None:
    target = TARGETS[name]
    refuse(target, {**target.good(zeros), **changes}, argument, expected)


def fake(shape: tuple[int, ...], dtype: str = "bfloat16") -> FakeArray:
    return FakeArray(shape, dtype)


@pytest.mark.parametrize(("name", "argument", "expected", "changes"), rows_of(fake, on_gpu=True))
def test_refused_on_a_gpu_before_any_launch(
    name: str, argument: str, expected: str, changes: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    if any(isinstance(value, (cupy_mla.DecodePlan, cupy_mla.SparsePlan)) for value in changes.values()):
        argument, expected = "plan", ""  # of another device, besides
    gpu = fake_gpu(monkeypatch)
    target = TARGETS[name]
    refuse(target, {**target.good(fake), **changes}, argument, expected)
    assert gpu.take() == []


@pytest.mark.parametrize("name", TARGETS)
def test_the_good_call_is_good(name: str) -> None:
    target = TARGETS[name]
    if not name.startswith("PagedKVCache."):
        target.function(**target.good(zeros))


@pytest.mark.parametrize("name", TARGETS)
def test_every_argument_has_a_row(name: str) -> None:
    target = TARGETS[name]
    refused = {key for _, _, changes in target.wrong(zeros) for key in changes}
    assert set(inspect.signature(target.function).parameters) - refused == set(target.unchecked)


def test_every_public_function_has_its_rows() -> None:
    functions = {name for name in cupy_mla.__all__ if name[0].islower()}
    functions |= {f"flash_mla.{name}" for name in ("flash_mla_with_kvcache", "flash_mla_sparse_fwd")}
    methods = {
        f"{kind.__name__}.{name}"
        for kind in (PagedKVCache,)
        for name, value in vars(kind).items()
        if inspect.isfunction(value) and not name.startswith("_") and len(inspect.signature(value).parameters) > 1
    }
    assert functions | methods <= TARGETS.keys()
