"""Experts and whole models at real sizes, with random weights; only what a rank holds is ever allocated.

Shape letter: C rows (slots) of one rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.instances import Shape
from placement.runtime.families.protocol import ModelFamily, MoELayer
from placement.runtime.families.registry import family_of, moe_layers_of
from placement.runtime.tiny import tiny_model

__all__ = ["experts_of", "rows_of", "whole_model"]

WEIGHT_STD = 0.02


def experts_of(
    shape: Shape, num_rows: int, *, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[ModelFamily, MoELayer]:
    """Return a MoE layer whose experts hold `num_rows` random experts on a device; the rest has no storage.

    Parameters
    ----------
    shape
        Sizes.
    num_rows
        Experts to hold: the slots of a rank, say.
    seed
        Seed of the weights.
    """
    with torch.device("meta"):
        model = tiny_model(
            shape.model_type,
            num_layers=1,
            num_experts=num_rows,
            top_k=min(shape.top_k, num_rows),
            **_widths(shape),
        )
    layer = moe_layers_of(model)[0]
    _fill(layer.experts.to(dtype).to_empty(device=device), seed)
    return family_of(model), layer


def rows_of(layer: MoELayer, first: int, num_rows: int) -> MoELayer:
    """Return the same layer with some of its experts, which share storage with the given ones."""
    experts = layer.experts
    part = type(experts).__new__(type(experts))
    part.__dict__.update(experts.__dict__)
    part._parameters = dict(experts._parameters)
    for name in layer.expert_tensors:
        rows = getattr(experts, name).detach()[first : first + num_rows]
        part._parameters[name] = nn.Parameter(rows)
    return replace(layer, experts=part)


def whole_model(
    shape: Shape, num_layers: int, *, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Any:
    """Return a whole random model of a shape's family, attention included, with few layers."""
    width = next(width for width in (128, 64, 16) if shape.hidden_size % width == 0)
    heads = shape.hidden_size // width
    with torch.device(device):
        model: Any = tiny_model(
            shape.model_type,
            num_layers=num_layers,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            vocab_size=1024,
            context=8192,
            seed=seed,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=width,
            initializer_range=WEIGHT_STD,
            **_widths(shape),
        )
    return model.to(device, dtype)


def _widths(shape: Shape) -> dict[str, int]:
    return {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.expert_hidden_size,
        "moe_intermediate_size": shape.expert_hidden_size,
    }


@torch.no_grad()
def _fill(module: nn.Module, seed: int) -> None:
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=WEIGHT_STD, generator=generator)
