"""Named models: the attention dimensions that a decode of theirs has after weight absorption, and others to compare."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class ModelPreset:
    """Dimensions of one model's MLA layers.

    Attributes
    ----------
    name
        What the command line calls it.
    num_heads_q
        Query heads of the whole model (all tensor-parallel ranks together).
    latent_dim
        Width of the compressed KV vector (``kv_lora_rank``); also the width of the output.
    rope_dim
        Width of the part of the key that carries the position (``qk_rope_head_dim``).
    num_layers
        Attention layers (``num_hidden_layers``), each with a cache of its own.
    nope_dim, value_dim
        Widths of a head's key without position and of its value before absorption (``qk_nope_head_dim`` and
        ``v_head_dim``): what the model would cache for each head if it did not cache the latent vector.
    """

    name: str
    num_heads_q: int
    latent_dim: int
    rope_dim: int
    num_layers: int
    nope_dim: int = 128
    value_dim: int = 128

    def heads_per_rank(self, tensor_parallel: int) -> int:
        """Query heads on one of ``tensor_parallel`` ranks (the latent cache is on every rank whole).

        Raises
        ------
        InvalidArgumentError
            The ranks do not divide the heads.
        """
        if tensor_parallel < 1 or self.num_heads_q % tensor_parallel != 0:
            raise InvalidArgumentError(
                "tp", f"a divisor of the {self.num_heads_q} heads of {self.name}", str(tensor_parallel)
            )
        return self.num_heads_q // tensor_parallel


@dataclass(frozen=True, slots=True)
class GroupedPreset:
    """Dimensions of a model that caches keys and values by head: multi-head, grouped-query or multi-query attention.

    Attributes
    ----------
    name
        What the command line calls it.
    num_layers
        Attention layers.
    num_heads_q, num_heads_kv
        Heads of queries, and of cached keys and values.
    head_dim
        Width of a key and of a value.
    """

    name: str
    num_layers: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int = 128


# From each model's published config.json: num_attention_heads, kv_lora_rank, qk_rope_head_dim, num_hidden_layers.
_ALL = (
    ModelPreset("deepseek-v3", 128, 512, 64, num_layers=61),  # also R1 and V3.1, which share its configuration
    ModelPreset("deepseek-v2", 128, 512, 64, num_layers=60),
    ModelPreset("deepseek-v2-lite", 16, 512, 64, num_layers=27),
    ModelPreset("kimi-k2", 64, 512, 64, num_layers=61),
)
PRESETS: dict[str, ModelPreset] = {preset.name: preset for preset in _ALL}
DEFAULT_PRESET = "deepseek-v3"

# From config.json too: num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim (or hidden_size / heads).
_GROUPED = (
    GroupedPreset("deepseek-67b", 95, 64, 8),
    GroupedPreset("llama-2-7b", 32, 32, 32),
    GroupedPreset("llama-3.1-8b", 32, 32, 8),
    GroupedPreset("llama-3.1-70b", 80, 64, 8),
    GroupedPreset("llama-3.1-405b", 126, 128, 8),
    GroupedPreset("qwen2.5-72b", 80, 64, 8),
    GroupedPreset("mistral-7b", 32, 32, 8),
    GroupedPreset("mistral-large-2", 88, 96, 8),
    GroupedPreset("falcon-7b", 32, 71, 1, head_dim=64),
)
GROUPED_PRESETS: dict[str, GroupedPreset] = {preset.name: preset for preset in _GROUPED}


def find_preset(name: str) -> ModelPreset:
    """The MLA model called ``name``.

    Raises
    ------
    InvalidArgumentError
        There is none of that name.
    """
    if name not in PRESETS:
        raise InvalidArgumentError("preset", "one of " + ", ".join(PRESETS), repr(name))
    return PRESETS[name]


def find_model(name: str) -> ModelPreset | GroupedPreset:
    """The model called ``name``, with MLA or without.

    Raises
    ------
    InvalidArgumentError
        There is none of that name.
    """
    models: dict[str, ModelPreset | GroupedPreset] = {**PRESETS, **GROUPED_PRESETS}
    if name not in models:
        raise InvalidArgumentError("model", "one of " + ", ".join(models), repr(name))
    return models[name]
