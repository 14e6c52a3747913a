"""A placement: which logical expert sits in which physical slot, and what follows from that.

Shape letters: L MoE layers, E logical experts, S slots, D devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InfeasibleError, InputError

__all__ = ["EMPTY", "Move", "Placement", "diff", "equal_slots"]

EMPTY = -1
"""The logical id of an empty slot."""

IntArray = npt.NDArray[np.int64]


def _frozen(values: npt.ArrayLike, *, name: str, ndim: int) -> IntArray:
    array = np.asarray(values)
    if array.ndim != ndim:
        raise InputError(f"{name} has {array.ndim} dimensions, not {ndim}")
    if array.size == 0:
        raise InputError(f"{name} is empty")
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} holds {array.dtype} values, not integers")
    frozen = np.array(array, dtype=np.int64)
    frozen.setflags(write=False)
    return frozen


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Where every expert and every replica lives, for all MoE layers of a model.

    Parameters
    ----------
    physical_to_logical_map_LS
        Logical expert of each slot, ``[layers, slots]``; `EMPTY` (-1) is an empty slot.
    device_of_slot_S
        Device of each slot, ``[slots]``, the same in every layer.
    num_experts
        Logical experts per layer.
    num_devices
        Devices of the topology; a device may own no slot.
    model_name, moe_layer_ids
        What the layers are: `moe_layer_ids[i]` is the decoder layer of MoE layer `i`.
    extra
        Unknown keys of the file it was read from; kept when it is written again.

    Raises
    ------
    InputError
        If shapes or ids are inconsistent, an expert has no slot in a layer, or a device holds the
        same expert twice in a layer.
    """

    physical_to_logical_map_LS: IntArray
    device_of_slot_S: IntArray
    num_experts: int
    num_devices: int
    model_name: str | None = None
    moe_layer_ids: tuple[int, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(
            self,
            "physical_to_logical_map_LS",
            _frozen(self.physical_to_logical_map_LS, name="physical_to_logical_map", ndim=2),
        )
        set_(self, "device_of_slot_S", _frozen(self.device_of_slot_S, name="device_of_slot", ndim=1))
        if self.moe_layer_ids is not None:
            set_(self, "moe_layer_ids", tuple(int(layer) for layer in self.moe_layer_ids))
        self.check()

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.physical_to_logical_map_LS.shape[0])

    @property
    def num_slots(self) -> int:
        """Physical slots per layer, empty ones included."""
        return int(self.physical_to_logical_map_LS.shape[1])

    @cached_property
    def count_LED(self) -> npt.NDArray[np.int8]:
        """Replicas of each expert on each device, ``[layers, experts, devices]``; each 0 or 1."""
        count = np.zeros((self.num_layers, self.num_experts, self.num_devices), dtype=np.int8)
        layer, slot = np.nonzero(self.physical_to_logical_map_LS != EMPTY)
        np.add.at(
            count,
            (layer, self.physical_to_logical_map_LS[layer, slot], self.device_of_slot_S[slot]),
            1,
        )
        count.setflags(write=False)
        return count

    @cached_property
    def replicas_LE(self) -> IntArray:
        """Number of replicas of each expert, ``[layers, experts]``."""
        return np.asarray(self.count_LED.sum(axis=2, dtype=np.int64))

    @cached_property
    def first_device_LE(self) -> IntArray:
        """Device of each expert's first replica in slot order, ``[layers, experts]``."""
        first = np.full((self.num_layers, self.num_experts), -1, dtype=np.int64)
        for slot in range(self.num_slots - 1, -1, -1):
            expert_L = self.physical_to_logical_map_LS[:, slot]
            layer = np.nonzero(expert_L != EMPTY)[0]
            first[layer, expert_L[layer]] = self.device_of_slot_S[slot]
        first.setflags(write=False)
        return first

    def check(self) -> None:
        """Verify every invariant of a placement.

        Raises
        ------
        InputError
            On the first violation, naming layer, slot, expert or device.
        """
        p2l, device = self.physical_to_logical_map_LS, self.device_of_slot_S
        if self.num_experts < 1 or self.num_devices < 1:
            raise InputError(f"a placement of {self.num_experts} experts on {self.num_devices} devices")
        if device.shape[0] != p2l.shape[1]:
            raise InputError(f"device_of_slot names {device.shape[0]} slots, the map has {p2l.shape[1]}")
        if device.min() < 0 or device.max() >= self.num_devices:
            slot = int(np.nonzero((device < 0) | (device >= self.num_devices))[0][0])
            raise InputError(f"slot {slot} is on device {device[slot]}, outside 0..{self.num_devices - 1}")
        outside = (p2l < EMPTY) | (p2l >= self.num_experts)
        if outside.any():
            layer, slot = (int(i[0]) for i in np.nonzero(outside))
            raise InputError(
                f"layer {layer} slot {slot} holds expert {p2l[layer, slot]}, outside "
                f"0..{self.num_experts - 1}"
            )
        if self.moe_layer_ids is not None and len(self.moe_layer_ids) != p2l.shape[0]:
            raise InputError(
                f"moe_layer_ids names {len(self.moe_layer_ids)} layers, the map has {p2l.shape[0]}"
            )
        self._check_coverage()

    def _check_coverage(self) -> None:
        # No table of experts by devices here: a broken file may claim any number of either.
        if self.num_experts > self.num_slots:
            raise InputError(f"{self.num_slots} slots cannot hold {self.num_experts} experts")
        layer, slot = np.nonzero(self.physical_to_logical_map_LS != EMPTY)
        cell = layer * self.num_experts + self.physical_to_logical_map_LS[layer, slot]
        held = np.bincount(cell, minlength=self.num_layers * self.num_experts)
        if not held.all():
            layer_, expert = divmod(int(np.argmin(held)), self.num_experts)
            raise InputError(f"layer {layer_} gives expert {expert} no slot")
        devices, rank_S = np.unique(self.device_of_slot_S, return_inverse=True)
        place = np.sort(cell * devices.size + rank_S[slot])
        twice = place[1:][np.diff(place) == 0]
        if twice.size:
            cell_, rank = divmod(int(twice[0]), devices.size)
            layer_, expert = divmod(cell_, self.num_experts)
            raise InputError(f"layer {layer_} puts expert {expert} twice on device {devices[rank]}")

    def with_layers(self, physical_to_logical_map_LS: npt.ArrayLike) -> Placement:
        """Return this placement with another map on the same slots."""
        return replace(self, physical_to_logical_map_LS=np.asarray(physical_to_logical_map_LS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One expert copy that a device must receive before a new placement can run.

    `source` is a device that held the expert before, the nearest by device number where several did.
    """

    layer: int
    expert: int
    source: int
    target: int


def diff(before: Placement, after: Placement) -> tuple[Move, ...]:
    """List the expert copies to transfer to turn `before` into `after`.

    An expert that a device already holds costs nothing, whatever slot it sits in.

    Raises
    ------
    InputError
        If the two differ in layers, experts or devices.
    """
    for name in ("num_layers", "num_experts", "num_devices"):
        if getattr(before, name) != getattr(after, name):
            raise InputError(
                f"the placements differ in {name}: {getattr(before, name)} against {getattr(after, name)}"
            )
    layer, expert, target = np.nonzero((after.count_LED > 0) & (before.count_LED == 0))
    moves = []
    for i, e, d in zip(layer.tolist(), expert.tolist(), target.tolist(), strict=True):
        holders = np.nonzero(before.count_LED[i, e])[0]
        source = int(holders[np.argmin(np.abs(holders - d))])
        moves.append(Move(layer=i, expert=e, source=source, target=d))
    return tuple(moves)


def equal_slots(num_slots: int, num_devices: int) -> IntArray:
    """Device of each slot when every device owns the same number, in device order, ``[slots]``.

    Raises
    ------
    InfeasibleError
        If the slots do not divide evenly.
    """
    if num_slots % num_devices:
        raise InfeasibleError(
            f"{num_slots} slots do not divide evenly over {num_devices} devices "
            f"({num_slots % num_devices} left over); add {-num_slots % num_devices} spare slots"
        )
    return np.repeat(np.arange(num_devices, dtype=np.int64), num_slots // num_devices)
