"""The one seam between the optimizer and its solvers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from placement.bounds import LowerBound
from placement.cost import CostModel
from placement.plan import Placement
from placement.problem import PlacementProblem
from placement.stopping import Never, StoppingCriterion

__all__ = ["SolveRequest", "Solver"]


def _ignore(placement: Placement, /) -> None:
    """Take no notice of an incumbent."""


def _trust(bound: LowerBound, /) -> None:
    """Take no notice of a proof."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SolveRequest:
    """What a solver gets.

    Parameters
    ----------
    problem, model
        The problem, and its cost model.
    stop
        Asked often; the solver ends soon after it says so and returns its best placement.
    seed
        The same seed, one thread and no early stop give the same placement.
    threads
        Threads that the solver may use.
    work_s
        Effort, in seconds of one thread of a current server; None for the solver's own choice. Counted in
        operations, not by a clock, so that it does not make results depend on the machine's mood.
    start
        A placement to start from; the result is never worse.
    report
        Called with every better placement.
    prove
        Called with every lower bound that the solver proves, in terms of the cost model's objective: a bound
        of minus infinity for layers (or a value) that it says nothing of.
    """

    problem: PlacementProblem
    model: CostModel
    stop: StoppingCriterion = field(default_factory=Never)
    seed: int = 0
    threads: int = 1
    work_s: float | None = None
    start: Placement | None = None
    report: Callable[[Placement], None] = _ignore
    prove: Callable[[LowerBound], None] = _trust


class Solver(Protocol):
    """Finds a placement for a problem."""

    @property
    def name(self) -> str:
        """Name on the command line and in results."""

    def solve(self, request: SolveRequest) -> Placement:
        """Return a feasible placement.

        Raises
        ------
        InfeasibleError
            If the solver proves or concludes that there is none, with the constraint and by how much.
        NoPlacementFoundError
            If it was stopped before it had one.
        """
