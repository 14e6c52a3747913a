"""Families whose experts are fused 3-D parameters and whose router returns (logits, scores, ids).

That is how transformers v5 builds most MoE models; what differs between them are attribute names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from placement.errors import InputError
from placement.runtime.families.protocol import MoELayer

__all__ = ["FusedFamily"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedFamily:
    """A family described by attribute names.

    Parameters
    ----------
    model_type
        `config.model_type` of the family's checkpoints.
    block
        Attribute of a decoder layer that is the MoE block (or, in dense layers, the plain MLP).
    router, experts
        Attributes of the MoE block; a block without both is dense.
    expert_tensors
        Parameters of the experts module, all with the experts as first dimension.
    top_k_output
        Position of the top-k ids in the router's output tuple.
    """

    model_type: str
    block: str = "mlp"
    router: str = "gate"
    experts: str = "experts"
    expert_tensors: tuple[str, ...] = ("gate_up_proj", "down_proj")
    top_k_output: int = 2

    def moe_layers(self, model: nn.Module) -> tuple[MoELayer, ...]:
        """MoE layers in decoder order; see `ModelFamily.moe_layers`."""
        decoder = getattr(model, "base_model", model)
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise InputError(f"{type(model).__name__} has no decoder layers; pass a {self.model_type} model")
        found = (self._moe_layer(index, layer) for index, layer in enumerate(layers))
        return tuple(layer for layer in found if layer is not None)

    def _moe_layer(self, index: int, decoder_layer: nn.Module) -> MoELayer | None:
        block = getattr(decoder_layer, self.block, None)
        router = getattr(block, self.router, None)
        experts = getattr(block, self.experts, None)
        if router is None or experts is None:
            return None
        own = {name for name, _ in experts.named_parameters(recurse=False)}
        if not own.issuperset(self.expert_tensors):
            raise InputError(
                f"the experts of decoder layer {index} hold {sorted(own) or 'no fused tensors'}, not "
                f"{list(self.expert_tensors)}; load it with transformers 5, unquantised, without adapters"
            )
        return MoELayer(
            decoder_layer=index,
            router=router,
            experts=experts,
            expert_tensors=self.expert_tensors,
            expert_counters=((experts, "num_experts"),),
            num_experts=int(router.num_experts),
            top_k=int(router.top_k),
        )

    def read_top_k(self, router_output: Any) -> torch.Tensor:
        """Top-k expert ids in the router's output, ``[tokens, top-k]``."""
        index: torch.Tensor = router_output[self.top_k_output]
        return index

    def replace_top_k(self, router_output: Any, index_TK: torch.Tensor) -> Any:
        """Return the router's output tuple with other top-k ids."""
        at = self.top_k_output
        return (*router_output[:at], index_TK, *router_output[at + 1 :])
