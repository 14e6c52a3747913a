"""Finds the shape of a model: a preset, a Hugging Face ``config.json``, or a YAML file.

The YAML file has the fields of `ModelShape`::

    name: my-moe                  # default: the file's name
    num_layers: 24                # MoE layers
    num_experts: 64               # routed experts per MoE layer
    top_k: 6
    hidden_size: 2048
    expert_hidden_size: 1408      # inner width of one expert
    num_shared_experts: 2         # default 0
    matrices_per_expert: 3        # default: gate, up and down
    weight_dtype: bf16            # default; or fp32, fp16, fp8, int8, mxfp4
    num_decoder_layers: 25        # default num_layers: no dense layer
    moe_layer_ids: [1, 2, 3, 4]   # ... needed with dense layers: decoder layer of each MoE layer
    num_mtp_layers: 1             # default 0: multi-token-prediction layers with experts, after the others
    num_expert_groups: 8          # group-limited routing: experts in equal groups of consecutive ids ...
    top_groups: 3                 # ... and a token's experts lie in this many; default 1 and all
"""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from placement._fields import Fields, load_yaml, read_text
from placement._suggest import did_you_mean
from placement.errors import InputError
from placement.model_config import model_from_config
from placement.model_presets import ALIASES, MODELS
from placement.model_shape import BITS_PER_WEIGHT, ModelShape, bits_per_weight

__all__ = [
    "BITS_PER_WEIGHT",
    "MODELS",
    "ModelShape",
    "bits_per_weight",
    "match_model",
    "model_from_config",
    "model_from_fields",
    "preset_model",
    "resolve_model",
]

_TEXT_FIELDS = ("name", "weight_dtype")
_REQUIRED_FIELDS = ("num_layers", "num_experts", "top_k", "hidden_size", "expert_hidden_size")


def preset_model(name: str) -> ModelShape:
    """Return a preset shape by name; touches no file.

    Case, ``_`` for ``-`` and the organisation of a hub name (``deepseek-ai/DeepSeek-R1``) do not matter.

    Raises
    ------
    InputError
        If no preset has that name, with the nearest one.
    """
    key = name.strip().lower().replace("_", "-").replace(" ", "-").rpartition("/")[2]
    key = ALIASES.get(key, key)
    if key not in MODELS:
        raise InputError(
            f"unknown model {name!r}; {did_you_mean(key, MODELS)}; or name a directory with config.json, "
            "a .json or a .yaml file"
        )
    return MODELS[key]


def resolve_model(name_or_path: str | os.PathLike[str]) -> ModelShape:
    """Return the shape of a model from a preset's name or from files.

    A directory with ``config.json`` and a ``.json`` file are Hugging Face configurations, a ``.yaml`` or
    ``.yml`` file has the fields of `ModelShape`; anything else is a preset's name.

    Raises
    ------
    InputError
        If a file cannot be read or a value in it is wrong, or no preset has that name.
    """
    text = os.fspath(name_or_path)
    if text.lower().endswith(".json"):
        return _read_config(Path(text), name=_stem(Path(text)))
    if text.lower().endswith((".yaml", ".yml")):
        return _read_yaml(Path(text))
    config = os.path.join(text, "config.json")
    if os.path.isfile(config):
        return _read_config(Path(config), name=Path(text).resolve().name)
    if os.path.isdir(text) and not _is_preset(text):
        raise InputError(f"model directory {text!r} has no config.json")
    return preset_model(text)


def _is_preset(text: str) -> bool:
    try:
        preset_model(text)
    except InputError:
        return False
    return True


def _stem(path: Path) -> str:
    """Return the model's name: that of the directory for a ``config.json``, else that of the file."""
    return path.resolve().parent.name if path.name == "config.json" else path.stem


def _read_config(path: Path, *, name: str) -> ModelShape:
    source = str(path)
    try:
        config = json.loads(read_text(path, what="model configuration"))
    except (ValueError, RecursionError) as exc:
        reason = "nested too deeply" if isinstance(exc, RecursionError) else str(exc)
        raise InputError(f"{source} is not valid JSON: {reason}") from exc
    return model_from_config(config, name=name or None, source=source)


def _read_yaml(path: Path) -> ModelShape:
    source = str(path)
    values = load_yaml(read_text(path, what="model file"), source=source)
    return model_from_fields(values, name=path.stem, source=source)


def model_from_fields(given_values: object, *, name: str = "model", source: str = "model") -> ModelShape:
    """Return the shape of a model from what a YAML file of its fields holds.

    Parameters
    ----------
    name
        Name of a model that gives none.
    source
        Start of every message.

    Raises
    ------
    InputError
        If a field is missing, unknown or wrong.
    """
    known = [field.name for field in fields(ModelShape)]
    given = Fields(given_values, source=source, known=known, required=_REQUIRED_FIELDS)
    values: dict[str, Any] = {"name": name}
    for key in (key for key in known if key in given):
        if key in _TEXT_FIELDS:
            values[key] = given.text(key)
        elif key == "moe_layer_ids":
            values[key] = tuple(given.integers(key))
        else:
            values[key] = given.integer(key, minimum=0)
    return ModelShape(**values)


def match_model(num_layers: int, num_experts: int, top_k: int | None = None) -> ModelShape | None:
    """Return the preset with a trace's shape; None where none or more than one fits.

    Parameters
    ----------
    num_layers
        Layers of the trace: the MoE layers, or all decoder layers where no preset has that many MoE layers.
    num_experts, top_k
        Routed experts per layer and per token; `top_k` None where the trace does not tell.
    """
    alike = [m for m in MODELS.values() if m.num_experts == num_experts and top_k in (None, m.top_k)]
    exact = [model for model in alike if model.num_layers == num_layers]
    found = exact or [model for model in alike if model.num_decoder_layers == num_layers]
    return found[0] if len(found) == 1 else None
