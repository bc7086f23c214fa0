"""Checks of single arguments: outputs that can be written, and values that lie on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases_dense import DenseCase
from test_describe import BASE, GpuArray, _read_gpu_arrays, cpu_zeros  # noqa: F401, the fixture serves here too

from cupy_mla.arrays.view import ArrayView, view
from cupy_mla.call import problem
from cupy_mla.call.arguments import check_output
from cupy_mla.call.describe import describe_decode
from cupy_mla.call.options import read_call
from cupy_mla.call.values import validate_values
from cupy_mla.errors import InvalidArgumentError

# --- outputs


def gpu_view(array: GpuArray) -> ArrayView:
    return view(array, "out")


def test_good_outputs():
    location = ("cpu", 0)
    check_output(view(np.zeros((4, 2), np.float32).T, "lse"), "lse", (2, 4), "float32", location)
    out = cpu_zeros((4, 2, 16, 576))[..., :512]
    check_output(view(out, "out"), "out", (4, 2, 16, 512), "bfloat16", location, contiguous_rows=True)
    strided = GpuArray((4, 16, 512), strides=(16 * 520, 520, 1))
    check_output(gpu_view(strided), "out", (4, 16, 512), "bfloat16", ("cuda", 0), contiguous_rows=True)
    for apart in (-(16 * 520), 2**44):  # in whichever direction, and however far
        anywhere = GpuArray((4, 16, 512), strides=(apart, 520, 1))
        check_output(gpu_view(anywhere), "out", (4, 16, 512), "bfloat16", ("cuda", 0), contiguous_rows=True)
    check_output(gpu_view(GpuArray((4, 16), "float32", pointer=BASE + 4)), "lse", (4, 16), "float32", ("cuda", 0))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (GpuArray((4, 16, 256)), "shape [4, 16, 512]"),
        (GpuArray((4, 16, 512), "float32"), "bfloat16"),
        (GpuArray((4, 16, 512), device_id=1), "q's device, cuda:0"),
        (GpuArray((4, 16, 512), strides=(0, 512, 1)), "do not overlap"),
        (GpuArray((4, 16, 512), strides=(512, 1024, 1)), "do not overlap"),
        (GpuArray((4, 16, 512), strides=(8192, 504, 1)), "do not overlap"),
        (GpuArray((4, 16, 512), strides=(8192, 1, 16)), "contiguous last dimension"),
        (GpuArray((4, 16, 512), strides=(16 * 516, 516, 1)), "multiples of 8 elements"),
        (GpuArray((4, 16, 512), pointer=BASE + 8), "a multiple of 16 bytes"),
        (cpu_zeros((4, 16, 512)), "q's device, cuda:0"),
    ],
    ids=["shape", "type", "device", "overlap", "shared rows", "close rows", "columns", "strides", "address", "cpu"],
)
def test_bad_outputs_are_refused(array: Any, expected: str):
    with pytest.raises(InvalidArgumentError) as caught:
        check_output(view(array, "out"), "out", (4, 16, 512), "bfloat16", ("cuda", 0), contiguous_rows=True)
    assert caught.value.argument == "out"
    assert expected in caught.value.expected


def test_misaligned_lse_is_refused():
    with pytest.raises(InvalidArgumentError, match="multiple of 4 bytes"):
        check_output(gpu_view(GpuArray((4,), "float32", pointer=BASE + 2)), "lse", (4,), "float32", ("cuda", 0))


def test_read_only_outputs_are_refused():
    array = np.zeros((2, 3), np.float32)
    array.flags.writeable = False
    with pytest.raises(InvalidArgumentError, match="writable"):
        check_output(view(array, "lse"), "lse", (2, 3), "float32", ("cpu", 0))


def test_jax_outputs_are_refused():
    jax = pytest.importorskip("jax")
    array = jax.numpy.zeros((2, 3), "float32", device=jax.devices("cpu")[0])
    with pytest.raises(InvalidArgumentError, match="immutable"):
        check_output(view(array, "lse"), "lse", (2, 3), "float32", ("cpu", 0))


# --- values


def built(case: DenseCase) -> tuple[Any, problem.DecodeProblem, problem.DecodeInputs]:
    made = case.build()
    described, inputs = describe_decode(
        *read_call(
            made.q,
            made.kv_cache,
            made.block_table,
            made.cache_seqlens,
            cu_seqlens_q=made.cu_seqlens_q,
            **case.options,
            strict=False,
        )
    )
    return made, described, inputs


SMALL = DenseCase(lengths=(10, 0, 33), num_heads_q=2, latent_dim=8, rope_dim=4, page_size=16)


def test_good_values_pass():
    _, described, inputs = built(SMALL)
    validate_values(described, inputs)
    _, described, inputs = built(replace(SMALL, seqlens_q=(2, 0, 3)))
    validate_values(described, inputs)


@pytest.mark.parametrize("length", [-1, 10**6])
def test_bad_lengths_name_the_request(length: int):
    made, described, inputs = built(SMALL)
    made.cache_seqlens[2] = length
    with pytest.raises(InvalidArgumentError, match=f"got {length}") as caught:
        validate_values(described, inputs)
    assert caught.value.argument == "cache_seqlens[2]"


@pytest.mark.parametrize("page", [-1, 10**6])
def test_bad_pages_name_the_request(page: int):
    made, described, inputs = built(SMALL)
    made.block_table[2, 1] = page
    with pytest.raises(InvalidArgumentError, match=f"request 2 has 33 tokens.*got {page}") as caught:
        validate_values(described, inputs)
    assert caught.value.argument == "block_table[2, 1]"


@pytest.mark.parametrize(
    ("starts", "argument"),
    [
        ([1, 2, 2, 5], "cu_seqlens_q[0]"),
        ([0, 3, 2, 5], "cu_seqlens_q[2]"),
        ([0, 2, 2, 6], "cu_seqlens_q[3]"),
        ([0, 5, 5, 10], "cu_seqlens_q[3]"),
    ],
)
def test_bad_starts_name_the_request(starts: list[int], argument: str):
    made, described, inputs = built(replace(SMALL, seqlens_q=(2, 0, 3)))
    made.cu_seqlens_q[:] = starts
    with pytest.raises(InvalidArgumentError) as caught:
        validate_values(described, inputs)
    assert caught.value.argument == argument


def test_more_queries_than_promised():
    made, _, _ = built(replace(SMALL, seqlens_q=(2, 0, 3)))
    described, inputs = describe_decode(
        *read_call(
            made.q,
            made.kv_cache,
            made.block_table,
            made.cache_seqlens,
            head_dim_v=8,
            cu_seqlens_q=made.cu_seqlens_q,
            max_seqlen_q=2,
            strict=False,
        )
    )
    with pytest.raises(InvalidArgumentError, match="request 2 may have 0 to 2 queries"):
        validate_values(described, inputs)
