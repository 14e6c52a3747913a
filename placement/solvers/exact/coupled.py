"""Stay-put chains: dynamic programming over placements where these are few, else hops by paths of groups."""

from __future__ import annotations

import numpy as np

from placement.bounds import LowerBound
from placement.plan import Placement
from placement.problem import Objective
from placement.solvers.exact.chain import best_chain
from placement.solvers.exact.layout import make_layout
from placement.solvers.exact.proof import PROOF_STEP
from placement.solvers.exact.separate import check_levels
from placement.solvers.exact.size import MOST_CHAIN_STEPS, chain_steps
from placement.solvers.protocol import SolveRequest

__all__ = ["solve_coupled"]


def solve_coupled(request: SolveRequest, start: Placement) -> Placement:
    """Return the best placement of a stay-put chain, proved unless stopped early.

    Raises
    ------
    InfeasibleError
        If a layer cannot keep the load limit.
    """
    problem = request.problem
    if problem.objective is Objective.TRAFFIC:
        check_levels(request.model)
    if chain_steps(problem, make_layout(request.model)) <= MOST_CHAIN_STEPS:
        return _by_placements(request, start)
    from placement.solvers.exact.paths import solve_paths

    return solve_paths(request, start)


def _by_placements(request: SolveRequest, start: Placement) -> Placement:
    placement = best_chain(request.model, request.stop)
    if placement is None:
        # Stopped: a load limit that cannot be kept has been reported before.
        return start
    request.report(placement)
    value = request.model.objective(placement) * PROOF_STEP
    request.prove(LowerBound(value=value, layer_L=np.full(request.problem.num_layers, -np.inf)))
    return placement
