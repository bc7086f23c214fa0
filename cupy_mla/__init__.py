"""Multi-head latent attention (MLA) decoding on NVIDIA Hopper GPUs, compiled at run time."""

import importlib
from typing import TYPE_CHECKING, Any

from .decode.dense import mla_decode, plan_decode
from .decode.merge import merge_states
from .decode.plan import DecodePlan
from .errors import (
    CompilationError,
    DriverError,
    InvalidArgumentError,
    MissingDependencyError,
    MlaError,
    PlanMismatchError,
    UnsupportedDeviceError,
)
from .torch_compile import teach

if TYPE_CHECKING:
    from .cache.allocator import OutOfPagesError, OutOfRequestsError
    from .cache.append import append_tokens
    from .cache.convert import dequantise_cache, quantise_cache
    from .cache.copy_pages import copy_pages
    from .cache.paged import PagedKVCache
    from .cache.slots import slots_of
    from .cache.step import CacheStep
    from .decode.prefill import mla_sparse_prefill
    from .decode.sparse import mla_sparse_decode, plan_sparse_decode
    from .decode.sparse_plan import SparsePlan
    from .decode.support import Support, is_supported

__version__ = "0.1.0"

# Loaded when first asked for: importing the package stays as quick as importing NumPy.
_LOADED_LATER = {
    "CacheStep": "cache.step",
    "OutOfPagesError": "cache.allocator",
    "OutOfRequestsError": "cache.allocator",
    "PagedKVCache": "cache.paged",
    "SparsePlan": "decode.sparse_plan",
    "Support": "decode.support",
    "append_tokens": "cache.append",
    "copy_pages": "cache.copy_pages",
    "dequantise_cache": "cache.convert",
    "is_supported": "decode.support",
    "mla_sparse_decode": "decode.sparse",
    "mla_sparse_prefill": "decode.prefill",
    "plan_sparse_decode": "decode.sparse",
    "quantise_cache": "cache.convert",
    "slots_of": "cache.slots",
}

_MODULES = ("bench", "engines", "errors", "flash_mla", "jax_ops", "layouts", "torch_ops")

__all__ = [
    "CacheStep",
    "CompilationError",
    "DecodePlan",
    "DriverError",
    "InvalidArgumentError",
    "MissingDependencyError",
    "MlaError",
    "OutOfPagesError",
    "OutOfRequestsError",
    "PagedKVCache",
    "PlanMismatchError",
    "SparsePlan",
    "Support",
    "UnsupportedDeviceError",
    "append_tokens",
    "copy_pages",
    "dequantise_cache",
    "is_supported",
    "merge_states",
    "mla_decode",
    "mla_sparse_decode",
    "mla_sparse_prefill",
    "plan_decode",
    "plan_sparse_decode",
    "quantise_cache",
    "slots_of",
]

teach(merge_states, mla_decode, plan_decode)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _LOADED_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LOADED_LATER[name]}", __name__), name)
    globals()[name] = value
    teach(value)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, "__version__"})
