"""Finds the adapter of a model by its `config.model_type`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import nn

import placement.runtime.families as package
from placement._suggest import nearest
from placement.errors import InputError
from placement.runtime.families.protocol import ModelFamily, MoELayer
from placement.runtime.families.training import FRAMEWORKS
from placement.runtime.families.transformers_v5 import NOT_SUPPORTED
from placement.runtime.families.unwrap import unwrapped

__all__ = ["check_layers", "family_named", "family_of", "moe_layers_of", "supported_families"]

_WELL_KNOWN = ("deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen3_moe")
_GENERIC = "name its routers (GenericFamily, or trace record --router) to record it all the same"
_LANGUAGE_MODELS = ("text_config", "thinker_config", "language_config", "llm_config")


@cache
def _families() -> dict[str, ModelFamily]:
    return {family.model_type: family for family in _defined()}


def _defined() -> Iterator[ModelFamily]:
    for found in iter_modules(package.__path__):
        module = import_module(f"{package.__name__}.{found.name}")
        if hasattr(module, "FAMILY"):
            yield module.FAMILY
        yield from getattr(module, "FAMILIES", ())


def supported_families() -> tuple[str, ...]:
    """Model types that have an adapter, in name order."""
    return tuple(sorted(_families()))


def family_named(model_type: str, config: Mapping[str, Any] | None = None) -> ModelFamily:
    """Return the adapter of a model type.

    Parameters
    ----------
    model_type
        The type, as `config.model_type` says it.
    config
        The configuration as a mapping: where a model of several parts has no adapter under its own type,
        that of its language model is taken.

    Raises
    ------
    InputError
        If there is none; the message says why, or names the nearest one.
    """
    families = _families()
    types = [model_type, *_nested_types(config or {})]
    for one in types:
        if one in families:
            return families[one]
    for one in types:
        if one in NOT_SUPPORTED:
            raise InputError(f"model type {one!r} is not supported: {NOT_SUPPORTED[one]}; {_GENERIC}")
    close = nearest(model_type, families)
    guess = f"did you mean {close!r}? " if close else ""
    raise InputError(
        f"unsupported model type {model_type!r}; {guess}{len(families)} types are supported, such as "
        f"{', '.join(_WELL_KNOWN)}; {_GENERIC}"
    )


def _nested_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Model types of the language models inside a configuration, outermost first."""
    for key in _LANGUAGE_MODELS:
        inner = config.get(key)
        if isinstance(inner, Mapping):
            if isinstance(inner.get("model_type"), str):
                yield inner["model_type"]
            yield from _nested_types(inner)


def family_of(model: nn.Module) -> ModelFamily:
    """Return the adapter of a loaded model, wrapped or not.

    Raises
    ------
    InputError
        If the model carries no `config.model_type` or its type has no adapter.
    """
    config: Any = getattr(unwrapped(model), "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model_type, str):
        for family in FRAMEWORKS:
            if family.matches(model):
                return family
        raise InputError(
            f"{type(model).__name__} has no config.model_type; pass a transformers model, or {_GENERIC}"
        )
    if model_type in _families():
        return _families()[model_type]
    return family_named(model_type, config.to_dict() if hasattr(config, "to_dict") else None)


def moe_layers_of(model: nn.Module) -> tuple[MoELayer, ...]:
    """MoE layers of a loaded model, at least one.

    Raises
    ------
    InputError
        If the family is unknown, the model has no MoE layer, or its MoE layers differ in experts or
        top-k.
    """
    family = family_of(model)
    return check_layers(family, family.moe_layers(model))


def check_layers(family: ModelFamily, layers: tuple[MoELayer, ...]) -> tuple[MoELayer, ...]:
    """Return MoE layers if there are any and they are alike.

    Raises
    ------
    InputError
        If there is none, or they differ in experts or top-k.
    """
    if not layers:
        raise InputError(f"this {family.model_type} model has no MoE layers: every decoder layer is dense")
    shapes = {(layer.num_experts, layer.top_k) for layer in layers}
    if len(shapes) > 1:
        raise InputError(f"the MoE layers differ in (experts, top-k): {sorted(shapes)}; they must be alike")
    return layers
