"""Finds the adapter of a model by its `config.model_type`."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from torch import nn

import placement.runtime.families as package
from placement._suggest import did_you_mean
from placement.errors import InputError
from placement.runtime.families.protocol import ModelFamily, MoELayer

__all__ = ["family_named", "family_of", "moe_layers_of", "supported_families"]


@cache
def _families() -> dict[str, ModelFamily]:
    modules = (import_module(f"{package.__name__}.{found.name}") for found in iter_modules(package.__path__))
    families: list[ModelFamily] = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.model_type: family for family in families}


def supported_families() -> tuple[str, ...]:
    """Model types that have an adapter, in name order."""
    return tuple(sorted(_families()))


def family_named(model_type: str) -> ModelFamily:
    """Return the adapter of a model type.

    Raises
    ------
    InputError
        If there is none; the message lists those there are, and the nearest one.
    """
    families = _families()
    if model_type in families:
        return families[model_type]
    raise InputError(
        f"unsupported model type {model_type!r}; {did_you_mean(model_type, supported_families())}"
    )


def family_of(model: nn.Module) -> ModelFamily:
    """Return the adapter of a loaded model.

    Raises
    ------
    InputError
        If the model carries no `config.model_type` or its type has no adapter.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model_type, str):
        raise InputError(f"{type(model).__name__} has no config.model_type; pass a transformers model")
    return family_named(model_type)


def moe_layers_of(model: nn.Module) -> tuple[MoELayer, ...]:
    """MoE layers of a loaded model, at least one.

    Raises
    ------
    InputError
        If the family is unknown, the model has no MoE layer, or its MoE layers differ in experts or
        top-k.
    """
    family = family_of(model)
    layers = family.moe_layers(model)
    if not layers:
        raise InputError(f"this {family.model_type} model has no MoE layers: every decoder layer is dense")
    shapes = {(layer.num_experts, layer.top_k) for layer in layers}
    if len(shapes) > 1:
        raise InputError(f"the MoE layers differ in (experts, top-k): {sorted(shapes)}; they must be alike")
    return layers
