"""Multi-head latent attention (MLA) decoding on NVIDIA Hopper GPUs, compiled at run time."""

from .cache.allocator import OutOfPagesError, OutOfRequestsError
from .cache.append import append_tokens
from .cache.paged import PagedKVCache
from .cache.slots import slots_of
from .decode.dense import mla_decode, plan_decode
from .decode.merge import merge_states
from .decode.plan import DecodePlan
from .decode.prefill import mla_sparse_prefill
from .decode.sparse import mla_sparse_decode, plan_sparse_decode
from .decode.sparse_plan import SparsePlan
from .errors import (
    CompilationError,
    DriverError,
    InvalidArgumentError,
    MissingDependencyError,
    MlaError,
    PlanMismatchError,
    UnsupportedDeviceError,
)

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
    "SparsePlan",
    "UnsupportedDeviceError",
    "append_tokens",
    "merge_states",
    "mla_decode",
    "mla_sparse_decode",
    "mla_sparse_prefill",
    "plan_decode",
    "plan_sparse_decode",
    "slots_of",
]
