"""Multi-head latent attention (MLA) decoding on NVIDIA Hopper GPUs, compiled at run time."""

from .cache_ops import append_tokens
from .decode import mla_decode, plan_decode
from .errors import (
    CompilationError,
    DriverError,
    InvalidArgumentError,
    MissingDependencyError,
    MlaError,
    PlanMismatchError,
    UnsupportedDeviceError,
)
from .kv_cache import OutOfPagesError, OutOfRequestsError, PagedKVCache
from .merge import merge_states
from .plan import DecodePlan

__version__ = "0.1.0"

__all__ = [
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
    "UnsupportedDeviceError",
    "append_tokens",
    "merge_states",
    "mla_decode",
    "plan_decode",
]
