"""The fast balancer as a solver: even loads, whatever the traffic costs.

Shape letters: W windows, L MoE layers, E experts, D devices.
"""

from __future__ import annotations

from placement.plan import Placement
from placement.problem import Objective
from placement.solvers.balance.layers import balance_layers
from placement.solvers.protocol import SolveRequest

__all__ = ["BalanceSolver"]

WORK_S_PER_LAYER = 0.05
"""Effort, in seconds of one thread, at which the defaults of `balance_layers` are used."""


class BalanceSolver:
    """Lowers the fullest device: of the summed loads, then on the mean over windows."""

    name = "balance"

    def solve(self, request: SolveRequest) -> Placement:
        """Return the most even placement found, or the start where that has the lower objective.

        Devices of different speed are loaded in proportion where the objective is a time.
        """
        problem = request.problem
        load_WLE = problem.profile.load_WLE
        effort = 1.0
        if request.work_s is not None:
            effort = request.work_s / (WORK_S_PER_LAYER * problem.num_layers)
        timed = problem.objective is Objective.STEP_TIME
        map_LS = balance_layers(
            load_WLE.sum(axis=0),
            problem.slots_D,
            speed_D=problem.topology.achieved_flops_D if timed else None,
            # The load limit of the traffic objective is one on summed loads.
            load_WLE=None if problem.objective is Objective.TRAFFIC else load_WLE,
            per_window=not timed,
            fill=False,
            effort=effort,
            seed=request.seed,
            stop=request.stop,
        )
        found = Placement(
            physical_to_logical_map_LS=map_LS,
            device_of_slot_S=problem.device_of_slot_S,
            num_experts=problem.num_experts,
            num_devices=problem.num_devices,
        )
        if request.start is None or problem.objective is Objective.TRAFFIC:
            return found
        return min(request.start, found, key=request.model.objective)
