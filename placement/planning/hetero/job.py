"""What a mixed cluster is to compute in a step: layers, experts and their loads, tokens, memory, exchange.

Shape letters: L MoE layers, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from placement._arrays import FloatArray
from placement.errors import InputError

__all__ = ["HeteroJob"]


@dataclass(frozen=True, kw_only=True, eq=False)
class HeteroJob:
    """A training step, or a forward pass, of a model with experts.

    Parameters
    ----------
    load_LE
        Relative load of each expert, ``[layers, experts]``; any unit, each layer is brought to mean 1.
    tokens_per_step
        Tokens of one step, of all groups together.
    micro_batches
        Numbers of micro-batches R that a group's tokens may be cut into; the plan chooses one.
    backward
        Work of the backward pass over that of the forward pass: 2, or 3 where activations are computed
        again; 0 (default) for a forward pass alone.
    expert_bytes
        Memory of one expert of one layer: weights, and in training gradients and optimizer states.
    attention_bytes
        Memory that attention takes on an attention device, all layers, activations included.
    activation_bytes
        Memory that an expert device needs beside experts.
    token_bytes
        Bytes of one token's copies as they travel to its top-k experts; 0 (default) for free exchange.
    dispatch_latency_s, combine_latency_s
        Seconds of an exchange beside its bytes; a measured T_D or T_C is given here with 0 bytes.

    Raises
    ------
    InputError
        If a figure is out of range.
    """

    load_LE: FloatArray
    tokens_per_step: float
    micro_batches: tuple[int, ...] = (4,)
    backward: float = 0.0
    expert_bytes: int = 0
    attention_bytes: int = 0
    activation_bytes: int = 0
    token_bytes: float = 0.0
    dispatch_latency_s: float = 0.0
    combine_latency_s: float = 0.0

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        load_LE = np.array(self.load_LE, dtype=np.float64)
        if load_LE.ndim != 2 or 0 in load_LE.shape:
            raise InputError(f"load_LE has shape {load_LE.shape}, not [layers, experts]")
        if not np.isfinite(load_LE).all() or (load_LE < 0).any() or (load_LE.sum(axis=1) <= 0).any():
            raise InputError("loads of experts must be finite, not negative, and not all 0 in a layer")
        load_LE = load_LE / load_LE.mean(axis=1, keepdims=True)
        load_LE.setflags(write=False)
        set_(self, "load_LE", load_LE)
        set_(self, "micro_batches", tuple(sorted(set(self.micro_batches))))
        if not self.micro_batches or self.micro_batches[0] < 1:
            raise InputError(f"micro_batches is {self.micro_batches}; it must hold numbers of 1 or more")
        if not (math.isfinite(self.tokens_per_step) and self.tokens_per_step > 0):
            raise InputError(f"tokens_per_step is {self.tokens_per_step}; it must be above 0")
        names = ("backward", "expert_bytes", "attention_bytes", "activation_bytes", "token_bytes")
        for name in (*names, "dispatch_latency_s", "combine_latency_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 or more")

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.load_LE.shape[0])

    @property
    def num_experts(self) -> int:
        """Routed experts per layer."""
        return int(self.load_LE.shape[1])

    @property
    def passes(self) -> float:
        """Work of forward and backward pass in forward passes."""
        return 1.0 + self.backward
