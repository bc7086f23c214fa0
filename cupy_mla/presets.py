"""Named models: the attention dimensions that a decode of theirs has after weight absorption."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class ModelPreset:
    """Dimensions of one model's MLA layer.

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
    """

    name: str
    num_heads_q: int
    latent_dim: int
    rope_dim: int

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


# From each model's published config.json: num_attention_heads, kv_lora_rank, qk_rope_head_dim.
_ALL = (
    ModelPreset("deepseek-v3", 128, 512, 64),  # also DeepSeek V2, R1 and V3.1
    ModelPreset("deepseek-v2-lite", 16, 512, 64),
    ModelPreset("kimi-k2", 64, 512, 64),
)
PRESETS: dict[str, ModelPreset] = {preset.name: preset for preset in _ALL}
DEFAULT_PRESET = "deepseek-v3"


def find_preset(name: str) -> ModelPreset:
    """The preset called ``name``.

    Raises
    ------
    InvalidArgumentError
        There is none of that name.
    """
    if name not in PRESETS:
        raise InvalidArgumentError("preset", "one of " + ", ".join(PRESETS), repr(name))
    return PRESETS[name]
