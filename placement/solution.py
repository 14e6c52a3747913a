"""What a solve returns: the placement, what it costs, how far from the best it can be, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from placement.bounds import LowerBound
from placement.cost import CostBreakdown
from placement.plan import Placement

__all__ = ["Incumbent", "Solution", "Termination", "relative_gap"]


class Termination(StrEnum):
    """Why a solve ended."""

    CONVERGED = "converged"
    """The solver had done what it meant to do."""
    OPTIMAL = "optimal"
    """The objective meets the lower bound."""
    STOPPED = "stopped"
    """A deadline or the caller ended it; the best placement so far stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incumbent:
    """One improvement on the way.

    Parameters
    ----------
    elapsed_s
        Seconds since the solve began, by the solve's clock.
    objective, lower_bound
        Best objective then, and the bound known then.
    solver
        Who found it.
    placement
        The placement itself.
    breakdown
        What it costs, for who is told of it; None in a solution's history.
    """

    elapsed_s: float
    objective: float
    lower_bound: float
    solver: str
    placement: Placement = field(compare=False, repr=False)
    breakdown: CostBreakdown | None = field(default=None, compare=False, repr=False)

    @property
    def gap(self) -> float:
        """(objective - lower_bound) / objective."""
        return relative_gap(self.objective, self.lower_bound)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """Result of a solve.

    Parameters
    ----------
    placement
        The placement, checked.
    breakdown
        Its cost on the traffic that it was fitted to.
    bound
        Lower bound on the objective.
    termination
        Why the solve ended.
    solver
        Who found the placement.
    incumbents
        Improvements over time.
    candidates
        Objective of every placement that the portfolio compared, by solver.
    skipped
        Solvers of a portfolio that had no answer, and why.
    """

    placement: Placement
    breakdown: CostBreakdown
    bound: LowerBound
    termination: Termination
    solver: str
    incumbents: tuple[Incumbent, ...]
    candidates: dict[str, float]
    skipped: dict[str, str]

    @property
    def objective(self) -> float:
        """Objective on the fitted traffic, as the cost model computes it."""
        return self.breakdown.objective

    @property
    def lower_bound(self) -> float:
        """Lower bound on the same objective and traffic."""
        return self.bound.value

    @property
    def gap(self) -> float:
        """(objective - lower_bound) / objective; 0 when proved optimal."""
        return relative_gap(self.objective, self.lower_bound)

    def objective_dict(self, name: str) -> dict[str, Any]:
        """Return the ``objective`` entry of a placement file."""
        return {
            "name": name,
            "value": self.objective,
            "unit": self.breakdown.unit,
            "lower_bound": self.lower_bound,
            "gap": self.gap,
        }


def relative_gap(objective: float, lower_bound: float) -> float:
    """Return (objective - lower_bound) / objective, at least 0; 0 for an objective of 0."""
    return max(0.0, (objective - lower_bound) / objective) if objective > 0 else 0.0
