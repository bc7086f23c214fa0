"""Rules for torch.compile, set when this module is imported: which happens when it first traces a function of ours.

What is called by the stand-ins of `cupy_mla.torch_compile`, and by functions that end a graph, runs as it is.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable
from typing import Any

from . import torch_ops

_TRACED = {"torch_compile", "engines"}  # stand-ins; what runs as a part of a model


def add_rules() -> None:
    """Keep torch.compile out of every module of the package but those that it is to see."""
    from torch._dynamo import trace_rules

    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(sys.modules[package].__path__):
        if module.name not in _TRACED:
            trace_rules.add(f"{package}.{module.name}")


def _make_as_it_is() -> Callable[..., Any]:
    import torch

    def as_it_is(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    disabled: Callable[..., Any] = torch.compiler.disable(as_it_is)
    return disabled


torch_ops.register()
add_rules()
as_it_is = _make_as_it_is()
