"""Whether a placement and a model fit together, before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from placement.errors import InputError
from placement.plan import Placement
from placement.runtime.families.protocol import ModelFamily, MoELayer

__all__ = ["check_fit", "check_tensors"]


def check_fit(family: ModelFamily, layers: Sequence[MoELayer], placement: Placement) -> None:
    """Check that a placement is one of these layers.

    Raises
    ------
    InputError
        If the family can only be recorded, or numbers of layers or experts, or the layers' places, differ.
    """
    if family.record_only:
        raise InputError(
            f"no placement can be applied to a {family.model_type} model: {family.record_only}; "
            "its routing can be recorded"
        )
    if placement.num_layers != len(layers):
        raise InputError(f"the placement has {placement.num_layers} MoE layers, the model {len(layers)}")
    if placement.num_experts != layers[0].num_experts:
        raise InputError(
            f"the placement has {placement.num_experts} experts per layer, the model {layers[0].num_experts}"
        )
    decoder_layers = tuple(layer.decoder_layer for layer in layers)
    if placement.moe_layer_ids is not None and placement.moe_layer_ids != decoder_layers:
        raise InputError(
            f"the placement is for decoder layers {list(placement.moe_layer_ids)}, "
            f"the model's MoE layers are {list(decoder_layers)}"
        )


def check_tensors(model: nn.Module, layers: Sequence[MoELayer], *, num_rows: int) -> None:
    """Check that the experts' tensors can be moved row by row.

    Parameters
    ----------
    num_rows
        Rows that each has to have.

    Raises
    ------
    InputError
        If they are sharded, shared, offloaded, of other sizes, or more than the family knows.
    """
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for layer in layers:
        _check_layer_tensors(layer, owners, num_rows)


def _check_layer_tensors(layer: MoELayer, owners: dict[int, int], num_rows: int) -> None:
    where = f"the experts of decoder layer {layer.decoder_layer}"
    named = dict(layer.experts.named_parameters()) | dict(layer.experts.named_buffers())
    unknown = sorted(set(named) - {*layer.expert_tensors, *layer.common_tensors})
    if unknown:
        raise InputError(
            f"{where} hold {unknown[0]}, which a placement cannot move; "
            "load the model unquantised, without adapters"
        )
    for name in layer.expert_tensors:
        tensor = named[name]
        if tensor.shape[0] != num_rows:
            raise InputError(
                f"{name} of {where} holds {tensor.shape[0]} of {num_rows} experts; load the model whole"
            )
        if type(tensor.data) is not torch.Tensor:
            raise InputError(f"{name} of {where} is a {type(tensor.data).__name__}; load the model unsharded")
        if tensor.is_meta:
            raise InputError(f"{name} of {where} is offloaded; load the model without offloading")
        if owners[id(tensor)] > 1:
            raise InputError(f"{name} of {where} is shared with another layer, which a placement would split")
