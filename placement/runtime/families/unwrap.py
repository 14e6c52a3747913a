"""Takes the wrappers of training frameworks off a model: data parallel, sharded, compiled."""

from __future__ import annotations

from typing import Any

from torch import nn

from placement.errors import InputError

__all__ = ["WRAPPER_NAMES", "compiled_part", "unwrapped"]

WRAPPER_NAMES = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Attributes under which wrappers keep the module they wrap; they show up in module names."""


def _inner(model: nn.Module) -> nn.Module | None:
    for name in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"):
        inner = model._modules.get(name)
        if inner is not None:
            return inner
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, FSDP, torch.compile and the like, or itself."""
    inner = _inner(model)
    return model if inner is None else unwrapped(inner)


def compiled_part(model: nn.Module) -> nn.Module | None:
    """Return the wrapper that `torch.compile(model)` made, if the model is inside one.

    Raises
    ------
    InputError
        If the model was compiled in place: what its hooks do from then on is up to the compiler's cache.
    """
    layer: nn.Module | None = model
    while layer is not None:
        parts: Any = layer
        if getattr(parts, "_compiled_call_impl", None) is not None:
            raise InputError(
                f"{type(layer).__name__} is compiled in place already; start recording before "
                "model.compile(...), or use compiled = torch.compile(model) and record that"
            )
        if "_orig_mod" in layer._modules:
            return layer
        layer = _inner(layer)
    return None
