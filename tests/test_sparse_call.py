"""What is launched for a sparse call, argument by argument, on a GPU that only writes it down; first and later on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_gpu import NUM_SMS, FakeArray, FakeGpu, fake_gpu

from cupy_mla import InvalidArgumentError, mla_sparse_prefill
from cupy_mla.call.memo import forget
from cupy_mla.decode import prefill as prefill_module
from cupy_mla.settings import reload_settings

CURRENT_STREAM = 77  # what fake_gpu says
Arrays = dict[str, Any]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    yield fake_gpu(monkeypatch)
    monkeypatch.undo()
    forget()


def plain(gpu: FakeGpu, tokens: int = 300, heads: int = 128) -> Arrays:
    return {
        "q": gpu.array((tokens, heads, 576)),
        "kv": gpu.array((5000, 1, 576)),
        "indices": gpu.array((tokens, 1, 2048), "int32"),
    }


def everything(gpu: FakeGpu) -> Arrays:
    return {
        "q": gpu.array((300, 16, 576), strides=(20000, 640, 1)),
        "kv": gpu.array((40, 64, 2, 576), strides=(70 * 1280, 1280, 640, 1)),
        "indices": gpu.array((300, 2, 100), "int32", strides=(256, 128, 1)),
        "topk_length": gpu.array((300,), "int32"),
        "attn_sink": gpu.array((16,), "float32"),
        "out": gpu.array((300, 16, 512), strides=(16 * 528, 528, 1)),
        "max_logits": gpu.array((300, 16), "float32", strides=(1, 300)),
        "lse": gpu.array((300, 16), "float32", strides=(32, 2)),
    }


def launched_params(gpu: FakeGpu) -> Any:
    [launched] = gpu.take()
    assert launched.kernel == "gathered"
    assert launched.stream == CURRENT_STREAM
    assert not launched.programmatic  # the schedule without a plan does not wait for the kernel ahead
    return launched.arguments[0][0]


def test_everything_reaches_the_kernel(gpu: FakeGpu) -> None:
    arrays = everything(gpu)
    results = mla_sparse_prefill(**arrays, softmax_scale=0.25, empty_lse=math.inf)
    assert all(result is arrays[name] for result, name in zip(results, ("out", "max_logits", "lse"), strict=True))
    params = launched_params(gpu)
    for name, array in arrays.items():
        assert params[name] == array.pointer
    assert params["q_strides"].tolist() == [20000, 0, 640]
    assert params["out_strides"].tolist() == [16 * 528, 0, 528]
    assert params["lse_strides"].tolist() == [32, 0, 2]
    assert params["max_logits_strides"].tolist() == [1, 300]
    assert params["indices_strides"].tolist() == [256, 0, 128]
    assert (params["kv_stride_page"], params["kv_stride_token"]) == (70 * 1280 // 8, 1280 // 8)
    assert params["kv_stride_head"] == 640 * 2
    assert (params["num_slots"], params["topk"], params["num_tokens"]) == (40 * 64, 100, 300)
    assert (params["group_heads"], params["topk_length_stride"]) == (8, 1)
    assert params["scale_log2"] == np.float32(0.25 * math.log2(math.e))
    assert params["empty_lse"] == math.inf
    assert gpu.allocated == []


def test_outputs_are_made(gpu: FakeGpu) -> None:
    arrays = plain(gpu)
    results = mla_sparse_prefill(**arrays)
    assert [result.shape for result in results] == [(300, 128, 512), (300, 128), (300, 128)]
    assert [result.dtype for result in results] == ["bfloat16", "float32", "float32"]
    params = launched_params(gpu)
    assert [params[name] for name in ("out", "max_logits", "lse")] == [result.pointer for result in results]
    assert params["topk_length"] == params["attn_sink"] == 0
    assert params["kv_stride_head"] == 0
    assert params["kv_stride_page"] == 576 // 8
    assert params["out_strides"].tolist()[::2] == [128 * 512, 512]
    assert params["lse_strides"].tolist()[::2] == [128, 1]
    assert params["scale_log2"] == np.float32(576**-0.5 * math.log2(math.e))
    assert params["empty_lse"] == -math.inf


@pytest.mark.parametrize(
    ("tokens", "heads", "grid"),
    [(300, 128, (2, NUM_SMS // 2, 1)), (300, 64, (1, NUM_SMS, 1)), (5, 128, (2, 5, 1)), (300, 16, (1, NUM_SMS, 1))],
)
def test_query_tokens_are_dealt_out_to_all_sms(gpu: FakeGpu, tokens: int, heads: int, grid: Any) -> None:
    mla_sparse_prefill(**plain(gpu, tokens, heads))
    assert gpu.take()[0].grid == grid


def test_kv_heads_have_ctas_of_their_own(gpu: FakeGpu) -> None:
    mla_sparse_prefill(**everything(gpu))
    assert gpu.take()[0].grid == (1, NUM_SMS // 2, 2)


def test_pages_of_a_contiguous_cache_do_not_count(gpu: FakeGpu) -> None:
    arrays = plain(gpu)
    mla_sparse_prefill(**{**arrays, "kv": gpu.array((50, 100, 1, 576))})
    params = launched_params(gpu)
    assert (params["kv_stride_page"], params["num_slots"]) == (576 // 8, 5000)


def test_an_index_names_no_more_slots_than_int32_has(gpu: FakeGpu) -> None:
    mla_sparse_prefill(**{**plain(gpu), "kv": gpu.array((2**31 + 5, 1, 576))})
    assert launched_params(gpu)["num_slots"] == 2**31


def test_no_query_tokens_launch_nothing(gpu: FakeGpu) -> None:
    results = mla_sparse_prefill(**plain(gpu, tokens=0))
    assert [result.shape for result in results] == [(0, 128, 512), (0, 128), (0, 128)]
    assert gpu.take() == []


@pytest.mark.parametrize("make", [plain, everything])
def test_a_known_call_is_launched_without_checks(
    gpu: FakeGpu, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mla_sparse_prefill(**make(gpu))
    first = launched_params(gpu)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("checked again")

    monkeypatch.setattr(prefill_module, "describe_sparse_prefill", refuse)
    again = make(gpu)
    results = mla_sparse_prefill(**again)
    params = launched_params(gpu)
    for name in first.dtype.names:
        if name in again:
            assert params[name] == again[name].pointer
        elif name in ("out", "max_logits", "lse"):
            assert params[name] in [result.pointer for result in results]
        else:
            assert (params[name] == first[name]).all()
    others = {"softmax_scale": 0.5, "empty_lse": math.inf, "head_dim_v": 448, "validate": True}
    for option, value in others.items():
        with pytest.raises(AssertionError, match="checked again"):
            mla_sparse_prefill(**make(gpu), **{option: value})
    for name, array in make(gpu).items():
        longer = (array.shape[0] + 1, *array.shape[1:])
        with pytest.raises(AssertionError, match="checked again"):
            mla_sparse_prefill(**{**make(gpu), name: gpu.array(longer, array.dtype, array.strides)})
        with pytest.raises(AssertionError, match="checked again"):
            mla_sparse_prefill(**{**make(gpu), name: replace(array, pointer=array.pointer + 2)})
    reload_settings()
    with pytest.raises(AssertionError, match="checked again"):
        mla_sparse_prefill(**make(gpu))


def test_misaligned_arrays_are_refused_when_the_call_is_known(gpu: FakeGpu) -> None:
    arrays = everything(gpu)
    mla_sparse_prefill(**arrays)
    for name, array in arrays.items():
        with pytest.raises(InvalidArgumentError) as caught:
            mla_sparse_prefill(**{**arrays, name: replace(array, pointer=array.pointer + 2)})
        assert caught.value.argument == name


def test_a_given_stream(gpu: FakeGpu) -> None:
    arrays = plain(gpu)
    for _ in range(2):
        mla_sparse_prefill(**arrays, stream=5)
        assert gpu.take()[0].stream == 5


def test_widths_that_no_kernel_has_room_for(gpu: FakeGpu) -> None:
    q, kv = FakeArray((3, 16, 1088)), FakeArray((50, 1, 1088))
    with pytest.raises(InvalidArgumentError, match="NumPy backend"):
        mla_sparse_prefill(q, kv, FakeArray((3, 1, 64), "int32"))
