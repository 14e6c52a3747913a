"""Families whose experts are fused 3-D parameters and whose router returns top-k ids in a tuple.

That is how transformers v5 builds nearly all MoE models; what differs between them are attribute names.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from placement.errors import InputError
from placement.runtime.families.protocol import MoELayer
from placement.runtime.families.unwrap import unwrapped

__all__ = ["FusedFamily"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedFamily:
    """A family described by attribute names.

    Parameters
    ----------
    model_type
        `config.model_type` of the family's decoder; of a model with several parts, that of its language
        model.
    layers
        Attribute of the decoder that is the list of its layers.
    block
        Attribute of a decoder layer that is the MoE block (or, in dense layers, the plain MLP); empty where
        router and experts belong to the decoder layer itself.
    router, experts
        Attributes of the MoE block; a block without both is dense.
    expert_tensors
        Parameters of the experts module with the experts as first dimension.
    common_tensors
        Parameters of the experts module that all experts use alike.
    num_experts, top_k
        Where the router, or else the block, keeps the two numbers: a path of attributes.
    top_k_output
        Position of the top-k ids in the router's output tuple.
    record_only
        Why no placement can be applied; empty where one can.
    """

    model_type: str
    layers: str = "layers"
    block: str = "mlp"
    router: str = "gate"
    experts: str = "experts"
    expert_tensors: tuple[str, ...] = ("gate_up_proj", "down_proj")
    common_tensors: tuple[str, ...] = ()
    num_experts: str = "num_experts"
    top_k: str = "top_k"
    top_k_output: int = 2
    record_only: str = ""

    @property
    def sequence_first(self) -> bool:
        """Routers see tokens row by row."""
        return False

    @property
    def may_lack_experts(self) -> bool:
        """Every token has its top-k experts."""
        return False

    def decoder(self, model: nn.Module) -> nn.Module:
        """Module that owns the decoder layers; see `ModelFamily.decoder`."""
        found = [part for part in unwrapped(model).modules() if self._layers_of(part) is not None]
        if not found:
            raise InputError(f"{type(model).__name__} has no decoder layers; pass a {self.model_type} model")
        routed = [part for part in found if any(map(self._is_moe, self._layers_of(part) or ()))]
        if len(routed) > 1:
            raise InputError(
                f"{type(model).__name__} has {len(routed)} decoders with MoE layers "
                f"({', '.join(type(part).__name__ for part in routed)}); pass one of them"
            )
        return (routed or found)[0]

    def moe_layers(self, model: nn.Module) -> tuple[MoELayer, ...]:
        """MoE layers in decoder order; see `ModelFamily.moe_layers`."""
        layers = enumerate(self._layers_of(self.decoder(model)) or ())
        return tuple(self._moe_layer(index, layer) for index, layer in layers if self._is_moe(layer))

    def _layers_of(self, part: nn.Module) -> nn.ModuleList | None:
        layers = getattr(part, self.layers, None)
        return layers if isinstance(layers, nn.ModuleList) else None

    def _block(self, decoder_layer: nn.Module) -> Any:
        layer = unwrapped(decoder_layer)
        return getattr(layer, self.block, None) if self.block else layer

    def _is_moe(self, decoder_layer: nn.Module) -> bool:
        block = self._block(decoder_layer)
        return all(isinstance(getattr(block, name, None), nn.Module) for name in (self.router, self.experts))

    def _moe_layer(self, index: int, decoder_layer: nn.Module) -> MoELayer:
        block = self._block(decoder_layer)
        router, experts = getattr(block, self.router), getattr(block, self.experts)
        if not self.record_only:
            self._check_fused(index, experts)
        return MoELayer(
            decoder_layer=index,
            router=router,
            experts=experts,
            expert_tensors=self.expert_tensors,
            common_tensors=self.common_tensors,
            expert_counters=((experts, "num_experts"),) if hasattr(experts, "num_experts") else (),
            num_experts=_number(self.num_experts, router, block),
            top_k=_number(self.top_k, router, block),
        )

    def _check_fused(self, index: int, experts: nn.Module) -> None:
        own = {name for name, _ in experts.named_parameters(recurse=False)}
        if not own.issuperset(self.expert_tensors):
            raise InputError(
                f"the experts of decoder layer {index} hold {sorted(own) or 'no fused tensors'}, not "
                f"{list(self.expert_tensors)}; load it with transformers 5, unquantised, without adapters"
            )

    def read_top_k(self, router_output: Any, layer: MoELayer) -> torch.Tensor:
        """Top-k expert ids in the router's output, ``[tokens, top-k]``."""
        index: torch.Tensor = router_output[self.top_k_output]
        return index

    def replace_top_k(
        self, router_output: Any, slot_TK: torch.Tensor, layer: MoELayer, num_slots: int
    ) -> Any:
        """Return the router's output tuple with slots in the place of the ids."""
        at = self.top_k_output
        return (*router_output[:at], slot_TK, *router_output[at + 1 :])


def _number(path: str, *owners: nn.Module) -> int:
    """Value of the path in the first module that has its first attribute."""
    owner = next(one for one in owners if hasattr(one, path.partition(".")[0]))
    return int(attrgetter(path)(owner))
