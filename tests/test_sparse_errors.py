"""Descriptions of sparse calls, and the refusal of every kind of bad argument, on the CPU and a pretended GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from cases_dense import DTYPES

from cupy_mla import mla_sparse_prefill
from cupy_mla.arrays import view as arrays
from cupy_mla.arrays.view import ArrayView, contiguous_strides
from cupy_mla.call.sparse import describe_sparse_decode, describe_sparse_prefill
from cupy_mla.call.sparse_options import SparseDecodeArrays, SparseOptions, SparsePrefillArrays
from cupy_mla.call.sparse_problem import GatheredKeys, SparseInputs, SparseProblem
from cupy_mla.call.token_list import CUDA_MAX_KV_STRIDE
from cupy_mla.errors import InvalidArgumentError
from cupy_mla.layouts import BF16

BASE = 1 << 30


@dataclass
class GpuArray:
    """Stands for an array on a GPU: describes itself, has no memory."""

    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    strides: tuple[int, ...] | None = None  # in elements
    pointer: int = BASE
    device_id: int = 0
    __dlpack__ = None


@pytest.fixture(autouse=True)
def _read_gpu_arrays(monkeypatch: pytest.MonkeyPatch):
    def read(array: GpuArray, name: str, stream: int | None) -> ArrayView:
        strides = contiguous_strides(array.shape) if array.strides is None else array.strides
        return ArrayView(array.pointer, array.shape, strides, array.dtype, "cuda", array.device_id, array)

    monkeypatch.setitem(arrays._READERS, GpuArray, read)


def cpu_zeros(shape: tuple[int, ...], dtype: str = "bfloat16") -> np.ndarray:
    return np.zeros(shape, DTYPES.get(dtype, dtype))


@dataclass
class Call:
    """Arguments of one call; `with_` changes some of them."""

    describe_call: Any
    arrays: Any
    options: dict[str, Any]

    def with_(self, **changes: Any) -> Call:
        options = {name: changes.pop(name) for name in SparseOptions.__slots__ if name in changes}
        return replace(self, arrays=replace(self.arrays, **changes), options={**self.options, **options})

    def describe(self) -> tuple[SparseProblem, SparseInputs]:
        return self.describe_call(self.arrays, SparseOptions(**self.options))

    def refused(self) -> InvalidArgumentError:
        with pytest.raises(InvalidArgumentError) as caught:
            self.describe()
        return caught.value


def prefill(make: Any = cpu_zeros) -> Call:
    """6 query tokens of 16 heads on 2 kv heads, 40 tokens, 24 of them chosen."""
    given = SparsePrefillArrays(
        q=make((6, 16, 576)), kv=make((40, 2, 576)), indices=make((6, 2, 24), "int32"),
        topk_length=make((6,), "int32"), attn_sink=make((16,), "float32"), out=make((6, 16, 512)),
        max_logits=make((6, 16), "float32"), lse=make((6, 16), "float32"),
    )  # fmt: skip
    return Call(describe_sparse_prefill, given, {})


def decode(make: Any = cpu_zeros) -> Call:
    """3 requests of 2 query tokens, as many heads; 5 pages of 8 tokens."""
    given = SparseDecodeArrays(
        q=make((3, 2, 16, 576)), kv_cache=make((5, 8, 2, 576)), indices=make((3, 2, 24), "int32"),
        topk_length=make((3,), "int32"), attn_sink=make((16,), "float32"), out=make((3, 2, 16, 512)),
        lse=make((3, 16, 2), "float32"),
    )  # fmt: skip
    return Call(describe_sparse_decode, given, {})


MAKERS = pytest.mark.parametrize("make", [cpu_zeros, GpuArray], ids=["cpu", "gpu"])
KINDS = pytest.mark.parametrize("call", [prefill, decode], ids=["prefill", "decode"])


# --- good calls


@MAKERS
def test_prefill_is_decode_of_single_tokens(make: Any) -> None:
    problem, inputs = prefill(make).describe()
    assert (problem.queries.batch, problem.queries.seqlen_q, problem.queries.total_q) == (6, 1, 6)
    assert (problem.queries.num_heads_q, problem.queries.num_heads_kv) == (16, 2)
    assert (problem.queries.latent_dim, problem.queries.rope_dim, problem.queries.dtype) == (512, 64, "bfloat16")
    assert problem.keys == GatheredKeys(topk=24, page_size=1, tokens_per_length=1)
    assert problem.layout is BF16
    assert inputs.q.shape == (6, 1, 16, 576)
    assert inputs.kv.shape == (40, 1, 2, 576)
    assert inputs.indices.shape == (6, 1, 2, 24)
    assert inputs.out is not None
    assert inputs.out.shape == problem.queries.out_shape
    assert inputs.lse is not None
    assert inputs.lse.shape == problem.queries.lse_shape
    assert inputs.num_slots == 40


@MAKERS
def test_decode(make: Any) -> None:
    problem, inputs = decode(make).describe()
    assert (problem.queries.batch, problem.queries.seqlen_q, problem.queries.total_q) == (3, 2, 6)
    assert problem.keys == GatheredKeys(topk=24, page_size=1, tokens_per_length=2)
    assert inputs.indices.shape == (3, 2, 2, 24)
    assert inputs.indices.strides[2] == 0
    assert decode(make).with_(topk_length=make((3, 2), "int32")).describe()[0].keys.tokens_per_length == 1
    assert decode(make).with_(topk_length=None).describe()[0].keys.tokens_per_length is None
    by_head = decode(make).with_(indices=make((3, 2, 2, 24), "int32")).describe()[1].indices
    assert by_head.strides == contiguous_strides((3, 2, 2, 24))


@pytest.mark.parametrize(
    ("shape", "strides", "page_size"),
    [
        ((5, 8, 2, 576), None, 1),
        ((5, 8, 2, 576), (8 * 2304, 2304, 576, 1), 1),  # every other row of a larger cache
        ((5, 8, 2, 576), (10 * 1152, 1152, 576, 1), 8),  # pages with something between
        ((1, 8, 2, 576), (7, 1152, 576, 1), 1),
        ((5, 1, 2, 576), (4608, 3, 576, 1), 1),
    ],
)
def test_page_size_counts_where_addresses_depend_on_it(shape: Any, strides: Any, page_size: int) -> None:
    kv_cache = GpuArray(shape, strides=strides)
    assert decode(GpuArray).with_(kv_cache=kv_cache).describe()[0].keys.page_size == page_size


def test_facts_name_what_a_plan_is_for() -> None:
    facts = decode().describe()[0].facts()
    assert facts["topk"] == 24
    assert facts["tokens_per_length"] == 2
    assert facts["layout"] == "bf16"


# --- bad ones


@MAKERS
@KINDS
@pytest.mark.parametrize("name", ["q", "kv", "indices", "topk_length", "attn_sink", "out", "max_logits", "lse"])
def test_shapes_types_and_devices(make: Any, call: Any, name: str) -> None:
    good = call(make)
    if name == "max_logits" and call is decode:
        assert not hasattr(good.arrays, name)
        return
    name = "kv_cache" if name == "kv" and call is decode else name
    array = getattr(good.arrays, name)
    dtype = array.dtype if make is GpuArray else array.dtype.name

    def refused(wrong: Any) -> None:
        error = good.with_(**{name: wrong}).refused()
        assert error.argument == name
        assert error.expected
        assert error.got

    refused(make((*array.shape, 1), dtype))  # one dimension more (an indices array has one by head, of other extents)
    refused(make((), dtype))
    if name != "q":  # another q makes the others wrong
        refused(make((array.shape[0] + 1, *array.shape[1:-1], 3 * array.shape[-1]), dtype))
    refused(make(array.shape, {"int32": "int64", "float32": "float16"}.get(dtype, "float32")))
    if make is GpuArray:
        if name != "q":
            refused(GpuArray(array.shape, dtype, device_id=1))
            refused(cpu_zeros(array.shape, dtype))
        refused(GpuArray(array.shape, dtype, pointer=BASE + 2))
    refused("not an array")
    if name not in ("topk_length", "attn_sink", "out", "max_logits", "lse"):
        refused(None)


@MAKERS
@KINDS
def test_types(make: Any, call: Any) -> None:
    kv = "kv" if call is prefill else "kv_cache"
    shape = getattr(call(make).arrays, kv).shape
    assert call(make).with_(q=make(call(make).arrays.q.shape, "float32")).refused().argument == "q"
    error = call(make).with_(**{kv: make(shape, "float16")}).refused()
    assert (error.argument, error.expected, error.got) == (kv, "bfloat16, the type of q", "float16")


@MAKERS
@KINDS
def test_widths_and_heads(make: Any, call: Any) -> None:
    good = call(make)
    kv = "kv" if call is prefill else "kv_cache"
    shape = getattr(good.arrays, kv).shape
    assert good.with_(**{kv: make((*shape[:-1], 512))}).refused().argument == kv
    error = good.with_(**{kv: make((*shape[:-2], 3, 576))})
    assert (error.refused().argument, error.refused().got) == ("q", "16")
    assert good.with_(head_dim_v=0).refused().argument == "head_dim_v"
    assert good.with_(head_dim_v=577).refused().argument == "head_dim_v"


@MAKERS
@KINDS
def test_extents_of_zero(make: Any, call: Any) -> None:
    good = call(make)
    kv = "kv" if call is prefill else "kv_cache"
    for axis in (-2, -1):
        shape = [*good.arrays.q.shape]
        shape[axis] = 0
        assert good.with_(q=make(tuple(shape))).refused().argument == "q"
    for axis in range(len(getattr(good.arrays, kv).shape)):
        shape = [*getattr(good.arrays, kv).shape]
        shape[axis] = 0
        assert good.with_(**{kv: make(tuple(shape))}).refused().argument == kv
    none = good.with_(indices=make((*good.arrays.indices.shape[:-1], 0), "int32"))
    assert none.describe()[0].keys.topk == 0


def test_prefill_takes_no_tokens() -> None:
    call = prefill(cpu_zeros).with_(
        q=cpu_zeros((0, 16, 576)), indices=cpu_zeros((0, 2, 24), "int32"), topk_length=None, out=None, max_logits=None,
        lse=None,
    )  # fmt: skip
    assert call.describe()[0].queries.total_q == 0
    assert decode().with_(q=cpu_zeros((0, 2, 16, 576))).refused().argument == "indices"  # those of another batch


@MAKERS
@KINDS
@pytest.mark.parametrize("name", ["q", "kv", "indices", "topk_length", "attn_sink", "out"])
def test_strides(make: Any, call: Any, name: str) -> None:
    name = "kv_cache" if name == "kv" and call is decode else name
    array = getattr(call(make).arrays, name)
    strides = tuple(2 * step for step in contiguous_strides(array.shape))
    if make is GpuArray:
        wrong: Any = GpuArray(array.shape, array.dtype, strides)
    else:
        wrong = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)[..., ::2]
    error = call(make).with_(**{name: wrong}).refused()
    assert error.argument == name
    assert "strides" in error.got
    if make is GpuArray and name in ("q", "kv", "kv_cache", "out"):
        rows = contiguous_strides((*array.shape[:-1], 580))  # not a multiple of 16 bytes
        assert call(make).with_(**{name: GpuArray(array.shape, array.dtype, rows)}).refused().argument == name


def test_pages_too_far_apart() -> None:
    far = CUDA_MAX_KV_STRIDE // 2
    kv_cache = GpuArray((5, 8, 2, 576), strides=(far, 1152, 576, 1))
    error = decode(GpuArray).with_(kv_cache=kv_cache).refused()
    assert error.argument == "kv_cache"
    assert f"less than {CUDA_MAX_KV_STRIDE} bytes apart" in error.expected
    near = GpuArray((5, 8, 2, 576), strides=(far - 8, 1152, 576, 1))
    assert decode(GpuArray).with_(kv_cache=near).describe()[0].keys.page_size == 8


@KINDS
@pytest.mark.parametrize(
    ("width", "head_dim_v", "argument"),
    [(576, 500, "head_dim_v"), (544, 512, "q"), (1152, 512, "q"), (704, 640, "head_dim_v")],
)
def test_widths_that_no_kernel_has(call: Any, width: int, head_dim_v: int, argument: str) -> None:
    kv = "kv" if call is prefill else "kv_cache"

    def of(make: Any) -> Call:
        good = call(make)
        shapes = {name: (*getattr(good.arrays, name).shape[:-1], width) for name in ("q", kv)}
        arrays_of_width = {name: make(shape) for name, shape in shapes.items()}
        return good.with_(**arrays_of_width, head_dim_v=head_dim_v, out=None)

    assert of(cpu_zeros).with_(strict=False).describe()[0].queries.head_dim_qk == width
    for make in (cpu_zeros, lambda shape, dtype="bfloat16": GpuArray(shape, dtype)):  # a laptop is as strict as the GPU
        error = of(make).refused()
        assert error.argument == argument
        assert "strict=False" in error.expected


def test_outputs_that_must_not_be_written() -> None:
    frozen = cpu_zeros((6, 16), "float32")
    frozen.flags.writeable = False
    assert prefill().with_(max_logits=frozen).refused().argument == "max_logits"
    overlapping = np.broadcast_to(cpu_zeros((1, 16, 512)), (6, 16, 512))
    assert prefill().with_(out=overlapping).refused().argument == "out"


@pytest.mark.parametrize("plan", [cpu_zeros((4, 4), "uint8"), cpu_zeros((16,), "int32"), cpu_zeros((8,), "uint8")[::2]])
def test_arrays_that_are_no_plan(plan: Any) -> None:
    assert decode().with_(plan=plan).refused().argument == "plan"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("head_dim_v", 512.0),
        ("head_dim_v", "512"),
        ("softmax_scale", 0.0),
        ("softmax_scale", math.nan),
        ("softmax_scale", "1"),
        ("softmax_scale", -1.0),
        ("empty_lse", 0.0),
        ("empty_lse", None),
        ("validate", 2),
    ],
)
def test_options(option: str, value: Any) -> None:
    given = prefill().arrays
    with pytest.raises(InvalidArgumentError) as caught:
        mla_sparse_prefill(given.q, given.kv, given.indices, **{option: value})
    assert caught.value.argument == option


def test_a_stream_that_is_no_number() -> None:
    given = prefill().arrays
    with pytest.raises(InvalidArgumentError, match="stream"):
        mla_sparse_prefill(given.q, given.kv, given.indices, stream="0")


def test_nothing_is_written_on_a_refused_call() -> None:
    given = prefill().arrays
    out = np.full((6, 16, 512), 3, DTYPES["bfloat16"])
    with pytest.raises(InvalidArgumentError, match="lse"):
        mla_sparse_prefill(given.q, given.kv, given.indices, out=out, lse=cpu_zeros((5, 16), "float32"))
    assert (out == 3).all()
