"""Longest first: each expert, by falling average load, to the least loaded device that has room.

Equal counts where slots are equal (the longest-processing-time rule with a cardinality limit). Devices of
different speed are loaded in proportion. Spare slots stay empty; see `eplb` for replicas.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.cost.incremental import layer_row
from placement.plan import Placement
from placement.problem import PlacementProblem
from placement.solvers.protocol import SolveRequest

__all__ = ["GreedySolver", "greedy_devices", "greedy_placement"]


def greedy_devices(
    load_E: npt.NDArray[np.float64],
    room_D: npt.NDArray[np.int64],
    speed_D: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.int64]:
    """Return the device of each expert.

    Parameters
    ----------
    load_E
        Average load of each expert, ``[experts]``.
    room_D
        Experts that fit on each device, ``[devices]``; their sum is at least the number of experts.
    speed_D
        Relative speed of each device, ``[devices]``; equal by default.
    """
    speed_D = np.ones(room_D.size) if speed_D is None else speed_D
    device_E = np.empty(load_E.size, dtype=np.int64)
    load_D, free_D = np.zeros(room_D.size), room_D.copy()
    for expert in np.argsort(-load_E, kind="stable"):
        after_D = np.where(free_D > 0, (load_D + load_E[expert]) / speed_D, np.inf)
        device = int(after_D.argmin())
        device_E[expert] = device
        load_D[device] += load_E[expert]
        free_D[device] -= 1
    return device_E


def even_room(num_experts: int, slots_D: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Experts that each device takes when spare slots are spread as evenly as slots allow."""
    room_D = np.minimum(slots_D, -(-num_experts // slots_D.size))
    while room_D.sum() < num_experts:
        room_D = np.minimum(slots_D, room_D + 1)
    return np.asarray(room_D, dtype=np.int64)


def greedy_placement(problem: PlacementProblem) -> Placement:
    """Balance the summed loads of every layer greedily."""
    speed_D = problem.topology.achieved_flops_D / problem.topology.achieved_flops_D.max()
    room_D = even_room(problem.num_experts, problem.slots_D)
    experts = np.arange(problem.num_experts)
    rows = [
        layer_row(experts, greedy_devices(load_E, room_D, speed_D), problem.device_of_slot_S)
        for load_E in problem.profile.load_WLE.sum(axis=0)
    ]
    return Placement(
        physical_to_logical_map_LS=np.stack(rows),
        device_of_slot_S=problem.device_of_slot_S,
        num_experts=problem.num_experts,
        num_devices=problem.num_devices,
    )


class GreedySolver:
    """The longest-first rule, as a solver."""

    name = "greedy"

    def solve(self, request: SolveRequest) -> Placement:
        """Return the greedy placement."""
        return greedy_placement(request.problem)
