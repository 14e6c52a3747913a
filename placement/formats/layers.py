"""Which decoder layers the rows of a placement belong to, and which layers a model has beside them.

Engines number layers differently: SGLang counts every hidden layer, vLLM the MoE layers alone, TensorRT-LLM
names decoder layers. A placement that is off by the dense layers loads without a word into the wrong ones,
so nothing here is guessed: what is not known is asked for, and what contradicts is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from placement.errors import InputError
from placement.model import ModelShape, preset_model
from placement.plan import Placement

__all__ = ["ModelLayers", "layers_of", "stated_layer_ids"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayers:
    """The layers of a model.

    Parameters
    ----------
    moe_layer_ids
        Decoder layer of each MoE layer, ascending.
    num_decoder_layers
        Decoder layers, dense ones included; None where nobody says.
    mtp_layer_ids
        Multi-token-prediction layers with experts, which count on from the decoder layers; None where nobody
        says.
    num_experts
        Routed experts per MoE layer; None where nobody says.
    num_expert_groups
        Groups of group-limited routing; 1 where the model knows none.
    model_name
        Whose layers they are.
    """

    moe_layer_ids: tuple[int, ...]
    num_decoder_layers: int | None = None
    mtp_layer_ids: tuple[int, ...] | None = None
    num_experts: int | None = None
    num_expert_groups: int = 1
    model_name: str | None = None

    @classmethod
    def of(cls, model: ModelShape, *, num_mtp_layers: int | None = None) -> ModelLayers:
        """Return the layers of a model.

        Parameters
        ----------
        num_mtp_layers
            Multi-token-prediction layers that the engine runs; default the model's.
        """
        count = model.num_mtp_layers if num_mtp_layers is None else num_mtp_layers
        return cls(
            moe_layer_ids=model.moe_layer_ids,
            num_decoder_layers=model.num_decoder_layers,
            mtp_layer_ids=_behind(model.num_decoder_layers, count),
            num_experts=model.num_experts,
            # Where a token may use every group, there is no choice among them.
            num_expert_groups=1 if model.top_groups == model.num_expert_groups else model.num_expert_groups,
            model_name=model.name,
        )

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return len(self.moe_layer_ids)

    def describe(self) -> str:
        """Return which layers they are, for a message."""
        return f"{self.num_layers} MoE layers {brief_ids(self.moe_layer_ids)}"


def brief_ids(ids: tuple[int, ...]) -> str:
    """Return layer ids in few words: a range, or first, second and last."""
    if len(ids) > 2 and ids == tuple(range(ids[0], ids[-1] + 1)):
        return f"{ids[0]}-{ids[-1]}"
    return ", ".join(map(str, ids)) if len(ids) <= 4 else f"{ids[0]}, {ids[1]}, ..., {ids[-1]}"


def _behind(num_decoder_layers: int, count: int) -> tuple[int, ...]:
    return tuple(range(num_decoder_layers, num_decoder_layers + count))


def stated_layer_ids(placement: Placement) -> tuple[int, ...] | None:
    """Return the decoder layers that a placement is for, None where it does not really say.

    A placement file without a model numbers its layers 0, 1, 2, ...: that says how many there are, and no
    more.
    """
    ids = placement.moe_layer_ids
    unnamed = placement.model_name is None and "num_decoder_layers" not in _facts(placement)
    return None if unnamed and ids == tuple(range(placement.num_layers)) else ids


def layers_of(
    placement: Placement, model: ModelShape | None = None, *, num_mtp_layers: int | None = None
) -> ModelLayers | None:
    """Return the layers that a placement is for, None where neither it nor a model says.

    Parameters
    ----------
    model
        The model as named by the user; default what the placement file says of its model, or the preset of
        that name.
    num_mtp_layers
        Multi-token-prediction layers that the engine runs; default the model's.

    Raises
    ------
    InputError
        If placement and model contradict each other.
    """
    ids = stated_layer_ids(placement)
    described = _described(placement, ids, num_mtp_layers)
    if model is None:
        if described is not None:
            return described
        model = _preset(placement.model_name)
    if model is not None:
        _check_match(placement, ids, model)
        return ModelLayers.of(model, num_mtp_layers=num_mtp_layers)
    if ids is None or ids == tuple(range(placement.num_layers)):
        # Numbers from 0 may be decoder layers, or what a trace without a layer map was numbered with.
        return None
    return ModelLayers(moe_layer_ids=ids, num_experts=placement.num_experts, model_name=placement.model_name)


def _facts(placement: Placement) -> Mapping[str, object]:
    facts = placement.extra.get("model", {})
    return facts if isinstance(facts, Mapping) else {}


def _described(
    placement: Placement, ids: tuple[int, ...] | None, num_mtp_layers: int | None
) -> ModelLayers | None:
    """Read the layers off what the placement file itself says of its model."""
    facts = _facts(placement)
    total, mtp = facts.get("num_decoder_layers"), facts.get("num_mtp_layers", 0)
    groups = facts.get("num_expert_groups", 1)
    if ids is None or type(total) is not int:
        return None
    if type(mtp) is not int or type(groups) is not int or total <= ids[-1] or mtp < 0 or groups < 1:
        raise InputError(
            f"the placement says that its model has {total!r} decoder layers and {mtp!r} for multi-token "
            f"prediction; its MoE layers go up to {ids[-1]}"
        )
    return ModelLayers(
        moe_layer_ids=ids,
        num_decoder_layers=total,
        mtp_layer_ids=_behind(total, mtp if num_mtp_layers is None else num_mtp_layers),
        num_experts=placement.num_experts,
        num_expert_groups=groups,
        model_name=placement.model_name,
    )


def _preset(name: str | None) -> ModelShape | None:
    """Return the preset of a name; a model of any other name is none."""
    if name is None:
        return None
    try:
        return preset_model(name)
    except InputError:
        return None


def _check_match(placement: Placement, ids: tuple[int, ...] | None, model: ModelShape) -> None:
    if placement.num_experts != model.num_experts:
        raise InputError(
            f"the placement has {placement.num_experts} experts per layer, {model.name} has "
            f"{model.num_experts}; name the right model with --model"
        )
    if placement.num_layers != model.num_layers:
        raise InputError(
            f"the placement has {placement.num_layers} layers, {model.name} has "
            f"{ModelLayers.of(model).describe()}; name the right model with --model"
        )
    if ids is not None and ids != model.moe_layer_ids:
        raise InputError(
            f"the placement is for decoder layers {brief_ids(ids)}, {model.name} has its MoE layers at "
            f"{brief_ids(model.moe_layer_ids)}: it would load into the wrong layers; name the right model "
            "with --model"
        )
