"""vllm-ascend: ``expert_map_path`` of the additional configuration.

The engine looks layers up by their place in the list, MoE layers alone, and devices by theirs; the numbers
that stand beside them are for people, and are checked here because the engine does not. A map cannot hold an
expert twice on a device: the second would overwrite the first.
"""

from __future__ import annotations

import json
from pathlib import Path

from placement.errors import InputError
from placement.formats.document import keys_of
from placement.formats.protocol import FormatOptions, Usage
from placement.formats.rules import by_device, from_rows, integer, integer_rows
from placement.io import dump_json
from placement.plan import Placement

__all__ = ["SUFFIXES", "check", "decode", "encode", "recognise", "usage"]

SUFFIXES: tuple[str, ...] = (".json",)

TARGET = "vllm-ascend"


def check(placement: Placement, options: FormatOptions) -> None:
    """Verify that vllm-ascend can load the placement; see `PlacementFormat.check`."""
    by_device(placement, target=TARGET)


def encode(placement: Placement, options: FormatOptions) -> str:
    """Return the JSON text: MoE layers by place, devices by place."""
    map_LDS = by_device(placement, target=TARGET).reshape(placement.num_layers, placement.num_devices, -1)
    layer_list = [
        {
            "layer_id": layer,
            "device_count": placement.num_devices,
            "device_list": [
                {"device_id": device, "device_expert": experts} for device, experts in enumerate(devices)
            ],
        }
        for layer, devices in enumerate(map_LDS.tolist())
    ]
    return dump_json({"moe_layer_count": placement.num_layers, "layer_list": layer_list}) + "\n"


def recognise(document: object) -> bool:
    """Tell by the list of layers."""
    return isinstance(document, dict) and "layer_list" in document


def decode(document: object, options: FormatOptions) -> Placement:
    """Read every layer's devices."""
    values = keys_of(document, required=("moe_layer_count", "layer_list"))
    layer_list = values["layer_list"]
    count = integer(values["moe_layer_count"], name="moe_layer_count", minimum=1)
    if not isinstance(layer_list, list) or len(layer_list) != count:
        has = f"has {len(layer_list)} layers" if isinstance(layer_list, list) else "is no list"
        raise InputError(f"moe_layer_count is {count}, layer_list {has}")
    known = options.layers
    if known is not None and known.num_layers != count:
        raise InputError(
            f"lists {count} MoE layers, {known.model_name or 'the model'} has {known.describe()}; name the "
            "right model with --model"
        )
    rows = [_devices(layer, index) for index, layer in enumerate(layer_list)]
    num_devices = len(rows[0])
    for index, devices in enumerate(rows):
        if len(devices) != num_devices:
            raise InputError(f"layer {index} has {len(devices)} devices, layer 0 has {num_devices}")
    flat = integer_rows([experts for devices in rows for experts in devices], name="device_expert")
    return from_rows(
        flat.reshape(count, -1),
        num_devices=num_devices,
        num_experts=None if known is None else known.num_experts,
        moe_layer_ids=None if known is None else known.moe_layer_ids,
        model_name=None if known is None else known.model_name,
    )


def _devices(layer: object, index: int) -> list[object]:
    """Return what each device of a layer holds, in order."""
    place = f"layer_list[{index}]"
    values = keys_of(layer, required=("layer_id", "device_count", "device_list"), place=place)
    if values["layer_id"] != index:
        raise InputError(
            f"{place} has layer_id {values['layer_id']!r}; the engine counts MoE layers by their place, so "
            f"it must be {index}"
        )
    devices = values["device_list"]
    if not isinstance(devices, list) or not devices or len(devices) != values["device_count"]:
        raise InputError(f"{place}: device_count is {values['device_count']!r}, and device_list disagrees")
    found = []
    for number, device in enumerate(devices):
        entry = keys_of(
            device, required=("device_id", "device_expert"), place=f"{place}.device_list[{number}]"
        )
        if entry["device_id"] != number:
            raise InputError(
                f"{place}.device_list[{number}] has device_id {entry['device_id']!r}; it must be {number}"
            )
        found.append(entry["device_expert"])
    return found


def usage(placement: Placement, options: FormatOptions, path: Path) -> Usage:
    """Return vllm-ascend's additional configuration."""
    redundant = by_device(placement, target=TARGET).shape[1] - placement.num_experts
    settings = {"eplb_config": {"expert_map_path": str(path)}}
    return Usage(
        arguments=("--enable-expert-parallel", "--additional-config", json.dumps(settings)),
        notes=(
            f"the engine counts the {redundant} redundant experts from the file; before eplb_config existed, "
            "expert_map_path stood at the top of additional_config",
        ),
    )
