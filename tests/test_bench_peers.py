"""The adapters of other implementations: found or not, refused cases, and the arrays they pass and hand back.

The packages themselves are not needed. Stand-ins with their functions' signatures compute in float64 from exactly what
an adapter passes, so that a wrong page list, axis, mask or scale shows in the numbers.
"""

from __future__ import annotations

import lzma
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases_dense import DenseCase, exact_decode, frobenius_error

from cupy_mla import InvalidArgumentError
from cupy_mla.bench.grid import BenchCase
from cupy_mla.bench.inputs import Inputs
from cupy_mla.bench.peers import PEER_NAMES, add_peers_path, available_peers
from cupy_mla.bench.peers.base import Peer, import_first, installed_version
from cupy_mla.bench.peers.fa3 import PackagePeer, VllmPeer, load
from cupy_mla.bench.peers.flash_mla import FlashMlaPeer
from cupy_mla.bench.peers.flashinfer import FlashInferPeer
from cupy_mla.bench.peers.torch_sdpa import TorchPeer
from cupy_mla.bench.torch_reference import attention64
from cupy_mla.lab.libraries import TorchLibrary
from cupy_mla.layouts import FP8_DS_MLA

MAX_ERROR = 3e-3  # of a bfloat16 result, as the contract has it
MAX_LSE_ERROR = 1e-6  # the stand-ins compute in float64 and round to float32
ALL_PACKAGES = ("flash_mla", "flash_attn_interface", "flashinfer", "vllm")

PLAIN = DenseCase(lengths=(140, 64, 1))
CASES = {
    "plain": PLAIN,
    "one": DenseCase(lengths=(200,)),
    "equal": DenseCase(lengths=(70, 70)),  # no mask
    "empty": DenseCase(lengths=(0, 100, 0)),
    "two_tokens": DenseCase(lengths=(130, 65), seqlens_q=2),
    "causal": DenseCase(lengths=(130, 2, 1, 0), seqlens_q=3, causal=True),  # with queries that see nothing
    "causal_one": DenseCase(lengths=(3, 64), causal=True),
    "ragged": DenseCase(lengths=(130, 20, 64), seqlens_q=(2, 0, 3)),
    "ragged_causal": DenseCase(lengths=(130, 2, 64), seqlens_q=(1, 4, 3), causal=True),
    "few_heads": DenseCase(lengths=(33, 80), num_heads_q=3),
    "fp16": DenseCase(lengths=(90, 30), dtype="float16"),
    "page_16": DenseCase(lengths=(100, 16, 15), page_size=16),
    "page_1": DenseCase(lengths=(20, 3), page_size=1),
    "scale": DenseCase(lengths=(50, 60), softmax_scale=0.1),
    "pool": DenseCase(lengths=(140, 64), padded=True),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass(frozen=True)
class PeerArrays:
    """What `cupy_mla.bench.inputs.Inputs` has, with a poisoned cache."""

    case: BenchCase
    spec: DenseCase
    q: Any
    block_table: Any
    cache_seqlens: Any
    cu_seqlens_q: Any
    caches: list[Any]
    exact: tuple[np.ndarray, np.ndarray]


def build(dense: DenseCase, device: str = "cpu", storage: str = "packed") -> PeerArrays:
    arrays = dense.build()
    case = BenchCase(
        batch=len(dense.lengths),
        lengths=dense.lengths,
        num_heads_q=dense.num_heads_q,
        seqlen_q=1 if dense.ragged else dense.seqlens_q,
        dtype=dense.dtype,
        page_size=dense.page_size,
        storage="strided" if dense.padded else storage,
        causal=dense.causal,
        ragged=dense.seqlens_q if dense.ragged else None,
    )
    library = TorchLibrary(device)
    cache = library.upload(arrays.kv_cache)
    if storage == "split":
        cache = cache[..., : dense.latent_dim].contiguous(), cache[..., dense.latent_dim :].contiguous()
    return PeerArrays(
        case=case,
        spec=dense,
        q=library.upload(np.ascontiguousarray(arrays.q)),
        block_table=library.upload(arrays.block_table),
        cache_seqlens=library.upload(arrays.cache_seqlens),
        cu_seqlens_q=None if arrays.cu_seqlens_q is None else library.upload(arrays.cu_seqlens_q),
        caches=[cache],
        exact=exact_decode(dense, arrays),
    )


def check(peer: Peer, inputs: PeerArrays, has_lse: bool = True) -> None:
    assert peer.unsupported(inputs.case) is None
    out, lse = peer.prepare(inputs)(inputs.caches[0])
    exact_out, exact_lse = inputs.exact
    assert out.dtype == inputs.q.dtype
    assert tuple(out.shape) == exact_out.shape
    assert frobenius_error(out.double().cpu().numpy(), exact_out) < MAX_ERROR
    assert (lse is not None) == has_lse
    if has_lse:
        np.testing.assert_allclose(lse.double().cpu().numpy(), exact_lse, rtol=MAX_LSE_ERROR, atol=MAX_LSE_ERROR)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_torch_peer(name: str, device: str) -> None:
    pytest.importorskip("torch")
    check(TorchPeer("any"), build(CASES[name], device), has_lse=False)


@pytest.mark.parametrize("device", DEVICES)
def test_torch_peer_with_separate_parts(device: str) -> None:
    pytest.importorskip("torch")
    check(TorchPeer("any"), build(PLAIN, device, storage="split"), has_lse=False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PEER_NAMES)
def test_real_peer_in_a_graph(name: str) -> None:
    torch = pytest.importorskip("torch")
    peer = available_peers([name])[name]
    if isinstance(peer, str):
        pytest.skip(f"{name}: {peer}")
    inputs = build(DenseCase(lengths=(1000, 64, 300), seqlens_q=2, causal=True, poison=False), "cuda")
    # Peers may read pages that a table's padding names.
    columns = torch.arange(inputs.block_table.shape[1], device="cuda")
    used = torch.tensor(inputs.spec.page_counts, device="cuda")[:, None]
    inputs.block_table.masked_fill_(columns >= used, 0)
    call = peer.prepare(inputs)
    call(inputs.caches[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = call(inputs.caches[0])
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert frobenius_error(out.double().cpu().numpy(), inputs.exact[0]) < MAX_ERROR


def attention_over_pages(
    query: tuple[Any, Any],
    cache: tuple[Any, Any],
    pages: list[Any],
    lengths: Any,
    starts: Any,
    scale: float,
    causal: bool,
) -> tuple[Any, Any]:
    """out [total_q, h, latent_dim] and lse [h, total_q] from (latent, rope) pairs, request by request."""
    import torch

    outs, lses = [], []
    for request, length in enumerate(lengths.tolist()):
        rows = slice(int(starts[request]), int(starts[request + 1]))
        keys = torch.cat([part[pages[request].long()].flatten(0, -2)[:length] for part in cache], -1)
        q = torch.cat([part[rows] for part in query], -1)
        out, lse = attention64(q, keys, scale, query[0].shape[-1], causal)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs).to(query[0].dtype), torch.cat(lses, 1).float()


class FlashMlaStandIn:
    """Both generations of ``get_mla_metadata``: a tensor made from the arguments, or an object filled later."""

    def __init__(self, current: bool) -> None:
        self.current = current

    def get_mla_metadata(self, *arguments: Any) -> tuple[Any, Any]:
        if self.current:
            return SimpleNamespace(calls=0), None
        cache_seqlens, heads_per_key, num_heads_k = arguments
        return SimpleNamespace(calls=0, heads_per_key=heads_per_key), cache_seqlens.cumsum(0) * num_heads_k

    def flash_mla_with_kvcache(
        self,
        q: Any,
        k_cache: Any,
        block_table: Any,
        cache_seqlens: Any,
        head_dim_v: int,
        tile_scheduler_metadata: Any,
        num_splits: Any = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        is_fp8_kvcache: bool = False,
        indices: Any = None,
    ) -> tuple[Any, Any]:
        import torch

        assert (num_splits is None) == self.current
        tile_scheduler_metadata.calls += 1
        if indices is not None:
            assert is_fp8_kvcache
            assert block_table is None
            assert k_cache.dtype == torch.float8_e4m3fn
            stored = k_cache.view(torch.uint8).numpy()
            keys = torch.from_numpy(FP8_DS_MLA.dequantise(stored)).flatten(0, 2)
            out, lse = attention_to_tokens(q.flatten(0, 1), keys, indices.flatten(0, 1), softmax_scale, head_dim_v)
            return out.view(*q.shape[:-1], head_dim_v), lse.view(*q.shape[:-1]).transpose(1, 2)
        batch, seqlen_q, heads, _ = q.shape
        if not self.current:
            assert tile_scheduler_metadata.heads_per_key == seqlen_q * heads
        flat = q.flatten(0, 1)
        out, lse = attention_over_pages(
            (flat[..., :head_dim_v], flat[..., head_dim_v:]),
            (k_cache[..., :head_dim_v], k_cache[..., head_dim_v:]),
            list(block_table.clamp(0, len(k_cache) - 1)),
            cache_seqlens,
            torch.arange(batch + 1) * seqlen_q,
            softmax_scale,
            causal,
        )
        return out.view(batch, seqlen_q, heads, head_dim_v), lse.view(heads, batch, seqlen_q).transpose(0, 1)

    def flash_mla_sparse_fwd(self, q: Any, kv: Any, indices: Any, sm_scale: float) -> tuple[Any, Any, Any]:
        assert kv.shape[1] == indices.shape[1] == 1
        out, lse = attention_to_tokens(q, kv[:, 0], indices[:, 0], sm_scale, 512)
        return out, None, lse


def attention_to_tokens(q: Any, keys: Any, indices: Any, scale: float, head_dim_v: int) -> tuple[Any, Any]:
    """out [n, h, head_dim_v] and lse [n, h] of query tokens [n, h, d], each with its own rows of keys [slots, d]."""
    import torch

    results = [
        attention64(query[None], keys[chosen[chosen >= 0].long()], scale, head_dim_v, False)
        for query, chosen in zip(q, indices, strict=True)
    ]
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs).to(q.dtype), torch.cat(lses, 1).T.float()


class Fp8StandIn:
    """vLLM's operators for e4m3 caches."""

    def get_mla_decoding_metadata_dense_fp8(self, lengths: Any, rows: int, num_heads_k: int) -> tuple[Any, Any]:
        assert num_heads_k == 1
        return rows, lengths

    def fwd_kvcache_mla_fp8(
        self,
        q: Any,
        kcache: Any,
        head_size_v: int,
        seqlens_k: Any,
        block_table: Any,
        softmax_scale: float,
        is_causal: bool,
        tile_scheduler_metadata: Any,
        num_splits: Any,
        descale_q: Any,
        descale_k: Any,
    ) -> list[Any]:
        import torch

        assert q.dtype == kcache.dtype == torch.float8_e4m3fn
        batch, seqlen_q, heads, _ = q.shape
        assert tile_scheduler_metadata == seqlen_q * heads
        cache = kcache.float() * descale_k
        values = (q.float() * descale_q).flatten(0, 1)
        out, lse = attention_over_pages(
            (values[..., :head_size_v], values[..., head_size_v:]),
            (cache[..., :head_size_v], cache[..., head_size_v:]),
            list(block_table),
            seqlens_k,
            torch.arange(batch + 1) * seqlen_q,
            softmax_scale,
            is_causal,
        )
        out = out.to(torch.bfloat16).view(batch, seqlen_q, heads, head_size_v)
        return [out, lse.view(heads, batch, seqlen_q).transpose(0, 1)]


def check_by_inputs(peer: Peer, max_error: float, max_lse_error: float, **values: Any) -> None:
    """On the arrays that the benchmark itself makes."""
    pytest.importorskip("torch")
    inputs = Inputs(bench_case(**values), TorchLibrary("cpu"))
    assert peer.unsupported(inputs.case) is None
    error, lse_error = inputs.errors(*peer.prepare(inputs)(inputs.caches[-1]))
    assert 0 < error < max_error
    assert lse_error < max_lse_error


def test_flash_mla_peer_over_an_e4m3_cache() -> None:
    peer = FlashMlaPeer(FlashMlaStandIn(True), "any", Fp8StandIn())
    values = {"batch": 3, "lengths": (70, 130, 1), "seqlen_q": 2, "causal": True, "layout": "fp8_e4m3"}
    check_by_inputs(peer, 0.1, 0.1, **values)  # queries are e4m3 too
    assert "only vLLM's copy" in str(FlashMlaPeer(None, "any").unsupported(bench_case(**values)))


def test_flash_mla_peer_of_sparse_decode() -> None:
    peer = FlashMlaPeer(FlashMlaStandIn(True), "any")
    values = {"lengths": (70, 200), "seqlen_q": 2, "num_heads_q": 64, "topk": 128, "layout": "fp8_ds_mla"}
    check_by_inputs(peer, MAX_ERROR, MAX_LSE_ERROR, **values)


@pytest.mark.parametrize("rope_dim", [64, 0])
def test_flash_mla_peer_of_sparse_prefill(rope_dim: int) -> None:
    peer = FlashMlaPeer(FlashMlaStandIn(True), "any")
    values = {"batch": 1, "lengths": 90, "seqlen_q": 7, "topk": 128, "prefill": True, "rope_dim": rope_dim}
    check_by_inputs(peer, MAX_ERROR, MAX_LSE_ERROR, **values)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fa3_peer_of_sparse_decode(dtype: str, vllm_operators: Any) -> None:
    for peer in (PackagePeer(Fa3StandIn()), VllmPeer(vllm_operators)):
        values = {"lengths": (70, 200), "seqlen_q": 2, "topk": 100, "dtype": dtype, "page_size": 16}
        check_by_inputs(peer, MAX_ERROR, MAX_LSE_ERROR, **values)


@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("name", ["plain", "two_tokens", "causal", "few_heads", "fp16", "scale", "pool"])
def test_flash_mla_peer(name: str, current: bool) -> None:
    pytest.importorskip("torch")
    check(FlashMlaPeer(FlashMlaStandIn(current), "any"), build(CASES[name]))


class FlashInferStandIn:
    """The wrapper, with FlashInfer's names; its lse is [total_q, h]."""

    def __init__(
        self,
        float_workspace_buffer: Any,
        use_cuda_graph: bool,
        qo_indptr: Any,
        kv_indptr: Any,
        kv_indices: Any,
        kv_len_arr: Any,
        backend: str,
    ) -> None:
        assert use_cuda_graph
        assert backend == "fa3"
        self.buffers = (qo_indptr, kv_indptr, kv_indices, kv_len_arr)

    def plan(
        self,
        qo_indptr: Any,
        kv_indptr: Any,
        kv_indices: Any,
        kv_len_arr: Any,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: Any,
        kv_data_type: Any,
    ) -> None:
        for reserved, given in zip(self.buffers, (qo_indptr, kv_indptr, kv_indices, kv_len_arr), strict=True):
            assert reserved.dtype == given.dtype
            assert reserved.data_ptr() != given.data_ptr() or not given.numel()
            reserved.copy_(given)
        self.kv_data_type = kv_data_type
        self.shapes = (num_heads, head_dim_ckv, head_dim_kpe, page_size)
        self.scale, self.causal = sm_scale, causal

    def run(
        self,
        q_nope: Any,
        q_pe: Any,
        ckv_cache: Any,
        kpe_cache: Any,
        out: Any,
        lse: Any,
        return_lse: bool,
        return_lse_base_on_e: bool,
        ckv_scale: float | None = None,
        kpe_scale: float | None = None,
    ) -> None:
        assert return_lse
        assert return_lse_base_on_e
        assert self.shapes == (q_nope.shape[1], q_nope.shape[2], q_pe.shape[2], ckv_cache.shape[1])
        assert self.kv_data_type == ckv_cache.dtype == kpe_cache.dtype
        assert (ckv_cache.itemsize == 1) == (ckv_scale is not None) == (kpe_scale is not None)
        if ckv_scale is not None:
            ckv_cache, kpe_cache = ckv_cache.float() * ckv_scale, kpe_cache.float() * kpe_scale
        starts, page_starts, pages, lengths = self.buffers
        found = attention_over_pages(
            (q_nope, q_pe),
            (ckv_cache, kpe_cache),
            [pages[page_starts[i] : page_starts[i + 1]] for i in range(len(lengths))],
            lengths,
            starts,
            self.scale,
            self.causal,
        )
        out.copy_(found[0])
        lse.copy_(found[1].T)


@pytest.mark.parametrize("storage", ["packed", "split"])
@pytest.mark.parametrize("name", CASES)
def test_flashinfer_peer(name: str, storage: str) -> None:
    pytest.importorskip("torch")
    check(FlashInferPeer(FlashInferStandIn, "any"), build(CASES[name], storage=storage))


class OldFlashInfer(FlashInferStandIn):
    """One that takes no scales of a cache."""

    def run(self, q_nope: Any, ckv_cache: Any) -> None:
        raise AssertionError


def test_flashinfer_peer_over_an_e4m3_cache() -> None:
    values = {"batch": 3, "lengths": (70, 130, 1), "seqlen_q": 2, "causal": True, "layout": "fp8_e4m3"}
    check_by_inputs(FlashInferPeer(FlashInferStandIn, "any"), MAX_ERROR, MAX_LSE_ERROR, **values)
    reason = FlashInferPeer(OldFlashInfer, "old").unsupported(bench_case(**values))
    assert reason == "layout fp8_e4m3: only bf16 and fp16"


class Fa3StandIn:
    """Its package's two functions: the rope part is q and k, the latent part qv and v."""

    def get_scheduler_metadata(
        self,
        batch_size: int,
        max_seqlen_q: int,
        max_seqlen_k: int,
        num_heads_q: int,
        num_heads_kv: int,
        headdim: int,
        cache_seqlens: Any,
        qkv_dtype: Any,
        headdim_v: int,
        cu_seqlens_q: Any,
        page_size: int,
        causal: bool,
        num_splits: int,
    ) -> tuple[Any, ...]:
        assert len(cu_seqlens_q) == len(cache_seqlens) + 1 == batch_size + 1
        assert num_heads_kv == 1
        assert max_seqlen_k >= int(cache_seqlens.max())
        return max_seqlen_q, num_heads_q, headdim, headdim_v, page_size, causal, qkv_dtype, num_splits

    def flash_attn_with_kvcache(
        self,
        q: Any,
        k_cache: Any,
        v_cache: Any,
        qv: Any,
        cache_seqlens: Any,
        page_table: Any,
        cu_seqlens_q: Any,
        max_seqlen_q: int,
        softmax_scale: float,
        causal: bool,
        scheduler_metadata: tuple[Any, ...],
        num_splits: int,
        return_softmax_lse: bool,
    ) -> tuple[Any, ...]:
        heads, page_size = q.shape[1], k_cache.shape[1]
        expected = (max_seqlen_q, heads, q.shape[2], v_cache.shape[3], page_size, causal, q.dtype, num_splits)
        assert scheduler_metadata == expected
        assert return_softmax_lse
        pages = list(page_table.clamp(0, len(k_cache) - 1))
        found = attention_over_pages(
            (qv, q), (v_cache, k_cache), pages, cache_seqlens, cu_seqlens_q, softmax_scale, causal
        )
        return (*found, None, None)


@pytest.mark.parametrize("storage", ["packed", "split"])
@pytest.mark.parametrize("name", CASES)
def test_fa3_peer_by_its_package(name: str, storage: str) -> None:
    pytest.importorskip("torch")
    check(PackagePeer(Fa3StandIn()), build(CASES[name], storage=storage))


# The operators of vLLM 0.22.
VLLM_METADATA_SCHEMA = """get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads,
    int num_heads_k, int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q,
    Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? leftpad_k, int? page_size,
    int max_seqlen_k_new, bool is_causal, int window_size_left, int window_size_right, bool has_softcap, int num_splits,
    bool? pack_gqa, int sm_margin) -> Tensor"""
VLLM_DECODE_SCHEMA = """fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor? out,
    Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k,
    int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k,
    Tensor? rotary_cos, Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale,
    Tensor? v_descale, float softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap,
    bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin,
    Tensor? s_aux, int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"""


@pytest.fixture(scope="module")
def vllm_operators() -> Iterator[Any]:
    """Operators with vLLM's schemas, so that torch itself checks the names and kinds of what is passed."""
    torch = pytest.importorskip("torch")
    library = torch.library.Library("cupy_mla_test_fa3", "DEF")
    library.define(VLLM_METADATA_SCHEMA)
    library.define(VLLM_DECODE_SCHEMA)

    def metadata(batch_size: int, max_seqlen_q: int, max_seqlen_k: int, num_heads: int, *rest: Any) -> Any:
        num_heads_k, headdim, headdim_v, _, lengths, starts, *_, num_splits, _, sm_margin = rest
        assert (num_heads_k, num_splits, sm_margin) == (1, 0, 0)
        assert max_seqlen_k == int(lengths.max())
        assert len(starts) == batch_size + 1
        return torch.tensor([max_seqlen_q, num_heads, headdim, headdim_v])

    def decode(*arguments: Any) -> list[Any]:
        q, k, v, _, _, q_v, _, starts = arguments[:8]
        lengths, max_seqlen_q, _, page_table = arguments[11:15]
        scale, causal, left, right, softcap = arguments[23:28]
        assert (left, right, softcap) == (-1, -1, 0.0)
        assert arguments[29].tolist() == [max_seqlen_q, q.shape[1], q.shape[2], v.shape[3]]
        pages = list(page_table.clamp(0, len(k) - 1))
        return list(attention_over_pages((q_v, q), (v, k), pages, lengths, starts, scale, causal))

    library.impl("get_scheduler_metadata", metadata, "CPU")
    library.impl("fwd", decode, "CPU")
    yield torch.ops.cupy_mla_test_fa3
    library._destroy()


@pytest.mark.parametrize("name", ["plain", "causal", "ragged_causal", "fp16"])
def test_fa3_peer_by_vllms_operators(name: str, vllm_operators: Any) -> None:
    check(VllmPeer(vllm_operators), build(CASES[name]))


def bench_case(**values: Any) -> BenchCase:
    return BenchCase(**{"batch": 2, "lengths": 100, "num_heads_q": 16, **values})


PEERS: dict[str, Peer] = {
    "flash_mla": FlashMlaPeer(None, "any"),
    "flashinfer": FlashInferPeer(FlashInferStandIn, "any"),
    "fa3": VllmPeer(None),
    "torch": TorchPeer("any"),
}


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("flash_mla", {"page_size": 32}, "page size 32"),
        ("flash_mla", {"storage": "split"}, "separate arrays"),
        ("flash_mla", {"ragged": (1, 2)}, "ragged"),
        ("flash_mla", {"latent_dim": 256}, "256 + 64"),
        ("fa3", {"rope_dim": 0}, "512 + 0"),
        ("fa3", {"latent_dim": 320}, "320 + 64"),
        ("flashinfer", {"latent_dim": 320}, "320 + 64"),
        ("flashinfer", {"rope_dim": 32}, "512 + 32"),
        ("flashinfer", {"latent_dim": 256, "layout": "fp8_e4m3"}, "256 + 64: only 512"),
        ("torch", {"lengths": 0}, "no cached token"),
        ("flash_mla", {"topk": 64}, "sparse decode over bf16: only fp8_ds_mla"),
        ("flash_mla", {"topk": 64, "layout": "fp8_ds_mla"}, "16 heads: only 64 or 128"),
        ("flash_mla", {"topk": 65, "layout": "fp8_ds_mla", "num_heads_q": 64}, "multiples of 64"),
        ("flash_mla", {"topk": 65, "prefill": True, "batch": 1}, "multiples of 128"),
        ("flash_mla", {"topk": 128, "prefill": True, "batch": 1, "num_heads_q": 12}, "12 heads"),
        ("flash_mla", {"topk": 128, "prefill": True, "batch": 1, "dtype": "float16"}, "over fp16: only bf16"),
        ("flash_mla", {"topk": 128, "prefill": True, "batch": 1, "latent_dim": 256}, "256 + 64"),
        ("flash_mla", {"layout": "fp8_ds_mla"}, "dense decode over fp8_ds_mla"),
        ("fa3", {"topk": 64, "prefill": True, "batch": 1}, "sparse prefill"),
        ("fa3", {"topk": 64, "layout": "fp8_ds_mla"}, "layout fp8_ds_mla"),
        ("fa3", {"layout": "fp8_e4m3"}, "layout fp8_e4m3: only bf16 and fp16"),
        ("flashinfer", {"topk": 64}, "sparse decode"),
        ("flashinfer", {"layout": "fp8_ds_mla"}, "layout fp8_ds_mla: only bf16 and fp16 and fp8_e4m3"),
        ("torch", {"topk": 64}, "sparse decode"),
    ],
)
def test_unsupported_cases_have_a_reason(name: str, values: dict[str, Any], words: str) -> None:
    peer = PEERS[name]
    assert peer.unsupported(bench_case()) is None
    reason = peer.unsupported(bench_case(**values))
    assert reason is not None
    assert words in reason


def test_every_peer_has_its_name() -> None:
    assert {peer.name for peer in PEERS.values()} == set(PEER_NAMES) == set(PEERS)


def test_unknown_peers_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"peer: expected one of flash_mla, .*, got 'flash_mlx'"):
        available_peers(["torch", "flash_mlx"])


def test_without_torch_no_peer_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    peers = available_peers(["torch", "fa3"])
    assert list(peers) == ["torch", "fa3"]
    assert all(isinstance(reason, str) and reason.startswith("needs torch: ") for reason in peers.values())


def torch_stand_in(cuda: bool) -> Any:
    torch = ModuleType("torch")
    torch.__version__ = "0.0"
    torch.cuda = SimpleNamespace(is_available=lambda: cuda)
    torch.ops = SimpleNamespace()
    return torch


def test_without_a_gpu_no_peer_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch_stand_in(cuda=False))
    assert set(available_peers().values()) == {"needs a CUDA device that torch sees"}


def forget_modules(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch_stand_in(cuda=True))
    for package in ALL_PACKAGES:
        forget_modules(monkeypatch, package)
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "path", [])
    peers = available_peers()
    assert list(peers) == list(PEER_NAMES)
    assert isinstance(peers["torch"], TorchPeer)
    assert peers["torch"].version == "0.0"
    for name, words in {
        "flash_mla": ("flash_mla", "vllm"),
        "fa3": ("flash_attn_interface", "vllm", "_vllm_fa3_C.abi3.so: FileNotFoundError"),
        "flashinfer": ("flashinfer",),
    }.items():
        reason = peers[name]
        assert isinstance(reason, str)
        assert reason.startswith("not importable: ")
        assert all(word in reason for word in words)


@pytest.fixture
def peers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that `add_peers_path` has put first; afterwards all is as before."""
    for package in ALL_PACKAGES:
        forget_modules(monkeypatch, package)
    monkeypatch.setattr(sys, "path", list(sys.path))
    add_peers_path(tmp_path)
    yield tmp_path
    for package in ALL_PACKAGES:
        for module in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[module]


def write(folder: Path, name: str, text: str = "") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_peers_are_found_in_a_folder(peers_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch_stand_in(cuda=True))
    for package in ("vllm", "vllm/third_party", "vllm/third_party/flashmla"):
        write(peers_folder, f"{package}/__init__.py")
    write(peers_folder, "vllm/third_party/flashmla/flash_mla_interface.py")
    write(peers_folder, "vllm-1.2.3.dist-info/METADATA", "Metadata-Version: 2.1\nName: vllm\nVersion: 1.2.3\n")
    write(peers_folder, "flashinfer/__init__.py", "__version__ = '4.5'\n")
    write(peers_folder, "flashinfer/mla.py", "class BatchMLAPagedAttentionWrapper: ...\n")
    write(peers_folder, "flash_attn_interface.py")
    peers = available_peers(["flashinfer", "flash_mla", "fa3"])
    assert isinstance(peers["flash_mla"], FlashMlaPeer)
    assert peers["flash_mla"].version == "vllm 1.2.3"
    assert isinstance(peers["flashinfer"], FlashInferPeer)
    assert peers["flashinfer"].version == "4.5"
    assert isinstance(peers["fa3"], PackagePeer)


def test_a_peer_that_breaks_on_import_is_not_there(peers_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch_stand_in(cuda=True))
    write(peers_folder, "flashinfer.py", "raise OSError('undefined symbol: x\\nand more')\n")
    assert available_peers(["flashinfer"]) == {"flashinfer": "not importable: OSError: undefined symbol: x"}


@pytest.mark.parametrize("packed", [False, True])
def test_a_loose_fa3_library_is_loaded(peers_folder: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    content = bytes(range(256)) * 99
    loaded: list[bytes] = []
    torch = torch_stand_in(cuda=True)

    def load_library(path: str) -> None:
        loaded.append(Path(path).read_bytes())
        torch.ops._vllm_fa3_C = SimpleNamespace(fwd=None)

    torch.ops.load_library = load_library
    monkeypatch.setitem(sys.modules, "torch", torch)
    for package in ("flash_attn_interface", "vllm"):
        monkeypatch.setitem(sys.modules, package, None)
    path = peers_folder / "_vllm_fa3_C.abi3.so"
    if packed:
        path.with_name(f"{path.name}.xz").write_bytes(lzma.compress(content))
    else:
        path.write_bytes(content)
    for _ in range(2):  # a second copy would register its operators again, which ends the process
        assert isinstance(load(), VllmPeer)
    assert loaded == [content]


def test_a_peers_path_must_be_a_folder(tmp_path: Path) -> None:
    before = list(sys.path)
    with pytest.raises(InvalidArgumentError, match="peers_path: expected a folder"):
        add_peers_path(tmp_path / "missing")
    assert sys.path == before


def test_import_first_takes_the_first_that_imports() -> None:
    assert import_first("no_such_module_anywhere", "json").__name__ == "json"
    with pytest.raises(ImportError, match=r"no_such_module_a: ModuleNotFoundError: .*; no_such_module_b: "):
        import_first("no_such_module_a", "no_such_module_b")


def test_versions_of_what_is_not_installed() -> None:
    assert installed_version("no-such-distribution", "pytest") == pytest.__version__
    assert installed_version("no-such-distribution") == "unknown"
