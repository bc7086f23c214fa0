"""A DeepSeek V3 of two layers with weights made so that it goes on with what repeats: its right tokens are known.

Each token has a code of random signs. In the first layer queries and keys are the same for all tokens, and the rope
alone makes each attend to the token before it, whose code goes into its state. In the second, a query is a token's own
code and a key the code of the token before: attention goes to what followed a token where it stood earlier, and the
last projection reads that token's code. The first token is so far ahead of the second that rounding does not change
it, so implementations of attention can be compared token by token, which random weights do not allow.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY, SPECIAL = 256, 2  # tokens, and the first of them, which no prompt has
CODE = 128  # width of a code, of a head's query without rope, and of its value
HIDDEN, LATENT, ROPE = 512, 512, 64
OWN, BEFORE, NEXT = (slice(part * CODE, (part + 1) * CODE) for part in range(3))  # codes in the state of a token
CONSTANT = 3 * CODE  # place in the state that is the same for all tokens
THETA = 10000.0
FAST = ROPE // 4  # pairs of the rope that turn fast enough to tell a token from its neighbours
LONGEST_PERIOD = 250


def write_model(folder: Path, heads: int, dtype: str = "bfloat16", longest: int = 16384) -> Path:
    """Write the model as transformers and vLLM load it; its folder comes back."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    code = torch.randint(0, 2, (VOCABULARY, CODE), generator=generator).float() * 2 - 1
    embedding, head = torch.zeros(2, VOCABULARY, HIDDEN)
    embedding[:, OWN], embedding[:, CONSTANT], head[:, NEXT] = code, 8, code / 8
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": torch.ones(HIDDEN)}
    for number, layer in enumerate((_look_back(torch, heads, generator), _look_up(torch, heads, generator))):
        norms = {name: torch.ones(HIDDEN) for name in ("input_layernorm", "post_attention_layernorm")}
        sizes = {"gate": (64, HIDDEN), "up": (64, HIDDEN), "down": (HIDDEN, 64)}
        dense = {f"mlp.{name}_proj": torch.zeros(size) for name, size in sizes.items()}
        attention = {f"self_attn.{name}": weight for name, weight in layer.items()}
        for name, weight in (norms | dense | attention).items():
            weights[f"model.layers.{number}.{name}.weight"] = weight
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.to(getattr(torch, dtype)).contiguous() for name, weight in weights.items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_configuration(heads, dtype, longest)), encoding="utf-8")
    return folder


def make_prompts(lengths: list[int], new: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of tokens that repeat, and the tokens that are right after each."""
    import torch

    generator = torch.Generator().manual_seed(7)
    prompts, following = [], []
    for length in lengths:
        once = length - 4 - int(torch.randint(0, length // 4 + 1, (1,), generator=generator))
        period = min(LONGEST_PERIOD, once)
        tokens = torch.randperm(VOCABULARY - SPECIAL, generator=generator)[:period] + SPECIAL
        row = tokens.repeat((length + new) // period + 1)[: length + new].tolist()
        prompts.append(row[:length])
        following.append(row[length:])
    return prompts, following


def _look_back(torch: Any, heads: int, generator: Any) -> dict[str, Any]:
    """Attention of the first layer: to the token before."""
    turns = _turns(torch, heads, generator)
    down, queries, up, out = _empty(torch, heads)
    down[OWN, OWN] = torch.eye(CODE)
    down[LATENT : LATENT + 2 * FAST : 2, CONSTANT] = 1
    angles = THETA ** (-torch.arange(FAST) * 2 / ROPE)  # of one token's step
    queries[:, CODE : CODE + 2 * FAST : 2, CONSTANT] = 10 * angles.cos()
    queries[:, CODE + 1 : CODE + 2 * FAST : 2, CONSTANT] = -10 * angles.sin()
    up[:, CODE:, OWN] = turns
    out[BEFORE] = turns.transpose(1, 2).transpose(0, 1) / (2 * heads)
    return _named(down, queries, up, out)


def _look_up(torch: Any, heads: int, generator: Any) -> dict[str, Any]:
    """Attention of the second layer: to what followed this token earlier."""
    turns, key_turns = _turns(torch, heads, generator), _turns(torch, heads, generator)
    down, queries, up, out = _empty(torch, heads)
    down[OWN, OWN] = down[BEFORE, BEFORE] = torch.eye(CODE)
    queries[:, :CODE, OWN] = 3 * key_turns
    up[:, :CODE, BEFORE] = key_turns
    up[:, CODE:, OWN] = turns
    out[NEXT] = turns.transpose(1, 2).transpose(0, 1) / heads
    return _named(down, queries, up, out)


def _turns(torch: Any, heads: int, generator: Any) -> Any:
    """A rotation for each head, so that no two heads compute the same numbers; [heads, CODE, CODE]."""
    return torch.linalg.qr(torch.randn(heads, CODE, CODE, generator=generator))[0]


def _empty(torch: Any, heads: int) -> tuple[Any, Any, Any, Any]:
    """Weights to the latent and rope, to the queries, from the latent to keys and values, and to the state."""
    return (
        torch.zeros(LATENT + ROPE, HIDDEN),
        torch.zeros(heads, CODE + ROPE, HIDDEN),
        torch.zeros(heads, 2 * CODE, LATENT),
        torch.zeros(HIDDEN, heads, CODE),
    )


def _named(down: Any, queries: Any, up: Any, out: Any) -> dict[str, Any]:
    return {
        "kv_a_proj_with_mqa": down,
        "q_proj": queries.flatten(0, 1),
        "kv_b_proj": up.flatten(0, 1),
        "o_proj": out.flatten(1),
        "kv_a_layernorm": down.new_ones(LATENT),
    }


def _configuration(heads: int, dtype: str, longest: int) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": dtype,
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": heads,
        "num_key_value_heads": heads, "kv_lora_rank": LATENT, "q_lora_rank": None, "qk_rope_head_dim": ROPE,
        "qk_nope_head_dim": CODE, "v_head_dim": CODE, "max_position_embeddings": longest, "rope_theta": THETA,
        "intermediate_size": 64, "first_k_dense_replace": 2, "n_routed_experts": 8, "moe_intermediate_size": 64,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "attention_bias": False, "bos_token_id": 0, "eos_token_id": 1,
        "tie_word_embeddings": False,
    }  # fmt: skip
