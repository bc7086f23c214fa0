"""Arrays in and out: NumPy, torch, JAX, other DLPack objects, and CuPy's descriptions (which need no GPU)."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_mla.arrays.dtypes import ITEM_SIZES, numpy_dtype
from cupy_mla.arrays.exchange import as_numpy, empty_like, finish
from cupy_mla.arrays.frameworks import framework_of
from cupy_mla.arrays.view import ArrayView, contiguous_strides, source_of, view
from cupy_mla.errors import InvalidArgumentError

BF16 = np.dtype(ml_dtypes.bfloat16)
FAKE_POINTER = 1 << 30


def fake_cupy_array(shape: tuple[int, ...], dtype: Any, **options: Any) -> Any:
    """A CuPy array over an address that is never read."""
    cupy = pytest.importorskip("cupy")
    memory = cupy.cuda.UnownedMemory(FAKE_POINTER, 1 << 20, None, device_id=1)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0), **options)


class OnlyDLPack:
    """An object of an unknown framework: DLPack and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class OnDevice:
    """Claims to be on a device of the given DLPack type."""

    def __init__(self, device_type: int) -> None:
        self.device_type = device_type

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("no memory here")

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device_type, 0


# --- NumPy


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32", "int64", "uint8", "float8_e4m3fn"])
def test_numpy_view(dtype: str):
    array = np.zeros((3, 4, 5), numpy_dtype(dtype))[:, 1:3]
    described = view(array, "q")
    assert described.pointer == array.ctypes.data
    assert described.shape == (3, 2, 5)
    assert described.strides == (20, 5, 1)
    assert described.dtype == dtype
    assert described.location == ("cpu", 0)
    assert described.itemsize == array.itemsize
    assert described.ndim == 3
    assert source_of(described) is array
    assert as_numpy(described) is array


def test_numpy_negative_and_broadcast_strides():
    assert view(np.zeros((4, 6), np.float32)[::-2], "q").strides == (-12, 1)
    assert view(np.broadcast_to(np.float32(1), (4, 6)), "q").strides == (0, 0)


def test_numpy_subclasses_count_as_numpy(tmp_path: Any):
    mapped = np.memmap(tmp_path / "cache", np.float16, "w+", shape=(4, 8))
    assert framework_of(mapped) == "numpy"
    assert view(mapped, "q").shape == (4, 8)


def test_numpy_refuses_foreign_byte_order_and_odd_types():
    with pytest.raises(InvalidArgumentError, match="byte order"):
        view(np.zeros(3, ">f4"), "q")
    with pytest.raises(InvalidArgumentError, match="complex64"):
        view(np.zeros(3, np.complex64), "q")
    with pytest.raises(InvalidArgumentError, match="object"):
        view(np.array([None]), "q")
    with pytest.raises(InvalidArgumentError, match="whole elements"):
        view(np.zeros(4, [("flag", "u1"), ("value", "f4")])["value"], "q")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "uint8", "bool"])
def test_as_numpy_of_a_part_shares_memory(dtype: str):
    array = np.arange(24).reshape(4, 6).astype(numpy_dtype(dtype))
    whole = view(array, "q")
    part = ArrayView(whole.pointer + 2 * array.itemsize, (4, 3), whole.strides, dtype, "cpu", 0, array)
    values = as_numpy(part)
    assert values.dtype == array.dtype
    assert np.array_equal(values, array[:, 2:5])
    assert np.shares_memory(values, array)


def test_as_numpy_of_something_empty():
    assert as_numpy(ArrayView(0, (0, 3), (3, 1), "float32", "cpu", 0, None)).shape == (0, 3)


def test_as_numpy_keeps_the_memory_alive():
    values = as_numpy(ArrayView((array := np.arange(1000.0)).ctypes.data + 8, (999,), (1,), "float64", "cpu", 0, array))
    del array
    assert values.sum() == 999 * 500


# --- what is no array


@pytest.mark.parametrize("value", [None, 3, [1, 2], "text", np.float32(1), np.dtype("f4")], ids=repr)
def test_what_is_no_array_is_refused(value: Any):
    with pytest.raises(InvalidArgumentError) as caught:
        view(value, "block_table")
    assert caught.value.argument == "block_table"
    assert type(value).__name__ in str(caught.value)


@pytest.mark.parametrize("device_type", [4, 7, 10])  # OpenCL, Vulkan, ROCm
def test_other_devices_are_refused(device_type: int):
    with pytest.raises(InvalidArgumentError, match=f"DLPack device type {device_type}"):
        view(OnDevice(device_type), "q")


def test_failing_export_is_refused_with_its_reason():
    with pytest.raises(InvalidArgumentError, match="no memory here"):
        view(OnDevice(1), "q")


# --- any DLPack object


def test_dlpack_view():
    array = np.arange(24, dtype=np.float16).reshape(4, 6)[:, :5]
    obj = OnlyDLPack(array)
    described = view(obj, "q")
    assert framework_of(obj) == "dlpack"
    assert (described.shape, described.strides, described.dtype) == ((4, 5), (6, 1), "float16")
    assert described.pointer == array.ctypes.data
    assert source_of(described) is obj
    assert np.array_equal(as_numpy(described), array)
    assert isinstance(empty_like(obj, (2, 3), "bfloat16"), np.ndarray)
    result = np.zeros(3, np.float32)
    assert finish(obj, result) is result


def test_results_go_back_to_a_module_that_takes_dlpack():
    tvm_ffi = pytest.importorskip("tvm_ffi")
    given = tvm_ffi.from_dlpack(np.arange(3, dtype=np.float32))
    back = finish(given, empty_like(given, (2, 3), "float32"))
    assert isinstance(back, tvm_ffi.Tensor)
    assert back.shape == (2, 3)
    fallback = finish(given, np.zeros(3, BF16))  # NumPy exports no bfloat16
    assert isinstance(fallback, np.ndarray)


# --- torch


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32", "float8_e4m3fn", "uint8"])
def test_torch_view(dtype: str):
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(3, 4, 5, dtype=getattr(torch, dtype))[:, 1:3]
    described = view(tensor, "q")
    assert described.pointer == tensor.data_ptr()
    assert (described.shape, described.strides, described.dtype) == ((3, 2, 5), (20, 5, 1), dtype)
    assert type(described.shape) is tuple
    assert described.location == ("cpu", 0)
    assert described.owner is tensor
    assert framework_of(tensor) == "torch"


def test_torch_values_are_shared():
    torch = pytest.importorskip("torch")
    tensor = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)[:, 1:]
    values = as_numpy(tensor)
    assert values.dtype == BF16
    assert np.array_equal(values.astype(np.float32), tensor.float().numpy())
    values[0, 0] = 99
    assert tensor[0, 0] == 99


def test_torch_parameters_and_gradients():
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    assert view(parameter, "q").pointer == parameter.data_ptr()
    assert as_numpy(parameter).shape == (2, 3)
    result = empty_like(parameter, (2,), "float32")
    assert not result.requires_grad
    assert type(result) is torch.Tensor


def test_torch_results():
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(2, dtype=torch.bfloat16)
    result = empty_like(tensor, (2, 3), "float32")
    assert (tuple(result.shape), result.dtype, result.is_contiguous()) == ((2, 3), torch.float32, True)
    assert finish(tensor, result) is result


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_torch_tensors_without_memory_are_refused():
    torch = pytest.importorskip("torch")
    fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")
    refused = {"meta": torch.zeros(3, device="meta"), "sparse": torch.zeros(3, 3).to_sparse()}
    with fake_tensor.FakeTensorMode():
        refused["fake"] = torch.zeros(3)
    for tensor in refused.values():
        with pytest.raises(InvalidArgumentError) as caught:
            view(tensor, "kv_cache")
        assert caught.value.argument == "kv_cache"
    with pytest.raises(InvalidArgumentError, match="complex64"):
        view(torch.zeros(3, dtype=torch.complex64), "q")


# --- JAX


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32"])
def test_jax_round_trip(dtype: str):
    jax = pytest.importorskip("jax")
    with jax.default_device(jax.devices("cpu")[0]):
        array = jax.numpy.arange(24, dtype=dtype).reshape(4, 6)
    described = view(array, "q")
    assert framework_of(array) == "jax"
    assert (described.shape, described.strides, described.dtype) == ((4, 6), (6, 1), dtype)
    assert described.location == ("cpu", 0)
    assert source_of(described) is array
    assert np.array_equal(as_numpy(array), np.asarray(array))
    result = empty_like(array, (2, 3), dtype)
    result[...] = 7
    back = finish(array, result)
    assert isinstance(back, jax.Array)
    assert back.dtype == array.dtype
    assert back.devices() == array.devices()
    assert float(back.astype("float32").sum()) == 42


def test_jax_tracers_are_refused():
    jax = pytest.importorskip("jax")

    @jax.jit
    def traced(array: Any) -> Any:
        with pytest.raises(InvalidArgumentError) as caught:
            view(array, "q")
        assert caught.value.argument == "q"
        return array

    traced(np.zeros(3, np.float32))


# --- CuPy


def test_cupy_view():
    array = fake_cupy_array((3, 4, 8), BF16)[:, 1:3]
    described = view(array, "q")
    assert described.pointer == FAKE_POINTER + 8 * 2
    assert (described.shape, described.strides, described.dtype) == ((3, 2, 8), (32, 8, 1), "bfloat16")
    assert described.location == ("cuda", 1)
    assert framework_of(array) == "cupy"


# --- helpers


def test_item_sizes_agree_with_numpy():
    for name, size in ITEM_SIZES.items():
        assert numpy_dtype(name).itemsize == size
        assert numpy_dtype(name).name == name


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (2, 1, 5)])
def test_contiguous_strides(shape: tuple[int, ...]):
    assert contiguous_strides(shape) == tuple(step // 2 for step in np.zeros(shape, np.int16).strides)


def test_numpy_results():
    array = np.zeros(2, BF16)
    result = empty_like(array, (2, 3), "bfloat16")
    assert (result.shape, result.dtype) == ((2, 3), BF16)
    assert finish(array, result) is result


def test_no_framework_is_imported_for_numpy_arrays():
    code = (
        "import sys, numpy; from cupy_mla.arrays.view import view;"
        "from cupy_mla.arrays.exchange import empty_like, as_numpy;"
        "a = numpy.zeros(3, 'f4'); as_numpy(view(a, 'a')); empty_like(a, (2,), 'bfloat16');"
        "print(sorted({'torch', 'jax', 'cupy', 'tvm_ffi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
