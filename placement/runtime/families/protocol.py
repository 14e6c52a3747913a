"""What the hook and the recorder need to know about a model family, and nothing else.

Shape letters: T tokens of one forward pass, K top-k, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["MoELayer", "ModelFamily"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoELayer:
    """One MoE layer of a model: where its router and its experts are.

    Parameters
    ----------
    decoder_layer
        Index of the decoder layer, dense layers counted.
    router
        Module whose output holds the top-k expert ids.
    experts
        Module that owns the experts' tensors.
    expert_tensors
        Names of the parameters of `experts` whose first dimension runs over the experts; together
        they must be all of its tensors.
    expert_counters
        Attributes ``(module, name)`` that hold the number of experts which `experts` computes with.
    num_experts, top_k
        Logical experts of the layer, and how many of them each token selects.
    """

    decoder_layer: int
    router: nn.Module
    experts: nn.Module
    expert_tensors: tuple[str, ...]
    expert_counters: tuple[tuple[nn.Module, str], ...]
    num_experts: int
    top_k: int


class ModelFamily(Protocol):
    """A model family: how to find its MoE layers and where its routers put the top-k ids."""

    @property
    def model_type(self) -> str:
        """`config.model_type` of the family's checkpoints."""
        ...

    def moe_layers(self, model: nn.Module) -> tuple[MoELayer, ...]:
        """MoE layers in decoder order, dense layers skipped; empty if there are none.

        Raises
        ------
        InputError
            If the model is not built the way this family is.
        """
        ...

    def read_top_k(self, router_output: Any) -> torch.Tensor:
        """Top-k expert ids in a router's output, ``[tokens, top-k]``."""
        ...

    def replace_top_k(self, router_output: Any, index_TK: torch.Tensor) -> Any:
        """Return the router's output with other top-k ids, all else untouched."""
        ...
