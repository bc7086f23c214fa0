"""The attention dimensions in a model's config.json, as Hugging Face's transformers writes it.

Keys are those of its configuration classes: ``num_hidden_layers``, ``num_attention_heads``, ``num_key_value_heads`` (as
many as query heads if absent), ``head_dim`` (``hidden_size / num_attention_heads`` if absent); with MLA
``kv_lora_rank``, ``qk_rope_head_dim``, ``qk_nope_head_dim`` and ``v_head_dim``. Models of several parts have those of
the language model in ``text_config``. GPT-2's and Falcon's older names are read as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InvalidArgumentError
from .presets import GroupedPreset, ModelPreset

_TEXT_PARTS = ("text_config", "llm_config", "language_config")
_OTHER_NAMES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "hidden_size": ("n_embd", "d_model"),
}


def read_model_config(path: Path) -> ModelPreset | GroupedPreset:
    """The dimensions of a model.

    Parameters
    ----------
    path
        Its config.json, or the folder that has it. The model is called by its ``_name_or_path``, else by the folder's
        name.

    Raises
    ------
    InvalidArgumentError
        The file cannot be read, is no JSON object, or lacks a dimension or has one that is no positive integer;
        ``argument`` is ``config``.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgumentError("config", "a file that can be read", f"{file} ({error.strerror})") from error
    except ValueError as error:
        raise InvalidArgumentError("config", "a JSON file", f"{file} ({error})") from error
    if not isinstance(whole, dict):
        raise InvalidArgumentError("config", "a JSON object", f"{file} with {type(whole).__name__}")
    name = str(whole.get("_name_or_path") or file.resolve().parent.name).rstrip("/").rpartition("/")[2]
    config = next((whole[part] for part in _TEXT_PARTS if isinstance(whole.get(part), dict)), whole)
    layers = _number(config, "num_hidden_layers")
    heads = _number(config, "num_attention_heads")
    if config.get("kv_lora_rank"):
        return ModelPreset(
            name,
            heads,
            _number(config, "kv_lora_rank"),
            _number(config, "qk_rope_head_dim", least=0),
            layers,
            nope_dim=_number(config, "qk_nope_head_dim"),
            value_dim=_number(config, "v_head_dim"),
        )
    if config.get("multi_query") and not config.get("new_decoder_architecture"):  # Falcon's first models
        heads_kv = 1
    else:
        heads_kv = _number(config, "num_key_value_heads", default=heads)
    head_dim = _number(config, "head_dim", default=0)
    if not head_dim:
        head_dim = _number(config, "hidden_size") // heads
    return GroupedPreset(name, layers, heads, heads_kv, head_dim)


def _number(config: dict[str, Any], name: str, *, default: int | None = None, least: int = 1) -> int:
    """A dimension, by its name or by one of its other names."""
    for key in (name, *_OTHER_NAMES.get(name, ())):
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidArgumentError("config", f"{key} as an integer of at least {least}", repr(value))
        return value
    if default is None:
        raise InvalidArgumentError("config", f"a file with {name}", f"the keys {', '.join(sorted(config)) or 'none'}")
    return default
