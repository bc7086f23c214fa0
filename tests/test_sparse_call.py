"""What is launched for a sparse call, argument by argument, on a GPU that only writes it down; first and later on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_gpu import NUM_SMS, FakeArray, FakeGpu, fake_gpu

from cupy_mla import (
    InvalidArgumentError,
    PlanMismatchError,
    mla_sparse_decode,
    mla_sparse_prefill,
    plan_sparse_decode,
)
from cupy_mla.arrays.dtypes import ITEM_SIZES
from cupy_mla.call.arguments import CUDA_MAX_LATENT, CUDA_MAX_WIDTH, CUDA_WIDTH_MULTIPLE
from cupy_mla.call.memo import forget
from cupy_mla.decode import prefill as prefill_module
from cupy_mla.decode import sparse as sparse_module
from cupy_mla.kernels.choose import GATHERED_FAMILIES
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
    [(300, 128, (2, NUM_SMS // 2, 1)), (300, 64, (1, NUM_SMS, 1)), (70, 64, (1, 70, 1)), (300, 16, (1, NUM_SMS, 1))],
)
def test_query_tokens_are_dealt_out_to_all_sms(gpu: FakeGpu, tokens: int, heads: int, grid: Any) -> None:
    mla_sparse_prefill(**plain(gpu, tokens, heads))
    assert gpu.take()[0].grid == grid


def test_clusters_share_what_is_left_of_the_last_wave(gpu: FakeGpu) -> None:
    parts, over = NUM_SMS // 2, 18
    arrays = {
        "q": gpu.array((2 * parts + over, 16, 576), strides=(20000, 640, 1)),
        "kv": gpu.array((40, 64, 2, 576)),
        "indices": gpu.array((2 * parts + over, 2, 1100), "int32", strides=(2300, 1150, 1)),
        "topk_length": gpu.array((2 * parts + over,), "int32"),
        "attn_sink": gpu.array((16,), "float32"),
        "out": gpu.array((2 * parts + over, 16, 512), strides=(16 * 528, 528, 1)),
        "max_logits": gpu.array((2 * parts + over, 16), "float32", strides=(1, 400)),
        "lse": gpu.array((2 * parts + over, 16), "float32", strides=(32, 2)),
    }
    mla_sparse_prefill(**arrays)
    whole, rest = gpu.take()
    assert (whole.grid, whole.cluster, whole.programmatic) == ((1, parts, 2), (1, 1, 1), False)
    assert (rest.grid, rest.cluster, rest.programmatic) == ((3, over, 2), (3, 1, 1), True)
    assert ("MLA_CLUSTERED", "0") in whole.source.defines
    assert ("MLA_CLUSTERED", "1") in rest.source.defines
    params, others = whole.arguments[0][0], rest.arguments[0][0]
    assert (params["num_tokens"], others["num_tokens"]) == (2 * parts, over)
    for name, array in arrays.items():
        of_token = {"kv": 0, "attn_sink": 0}.get(name, array.strides[0]) * ITEM_SIZES[array.dtype]
        assert params[name] == array.pointer, name
        assert others[name] == array.pointer + 2 * parts * of_token, name


@pytest.mark.parametrize(
    ("tokens", "heads", "topk", "grid", "cluster"),
    [
        (5, 128, 2048, (4 * 4, 5, 1), 4),
        (3, 16, 640, (4, 3, 1), 4),
        (1, 8, 2048, (8, 1, 1), 8),
        (60, 16, 2048, (2, 60, 1), 2),
    ],
)
def test_few_query_tokens_are_all_shared(
    gpu: FakeGpu, tokens: int, heads: int, topk: int, grid: Any, cluster: int
) -> None:
    mla_sparse_prefill(**{**plain(gpu, tokens, heads), "indices": gpu.array((tokens, 1, topk), "int32")})
    [launched] = gpu.take()
    assert launched.grid == grid
    assert launched.cluster == (cluster, 1, 1)
    assert not launched.programmatic  # no kernel of the same call is ahead


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
def test_a_known_call_is_launched_without_checks(gpu: FakeGpu, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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


# --- decode


def decode_arrays(gpu: FakeGpu, batch: int = 4, seqlen_q: int = 2, heads: int = 128) -> Arrays:
    return {
        "q": gpu.array((batch, seqlen_q, heads, 576)),
        "kv_cache": gpu.array((64, 64, 1, 576)),
        "indices": gpu.array((batch, seqlen_q, 2048), "int32"),
        "topk_length": gpu.array((batch,), "int32"),
    }


def all_decode_arrays(gpu: FakeGpu) -> Arrays:
    return {
        "q": gpu.array((4, 2, 16, 576), strides=(40000, 20000, 640, 1)),
        "kv_cache": gpu.array((40, 64, 2, 576), strides=(70 * 1280, 1280, 640, 1)),
        "indices": gpu.array((4, 2, 2, 100), "int32", strides=(512, 256, 128, 1)),
        "topk_length": gpu.array((4, 2), "int32"),
        "attn_sink": gpu.array((16,), "float32"),
        "out": gpu.array((4, 2, 16, 512), strides=(32 * 528, 16 * 528, 528, 1)),
        "lse": gpu.array((4, 16, 2), "float32", strides=(64, 4, 2)),
    }


def without(arrays: Arrays, *names: str) -> Arrays:
    return {name: array for name, array in arrays.items() if name not in names}


OF_PLAN = ("attn_sink", "out", "lse")


def params_of(launched: Any) -> Any:
    return launched.arguments[0][0]


def test_the_second_list_reaches_planner_and_kernel(gpu: FakeGpu) -> None:
    extra = {
        "extra_kv_cache": gpu.array((30, 2, 1, 576), strides=(3 * 576, 576, 576, 1)),
        "extra_indices": gpu.array((4, 2, 500), "int32", strides=(1024, 512, 1)),
        "extra_topk_length": gpu.array((4, 2), "int32"),
    }
    arrays = {**decode_arrays(gpu), **extra}
    mla_sparse_decode(**arrays)
    planner, kernel, _ = gpu.take()
    lengths, starts, extra_lengths, _, [plan_params] = planner.arguments
    pointers = arrays["topk_length"].pointer, 0, extra["extra_topk_length"].pointer
    assert (lengths[0], starts[0], extra_lengths[0]) == pointers
    assert (plan_params["max_seqlen_k"], plan_params["max_extra_k"]) == (2048, 500)
    assert (plan_params["requests_per_length"], plan_params["requests_per_extra_length"]) == (2, 1)
    params = params_of(kernel)
    assert params["extra_kv"] == extra["extra_kv_cache"].pointer
    assert params["extra_indices"] == extra["extra_indices"].pointer
    assert params["extra_indices_strides"].tolist() == [1024, 512, 0]
    assert (params["extra_kv_stride_page"], params["extra_kv_stride_token"]) == (3 * 576 // 8, 576 // 8)
    assert (params["extra_num_slots"], params["extra_kv_stride_head"]) == (60, 0)
    plan = plan_sparse_decode(**without(arrays, *OF_PLAN))
    assert [launched.arguments[2][0] for launched in gpu.take()] == [extra["extra_topk_length"].pointer]
    other = gpu.array((4, 2), "int32")
    plan.update(arrays["topk_length"], other)
    assert [launched.arguments[2][0] for launched in gpu.take()] == [other.pointer]
    mla_sparse_decode(**arrays, plan=plan)
    again = {**arrays, "extra_kv_cache": replace(extra["extra_kv_cache"], pointer=extra["extra_kv_cache"].pointer + 16)}
    mla_sparse_decode(**again, plan=plan)
    first, second = (params_of(launched)["extra_kv"] for launched in gpu.take() if launched.kernel == "gathered")
    assert second == first + 16
    misaligned = replace(extra["extra_kv_cache"], pointer=extra["extra_kv_cache"].pointer + 2)
    with pytest.raises(InvalidArgumentError, match="extra_kv_cache"):
        mla_sparse_decode(**{**arrays, "extra_kv_cache": misaligned}, plan=plan)


@pytest.mark.parametrize("make", [decode_arrays, all_decode_arrays])
def test_a_decode_without_plan_plans_computes_and_merges(gpu: FakeGpu, make: Any) -> None:
    arrays = make(gpu)
    out, lse = mla_sparse_decode(**arrays, softmax_scale=0.25)
    planner, kernel, merge = gpu.take()
    assert [planner.kernel, kernel.kernel, merge.kernel] == ["plan", "gathered", "combine_gathered"]
    lengths, starts, extra_lengths, plan_address, [plan_params] = planner.arguments
    assert (lengths[0], starts[0], extra_lengths[0]) == (arrays["topk_length"].pointer, 0, 0)
    assert (plan_params["max_extra_k"], params_of(kernel)["extra_kv"]) == (-1, 0)
    assert (plan_params["batch"], plan_params["seqlen_q"]) == (8, 1)
    assert plan_params["max_seqlen_k"] == arrays["indices"].shape[-1]
    assert plan_params["requests_per_length"] == (2 if make is decode_arrays else 1)
    [params], [combined] = kernel.arguments[0], merge.arguments[0]
    assert kernel.programmatic
    assert merge.programmatic
    assert params["plan"] == combined["plan"] == plan_address[0]
    assert params["attn_sink"] == combined["attn_sink"] == (arrays["attn_sink"].pointer if "attn_sink" in arrays else 0)
    assert params["out"] == combined["out"] == out.pointer
    assert params["lse"] == combined["lse"] == lse.pointer
    assert (params["q"], params["kv"]) == (arrays["q"].pointer, arrays["kv_cache"].pointer)
    assert params["indices"] == arrays["indices"].pointer
    assert params["seqlen_q"] == combined["seqlen_q"] == 2
    assert params["scale_log2"] == np.float32(0.25 * math.log2(math.e))
    assert params["plan_is_settled"] == 0
    for name in ("partial_out", "partial_lse", "group_heads", "empty_lse"):
        assert params[name] == combined[name]
    for name in ("out_strides", "lse_strides"):
        assert (params[name] == combined[name]).all()
    if make is all_decode_arrays:
        assert params["q_strides"].tolist() == [40000, 20000, 640]
        assert params["indices_strides"].tolist() == [512, 256, 128]
        assert params["lse_strides"].tolist() == [64, 2, 4]
        assert (params["kv_stride_page"], params["kv_stride_token"]) == (70 * 160, 160)
    else:
        assert params["indices_strides"].tolist()[2] == 0
        assert kernel.grid == (params["blocks_per_job"], params["num_parts"], 1)


@pytest.mark.parametrize("make", [decode_arrays, all_decode_arrays])
def test_a_plan_serves_many_calls(gpu: FakeGpu, make: Any) -> None:
    arrays = make(gpu)
    plan = plan_sparse_decode(**without(arrays, *OF_PLAN))
    assert [launched.kernel for launched in gpu.take()] == ["plan"]
    for settled in (0, 1, 1):
        mla_sparse_decode(**arrays, plan=plan)
        kernel, merge = gpu.take()
        assert kernel.arguments[0][0]["plan"] == merge.arguments[0][0]["plan"] == plan.pointer
        assert kernel.arguments[0][0]["plan_is_settled"] == settled
    plan.update(arrays["topk_length"])
    [launched] = gpu.take()
    assert launched.arguments[0][0] == arrays["topk_length"].pointer
    assert launched.stream == CURRENT_STREAM
    mla_sparse_decode(**arrays, plan=plan)
    assert gpu.take()[0].arguments[0][0]["plan_is_settled"] == 0


def test_no_lengths_are_planned_as_all_indices(gpu: FakeGpu) -> None:
    arrays = without(decode_arrays(gpu), "topk_length")
    plan = plan_sparse_decode(**arrays)
    [launched] = gpu.take()
    assert launched.arguments[0][0] == 0
    plan.update()
    assert gpu.take() == []
    mla_sparse_decode(**arrays)
    assert gpu.take()[0].arguments[0][0] == 0


@pytest.mark.parametrize("make", [decode_arrays, all_decode_arrays])
@pytest.mark.parametrize("planned", [False, True])
def test_a_known_decode_is_launched_without_checks(
    gpu: FakeGpu, make: Any, planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_sparse_decode(**without(make(gpu), *OF_PLAN)) if planned else None
    mla_sparse_decode(**make(gpu), plan=plan)
    gpu.take()

    def refuse(*arguments: Any) -> None:
        raise AssertionError("checked again")

    monkeypatch.setattr(sparse_module, "describe_sparse_decode", refuse)
    again = make(gpu)
    out, lse = mla_sparse_decode(**again, plan=plan)
    launches = gpu.take()
    assert [launched.kernel for launched in launches] == ["plan"] * (not planned) + ["gathered", "combine_gathered"]
    params = launches[-2].arguments[0][0]
    for name, array in {**without(again, "topk_length"), "out": out, "lse": lse}.items():
        assert params["kv" if name == "kv_cache" else name] == array.pointer
    for name in again:
        misaligned = replace(again[name], pointer=again[name].pointer + 2)
        with pytest.raises(AssertionError, match="checked again"):
            mla_sparse_decode(**{**again, name: misaligned}, plan=plan)
    with pytest.raises(AssertionError, match="checked again"):
        mla_sparse_decode(**again, plan=plan, softmax_scale=0.5)


def test_a_plan_of_another_kind_is_refused(gpu: FakeGpu) -> None:
    arrays = decode_arrays(gpu)
    plan = plan_sparse_decode(**arrays)
    mla_sparse_decode(**arrays, plan=plan)
    gpu.take()
    for other in ({"indices": gpu.array((4, 2, 1024), "int32")}, {"topk_length": gpu.array((4, 2), "int32")}):
        with pytest.raises(PlanMismatchError):
            mla_sparse_decode(**{**arrays, **other}, plan=plan)
    gapped = gpu.array((64, 64, 1, 576), strides=(65 * 576, 576, 576, 1))
    with pytest.raises(PlanMismatchError, match="page_size"):
        mla_sparse_decode(**{**arrays, "kv_cache": gapped}, plan=plan)
    mla_sparse_decode(**{**arrays, "kv_cache": gpu.array((640, 64, 1, 576))}, plan=plan)  # a pool that grew
    assert gpu.take()[0].arguments[0][0]["num_slots"] == 640 * 64


def test_a_fixed_split(gpu: FakeGpu) -> None:
    arrays = decode_arrays(gpu)
    plan_sparse_decode(**arrays, fixed_split_tokens=256)
    assert gpu.take()[0].arguments[4][0]["fixed_split_tiles"] == 4


@pytest.mark.parametrize("kernel", [family.name for family in GATHERED_FAMILIES])
def test_a_plan_names_its_kernel(gpu: FakeGpu, kernel: str) -> None:
    arrays = decode_arrays(gpu)
    if "fp8" in kernel:
        arrays["kv_cache"] = gpu.array((*arrays["kv_cache"].shape[:3], 656), "uint8")
    plan = plan_sparse_decode(**arrays, kernel=kernel)
    assert plan.config is not None
    assert plan.shape is not None
    assert plan.config.family.name == kernel
    gpu.take()
    mla_sparse_decode(**arrays, plan=plan)
    params = gpu.take()[0].arguments[0][0]
    assert params["blocks_per_job"] == plan.shape.blocks_per_job
    assert params["kv_stride_page"] * 16 == (656 if "fp8" in kernel else 576 * 2)


def test_every_width_has_a_kernel(gpu: FakeGpu) -> None:
    for latent_dim in range(CUDA_WIDTH_MULTIPLE, CUDA_MAX_LATENT + 1, CUDA_WIDTH_MULTIPLE):
        for rope_dim in range(0, CUDA_MAX_WIDTH - latent_dim + 1, CUDA_WIDTH_MULTIPLE):
            width = latent_dim + rope_dim
            for heads in (1, 16, 40, 128):
                q, kv = gpu.array((3, heads, width)), gpu.array((50, 1, width))
                mla_sparse_prefill(q, kv, gpu.array((3, 1, 64), "int32"), head_dim_v=latent_dim)
                plan_sparse_decode(gpu.array((3, 1, heads, width)), gpu.array((5, 10, 1, width)),
                                   gpu.array((3, 1, 64), "int32"), head_dim_v=latent_dim)  # fmt: skip


def test_topk_0_needs_no_merge(gpu: FakeGpu) -> None:
    arrays = {**without(decode_arrays(gpu), "topk_length"), "indices": gpu.array((4, 2, 0), "int32")}
    mla_sparse_decode(**arrays)
    assert [launched.kernel for launched in gpu.take()] == ["plan", "gathered"]


def test_requests_that_surely_stay_whole_need_no_merge(gpu: FakeGpu) -> None:
    """As many as 128 of 2048 tokens each do, on 132 SMs; with lengths, which nobody knows, they may not."""
    q, kv_cache = gpu.array((128, 1, 16, 576)), gpu.array((9, 64, 1, 576))
    indices, lengths = gpu.array((128, 1, 2048), "int32"), gpu.array((128,), "int32")
    plan = plan_sparse_decode(q, kv_cache, indices)
    assert plan.shape is not None
    assert plan.shape.num_parts == 132
    assert plan.shape.max_slots == 0
    mla_sparse_decode(q, kv_cache, indices, plan=plan)
    assert [launched.kernel for launched in gpu.take()] == ["plan", "gathered"]
    mla_sparse_decode(q, kv_cache, indices, topk_length=lengths)
    assert [launched.kernel for launched in gpu.take()] == ["plan", "gathered", "combine_gathered"]
    half = [gpu.array((64, *array.shape[1:]), array.dtype) for array in (q, indices)]
    mla_sparse_decode(half[0], kv_cache, half[1])
    assert [launched.kernel for launched in gpu.take()] == ["plan", "gathered", "combine_gathered"]
