"""Optical circuits of a region: which to switch for a placement's traffic, when, and with which placement.

The published method is MixNet (arXiv 2501.03905): a greedy allocation of circuits, one region per
expert-parallel group. Ours adds the best split between circuits and packet switches, an exact program with a
bound, the choice between changing circuits and keeping them, and placement and circuits together.
"""

from placement.planning.fabric.allocation import Allocation, Effort, allocate_circuits
from placement.planning.fabric.completion import all_to_all_time, paired_demand, unsplit_time
from placement.planning.fabric.plan import FabricAnswer, FabricPlan, PlacementAnswer, Timing
from placement.planning.fabric.planner import PlacedTraffic, plan_fabric
from placement.planning.fabric.prices import PRICES, FabricKind, Prices, fabric_cost
from placement.planning.fabric.region import OPTICAL_SWITCHES, FabricRegion, OpticalSwitch
from placement.planning.fabric.synthetic import synthetic_demand

__all__ = [
    "OPTICAL_SWITCHES",
    "PRICES",
    "Allocation",
    "Effort",
    "FabricAnswer",
    "FabricKind",
    "FabricPlan",
    "FabricRegion",
    "OpticalSwitch",
    "PlacedTraffic",
    "PlacementAnswer",
    "Prices",
    "Timing",
    "all_to_all_time",
    "allocate_circuits",
    "fabric_cost",
    "paired_demand",
    "plan_fabric",
    "synthetic_demand",
    "unsplit_time",
]
