"""Tiny random models of every supported family, for tests and dry runs of code that runs a model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from placement.runtime.families.registry import family_named

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["tiny_model"]

_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "shared_intermediate_size": 8,
    "moe_shared_expert_intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    # Low-rank attention (DeepSeek and its kin).
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    # Sparse attention's index, and linear attention.
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 64,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    # One group of experts and no dense layer, unless asked for.
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
    # Wide enough that routers have opinions and a misplaced expert shows in the logits.
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers")
_CONTEXT = ("max_position_embeddings", "model_max_length", "max_seq_len")
_SPARSE_LAYERS = "mlp_layer_types"
"""Families that list which of their layers are MoE layers."""

_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
# Only what differs from the sizes above: families whose attention, or choice of layers, is their own.
# A kind of layer is given once for all of them, or as (the first, all others); `None` leaves an entry of the
# sizes out.
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "axk1": {"head_dim": 4},
    "bailing_hybrid": {"layer_group_size": 1},
    "beam": {"mlp_layer_types": "sparse"},
    "dbrx": {
        "d_model": 16,
        "n_heads": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 8, "hidden_size": 16, "ffn_act_fn": {"name": "silu"}},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": "sparse"},
    "deepseek_v3": {"head_dim": 4},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 8, "hc_mult": 2, "mlp_layer_types": "moe"},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"use_sliding_window": False, "shared_experts_intermediate_size": 8},
    "flint": {"mlp_only_layers": []},
    "gemma4_text": {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 1,
        "layer_types": "full_attention",
        "per_layer_config": {},
    },
    "glm4_moe_lite": {"mlp_layer_types": "sparse"},
    "glm4v_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0]}},
    "glm5_next_text": {
        "qk_rope_head_dim": 0,
        "mlp_layer_types": "sparse",
        "layer_types": "full_attention",
        "hc_mult": 2,
    },
    "granitemoehybrid": {**_MAMBA, "layer_types": "full_attention"},
    "hy_v3": {"mlp_layer_types": "sparse"},
    "hy_v4": {"mlp_layer_types": "sparse"},
    "inkling2_text": {"unpadded_vocab_size": None, "d_rel": 4, "rel_extent": 16},
    "inkling_text": {"d_rel": 4, "rel_extent": 16},
    "jamba": {
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
    },
    "kimi_linear": {"layer_types": "full_attention"},
    "laguna": {"mlp_layer_types": "sparse"},
    "lfm2_moe": {"layer_types": "full_attention"},
    "longcat_flash": {
        "head_dim": 4,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 8,
        "ffn_hidden_size": 8,
        "num_hidden_layers": None,
    },
    "mimo_v2_flash": {
        "head_dim": 12,
        "layer_types": "full_attention",
        "mlp_layer_types": "sparse",
    },
    "muse_spark_text": {"moe_hidden_size": 16},
    "nemotron_h": {**_MAMBA, "layers_block_type": ("full_attention", "moe")},
    "qwen3_5_moe_text": {"layer_types": "full_attention"},
    "qwen3_next": {"layer_types": "full_attention"},
    "qwen4_exp_text": {
        "layer_types": "full_attention",
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_embed_dim": 8,
    },
    "step3p5": {
        "pad_token_id": 1,
        "layer_types": "full_attention",
        "mlp_layer_types": "sparse",
        "sliding_window": 8,
        "share_expert_dim": 8,
    },
}
# Language models of several-part models that transformers' own factories do not build.
_CLASSES = {
    "deepseek_ocr2_text": "deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2TextModel",
    "mistral4": "mistral4.modeling_mistral4.Mistral4ForCausalLM",
    "qwen3_omni_moe_text": "qwen3_omni_moe.modeling_qwen3_omni_moe.Qwen3OmniMoeThinkerTextModel",
    "step3p5": "step3p7.modeling_step3p7.Step3p7TextModel",
    "unlimited_ocr_text": "unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrTextModel",
}


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

    It has a head where the family has a causal language model of its own, else it is the bare decoder.

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
    from transformers import AutoConfig

    family_named(model_type)
    sizes = _SIZES | _of_family(model_type, num_layers)
    sizes |= dict.fromkeys(_EXPERTS, num_experts) | dict.fromkeys(_TOP_K, top_k)
    sizes |= dict.fromkeys(_LAYERS, num_layers) | dict.fromkeys(_CONTEXT, context)
    sizes |= {"vocab_size": vocab_size}
    if "ffn_config" in sizes:  # DBRX describes its experts apart
        sizes["ffn_config"] |= {"moe_num_experts": num_experts, "moe_top_k": top_k}
    left_out = [key for key, value in _OF_FAMILY.get(model_type, {}).items() if value is None]
    given = {key: value for key, value in sizes.items() if key not in left_out}
    filled = AutoConfig.for_model(model_type, **(given | config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = _built(filled)
    built: PreTrainedModel = model.eval()
    return built


def _of_family(model_type: str, num_layers: int) -> dict[str, Any]:
    """Entries of a family, a kind of layer given for every layer."""
    entries = dict(_OF_FAMILY.get(model_type, {}))
    entries |= {key: dict(value) for key, value in entries.items() if isinstance(value, dict)}
    for key in {"layer_types", "mlp_layer_types", "layers_block_type"} & set(entries):
        first, others = entries[key] if isinstance(entries[key], tuple) else (entries[key], entries[key])
        entries[key] = [first] + [others] * (num_layers - 1)
    return entries


def _built(config: PretrainedConfig) -> PreTrainedModel:
    from transformers import AutoModel, AutoModelForCausalLM

    causal: Any = AutoModelForCausalLM  # untyped there
    if config.model_type in _CLASSES:
        module, _, name = _CLASSES[config.model_type].rpartition(".")
        factory: Any = getattr(import_module(f"transformers.models.{module}"), name)._from_config
    else:
        factory = (causal if type(config) in causal._model_mapping else AutoModel).from_config
    built: PreTrainedModel = factory(config, dtype=torch.float32)
    return built
