"""Tiny random models of every supported family, for tests and dry runs of code that runs a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from placement.runtime.families.registry import family_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["tiny_model"]


def tiny_model(
    model_type: str,
    *,
    num_layers: int = 3,
    num_experts: int = 6,
    top_k: int = 2,
    vocab_size: int = 32,
    context: int = 64,
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """Build a model of a supported family with random weights, a few thousand parameters, float32.

    Parameters
    ----------
    num_layers, num_experts, top_k
        Decoder layers, experts of each MoE layer, experts per token.
    vocab_size, context
        Vocabulary and longest sequence, in tokens.
    seed
        Seed of the weights; torch's global generator is left as it was.
    config
        Further entries of the family's configuration, such as `mlp_only_layers`.

    Raises
    ------
    InputError
        If the family is not supported.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    family_named(model_type)
    build: Any = AutoModelForCausalLM  # untyped there
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 8,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        # Wide enough that routers have opinions and a misplaced expert shows in the logits.
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    filled = AutoConfig.for_model(
        model_type,
        num_hidden_layers=num_layers,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        vocab_size=vocab_size,
        max_position_embeddings=context,
        **(sizes | config),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build.from_config(filled, dtype=torch.float32)
    built: PreTrainedModel = model.eval()
    return built
