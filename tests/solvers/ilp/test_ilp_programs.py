"""Programs of our own objective: their optimum is the brute-force optimum, and their bounds are bounds."""

from __future__ import annotations

import numpy as np
import pytest
from instances import LINEAR, cluster, least_objective, measured, model_for, random_placement, random_profile

from placement.bounds import LowerBound
from placement.cost import CostModel
from placement.errors import InfeasibleError, InputError
from placement.plan import Placement
from placement.problem import DATA_SHEET, Objective, PlacementProblem, Risk, Semantics, make_problem
from placement.solvers.ilp.layer import LayerItems
from placement.solvers.ilp.neighbourhood import LnsSolver
from placement.solvers.ilp.program import layer_program
from placement.solvers.ilp.solver import IlpSolver
from placement.solvers.milp import solve_milp
from placement.solvers.protocol import SolveRequest

CLUSTERS = {
    "flat": cluster([0, 0, 0]),
    "nodes": cluster([0, 0, 1]),
    "mixed": cluster([0, 0, 0], kind_D=[0, 1, 1], tflops=(100.0, 50.0)),
    "uneven": cluster([0, 0, 0], slots_D=[3, 2, 1]),
}
CASES = [
    (Semantics.DISPATCH, Objective.STEP_TIME),
    (Semantics.DISPATCH, Objective.TRAFFIC),
    (Semantics.DISPATCH, Objective.BALANCE),
    (Semantics.DISPATCH_NODEDUP, Objective.STEP_TIME),
    (Semantics.ALLGATHER, Objective.STEP_TIME),
]


def random_problem(
    seed: int, semantics: Semantics, objective: Objective, where: str, *, homes: int = 0
) -> PlacementProblem:
    """Return six experts in two layers on three devices."""
    rng = np.random.default_rng(seed)
    profile = random_profile(rng, tokens=60, layers=2, experts=6, windows=3, tail=seed % 4, homes=homes)
    return make_problem(
        profile,
        CLUSTERS[where],
        model=model_for(profile),
        semantics=semantics,
        objective=objective,
        calibration=[LINEAR, DATA_SHEET, measured()][seed % 3],
        max_imbalance=1.5,
    )


@pytest.mark.parametrize("where", ["flat", "nodes", "mixed", "uneven"])
@pytest.mark.parametrize(("semantics", "objective"), CASES)
@pytest.mark.parametrize("homes", [0, 3])
def test_whole_layers_are_solved_to_the_proved_optimum(
    where: str, semantics: Semantics, objective: Objective, homes: int
) -> None:
    """The placement is as good as brute force, the proved layers add up to a bound that meets it."""
    seed = 10 * len(where) + homes
    problem = random_problem(seed, semantics, objective, where, homes=homes)
    least = least_objective(problem)
    proofs: list[LowerBound] = []
    model = CostModel(problem)
    request = SolveRequest(problem=problem, model=model, work_s=5.0, prove=proofs.append)
    if np.isinf(least):
        with pytest.raises(InfeasibleError, match="max-imbalance"):
            IlpSolver().solve(request)
        return
    found = model.objective(IlpSolver().solve(request))
    assert found == pytest.approx(least, rel=2e-6)
    layer_L = np.max([proof.layer_L for proof in proofs], axis=0)
    bound = layer_L.sum() if objective is Objective.STEP_TIME else layer_L.mean()
    assert bound <= least * (1 + 1e-12)
    if objective is not Objective.STEP_TIME or seed % 3 != 2:  # measured curves are not convex
        assert bound >= least * (1 - 1e-5)


@pytest.mark.parametrize(("semantics", "objective"), CASES)
def test_neighbourhoods_never_worsen_and_reach_the_optimum(
    semantics: Semantics, objective: Objective
) -> None:
    """From a random placement of single copies, re-dividing devices again and again finds the optimum."""
    problem = random_problem(3, semantics, objective, "flat")
    start = random_placement(np.random.default_rng(0), problem)
    model = CostModel(problem)
    reported: list[float] = []
    request = SolveRequest(
        problem=problem,
        model=model,
        work_s=8.0,
        start=start,
        report=lambda placement: reported.append(model.objective(placement)),
    )
    found = model.objective(LnsSolver().solve(request))
    assert reported[0] == model.objective(start)
    assert reported == sorted(reported, reverse=True)
    assert found <= least_objective(problem) * (1 + 1e-3)


def one_layer(seed: int = 4, **options: object) -> tuple[CostModel, LayerItems, Placement]:
    """Return a layer of eight experts on four devices, and its contents in a random placement."""
    rng = np.random.default_rng(seed)
    profile = random_profile(rng, tokens=200, layers=2, experts=8, top_k=3, windows=4)
    problem = make_problem(profile, cluster([0, 0, 1, 1]), calibration=LINEAR, **options)  # type: ignore[arg-type]
    placement = random_placement(rng, problem)
    return CostModel(problem.one_layer(1)), LayerItems.of(placement, 1), placement


def test_a_layer_alone_is_the_layers_share_of_the_objective() -> None:
    """Layers on their own add up to the whole."""
    rng = np.random.default_rng(5)
    profile = random_profile(rng, tokens=200, layers=3, experts=8, windows=4)
    problem = make_problem(profile, cluster([0, 0]), calibration=LINEAR)
    placement = random_placement(rng, problem)
    shares = []
    for layer in range(3):
        one = problem.one_layer(layer)
        shares.append(CostModel(one).objective(LayerItems.of(placement, layer).placement(one)))
    assert sum(shares) == pytest.approx(CostModel(problem).objective(placement), rel=1e-12)


@pytest.mark.parametrize("devices", [[0, 1], [0, 3], [1, 2, 3]])
@pytest.mark.parametrize("most_items", [3, 8])
def test_a_neighbourhood_is_the_objective_with_the_rest_held(devices: list[int], most_items: int) -> None:
    """The program's optimum is the cost model's value of what it decodes to, and no worse than before."""
    model, items, _ = one_layer()
    free_devices = np.array(devices)
    free_items = np.nonzero(np.isin(items.device_I, free_devices))[0][:most_items]
    program = layer_program(model, items, free_devices, free_items=free_items)
    result = solve_milp(program.program, in_process=True, relative_gap=1e-9)
    assert result.value_V is not None
    after = program.decode(result.value_V)
    problem = model.problem
    assert result.objective == pytest.approx(model.objective(after.placement(problem)), rel=1e-9)
    assert result.objective <= model.objective(items.placement(problem)) * (1 + 1e-9)
    moved = np.nonzero(after.device_I != items.device_I)[0]
    assert set(moved) <= set(free_items)


def test_the_start_is_the_layer_as_it_is() -> None:
    """Up to the names of interchangeable devices, and feasible: the solver begins where we are."""
    model, items, _ = one_layer(objective="balance")
    program = layer_program(model, items, np.arange(4))
    start_V = program.program.start_V
    assert start_V is not None
    before = model.objective(items.placement(model.problem))
    assert model.objective(program.decode(start_V).placement(model.problem)) == pytest.approx(before)
    assert (start_V <= program.program.upper_V).all()


def test_tokens_in_too_many_patterns_are_refused() -> None:
    """The message says how many there are and who can do it."""
    model, items, _ = one_layer()
    with pytest.raises(InputError, match=r"patterns of tokens over 4 devices are too many .* use lns"):
        layer_program(model, items, np.arange(4), most_pattern_variables=20)


@pytest.mark.parametrize("solver", [IlpSolver(), LnsSolver()])
@pytest.mark.parametrize(
    ("options", "why"),
    [({"semantics": "stay-put"}, "stay-put couples"), ({"risk": Risk.P95}, "means over windows")],
)
def test_problems_that_are_no_sums_are_refused(
    solver: IlpSolver | LnsSolver, options: dict[str, object], why: str
) -> None:
    """Coupled layers and risk measures are left to other solvers, who are named."""
    profile = random_profile(np.random.default_rng(0), experts=8)
    problem = make_problem(profile, cluster([0, 0]), calibration=LINEAR, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=rf"{why}.* use "):
        solver.solve(SolveRequest(problem=problem, model=CostModel(problem)))


def test_replicas_stay_apart_in_a_program_of_pairs() -> None:
    """Copies of one expert are never put on one device, and the better division is found."""
    profile = random_profile(np.random.default_rng(2), tokens=80, layers=1, experts=4, windows=2)
    problem = make_problem(
        profile, cluster([0, 0, 0]), calibration=LINEAR, semantics="dispatch-nodedup", spare_slots=2
    )
    start = Placement(
        physical_to_logical_map_LS=np.array([[0, 1, 0, 2, 1, 3]]),
        device_of_slot_S=problem.device_of_slot_S,
        num_experts=4,
        num_devices=3,
    )
    model = CostModel(problem)
    found = IlpSolver().solve(SolveRequest(problem=problem, model=model, start=start))
    np.testing.assert_array_equal(found.replicas_LE, start.replicas_LE)
    assert model.objective(found) <= model.objective(start)
