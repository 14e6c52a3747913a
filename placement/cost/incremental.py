"""One layer of a placement under swaps: the exact change of the objective, without a new evaluation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.cost.layers import WINDOWS, Neighbours, ScenarioPlan, make_layer, make_scenarios
from placement.cost.model import CostModel
from placement.errors import InputError
from placement.plan import Placement

__all__ = ["LayerState", "layer_row"]

IntArray = npt.NDArray[np.int64]


class LayerState:
    """A layer's slots, their contents, and the layer's share of the objective.

    The share is the layer's term of the step time (or of the summed balance or touched devices); a delta
    equals the difference of two full evaluations for objectives that are sums over layers.

    Parameters
    ----------
    model
        Cost model of the problem.
    placement
        Where to start.
    layer
        Which layer.
    plan
        Scenarios; the windows themselves by default.
    neighbours
        For stay-put semantics: where tokens come from and go to.
    """

    def __init__(
        self,
        model: CostModel,
        placement: Placement,
        layer: int,
        *,
        plan: ScenarioPlan = WINDOWS,
        neighbours: Neighbours | None = None,
    ) -> None:
        from placement.cost.layer_kernels import new_state

        model.problem.check_placement(placement)
        max_replicas = int(placement.replicas_LE[layer].max())
        self._layer = make_layer(
            model,
            layer,
            make_scenarios(model.problem.profile, plan),
            max_replicas=max_replicas,
            neighbours=neighbours,
        )
        self._state = new_state(
            self._layer,
            np.array(placement.physical_to_logical_map_LS[layer]),
            np.array(placement.device_of_slot_S),
        )

    @property
    def value(self) -> float:
        """The layer's share of the objective."""
        from placement.cost.layer_kernels import state_value

        return float(state_value(self._layer, self._state))

    def swap_delta(self, a: int, b: int) -> float:
        """Return by how much the objective changes if the contents of slots a and b change places.

        Raises
        ------
        InputError
            If both are on one device, or the swap puts an expert twice on a device.
        """
        from placement.cost.layer_kernels import apply_swap, items_of, state_value, swap_value

        self._check(a, b)
        before = self.value
        if not items_of(self._state)[2]:
            return float(swap_value(self._layer, self._state, a, b)) - before
        apply_swap(self._layer, self._state, a, b)
        after = float(state_value(self._layer, self._state))
        apply_swap(self._layer, self._state, a, b)
        return after - before

    def swap(self, a: int, b: int) -> None:
        """Let the contents of slots a and b of the original placement change places."""
        from placement.cost.layer_kernels import apply_swap

        self._check(a, b)
        apply_swap(self._layer, self._state, a, b)

    def row(self, device_of_slot_S: IntArray) -> IntArray:
        """Return the layer's row of a physical-to-logical map on the given slots."""
        from placement.cost.layer_kernels import items_of

        expert_I, device_I, _ = items_of(self._state)
        return layer_row(expert_I, device_I, device_of_slot_S)

    def _check(self, a: int, b: int) -> None:
        from placement.cost.layer_kernels import swap_allowed

        if not bool(swap_allowed(self._layer, self._state, a, b)):
            raise InputError(
                f"slots {a} and {b} cannot change places: same device, same expert, an expert twice on a "
                "device, or the load limit"
            )


def layer_row(expert_I: IntArray, device_I: IntArray, device_of_slot_S: IntArray) -> IntArray:
    """Lay items out on slots: on every device ascending by expert, empty slots last, ``[slots]``.

    Raises
    ------
    InputError
        If a device holds more experts than it has slots.
    """
    row_S = np.full(device_of_slot_S.size, -1, dtype=np.int64)
    for device in np.unique(device_of_slot_S):
        slots = np.nonzero(device_of_slot_S == device)[0]
        experts = np.sort(expert_I[(device_I == device) & (expert_I >= 0)])
        if experts.size > slots.size:
            raise InputError(f"device {device} holds {experts.size} experts and has {slots.size} slots")
        row_S[slots[: experts.size]] = experts
    return row_S
