"""A class of like devices in a mixed cluster: how many, how much memory, how fast at either phase."""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.devices import DeviceKind
from placement.errors import InputError
from placement.planning.transformer import TransformerShape

__all__ = ["NO_FLASH_PENALTY", "DeviceClass", "class_from_sheet"]

NO_FLASH_PENALTY = 3.3
"""How much longer attention scores take on a kind that FlashAttention does not support.

With it a V100 takes 3.7 times as long as an A40 for one attention layer of hidden size 2048 at 64K tokens,
the largest ratio in HeterMoE (arXiv 2504.03871).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceClass:
    """Devices of one kind and their times.

    Parameters
    ----------
    name
        What plans call it.
    kind
        Its kind; links and memory come from it.
    count
        Devices.
    attention_s
        Forward seconds of one device for the attention part of one layer, per token; includes the gate,
        shared experts and dense layers that attention devices compute.
    expert_s
        Forward seconds of one device for the routed experts of one layer, per token with all of its top-k.
    head_s
        Forward seconds for what follows the last layer (the language model's head), per token.
    memory_bytes
        Memory of one device; 0 (default) for the kind's.
    bandwidth
        Into and out of one device, bytes per second and direction; 0 (default) for the kind's adapter.

    Raises
    ------
    InputError
        If a figure is out of range.
    """

    name: str
    kind: DeviceKind
    count: int
    attention_s: float
    expert_s: float
    head_s: float = 0.0
    memory_bytes: int = 0
    bandwidth: float = 0.0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"class {self.name!r} has {self.count} devices; it must have 1 or more")
        for name in ("attention_s", "expert_s"):
            self._check(name, getattr(self, name) > 0, "positive")
        for name in ("head_s", "memory_bytes", "bandwidth"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        if not self.memory_bytes:
            object.__setattr__(self, "memory_bytes", self.kind.memory_bytes)
        if not self.bandwidth:
            object.__setattr__(self, "bandwidth", self.kind.nic_bandwidth)

    def _check(self, name: str, in_range: bool, wanted: str) -> None:
        value = getattr(self, name)
        if not (in_range and math.isfinite(value)):
            raise InputError(f"{name} of class {self.name!r} is {value}; it must be {wanted} and finite")


def class_from_sheet(
    kind: DeviceKind,
    *,
    count: int,
    transformer: TransformerShape,
    sequence_length: int,
    score_penalty: float = 1.0,
    name: str = "",
    memory_bytes: int = 0,
    bandwidth: float = 0.0,
) -> DeviceClass:
    """Return a class with times from the data sheet: floating-point operations over achieved FLOP/s.

    Parameters
    ----------
    score_penalty
        How much longer attention scores take than their operations say: 1 where FlashAttention runs,
        `NO_FLASH_PENALTY` on kinds without it (V100, T4).

    Raises
    ------
    InputError
        If a figure is out of range.
    """
    if not score_penalty >= 1 or not math.isfinite(score_penalty):
        raise InputError(f"score_penalty of {kind.name!r} is {score_penalty}; it must be 1 or more")
    if sequence_length < 1:
        raise InputError(f"sequence_length is {sequence_length}; it must be 1 or more")
    model = transformer.moe
    projections = 2.0 * transformer.attention_params
    scores = transformer.attention_flops(tokens=1, sequence_length=sequence_length) - projections
    shared = 2.0 * transformer.shared_expert_params() + 2.0 * model.hidden_size * model.num_experts
    dense_layers = transformer.num_layers - model.num_layers
    dense = 2.0 * model.matrices_per_expert * model.hidden_size * transformer.dense_hidden_size
    one_layer = projections + score_penalty * scores
    # Layers without experts run on attention devices, spread evenly over the stages between experts.
    attention = one_layer + shared + (one_layer + dense) * dense_layers / model.num_layers
    return DeviceClass(
        name=name or kind.name,
        kind=kind,
        count=count,
        attention_s=attention / kind.achieved_flops,
        expert_s=model.top_k * model.flops_per_pair / kind.achieved_flops,
        head_s=2.0 * model.hidden_size * transformer.vocabulary_size / kind.achieved_flops,
        memory_bytes=memory_bytes,
        bandwidth=bandwidth,
    )
