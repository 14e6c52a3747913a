"""What is trained: the model, the batch, and the bytes that training keeps for each weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.errors import InputError
from placement.planning.transformer import TransformerShape

__all__ = ["StateBytes", "TrainingJob"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBytes:
    """Bytes that training keeps for each weight; by default 16, mixed precision with Adam.

    Parameters
    ----------
    weights, gradients
        2 bytes each in half precision.
    optimizer
        4 bytes each for the master weight and two moments.

    Raises
    ------
    InputError
        If a figure is negative or not finite, or a weight takes nothing.
    """

    weights: float = 2.0
    gradients: float = 2.0
    optimizer: float = 12.0

    def __post_init__(self) -> None:
        for name in ("weights", "gradients", "optimizer"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"state bytes: {name} is {getattr(self, name)}; it must be 0 or more")
        if self.weights == 0:
            raise InputError("state bytes: weights is 0; a weight takes some bytes")

    @property
    def total(self) -> float:
        """Bytes for each weight, nothing sharded."""
        return self.weights + self.gradients + self.optimizer

    def sharded(self, ways: int) -> float:
        """Return the bytes for each weight with the optimizer's part split over `ways` devices (ZeRO-1)."""
        return self.weights + self.gradients + self.optimizer / ways


MIXED_PRECISION = StateBytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """What is trained.

    Parameters
    ----------
    transformer
        Sizes of the model.
    sequence_length
        Tokens of a sequence.
    global_batch
        Sequences of a step, over all devices.
    state
        Bytes kept for each weight.
    flash_attention
        Whether attention keeps no scores (4 bytes for each head and pair of tokens otherwise).
    shard_optimizer
        Whether the optimizer's bytes are split over devices with the same weights (ZeRO-1, arXiv 1910.02054).

    Raises
    ------
    InputError
        If a count is below 1.
    """

    transformer: TransformerShape
    sequence_length: int
    global_batch: int
    state: StateBytes = MIXED_PRECISION
    flash_attention: bool = True
    shard_optimizer: bool = False

    def __post_init__(self) -> None:
        for name in ("sequence_length", "global_batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step."""
        return self.global_batch * self.sequence_length

    @property
    def dense_params(self) -> int:
        """Weights of the feed-forward part of a decoder layer without experts."""
        shape = self.transformer
        return shape.moe.matrices_per_expert * shape.moe.hidden_size * shape.dense_hidden_size

    @property
    def embedding_params(self) -> int:
        """Weights of the embedding, and of the head."""
        return self.transformer.vocabulary_size * self.transformer.moe.hidden_size

    @property
    def num_params(self) -> int:
        """Weights of the model."""
        shape, moe = self.transformer, self.transformer.moe
        experts = moe.num_experts * moe.params_per_expert + shape.shared_expert_params()
        dense_layers = shape.num_layers - moe.num_layers
        return (
            shape.num_layers * shape.attention_params
            + moe.num_layers * experts
            + dense_layers * self.dense_params
            + 2 * self.embedding_params
        )

    @property
    def forward_flops_per_token(self) -> float:
        """Floating-point operations of the forward pass for one token."""
        shape, moe = self.transformer, self.transformer.moe
        attention = shape.attention_flops(tokens=1.0, sequence_length=self.sequence_length)
        experts = moe.top_k * moe.flops_per_pair + 2.0 * shape.shared_expert_params()
        dense_layers = shape.num_layers - moe.num_layers
        return (
            shape.num_layers * attention
            + moe.num_layers * experts
            + dense_layers * 2.0 * self.dense_params
            + 2.0 * self.embedding_params
        )

    @property
    def model_flops_per_step(self) -> float:
        """Floating-point operations of a step, forward and backward, nothing computed twice."""
        return 3.0 * self.tokens_per_step * self.forward_flops_per_token
