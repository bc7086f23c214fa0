"""Appends on a fake GPU: what is launched, and that a call made again differs by its addresses alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeArray, FakeGpu, fake_gpu

from cupy_mla.cache import append as append_module
from cupy_mla.cache.append import append_tokens
from cupy_mla.errors import InvalidArgumentError
from cupy_mla.kernels.catalogue import all_kernels
from cupy_mla.settings import reload_settings

PAGES, PAGE_SIZE, BATCH, TOKENS = 12, 64, 3, 6
LATENT, ROPE = 512, 64
STREAM = 77  # the current one of the fake GPU


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return fake_gpu(monkeypatch)


def cache_of(gpu: FakeGpu, width: int, dtype: str = "bfloat16") -> FakeArray:
    return gpu.array((PAGES, PAGE_SIZE, 1, width), dtype)


def rows_of(gpu: FakeGpu, width: int) -> FakeArray:
    return gpu.array((TOKENS, width))


def slots(gpu: FakeGpu) -> dict[str, Any]:
    return {"slot_mapping": gpu.array((TOKENS,), "int64")}


def packed(gpu: FakeGpu) -> dict[str, Any]:
    return {"kv_cache": cache_of(gpu, LATENT + ROPE), "kv_new": rows_of(gpu, LATENT + ROPE), **slots(gpu)}


def rows_in_a_pair(gpu: FakeGpu) -> dict[str, Any]:
    return packed(gpu) | {"kv_new": (rows_of(gpu, LATENT), rows_of(gpu, ROPE))}


def pairs(gpu: FakeGpu) -> dict[str, Any]:
    return rows_in_a_pair(gpu) | {"kv_cache": (cache_of(gpu, LATENT), cache_of(gpu, ROPE))}


def by_table(gpu: FakeGpu) -> dict[str, Any]:
    index = {name: gpu.array((TOKENS,), "int32") for name in ("positions", "requests")}
    table = {"block_table": gpu.array((BATCH, 4), "int32")}
    return {name: value for name, value in packed(gpu).items() if name != "slot_mapping"} | index | table


def e4m3(gpu: FakeGpu) -> dict[str, Any]:
    scale = gpu.array((1,), "float32")
    return packed(gpu) | {"kv_cache": cache_of(gpu, LATENT + ROPE, "float8_e4m3fn"), "kv_scale": scale}


def e4m3_by_number(gpu: FakeGpu) -> dict[str, Any]:
    return e4m3(gpu) | {"kv_scale": 0.5}


def e4m3_parts(gpu: FakeGpu) -> dict[str, Any]:
    rows = rows_of(gpu, LATENT), rows_of(gpu, ROPE)
    return e4m3(gpu) | {"kv_new": rows, "kv_scale": gpu.array((2,), "float32")}


def e4m3_parts_by_numbers(gpu: FakeGpu) -> dict[str, Any]:
    return e4m3_parts(gpu) | {"kv_scale": (0.5, 0.25)}


def ds_mla(gpu: FakeGpu) -> dict[str, Any]:
    return rows_in_a_pair(gpu) | {"kv_cache": cache_of(gpu, 656, "uint8"), "layout": "fp8_ds_mla"}


KINDS = [packed, rows_in_a_pair, pairs, by_table, e4m3, e4m3_by_number, e4m3_parts, e4m3_parts_by_numbers, ds_mla]
kinds = pytest.mark.parametrize("make", KINDS, ids=[make.__name__ for make in KINDS])


def launched(gpu: FakeGpu) -> Any:
    """The one parameter of the one launch."""
    [launch] = gpu.take()
    assert launch.stream == STREAM
    [[params]] = launch.arguments
    return params


def refuse(*arguments: Any) -> None:
    raise AssertionError("checked again")


@kinds
def test_a_call_made_again_differs_by_its_addresses(gpu: FakeGpu, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    append_tokens(**make(gpu))
    first = launched(gpu)
    others = make(gpu)
    with monkeypatch.context() as patch:
        patch.setattr(append_module, "describe_append", refuse)
        append_tokens(**others)
    again = launched(gpu)
    monkeypatch.setattr(append_module, "_known", type(append_module._known)(append_module.APPEND_PARTS, pairs=2))
    append_tokens(**others)  # described anew
    expected = launched(gpu)
    assert again.tobytes() == expected.tobytes()
    assert again.tobytes() != first.tobytes()


@kinds
def test_usual_widths_have_a_kernel_made_ahead(gpu: FakeGpu, make: Any) -> None:
    append_tokens(**make(gpu))
    [launch] = gpu.take()
    assert launch.source in {kernel.source for kernel in all_kernels()}


def test_few_tokens_are_shared_by_several_warps(gpu: FakeGpu) -> None:
    for count, warps_of_a_token in ((1, 9), (4095, 9), (4096, 1), (100_003, 1)):
        append_tokens(cache_of(gpu, 576), gpu.array((count, 576)), gpu.array((count,), "int64"))
        [launch] = gpu.take()
        assert launch.grid == (-(-count // 16), warps_of_a_token, 1)


def test_addresses_stand_where_the_kernel_reads_them(gpu: FakeGpu) -> None:
    append_tokens(**pairs(gpu))
    gpu.take()
    arrays = pairs(gpu)
    append_tokens(**arrays)
    params = launched(gpu)
    for index, (cache, rows) in enumerate(zip(arrays["kv_cache"], arrays["kv_new"], strict=True)):
        assert params["segments"][index]["cache"] == cache.pointer
        assert params["segments"][index]["rows"] == rows.pointer
    assert params["places"]["slot_mapping"] == arrays["slot_mapping"].pointer
    assert params["places"]["block_table"] == params["places"]["positions"] == params["places"]["requests"] == 0
    assert params["places"]["num_tokens"] == TOKENS


def test_scales_of_the_parts_stand_one_behind_the_other(gpu: FakeGpu) -> None:
    for make, step in ((e4m3, 0), (e4m3_parts, np.dtype(np.float32).itemsize)):
        append_tokens(**make(gpu))
        gpu.take()
        arrays = make(gpu)
        append_tokens(**arrays)
        first = arrays["kv_scale"].pointer
        assert launched(gpu)["kv_scales"].tolist() == [first, first + step]
    append_tokens(**e4m3_parts_by_numbers(gpu))
    params = launched(gpu)
    assert (params["kv_scales"].tolist(), params["kv_scale_values"].tolist()) == ([0, 0], [0.5, 0.25])


def test_scales_follow_the_cache(gpu: FakeGpu) -> None:
    append_tokens(**ds_mla(gpu))
    first = launched(gpu)
    arrays = ds_mla(gpu)
    append_tokens(**arrays)
    again = launched(gpu)
    moved = [params["scales"] - params["segments"][0]["cache"] for params in (first, again)]
    assert moved[0] == moved[1] == LATENT
    assert again["segments"][1]["cache"] == arrays["kv_cache"].pointer + LATENT + 4 * np.dtype(np.float32).itemsize


@kinds
def test_what_differs_is_checked(gpu: FakeGpu, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    append_tokens(**make(gpu))
    monkeypatch.setattr(append_module, "describe_append", refuse)
    append_tokens(**make(gpu))
    gpu.take()
    for name, array in make(gpu).items():
        if isinstance(array, FakeArray):
            changed = [
                gpu.array((array.shape[0] + 1, *array.shape[1:]), array.dtype, array.strides),
                replace(array, dtype="float64"),
                replace(array, pointer=array.pointer + 2),
                replace(array, device_id=1),
            ]
            for other in changed:
                with pytest.raises(AssertionError, match="checked again"):
                    append_tokens(**{**make(gpu), name: other})
    with pytest.raises(AssertionError, match="checked again"):
        append_tokens(**{**make(gpu), "kv_scale": 0.25})
    with pytest.raises(AssertionError, match="checked again"):
        append_tokens(**{**make(gpu), "layout": "bf16"})
    reload_settings()
    with pytest.raises(AssertionError, match="checked again"):
        append_tokens(**make(gpu))
    assert gpu.take() == []


@pytest.mark.parametrize("name", ["kv_cache", "kv_new", "slot_mapping"])
def test_misaligned_arrays_are_refused_when_the_call_is_known(gpu: FakeGpu, name: str) -> None:
    arrays = packed(gpu)
    append_tokens(**arrays)
    gpu.take()
    with pytest.raises(InvalidArgumentError) as caught:
        append_tokens(**{**arrays, name: replace(arrays[name], pointer=arrays[name].pointer + 4)})
    assert caught.value.argument == name
    assert gpu.take() == []


def test_a_given_stream(gpu: FakeGpu) -> None:
    for stream in (5, 6):
        append_tokens(**packed(gpu), stream=stream)
        assert [launch.stream for launch in gpu.take()] == [stream]


def test_no_tokens_launch_nothing(gpu: FakeGpu) -> None:
    arrays = packed(gpu)
    for _ in range(2):
        none = {"kv_new": gpu.array((0, LATENT + ROPE)), "slot_mapping": gpu.array((0,), "int64")}
        append_tokens(**arrays | none)
        assert gpu.take() == []
