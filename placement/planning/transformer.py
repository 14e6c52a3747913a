"""What planning must know of a model beside its experts: attention and dense layers."""

from __future__ import annotations

from dataclasses import dataclass

from placement.errors import InputError
from placement.model_shape import ModelShape

__all__ = ["TransformerShape"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerShape:
    """A decoder of attention layers and MoE layers.

    Parameters
    ----------
    moe
        Sizes of the MoE layers.
    num_attention_heads
        Heads of each attention layer.
    attention_params
        Weights of one attention layer; 0 (default) for ``4 d^2``, d the hidden size: four square matrices,
        as Piper (arXiv 2605.05049) counts them. Grouped or latent attention has fewer.
    dense_hidden_size
        Inner width of the feed-forward part of decoder layers without experts; 0 (default) where there are
        none or they are left out.
    vocabulary_size
        Entries of the vocabulary; 0 (default) leaves embedding and head out.

    Raises
    ------
    InputError
        If a number is out of range.
    """

    moe: ModelShape
    num_attention_heads: int
    attention_params: int = 0
    dense_hidden_size: int = 0
    vocabulary_size: int = 0

    def __post_init__(self) -> None:
        if self.num_attention_heads < 1:
            raise InputError(
                f"model {self.moe.name!r}: num_attention_heads is {self.num_attention_heads}; it must be "
                "1 or more"
            )
        for name in ("attention_params", "dense_hidden_size", "vocabulary_size"):
            if getattr(self, name) < 0:
                raise InputError(f"model {self.moe.name!r}: {name} is {getattr(self, name)}")
        if not self.attention_params:
            object.__setattr__(self, "attention_params", 4 * self.moe.hidden_size**2)

    @property
    def num_layers(self) -> int:
        """Decoder layers, dense ones included."""
        return self.moe.num_decoder_layers

    def attention_flops(self, *, tokens: float, sequence_length: int, causal: bool = True) -> float:
        """Return the forward floating-point operations of one attention layer on some tokens.

        Projections take two per weight and token; scores and their use take ``4 s d`` per token of a
        sequence of s, half of it where a token sees only those before it.
        """
        scores = 4.0 * sequence_length * self.moe.hidden_size * (0.5 if causal else 1.0)
        return tokens * (2.0 * self.attention_params + scores)

    def shared_expert_params(self) -> int:
        """Return the weights of one layer's shared experts, each as large as a routed one."""
        return self.moe.num_shared_experts * self.moe.params_per_expert
