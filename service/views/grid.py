"""A placement as a grid of layers and devices, and what must be copied to get from one to another.

Shape letters: L MoE layers, E logical experts, S slots, D devices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from placement.moves import summarise_moves
from placement.plan import EMPTY, Placement

__all__ = ["MOST_MOVES", "check_shape", "grid_document", "moves_document"]

FloatArray = npt.NDArray[np.float64]

MOST_CELLS = 1 << 20
"""Layers times the most of slots, experts and devices that an answer holds."""
MOST_PLACES = 1 << 26
"""Layers times experts times devices of two placements that are compared."""
MOST_MOVES = 10_000
"""Moves that are listed; all are counted."""
DIGITS = 4


def grid_document(placement: Placement, load_LE: npt.ArrayLike | None = None) -> dict[str, Any]:
    """Return a placement, and under which load its experts and devices are.

    Replicas of an expert share its load evenly. Loads are told relative to the mean load of a device in their
    layer; a layer without any load has load 0 and balance 1.

    Parameters
    ----------
    load_LE
        Token-expert pairs, ``[layers, experts]``, of any total.

    Raises
    ------
    InputError
        If there are too many cells to show, or the loads are of another shape.
    """
    _check_size(placement)
    found = {
        "num_layers": placement.num_layers,
        "num_experts": placement.num_experts,
        "num_devices": placement.num_devices,
        "num_slots": placement.num_slots,
        "model_name": placement.model_name,
        "moe_layer_ids": list(placement.moe_layer_ids or range(placement.num_layers)),
        "device_of_slot": placement.device_of_slot_S.tolist(),
        "expert_LS": placement.physical_to_logical_map_LS.tolist(),
        "load_LE": None,
        "load_LD": None,
        "balance_L": None,
    }
    return found if load_LE is None else {**found, **_loads(placement, np.asarray(load_LE, dtype=np.float64))}


def check_shape(placement: Placement, num_layers: Any, num_experts: Any) -> None:
    """Verify that a trace is of a placement's shape.

    Raises
    ------
    InputError
        If it is not, with the numbers.
    """
    if (num_layers, num_experts) != (placement.num_layers, placement.num_experts):
        raise InputError(
            f"the trace has {num_layers} layers of {num_experts} experts, the placement "
            f"{placement.num_layers} of {placement.num_experts}; choose a trace of the placement's model"
        )


def _check_size(placement: Placement) -> None:
    widest = max(placement.num_slots, placement.num_experts, placement.num_devices)
    if placement.num_layers * widest > MOST_CELLS:
        raise InputError(
            f"{placement.num_layers} layers of {placement.num_slots} slots on {placement.num_devices} "
            f"devices are more than the {MOST_CELLS:,} cells that can be shown"
        )


def _loads(placement: Placement, load_LE: FloatArray) -> dict[str, Any]:
    check_shape(placement, *load_LE.shape)
    load_LD = _device_loads(placement, load_LE)
    mean_L1 = load_LD.mean(axis=1, keepdims=True)
    busy_L1 = mean_L1 > 0
    share_LE = np.divide(load_LE, mean_L1, out=np.zeros_like(load_LE), where=busy_L1)
    share_LD = np.divide(load_LD, mean_L1, out=np.zeros_like(load_LD), where=busy_L1)
    balance_L = np.where(busy_L1[:, 0], share_LD.max(axis=1), 1.0)
    return {
        "load_LE": share_LE.round(DIGITS).tolist(),
        "load_LD": share_LD.round(DIGITS).tolist(),
        "balance_L": balance_L.round(DIGITS).tolist(),
    }


def _device_loads(placement: Placement, load_LE: FloatArray) -> FloatArray:
    num_layers, num_devices = placement.num_layers, placement.num_devices
    layer, slot = np.nonzero(placement.physical_to_logical_map_LS != EMPTY)
    expert = placement.physical_to_logical_map_LS[layer, slot]
    cell = layer * placement.num_experts + expert
    replicas = np.bincount(cell, minlength=load_LE.size)
    share = load_LE[layer, expert] / replicas[cell]
    place = layer * num_devices + placement.device_of_slot_S[slot]
    load = np.bincount(place, weights=share, minlength=num_layers * num_devices)
    return np.asarray(load.reshape(num_layers, num_devices), dtype=np.float64)


def moves_document(before: Placement, after: Placement) -> dict[str, Any]:
    """Return what must be copied to turn one placement into another, device by device as they are numbered.

    Devices are not relabelled: a deployment copies weights to the very devices that the new placement names.

    Raises
    ------
    InputError
        If the two differ in layers, experts or devices, or are too large to be compared.
    """
    for placement in (before, after):
        _check_size(placement)
        if placement.num_layers * placement.num_experts * placement.num_devices > MOST_PLACES:
            raise InputError(
                f"{placement.num_layers} layers of {placement.num_experts} experts on "
                f"{placement.num_devices} devices are too many to be compared here"
            )
    moves = summarise_moves(before, after).moves
    num_held = int((after.physical_to_logical_map_LS != EMPTY).sum())
    return {
        "num_moves": len(moves),
        "moved_share": len(moves) / num_held,
        "moves": [
            {"layer": move.layer, "expert": move.expert, "from_device": move.source, "to_device": move.target}
            for move in moves[:MOST_MOVES]
        ],
    }
