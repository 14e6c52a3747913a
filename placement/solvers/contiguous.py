"""Experts in order, in equal consecutive shards: what engines do when nobody decides."""

from __future__ import annotations

import numpy as np

from placement.plan import EMPTY, Placement
from placement.problem import PlacementProblem
from placement.solvers.protocol import SolveRequest

__all__ = ["ContiguousSolver", "contiguous_placement"]


def contiguous_placement(problem: PlacementProblem) -> Placement:
    """Fill the slots with experts in order; spare slots stay empty.

    Spare slots are spread over the devices as evenly as their slots allow.
    """
    slots_D = problem.slots_D
    # Largest remainder: each device takes experts in proportion to its slots.
    share_D = slots_D * problem.num_experts / slots_D.sum()
    experts_D = np.floor(share_D).astype(np.int64)
    order = np.argsort(-(share_D - experts_D), kind="stable")
    experts_D[order[: problem.num_experts - int(experts_D.sum())]] += 1
    row_S = np.full(problem.num_slots, EMPTY, dtype=np.int64)
    first_slot_D = np.cumsum(slots_D) - slots_D
    first_expert_D = np.cumsum(experts_D) - experts_D
    for slot, expert, count in zip(first_slot_D, first_expert_D, experts_D, strict=True):
        row_S[slot : slot + count] = np.arange(expert, expert + count)
    return Placement(
        physical_to_logical_map_LS=np.tile(row_S, (problem.num_layers, 1)),
        device_of_slot_S=problem.device_of_slot_S,
        num_experts=problem.num_experts,
        num_devices=problem.num_devices,
    )


class ContiguousSolver:
    """The default of every engine, as a solver."""

    name = "contiguous"

    def solve(self, request: SolveRequest) -> Placement:
        """Return the contiguous placement."""
        return contiguous_placement(request.problem)
