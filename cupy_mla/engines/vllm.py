"""vLLM's plug-in: ``vllm serve MODEL --attention-backend CUSTOM`` decodes MLA models on this package's kernels.

vLLM calls `register` by its entry point (group ``vllm.general_plugins``), in each of its processes. What it registers
is imported when that backend is asked for.
"""

from __future__ import annotations

import logging

BACKEND = "cupy_mla.engines.vllm_backend.CupyMlaBackend"


def register() -> None:
    """Make `BACKEND` the one that vLLM calls CUSTOM, unless another plug-in has taken that name."""
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:  # an error here would stop every vLLM beside which this package is installed
        logging.getLogger(__name__).warning("cupy-mla has no backend for this version of vLLM: %s", error)
        return
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
