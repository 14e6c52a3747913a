"""The contents of one layer as items that an integer program can place.

An item is one expert copy; how many copies an expert has is decided elsewhere.

Shape letters: I items, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.cost.incremental import layer_row
from placement.plan import EMPTY, Placement
from placement.problem import PlacementProblem

__all__ = ["LayerItems"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerItems:
    """Contents of one layer.

    Parameters
    ----------
    expert_I, device_I
        Expert and device of each copy, ``[items]``; empty slots are no items.
    """

    expert_I: IntArray
    device_I: IntArray

    @classmethod
    def of(cls, placement: Placement, layer: int) -> LayerItems:
        """Return the items of a placement's layer, by slot."""
        row_S = placement.physical_to_logical_map_LS[layer]
        held_S = row_S != EMPTY
        return cls(expert_I=row_S[held_S], device_I=placement.device_of_slot_S[held_S])

    def replicas_I(self, num_experts: int) -> IntArray:
        """Copies that each item's expert has, ``[items]``."""
        return np.bincount(self.expert_I, minlength=num_experts)[self.expert_I]

    def moved(self, items: IntArray, devices: IntArray) -> LayerItems:
        """Return the layer with some items on other devices."""
        device_I = self.device_I.copy()
        device_I[items] = devices
        return LayerItems(expert_I=self.expert_I, device_I=device_I)

    def placement(self, problem: PlacementProblem) -> Placement:
        """Return the layer as a placement of a one-layer problem."""
        row_S = layer_row(self.expert_I, self.device_I, problem.device_of_slot_S)
        return Placement(
            physical_to_logical_map_LS=row_S[None],
            device_of_slot_S=problem.device_of_slot_S,
            num_experts=problem.num_experts,
            num_devices=problem.num_devices,
        )
