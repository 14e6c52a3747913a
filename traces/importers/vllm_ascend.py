"""Reads vllm-ascend's expert heat: a ``.pt`` file with pairs of each expert in each MoE layer.

``[layers, experts]``, or one such table per step; with redundant experts ``[layers, ranks, slots of a
rank]``, which the expert map maps back to experts. Dense layers are not listed. Top-k is not said: the model
tells. Shape letters: W windows (steps), L MoE layers, E experts, R ranks, S slots of a rank.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.counts import ExpertCounts
from traces.files import check_size, reading
from traces.importers.torch_file import as_array, is_torch_file, leading_strings, load_torch

if TYPE_CHECKING:
    from placement.model_shape import ModelShape
    from traces.readers import ReadOptions

__all__ = ["open", "sniff"]

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]

_LIMIT_MAP_BYTES = 1 << 28
_KEYS = ("moe_load", "expert_heat")
_FOREIGN = (ValueError, RecursionError, TypeError, KeyError, OverflowError)


def sniff(path: Path) -> bool:
    """Tell whether `path` is a PyTorch file that holds a bare tensor, or one under a key of vllm-ascend's."""
    if not is_torch_file(path):
        return False
    words = leading_strings(path)
    return any(key in words for key in _KEYS) or _bare(words)


def _bare(words: tuple[str, ...]) -> bool:
    """Tell whether a pickle's first texts are those of a tensor itself: its storage comes first."""
    plumbing = {"storage", "cpu", "torch._utils", "_rebuild_tensor_v2", "torch", "collections", "OrderedDict"}
    names = [word for word in words[:6] if word not in plumbing and not word.endswith("Storage")]
    return bool(words) and all(name.isdigit() or name.startswith(("npu", "cuda")) for name in names)


def open(path: Path, options: ReadOptions) -> ExpertCounts:
    """Read the heat as counts.

    Raises
    ------
    InputError
        If it is damaged, no table of counts, not of the model, or the model is not named.
    """
    with reading(path):
        if not is_torch_file(path):
            raise InputError("is no PyTorch file, which vllm-ascend's expert heat is")
    content = load_torch(path)
    with reading(path):
        if isinstance(content, dict):
            key = next((key for key in _KEYS if key in content), None)
            if key is None:
                found = ", ".join(str(each)[:30] for each in list(content)[:5])
                raise InputError(f"holds no {' or '.join(_KEYS)} but: {found or 'nothing'}")
            content = content[key]
        heat = _whole_numbers(as_array(content, "the heat"))
        if options.model is None:
            raise InputError(
                f"holds a table {list(heat.shape)} of counts, but not how many experts a token selects; name "
                "the model with --model"
            )
        load_WLE = _logical(heat, options.model, options.physical_map)
        return ExpertCounts(
            load_WLE=load_WLE,
            top_k=options.model.top_k,
            model_name=options.model.name,
            moe_layer_ids=options.model.moe_layer_ids,
        )


def _whole_numbers(heat: Array) -> IntArray:
    """Return counts as integers; floats are accepted where they are whole."""
    if heat.dtype.kind not in "iuf" or heat.ndim not in (2, 3, 4) or not heat.size:
        raise InputError(f"holds {heat.dtype} {list(heat.shape)}, no table [layers, experts] of counts")
    check_size(heat.size * 8, heat.size * heat.itemsize)
    if heat.dtype.kind == "f":
        if not np.isfinite(heat).all() or float(np.abs(heat).max()) >= 2.0**53:
            raise InputError("holds counts that are no finite numbers")
        if not (heat == np.round(heat)).all():
            raise InputError("holds fractions where counts belong; give the heat before it is scaled")
    elif heat.dtype == np.uint64 and int(heat.max()) > np.iinfo(np.int64).max:
        raise InputError(f"holds the count {heat.max()}, which is too large")
    return heat.astype(np.int64)


def _logical(heat: IntArray, model: ModelShape, physical_map: Path | None) -> IntArray:
    """Return ``[windows, layers, experts]`` from heat per expert or per slot, with or without steps."""
    table = (model.num_layers, model.num_experts)
    if heat.shape == table:
        return heat[np.newaxis]
    if heat.ndim == 3 and heat.shape[1:] == table:
        return heat
    slots = _slots(heat, model)
    if slots is None:
        raise InputError(
            f"holds a table {list(heat.shape)}; {model.name} has {model.num_layers} MoE layers of "
            f"{model.num_experts} experts; name the right model with --model"
        )
    if physical_map is None:
        raise InputError(
            f"counts {slots.shape[2]} slots per layer, {model.name} has {model.num_experts} experts; give "
            "the expert map that was loaded with --physical-map"
        )
    expert_LS = _read_map(physical_map, model, slots.shape[2])
    load_WLE = np.zeros((len(slots), *table), dtype=np.int64)
    for layer, expert_S in enumerate(expert_LS):
        np.add.at(load_WLE[:, layer].T, expert_S, slots[:, layer].T)
    return load_WLE


def _slots(heat: IntArray, model: ModelShape) -> IntArray | None:
    """Return heat per slot, ``[windows, layers, slots]``, if the model's layers are where they should be."""
    if heat.ndim == 4 and heat.shape[1] == model.num_layers:
        return heat.reshape(len(heat), model.num_layers, -1)
    if heat.ndim < 4 and heat.shape[0] == model.num_layers:
        return heat.reshape(1, model.num_layers, -1)
    return None


def _read_map(path: Path, model: ModelShape, num_slots: int) -> IntArray:
    """Read which expert each slot held from an expert map, ``[layers, slots]``."""
    with reading(path, *_FOREIGN):
        if path.stat().st_size > _LIMIT_MAP_BYTES:
            raise InputError("is too large for an expert map")
        layers = json.loads(path.read_text(encoding="utf-8"))["layer_list"]
        rows = [[device["device_expert"] for device in layer["device_list"]] for layer in layers]
        expert_LS = np.array([[expert for held in row for expert in held] for row in rows])
        if expert_LS.shape != (model.num_layers, num_slots) or expert_LS.dtype.kind != "i":
            raise InputError(f"does not list {num_slots} slots in each of {model.num_layers} layers")
        if int(expert_LS.min()) < 0 or int(expert_LS.max()) >= model.num_experts:
            raise InputError(f"names experts outside 0..{model.num_experts - 1}")
        return expert_LS
