"""is_supported: what a Hopper GPU takes, by the checks of the calls themselves."""

from __future__ import annotations

import re
from typing import Any

import pytest

import cupy_mla
from cupy_mla import InvalidArgumentError, is_supported
from cupy_mla.layouts import FP8_E4M3

TAKEN: list[tuple[dict[str, Any], str]] = [
    ({"num_heads_q": 16}, "narrow16_bfloat16_512+64_page64"),
    ({"batch": 64, "max_seqlen_k": 8192}, "wide64_bfloat16_512+64_page64"),
    ({"num_heads_q": 16, "dtype": "float16", "rope_dim": 0}, "narrow16_float16_512+0_page64"),
    ({"num_heads_q": 16, "layout": FP8_E4M3}, "fp8_"),
    ({"num_heads_q": 96, "num_heads_kv": 3, "page_size": 16, "seqlen_q": 2, "causal": True}, "causal"),
    ({"num_heads_q": 16, "topk": 2048}, "gathered_narrow16"),
    ({"num_heads_q": 16, "topk": 128, "extra_topk": 512, "rope_dim": 0}, "extra1"),
    ({"topk": 12, "extra_topk": 5, "extra_page_size": 2, "rope_dim": 0, "layout": "fp8_model1"}, "fp8_model1_extra2"),
    ({"topk": 1, "extra_topk": 1, "rope_dim": 0, "layout": "fp8_v41", "extra_layout": "fp4_v41"}, "extra1_fp4_v41"),
    ({"num_heads_q": 16, "layout": "fp8_ds_mla"}, "row_pages16"),
    ({"num_heads_q": 16, "layout": "fp8_ds_mla", "batch": 64}, "row_tiles16"),
    ({"num_heads_q": 16, "layout": "fp8_ds_mla", "batch": 64, "page_size": 1}, "row_pages16"),
    ({"layout": "fp8_model1", "rope_dim": 0}, "row_pages32"),
    ({"num_heads_q": 16, "batch": 0}, "narrow16"),
    ({"num_heads_q": 16, "max_seqlen_k": 0}, "narrow16"),
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"latent_dim": 100}, "head_dim_v: expected a multiple of 64 up to 512"),
    ({"latent_dim": 1024, "rope_dim": 0}, "head_dim_v"),
    ({"num_heads_q": 12, "num_heads_kv": 5}, "q: expected a number of heads that 5 KV heads divide"),
    ({"num_heads_q": 0}, "q: "),
    ({"page_size": 24}, "kv_cache: expected a page size"),
    ({"dtype": "float32"}, "dtype: "),
    ({"layout": "fp16"}, "kv_cache: "),
    ({"layout": "fp8_model1"}, r"latent_dim\+rope_dim: expected 512\+0 for fp8_model1"),
    ({"topk": 9, "extra_topk": 9, "rope_dim": 0, "layout": "fp8_v41", "extra_layout": "fp8_model1"}, "extra_kv_cach"),
    ({"layout": "fp8_ds_mla", "dtype": "float16"}, "q: expected bfloat16"),
]


@pytest.mark.parametrize(("call", "kernel"), TAKEN, ids=str)
def test_what_is_taken(call: dict[str, Any], kernel: str) -> None:
    support = is_supported(**call)
    assert support, support.reason
    assert support.kernel is not None
    assert kernel in support.kernel
    assert str(support) == f"supported: kernel {support.kernel}"


@pytest.mark.parametrize(("call", "reason"), REFUSED, ids=str)
def test_what_is_not(call: dict[str, Any], reason: str) -> None:
    support = is_supported(**call)
    assert not support
    assert support.kernel is None
    assert re.match(reason, str(support.reason)), support.reason
    assert str(support) == f"not supported: {support.reason}"


@pytest.mark.parametrize(
    ("argument", "value"),
    [("num_heads_q", 1.5), ("rope_dim", -1), ("topk", "8"), ("layout", "fp8"), ("causal", "yes"), ("extra_topk", 5)],
)
def test_what_is_no_question(argument: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{argument}: "):
        is_supported(**{argument: value})


def test_public_names_are_reachable() -> None:
    assert {"bench", "engines", "flash_mla", "layouts", "is_supported", "mla_decode"} <= set(dir(cupy_mla))
    assert "importlib" not in dir(cupy_mla)
    assert cupy_mla.flash_mla.flash_mla_with_kvcache
    assert cupy_mla.bench.run_bench
    assert all(getattr(cupy_mla, name) is not None for name in cupy_mla.__all__)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = cupy_mla.absent
