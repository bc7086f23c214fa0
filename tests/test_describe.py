"""Descriptions of decode calls, and the refusal of every kind of bad argument."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any

import numpy as np
import pytest
from cases_dense import DTYPES

from cupy_mla.arrays import view as arrays
from cupy_mla.arrays.exchange import as_numpy
from cupy_mla.arrays.view import ArrayView, contiguous_strides
from cupy_mla.call import describe, problem
from cupy_mla.call.describe import describe_decode
from cupy_mla.call.options import read_call
from cupy_mla.errors import InvalidArgumentError
from cupy_mla.layouts import BF16, DENSE_LAYOUTS

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


@dataclass
class Call:
    """Arguments of one call on the CPU or a pretended GPU; `with_` changes some of them."""

    q: Any
    kv_cache: Any
    block_table: Any
    cache_seqlens: Any
    options: dict[str, Any]

    def with_(self, **changes: Any) -> Call:
        fields = {
            name: changes.pop(name) for name in ("q", "kv_cache", "block_table", "cache_seqlens") & changes.keys()
        }
        return replace(self, **fields, options={**self.options, **changes})

    def describe(self) -> tuple[problem.DecodeProblem, problem.DecodeInputs]:
        return describe_decode(*read_call(self.q, self.kv_cache, self.block_table, self.cache_seqlens, **self.options))

    def refused(self) -> InvalidArgumentError:
        with pytest.raises(InvalidArgumentError) as caught:
            self.describe()
        return caught.value


def cpu_zeros(shape: tuple[int, ...], dtype: str = "bfloat16") -> np.ndarray:
    return np.zeros(shape, DTYPES.get(dtype, dtype))


def dense_call(make: Any = cpu_zeros) -> Call:
    """4 requests of 2 queries, 16 heads on 2 KV heads, 10 pages of 64, up to 6 pages a request."""
    return Call(
        make((4, 2, 16, 576)),
        make((10, 64, 2, 576)),
        make((4, 6), "int32"),
        make((4,), "int32"),
        {"head_dim_v": 512, "softmax_scale": None, "causal": False, "cu_seqlens_q": None},
    )


def ragged_call(make: Any = cpu_zeros) -> Call:
    return dense_call(make).with_(q=make((7, 16, 576)), cu_seqlens_q=make((5,), "int32"))


MAKERS = pytest.mark.parametrize("make", [cpu_zeros, GpuArray], ids=["cpu", "gpu"])


# --- good calls


@MAKERS
def test_dense_description(make: Any):
    described, inputs = dense_call(make).describe()
    queries = problem.Queries(
        batch=4,
        seqlen_q=2,
        total_q=8,
        num_heads_q=16,
        num_heads_kv=2,
        latent_dim=512,
        rope_dim=64,
        dtype="bfloat16",
        causal=False,
        ragged=False,
    )
    keys = problem.PagedKeys(page_size=64, max_pages_per_seq=6)
    assert described == problem.DecodeProblem(queries, keys, BF16)
    assert (queries.head_dim_qk, queries.head_dim_v, queries.group_heads) == (576, 512, 8)
    assert keys.max_seqlen_k == 384
    assert queries.default_softmax_scale == 576**-0.5
    assert queries.out_shape == (4, 2, 16, 512)
    assert queries.lse_shape == (4, 16, 2)
    assert inputs.num_pages == 10
    assert inputs.cu_seqlens_q is None
    assert inputs.location == inputs.kv_latent.location


@MAKERS
def test_ragged_description(make: Any):
    described, inputs = ragged_call(make).describe()
    queries = described.queries
    assert (queries.batch, queries.ragged, queries.total_q, queries.seqlen_q) == (4, True, 7, 7)
    assert queries.out_shape == (7, 16, 512)
    assert queries.lse_shape == (16, 7)
    assert inputs.q_latent.shape == (7, 16, 512)
    assert inputs.cu_seqlens_q is not None
    assert ragged_call(make).with_(max_seqlen_q=3).describe()[0].queries.seqlen_q == 3
    assert ragged_call(make).with_(max_seqlen_q=30).describe()[0].queries.seqlen_q == 7


def test_packed_arrays_are_split_without_a_copy():
    call = dense_call()
    _, inputs = call.describe()
    assert inputs.q_rope is not None
    assert inputs.kv_rope is not None
    assert inputs.q_latent.shape == (4, 2, 16, 512)
    assert inputs.q_rope.shape == (4, 2, 16, 64)
    assert inputs.kv_latent.shape == (10, 64, 2, 512)
    assert inputs.kv_rope.shape == (10, 64, 2, 64)
    call.kv_cache[3, 5, 1, 511] = 1
    call.kv_cache[3, 5, 1, 512] = 2
    call.q[1, 1, 7, 512] = 3
    assert as_numpy(inputs.kv_latent)[3, 5, 1, 511] == 1
    assert as_numpy(inputs.kv_rope)[3, 5, 1, 0] == 2
    assert as_numpy(inputs.q_rope)[1, 1, 7, 0] == 3


@MAKERS
@pytest.mark.parametrize("container", [tuple, list])
def test_pairs_describe_like_packed_arrays(make: Any, container: type):
    call = dense_call(make)
    q = container([make((4, 2, 16, 512)), make((4, 2, 16, 64))])
    kv = container([make((10, 64, 2, 512)), make((10, 64, 2, 64))])
    for changes in ({"q": q}, {"kv_cache": kv}, {"q": q, "kv_cache": kv}):
        described, inputs = call.with_(**changes).describe()
        assert described == call.describe()[0]
        assert inputs.q_rope is not None
        assert inputs.q_rope.shape == (4, 2, 16, 64)
        assert inputs.kv_rope is not None
        assert inputs.kv_rope.shape == (10, 64, 2, 64)


@MAKERS
@pytest.mark.parametrize("empty_rope", [False, True])
def test_no_rope_part(make: Any, empty_rope: bool):
    rope_q, rope_kv = (make((4, 2, 16, 0)), make((10, 64, 2, 0))) if empty_rope else (None, None)
    pair = dense_call(make).with_(q=(make((4, 2, 16, 512)), rope_q), kv_cache=(make((10, 64, 2, 512)), rope_kv))
    packed = dense_call(make).with_(q=make((4, 2, 16, 512)), kv_cache=make((10, 64, 2, 512)))
    for call in (pair, packed):
        described, inputs = call.describe()
        assert (described.queries.latent_dim, described.queries.rope_dim) == (512, 0)
        assert inputs.q_rope is None
        assert inputs.kv_rope is None


def test_the_same_kind_of_call_gives_the_same_problem():
    first, first_inputs = dense_call().describe()
    call = dense_call()
    second, second_inputs = call.describe()
    assert second is first
    assert second_inputs.q_latent.pointer == call.q.ctypes.data != first_inputs.q_latent.pointer
    assert dense_call().with_(causal=True).describe()[0].queries.causal
    with pytest.raises(FrozenInstanceError):
        first.queries.batch = 3  # type: ignore[misc]


def test_memory_of_past_calls_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(describe._checked, "most", 3)
    describe._checked.clear()
    for columns in range(1, 9):
        dense_call().with_(block_table=cpu_zeros((4, columns), "int32")).describe()
        assert len(describe._checked) <= 3


@pytest.mark.parametrize("strides", [(1, 7, 5, 1), (0, 0, 0, 1)])
def test_strides_of_single_entries_mean_nothing(strides: tuple[int, ...]):
    call = dense_call(GpuArray).with_(
        q=GpuArray((1, 1, 1, 576), strides=strides),
        kv_cache=GpuArray((1, 1, 1, 576), strides=strides),
        block_table=GpuArray((1, 1), "int32", strides=(7, 9)),
        cache_seqlens=GpuArray((1,), "int32", strides=(5,)),
    )
    _, inputs = call.describe()
    assert inputs.q_latent.strides == (576, 576, 576, 1)
    assert inputs.kv_latent.strides == (576, 576, 576, 1)


def test_strided_arrays_on_a_gpu():
    call = dense_call(GpuArray).with_(
        q=GpuArray((4, 2, 16, 576), strides=(40000, 16000, 640, 1)),
        kv_cache=GpuArray((10, 64, 2, 576), strides=(2**33, 1280, 640, 1), pointer=BASE + 16),
        block_table=GpuArray((4, 6), "int32", strides=(100, 1), pointer=BASE + 4),
    )
    _, inputs = call.describe()
    assert inputs.kv_rope is not None
    assert inputs.kv_rope.pointer == BASE + 16 + 512 * 2
    assert inputs.kv_rope.strides == (2**33, 1280, 640, 1)


@pytest.mark.parametrize("changes", [{"head_dim_v": np.int64(512)}, {"causal": np.True_}, {"softmax_scale": 1}])
def test_numpy_scalars_are_numbers(changes: dict[str, Any]):
    dense_call().with_(**changes).describe()


def test_the_cpu_takes_any_widths_and_alignment_if_asked_to():
    odd = np.zeros(10 * 5 * 36 + 1, np.float16)[1:].reshape(10, 5, 1, 36)
    call = dense_call().with_(q=cpu_zeros((4, 2, 3, 36), "float16"), kv_cache=odd, head_dim_v=31, strict=False)
    described, _ = call.describe()
    assert (described.queries.latent_dim, described.queries.rope_dim, described.keys.page_size) == (31, 5, 5)


# --- bad calls: what changes, the argument that is named, a piece of what is said to be expected

WRONG_ON_BOTH: list[tuple[str, Any, str, str]] = [
    # rank
    ("q rank", lambda make: {"q": make((4, 16, 576))}, "q", "4 dimensions"),
    ("q rank, ragged", lambda make: {"cu_seqlens_q": make((5,), "int32")}, "q", "3 dimensions"),
    ("kv rank", lambda make: {"kv_cache": make((10, 64, 576))}, "kv_cache", "4 dimensions"),
    ("table rank", lambda make: {"block_table": make((4,), "int32")}, "block_table", "2 dimensions"),
    ("lengths rank", lambda make: {"cache_seqlens": make((4, 1), "int32")}, "cache_seqlens", "1 dimensions"),
    (
        "starts rank",
        lambda make: {"q": make((7, 16, 576)), "cu_seqlens_q": make((1, 5), "int32")},
        "cu_seqlens_q",
        "1 dimensions",
    ),
    ("pair rank", lambda make: {"q": (make((4, 2, 16, 512)), make((4, 2, 64)))}, "q[1]", "4 dimensions"),
    ("no pair", lambda make: {"q": (make((4, 2, 16, 512)),)}, "q", "pair"),
    # shape
    ("no heads", lambda make: {"q": make((4, 2, 0, 576))}, "q", "no extent of 0"),
    ("no pages", lambda make: {"kv_cache": make((0, 64, 2, 576))}, "kv_cache", "no extent of 0"),
    ("no columns", lambda make: {"block_table": make((4, 0), "int32")}, "block_table", "no extent of 0"),
    ("kv width", lambda make: {"kv_cache": make((10, 64, 2, 640))}, "kv_cache", "width 576"),
    ("table batch", lambda make: {"block_table": make((5, 6), "int32")}, "block_table", "shape [4, "),
    ("lengths batch", lambda make: {"cache_seqlens": make((5,), "int32")}, "cache_seqlens", "shape [4]"),
    (
        "starts batch",
        lambda make: {"q": make((7, 16, 576)), "cu_seqlens_q": make((4,), "int32")},
        "cu_seqlens_q",
        "shape [5]",
    ),
    (
        "pair shapes",
        lambda make: {"kv_cache": (make((10, 64, 2, 512)), make((10, 64, 1, 64)))},
        "kv_cache[1]",
        "shape [10, 64, 2, ",
    ),
    (
        "pair without rope",
        lambda make: {"kv_cache": (make((10, 64, 2, 512)), None)},
        "kv_cache",
        "width 576 (512 latent + 64 rope)",
    ),
    # heads
    ("heads", lambda make: {"q": make((4, 2, 15, 576))}, "q", "2 KV heads divide"),
    # type
    ("q type", lambda make: {"q": make((4, 2, 16, 576), "float32")}, "q", "bfloat16 or float16"),
    ("kv type", lambda make: {"kv_cache": make((10, 64, 2, 576), "float16")}, "kv_cache", "bfloat16, the type of q"),
    ("kv bytes", lambda make: {"kv_cache": make((10, 64, 1, 585), "uint8")}, "kv_cache", "bfloat16, the type of q"),
    (
        "pair types",
        lambda make: {"q": (make((4, 2, 16, 512)), make((4, 2, 16, 64), "float16"))},
        "q[1]",
        "bfloat16",
    ),
    ("table type", lambda make: {"block_table": make((4, 6), "int64")}, "block_table", "int32"),
    ("lengths type", lambda make: {"cache_seqlens": make((4,), "int64")}, "cache_seqlens", "int32"),
    (
        "starts type",
        lambda make: {"q": make((7, 16, 576)), "cu_seqlens_q": make((5,), "int64")},
        "cu_seqlens_q",
        "int32",
    ),
    # options
    ("scale too large", lambda make: {"softmax_scale": 10**400}, "softmax_scale", "a finite number above 0"),
    ("scale that float32 lacks", lambda make: {"softmax_scale": 1e39}, "softmax_scale", "1e-37 to 1e+37"),
    ("scale that float32 takes for 0", lambda make: {"softmax_scale": 1e-46}, "softmax_scale", "1e-37 to 1e+37"),
    ("v too wide", lambda make: {"head_dim_v": 577}, "head_dim_v", "1 to 576"),
    ("v zero", lambda make: {"head_dim_v": 0}, "head_dim_v", "1 to 576"),
    ("v no integer", lambda make: {"head_dim_v": 512.0}, "head_dim_v", "an integer"),
    ("v is a flag", lambda make: {"head_dim_v": True}, "head_dim_v", "an integer"),
    (
        "v against pair",
        lambda make: {"q": (make((4, 2, 16, 448)), make((4, 2, 16, 128)))},
        "head_dim_v",
        "448, the width of q[0]",
    ),
    ("causal", lambda make: {"causal": "yes"}, "causal", "True or False"),
    ("causal number", lambda make: {"causal": 2}, "causal", "True or False"),
    ("scale 0", lambda make: {"softmax_scale": 0.0}, "softmax_scale", "above 0"),
    ("scale below 0", lambda make: {"softmax_scale": -0.1}, "softmax_scale", "above 0"),
    ("scale infinite", lambda make: {"softmax_scale": math.inf}, "softmax_scale", "finite"),
    ("scale nan", lambda make: {"softmax_scale": math.nan}, "softmax_scale", "finite"),
    ("scale array", lambda make: {"softmax_scale": np.ones(1)}, "softmax_scale", "a number"),
    ("scale text", lambda make: {"softmax_scale": "1"}, "softmax_scale", "a number"),
    ("bound 0", lambda make: {"max_seqlen_q": 0}, "max_seqlen_q", "1 or more"),
    ("bound unlike q", lambda make: {"max_seqlen_q": 3}, "max_seqlen_q", "2 as in q"),
    ("bound no integer", lambda make: {"max_seqlen_q": 2.0}, "max_seqlen_q", "an integer"),
    # no arrays
    ("q none", lambda make: {"q": None}, "q", "an array"),
    ("kv text", lambda make: {"kv_cache": "cache"}, "kv_cache", "an array"),
    ("pair of none", lambda make: {"q": (None, make((4, 2, 16, 64)))}, "q[0]", "an array"),
    ("lengths list", lambda make: {"cache_seqlens": [1, 2, 3, 4]}, "cache_seqlens", "an array"),
]


@MAKERS
@pytest.mark.parametrize(("change", "argument", "expected"), [pytest.param(*row, id=id) for id, *row in WRONG_ON_BOTH])
def test_bad_arguments_are_refused(make: Any, change: Any, argument: str, expected: str):
    changes = change(make)
    error = dense_call(make).with_(**changes).refused()
    assert error.argument == argument
    assert expected in error.expected
    assert error.got
    # A refused call must not be remembered as a good one.
    assert str(dense_call(make).with_(**changes).refused()) == str(error)


@pytest.mark.parametrize("name", ["q", "kv_cache"])
def test_last_dimensions_must_be_contiguous(name: str):
    array = getattr(dense_call(), name)
    spread = np.repeat(array, 2, axis=-1)[..., ::2]
    error = dense_call().with_(**{name: spread}).refused()
    assert (error.argument, error.expected) == (name, "a contiguous last dimension")


@pytest.mark.parametrize("name", ["block_table", "cache_seqlens"])
def test_index_arrays_must_be_contiguous(name: str):
    spread = np.repeat(getattr(dense_call(), name), 2, axis=-1)[..., ::2]
    error = dense_call().with_(**{name: spread}).refused()
    assert (error.argument, error.expected) == (name, "a contiguous last dimension")


def test_starts_must_be_contiguous():
    error = ragged_call().with_(cu_seqlens_q=cpu_zeros((10,), "int32")[::2]).refused()
    assert (error.argument, error.expected) == ("cu_seqlens_q", "a contiguous last dimension")


@MAKERS
@pytest.mark.parametrize(
    ("dtype", "width", "layout"), [("float8_e4m3fn", 584, "fp8_model1"), ("uint8", 288, "fp4_v41")]
)
def test_widths_that_a_layout_does_not_have_are_named(make: Any, dtype: str, width: int, layout: str):
    error = dense_call(make).with_(kv_cache=make((10, 64, 1, width), dtype)).refused()
    assert (error.argument, error.expected) == ("latent_dim+rope_dim", f"512+0 for {layout}")
    assert error.got == "512+64"


@MAKERS
def test_a_layout_in_doubt_has_to_be_named(make: Any):
    error = dense_call(make).with_(kv_cache=make((10, 64, 1, 528), "uint8")).refused()
    assert (error.argument, error.expected) == ("layout", "fp8_ds_mla_no_rope or fp8_v41")
    assert error.got == "None, and kv_cache of uint8 [..., 528] may be either"


@pytest.mark.parametrize("name", ["q", "kv_cache", "block_table", "cache_seqlens"])
def test_mixed_devices_are_refused(name: str):
    other_gpu = replace(getattr(dense_call(GpuArray), name), device_id=1)
    error = dense_call(GpuArray).with_(**{name: other_gpu}).refused()
    assert error.argument == ("kv_cache" if name == "q" else name)
    assert "cuda:1" in str(error)
    error = dense_call(GpuArray).with_(**{name: getattr(dense_call(), name)}).refused()
    assert error.argument == ("kv_cache" if name == "q" else name)
    assert "cpu" in str(error)


def test_mixed_devices_in_starts():
    error = ragged_call(GpuArray).with_(cu_seqlens_q=cpu_zeros((5,), "int32")).refused()
    assert (error.argument, error.got) == ("cu_seqlens_q", "one on cpu")


WRONG_ON_GPU: list[tuple[str, dict[str, Any], str, str]] = [
    ("q row stride", {"q": GpuArray((4, 2, 16, 576), strides=(18468, 9234, 577, 1))}, "q", "multiples of 8 elements"),
    ("q batch stride", {"q": GpuArray((4, 2, 16, 576), strides=(18436, 9216, 576, 1))}, "q", "multiples of 8"),
    ("q negative", {"q": GpuArray((4, 2, 16, 576), strides=(-18432, 9216, 576, 1))}, "q", "not negative"),
    (
        "kv page stride",
        {"kv_cache": GpuArray((10, 64, 2, 576), strides=(73732, 1152, 576, 1))},
        "kv_cache",
        "multiples of 8 elements (16 bytes)",
    ),
    (
        "kv token stride",
        {"kv_cache": GpuArray((10, 64, 2, 576), strides=(80000, 1156, 576, 1))},
        "kv_cache",
        "16 bytes",
    ),
    ("kv head stride", {"kv_cache": GpuArray((10, 64, 2, 576), strides=(80000, 1160, 580, 1))}, "kv_cache", "16 bytes"),
    ("kv far pages", {"kv_cache": GpuArray((10, 64, 2, 576), strides=(2**39, 1152, 576, 1))}, "kv_cache", "below"),
    ("q address", {"q": GpuArray((4, 2, 16, 576), pointer=BASE + 8)}, "q", "a multiple of 16 bytes"),
    ("kv address", {"kv_cache": GpuArray((10, 64, 2, 576), pointer=BASE + 2)}, "kv_cache", "a multiple of 16 bytes"),
    ("table address", {"block_table": GpuArray((4, 6), "int32", pointer=BASE + 2)}, "block_table", "4 bytes"),
    ("lengths address", {"cache_seqlens": GpuArray((4,), "int32", pointer=BASE + 1)}, "cache_seqlens", "4 bytes"),
    (
        "rope address",
        {"q": (GpuArray((4, 2, 16, 512)), GpuArray((4, 2, 16, 64), pointer=BASE + 4))},
        "q[1]",
        "a multiple of 16 bytes",
    ),
    (
        "kv rope address",
        {"kv_cache": (GpuArray((10, 64, 2, 512)), GpuArray((10, 64, 2, 64), pointer=BASE + 4))},
        "kv_cache[1]",
        "a multiple of 16 bytes",
    ),
    ("latent not 64 k", {"head_dim_v": 480}, "head_dim_v", "a multiple of 64 up to 512"),
    (
        "too wide together",
        {"q": GpuArray((4, 2, 16, 1088)), "kv_cache": GpuArray((10, 64, 2, 1088))},
        "q",
        "a width up to 1024",
    ),
    (
        "latent too wide",
        {"head_dim_v": 640, "q": GpuArray((4, 2, 16, 704)), "kv_cache": GpuArray((10, 64, 2, 704))},
        "head_dim_v",
        "NumPy backend",
    ),
    (
        "rope not 64 k",
        {"q": GpuArray((4, 2, 16, 544)), "kv_cache": GpuArray((10, 64, 2, 544))},
        "q",
        "a rope width that is a multiple of 64",
    ),
    ("page size", {"kv_cache": GpuArray((10, 24, 2, 576))}, "kv_cache", "a multiple of 16"),
    (
        "too many tokens",
        {"kv_cache": GpuArray((10, 2**29, 2, 576))},
        "block_table",
        "at most 3 pages",
    ),
]


@pytest.mark.parametrize(("changes", "argument", "expected"), [pytest.param(*row, id=id) for id, *row in WRONG_ON_GPU])
def test_what_the_kernels_cannot_take_is_refused(changes: dict[str, Any], argument: str, expected: str):
    dense_call(GpuArray).describe()  # known to be good: addresses must be looked at all the same
    error = dense_call(GpuArray).with_(**changes).refused()
    assert error.argument == argument
    assert expected in error.expected


@pytest.mark.parametrize("page_size", [1, 16, 32, 48, 64, 128])
@pytest.mark.parametrize(("latent_dim", "rope_dim"), [(512, 64), (512, 0), (256, 64)])
def test_what_the_kernels_can_take(page_size: int, latent_dim: int, rope_dim: int):
    width = latent_dim + rope_dim
    call = dense_call(GpuArray).with_(
        q=GpuArray((4, 2, 16, width)), kv_cache=GpuArray((10, page_size, 2, width)), head_dim_v=latent_dim
    )
    assert call.describe()[0].keys.page_size == page_size


# --- torch


def test_torch_arguments():
    torch = pytest.importorskip("torch")
    described, inputs = describe_decode(
        *read_call(
            torch.zeros(4, 2, 16, 576, dtype=torch.bfloat16),
            torch.zeros(10, 80, 2, 640, dtype=torch.bfloat16)[:, :64, :, :576],
            torch.zeros(4, 9, dtype=torch.int32)[:, :6],
            torch.zeros(4, dtype=torch.int32),
            head_dim_v=512,
            softmax_scale=0.1,
            causal=True,
            cu_seqlens_q=None,
        )
    )
    assert described == dense_call().with_(causal=True).describe()[0]
    assert inputs.kv_latent.strides == (80 * 2 * 640, 2 * 640, 640, 1)


# --- layouts


def test_token_bytes():
    assert set(DENSE_LAYOUTS) == {"bfloat16", "float16"}
    assert BF16.token_bytes(512, 64) == 1152
    assert BF16.token_bytes(256, 64, num_heads_kv=8) == 5120
