"""Whole layers as integer programs: a proof wherever HiGHS finds one, a bound in any case.

Layers are solved one by one from the best placement that is known; where nobody gave one, `search` makes it.

Shape letters: L layers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placement.bounds import LowerBound
from placement.cost import CostModel
from placement.errors import InfeasibleError, InputError
from placement.plan import Placement
from placement.problem import Objective, PlacementProblem, Risk, Semantics
from placement.solvers.ilp.layer import LayerItems
from placement.solvers.ilp.program import NO_REPLICAS, LayerProgram, layer_program
from placement.solvers.milp import MilpResult, MilpStatus, solve_milp
from placement.solvers.protocol import SolveRequest
from placement.solvers.search import SearchSolver

__all__ = ["IlpSolver", "check_separable", "joined", "starting_placement"]

NODES_PER_SECOND = 200.0
"""Branch-and-bound nodes that count as a second of effort: a round figure for programs of a thousand rows."""

DEFAULT_WORK_S = 20.0

SMALL_PROGRAM = 300
"""Variables up to which a program is solved in this process: starting another takes longer."""

PROOF_SLACK = 1e-9
"""Share of a bound that is given away to rounding."""


class IlpSolver:
    """Branch and bound on whole layers.

    Parameters
    ----------
    backend
        Who solves the programs; a name of `placement.solvers.milp.BACKENDS`.
    relative_gap
        Where a layer counts as solved.
    """

    name = "ilp"

    def __init__(self, *, backend: str = "highs", relative_gap: float = 1e-6) -> None:
        self.backend = backend
        self.relative_gap = relative_gap

    def solve(self, request: SolveRequest) -> Placement:
        """Return the best placement found; bounds of all layers that were solved are proved on the way.

        Raises
        ------
        InputError
            If the programs cannot express the problem: stay-put semantics, a risk measure, distinct tokens in
            too many patterns or with replicas.
        InfeasibleError
            If it is proved that a load limit cannot be kept, or `search` finds no way to keep it.
        BackendError
            If the backend fails.
        """
        check_separable(request.problem, self.name)
        placement = starting_placement(request)
        for layer in range(request.problem.num_layers):
            if request.stop():
                break
            placement = self._solve_layer(request, placement, layer)
        return placement

    def _solve_layer(self, request: SolveRequest, placement: Placement, layer: int) -> Placement:
        model = CostModel(request.problem.one_layer(layer))
        items = LayerItems.of(placement, layer)
        program = layer_program(model, items, np.arange(request.problem.num_devices))
        result = self._run(request, program)
        if result.status is MilpStatus.INFEASIBLE:
            raise InfeasibleError(
                f"layer {layer}: no placement of single copies keeps every device within --max-imbalance "
                f"{request.problem.max_imbalance} (proved); allow more or add spare slots for replicas"
            )
        if not (items.replicas_I(request.problem.num_experts) > 1).any() and _no_spare(request.problem):
            _prove(request, layer, result.bound)
        better = _decoded(model, program, result)
        if better is None:
            return placement
        placement = joined(placement, layer, better)
        request.report(placement)
        return placement

    def _run(self, request: SolveRequest, program: LayerProgram) -> MilpResult:
        work_s = DEFAULT_WORK_S if request.work_s is None else request.work_s
        nodes = 1 + int(work_s * NODES_PER_SECOND / request.problem.num_layers)
        return solve_milp(
            program.program,
            backend=self.backend,
            relative_gap=self.relative_gap,
            node_limit=nodes,
            threads=1,  # more of them may end at another optimum
            seed=request.seed % 2**31,
            stop=request.stop,
            in_process=program.program.num_variables <= SMALL_PROGRAM,
        )


def _no_spare(problem: PlacementProblem) -> bool:
    """Return whether no placement can have replicas, so that a proof without them is a proof."""
    return problem.num_slots == problem.num_experts


def check_separable(problem: PlacementProblem, solver: str) -> None:
    """Refuse problems that are not sums over layers of means over windows.

    Raises
    ------
    InputError
        Naming what to use instead.
    """
    if problem.semantics is Semantics.STAY_PUT and problem.objective is not Objective.BALANCE:
        raise InputError(f"{solver} takes layers one by one, stay-put couples them; use chain or auto")
    if problem.risk is not Risk.MEAN:
        raise InputError(f"{solver} minimises means over windows, not {problem.risk}; use search or auto")


def starting_placement(request: SolveRequest) -> Placement:
    """Return the request's start on the problem's slots, or what `search` finds, and report it.

    Raises
    ------
    InputError
        If it has replicas where distinct tokens count.
    """
    start = request.start
    if start is None or start.num_slots != request.problem.num_slots:
        start = SearchSolver().solve(replace(request, work_s=request.work_s and request.work_s / 2))
    if _counts_tokens(request.problem) and (start.replicas_LE > 1).any():
        raise InputError(NO_REPLICAS)
    request.report(start)
    return start


def _counts_tokens(problem: PlacementProblem) -> bool:
    return problem.semantics is Semantics.DISPATCH and problem.objective is not Objective.BALANCE


def joined(placement: Placement, layer: int, items: LayerItems) -> Placement:
    """Return a placement with one layer's contents replaced."""
    from placement.cost.incremental import layer_row

    rows_LS = np.array(placement.physical_to_logical_map_LS)
    rows_LS[layer] = layer_row(items.expert_I, items.device_I, placement.device_of_slot_S)
    return placement.with_layers(rows_LS)


def _decoded(model: CostModel, program: LayerProgram, result: MilpResult) -> LayerItems | None:
    """Return the layer that was found if the cost model finds it better than what it was."""
    if result.value_V is None:
        return None
    found = program.decode(result.value_V)
    problem = model.problem
    before, after = (model.objective(items.placement(problem)) for items in (program.items, found))
    return found if after < before * (1 - 1e-12) else None


def _prove(request: SolveRequest, layer: int, bound: float) -> None:
    layer_L = np.full(request.problem.num_layers, -np.inf)
    layer_L[layer] = bound - PROOF_SLACK * abs(bound)
    request.prove(LowerBound(value=-np.inf, layer_L=layer_L))
