"""TensorRT-LLM: ``moe_config.load_balancer`` as a YAML file of its own.

Three keys and no other. Assignments are keyed by the decoder layer; a layer with experts that has none is a
KeyError, and those for multi-token prediction, which number on from the decoder layers, are such layers. Rank
``r`` holds slots ``r * num_slots / ranks`` and up. With ``layer_updates_per_iter: 0`` nothing moves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement._fields import brief
from placement.errors import InputError
from placement.formats.document import keys_of
from placement.formats.layers import ModelLayers, brief_ids
from placement.formats.protocol import FormatOptions, Usage
from placement.formats.rules import by_device, from_rows, integer, integer_rows
from placement.plan import Placement

__all__ = ["SUFFIXES", "check", "decode", "encode", "recognise", "usage"]

SUFFIXES: tuple[str, ...] = (".yaml", ".yml")

ASSIGNMENTS = "initial_global_assignments"
KEYS = ("num_slots", ASSIGNMENTS, "layer_updates_per_iter")

IntArray = npt.NDArray[np.int64]


def check(placement: Placement, options: FormatOptions) -> None:
    """Verify that TensorRT-LLM can load the placement; see `PlacementFormat.check`."""
    _layers(options.layers)
    by_device(placement, target="TensorRT-LLM")


def encode(placement: Placement, options: FormatOptions) -> str:
    """Return the YAML text: a list of slots for every layer with experts."""
    layers = _layers(options.layers)
    map_LR = by_device(placement, target="TensorRT-LLM")
    rows = dict(zip(layers.moe_layer_ids, map_LR.tolist(), strict=True))
    own = own_row(map_LR.shape[1], placement.num_experts, placement.num_devices).tolist()
    rows.update(dict.fromkeys(layers.mtp_layer_ids or (), own))
    lines = [f"num_slots: {map_LR.shape[1]}", "layer_updates_per_iter: 0", f"{ASSIGNMENTS}:"]
    lines += [f"  {layer}: [{', '.join(map(str, row))}]" for layer, row in rows.items()]
    return "\n".join(lines) + "\n"


def own_row(num_slots: int, num_experts: int, num_devices: int) -> IntArray:
    """Return the layout that TensorRT-LLM itself begins with, ``[slots]``.

    Every rank begins with its own share of the experts and goes on with those of the next.
    """
    first_D = np.arange(num_devices, dtype=np.int64) * num_experts // num_devices
    local_S = np.arange(num_slots // num_devices, dtype=np.int64)
    return np.asarray((first_D[:, None] + local_S) % num_experts, dtype=np.int64).ravel()


def recognise(document: object) -> bool:
    """Tell by the keys, at the top or under ``moe_config.load_balancer`` of a whole configuration."""
    inner = _balancer(document)
    return isinstance(inner, dict) and (ASSIGNMENTS in inner or "num_slots" in inner)


def decode(document: object, options: FormatOptions) -> Placement:
    """Read the assignments of the MoE layers."""
    values = keys_of(_balancer(document), required=KEYS[:2], known=KEYS[2:])
    num_slots = integer(values["num_slots"], name="num_slots", minimum=1)
    integer(values.get("layer_updates_per_iter", 0), name="layer_updates_per_iter")
    ids, rows = _assignments(values[ASSIGNMENTS])
    if rows.shape[1] != num_slots:
        raise InputError(f"num_slots is {num_slots}, the assignments have {rows.shape[1]}")
    layers = options.layers
    chosen = ids if layers is None else _moe_layers(ids, layers)
    return from_rows(
        rows[[ids.index(layer) for layer in chosen]],
        num_devices=options.num_devices,
        num_experts=None if layers is None else layers.num_experts,
        moe_layer_ids=chosen,
        model_name=None if layers is None else layers.model_name,
    )


def usage(placement: Placement, options: FormatOptions, path: Path) -> Usage:
    """Return the entry of TensorRT-LLM's configuration, and what was added for other layers."""
    layers = _layers(options.layers)
    if layers.mtp_layer_ids is None:
        note = (
            "nothing says whether the model has multi-token-prediction layers; if the engine runs any, it "
            "stops with a KeyError: name the model with --model, or their number with --mtp-layers"
        )
    elif layers.mtp_layer_ids:
        note = (
            f"layers {brief_ids(layers.mtp_layer_ids)} (multi-token prediction) have the engine's own "
            "layout: the placement does not cover them, and without it the engine stops with a KeyError"
        )
    else:
        note = ""
    return Usage(
        arguments=(
            "--ep_size",
            str(placement.num_devices),
            "--extra_llm_api_options",
            "CONFIG.yaml",
        ),
        # The engine refuses a load balancer without attention data parallelism.
        settings=(("moe_config.load_balancer", str(path)), ("enable_attention_dp", "true")),
        notes=(note,) if note else (),
    )


def _layers(layers: ModelLayers | None) -> ModelLayers:
    if layers is None:
        raise InputError(
            "TensorRT-LLM names decoder layers, and nothing says which of them are MoE layers; name the "
            "model with --model"
        )
    return layers


def _balancer(document: object) -> Any:
    """Return the load balancer's part of a document."""
    if isinstance(document, dict) and isinstance(document.get("moe_config"), dict):
        return document["moe_config"].get("load_balancer")
    return document


def _assignments(values: object) -> tuple[tuple[int, ...], IntArray]:
    """Return the layer ids, ascending, and their rows."""
    if not isinstance(values, dict) or not values:
        raise InputError(
            f"{ASSIGNMENTS} must map layers to slots, not {brief(values)}; it names no placement"
        )
    keys = {_layer_id(key): key for key in values}
    if len(keys) < len(values):
        raise InputError(f"{ASSIGNMENTS} gives a layer twice, as a number and as a text")
    ids = tuple(sorted(keys))
    return ids, integer_rows([values[keys[layer]] for layer in ids], name=ASSIGNMENTS)


def _layer_id(key: object) -> int:
    # JSON has no other keys than texts, and the engine takes their numbers.
    number = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 8 else key
    return integer(number, name=f"a layer of {ASSIGNMENTS}")


def _moe_layers(ids: tuple[int, ...], layers: ModelLayers) -> tuple[int, ...]:
    """Return the model's MoE layers; the file must have them all, and no dense one."""
    missing = [layer for layer in layers.moe_layer_ids if layer not in ids]
    if missing:
        raise InputError(
            f"{ASSIGNMENTS} lacks layer {missing[0]} of {layers.describe()}; the engine stops with a KeyError"
        )
    end = layers.num_decoder_layers or layers.moe_layer_ids[-1] + 1
    strange = [layer for layer in ids if layer < end and layer not in layers.moe_layer_ids]
    if strange:
        raise InputError(
            f"{ASSIGNMENTS} names layer {strange[0]}, which is dense in {layers.model_name or 'the model'} "
            f"({layers.describe()}); name the right model with --model"
        )
    return layers.moe_layer_ids
