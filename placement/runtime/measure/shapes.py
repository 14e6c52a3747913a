"""The shapes in which experts are measured: those of a model, as many of them as one rank holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from placement.errors import InputError
from placement.model import preset_model
from placement.model_shape import ModelShape
from placement.runtime.measure.sizes import DEFAULT_MODELS, Sizes

__all__ = ["ExpertShape", "models_named", "shape_on_rank"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """Experts of one rank and layer.

    Parameters
    ----------
    label
        Name of the model's preset.
    hidden_size, expert_hidden_size
        Widths of a token and inside an expert, as measured.
    num_experts
        Routed experts of the model's layer.
    local_experts
        Experts that are measured on each rank.
    gated
        Whether an expert has a gate beside its up projection.
    """

    label: str
    hidden_size: int
    expert_hidden_size: int
    num_experts: int
    local_experts: int
    gated: bool = True

    @property
    def first_width(self) -> int:
        """Width behind the first projection: gate and up, or up alone."""
        return self.expert_hidden_size * (2 if self.gated else 1)

    @property
    def is_gpt_oss(self) -> bool:
        """Whether experts have gpt-oss's biases and gate, which cost time of their own."""
        return self.label.startswith("gpt-oss")

    @property
    def params_per_expert(self) -> int:
        """Weights of one expert."""
        return self.hidden_size * (self.first_width + self.expert_hidden_size)

    def as_dict(self) -> dict[str, object]:
        """Return the entry of the calibration file."""
        return {
            "hidden_size": self.hidden_size,
            "expert_hidden_size": self.expert_hidden_size,
            "num_experts": self.num_experts,
            "local_experts": self.local_experts,
            "matrices_per_expert": 3 if self.gated else 2,
        }


def models_named(names: Sequence[str]) -> list[ModelShape]:
    """Return the presets of some names, each once; the default ones for none.

    Raises
    ------
    InputError
        If there is no such preset.
    """
    return list({model.name: model for model in map(preset_model, names or DEFAULT_MODELS)}.values())


def shape_on_rank(model: ModelShape, *, world_size: int, sizes: Sizes, element_bytes: int) -> ExpertShape:
    """Return what one of some ranks measures of a model: its part of the experts, halved until they fit.

    Parameters
    ----------
    element_bytes
        Bytes of a weight as measured.

    Raises
    ------
    InputError
        If not even one expert fits.
    """
    hidden, inner = (
        max(8, size // sizes.shrink // 8 * 8) for size in (model.hidden_size, model.expert_hidden_size)
    )
    gated = model.matrices_per_expert == 3
    expert_bytes = element_bytes * hidden * inner * model.matrices_per_expert
    local = math.ceil(model.num_experts / world_size)
    while local > 1 and local * expert_bytes > sizes.expert_bytes:
        local = math.ceil(local / 2)
    if local * expert_bytes > sizes.expert_bytes:
        raise InputError(
            f"one expert of {model.name} takes {expert_bytes / 2**20:.0f} MiB, more than the "
            f"{sizes.expert_bytes / 2**20:.0f} MiB that a GPU can spare; free memory or leave the model out"
        )
    return ExpertShape(
        label=model.name,
        hidden_size=hidden,
        expert_hidden_size=inner,
        num_experts=model.num_experts,
        local_experts=local,
        gated=gated,
    )
