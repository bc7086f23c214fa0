"""The plug-in inside vLLM: its own registry, checks, metadata builder and base classes, on the CPU, without its engine.

What a configuration holds is stood in for; everything else is vLLM's. Tested with the wheels of 0.22.1 and 0.33.0,
which are too large for every run of the tests: install one without its dependencies beside torch and transformers, then
what its interfaces import (cbor2 aiohttp requests openai-harmony openai pybase64 cachetools msgspec cloudpickle uvloop
py-cpuinfo prometheus_client xgrammar fastapi partial-json-parser llguidance einops; for 0.22.1 gguf and pyzmq too).
Without vLLM, the last test runs our part on stand-ins, as tests/gpu/test_vllm.py does in CUDA graphs.
"""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from cupy_mla.engines import vllm as plugin

torch = pytest.importorskip("torch")

import vllm_stand_in  # noqa: E402

HEADS, LATENT, ROPE = 4, 512, 64
WIDTH, BLOCK, SCALE = LATENT + ROPE, 64, 0.07
LAYER = "model.layers.0.self_attn.attn"


def test_nothing_of_vllm_is_imported_before_it_asks() -> None:
    script = "import sys; import cupy_mla.engines.vllm; print('vllm' in sys.modules, 'torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).split() == ["False", "False"]


def test_other_versions_of_vllm_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", None)
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert "cupy-mla has no backend for this version of vLLM" in caplog.text


@pytest.fixture
def backend() -> Any:
    pytest.importorskip("vllm")
    plugin.register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    yield AttentionBackendEnum.CUSTOM.get_class()
    AttentionBackendEnum.CUSTOM.clear_override()


def test_vllm_finds_the_backend_by_its_name(backend: Any) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    plugin.register()  # it is called in every process, and may be called again
    assert f"{backend.__module__}.{backend.__qualname__}" == plugin.BACKEND
    assert AttentionBackendEnum[backend.get_name()] is AttentionBackendEnum.CUSTOM
    register_backend(AttentionBackendEnum.CUSTOM, "of.another.Plugin")
    plugin.register()
    assert AttentionBackendEnum.CUSTOM.get_path() == "of.another.Plugin"


def reasons(backend: Any, **changes: Any) -> list[str]:
    """What vLLM finds wrong with a configuration that is right but for some changes."""
    from vllm.platforms.interface import DeviceCapability

    given = {
        "head_size": WIDTH, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": BLOCK, "use_mla": True,
        "device_capability": DeviceCapability(9, 0), "attn_type": "decoder", **changes,
    }  # fmt: skip
    given |= {name: False for name in inspect.signature(backend.validate_configuration).parameters if name not in given}
    return list(backend.validate_configuration(**given))


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"dtype": torch.float16}, {"kv_cache_dtype": "bfloat16"}, {"kv_cache_dtype": "fp8"},
        {"kv_cache_dtype": "fp8_e4m3"}, {"block_size": 128}, {"head_size": 320}, {"block_size": None},
    ],
    ids=str,
)  # fmt: skip
def test_configurations_that_are_taken(changes: dict[str, Any], backend: Any) -> None:
    assert reasons(backend, **changes) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_size": 128}, "head_size"),
        ({"dtype": torch.float32}, "dtype"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype"),
        ({"kv_cache_dtype": "fp8", "dtype": torch.float16}, "q: expected bfloat16"),
        ({"block_size": 16}, "block_size"),
        ({"use_mla": False}, "MLA"),
        ({"has_sink": True}, "sink"),
        ({"use_sparse": True}, "sparse"),
        ({"attn_type": "encoder"}, "encoder"),
        ({"device_capability": (10, 0)}, "compute capability"),
        ({"device_capability": (8, 9)}, "compute capability"),
    ],
    ids=str,
)
def test_configurations_that_are_not(changes: dict[str, Any], reason: str, backend: Any) -> None:
    from vllm.platforms.interface import DeviceCapability

    if "device_capability" in changes:
        changes = {"device_capability": DeviceCapability(*changes["device_capability"])}
    assert any(reason in text for text in reasons(backend, **changes))


def stand_in_manager(vllm_mla: Any) -> Any:
    """Of the ranks that share a context; versions from before there was one have none."""
    if not hasattr(vllm_mla, "MLADCPManager"):
        return None
    methods = {"__init__": lambda self: None, "init_kv_gather": lambda self, *_: None}
    return type("Manager", (vllm_mla.MLADCPManager,), methods)()


class Setting:
    """A backend's builder and attention of one layer, for a configuration."""

    def __init__(self, backend: Any, patch: pytest.MonkeyPatch, cache_dtype: str, graphs: bool, dcp: int) -> None:
        from vllm.model_executor.layers.attention import mla_attention as vllm_mla

        sizes = {"q_lora_rank": None, "kv_lora_rank": LATENT, "qk_nope_head_dim": 32, "qk_rope_head_dim": ROPE,
                 "v_head_dim": 32}  # fmt: skip
        model = SimpleNamespace(
            dtype=torch.bfloat16, max_model_len=1024, hf_text_config=SimpleNamespace(**sizes), is_deepseek_mla=True,
            get_num_attention_heads=lambda _: HEADS, get_head_size=lambda: WIDTH,
        )  # fmt: skip
        modes = SimpleNamespace(has_full_cudagraphs=lambda: graphs)
        prefill = SimpleNamespace(clone=lambda *_, **__: None)
        layers = {LAYER: SimpleNamespace(prefill_backend=prefill, dcp_manager=stand_in_manager(vllm_mla), **sizes)}
        config = SimpleNamespace(
            model_config=model, speculative_config=None, kv_transfer_config=None, quant_config=None,
            parallel_config=SimpleNamespace(
                cp_kv_cache_interleave_size=1, decode_context_parallel_size=dcp, prefill_context_parallel_size=1
            ),
            compilation_config=SimpleNamespace(cudagraph_mode=modes, static_forward_context=layers),
            scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64),
            cache_config=SimpleNamespace(block_size=BLOCK, cache_dtype=cache_dtype),
            attention_config=SimpleNamespace(use_prefill_query_quantization=False),
        )  # fmt: skip
        group = SimpleNamespace(world_size=dcp, rank_in_group=0)
        patch.setattr(vllm_mla, "get_dcp_group", lambda: group, raising=False)
        patch.setattr(vllm_mla, "get_current_vllm_config", lambda: config)
        spec = SimpleNamespace(block_size=BLOCK, kv_quant_mode=None, head_size=WIDTH, dtype=torch.bfloat16)
        self.builder = backend.get_builder_cls()(spec, [LAYER], config, torch.device("cpu"))
        self.attention = backend.get_impl_cls()(
            HEADS, WIDTH, SCALE, 1, None, None, cache_dtype, None, "decoder", None,
            **sizes, qk_head_dim=32 + ROPE, kv_b_proj=None,
        )  # fmt: skip

    def metadata(self, table: Any, seq_lens: Any, new: int, *, padding: int = 0) -> Any:
        """Of requests with as many new tokens each; the last ones fill up a CUDA graph."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        batch = len(seq_lens)
        starts = (torch.arange(batch + 1, dtype=torch.int32) * new).clamp(max=(batch - padding) * new)
        given: dict[str, Any] = {
            "query_start_loc": starts, "query_start_loc_cpu": starts, "seq_lens": seq_lens, "num_reqs": batch,
            "num_actual_tokens": batch * new, "max_query_len": new, "max_seq_len": int(seq_lens.max()),
            "block_table_tensor": table, "slot_mapping": torch.zeros(batch * new, dtype=torch.int64),
            "dcp_local_seq_lens": seq_lens, "seq_lens_cpu_upper_bound": seq_lens,
        }  # fmt: skip
        known = inspect.signature(CommonAttentionMetadata).parameters
        return self.builder.build(0, CommonAttentionMetadata(**{k: v for k, v in given.items() if k in known}))


@pytest.fixture
def make_setting(backend: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(cache_dtype: str = "auto", *, graphs: bool = False, dcp: int = 1) -> Setting:
        return Setting(backend, monkeypatch, cache_dtype, graphs, dcp)

    return make


def expected_of(q: Any, cache: Any, table: Any, seq_lens: Any, new: int) -> tuple[Any, Any]:
    """Out [tokens, heads, latent] and lse [tokens, heads], in float64; the new tokens are the last of each request."""
    outs, lses = [], []
    for request, length in enumerate(seq_lens.tolist()):
        keys = cache[table[request, : -(-length // BLOCK)].long()].flatten(0, 1)[:length].double()
        for token in range(new):
            seen = keys[: max(length - new + token + 1, 0)]
            scores = q[request * new + token].double() @ seen.T * SCALE
            outs.append(scores.softmax(-1) @ seen[:, :LATENT] if len(seen) else torch.zeros(len(q[0]), LATENT).double())
            lses.append(scores.logsumexp(-1))
    return torch.stack(outs), torch.stack(lses)


def make_batch(new: int, heads: int = HEADS) -> tuple[Any, Any, Any, Any]:
    """Queries, a cache with NaN where nothing may be read, its block table, and lengths; two are padding."""
    generator = torch.Generator().manual_seed(0)
    seq_lens = torch.tensor([150, 64, 7, 0, 0], dtype=torch.int32)
    table = torch.full((5, 16), -1, dtype=torch.int32)
    cache = torch.full((9, BLOCK, WIDTH), float("nan"), dtype=torch.bfloat16)
    free = iter([5, 0, 3, 8, 2])
    for request, length in enumerate(seq_lens.tolist()):
        for page in range(-(-length // BLOCK)):
            table[request, page] = next(free)
            used = min(BLOCK, length - page * BLOCK)
            cache[table[request, page], :used] = torch.randn(used, WIDTH, generator=generator).bfloat16()
    q = torch.randn(5 * new, heads, WIDTH, generator=generator).bfloat16()
    return q, cache, table, seq_lens


def check(actual: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    (out, lse), (expected_out, expected_lse) = actual, expected
    assert out.shape == expected_out.shape
    assert lse.shape == expected_lse.shape
    assert lse.dtype == torch.float32
    assert ((out.double() - expected_out).norm() / expected_out.norm()) < 3e-3
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=0)  # -inf for what sees nothing
    assert (out[expected_lse.isneginf()] == 0).all()


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("parts", [2, 1])
def test_decodes_as_attention_does(new: int, parts: int, make_setting: Any) -> None:
    q, cache, table, seq_lens = make_batch(new)
    setting = make_setting()
    metadata = setting.metadata(table, seq_lens, new, padding=2)
    assert (metadata.num_decodes, metadata.num_prefills) == (5, 0)
    # The latent part as vLLM has it: of [heads, tokens, latent].
    latent = q[..., :LATENT].transpose(0, 1).contiguous().transpose(0, 1)
    given = (latent, q[..., LATENT:]) if parts == 2 else q
    actual = setting.attention.forward_mqa(given, cache, metadata, SimpleNamespace())
    check(actual, expected_of(q, cache, table, seq_lens, new))


@pytest.mark.parametrize("new", [1, 2])
def test_a_cache_of_e4m3(new: int, make_setting: Any) -> None:
    q, cache, table, seq_lens = make_batch(new)
    scale = torch.tensor(0.02)
    codes = (cache.float() / scale).to(torch.float8_e4m3fn)
    setting = make_setting("fp8")
    assert setting.attention.supports_quant_query_input is False
    metadata = setting.metadata(table, seq_lens, new, padding=2)
    given = (q[..., :LATENT], q[..., LATENT:])
    actual = setting.attention.forward_mqa(given, codes, metadata, SimpleNamespace(_k_scale=scale))
    check(actual, expected_of(q, codes.double() * 0.02, table, seq_lens, new))


def test_context_parallel_decode_gets_what_it_merges(make_setting: Any) -> None:
    """Heads of all ranks in one array; a rank without a token says so."""
    q, cache, table, seq_lens = make_batch(1, heads=2 * HEADS)
    setting = make_setting(dcp=2)
    assert setting.attention.can_return_lse_for_decode
    assert setting.builder.reorder_batch_threshold == 1
    metadata = setting.metadata(table, seq_lens, 1, padding=2)
    out, lse = setting.attention.forward_mqa(q, cache, metadata, SimpleNamespace())
    check((out, lse), expected_of(q, cache, table, seq_lens, 1))
    assert lse.isneginf().any()


def test_plans_of_graphs_stay_in_place(make_setting: Any) -> None:
    """A graph reads the plan of its shape where it was when the graph was captured."""
    _, _, table, seq_lens = make_batch(1)
    setting = make_setting(graphs=True)
    first = setting.metadata(table, seq_lens, 1).decode.plan
    other = setting.metadata(table[:2], seq_lens[:2], 1).decode.plan
    again = setting.metadata(table.flip(0), seq_lens.flip(0), 1).decode.plan
    assert again is first
    assert other is not first
    assert make_setting().builder._plans == {}


def test_what_is_refused(make_setting: Any, backend: Any) -> None:
    make_setting()
    arguments = [HEADS, WIDTH, SCALE, 1, None, None, "auto", None, "decoder", None]
    for place, value, name in ((5, 128, "sliding_window"), (7, 30.0, "logits_soft_cap"), (8, "encoder", "encoder")):
        changed = [*arguments[:place], value, *arguments[place + 1 :]]
        with pytest.raises(NotImplementedError, match=name):
            backend.get_impl_cls()(
                *changed, q_lora_rank=None, kv_lora_rank=LATENT, qk_nope_head_dim=32, qk_rope_head_dim=ROPE,
                v_head_dim=32, qk_head_dim=96, kv_b_proj=None,
            )  # fmt: skip


@pytest.mark.parametrize("new", [1, 3])
def test_our_part_on_stand_ins(new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = vllm_stand_in.make(monkeypatch, heads=HEADS, scale=SCALE)
    q, cache, table, seq_lens = make_batch(new)
    metadata = stand_in.metadata(table, seq_lens, new)
    actual = stand_in.attention.forward_mqa((q[..., :LATENT], q[..., LATENT:]), cache, metadata, SimpleNamespace())
    check(actual, expected_of(q, cache, table, seq_lens, new))
