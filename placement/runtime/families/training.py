"""Adapters of training frameworks' own models, which carry no transformers configuration.

They go by class and module names alone, so that neither framework is imported.
"""

from __future__ import annotations

from placement.runtime.families.generic import GenericFamily
from placement.runtime.families.protocol import ModelFamily

__all__ = ["FAMILIES", "FRAMEWORKS", "MEGATRON", "TORCHTITAN"]

TORCHTITAN = GenericFamily(
    model_type="torchtitan", router="layers.*.router", router_class="TokenChoiceTopKRouter", read="ids"
)
"""torchtitan: routers return (scores, ids ``[tokens, k]``, tokens per expert)."""

MEGATRON = GenericFamily(
    model_type="megatron",
    router="layers.*.router",
    router_class="TopKRouter",
    read="map",
    sequence_first=True,
)
"""Megatron Core: routers return (probabilities, map ``[tokens, experts]``), tokens place by place."""

FRAMEWORKS = (MEGATRON, TORCHTITAN)
"""Tried in turn on models without a `config.model_type`."""

FAMILIES: tuple[ModelFamily, ...] = FRAMEWORKS
