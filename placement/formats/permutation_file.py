"""The file that carries a permutation to whatever rearranges a checkpoint.

::

    {"format": "moe-placement-permutation/1", "model": "mixtral-8x7b", "num_experts": 4, "num_devices": 2,
     "layers": {"0": [2, 0, 3, 1]}, "inverse": {"0": [1, 3, 0, 2]}}

``layers`` gives the old expert of each new position by decoder layer, ``inverse`` the new position of each
old expert. Both stand in the file so that no reader has to guess which of the two it holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from placement._fields import brief
from placement.errors import InputError
from placement.formats.document import keys_of, read_document
from placement.formats.permutation import Permutation
from placement.formats.protocol import FormatOptions
from placement.formats.rules import by_device, integer, integer_rows
from placement.io import dump_json
from placement.plan import Placement

__all__ = [
    "FORMAT",
    "permutation_from_dict",
    "permutation_of",
    "permutation_to_dict",
    "read_permutation",
    "recognise",
]

FORMAT = "moe-placement-permutation/1"

_KEYS = ("format", "num_experts", "num_devices", "layers", "inverse")


def permutation_to_dict(permutation: Permutation) -> dict[str, Any]:
    """Return the JSON form of a permutation."""
    ids = permutation.moe_layer_ids
    return {
        "format": FORMAT,
        "model": permutation.model_name,
        "num_experts": permutation.num_experts,
        "num_devices": permutation.num_devices,
        "layers": _by_layer(ids, permutation.old_expert_of_new_LE.tolist()),
        "inverse": _by_layer(ids, permutation.new_position_of_old_LE.tolist()),
    }


def _by_layer(ids: tuple[int, ...], rows: list[list[int]]) -> dict[str, list[int]]:
    return {str(layer): row for layer, row in zip(ids, rows, strict=True)}


def permutation_from_dict(document: object) -> Permutation:
    """Read a permutation from its JSON form.

    Raises
    ------
    InputError
        If keys are missing or unknown, a row is no permutation, or the inverse is not that of the layers.
    """
    values = keys_of(document, required=_KEYS, known=("model",))
    if values["format"] != FORMAT:
        raise InputError(f"format is {brief(values['format'])}, not {FORMAT!r}")
    if not isinstance(values.get("model"), str | None):
        raise InputError(f"model is {brief(values['model'])}, not a text")
    ids, rows = _rows(values["layers"], "layers")
    inverse_ids, inverse_rows = _rows(values["inverse"], "inverse")
    permutation = Permutation(
        old_expert_of_new_LE=np.array(rows),
        moe_layer_ids=ids,
        num_devices=integer(values["num_devices"], name="num_devices", minimum=1),
        model_name=values.get("model"),
    )
    if permutation.num_experts != values["num_experts"]:
        raise InputError(
            f"num_experts is {brief(values['num_experts'])}, rows have {permutation.num_experts}"
        )
    if inverse_ids != ids or not np.array_equal(permutation.new_position_of_old_LE, np.array(inverse_rows)):
        raise InputError("the inverse does not undo the layers; write the file again")
    return permutation


def _rows(values: object, name: str) -> tuple[tuple[int, ...], Any]:
    if not isinstance(values, dict) or not values:
        raise InputError(f"{name} must map decoder layers to lists of experts, not {brief(values)}")
    wrong = [key for key in values if not key.isascii() or not key.isdigit() or len(key) > 7]
    if wrong:
        raise InputError(f"{name} has the layer {brief(wrong[0])}; layers are whole numbers of 0 or more")
    keys = {int(key): key for key in values}
    if len(keys) < len(values):
        raise InputError(f"{name} gives a layer twice")
    ids = tuple(sorted(keys))
    return ids, integer_rows([values[keys[layer]] for layer in ids], name=name)


def recognise(document: object) -> bool:
    """Tell by the format, of whatever version."""
    name = document.get("format") if isinstance(document, dict) else None
    return isinstance(name, str) and name.startswith("moe-placement-permutation/")


def permutation_of(placement: Placement, options: FormatOptions, *, target: str) -> Permutation:
    """Return a placement as a permutation for an engine with contiguous shards.

    Raises
    ------
    InputError
        If an expert has several replicas, devices hold different numbers of experts, a group of the router is
        split, or the decoder layers are not known.
    """
    if options.layers is None:
        raise InputError(
            f"a checkpoint for {target} is rearranged by decoder layer, and nothing says which of them are "
            "MoE layers; name the model with --model"
        )
    by_device(placement, target=target)
    permutation = Permutation.from_placement(placement, moe_layer_ids=options.layers.moe_layer_ids)
    _check_groups(permutation, options.layers.num_expert_groups)
    return permutation


def _check_groups(permutation: Permutation, num_groups: int) -> None:
    """Refuse an order that changes what the model computes.

    Group-limited routing first chooses among groups of consecutive experts; where a group is split, the
    rearranged router chooses among others.
    """
    layer = permutation.split_layer(num_groups)
    if layer is not None:
        raise InputError(
            f"the model routes by {num_groups} groups of consecutive experts, and the placement splits one "
            f"in layer {layer}: its rearranged checkpoint would choose other experts; keep groups whole on "
            "devices"
        )


def encode(placement: Placement, options: FormatOptions, *, target: str) -> str:
    """Return the JSON text."""
    return dump_json(permutation_to_dict(permutation_of(placement, options, target=target))) + "\n"


def decode(document: object, options: FormatOptions) -> Placement:
    """Read the placement that contiguous shards of the new order give."""
    permutation = permutation_from_dict(document)
    known = options.layers
    if known is not None and known.moe_layer_ids != permutation.moe_layer_ids:
        raise InputError(
            f"permutes {permutation.num_layers} layers from {permutation.moe_layer_ids[0]}, "
            f"{known.model_name or 'the model'} has {known.describe()}; name the right model with --model"
        )
    return permutation.to_placement()


def read_permutation(path: str | Path) -> Permutation:
    """Read a permutation file.

    Raises
    ------
    InputError
        If it cannot be read or is no permutation.
    """
    try:
        return permutation_from_dict(read_document(Path(path)))
    except InputError as exc:
        raise InputError(f"{path}: {exc}") from exc
