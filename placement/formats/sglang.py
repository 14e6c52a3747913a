"""SGLang: ``--init-expert-location FILE.json``.

The file is handed to a constructor as keyword arguments, so that any key beside the map is a TypeError. Rows
are all hidden layers, dense ones included, and are looked up by decoder layer; multi-token-prediction layers
have none. Slots lie device by device, equally many on each.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from placement.formats.document import keys_of
from placement.formats.layers import ModelLayers
from placement.formats.protocol import FormatOptions, Usage
from placement.formats.rules import by_device, from_rows, integer_rows, trivial_row
from placement.io import dump_json
from placement.plan import Placement

__all__ = ["SUFFIXES", "check", "decode", "encode", "recognise", "usage"]

SUFFIXES: tuple[str, ...] = (".json",)

KEY = "physical_to_logical_map"


def check(placement: Placement, options: FormatOptions) -> None:
    """Verify that SGLang can load the placement; see `PlacementFormat.check`."""
    _layers(options.layers)
    by_device(placement, target="SGLang")


def encode(placement: Placement, options: FormatOptions) -> str:
    """Return the JSON text: a row for every hidden layer."""
    layers, total = _layers(options.layers)
    map_LR = by_device(placement, target="SGLang")
    # Dense layers route nothing; SGLang gives them the layout that it begins with.
    rows = np.tile(trivial_row(map_LR.shape[1], placement.num_experts), (total, 1))
    rows[list(layers.moe_layer_ids)] = map_LR
    return dump_json({KEY: rows.tolist()}) + "\n"


def recognise(document: object) -> bool:
    """Tell SGLang's file from ours, which has the same map: ours says where the slots are."""
    return isinstance(document, dict) and KEY in document and not {"format", "device_of_slot"} & set(document)


def decode(document: object, options: FormatOptions) -> Placement:
    """Read the rows of the MoE layers."""
    rows = integer_rows(keys_of(document, required=(KEY,))[KEY], name=KEY)
    layers, total = _layers(options.layers)
    if len(rows) != total:
        hint = "; that many are its MoE layers alone" if len(rows) == layers.num_layers else ""
        raise InputError(
            f"lists {len(rows)} layers, and {layers.model_name or 'the model'} has {total} hidden layers, "
            f"dense ones included{hint}"
        )
    map_LR: npt.NDArray[np.int64] = rows[list(layers.moe_layer_ids)]
    return from_rows(
        map_LR,
        num_devices=options.num_devices,
        num_experts=layers.num_experts,
        moe_layer_ids=layers.moe_layer_ids,
        model_name=layers.model_name,
    )


def usage(placement: Placement, options: FormatOptions, path: Path) -> Usage:
    """Return SGLang's options."""
    layers, total = _layers(options.layers)
    redundant = by_device(placement, target="SGLang").shape[1] - placement.num_experts
    dense = total - layers.num_layers
    return Usage(
        arguments=(
            "--init-expert-location",
            str(path),
            "--ep-num-redundant-experts",
            str(redundant),
            "--ep-size",
            str(placement.num_devices),
        ),
        notes=(f"{dense} dense layers have the engine's own rows, which nothing reads",) if dense else (),
    )


def _layers(layers: ModelLayers | None) -> tuple[ModelLayers, int]:
    """Return the model's layers and how many hidden ones there are."""
    if layers is None or layers.num_decoder_layers is None:
        raise InputError(
            "SGLang's rows are all hidden layers, dense ones included, and nothing says how many the model "
            "has and which of them are MoE layers; name it with --model"
        )
    return layers, layers.num_decoder_layers
