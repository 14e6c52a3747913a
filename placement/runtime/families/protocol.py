"""What the hook and the recorder need to know about a model family, and nothing else.

Shape letters: T tokens of one forward pass, K top-k, E experts, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["MoELayer", "ModelFamily"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MoELayer:
    """One MoE layer of a model: where its router and its experts are.

    Parameters
    ----------
    decoder_layer
        Index of the decoder layer, dense layers counted.
    router
        Module whose output tells the top-k expert ids.
    experts
        Module that owns the experts' tensors; of no meaning where a family can only be recorded.
    expert_tensors
        Names of the parameters of `experts` whose first dimension runs over the experts; together with
        `common_tensors` they must be all of its tensors.
    common_tensors
        Names of parameters of `experts` that all experts use alike, which a placement leaves in place.
    expert_counters
        Attributes ``(module, name)`` that hold the number of experts which `experts` computes with.
    num_experts, top_k
        Logical experts of the layer, and how many of them each token selects.
    """

    decoder_layer: int
    router: nn.Module
    experts: nn.Module
    expert_tensors: tuple[str, ...] = ()
    common_tensors: tuple[str, ...] = ()
    expert_counters: tuple[tuple[nn.Module, str], ...] = ()
    num_experts: int
    top_k: int


class ModelFamily(Protocol):
    """A model family: how to find its MoE layers and what its routers say about the top-k ids."""

    @property
    def model_type(self) -> str:
        """`config.model_type` of the family's decoder."""
        ...

    @property
    def record_only(self) -> str:
        """Why no placement can be applied to it; empty where one can."""
        ...

    @property
    def sequence_first(self) -> bool:
        """Whether routers see tokens place by place over all rows, not row by row."""
        ...

    @property
    def may_lack_experts(self) -> bool:
        """Whether `read_top_k` may say that a token got fewer than top-k experts."""
        ...

    def decoder(self, model: nn.Module) -> nn.Module:
        """Module whose forward pass runs every MoE layer once over the tokens it is given.

        Raises
        ------
        InputError
            If the model has none, or several.
        """
        ...

    def moe_layers(self, model: nn.Module) -> tuple[MoELayer, ...]:
        """MoE layers in decoder order, dense layers skipped; empty if there are none.

        Raises
        ------
        InputError
            If the model is not built the way this family is.
        """
        ...

    def read_top_k(self, router_output: Any, layer: MoELayer) -> torch.Tensor:
        """Top-k expert ids that a router's output stands for, ``[tokens, top-k]``.

        An id of `layer.num_experts` stands for no expert, where the family may lack some.
        """
        ...

    def replace_top_k(
        self, router_output: Any, slot_TK: torch.Tensor, layer: MoELayer, num_slots: int
    ) -> Any:
        """Return the router's output with slots (of `num_slots`) for expert ids, all else untouched."""
        ...
