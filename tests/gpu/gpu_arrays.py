"""Arrays on the GPU for the tests, by torch where it is installed and by CuPy otherwise, and float64 attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cases_dense import DenseCase

from cupy_mla import InvalidArgumentError
from cupy_mla.arrays.dtypes import numpy_dtype
from cupy_mla.call.memo import forget
from cupy_mla.decode import gathered, sparse_plan
from cupy_mla.kernels.choose import FAMILIES, GATHERED_FAMILIES, choose_gathered_config
from cupy_mla.kernels.narrow import NARROW16
from cupy_mla.lab.cases import Case
from cupy_mla.lab.libraries import CUPY, ArrayLibrary, TorchLibrary

try:
    import torch
except ImportError:
    torch = None
try:
    import cupy
except ImportError:
    cupy = None

DELAY_CYCLES = 100_000_000  # about 50 ms
NAN_BITS = 0x7FFF  # a NaN in bfloat16 and in float16


LIBRARY: ArrayLibrary = CUPY if torch is None else TorchLibrary()


def upload(array: np.ndarray) -> Any:
    """A contiguous copy on the GPU."""
    return LIBRARY.upload(np.ascontiguousarray(array))


def full(shape: tuple[int, ...], dtype: str, bits: int) -> Any:
    """An array on the GPU of 16-bit elements with the given bits."""
    array = LIBRARY.empty(shape, dtype)
    LIBRARY.fill(array, bits)
    return array


def empty(shape: tuple[int, ...], dtype: str) -> Any:
    """An array on the GPU that holds NaN."""
    if dtype != "float32":
        return full(shape, dtype, NAN_BITS)
    return upload(np.full(shape, np.nan, np.float32))


def as_e4m3(array: Any) -> Any:
    """Bytes on the GPU as e4m3."""
    return array.view(numpy_dtype("float8_e4m3fn") if torch is None else torch.float8_e4m3fn)


def stack(arrays: list[Any]) -> Any:
    """All of them along a new first axis."""
    if torch is None:
        result = cupy.empty((len(arrays), *arrays[0].shape), arrays[0].dtype)
        for index, array in enumerate(arrays):
            result[index] = array
        return result
    return torch.stack(arrays)


def assign(target: Any, source: Any) -> None:
    """target[...] = source, in place."""
    if source.dtype.itemsize == 2:
        LIBRARY.assign(target, source)
    else:
        target[...] = source


def download(array: Any) -> np.ndarray:
    """float64 values on the host."""
    return LIBRARY.download(array).astype(np.float64)


def bits_of(array: Any) -> np.ndarray:
    """The elements as integers, on the host: NaN equals NaN, and 0 differs from -0."""
    host = np.ascontiguousarray(LIBRARY.download(array))
    return host.view({2: np.uint16, 4: np.uint32}[host.dtype.itemsize])


def synchronize() -> None:
    """Wait for the GPU; raises what a kernel did wrong."""
    LIBRARY.synchronize()


def capture(work: Callable[[], object]) -> Callable[[], None]:
    """Capture what ``work`` launches in a CUDA graph (after one run of it); returns the replay, which waits."""
    if torch is None:
        stream = cupy.cuda.Stream(non_blocking=True)
        synchronize()
        with stream:
            work()
            stream.synchronize()
            stream.begin_capture()
            work()
            cupy_graph = stream.end_capture()

        def replay_cupy() -> None:
            synchronize()
            cupy_graph.launch(stream)
            stream.synchronize()

        return replay_cupy
    work()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay_torch() -> None:
        graph.replay()
        synchronize()

    return replay_torch


def attention(keys: np.ndarray, q: np.ndarray, latent_dim: int, scale: float, causal: bool) -> Any:
    """float64 out [seqlen_q, num_heads_q, latent_dim] and lse [seqlen_q, num_heads_q] of one request.

    keys [length, num_heads_kv, width] and q [seqlen_q, num_heads_q, width] as the call had them. Runs on the GPU with
    torch, with NumPy otherwise.
    """
    seqlen_q, num_heads_q, width = q.shape
    length, num_heads_kv, _ = keys.shape
    out = np.zeros((seqlen_q, num_heads_q, latent_dim))
    lse = np.full((seqlen_q, num_heads_q), -np.inf)
    if length == 0 or seqlen_q == 0:
        return out, lse
    xp: Any = np if torch is None else torch

    def exact(array: np.ndarray) -> Any:
        return array.astype(np.float64) if torch is None else upload(array).double()

    group = num_heads_q // num_heads_kv
    visible = np.full(seqlen_q, length)
    if causal:
        visible = np.clip(length - seqlen_q + np.arange(seqlen_q) + 1, 0, length)
    row_visible = exact(np.repeat(visible, group)[:, None].astype(np.float32))
    positions = exact(np.arange(length, dtype=np.float32)[None, :])
    for kv_head in range(num_heads_kv):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        head_keys = exact(keys[:, kv_head])
        head_q = exact(q[:, heads].reshape(seqlen_q * group, width))
        scores = xp.where(positions < row_visible, scale * (head_q @ head_keys.T), -np.inf)
        top = xp.amax(scores, -1)
        top = xp.where(top > -np.inf, top, 0.0)
        weights = xp.exp(scores - top[:, None])
        total = weights.sum(-1)
        values = weights @ head_keys[:, :latent_dim] / xp.where(total > 0, total, 1.0)[:, None]
        with np.errstate(divide="ignore"):
            logarithm = top + xp.log(total)
        if torch is not None:
            values, logarithm = values.cpu().numpy(), logarithm.cpu().numpy()
        out[:, heads] = values.reshape(seqlen_q, group, latent_dim)
        lse[:, heads] = logarithm.reshape(seqlen_q, group)
    return out, lse


def keys_of(case: DenseCase, arrays: Case, request: int, length: int) -> np.ndarray:
    """The keys of a request, [length, num_heads_kv, width]."""
    tokens = np.arange(length)
    pages = arrays.block_table[request, tokens // case.page_size]
    return arrays.kv_cache[pages, tokens % case.page_size]


def expected(
    case: DenseCase, arrays: Case, lengths: tuple[int, ...] | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What `attention` gives for each request of a case, for its own lengths or others."""
    results = []
    row = 0
    for request, length in enumerate(case.lengths if lengths is None else lengths):
        seqlen_q = case.seqlen_q_of(request)
        q = arrays.q[row : row + seqlen_q] if case.ragged else arrays.q[request]
        row += seqlen_q
        keys = keys_of(case, arrays, request, length)
        results.append(attention(keys, q, case.latent_dim, case.scale, case.causal))
    return results


@contextlib.contextmanager
def delayed_stream() -> Iterator[int]:
    """A stream that is busy for a while before what is queued on it; waited for at the end."""
    if torch is not None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(DELAY_CYCLES)
        yield stream.cuda_stream
    else:
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            values = cupy.ones((8192, 8192), np.float32)
            for _ in range(8):
                values = values @ values
        yield stream.ptr
    stream.synchronize()


def allocate(size: int) -> Any:
    """So many bytes from the allocator, as the current stream gets them."""
    return cupy.empty(size, np.uint8) if torch is None else torch.empty(size, dtype=torch.uint8, device="cuda")


def skip_where_not_refined(kernel: str, rows: int) -> None:
    """Skips a test with more rows of a kv head than the kernel of this name, or the one that is chosen, refines."""
    named = [family for family in (*FAMILIES, *GATHERED_FAMILIES) if family.name == kernel]
    most = (named or [NARROW16])[0].refined_rows
    if rows > most:
        pytest.skip(f"more than the {most} rows of which {kernel} keeps what bf16 leaves out of probabilities")


def on_gathered_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """For a fixture: sparse attention runs on the kernel of this name, whatever would be chosen. A test whose call it
    does not serve is skipped."""

    def choose(problem: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return choose_gathered_config(problem, *arguments, **{**options, "kernel": kernel})
        except InvalidArgumentError as error:
            pytest.skip(f"{kernel}: {error}")

    for module in (gathered, sparse_plan):
        monkeypatch.setattr(module, "choose_gathered_config", choose)
    forget()
    yield kernel
    forget()
