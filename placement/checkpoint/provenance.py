"""``moe_placement_permutation.json``: what was done to a checkpoint, beside its weights.

Permutations add up: the file always leads from the original checkpoint to this one. When the sum is nothing,
because a permutation was undone, there is no file, and the folder is the original again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from placement.errors import InputError
from placement.formats.permutation import Permutation
from placement.formats.permutation_file import permutation_to_dict, read_permutation
from placement.io import dump_json

__all__ = [
    "FILE_NAME",
    "compose",
    "is_ours",
    "provenance_name",
    "read_provenance",
    "write_provenance",
]

FILE_NAME = "moe_placement_permutation.json"


def provenance_name(stack: str | None) -> str:
    """Return the file's name; a stack of layers that was meant by name has a file of its own."""
    return FILE_NAME if stack is None else f"moe_placement_permutation.{stack}.json"


def is_ours(folder: Path) -> bool:
    """Tell whether a folder holds a checkpoint that was permuted here."""
    return any(folder.glob("moe_placement_permutation*.json"))


def read_provenance(folder: Path, stack: str | None) -> Permutation | None:
    """Return the permutation that led from the original checkpoint to this one; None for an original.

    Raises
    ------
    InputError
        If the file is damaged.
    """
    path = folder / provenance_name(stack)
    return read_permutation(path) if path.is_file() else None


def compose(first: Permutation | None, then: Permutation) -> Permutation:
    """Return what two permutations do one after the other.

    Raises
    ------
    InputError
        If they are for different layers or numbers of experts.
    """
    if first is None:
        return then
    if first.moe_layer_ids != then.moe_layer_ids or first.num_experts != then.num_experts:
        raise InputError(
            f"the checkpoint was permuted before in {first.num_layers} layers of {first.num_experts} "
            f"experts, the placement is for {then.num_layers} of {then.num_experts}; use the placement of "
            "this model"
        )
    return Permutation(
        old_expert_of_new_LE=np.take_along_axis(
            first.old_expert_of_new_LE, then.old_expert_of_new_LE, axis=1
        ),
        moe_layer_ids=then.moe_layer_ids,
        num_devices=then.num_devices,
        model_name=then.model_name or first.model_name,
    )


def write_provenance(folder: Path, permutation: Permutation, stack: str | None) -> None:
    """Write the file; nothing where nothing moved.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    if permutation.is_identity:
        return
    text = dump_json(permutation_to_dict(permutation)) + "\n"
    path = folder / provenance_name(stack)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise InputError(f"{path}: cannot be written ({exc.strerror}); make room") from exc
