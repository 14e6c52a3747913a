"""Has transformers build a model with one row per slot of a rank in its expert tensors, and load it.

Shape letter: C rows of the rank.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from placement.checkpoint.header import quoted
from placement.errors import InputError
from placement.runtime.checkpoint import first_line, loader_of, quiet_transformers
from placement.runtime.families.registry import moe_layers_of
from placement.runtime.parallel.loading_tensors import LazyTensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["empty_model", "load_rows", "plain_config", "set_rows", "usable_device"]

_UNDONE = ("fp8", "mxfp4")
"""Quantisations whose scales are stored for each expert."""


def empty_model(config: PretrainedConfig, folder: Path) -> PreTrainedModel:
    """Build the model of a checkpoint without any values.

    Its class is the one that `load_checkpoint` would load, or else the one that was saved.

    Raises
    ------
    InputError
        If transformers knows no such model.
    """
    try:
        with torch.device("meta"), quiet_transformers():
            model: PreTrainedModel = _factory(config)(config)
    except (ValueError, TypeError, RuntimeError, ImportError) as exc:
        raise InputError(f"cannot build the model of {folder}: {first_line(exc)}") from exc
    return model


def _factory(config: PretrainedConfig) -> Any:
    import transformers

    loader = loader_of(config)
    if type(config) in loader._model_mapping:
        return loader.from_config
    saved_from = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(saved_from, type) and issubclass(saved_from, transformers.PreTrainedModel):
        return saved_from
    return loader.from_config  # which says best what it does not know


def plain_config(config: PretrainedConfig, folder: Path) -> PretrainedConfig:
    """Return a configuration under which quantised weights become plain ones while they are loaded.

    Raises
    ------
    InputError
        If they are quantised in another way than transformers can undo row by row.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return config
    settings = dict(given if isinstance(given, dict) else given.to_dict())
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    if method not in _UNDONE:
        raise InputError(
            f"{folder}: its weights are quantised ({method}); of those only {' and '.join(_UNDONE)} can be "
            "spread, convert the others to bfloat16 first"
        )
    plain = copy.deepcopy(config)
    plain.quantization_config = settings | {"dequantize": True}
    return plain


def usable_device(device: torch.device | str) -> torch.device:
    """Return a device that tensors can be put on.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as exc:  # AssertionError: a torch built without that device
        raise InputError(f"device {str(device)!r} cannot be used: {first_line(exc)}") from exc


def set_rows(model: nn.Module, num_rows: int) -> None:
    """Give the expert tensors of every MoE layer another number of rows, without values for new ones."""
    for layer in moe_layers_of(model):
        for name in layer.expert_tensors:
            old: nn.Parameter = getattr(layer.experts, name)
            rows_C = (
                old.detach()[:num_rows] if num_rows <= len(old) else old.new_empty(num_rows, *old.shape[1:])
            )
            # A view would keep the storage of the rows that go.
            setattr(layer.experts, name, nn.Parameter(rows_C.clone(), requires_grad=old.requires_grad))


def load_rows(
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    tensors: Mapping[str, LazyTensor],
    folder: Path,
    *,
    num_rows: int,
    dtype: torch.dtype | None,
    device: torch.device,
) -> PreTrainedModel:
    """Load a state dict into a model with `num_rows` rows in its expert tensors, completely or not at all.

    Raises
    ------
    InputError
        If tensors are missing, left over, unreadable or of the wrong shape.
    """
    from safetensors import SafetensorError

    straight = device.type != "cpu" and find_spec("accelerate") is not None
    try:
        with quiet_transformers():
            model, info = _with_rows(kind, num_rows).from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype="auto" if dtype is None else dtype,
                device_map={"": device} if straight else None,
                generation_config=_generation_config(folder),
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as exc:
        raise InputError(f"cannot load the weights in {folder}: {first_line(exc)}") from exc
    _check_complete(folder, info)
    if getattr(config, "quantization_config", None) is not None:
        # Or it would be saved as it was stored, in names alone: it has forgotten that it was quantised.
        vars(model).pop("_weight_conversions", None)
    model.__class__ = kind
    model.name_or_path = model.config.name_or_path = str(folder)
    loaded: PreTrainedModel = model.to(device)
    return loaded


def _with_rows(kind: type[PreTrainedModel], num_rows: int) -> Any:
    """Return a class that builds such a model with other rows: loaded tensors are checked against it."""

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        set_rows(self, num_rows)

    # Names decide how transformers converts what is stored.
    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def _generation_config(folder: Path) -> Any:
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None  # the model makes one of its own
    try:
        return GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as exc:
        raise InputError(f"{folder}/generation_config.json cannot be read: {first_line(exc)}") from exc


def _check_complete(folder: Path, info: Mapping[str, Any]) -> None:
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} of the model's tensors, {missing[0]} among them")
    if unexpected:
        raise InputError(
            f"{folder} has {len(unexpected)} tensors that are none of the model's, {quoted(unexpected[0])} "
            "among them; config.json belongs to another checkpoint"
        )
