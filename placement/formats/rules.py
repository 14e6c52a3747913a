"""What all engines ask of a placement: equally many experts on every device, in every layer.

Shape letters: L MoE layers, R physical slots (device by device), S slots of the placement, D devices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from placement._fields import brief
from placement.errors import InputError
from placement.plan import EMPTY, Placement, equal_slots

__all__ = ["by_device", "from_rows", "integer", "integer_rows", "same_placement", "trivial_row"]

IntArray = npt.NDArray[np.int64]

LARGEST_ID = 1 << 20
"""No engine numbers experts, slots or devices as high as this."""


def by_device(placement: Placement, *, target: str) -> IntArray:
    """Return the expert of each slot, device by device, ``[layers, slots]``, without empty slots.

    Slot ``r`` is on device ``r // (R / D)``; within a device the order of the placement's slots is kept.

    Raises
    ------
    InputError
        If devices or layers hold different numbers of experts, with both numbers.
    """
    order_S = np.argsort(placement.device_of_slot_S, kind="stable")
    map_LS = placement.physical_to_logical_map_LS[:, order_S]
    device_S = placement.device_of_slot_S[order_S]
    held_LD = np.stack(
        [np.bincount(device_S[row_S != EMPTY], minlength=placement.num_devices) for row_S in map_LS]
    )
    most = int(held_LD.max())
    uneven = held_LD != most
    if uneven.any():
        layer, device = (int(i[0]) for i in np.nonzero(uneven))
        other_layer, other = (int(i[0]) for i in np.nonzero(held_LD == most))
        empty = (map_LS == EMPTY).any()
        mend = (
            "solve again, which notes what to fill empty slots with"
            if empty
            else "solve with spare slots that are a multiple of the devices"
        )
        raise InputError(
            f"layer {layer} has {held_LD[layer, device]} experts on device {device} and layer {other_layer} "
            f"{most} on device {other}; {target} needs equally many on every device: {mend}"
        )
    return np.ascontiguousarray(map_LS[map_LS != EMPTY].reshape(placement.num_layers, -1))


def from_rows(
    map_LR: IntArray,
    *,
    num_devices: int | None,
    num_experts: int | None = None,
    moe_layer_ids: tuple[int, ...] | None = None,
    model_name: str | None = None,
) -> Placement:
    """Build a placement from rows that list slots device by device, the same number on each.

    Parameters
    ----------
    num_devices
        Devices; must be given, since rows do not tell.
    num_experts
        Experts of the model; default: as many as the rows name.

    Raises
    ------
    InputError
        If the number of devices is not known or does not divide the slots, or the rows are no placement.
    """
    num_slots = map_LR.shape[1]
    if num_devices is None:
        raise InputError(
            f"lists {num_slots} slots, but not how many devices share them; name the cluster with -t or "
            "--devices"
        )
    if num_devices < 1 or num_slots % num_devices:
        raise InputError(f"lists {num_slots} slots, which do not divide evenly over {num_devices} devices")
    named = int(map_LR.max(initial=0)) + 1
    if num_experts is not None and named > num_experts:
        raise InputError(f"names expert {named - 1}; the model has {num_experts} experts per layer")
    return Placement(
        physical_to_logical_map_LS=map_LR,
        device_of_slot_S=equal_slots(num_slots, num_devices),
        num_experts=named if num_experts is None else num_experts,
        num_devices=num_devices,
        moe_layer_ids=moe_layer_ids,
        model_name=model_name,
    )


def trivial_row(num_slots: int, num_experts: int) -> IntArray:
    """Return the layout that engines begin with: slot ``i`` holds expert ``i mod E``, ``[slots]``."""
    return np.arange(num_slots, dtype=np.int64) % num_experts


def integer(value: object, *, name: str, minimum: int = 0) -> int:
    """Return a whole number of a foreign file.

    Raises
    ------
    InputError
        If it is none, or out of range.
    """
    if type(value) is not int or not minimum <= value <= LARGEST_ID:
        raise InputError(f"{name} is {brief(value)}; it must be a whole number of {minimum} or more")
    return value


def integer_rows(values: object, *, name: str) -> IntArray:
    """Return a table of expert ids of a foreign file, all rows equally long.

    Raises
    ------
    InputError
        If it is no table, is ragged, or holds anything but ids, naming the row.
    """
    if not isinstance(values, list) or not values or not all(isinstance(row, list) and row for row in values):
        raise InputError(f"{name} must be a table: a list of rows of expert ids")
    for index, row in enumerate(values):
        if len(row) != len(values[0]):
            raise InputError(
                f"{name} is ragged: row {index} has {len(row)} entries, row 0 has {len(values[0])}"
            )
        _check_ids(row, name=f"{name} row {index}")
    return np.array(values, dtype=np.int64)


def _check_ids(row: list[Any], *, name: str) -> None:
    for slot, value in enumerate(row):
        if type(value) is not int or not 0 <= value < LARGEST_ID:
            why = "no slot may be empty" if value == EMPTY else "expert ids are whole numbers of 0 or more"
            raise InputError(f"{name} holds {brief(value)} in slot {slot}; {why}")


def same_placement(one: Placement, other: Placement) -> str | None:
    """Say how two placements differ in what they put on which device; None where they do not.

    The order of slots on a device does not count, decoder layers do where both know them.
    """
    for name in ("num_layers", "num_experts", "num_devices"):
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine != theirs:
            return f"{name} {theirs} instead of {mine}"
    known = one.moe_layer_ids is not None and other.moe_layer_ids is not None
    if known and one.moe_layer_ids != other.moe_layer_ids:
        return "other decoder layers"
    other_L = (one.count_LED != other.count_LED).any(axis=(1, 2))
    return f"other experts in layer {int(other_L.argmax())}" if other_L.any() else None
