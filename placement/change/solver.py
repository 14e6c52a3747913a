"""The solver of a budget of moves, as the optimizer sees it."""

from __future__ import annotations

from placement.change.budget import improve_within
from placement.errors import InputError
from placement.plan import Placement
from placement.solvers.protocol import SolveRequest

__all__ = ["ChangeSolver"]


class ChangeSolver:
    """Improves the start within a number of moves.

    Parameters
    ----------
    max_moves
        Expert copies that devices may receive, over all layers.
    prefer
        A placement to steer towards.
    """

    name = "change"

    def __init__(self, *, max_moves: int, prefer: Placement | None = None) -> None:
        self.max_moves = max_moves
        self.prefer = prefer

    def solve(self, request: SolveRequest) -> Placement:
        """Return the best placement found within the budget.

        Raises
        ------
        InputError
            If the request has no start.
        InfeasibleError
            If no placement within the budget keeps the load limit.
        """
        if request.start is None:
            raise InputError("moves are counted from a start, and there is none")
        return improve_within(
            request.problem,
            request.start,
            max_moves=self.max_moves,
            seed=request.seed,
            work_s=request.work_s,
            stop=request.stop,
            threads=request.threads,
            prefer=self.prefer,
        )
