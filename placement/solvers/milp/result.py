"""What solving a program gave: a status, a checked point, its objective, and a bound.

Shape letters: V variables.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from placement.solvers.milp.formulation import FloatArray

__all__ = ["Limit", "MilpResult", "MilpStatus"]


class MilpStatus(StrEnum):
    """How a solve ended. A solver that fails has no status: it raises `BackendError`."""

    OPTIMAL = "optimal"
    """The objective is proved to lie within the gap that was asked for."""
    FEASIBLE = "feasible"
    """There is a feasible point, but the gap was not closed."""
    INFEASIBLE = "infeasible"
    """It is proved that no point is feasible."""
    UNBOUNDED = "unbounded"
    """The objective falls without end."""
    STOPPED = "stopped"
    """A limit ended the solve before there was a feasible point."""


class Limit(StrEnum):
    """What ended a solve."""

    NONE = "none"
    """Nothing: the solver was done."""
    TIME = "time"
    """The time limit; the result depends on the machine."""
    NODES = "nodes"
    """The node limit."""
    STOP = "stop"
    """The caller's stopping criterion."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MilpResult:
    """The outcome of a solve, in the units of the program.

    Parameters
    ----------
    status
        How it ended.
    objective
        Objective of `value_V`, recomputed from the rounded values; infinite without them.
    bound
        No point is better than this; minus infinity where nothing is known. Never above `objective`.
    value_V
        A point that was found feasible by our own check, whole at integer variables, ``[variables]``; None
        where there is none.
    limit
        What ended the solve.
    backend
        Who solved.
    """

    status: MilpStatus
    objective: float
    bound: float
    value_V: FloatArray | None
    limit: Limit
    backend: str

    @property
    def gap(self) -> float:
        """Relative gap, (objective - bound) / abs(objective); infinite without both, 0 where they agree."""
        if self.objective == self.bound:
            return 0.0
        if self.value_V is None or self.bound == float("-inf") or self.objective == 0:
            return float("inf")
        return (self.objective - self.bound) / abs(self.objective)
