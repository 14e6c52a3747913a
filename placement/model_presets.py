"""Shapes of published models, by the names people use for them.

Figures are those of each model's published ``config.json``. Weight types are those of the published
checkpoint: DeepSeek-V3, Kimi-K2 and MiniMax-M2 are fp8, gpt-oss is mxfp4, the rest bf16.
"""

from __future__ import annotations

from placement.model_shape import ModelShape

__all__ = ["ALIASES", "MODELS"]


def _model(
    name: str,
    layers: int,
    experts: int,
    top_k: int,
    sizes: tuple[int, int],
    *,
    shared: int = 0,
    dtype: str = "bf16",
    first: int = 0,
    step: int = 1,
    groups: tuple[int, int] = (1, 1),
    mtp: int = 0,
) -> ModelShape:
    """Build a preset: `layers` decoder layers, of which `first`, `first` + `step`, ... are MoE layers."""
    moe_layer_ids = tuple(range(first, layers, step))
    return ModelShape(
        name=name,
        num_layers=len(moe_layer_ids),
        num_experts=experts,
        top_k=top_k,
        hidden_size=sizes[0],
        expert_hidden_size=sizes[1],
        num_shared_experts=shared,
        weight_dtype=dtype,
        num_decoder_layers=layers,
        moe_layer_ids=moe_layer_ids,
        num_expert_groups=groups[0],
        top_groups=groups[1],
        num_mtp_layers=mtp,
    )


# Decoder layers, routed experts, top-k, (hidden size, inner width of an expert).
_PRESETS = (
    _model("mixtral-8x7b", 32, 8, 2, (4096, 14336)),
    _model("mixtral-8x22b", 56, 8, 2, (6144, 16384)),
    _model("olmoe-1b-7b", 16, 64, 8, (2048, 1024)),
    _model("qwen2-57b-a14b", 28, 64, 8, (3584, 2560), shared=1),
    _model("qwen3-30b-a3b", 48, 128, 8, (2048, 768)),
    _model("qwen3-235b-a22b", 94, 128, 8, (4096, 1536)),
    # DeepSeek, Kimi and GLM begin with dense layers.
    _model("deepseek-v2-lite", 27, 64, 6, (2048, 1408), shared=2, first=1),
    _model("deepseek-v2", 60, 160, 6, (5120, 1536), shared=2, first=1, groups=(8, 3)),
    _model("deepseek-v3", 61, 256, 8, (7168, 2048), shared=1, first=3, groups=(8, 4), dtype="fp8", mtp=1),
    _model("kimi-k2", 61, 384, 8, (7168, 2048), shared=1, first=1, dtype="fp8"),
    _model("gpt-oss-20b", 24, 32, 4, (2880, 2880), dtype="mxfp4"),
    _model("gpt-oss-120b", 36, 128, 4, (2880, 2880), dtype="mxfp4"),
    # Every second layer of Maverick is a MoE layer, the odd ones; every layer of Scout.
    _model("llama-4-maverick", 48, 128, 1, (5120, 8192), shared=1, first=1, step=2),
    _model("llama-4-scout", 48, 16, 1, (5120, 8192), shared=1),
    _model("glm-4.5", 92, 160, 8, (5120, 1536), shared=1, first=3, mtp=1),
    _model("glm-4.5-air", 46, 128, 8, (4096, 1408), shared=1, first=1, mtp=1),
    _model("minimax-m2", 62, 256, 8, (3072, 1536), dtype="fp8"),
)

MODELS: dict[str, ModelShape] = {model.name: model for model in _PRESETS}
"""Preset shapes by name."""

_OTHER_NAMES = {
    "mixtral-8x7b": ("mixtral", "mixtral-8x7b-v0.1", "mixtral-8x7b-instruct-v0.1"),
    "mixtral-8x22b": ("mixtral-8x22b-v0.1", "mixtral-8x22b-instruct-v0.1"),
    "olmoe-1b-7b": ("olmoe", "olmoe-1b-7b-0924", "olmoe-1b-7b-0125", "olmoe-1b-7b-0125-instruct"),
    "qwen2-57b-a14b": ("qwen2-57b", "qwen2-57b-a14b-instruct"),
    "qwen3-30b-a3b": (
        "qwen3-30b",
        "qwen3-30b-a3b-base",
        "qwen3-30b-a3b-instruct-2507",
        "qwen3-30b-a3b-thinking-2507",
    ),
    "qwen3-235b-a22b": ("qwen3-235b", "qwen3-235b-a22b-instruct-2507", "qwen3-235b-a22b-thinking-2507"),
    "deepseek-v2-lite": ("dsv2-lite", "deepseek-v2-lite-chat"),
    "deepseek-v2": ("dsv2", "deepseek-v2-chat", "deepseek-v2.5"),
    "deepseek-v3": (
        "dsv3",
        "deepseek-v3-base",
        "deepseek-v3-0324",
        "deepseek-v3.1",
        "deepseek-r1",
        "deepseek-r1-0528",
    ),
    "kimi-k2": ("kimi-k2-base", "kimi-k2-instruct", "kimi-k2-instruct-0905"),
    "gpt-oss-20b": ("gptoss-20b", "gptoss20b"),
    "gpt-oss-120b": ("gptoss-120b", "gptoss120b"),
    "llama-4-maverick": (
        "llama4-maverick",
        "llama-4-maverick-17b-128e",
        "llama-4-maverick-17b-128e-instruct",
    ),
    "llama-4-scout": ("llama4-scout", "llama-4-scout-17b-16e", "llama-4-scout-17b-16e-instruct"),
    "glm-4.5": ("glm4.5", "glm-4.5-base"),
    "glm-4.5-air": ("glm4.5-air", "glm-4.5-air-base"),
    "minimax-m2": ("minimax-m2.5",),
}

ALIASES: dict[str, str] = {alias: name for name, aliases in _OTHER_NAMES.items() for alias in aliases}
"""Preset by other names, checkpoints of the same shape among them."""
