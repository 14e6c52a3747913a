"""A permutation of the experts of every layer: what a placement is to engines that shard contiguously.

Megatron-LM, DeepSpeed and others give device `d` the experts `d * E/D` to `(d + 1) * E/D - 1` and nothing
else. They are placed by renaming: the checkpoint's experts, and the rows of the router with them, are put in
the order in which the placement wants them on the devices.
Shape letters: L MoE layers, E experts (as positions of the new order, or as names of the old), D devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from placement.formats.rules import by_device
from placement.plan import Placement, equal_slots

__all__ = ["Permutation"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Permutation:
    """Which old expert comes to each new position, in every MoE layer.

    Parameters
    ----------
    old_expert_of_new_LE
        Old expert of each new position, ``[layers, experts]``; every row is a permutation of ``0..E-1``.
        Weights move by ``new = old[old_expert_of_new]``.
    moe_layer_ids
        Decoder layer of each row, ascending.
    num_devices
        Contiguous shards that the new order is meant for; 1 where it is meant for none.
    model_name
        Model whose checkpoint it belongs to, where known.

    Raises
    ------
    InputError
        If a row is no permutation, the layers do not fit, or the devices do not divide the experts.
    """

    old_expert_of_new_LE: IntArray
    moe_layer_ids: tuple[int, ...]
    num_devices: int = 1
    model_name: str | None = None

    def __post_init__(self) -> None:
        given = np.asarray(self.old_expert_of_new_LE)
        if given.ndim != 2 or given.size == 0 or given.dtype.kind not in "iu":
            raise InputError(
                f"a permutation has shape {given.shape} of {given.dtype}, not [layers, experts] of integers"
            )
        old_LE = given.astype(np.int64)
        _check_rows(old_LE)
        layers = tuple(int(layer) for layer in self.moe_layer_ids)
        if len(layers) != len(old_LE) or any(b <= a for a, b in zip((-1, *layers), layers, strict=False)):
            raise InputError(
                f"the layers of a permutation must be {len(old_LE)} ascending ids of 0 or more, not "
                f"{len(layers)} from {layers[0] if layers else 'none'}"
            )
        if self.num_devices < 1 or old_LE.shape[1] % self.num_devices:
            raise InputError(
                f"{old_LE.shape[1]} experts do not divide into {self.num_devices} contiguous shards"
            )
        old_LE.setflags(write=False)
        object.__setattr__(self, "old_expert_of_new_LE", old_LE)
        object.__setattr__(self, "moe_layer_ids", layers)

    @classmethod
    def from_placement(
        cls, placement: Placement, *, moe_layer_ids: tuple[int, ...] | None = None
    ) -> Permutation:
        """Return the order of experts that puts each on its device under contiguous shards.

        Within a device the experts are in ascending order, so that a group of the router that lies on one
        device stays together.

        Parameters
        ----------
        moe_layer_ids
            Decoder layer of each MoE layer; default the placement's own.

        Raises
        ------
        InputError
            If an expert has more than one replica, devices hold different numbers of experts, or nobody says
            which decoder layers the rows belong to.
        """
        layers = placement.moe_layer_ids if moe_layer_ids is None else moe_layer_ids
        if layers is None:
            raise InputError(
                "the placement does not say which decoder layers it is for; name the model with --model"
            )
        _check_no_replicas(placement)
        map_LE = by_device(placement, target="a contiguous shard")
        map_LDE = np.sort(map_LE.reshape(len(map_LE), placement.num_devices, -1), axis=2)
        return cls(
            old_expert_of_new_LE=map_LDE.reshape(map_LE.shape),
            moe_layer_ids=layers,
            num_devices=placement.num_devices,
            model_name=placement.model_name,
        )

    def to_placement(self) -> Placement:
        """Return the placement that contiguous shards of the new order give."""
        return Placement(
            physical_to_logical_map_LS=self.old_expert_of_new_LE,
            device_of_slot_S=equal_slots(self.num_experts, self.num_devices),
            num_experts=self.num_experts,
            num_devices=self.num_devices,
            model_name=self.model_name,
            moe_layer_ids=self.moe_layer_ids,
        )

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.old_expert_of_new_LE.shape[0])

    @property
    def num_experts(self) -> int:
        """Experts per layer."""
        return int(self.old_expert_of_new_LE.shape[1])

    @cached_property
    def new_position_of_old_LE(self) -> IntArray:
        """New position of each old expert, ``[layers, experts]``: the inverse, read-only."""
        inverse_LE = np.argsort(self.old_expert_of_new_LE, axis=1, kind="stable").astype(np.int64)
        inverse_LE.setflags(write=False)
        return inverse_LE

    def inverse(self) -> Permutation:
        """Return the permutation that undoes this one; it is meant for no shards."""
        return Permutation(
            old_expert_of_new_LE=self.new_position_of_old_LE,
            moe_layer_ids=self.moe_layer_ids,
            model_name=self.model_name,
        )

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves."""
        return bool((self.old_expert_of_new_LE == np.arange(self.num_experts)).all())

    def row(self, layer_id: int) -> IntArray:
        """Return the old expert of each new position in one decoder layer, ``[experts]``.

        Raises
        ------
        InputError
            If it is no MoE layer of this permutation.
        """
        if layer_id not in self.moe_layer_ids:
            raise InputError(
                f"the permutation has no layer {layer_id}; it has {len(self.moe_layer_ids)} from "
                f"{self.moe_layer_ids[0]} to {self.moe_layer_ids[-1]}"
            )
        return np.asarray(self.old_expert_of_new_LE[self.moe_layer_ids.index(layer_id)])

    def keeps_groups_whole(self, num_groups: int) -> bool:
        """Tell whether every group of consecutive new positions holds exactly one old group.

        A router that first chooses among groups (DeepSeek's `n_group`) takes groups of consecutive experts,
        so only such a permutation leaves its choices as they were.

        Raises
        ------
        InputError
            If the groups do not divide the experts.
        """
        return self.split_layer(num_groups) is None

    def split_layer(self, num_groups: int) -> int | None:
        """Return the first decoder layer that splits a group, None where all groups stay whole.

        Raises
        ------
        InputError
            If the groups do not divide the experts.
        """
        if num_groups < 1 or self.num_experts % num_groups:
            raise InputError(f"{self.num_experts} experts do not form {num_groups} equal groups")
        size = self.num_experts // num_groups
        group_LGM = self.old_expert_of_new_LE.reshape(self.num_layers, num_groups, size) // size
        split_L = (group_LGM != group_LGM[:, :, :1]).any(axis=(1, 2))
        return self.moe_layer_ids[int(split_L.argmax())] if split_L.any() else None


def _check_rows(old_LE: IntArray) -> None:
    num_experts = old_LE.shape[1]
    wrong_L = (np.sort(old_LE, axis=1) != np.arange(num_experts)).any(axis=1)
    if wrong_L.any():
        row = int(wrong_L.argmax())
        outside = old_LE[row][(old_LE[row] < 0) | (old_LE[row] >= num_experts)]
        count_E = np.bincount(old_LE[row].clip(0, num_experts - 1), minlength=num_experts)
        reason = (
            f"it names expert {outside[0]} of {num_experts}"
            if outside.size
            else f"expert {int(count_E.argmax())} comes {int(count_E.max())} times"
        )
        raise InputError(f"row {row} is no permutation of {num_experts} experts: {reason}")


def _check_no_replicas(placement: Placement) -> None:
    replicas_LE = placement.replicas_LE
    if (replicas_LE > 1).any():
        layer, expert = (int(i[0]) for i in np.nonzero(replicas_LE > 1))
        raise InputError(
            f"expert {expert} of layer {layer} has {replicas_LE[layer, expert]} replicas; contiguous shards "
            "hold each expert once: solve with --spare-slots 0"
        )
