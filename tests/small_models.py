"""Small models of transformers with random weights, of every kind that can be enabled, and prompts for them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY, PAD = 120, 0
HEADS = 4
SIZES = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": VOCABULARY, "pad_token_id": PAD,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "kv_lora_rank": 128, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32, "v_head_dim": 48, "q_lora_rank": 40, "initializer_range": 0.1,
}  # fmt: skip
MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
DENSE = {"first_k_dense_replace": 2, **MOE}  # no experts: which of them are chosen may change with the last bit
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
HYBRID = {**MOE, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"],
          "mlp_layer_types": ["dense", "dense"]}  # fmt: skip
# Kind of model: what its configuration has beside SIZES.
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v2": DENSE,
    "deepseek_v3": {**DENSE, "rope_parameters": YARN},
    "glm4_moe_lite": {**MOE, "mlp_layer_types": ["dense", "dense"]},
    "youtu": {},
    "axk1": DENSE,
    "mistral4": {**DENSE, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
    "longcat_flash": {
        "num_layers": 1, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "n_routed_experts": 4, "moe_topk": 2,
        "zero_expert_num": 2,
    },
    "kimi_linear": {**HYBRID, "linear_num_heads": 2, "linear_head_dim": 16},
    "bailing_hybrid": {**HYBRID, "head_dim": 16},
}  # fmt: skip
# With an indexer, which sees the same in the first layer however attention is rounded; then its choice is the same too.
INDEXED = {**MOE, "index_n_heads": 2, "index_head_dim": 64, "index_topk": 24}
SPARSE_MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v32": {**INDEXED, "num_hidden_layers": 1, "mlp_layer_types": ["dense"]},
    "glm_moe_dsa": {**INDEXED, "mlp_layer_types": ["dense", "dense"], "indexer_types": ["full", "shared"]},
    "axk2": {**INDEXED, "num_hidden_layers": 1, "mlp_layer_types": ["dense"]},
}
# In float16; of the logits of a forward pass, as a share of their norm.
TOLERANCE = 6e-3
STEPS = 5  # new tokens behind the first, which comes of the prompt


def make_model(kind: str = "deepseek_v3", dtype: Any = torch.float16, attn: str = "eager", **others: Any) -> Any:
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    torch.manual_seed(0)
    given = {**SIZES, **MODELS.get(kind, {}), **SPARSE_MODELS.get(kind, {}), **others}
    config = transformers.CONFIG_MAPPING[kind](**given)
    model_class = next(getattr(module, name) for name in module.__all__ if name.endswith("ForCausalLM"))
    return model_class._from_config(config, dtype=dtype, attn_implementation=attn).eval()


def prompts(lengths: list[int]) -> dict[str, Any]:
    """Token ids of prompts of these lengths, padded on the left."""
    longest = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), longest), generator=torch.Generator().manual_seed(1))
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in lengths])
    return {"input_ids": ids.where(mask.bool(), torch.tensor(PAD)), "attention_mask": mask}


def generate(model: Any, inputs: dict[str, Any], tokens: int = STEPS + 1, **options: Any) -> Any:
    return model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip


def error(actual: Any, expected: Any) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())
