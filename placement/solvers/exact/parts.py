"""Bounds the step time of a stay-put chain by its parts, each solved to the optimum.

Whatever the placement, a layer's experts take at least as long as under the placement that suits them best,
and tokens hop at least as often as under the placement of fewest hops. The tokens that arrive over all
boundaries spread over the devices of the fullest link; by convexity the exchanges take least time when all
boundaries and windows see the same.

Shape letters: W windows, L layers, H homes, G groups.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placement.bounds import LowerBound
from placement.bounds.curves import convex_minorant
from placement.cost import CostModel
from placement.cost.links import Link
from placement.errors import InputError
from placement.problem import Objective, PlacementProblem, Risk, Semantics
from placement.profile import RoutingProfile
from placement.solvers.exact.proof import PROOF_STEP
from placement.solvers.exact.size import is_enumerable
from placement.solvers.exact.solver import ExactSolver
from placement.solvers.greedy import greedy_placement
from placement.solvers.protocol import SolveRequest

__all__ = ["bound_by_parts", "can_bound_by_parts"]


def can_bound_by_parts(problem: PlacementProblem) -> bool:
    """Return whether a problem is a chain whose parts can be enumerated."""
    if problem.semantics is not Semantics.STAY_PUT or problem.objective is not Objective.STEP_TIME:
        return False
    if problem.risk is Risk.P95 or problem.num_slots > problem.num_experts or problem.num_layers < 2:
        return False
    mean = replace(problem, risk=Risk.MEAN)
    parts = (replace(mean, objective=Objective.TRAFFIC), replace(mean, semantics=Semantics.ALLGATHER))
    return all(is_enumerable(part) for part in parts)


def bound_by_parts(request: SolveRequest) -> LowerBound:
    """Bound the mean step time of a stay-put chain from below; as far as it got when stopped early.

    Raises
    ------
    InputError
        If the problem is another one, or a part of it too large to enumerate.
    """
    problem = request.problem
    if not can_bound_by_parts(problem):
        raise InputError(
            "a bound by parts is for the mean step time under stay-put, without spare slots and with few "
            "experts; use lower_bound"
        )
    inside = replace(problem, risk=Risk.MEAN, profile=_without_tail(problem.profile))
    hops = _proved(
        request, replace(inside, objective=Objective.TRAFFIC, max_imbalance=float(problem.num_devices))
    )
    experts = _proved(request, replace(inside, semantics=Semantics.ALLGATHER))
    # All-gather costs the same under every placement: what is left is the experts' time.
    gathered = CostModel(replace(inside, semantics=Semantics.ALLGATHER)).evaluate(greedy_placement(inside))
    constant_L = (gathered.dispatch_WL + gathered.combine_WL).mean(axis=0)
    layer_L = np.maximum(0.0, experts.layer_L - constant_L - 1e-9 * np.abs(constant_L)) * PROOF_STEP
    exchange = max(
        (_exchange(inside, link, max(0.0, hops.value)) for link in request.model.links), default=0.0
    )
    return LowerBound(value=float(layer_L.sum()) + exchange * PROOF_STEP, layer_L=layer_L)


def _without_tail(profile: RoutingProfile) -> RoutingProfile:
    """Return the windows alone: tokens after the last one hop as well, but take no time."""
    return profile.select_windows(np.arange(profile.num_windows))


def _proved(request: SolveRequest, part: PlacementProblem) -> LowerBound:
    """Solve a part exactly and return the best that was proved of it."""
    proofs = [LowerBound(value=-np.inf, layer_L=np.full(part.num_layers, -np.inf))]
    ExactSolver().solve(
        SolveRequest(
            problem=part,
            model=CostModel(part),
            stop=request.stop,
            seed=request.seed,
            work_s=request.work_s,
            prove=proofs.append,
        )
    )
    return max(proofs, key=lambda proof: (proof.value, float(proof.layer_L.sum())))


def _exchange(problem: PlacementProblem, link: Link, hops: float) -> float:
    """Bound what the exchanges over one link take in the mean over windows, all layers together."""
    profile = problem.profile
    boundaries = problem.num_layers - 1
    fullest = 0.0
    if link.num_groups == problem.num_devices:
        arriving = hops * float(profile.token_weight_T.sum()) / profile.num_windows
        outside_HG = np.arange(link.num_groups) != link.group_D[:, None]
        share_G = np.where(outside_HG, link.enter_HG[1:], 0.0).max(axis=0)
        fullest = arriving * float(share_G.min()) / link.num_groups
    return boundaries * float(convex_minorant(link.dispatch)(fullest))
