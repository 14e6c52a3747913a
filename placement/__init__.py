"""Expert placement for Mixture-of-Experts models: which GPU every expert lives on, and how good that is.

The names below are imported on first use, so that ``import placement`` costs little.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from placement.bounds import LowerBound, lower_bound
    from placement.calibration import DataSheetCalibration, LinearCalibration, read_calibration
    from placement.comparison import Comparison, compare
    from placement.cost import CostBreakdown, CostModel
    from placement.errors import InfeasibleError, InputError, NoPlacementFoundError, PlacementError
    from placement.io import read_placement
    from placement.model import ModelShape, resolve_model
    from placement.optimizer import optimize
    from placement.plan import Move, Placement, diff
    from placement.problem import Objective, PlacementProblem, Risk, Semantics, make_problem
    from placement.profile import RoutingProfile
    from placement.solution import Incumbent, Solution, Termination
    from placement.stopping import Cancellation, Deadline
    from placement.topology import Topology, parse_topology

_HOME = {
    "Cancellation": "stopping",
    "Comparison": "comparison",
    "CostBreakdown": "cost",
    "CostModel": "cost",
    "DataSheetCalibration": "calibration",
    "Deadline": "stopping",
    "Incumbent": "solution",
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
    "Risk": "problem",
    "RoutingProfile": "profile",
    "Semantics": "problem",
    "Solution": "solution",
    "Termination": "solution",
    "Topology": "topology",
    "compare": "comparison",
    "diff": "plan",
    "lower_bound": "bounds",
    "make_problem": "problem",
    "optimize": "optimizer",
    "parse_topology": "topology",
    "read_calibration": "calibration",
    "read_placement": "io",
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
    "CostBreakdown",
    "CostModel",
    "Comparison",
    "compare",
    "Move",
    "Placement",
    "diff",
    "read_placement",
    "InfeasibleError",
    "InputError",
    "NoPlacementFoundError",
    "PlacementError",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"placement.{_HOME[name]}"), name)
    raise AttributeError(f"module 'placement' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
