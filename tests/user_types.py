"""What a type checker sees of the package in a user's program: .ci/run installs the wheel and gives this to mypy.

With --strict an ignore that is not needed is an error. So the last two lines pass only where mypy has found the types:
without them (no py.typed, no ``__all__``) everything is Any, and nothing is wrong.
"""

from typing import Any

import cupy_mla.flash_mla as flash_mla
import cupy_mla.jax_ops
import cupy_mla.torch_ops
from cupy_mla import CacheStep, DecodePlan, PagedKVCache, mla_decode, plan_decode
from cupy_mla.bench import Results, expand_grid, run_bench


def decode(q: Any, cache: PagedKVCache, requests: list[int]) -> Any:
    block_table, cache_seqlens = cache.block_table(requests), cache.cache_seqlens(requests)
    step: CacheStep = cache.step(requests)
    step.append(0, q)
    plan: DecodePlan = plan_decode(q, cache.kv_cache, block_table, cache_seqlens)
    out, _ = mla_decode(q, cache.kv_cache, block_table, cache_seqlens, plan=plan)
    return out


def bench() -> Results:
    return run_bench(expand_grid(batches=[1], lengths=[64], heads=[8]))


faces = (flash_mla.flash_mla_with_kvcache, cupy_mla.jax_ops.mla_decode, cupy_mla.torch_ops.register)
mla_decode()  # type: ignore[call-arg]
number: int = PagedKVCache(num_pages=1)  # type: ignore[assignment]
