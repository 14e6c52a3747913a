"""Enumerates placements, up to what is interchangeable, and proves the best one optimal.

Layers that share nothing are solved one by one (`separate`), stay-put chains as a whole (`chain`, `paths`),
and tiny problems with replicas by listing them (`replicated`). What is proved is the cost model's objective
of the placement found, stepped back by more than all rounding.

Shape letters: W windows, L layers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from placement.bounds import LowerBound
from placement.cost import CostBreakdown, CostModel
from placement.errors import InputError
from placement.plan import Placement
from placement.problem import Objective, Risk, Semantics
from placement.solvers.exact.layout import make_layout
from placement.solvers.exact.proof import PROOF_STEP
from placement.solvers.exact.replicated import repeat_layer, solve_replicated
from placement.solvers.exact.rows import masks_of_layer, row_of_masks
from placement.solvers.exact.separate import SeparateLayers
from placement.solvers.exact.size import is_chain, why_not
from placement.solvers.greedy import greedy_placement
from placement.solvers.protocol import SolveRequest

__all__ = ["ExactSolver"]

FloatArray = npt.NDArray[np.float64]

SEARCHED_CLASSES = 1.0e4
"""Placements of a layer above which a short search finds the first incumbent; below, proofs are quicker."""

SEARCH_WORK_S = 0.25
"""Effort of that search for each layer, in seconds of one thread."""


class ExactSolver:
    """Proved optima of problems small enough to enumerate."""

    name = "exact"

    def solve(self, request: SolveRequest) -> Placement:
        """Return the best placement, proved unless stopped early.

        Raises
        ------
        InputError
            If there are too many placements to enumerate.
        InfeasibleError
            If no placement keeps the load limit, with the least balance possible; proved.
        """
        reason = why_not(request.problem)
        if reason is not None:
            raise InputError(f"exact cannot enumerate {reason}; use auto or search")
        if request.problem.num_slots > request.problem.num_experts:
            return solve_replicated(request)
        start = on_own_slots(request.model, request.start or greedy_placement(request.problem))
        request.report(start)
        if is_chain(request.problem):
            from placement.solvers.exact.coupled import solve_coupled

            return solve_coupled(request, start)
        return _solve_separately(request, start)


def on_own_slots(model: CostModel, placement: Placement) -> Placement:
    """Return a placement without replicas on the problem's slots, whatever slots it came with."""
    problem, layout = model.problem, make_layout(model)
    order_E = np.arange(problem.num_experts)
    rows = [
        row_of_masks(problem, layout, order_E, masks_of_layer(placement, layer, layout, order_E))
        for layer in range(problem.num_layers)
    ]
    return replace(
        placement, physical_to_logical_map_LS=np.stack(rows), device_of_slot_S=problem.device_of_slot_S
    )


def first_incumbent(request: SolveRequest, start: Placement) -> Placement:
    """Improve the start by a short search."""
    from placement.solvers.search import SearchSolver

    work_s = SEARCH_WORK_S * request.problem.num_layers
    if request.work_s is not None:
        work_s = min(work_s, request.work_s)
    found = SearchSolver().solve(replace(request, work_s=work_s, start=start))
    better = request.model.objective(found) < request.model.objective(start)
    return found if better else start


def _solve_separately(request: SolveRequest, start: Placement) -> Placement:
    problem = request.problem
    layers = SeparateLayers(request.model, request.stop)
    placement = start
    if problem.objective is not Objective.TRAFFIC and layers.layout.num_classes() > SEARCHED_CLASSES:
        placement = first_incumbent(request, start)
    proved_L = np.zeros(problem.num_layers, dtype=bool)
    for layer in range(problem.num_layers):
        if request.stop():
            break
        improved, proved_L[layer] = layers.improve(placement, layer)
        if improved is not placement:
            placement = improved
            request.report(placement)
    _prove(request, placement, proved_L)
    return placement


def _prove(request: SolveRequest, placement: Placement, proved_L: npt.NDArray[np.bool_]) -> None:
    """State what the layers that were searched to the end cost at the least."""
    breakdown = request.model.evaluate(placement)
    layer_L = np.full(proved_L.size, -np.inf)
    if request.problem.risk is Risk.MEAN:
        layer_L[proved_L] = _layer_terms(request.model, placement, breakdown)[proved_L] * PROOF_STEP
    value = breakdown.objective * PROOF_STEP if proved_L.all() else -np.inf
    request.prove(LowerBound(value=value, layer_L=layer_L))


def _layer_terms(model: CostModel, placement: Placement, breakdown: CostBreakdown) -> FloatArray:
    """Each layer's term of the objective's mean over windows, ``[layers]``."""
    if model.problem.objective is Objective.BALANCE:
        return np.asarray(breakdown.balance_WL.mean(axis=0))
    if model.problem.objective is Objective.STEP_TIME:
        total_WL = breakdown.experts_WL + breakdown.dispatch_WL + breakdown.combine_WL
        return np.asarray(total_WL.mean(axis=0))
    if model.problem.semantics is Semantics.STAY_PUT:
        return np.zeros(model.problem.num_layers)
    return _fanouts(model, placement)


def _fanouts(model: CostModel, placement: Placement) -> FloatArray:
    """Devices that a token touches on the mean, layer by layer, ``[layers]``."""
    profile = model.problem.profile
    fanout_L = np.empty(profile.num_layers)
    for layer in range(profile.num_layers):
        alone = replace(model.problem, profile=repeat_layer(profile, layer, 1), model=None)
        row_1S = placement.physical_to_logical_map_LS[[layer]]
        fanout = CostModel(alone).evaluate(placement.with_layers(row_1S)).metrics.fanout
        assert fanout is not None
        fanout_L[layer] = fanout
    return fanout_L
