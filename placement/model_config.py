"""Reads a Hugging Face ``config.json``: the same few facts under each model family's own keys.

Keys are tried in order; the families that use them are named beside the less obvious ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from placement._fields import brief
from placement.errors import InputError
from placement.model_shape import MAX_LAYERS, ModelShape, canonical_dtype

__all__ = ["model_from_config"]

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers")
_HIDDEN = ("hidden_size", "d_model")
_EXPERT_HIDDEN = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_SHARED_WIDTH = ("shared_expert_intermediate_size", "shared_intermediate_size")
_GROUPS = ("n_group", "num_expert_group")
_DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers")
_MTP_LAYERS = ("num_nextn_predict_layers",)
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")


class _Config:
    """A configuration whose facts may stand under several keys."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def find(self, keys: Sequence[str]) -> tuple[str, Any]:
        """Return the first key that holds a value, and the value; ("", None) where none does."""
        return next(((key, self.values[key]) for key in keys if self.values.get(key) is not None), ("", None))

    def integer(self, keys: Sequence[str], *, what: str = "", default: int | None = None) -> int:
        """Return an integer of 0 or more; `what` names a fact that must be there."""
        key, value = self.find(keys)
        if value is None and default is not None:
            return default
        if value is None:
            raise InputError(f"{self.source} does not give the {what}: none of {', '.join(keys)}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"{self.source}: {key} must be an integer of 0 or more, not {brief(value)}")
        return value

    def integers(self, key: str) -> list[int]:
        """Return a list of integers of 0 or more."""
        values = self.values[key]
        if not isinstance(values, list) or any(type(v) is not int or v < 0 for v in values):
            raise InputError(f"{self.source}: {key} must be a list of integers, not {brief(values)}")
        return values


def model_from_config(
    config: Mapping[str, Any], *, name: str | None = None, source: str = "config.json"
) -> ModelShape:
    """Read the shape of a model from its Hugging Face configuration.

    Parameters
    ----------
    config
        The parsed ``config.json``; the language model may be nested (``text_config``).
    name
        Name of the model; default ``_name_or_path``, then ``model_type``.
    source
        Start of every error message.

    Raises
    ------
    InputError
        If the model has no experts, or a fact is missing or malformed, with the keys that would give it.
    """
    if not isinstance(config, Mapping):
        raise InputError(f"{source} must hold a mapping, not {brief(config)}")
    text = _Config(_language_model(config), source)
    if not text.integer(_EXPERTS, default=0):
        raise InputError(f"{source} describes no Mixture-of-Experts model: none of {', '.join(_EXPERTS)}")
    if text.values.get("moe_latent_size"):
        raise InputError(f"{source}: experts of a latent width (moe_latent_size) are not supported")
    num_layers, moe_layer_ids = _moe_layers(text)
    groups, top_groups = _groups(text)
    return ModelShape(
        name=name or _name(config, text.values),
        num_layers=len(moe_layer_ids),
        num_experts=text.integer(_EXPERTS, what="experts per layer"),
        top_k=text.integer(_TOP_K, what="experts per token"),
        hidden_size=text.integer(_HIDDEN, what="hidden size"),
        expert_hidden_size=text.integer(_EXPERT_HIDDEN, what="inner width of an expert"),
        num_shared_experts=_shared_experts(text),
        matrices_per_expert=_matrices(text),
        weight_dtype=_weight_dtype(config, text),
        num_decoder_layers=num_layers,
        moe_layer_ids=moe_layer_ids,
        num_expert_groups=groups,
        top_groups=top_groups,
        num_mtp_layers=text.integer(_MTP_LAYERS, default=0),
    )


def _language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part that describes the experts: the top, or a nested language model."""
    ffn = config.get("ffn_config")  # DBRX keeps the experts' facts apart
    values = {**config, **ffn} if isinstance(ffn, Mapping) else config
    if any(values.get(key) is not None for key in _EXPERTS):
        return values
    nested = [config[key] for key in _NESTED if isinstance(config.get(key), Mapping)]
    return _language_model(nested[0]) if nested else config


def _name(config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    names = (config.get("_name_or_path"), config.get("model_type"), text.get("model_type"))
    return next((name for name in names if isinstance(name, str) and name.strip()), "model")


def _moe_layers(text: _Config) -> tuple[int, tuple[int, ...]]:
    """Return the number of decoder layers and which of them are MoE layers."""
    pattern = _layer_pattern(text)
    if pattern is not None:
        num_layers, chosen = len(pattern), [i for i, is_moe in enumerate(pattern) if is_moe]
    else:
        num_layers = text.integer(_LAYERS, what="number of layers")
        if num_layers > MAX_LAYERS:
            raise InputError(f"{text.source}: {num_layers} layers; at most {MAX_LAYERS} are accepted")
        chosen = [layer for layer in range(num_layers) if _is_moe(text, layer)]
    if not chosen:
        raise InputError(f"{text.source}: none of the {num_layers} layers is a MoE layer")
    return num_layers, tuple(chosen)


def _layer_pattern(text: _Config) -> list[bool] | None:
    """Return which layers are MoE layers where the configuration lists it layer by layer."""
    values = text.values
    kinds = values.get("mlp_layer_types")
    if isinstance(kinds, list):
        return [kind != "dense" for kind in kinds]
    kinds = values.get("layers_block_type")  # Nemotron-H; Jamba's names attention and Mamba only
    if isinstance(kinds, list) and "moe" in kinds:
        return [kind == "moe" for kind in kinds]
    kinds = values.get("hybrid_override_pattern")  # Nemotron-H: E is a MoE layer
    if isinstance(kinds, str) and kinds:
        return [kind == "E" for kind in kinds]
    if isinstance(values.get("moe_layer_freq"), list):  # MiMo: a 0 or 1 for each layer
        return [bool(flag) for flag in text.integers("moe_layer_freq")]
    if values.get("moe_layers") is not None:  # Llama-4
        listed = set(text.integers("moe_layers"))
        num_layers = text.integer(_LAYERS, what="number of layers")
        if listed and max(listed) >= num_layers:
            raise InputError(f"{text.source}: moe_layers names layer {max(listed)} of {num_layers}")
        return [layer in listed for layer in range(min(num_layers, MAX_LAYERS + 1))]
    return None


def _is_moe(text: _Config, layer: int) -> bool:
    """Tell whether a decoder layer is a MoE layer; every rule that the configuration states must agree."""
    number = text.integer
    values = text.values
    if layer < number(_DENSE_FIRST, default=0):
        return False
    if layer % (number(("moe_layer_freq",), default=1) or 1):  # DeepSeek
        return False
    if (layer + 1) % (number(("decoder_sparse_step",), default=1) or 1):  # Qwen
        return False
    if values.get("mlp_only_layers") is not None and layer in text.integers("mlp_only_layers"):
        return False
    if (layer + 1) % (number(("interleave_moe_layer_step",), default=1) or 1):  # Llama-4
        return False
    if values.get("expert_layer_period") is not None:  # Jamba
        period = number(("expert_layer_period",)) or 1
        return layer % period == number(("expert_layer_offset",), default=0)
    return _in_ernie_range(text, layer)


def _in_ernie_range(text: _Config, layer: int) -> bool:
    interval = text.integer(("moe_layer_interval",), default=1) or 1
    first = text.integer(("moe_layer_start_index",), default=0)
    to_the_end = text.values.get("moe_layer_end_index") in (None, -1)
    last = layer if to_the_end else text.integer(("moe_layer_end_index",))
    return first <= layer <= last and (layer + 1) % interval == 0


def _groups(text: _Config) -> tuple[int, int]:
    """Return the number of expert groups and how many of them a token may use."""
    groups = text.integer(_GROUPS, default=1) or 1
    if text.values.get("topk_method") == "greedy":  # DeepSeek-V2-Lite: groups are not used
        return 1, 1
    return groups, text.integer(("topk_group",), default=groups) or groups


def _shared_experts(text: _Config) -> int:
    count = text.integer(_SHARED, default=0)
    if count == 0 and text.integer(_SHARED_WIDTH, default=0) > 0:
        return 1
    if count == 0 and str(text.values.get("model_type", "")).startswith("llama4"):
        return 1  # built into the architecture, not in the configuration
    return count


def _matrices(text: _Config) -> int:
    """Return the matrices of an expert: experts with a squared ReLU (Nemotron-H) have no gate."""
    return 2 if text.values.get("mlp_hidden_act") == "relu2" else 3


def _weight_dtype(config: Mapping[str, Any], text: _Config) -> str:
    for values in (text.values, config):
        quantization = values.get("quantization_config")
        if isinstance(quantization, Mapping):
            return _quantized_dtype(quantization, text.source)
    for values in (text.values, config):
        dtype = values.get("dtype") or values.get("torch_dtype")
        if isinstance(dtype, str):
            return canonical_dtype(dtype)
    return "bf16"


def _quantized_dtype(quantization: Mapping[str, Any], source: str) -> str:
    method = quantization.get("quant_method")
    if method in ("fp8", "fbgemm_fp8"):
        return "fp8"
    if method == "mxfp4":
        return "mxfp4"
    if method == "compressed-tensors":
        kinds = {_compressed_dtype(group) for group in _mapping(quantization.get("config_groups")).values()}
        if len(kinds) == 1 and None not in kinds:
            return str(kinds.pop())
    raise InputError(
        f"{source}: the weight type of quantization_config (quant_method {brief(method)}) is not known; "
        "give the model as YAML with weight_dtype, or remove quantization_config"
    )


def _compressed_dtype(group: object) -> str | None:
    weights = _mapping(_mapping(group).get("weights"))
    known = {"8 float": "fp8", "8 int": "int8"}
    return known.get(f"{weights.get('num_bits')} {weights.get('type')}")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
