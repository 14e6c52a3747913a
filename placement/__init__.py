"""Expert placement for Mixture-of-Experts models: which GPU every expert lives on, and how good that is.

The names below are imported on first use, so that ``import placement`` costs little.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from placement.bounds import LowerBound, layer_gaps, lower_bound
    from placement.calibration import DataSheetCalibration, LinearCalibration, read_calibration
    from placement.change.advise import Advice, advise
    from placement.change.frontier import Frontier, frontier
    from placement.comparison import Comparison, CrossValidation, compare, cross_validate
    from placement.cost import CostBreakdown, CostModel
    from placement.errors import (
        BackendError,
        InfeasibleError,
        InputError,
        NoPlacementFoundError,
        PlacementError,
    )
    from placement.io import read_placement
    from placement.model import ModelShape, resolve_model
    from placement.optimizer import optimize
    from placement.plan import Move, Placement, diff
    from placement.problem import Objective, PlacementProblem, ReplicaSplit, Risk, Semantics, make_problem
    from placement.profile import RoutingProfile
    from placement.rebalance import rebalance_experts
    from placement.solution import Incumbent, Solution, Termination
    from placement.stopping import Cancellation, Deadline
    from placement.topology import Topology, parse_topology

_HOME = {
    "Advice": "change.advise",
    "BackendError": "errors",
    "Cancellation": "stopping",
    "Comparison": "comparison",
    "CostBreakdown": "cost",
    "CostModel": "cost",
    "CrossValidation": "comparison",
    "DataSheetCalibration": "calibration",
    "Deadline": "stopping",
    "Incumbent": "solution",
    "Frontier": "change.frontier",
    "InfeasibleError": "errors",
    "InputError": "errors",
    "LinearCalibration": "calibration",
    "LowerBound": "bounds",
    "ModelShape": "model",
    "Move": "plan",
    "NoPlacementFoundError": "errors",
    "Objective": "problem",
    "Placement": "plan",
    "PlacementError": "errors",
    "PlacementProblem": "problem",
    "ReplicaSplit": "problem",
    "Risk": "problem",
    "RoutingProfile": "profile",
    "Semantics": "problem",
    "Solution": "solution",
    "Termination": "solution",
    "Topology": "topology",
    "advise": "change.advise",
    "compare": "comparison",
    "cross_validate": "comparison",
    "diff": "plan",
    "frontier": "change.frontier",
    "layer_gaps": "bounds",
    "lower_bound": "bounds",
    "make_problem": "problem",
    "optimize": "optimizer",
    "parse_topology": "topology",
    "read_calibration": "calibration",
    "read_placement": "io",
    "rebalance_experts": "rebalance",
    "resolve_model": "model",
}

__all__ = [  # noqa: RUF022 (in the order of a solve)
    "RoutingProfile",
    "Topology",
    "parse_topology",
    "ModelShape",
    "resolve_model",
    "DataSheetCalibration",
    "LinearCalibration",
    "read_calibration",
    "Objective",
    "Risk",
    "Semantics",
    "ReplicaSplit",
    "PlacementProblem",
    "make_problem",
    "Cancellation",
    "Deadline",
    "optimize",
    "Incumbent",
    "Solution",
    "Termination",
    "LowerBound",
    "lower_bound",
    "layer_gaps",
    "CostBreakdown",
    "CostModel",
    "Comparison",
    "compare",
    "CrossValidation",
    "cross_validate",
    "Frontier",
    "frontier",
    "Advice",
    "advise",
    "rebalance_experts",
    "Move",
    "Placement",
    "diff",
    "read_placement",
    "InfeasibleError",
    "InputError",
    "NoPlacementFoundError",
    "BackendError",
    "PlacementError",
]

__version__ = "0.7.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"placement.{_HOME[name]}"), name)
    raise AttributeError(f"module 'placement' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
