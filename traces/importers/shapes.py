"""Which model a dump is of, and which of its layers are MoE layers, from what the dump and the user tell.

Engines dump expert ids of every decoder layer, dense ones included, and rarely say what the model is.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from placement.errors import InputError

if TYPE_CHECKING:
    from placement.model_shape import ModelShape

__all__ = ["LayerChoice", "choose_layers", "likely_model", "named_model", "tell"]

_logger = logging.getLogger("traces")


def tell(message: str) -> None:
    """Tell the user what a reader assumed or left out."""
    _logger.warning("%s", message)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """The layers of a dump that are MoE layers.

    Parameters
    ----------
    rows
        Their places among the dump's layers.
    moe_layer_ids
        Which decoder layers they are; `None` where that is not known.
    """

    rows: tuple[int, ...]
    moe_layer_ids: tuple[int, ...] | None


def choose_layers(
    num_layers: int, *, model: ModelShape | None, busy: tuple[int, ...] | None = None
) -> LayerChoice:
    """Find the MoE layers among a dump's layers.

    Parameters
    ----------
    num_layers
        Layers of the dump.
    model
        The model, where it is known.
    busy
        Layers that carry expert ids, where the dump shows it: without a model they are the MoE layers.

    Raises
    ------
    InputError
        If the model has another number of layers, or a layer of its own carries no ids.
    """
    if model is None:
        rows = tuple(range(num_layers)) if busy is None else busy
        # Where dense layers are listed, the dump counts decoder layers.
        return LayerChoice(rows=rows, moe_layer_ids=rows if len(rows) < num_layers else None)
    if num_layers == model.num_layers and num_layers != model.num_decoder_layers:
        rows = tuple(range(num_layers))
    elif num_layers >= model.num_decoder_layers:
        rows = model.moe_layer_ids
    else:
        raise InputError(
            f"has {num_layers} layers, {model.name} {model.num_layers} MoE layers and "
            f"{model.num_decoder_layers} decoder layers; name the right model with --model"
        )
    if busy is not None:
        silent = sorted(set(rows) - set(busy))
        extra = sorted(set(busy) - set(rows) - set(range(model.num_decoder_layers, num_layers)))
        if silent or extra:
            said = (
                f"layer {silent[0]} carries no expert ids, though it is"
                if silent
                else (f"layer {extra[0]} carries expert ids, though it is not")
            )
            raise InputError(f"{said} an MoE layer of {model.name}; name the right model with --model")
    return LayerChoice(rows=rows, moe_layer_ids=model.moe_layer_ids or None)


def named_model(name: str | None) -> ModelShape | None:
    """Return the preset that a server's name for its model means, if any."""
    from placement.model import preset_model

    if name is None:
        return None
    try:
        return preset_model(name.rstrip("/"))
    except InputError:
        # Servers name models as they like.
        return None


def likely_model(
    *,
    num_layers: int | None = None,
    ids_per_token: int | None = None,
    num_experts: int | None = None,
    least_experts: int = 1,
    top_k: int | None = None,
) -> ModelShape | None:
    """Return the one preset that fits what a dump shows; `None` where none or more than one does.

    Parameters
    ----------
    num_layers
        Layers of the dump: all decoder layers, or the MoE layers alone.
    ids_per_token
        Layers times top-k, where only the product shows.
    num_experts, least_experts, top_k
        Experts per layer, or at least how many there are; experts per token.
    """
    from placement.model import MODELS

    found = [
        model
        for model in MODELS.values()
        if num_experts in (None, model.num_experts)
        and model.num_experts >= least_experts
        and top_k in (None, model.top_k)
        and num_layers in (None, model.num_layers, model.num_decoder_layers)
        and ids_per_token in (None, model.num_decoder_layers * model.top_k)
    ]
    return found[0] if len(found) == 1 else None
