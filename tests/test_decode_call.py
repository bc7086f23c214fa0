"""What is launched for a call, argument by argument, on a GPU that only writes it down; the first time and later on."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_gpu import NUM_SMS, FakeArray, FakeGpu, Launched, fake_gpu

from cupy_mla import (
    InvalidArgumentError,
    PagedKVCache,
    PlanMismatchError,
    UnsupportedDeviceError,
    append_tokens,
    merge_states,
    mla_decode,
    plan_decode,
)
from cupy_mla.arrays import exchange, frameworks
from cupy_mla.arrays import view as arrays_module
from cupy_mla.arrays.dtypes import numpy_dtype
from cupy_mla.arrays.view import ArrayView, Shared
from cupy_mla.call.memo import forget
from cupy_mla.call.options import AUTO, OPTIONS, PARTS, DecodeOptions
from cupy_mla.call.problem import DecodeProblem
from cupy_mla.decode import blueprint, dense, jax_calls
from cupy_mla.decode import prepared as decode_call
from cupy_mla.decode.dense import run_decode
from cupy_mla.decode.plan import plan_kind
from cupy_mla.decode.plan_arrays import plan_array_bytes
from cupy_mla.kernels.choose import DENSE_FAMILIES
from cupy_mla.kernels.structs import COMBINE_PARAMS

LATENT, ROPE = 512, 64
CURRENT_STREAM = 77  # what fake_gpu says
DEFAULTS = tuple(option.default for option in OPTIONS)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    yield fake_gpu(monkeypatch)
    monkeypatch.undo()
    forget()


Arrays = dict[str, Any]


def packed(gpu: FakeGpu, batch: int = 4, seqlen_q: int = 1, heads: int = 16) -> Arrays:
    return {
        "q": gpu.array((batch, seqlen_q, heads, LATENT + ROPE)),
        "kv_cache": gpu.array((64, 64, 1, LATENT + ROPE)),
        "block_table": gpu.array((batch, 16), "int32"),
        "cache_seqlens": gpu.array((batch,), "int32"),
    }


def pairs(gpu: FakeGpu) -> Arrays:
    return {
        **packed(gpu),
        "q": (gpu.array((4, 1, 16, LATENT)), gpu.array((4, 1, 16, ROPE))),
        "kv_cache": (gpu.array((64, 64, 1, LATENT)), gpu.array((64, 64, 1, ROPE))),
    }


def strided(gpu: FakeGpu) -> Arrays:
    return {
        **packed(gpu),
        "q": gpu.array((4, 1, 16, LATENT + ROPE), strides=(20000, 20000, 640, 1)),
        "kv_cache": gpu.array((64, 64, 1, LATENT + ROPE), strides=(3 * 64 * 640, 640, 640, 1)),
        "block_table": gpu.array((4, 16), "int32", strides=(40, 1)),
        "out": gpu.array((4, 1, 16, LATENT), strides=(16 * 528, 16 * 528, 528, 1)),
        "lse": gpu.array((4, 16, 1), "float32", strides=(64, 4, 2)),
    }


def ragged(gpu: FakeGpu) -> Arrays:
    return {**packed(gpu), "q": gpu.array((7, 16, LATENT + ROPE)), "cu_seqlens_q": gpu.array((5,), "int32")}


KINDS = pytest.mark.parametrize("make", [packed, pairs, strided, ragged])


def parts(value: Any) -> tuple[int, int]:
    """Addresses of the latent and the rope columns."""
    if isinstance(value, tuple):
        return value[0].pointer, value[1].pointer
    return value.pointer, value.pointer + 2 * LATENT


def expect_decode(launched: Launched, arrays: Arrays, out: Any, lse: Any, scale: float | None = None) -> None:
    """The decode kernel got these arrays."""
    assert launched.kernel == "decode"
    assert launched.programmatic
    assert launched.stream == CURRENT_STREAM
    latent_map, rope_map, [params] = launched.arguments
    first_words = [int(tensor_map.view(np.uint64)[0]) for tensor_map in (latent_map, rope_map)]
    assert tuple(first_words) == parts(arrays["kv_cache"])
    assert (params["q_latent"], params["q_rope"]) == parts(arrays["q"])
    is_ragged = "cu_seqlens_q" in arrays

    def query_strides(strides: tuple[int, ...]) -> list[int]:
        return [0, *strides[:2]] if is_ragged else list(strides[:3])

    q_latent, q_rope = arrays["q"] if isinstance(arrays["q"], tuple) else (arrays["q"], arrays["q"])
    latent_strides, rope_strides = q_latent.strides, q_rope.strides
    if not is_ragged:  # axes of one element: the strides as if contiguous, whatever was given
        latent_strides = (latent_strides[0], 16 * latent_strides[2], *latent_strides[2:])
        rope_strides = (rope_strides[0], 16 * rope_strides[2], *rope_strides[2:])
    assert list(params["q_latent_strides"]) == query_strides(latent_strides)
    assert list(params["q_rope_strides"]) == query_strides(rope_strides)
    table = arrays["block_table"]
    assert (params["block_table"], params["block_table_stride"]) == (table.pointer, table.strides[0])
    assert params["out"] == out.pointer
    assert list(params["out_strides"]) == query_strides(out.strides)
    assert params["lse"] == lse.pointer
    lse_strides = [0, lse.strides[1], lse.strides[0]] if is_ragged else [lse.strides[i] for i in (0, 2, 1)]
    assert list(params["lse_strides"]) == lse_strides
    assert params["group_heads"] == 16
    for part in ("latent", "rope"):  # one kv head: the pages are counted
        assert (params[f"{part}_page_step"], params[f"{part}_head_step"]) == (1, 0)
    expected_scale = (LATENT + ROPE) ** -0.5 if scale is None else scale
    assert params["scale_log2"] == pytest.approx(expected_scale * math.log2(math.e))


@KINDS
def test_arguments_of_the_kernels(gpu: FakeGpu, make: Callable[[FakeGpu], Arrays]) -> None:
    for round_number in range(3):  # checked, recognised, recognised; each time at other addresses
        arrays = make(gpu)
        out, lse = mla_decode(**arrays)
        planner, decode, combine = gpu.take()
        assert planner.kernel == "plan"
        plan = gpu.allocated[-1]
        lengths, starts, _, plan_pointer, _ = planner.arguments
        assert lengths[0] == arrays["cache_seqlens"].pointer
        assert starts[0] == (arrays["cu_seqlens_q"].pointer if "cu_seqlens_q" in arrays else 0)
        assert plan_pointer[0] == plan.pointer
        expect_decode(decode, arrays, out, lse)
        assert combine.kernel == "combine"
        assert combine.grid == (NUM_SMS, 1, 1)
        [merged], [params] = combine.arguments[0], decode.arguments[2]
        for name in ("out", "lse", "partial_out", "partial_lse", "plan"):
            assert merged[name] == params[name], name
        for name in ("out_strides", "lse_strides"):
            assert list(merged[name]) == list(params[name]), name
        assert merged["plan"] == plan.pointer
        assert plan.pointer < params["partial_out"] < params["partial_lse"] < plan.pointer + plan.shape[0]
        assert merged["aligned"] == 1
        assert len(dense._known._calls) == 1, round_number


@pytest.mark.parametrize("name", ["q", "kv_cache", "block_table", "out", "lse", "plan", "nothing"])
def test_arguments_of_the_kernels_when_one_array_is_another(gpu: FakeGpu, name: str) -> None:
    """What is at another address is written to both kernels, and only that changes."""

    def given() -> Arrays:
        return {**packed(gpu), "out": gpu.array((4, 1, 16, LATENT)), "lse": gpu.array((4, 16, 1), "float32")}

    arrays = given()
    plans = [plan_decode(**packed(gpu)) for _ in range(2)]
    others = {**given(), "plan": plans[1]}
    for _ in range(3):  # back and forth, as between the layers of a step
        for call in ({**arrays, "plan": plans[0]}, {**arrays, "plan": plans[0], name: others.get(name)}):
            call.pop("nothing", None)
            gpu.take()
            mla_decode(**call)
            decode, combine = gpu.take()
            expect_decode(decode, call, call["out"], call["lse"])
            [merged], [params] = combine.arguments[0], decode.arguments[2]
            plan = call["plan"]
            for launched in (merged, params):
                assert launched["out"] == call["out"].pointer
                assert launched["lse"] == call["lse"].pointer
                assert launched["partial_out"] == plan.partial_out
                assert launched["partial_lse"] == plan.partial_lse
                assert launched["plan"] == plan.pointer


@pytest.mark.parametrize("page_size", [64, 1])  # of one token: another kind of call
def test_partial_results_may_be_left_to_another_kernel(gpu: FakeGpu, page_size: int) -> None:
    """Which finds, in place, all that the merge of the call would have been given."""
    arrays = packed(gpu) | {"kv_cache": gpu.array((512, page_size, 1, LATENT + ROPE))}
    arrays["block_table"] = gpu.array((4, 1024 // page_size), "int32")
    arrays |= {"out": gpu.array((4, 1, 16, LATENT)), "lse": gpu.array((4, 16, 1), "float32")}
    made_for = {name: array for name, array in arrays.items() if name not in ("out", "lse")}
    plan, other = plan_decode(**made_for), plan_decode(**made_for)
    pieces = other.pieces = np.zeros(1, COMBINE_PARAMS)
    gpu.take()
    for _ in range(3):
        pieces[...] = 0
        mla_decode(**arrays, plan=plan)
        _, combine = gpu.take()
        mla_decode(**arrays, plan=other)
        [decode] = gpu.take()
        assert decode.kernel == ("decode" if page_size > 1 else "gathered")
        expected = combine.arguments[0].copy()
        for name in ("partial_out", "partial_lse"):
            expected[name] = getattr(other, name)
        expected["plan"] = other.pointer
        assert pieces == expected


@pytest.mark.parametrize(("heads", "blocks", "cluster"), [(16, 1, 1), (48, 3, 1), (96, 6, 2)])
def test_ctas_of_a_job_start_in_pairs(gpu: FakeGpu, heads: int, blocks: int, cluster: int) -> None:
    mla_decode(**packed(gpu, heads=heads))
    _, decode, combine = gpu.take()
    assert decode.grid[0] == blocks
    assert decode.cluster == (cluster, 1, 1)
    assert combine.cluster == (1, 1, 1)


@KINDS
def test_a_plan_and_given_outputs_allocate_nothing(gpu: FakeGpu, make: Callable[[FakeGpu], Arrays]) -> None:
    arrays = make(gpu)
    out = arrays.pop("out", None)
    lse = arrays.pop("lse", None)
    is_ragged = "cu_seqlens_q" in arrays
    out = out or gpu.array((7, 16, LATENT) if is_ragged else (4, 1, 16, LATENT))
    lse = lse or gpu.array((16, 7) if is_ragged else (4, 16, 1), "float32")
    plan = plan_decode(**arrays)
    gpu.take()
    gpu.allocated.clear()
    for _ in range(3):
        assert mla_decode(**arrays, plan=plan, out=out, lse=lse) == (out, lse)
        decode, combine = gpu.take()
        expect_decode(decode, arrays, out, lse)
        assert decode.arguments[2]["plan"] == combine.arguments[0]["plan"] == plan.pointer
    assert gpu.allocated == []


def test_kv_heads_and_pages_are_counted_in_common_steps(gpu: FakeGpu) -> None:
    arrays = packed(gpu) | {"kv_cache": gpu.array((64, 64, 2, LATENT + ROPE), strides=(64 * 1536, 1536, 768, 1))}
    mla_decode(**arrays)
    params = gpu.take()[1].arguments[2]
    assert params["latent_page_step"] == params["rope_page_step"] == 64 * 1536 // 768
    assert params["latent_head_step"] == params["rope_head_step"] == 1


def test_layers_have_their_own_tensor_maps(gpu: FakeGpu) -> None:
    arrays = packed(gpu)
    caches = [gpu.array((64, 64, 1, LATENT + ROPE)) for _ in range(5)]
    for _ in range(3):
        for cache in caches:
            arrays["kv_cache"] = cache
            out, lse = mla_decode(**arrays)
            expect_decode(gpu.take()[1], arrays, out, lse)
    assert gpu.maps_encoded == 2 * len(caches)


def test_a_cache_of_another_shape_at_the_same_address_has_another_map(gpu: FakeGpu) -> None:
    arrays = packed(gpu)
    mla_decode(**arrays)
    first = gpu.take()[1].arguments[0].tobytes()
    arrays["kv_cache"] = FakeArray((32, 128, 1, LATENT + ROPE), pointer=arrays["kv_cache"].pointer)
    mla_decode(**arrays)
    assert gpu.take()[1].arguments[0].tobytes() != first


def test_scales_and_streams(gpu: FakeGpu) -> None:
    arrays = packed(gpu)
    for scale in (0.1, None, 0.3, 0.1):
        out, lse = mla_decode(**arrays, softmax_scale=scale)
        expect_decode(gpu.take()[1], arrays, out, lse, scale)
    mla_decode(**arrays, stream=5)
    assert [launched.stream for launched in gpu.take()] == [5, 5, 5]
    mla_decode(**arrays)
    assert [launched.stream for launched in gpu.take()] == [CURRENT_STREAM] * 3


def misaligned(array: FakeArray, by: int) -> FakeArray:
    return FakeArray(array.shape, array.dtype, array.strides, array.pointer + by)


REFUSED: dict[str, tuple[str, Callable[[Arrays, FakeGpu], Arrays]]] = {
    "width of another type": ("head_dim_v", lambda a, g: {"head_dim_v": 512.0}),
    "scale of another type": ("softmax_scale", lambda a, g: {"softmax_scale": True}),
    "scale of 0": ("softmax_scale", lambda a, g: {"softmax_scale": 0.0}),
    "scale of NaN": ("softmax_scale", lambda a, g: {"softmax_scale": math.nan}),
    "causal of another type": ("causal", lambda a, g: {"causal": 0.0}),
    "bound of another type": ("max_seqlen_q", lambda a, g: {"max_seqlen_q": 1.0}),
    "q misaligned": ("q", lambda a, g: {"q": misaligned(a["q"], 2)}),
    "cache misaligned": ("kv_cache", lambda a, g: {"kv_cache": misaligned(a["kv_cache"], 8)}),
    "table misaligned": ("block_table", lambda a, g: {"block_table": misaligned(a["block_table"], 2)}),
    "lengths misaligned": ("cache_seqlens", lambda a, g: {"cache_seqlens": misaligned(a["cache_seqlens"], 1)}),
    "out misaligned": ("out", lambda a, g: {"out": misaligned(g.array((4, 1, 16, LATENT)), 2)}),
    "lse misaligned": ("lse", lambda a, g: {"lse": misaligned(g.array((4, 16, 1), "float32"), 2)}),
    "out of another shape": ("out", lambda a, g: {"out": g.array((4, 1, 16, 576))}),
    "lse of another type": ("lse", lambda a, g: {"lse": g.array((4, 16, 1), "float16")}),
    "a q of three": ("q", lambda a, g: {"q": (a["q"], a["q"], a["q"])}),
    "an empty q": ("q", lambda a, g: {"q": ()}),
    "no plan": ("plan", lambda a, g: {"plan": 0}),
    "lengths on another GPU": ("cache_seqlens", lambda a, g: {"cache_seqlens": FakeArray((4,), "int32", device_id=1)}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused_after_good_calls_of_their_like(gpu: FakeGpu, name: str) -> None:
    argument, change = REFUSED[name]
    arrays = packed(gpu)
    outputs = {"out": gpu.array((4, 1, 16, LATENT)), "lse": gpu.array((4, 16, 1), "float32")}
    options: dict[str, Any] = {"head_dim_v": 512, "softmax_scale": 1.0, "causal": False, "max_seqlen_q": 1}
    for given in ({}, outputs):
        mla_decode(**arrays, **given, **options)
    gpu.take()
    with pytest.raises(InvalidArgumentError) as caught:
        mla_decode(**{**arrays, **outputs, **options, **change(arrays, gpu)})
    assert caught.value.argument == argument
    assert gpu.take() == []
    mla_decode(**arrays, **outputs, **options)
    expect_decode(gpu.take()[1], arrays, outputs["out"], outputs["lse"], 1.0)


def test_a_plan_of_another_kind_is_refused_after_good_calls(gpu: FakeGpu) -> None:
    arrays = packed(gpu)
    mla_decode(**arrays, plan=plan_decode(**arrays))
    mla_decode(**arrays, causal=True)
    gpu.take()
    for other in (
        plan_decode(**packed(gpu, heads=64)),
        plan_decode(**packed(gpu, seqlen_q=2)),
        plan_decode(**arrays, causal=True),
    ):
        gpu.take()
        with pytest.raises(PlanMismatchError):
            mla_decode(**arrays, plan=other)
        assert gpu.take() == []


def test_plans_of_one_kind_share_what_was_prepared(gpu: FakeGpu) -> None:
    arrays = packed(gpu)
    first, second = plan_decode(**arrays), plan_decode(**arrays)
    fixed = plan_decode(**arrays, fixed_split_tokens=256)
    for plan in (first, second, fixed):
        mla_decode(**arrays, plan=plan)
        assert gpu.take()[-2].arguments[2]["plan"] == plan.pointer
    assert first.blueprint is second.blueprint
    assert fixed.blueprint is not first.blueprint
    assert len(dense._known._calls) == 2


BY_TMA = [family.name for family in DENSE_FAMILIES if not family.gathers]


@pytest.mark.parametrize("kernel", [AUTO, *BY_TMA])
def test_a_plan_names_the_kernel(gpu: FakeGpu, kernel: str) -> None:
    arrays = packed(gpu, heads=128)
    plan = plan_decode(**arrays, kernel=kernel)
    assert plan.config is not None
    assert plan.config.family.name == (kernel if kernel != AUTO else "narrow16")
    gpu.take()
    mla_decode(**arrays, plan=plan)
    decode, combine = gpu.take()
    rows = {"wide64": 64, "narrow32": 32}.get(kernel, 16)
    assert combine.arguments[0]["rows"] == plan.config.rows == rows
    assert decode.grid == (plan.shape.blocks_per_job, plan.shape.num_parts, 1)  # type: ignore[union-attr]


@pytest.mark.parametrize("parts", ["packed", "pairs"])
@pytest.mark.parametrize("kernel", [family.name for family in DENSE_FAMILIES if family.gathers])
def test_pages_of_one_token_are_named_by_their_addresses(gpu: FakeGpu, kernel: str, parts: str) -> None:
    arrays = packed(gpu, heads=128)
    arrays["block_table"] = gpu.array((4, 1000), "int32", strides=(1024, 1))
    cache = gpu.array((5000, 1, 1, LATENT + ROPE), strides=(640, 640, 640, 1))
    q, kv_cache = arrays["q"], cache
    arrays["kv_cache"] = cache
    if parts == "pairs":
        q = gpu.array((4, 1, 128, LATENT)), gpu.array((4, 1, 128, ROPE))
        kv_cache = gpu.array((5000, 1, 1, LATENT)), gpu.array((5000, 1, 1, ROPE))
        arrays |= {"q": q, "kv_cache": kv_cache}
    plan = plan_decode(**arrays, kernel=kernel)
    assert plan.config is not None
    assert plan.config.family.name == kernel
    gpu.take()
    for _ in range(2):  # checked, and recognised
        mla_decode(**arrays, plan=plan)
        decode, combine = gpu.take()
        (params,) = decode.arguments
        latent_q, rope_q = q if parts == "pairs" else (q, q)
        latent_kv, rope_kv = kv_cache if parts == "pairs" else (cache, cache)
        inside = LATENT * 2 * (parts == "packed")
        assert params["q"] == latent_q.pointer
        assert params["q_rope"] == rope_q.pointer + inside
        assert params["kv"] == latent_kv.pointer
        assert params["kv_rope"] == rope_kv.pointer + inside
        row = LATENT if parts == "pairs" else 640
        assert params["kv_stride_page"] == row * 2 // 16
        assert params["kv_rope_stride_page"] == (ROPE if parts == "pairs" else 640) * 2 // 16
        assert (params["kv_stride_head"], params["kv_rope_stride_head"]) == (0, 0)
        assert params["indices"] == arrays["block_table"].pointer
        assert params["indices_strides"][0].tolist() == [1024, 0, 0]
        assert params["num_slots"] == 5000
        assert params["plan"] == combine.arguments[0]["plan"] == plan.pointer
        assert combine.arguments[0]["rows"] == plan.config.rows
    with pytest.raises(InvalidArgumentError, match="pages of 1 token, not of 64"):
        plan_decode(**packed(gpu), kernel=kernel)


@pytest.mark.parametrize(
    ("kernel", "page_size"),
    [(f"row_pages{rows}", page_size) for rows in (16, 32, 64) for page_size in (1, 16, 64)]
    + [(f"row_tiles{rows}", page_size) for rows in (16, 32) for page_size in (16, 64)],
)
def test_pages_of_rows_are_named_by_their_addresses(gpu: FakeGpu, kernel: str, page_size: int) -> None:
    arrays = packed(gpu, heads=128)
    pitch = page_size * 656 + 48
    cache = gpu.array((500, page_size, 1, 656), "uint8", strides=(pitch, 656, 656, 1))
    arrays |= {"kv_cache": cache, "block_table": gpu.array((4, 1000), "int32", strides=(1024, 1))}
    plan = plan_decode(**arrays, kernel=kernel)
    assert plan.config is not None
    assert (plan.config.family.name, plan.config.page_size) == (kernel, page_size)
    gpu.take()
    for _ in range(2):  # checked, and recognised
        mla_decode(**arrays, plan=plan)
        decode, _ = gpu.take()
        (params,) = decode.arguments
        assert (params["q"], params["q_rope"]) == (arrays["q"].pointer, arrays["q"].pointer + 2 * LATENT)
        assert params["kv"] == cache.pointer
        assert params["kv_stride_page"] * 16 == pitch
        assert params["kv_stride_token"] * 16 == 656
        assert params["kv_stride_head"] == 0
        assert params["indices"] == arrays["block_table"].pointer
        assert params["indices_strides"][0].tolist() == [1024, 0, 0]
        assert params["num_slots"] == 500 * page_size


@pytest.mark.parametrize(("kernel", "words"), [("wide", "one of auto, narrow16"), ("wide64", "rope widths of")])
def test_a_kernel_that_cannot_serve_the_call_is_refused(gpu: FakeGpu, kernel: str, words: str) -> None:
    q, kv_cache = gpu.array((4, 1, 16, 640)), gpu.array((64, 64, 1, 640))
    arrays = {**packed(gpu), "q": q, "kv_cache": kv_cache}
    gpu.take()
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        plan_decode(**arrays, kernel=kernel)
    assert caught.value.argument == "kernel"
    assert gpu.take() == []
    plan_decode(**arrays, kernel="narrow32")


def test_a_change_of_the_settings_counts_at_once(
    gpu: FakeGpu, set_environment: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = packed(gpu)
    mla_decode(**arrays)
    set_environment(CUPY_MLA_BACKEND="numpy")
    gpu.take()
    with pytest.raises(UnsupportedDeviceError):
        mla_decode(**arrays)
    assert gpu.take() == []
    set_environment(CUPY_MLA_BACKEND=None)
    mla_decode(**arrays)
    assert len(gpu.take()) == 3
    checked: list[Any] = []
    monkeypatch.setattr("cupy_mla.decode.dense.validate_values", lambda *arguments: checked.append(arguments))
    set_environment(CUPY_MLA_VALIDATE="1")
    mla_decode(**arrays)
    assert len(checked) == 1
    mla_decode(**arrays, validate=False)
    assert len(checked) == 1


def test_calls_are_recognised_again_after_a_change_of_the_settings(
    gpu: FakeGpu, set_environment: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, others = packed(gpu), packed(gpu, heads=32)
    described: list[Any] = []
    describe = dense.describe_decode
    monkeypatch.setattr(dense, "describe_decode", lambda *given: described.append(given) or describe(*given))
    for cache_dir, count in (("/a", 2), ("/b", 4), ("/a", 6)):
        set_environment(CUPY_MLA_CACHE_DIR=cache_dir)
        for _ in range(3):
            mla_decode(**arrays)
            mla_decode(**others)
            mla_decode(**others)
        assert len(described) == count


def test_nothing_keeps_the_arrays_alive(gpu: FakeGpu) -> None:
    arrays = packed(gpu)
    plan = plan_decode(**arrays)
    results = mla_decode(**arrays, plan=plan)
    mla_decode(**arrays)
    references = [weakref.ref(array) for array in (*arrays.values(), *results, plan)]
    gpu.allocated.clear()
    del arrays, plan, results
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_what_is_remembered_is_bounded(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense._known._calls, "most", 3)
    monkeypatch.setattr(decode_call, "_CACHES_KEPT", 3)
    for batch in range(1, 10):
        arrays = packed(gpu, batch)
        for _ in range(5):
            arrays["kv_cache"] = gpu.array((64, 64, 1, LATENT + ROPE))
            mla_decode(**arrays)
            assert gpu.take()[1].arguments[0].view(np.uint64)[0] == arrays["kv_cache"].pointer
            assert len(dense._known._calls) <= 3
    assert all(len(call._maps) <= 3 for (call, *_), _ in dense._known._calls.values())


def test_threads_that_make_the_same_call_do_not_mix_their_arguments(gpu: FakeGpu) -> None:
    plain = packed(gpu)
    plan = plan_decode(**plain)
    mla_decode(**plain, plan=plan)
    gpu.take()
    gpu.pause = 1e-4

    def work(index: int) -> None:
        for _ in range(100):
            q, out = FakeArray(plain["q"].shape), FakeArray((4, 1, 16, LATENT))
            q.pointer = (index + 1) << 24
            out.pointer = q.pointer + (1 << 20)
            lse = FakeArray((4, 16, 1), "float32", pointer=q.pointer + (1 << 21))
            mla_decode(**{**plain, "q": q}, plan=plan, out=out, lse=lse)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launches = gpu.take()
    for kernel in ("decode", "combine"):
        outs = Counter(int(launched.arguments[-1]["out"][0]) for launched in launches if launched.kernel == kernel)
        assert sorted(outs.values()) == [100] * 4, kernel
    for launched in launches:
        params = launched.arguments[-1]
        assert params["lse"] == params["out"] + (1 << 20)
        if launched.kernel == "decode":
            assert params["out"] == params["q_latent"] + (1 << 20)


def test_geometry(gpu: FakeGpu) -> None:
    arrays = packed(gpu)
    plan = plan_decode(**arrays)
    assert plan.shape is not None
    mla_decode(**arrays, plan=plan)
    planner, decode, combine = gpu.take()
    assert not planner.programmatic
    assert decode.grid == (plan.shape.blocks_per_job, plan.shape.num_parts, 1)
    assert combine.programmatic


class Buffer(FakeArray):
    """A buffer of XLA's on the fake GPU, as jax-tvm-ffi hands it over."""

    def data_ptr(self) -> int:
        return self.pointer

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device_id


@pytest.mark.parametrize("planned", [False, True])
def test_custom_call_of_a_compiled_program(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, planned: bool) -> None:
    monkeypatch.setattr(jax_calls, "start", lambda location: CURRENT_STREAM)
    plain = packed(gpu)
    arrays = {name: Buffer(array.shape, array.dtype, array.strides, array.pointer) for name, array in plain.items()}
    given = tuple(1 if name in (*plain, *(("plan",) if planned else ())) else None for name in PARTS)
    call = jax_calls.TracedCall.of(given, DecodeOptions(softmax_scale=0.5))
    attributes = [value.item() for value in call.attributes().values()]
    planner_call = jax_calls.TracedCall.of(given[: PARTS.index("plan")], DecodeOptions())
    planner_attributes = [value.item() for value in planner_call.attributes().values()]
    kind = plan_decode(**plain).blueprint
    assert kind is not None
    gpu.take()
    out, lse = (Buffer((4, 1, 16, LATENT), pointer=1 << 30), Buffer((4, 16, 1), "float32", pointer=1 << 31))
    size = kind.workspace_bytes - (kind.plan_bytes if planned else 0)
    workspace = Buffer((size,), "uint8", pointer=1 << 32)
    plan = Buffer((kind.plan_bytes + 5,), "uint8", pointer=1 << 33)
    if planned:
        jax_calls._run_plan(*planner_attributes, *arrays.values(), plan)
        [planner] = gpu.take()
        assert [int(argument[0]) for argument in planner.arguments[:4]] == [
            arrays["cache_seqlens"].pointer,
            0,
            0,
            plan.pointer,
        ]
    inputs = [*arrays.values(), plan] if planned else list(arrays.values())
    jax_calls._run_decode(*attributes, *inputs, out, lse, workspace)
    launches = gpu.take()
    assert [launched.kernel for launched in launches] == (
        ["decode", "combine"] if planned else ["plan", "decode", "combine"]
    )
    decode = launches[-2]
    expect_decode(decode, arrays, out, lse, 0.5)
    [params] = decode.arguments[2]
    assert params["plan"] == (plan.pointer if planned else workspace.pointer)
    assert workspace.pointer <= params["partial_out"] < params["partial_lse"] < workspace.pointer + size
    with pytest.raises(InvalidArgumentError, match="platform"):
        jax_calls._run_decode(*attributes, *inputs, out, lse, Buffer((8,), "uint8"))


@pytest.mark.parametrize(
    ("kv_scale", "expected"),
    [(0.3, None), ((0.3, 0.15), None), ((0.3, 0.2), "1"), ("one in an array", None), ("two in an array", "1")],
    ids=str,
)
def test_layers_that_share_a_plan_may_have_one_scale_or_two(
    gpu: FakeGpu, kv_scale: Any, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(kv_scale, str):
        kv_scale = gpu.array((2,) if kv_scale.startswith("two") else (1,), "float32")
    arrays = packed(gpu)
    arrays["kv_cache"] = gpu.array((64, 64, 1, LATENT + ROPE), "float8_e4m3fn")
    plan = plan_decode(**arrays, compute="exact", kv_scale=0.7)
    sources = []

    def load(source: Any, device_id: int) -> Any:
        sources.append(source)
        return gpu.load(source, device_id)

    monkeypatch.setattr(blueprint, "load", load)
    mla_decode(**arrays, compute="exact", kv_scale=kv_scale, plan=plan)
    [decode] = [dict(source.defines) for source in sources if source.entry.startswith("decode/")]
    assert decode.get("MLA_TWO_SCALES") == expected


@pytest.mark.parametrize("length", [1, 2])
def test_the_kernel_gets_the_scales_of_each_layer(gpu: FakeGpu, length: int) -> None:
    arrays = packed(gpu)
    arrays["kv_cache"] = gpu.array((64, 64, 1, LATENT + ROPE), "float8_e4m3fn")
    outputs = {"out": gpu.array((4, 1, 16, LATENT)), "lse": gpu.array((4, 16, 1), "float32")}
    scales = [gpu.array((length,), "float32") for _ in range(2)]
    plan = plan_decode(**arrays, compute="exact", kv_scale=scales[0])
    for scale in (*scales, *scales):
        mla_decode(**arrays, **outputs, compute="exact", kv_scale=scale, plan=plan)
        [((call, *_), _)] = dense._known._calls.values()
        [params] = call.params
        assert params["latent_scale_at"] == scale.pointer
        assert params["rope_scale_at"] == scale.pointer + 4 * (length - 1)


def test_a_plan_in_an_array_of_its_own(gpu: FakeGpu) -> None:
    plain = packed(gpu)
    kind = plan_decode(**plain).blueprint
    assert kind is not None
    size = plan_array_bytes(kind.problem, DecodeOptions(), kind)
    for _ in range(3):  # checked, recognised, recognised; each time at other addresses
        arrays, made = packed(gpu), gpu.array((size,), "uint8")
        gpu.take()
        gpu.allocated.clear()
        out, lse = run_decode((*arrays.values(), None, None, None, made, None, None), DEFAULTS)
        assert gpu.allocated[:2] == [out, lse]
        [workspace] = gpu.allocated[2:]
        assert workspace.shape == (kind.partial_bytes,)
        decode, combine = gpu.take()
        expect_decode(decode, arrays, out, lse)
        [params] = decode.arguments[2]
        assert params["plan"] == combine.arguments[0]["plan"][0] == made.pointer
        assert params["partial_out"] == workspace.pointer
        assert params["partial_lse"] == workspace.pointer + kind.partial_out_bytes
        assert not params["plan_is_settled"]
        assert len(dense._known._calls) == 1


def test_wrong_plans_in_arrays_are_refused_after_good_calls(gpu: FakeGpu) -> None:
    plain = packed(gpu)
    kind = plan_decode(**plain).blueprint
    assert kind is not None
    size = plan_array_bytes(kind.problem, DecodeOptions(), kind)

    def decode(made: Any, options: tuple[Any, ...] = DEFAULTS) -> None:
        run_decode((*plain.values(), None, None, None, made, None, None), options)

    good = gpu.array((size,), "uint8")
    decode(good)
    gpu.take()
    for wrong in (
        gpu.array((size + 1,), "uint8"),
        gpu.array((1, size), "uint8"),
        gpu.array((size,), "int8"),
        gpu.array((size,), "uint8", strides=(2,)),
        misaligned(good, 16),
        FakeArray((size,), "uint8", device_id=1),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            decode(wrong)
        assert caught.value.argument == "plan"
    with pytest.raises(PlanMismatchError):
        decode(good, (*DEFAULTS[:-2], 256, AUTO))
    assert gpu.take() == []
    decode(good)
    assert [launched.kernel for launched in gpu.take()] == ["decode", "combine"]


def test_a_call_that_plans_by_itself_keeps_to_options_of_a_plan(gpu: FakeGpu) -> None:
    arrays = packed(gpu)
    fixed = plan_decode(**arrays, fixed_split_tokens=256).blueprint
    for _ in range(2):
        gpu.take()
        gpu.allocated.clear()
        run_decode((*arrays.values(), None, None, None, None, None, None), (*DEFAULTS[:-2], 256, AUTO))
        assert fixed is not None
        assert gpu.allocated[-1].shape == (fixed.workspace_bytes,)
        assert [launched.kernel for launched in gpu.take()] == ["plan", "decode", "combine"]


def test_only_a_decode_that_runs_like_the_update_settles_a_plan(gpu: FakeGpu) -> None:
    """The kernel reads a settled plan ahead of its wait: the planner must not be what it would wait for."""
    arrays = packed(gpu)

    def settled(**options: Any) -> bool:
        gpu.take()
        mla_decode(**arrays, **options)
        (decode,) = (launched for launched in gpu.take() if launched.kernel == "decode")
        return bool(decode.arguments[2]["plan_is_settled"][0])

    assert [settled(), settled()] == [False, False]  # each makes its own plan
    plan = plan_decode(**arrays)
    assert [settled(plan=plan), settled(plan=plan), settled(plan=plan)] == [False, True, True]
    plan.update(arrays["cache_seqlens"])
    gpu.capturing = True
    assert [settled(plan=plan), settled(plan=plan)] == [False, False]
    gpu.capturing = False
    assert [settled(plan=plan), settled(plan=plan)] == [False, True]  # what was captured has not run
    gpu.capturing = True
    plan.update(arrays["cache_seqlens"])
    assert [settled(plan=plan), settled(plan=plan)] == [False, True]
    gpu.capturing = False
    assert [settled(plan=plan), settled(plan=plan)] == [False, False]  # the captured update has not run


def test_a_plan_on_a_gpu_is_not_copied(gpu: FakeGpu) -> None:
    plan = plan_decode(**packed(gpu))
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="plan_decode"):
            duplicate(plan)


@pytest.mark.parametrize("backend", ["numpy", "cuda"])
def test_every_operation_keeps_to_the_backend_of_the_settings(
    gpu: FakeGpu, set_environment: Callable[..., Any], backend: str
) -> None:
    def array(shape: tuple[int, ...], dtype: str = "bfloat16") -> Any:
        return gpu.array(shape, dtype) if backend == "numpy" else np.zeros(shape, numpy_dtype(dtype))

    set_environment(CUPY_MLA_BACKEND=backend)
    with pytest.raises(UnsupportedDeviceError, match=f"CUPY_MLA_BACKEND={backend}"):
        merge_states(array((2, 3, 4, 8)), array((2, 4, 3), "float32"))
    with pytest.raises(UnsupportedDeviceError, match=f"CUPY_MLA_BACKEND={backend}"):
        append_tokens(array((2, 16, 1, 8)), array((1, 8)), array((1,), "int64"), stream=CURRENT_STREAM)
    if backend == "cuda":
        with pytest.raises(UnsupportedDeviceError, match="CUPY_MLA_BACKEND=cuda"):
            PagedKVCache(4)


def test_misaligned_arrays_of_merges_and_appends_are_refused(gpu: FakeGpu) -> None:
    outs, lses = gpu.array((2, 3, 4, 8)), gpu.array((2, 4, 3), "float32")
    for argument, wrong in (("outs", (misaligned(outs, 1), lses)), ("lses", (outs, misaligned(lses, 2)))):
        with pytest.raises(InvalidArgumentError, match="an address that is a multiple of") as caught:
            merge_states(*wrong)
        assert caught.value.argument == argument
    cache, rows, slots = gpu.array((2, 16, 1, 8)), gpu.array((1, 8)), gpu.array((1,), "int64")
    with pytest.raises(InvalidArgumentError, match="slot_mapping: expected an address that is a multiple of 8"):
        append_tokens(cache, rows, misaligned(slots, 4), stream=CURRENT_STREAM)


def test_sizes_of_plan_arrays_tell_settings_apart(gpu: FakeGpu) -> None:
    problem = plan_decode(**packed(gpu)).problem
    queries = problem.queries

    def size(problem: DecodeProblem, **options: Any) -> int:
        checked = DecodeOptions(**options)
        return plan_array_bytes(problem, checked, plan_kind(problem, ("cuda", 0), checked))

    sizes = {
        size(replace(problem, queries=replace(queries, **change)), **options)
        for change in ({}, {"causal": True}, {"batch": 5}, {"num_heads_q": 15})
        for options in ({}, {"max_seqlen_k": 512}, {"fixed_split_tokens": 256}, {"kernel": "wide64"})
    }
    assert len(sizes) == 16
    wider = replace(problem, keys=replace(problem.keys, max_pages_per_seq=17))
    assert size(wider) not in sizes


def test_a_plan_serves_pools_of_any_size(gpu: FakeGpu) -> None:
    arrays = packed(gpu)
    plan = plan_decode(**arrays)
    kind = plan.blueprint
    assert kind is not None
    made = gpu.array((plan_array_bytes(kind.problem, DecodeOptions(), kind),), "uint8")
    for pages in (64, 640, 3, 64):
        arrays["kv_cache"] = gpu.array((pages, 64, 1, LATENT + ROPE))
        assert plan_decode(**arrays).blueprint is kind
        gpu.take()
        for _ in range(2):  # checked, recognised
            result = mla_decode(**arrays, plan=plan)
            decode, _ = gpu.take()
            expect_decode(decode, arrays, *result)
            result = run_decode((*arrays.values(), None, None, None, made, None, None), DEFAULTS)
            decode, _ = gpu.take()
            expect_decode(decode, arrays, *result)


def test_an_update_refuses_a_misaligned_address(gpu: FakeGpu) -> None:
    arrays = packed(gpu)
    plan = plan_decode(**arrays)
    gpu.take()
    with pytest.raises(InvalidArgumentError, match="cache_seqlens: expected an address"):
        plan.update(misaligned(arrays["cache_seqlens"], 2))
    assert gpu.take() == []


class Imported(FakeArray):
    """An array whose memory came through DLPack: its framework does not know of our streams."""

    def read(self, name: str = "", stream: int | None = None) -> ArrayView:
        owner = Shared(None, self)
        return ArrayView(self.pointer, self.shape, self.strides, self.dtype, "cuda", self.device_id, owner)


def test_imported_memory_lives_until_the_gpu_has_read_it(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where q is of another framework, and where a plan is updated."""
    done: list[bool] = []
    recorded: list[tuple[int, int, int]] = []
    current: list[int] = [0]

    class Device:
        def __init__(self, device_id: int) -> None:
            self.device_id = device_id

        def __enter__(self) -> None:
            current.append(self.device_id)

        def __exit__(self, *error: Any) -> None:
            current.pop()

    class Event:
        def __init__(self, disable_timing: bool) -> None:
            self.number = len(done)
            done.append(False)

        @property
        def done(self) -> bool:
            return done[self.number]

        def record(self, stream: tuple[int, int]) -> None:
            recorded.append((current[-1], *stream))

    cuda = SimpleNamespace(Device=Device, Event=Event, ExternalStream=lambda stream, device_id: (stream, device_id))
    monkeypatch.setattr(exchange, "cupy_module", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(arrays_module._READERS, Imported, Imported.read)
    monkeypatch.setitem(frameworks._FRAMEWORKS, Imported, "dlpack")
    monkeypatch.setattr(exchange, "_in_flight", deque())

    def on_device_1(array: FakeArray, kind: type[FakeArray]) -> Any:
        return kind(array.shape, array.dtype, array.strides, array.pointer, device_id=1)

    plain = packed(gpu)
    arrays = {name: on_device_1(array, FakeArray) for name, array in plain.items()}
    plan = plan_decode(**arrays)
    mla_decode(**arrays, plan=plan)
    assert recorded == []
    cache, lengths = on_device_1(plain["kv_cache"], Imported), on_device_1(plain["cache_seqlens"], Imported)
    references = [weakref.ref(cache), weakref.ref(lengths)]
    mla_decode(**{**arrays, "kv_cache": cache}, plan=plan)
    plan.update(lengths)
    assert recorded == [(1, CURRENT_STREAM, 1)] * 2
    del cache, lengths
    gc.collect()
    assert all(reference() is not None for reference in references)
    done[:] = [True] * len(done)
    plan.update(on_device_1(plain["cache_seqlens"], Imported))
    gc.collect()
    assert [reference() for reference in references] == [None, None]
