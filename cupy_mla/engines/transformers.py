"""Models of transformers on this package's kernels: ``enable(model)``, then ``model.generate(...)`` as before.

For models whose attention keeps the compressed latent in the cache (their classes have a method ``expand_kv``):
DeepSeek V2, V3 and V3.2, Kimi Linear, GLM-4 MoE Lite, GLM-5, LongCat-Flash, Mistral 4, Youtu, A.X-K1 and K2, Bailing
hybrid. Steps with up to 128 new tokens run here, prompts and steps that need gradients as they did.
"""

from __future__ import annotations

import functools
from typing import Any

from ..errors import InvalidArgumentError, MissingDependencyError

try:
    import torch
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
except ImportError as error:
    raise MissingDependencyError("transformers", "transformers", "cupy_mla.engines.transformers") from error

from ..arrays.frameworks import CUDA
from ..decode.support import is_supported
from ..gpu.device import require_backend
from .transformers_attention import HAS_ROOM, PREFIX, SERVED, Served, Shared, attention_of, register
from .transformers_cache import PAGE_SIZE, has_room

_HOOK = "cupy_mla_hook"
# Kinds of models whose sparse attention hands the chosen tokens to the attention function.
SPARSE = ("deepseek_v32", "glm_moe_dsa", "axk2")


def enable(model: Any) -> None:
    """Let a model decode on this package's kernels, or on NumPy if it is on the CPU.

    Caches, static and dynamic ones, padding on the left, ``generate`` with all that it can do, and ``torch.compile``
    stay as they are. Caches that are empty get rows with room behind them (see `cupy_mla.engines.transformers_cache`);
    others are copied in each step. After ``model.set_attn_implementation``, the attention that it sets runs alone.

    Parameters
    ----------
    model
        A model of transformers, whole or its decoder alone, in bfloat16 or float16. It may be enabled already.

    Raises
    ------
    InvalidArgumentError
        The model's attention is not one that keeps the latent in the cache, or it has what the kernels lack: sinks, a
        sliding window, other kinds of sparse attention, widths or a type that they do not take, weights that are
        quantised or offloaded, or a former attention without a mask function. Nothing was changed then.
    UnsupportedDeviceError
        The model is on a GPU that is not Hopper, or on a device that the setting CUPY_MLA_BACKEND rules out.

    Examples
    --------
    >>> import torch
    >>> from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    >>> from cupy_mla.engines.transformers import disable, enable
    >>> sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 100}
    >>> config = DeepseekV3Config(**sizes, num_attention_heads=4, q_lora_rank=32, first_k_dense_replace=2)
    >>> model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    >>> enable(model)
    >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False, eos_token_id=None).shape
    torch.Size([1, 8])
    >>> disable(model)
    """
    modules = _attention_modules(model)
    for module in modules:
        reason = _why_not(module)
        if reason is not None:
            raise InvalidArgumentError("model", "attention that the kernels can serve", f"{_name(module)}: {reason}")
    disable(model)
    shared: dict[Any, Shared] = {}
    for module in modules:
        former = module.config._attn_implementation.removeprefix(PREFIX)  # modules may share a configuration
        module.config._attn_implementation = register(former)
        device = module.kv_b_proj.weight.device
        first = device not in shared
        served = Served(shared.setdefault(device, Shared()), first, attention_of(former, module))
        setattr(module, SERVED, served)
        module.expand_kv = functools.partial(_expand_or_keep, module)
        setattr(module, _HOOK, module.register_forward_pre_hook(_make_room, with_kwargs=True))


def disable(model: Any) -> None:
    """Undo `enable`. Nothing happens if it was not called.

    Raises
    ------
    InvalidArgumentError
        The model's attention is not one that keeps the latent in the cache.
    """
    for module in _attention_modules(model):
        if hasattr(module, SERVED):
            getattr(module, _HOOK).remove()
            for name in (SERVED, _HOOK, "expand_kv"):
                delattr(module, name)
        name = module.config._attn_implementation
        if name.startswith(PREFIX):
            module.config._attn_implementation = name.removeprefix(PREFIX)


def _attention_modules(model: Any) -> list[Any]:
    """The attention modules that keep the latent, in the order of the layers."""
    if not isinstance(model, torch.nn.Module):
        raise InvalidArgumentError("model", "a model of transformers", type(model).__name__)
    modules = [module for module in model.modules() if hasattr(type(module), "expand_kv")]
    if not modules:
        expected = "one whose attention keeps the latent in the cache (a class with the method expand_kv)"
        raise InvalidArgumentError("model", expected, _name(model))
    return modules


def _why_not(module: Any) -> str | None:
    """Why an attention module cannot be served, in words; None if it can."""
    config, projection = module.config, module.kv_b_proj
    if hasattr(module, "indexer") and config.model_type not in SPARSE:
        return f"its sparse attention is not of the kind of {', '.join(SPARSE)}"
    if getattr(module, "sinks", None) is not None:
        return "its attention has sinks"
    if getattr(module, "sliding_window", None) is not None:
        return "its attention has a sliding window"
    if type(projection) is not torch.nn.Linear or projection.bias is not None:
        return f"its kv_b_proj is a {_name(projection)} and not a torch.nn.Linear without a bias"
    weight = projection.weight
    if weight.device.type not in ("cpu", CUDA):
        return f"its weights are on the device {weight.device}, offloaded or not loaded"
    former = config._attn_implementation.removeprefix(PREFIX)
    if former not in ALL_MASK_ATTENTION_FUNCTIONS:
        return f"transformers makes no masks for its attention {former}"
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return f"its weights are of {weight.dtype}, not of torch.bfloat16 or torch.float16"
    require_backend(weight.device.type, weight.device.index or 0, "the model")
    support = is_supported(
        num_heads_q=weight.shape[0] // (module.qk_nope_head_dim + module.v_head_dim),
        latent_dim=module.kv_lora_rank,
        rope_dim=module.qk_rope_head_dim,
        dtype=str(weight.dtype).removeprefix("torch."),
        page_size=PAGE_SIZE,
        topk=getattr(config, "index_topk", None) if hasattr(module, "indexer") else None,
    )
    return support.reason


def _name(module: Any) -> str:
    return type(module).__name__


def _expand_or_keep(module: Any, latent: Any, rope: Any) -> tuple[Any, Any]:
    """Stands for ``expand_kv``: our attention function expands where it has to, others need it done."""
    if module.config._attn_implementation.startswith(PREFIX):
        return latent, rope
    expanded: tuple[Any, Any] = type(module).expand_kv(module, latent, rope)
    return expanded


def _make_room(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before an attention module runs: room in its layer of the cache, and word of it for the attention function."""
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    return args, {**kwargs, HAS_ROOM: has_room(cache, module.layer_idx)}
