"""The table of transformers v5's model families: which attributes hold their routers and experts.

Families with code of their own have a file of their own (Llama-4). A model of several parts (vision and
language) goes by the type of its language model, which is found in its configuration.
"""

from __future__ import annotations

from placement.runtime.families.fused import FusedFamily
from placement.runtime.families.protocol import ModelFamily
from placement.runtime.families.scores import ScoresFamily

__all__ = ["FAMILIES", "NOT_SUPPORTED"]

# Block `mlp`, router `gate`, experts `experts`, tensors `gate_up_proj` and `down_proj`: the usual names.
_USUAL = (
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "cohere2_moe",
    "deepseek_ocr2_text",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "dots1",
    "dots3_note_text",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe_text",
    "glm5_next_text",
    "glm_moe_dsa",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "inkling2_text",
    "inkling_text",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "mistral4",
    "mistral_large4_text",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_omni_moe_text",
    "qwen3_vl_moe_text",
    "qwen4_exp_text",
    "solar_open",
    "step3p5",
    "unlimited_ocr_text",
)
_WITH_BIASES = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")

FAMILIES: tuple[ModelFamily, ...] = (
    *(FusedFamily(model_type=model_type) for model_type in _USUAL),
    FusedFamily(model_type="afmoe", router="router"),
    FusedFamily(model_type="aria_text", router="router"),
    FusedFamily(
        model_type="gemma4_text",
        block="",
        router="router",
        num_experts="proj.out_features",
        top_k="config.top_k_experts",
    ),
    FusedFamily(model_type="gpt_oss", router="router", expert_tensors=_WITH_BIASES),
    FusedFamily(model_type="granitemoe", block="block_sparse_moe", router="router"),
    FusedFamily(model_type="granitemoe_swa", block="block_sparse_moe", router="router"),
    FusedFamily(model_type="granitemoehybrid", block="block_sparse_moe", router="router"),
    FusedFamily(model_type="granitemoeshared", block="block_sparse_moe", router="router"),
    FusedFamily(model_type="jamba", block="feed_forward", router="router"),
    FusedFamily(model_type="lfm2_moe", block="feed_forward"),
    FusedFamily(model_type="muse_spark_text", common_tensors=("post_expert_norm.weight",)),
    FusedFamily(model_type="nemotron_h", block="mixer", expert_tensors=("up_proj", "down_proj")),
    FusedFamily(model_type="openai_privacy_filter", router="router", expert_tensors=_WITH_BIASES),
    FusedFamily(model_type="phimoe", router="router"),
    FusedFamily(
        model_type="longcat_flash",
        router="router",
        num_experts="n_routed_experts",
        record_only="its last experts compute nothing and have no weights to place",
    ),
    ScoresFamily(
        model_type="dbrx",
        layers="blocks",
        block="ffn",
        router="router",
        num_experts="layer.out_features",
        softmax=True,
        record_only="its experts' weights are matrices of all experts, cut while it runs",
    ),
    ScoresFamily(
        model_type="jetmoe",
        router="router",
        experts="input_linear",
        logits_output=4,
        record_only="its router hands tokens over sorted by expert, not with their experts",
    ),
)

NOT_SUPPORTED = {
    "diffusion_gemma_text": "it runs an encoder and a decoder over the same tokens many times",
    "doge": "its experts are rows of an embedding, thousands per layer",
    "ernie4_5_vl_moe_text": "text and pictures have experts of their own in every layer",
    "nllb-moe": "it is an encoder and a decoder, and tokens over an expert's capacity have none",
    "switch_transformers": "it is an encoder and a decoder, and tokens over an expert's capacity have none",
    "vitpose_backbone": "its experts are one for each data set, named by the caller",
    "zaya": "its routers may select no expert",
}
"""Model types with experts that have no adapter, and why."""
