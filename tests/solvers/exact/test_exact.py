"""The exact solver against exhaustive optima of tiny random problems."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
from instances import (
    LINEAR,
    cluster,
    least_objective,
    measured,
    model_for,
    placement_of,
    random_placement,
    random_profile,
)

from placement.bounds import LowerBound
from placement.calibration import DataSheetCalibration
from placement.cost import CostModel
from placement.errors import InfeasibleError, InputError
from placement.optimizer import optimize
from placement.problem import Objective, PlacementProblem, Risk, Semantics, make_problem
from placement.profile import RoutingProfile
from placement.solution import Termination
from placement.solvers.exact.parts import bound_by_parts
from placement.solvers.exact.size import is_enumerable
from placement.solvers.exact.solver import ExactSolver
from placement.solvers.protocol import SolveRequest

SEPARATE = [
    (semantics, objective)
    for semantics in Semantics
    for objective in Objective
    if objective is not Objective.TRAFFIC or semantics is Semantics.DISPATCH
    if semantics is not Semantics.STAY_PUT or objective is Objective.BALANCE
]

CLUSTERS = {
    "one node": {"node_D": [0, 0, 0]},
    "two nodes": {"node_D": [0, 0, 1, 1], "slots_D": [2, 1, 2, 1]},
    "uneven nodes": {"node_D": [0, 1, 1], "across_gbps": 30.0},
    "kinds": {"node_D": [0, 0, 0], "kind_D": [0, 1, 0], "tflops": (100.0, 30.0)},
    "uneven slots": {"node_D": [0, 0, 1], "slots_D": [3, 1, 2]},
    "slow network": {"node_D": [0, 1, 2], "across_gbps": [10.0, 10.0, 3.0], "slots_D": [2, 2, 2]},
    "full node": {"node_D": [0, 0, 1], "slots_D": [6, 0, 0]},
    "one device": {"node_D": [0]},
}


def solved(problem: PlacementProblem) -> tuple[float, list[LowerBound]]:
    """Solve exactly; return the objective of the placement and what was proved."""
    model = CostModel(problem)
    bounds: list[LowerBound] = []
    placement = ExactSolver().solve(SolveRequest(problem=problem, model=model, prove=bounds.append))
    problem.check_placement(placement)
    problem.check_capacity(placement)
    return model.objective(placement), bounds


def check_optimal(problem: PlacementProblem, least: float) -> None:
    """Verify that the exact solver finds and proves a known optimum."""
    objective, bounds = solved(problem)
    assert objective == pytest.approx(least, rel=1e-11, abs=1e-15)
    best = max(bound.value for bound in bounds)
    assert objective * (1 - 1e-9) <= best <= least


@pytest.mark.parametrize(("semantics", "objective"), SEPARATE)
@pytest.mark.parametrize("where", CLUSTERS)
@pytest.mark.parametrize("seed", range(3))
def test_separate_layers_are_solved_to_the_optimum(
    semantics: Semantics, objective: Objective, where: str, seed: int
) -> None:
    """Every semantics, objective, topology and calibration, with and without homes."""
    rng = np.random.default_rng([seed, *map(ord, where)])
    devices = len(CLUSTERS[where]["node_D"])
    profile = random_profile(
        rng, experts=6, top_k=2 + seed % 2, homes=devices if seed == 1 else 0, tail=7 * seed, scale=200.0
    )
    problem = make_problem(
        profile,
        cluster(**CLUSTERS[where]),
        model=model_for(profile),
        semantics=semantics,
        objective=objective,
        calibration=(DataSheetCalibration(), measured(), LINEAR)[seed],
        max_imbalance=2.5,
    )
    least = least_objective(problem)
    if np.isinf(least):
        with pytest.raises(InfeasibleError, match="proved"):
            solved(problem)
        return
    check_optimal(problem, least)


@pytest.mark.parametrize("objective", [Objective.STEP_TIME, Objective.TRAFFIC])
@pytest.mark.parametrize("seed", range(30))
def test_chains_are_solved_to_the_optimum(objective: Objective, seed: int) -> None:
    """Stay-put layers are placed together, with homes, nodes, uneven slots and load limits."""
    rng = np.random.default_rng(seed)
    where = (
        {"node_D": [0, 0]},
        {"node_D": [0, 1]},
        {"node_D": [0, 0, 0, 0], "slots_D": [1, 1, 1, 1]},
        {"node_D": [0, 0, 1, 1]},
        {"node_D": [0, 0, 1], "slots_D": [2, 1, 1], "kind_D": [0, 1, 0], "tflops": (100.0, 30.0)},
        {"node_D": [0, 1, 1], "slots_D": [0, 2, 2]},
    )[seed % 6]
    devices = len(where["node_D"])
    profile = random_profile(
        rng,
        experts=4,
        layers=2 if devices > 2 else 3,
        windows=2,
        homes=devices if seed % 3 == 1 else 0,
        tail=seed % 5,
        scale=300.0,
    )
    problem = make_problem(
        profile,
        cluster(**where),
        model=model_for(profile),
        semantics="stay-put",
        objective=objective,
        calibration=(LINEAR, DataSheetCalibration())[seed % 4 < 2],
        max_imbalance=1.6,
    )
    least = least_objective(problem)
    if np.isinf(least):
        with pytest.raises(InfeasibleError, match="proved"):
            solved(problem)
        return
    check_optimal(problem, least)


@pytest.mark.parametrize("seed", range(24))
def test_paths_are_solved_to_the_optimum(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set partitioning over paths agrees with dynamic programming over placements, limits and all."""
    rng = np.random.default_rng(seed)
    slots_D = ([2, 2, 2], [1, 1, 2, 2], [3, 3], [1, 2, 3], [2, 2, 1, 1], [0, 3, 3])[seed % 6]
    profile = random_profile(rng, tokens=150, experts=6, layers=2 + seed % 3, windows=2, tail=seed % 4)
    problem = make_problem(
        profile,
        cluster([0] * len(slots_D), slots_D=slots_D),
        semantics="stay-put",
        objective="traffic",
        calibration=LINEAR,
        max_imbalance=(3.0, 1.7, 1.4, 1.25)[seed // 6],
    )
    try:
        by_placements, _ = solved(problem)
    except InfeasibleError:
        by_placements = np.inf
    monkeypatch.setattr("placement.solvers.exact.coupled.MOST_CHAIN_STEPS", -1.0)
    # A poor incumbent leaves more to prove.
    monkeypatch.setattr("placement.solvers.exact.paths.NUM_STARTS", seed % 3)
    if np.isinf(by_placements):
        with pytest.raises(InfeasibleError, match="proved"):
            solved(problem)
        return
    check_optimal(problem, by_placements)


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("semantics", list(Semantics))
@pytest.mark.parametrize("seed", range(2))
def test_replicas_are_enumerated_where_they_are_few(
    semantics: Semantics, objective: Objective, seed: int
) -> None:
    """Spare slots of tiny problems: replicas and empty slots included in the proof."""
    if objective is Objective.TRAFFIC and semantics is not Semantics.DISPATCH:
        return
    rng = np.random.default_rng(seed)
    profile = random_profile(rng, experts=4, layers=2, windows=2, homes=2 * seed)
    problem = make_problem(
        profile,
        cluster([0, seed]),
        model=model_for(profile),
        semantics=semantics,
        objective=objective,
        calibration=(LINEAR, DataSheetCalibration())[seed],
        spare_slots=2,
        max_imbalance=1.3,
    )
    if semantics is Semantics.STAY_PUT and objective is not Objective.BALANCE:
        with pytest.raises(InputError, match="replicas under stay-put; use auto or search"):
            solved(problem)
        return
    check_optimal(problem, least_objective(problem))


@pytest.mark.parametrize("risk", [Risk.P95, Risk.CVAR95])
@pytest.mark.parametrize("objective", [Objective.STEP_TIME, Objective.BALANCE])
@pytest.mark.parametrize("windows", [3, 30])
def test_risk_of_one_layer_is_solved(risk: Risk, objective: Objective, windows: int) -> None:
    """A tail of windows instead of their mean."""
    rng = np.random.default_rng(windows)
    profile = random_profile(rng, experts=6, layers=1, tokens=40 * windows, windows=windows)
    problem = make_problem(profile, cluster([0, 0, 0]), calibration=LINEAR, objective=objective, risk=risk)
    check_optimal(problem, least_objective(problem))
    two = random_profile(rng, experts=6, layers=2, windows=3)
    with pytest.raises(InputError, match="of 2 layers together"):
        solved(make_problem(two, cluster([0, 0]), calibration=LINEAR, objective=objective, risk=risk))


@pytest.mark.parametrize(
    ("where", "objective"), [([0, 0, 0, 0], Objective.TRAFFIC), ([0, 0, 1, 1], Objective.STEP_TIME)]
)
def test_eight_experts_on_four_devices(where: list[int], objective: Objective) -> None:
    """All 2520 labelled placements are no better, whatever the nodes; four siblings, and two by two."""
    rng = np.random.default_rng(8)
    profile = random_profile(rng, experts=8, layers=1, tokens=120, windows=3, scale=100.0)
    problem = make_problem(
        profile, cluster(where), model=model_for(profile), objective=objective, max_imbalance=1.35
    )
    model, least = CostModel(problem), np.inf
    for row in itertools.permutations(range(8)):
        if all(row[i] < row[i + 1] for i in range(0, 8, 2)):
            breakdown = model.evaluate(placement_of(problem, [row]))
            limited = objective is Objective.TRAFFIC and breakdown.metrics.worst_layer_balance > 1.35
            least = least if limited else min(least, breakdown.objective)
    check_optimal(problem, least)


def sixteen(objective: str = "step-time", semantics: str = "dispatch") -> PlacementProblem:
    """Return a problem of 16 experts on four devices: 2.6 million placements of a layer up to symmetry."""
    rng = np.random.default_rng(16)
    profile = random_profile(rng, experts=16, layers=2, tokens=900, windows=6)
    return make_problem(
        profile,
        cluster([0, 0, 0, 0]),
        calibration=LINEAR,
        objective=objective,
        semantics=semantics,
        max_imbalance=1.5,
    )


@cache
def optimum_of_sixteen(objective: str, semantics: str) -> float:
    """Return the proved optimum of that problem."""
    return optimize(sixteen(objective, semantics), solver="exact").objective


@pytest.fixture
def few_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search for incumbents briefly."""
    monkeypatch.setattr("placement.solvers.exact.paths.NUM_STARTS", 20)


@pytest.mark.usefixtures("few_starts")
@pytest.mark.parametrize(
    ("objective", "semantics"),
    [("step-time", "dispatch"), ("balance", "allgather"), ("traffic", "dispatch"), ("traffic", "stay-put")],
)
def test_sixteen_experts_are_proved_and_repeatable(objective: str, semantics: str) -> None:
    """The solution counts as optimal, no search beats it, and a second solve gives the same placement."""
    problem = sixteen(objective, semantics)
    solution = optimize(problem, solver="exact", seed=3)
    assert solution.termination is Termination.OPTIMAL
    assert solution.gap <= 1e-9
    assert optimize(problem, solver="search", work_s=0.5).objective >= solution.lower_bound
    again = optimize(problem, solver="exact", seed=3)
    np.testing.assert_array_equal(
        solution.placement.physical_to_logical_map_LS, again.placement.physical_to_logical_map_LS
    )


@pytest.mark.usefixtures("few_starts")
@pytest.mark.parametrize("questions", [0, 1, 20, 60])
@pytest.mark.parametrize(
    ("objective", "semantics"), [("step-time", "dispatch"), ("traffic", "stay-put"), ("traffic", "dispatch")]
)
def test_a_stop_keeps_the_incumbent_and_proves_no_more_than_is_true(
    questions: int, objective: str, semantics: str
) -> None:
    """Whenever the solve ends, its bound lies below the optimum and its placement is complete."""
    problem = sixteen(objective, semantics)
    optimum = optimum_of_sixteen(objective, semantics)
    asked = itertools.count()
    start = optimize(problem, solver="search", work_s=0.2).placement
    solution = optimize(problem, solver="exact", start=start, stop=lambda: next(asked) >= questions)
    assert solution.lower_bound <= optimum <= solution.objective * (1 + 1e-12)
    assert solution.objective <= CostModel(problem).objective(start)


def test_a_start_in_another_order_of_slots_is_taken() -> None:
    """A warm start may name the slots in any order."""
    problem = sixteen("balance")
    start = random_placement(np.random.default_rng(1), problem, shuffle=True)
    solution = optimize(problem, solver="exact", start=start)
    assert solution.termination is Termination.OPTIMAL


@pytest.mark.parametrize(
    ("experts", "where", "options", "match"),
    [
        (24, [0, 0, 0], {}, "24 experts per layer, more than 20"),
        (16, [0, 0, 0, 0], {"spare_slots": 4}, "ways per layer to fill slots with replicas"),
        (12, list(range(12)), {"kind_D": list(range(12))}, "placements per layer"),
        (16, [0, 0, 0, 0], {"semantics": "stay-put"}, "a chain of 2 layers"),
    ],
)
def test_what_is_too_large_is_refused_with_the_numbers(
    experts: int, where: list[int], options: dict[str, Any], match: str
) -> None:
    """Nothing is enumerated that would not end, and the message names who takes the problem."""
    rng = np.random.default_rng(0)
    profile = random_profile(rng, experts=experts, layers=2)
    kinds = options.pop("kind_D", None)
    speeds = [100.0 + kind for kind in kinds or [0]]
    topology = cluster(where, kind_D=kinds, tflops=speeds)
    problem = make_problem(profile, topology, model=model_for(profile), **options)
    assert not is_enumerable(problem)
    with pytest.raises(InputError, match=rf"exact cannot enumerate .*{match}.*; use auto or search"):
        solved(problem)


def test_counts_without_tokens_are_enough_where_no_token_matters() -> None:
    """A source of expert counts is balanced to the optimum, a window without tokens included."""
    rng = np.random.default_rng(2)
    load_WLE = rng.integers(0, 50, (4, 2, 8)).astype(np.float64)
    load_WLE[2] = 0.0
    profile = RoutingProfile(load_WLE=load_WLE, window_tokens_W=np.full(4, 100.0), top_k=2)
    problem = make_problem(profile, cluster([0, 0]), calibration=LINEAR, objective="balance")
    solution = optimize(problem, solver="exact")
    assert solution.termination is Termination.OPTIMAL
    assert solution.objective <= optimize(problem, solver="search", work_s=0.2).objective


@pytest.mark.parametrize("seed", range(16))
def test_parts_of_a_chain_bound_its_step_time(seed: int) -> None:
    """No placement is quicker than the experts' best and the fewest hops together."""
    rng = np.random.default_rng(seed)
    devices = 2 + seed % 2
    profile = random_profile(
        rng, experts=4, layers=2, windows=2, homes=devices if seed % 3 == 1 else 0, tail=seed % 7, scale=300.0
    )
    problem = make_problem(
        profile,
        cluster(
            [0, 0, 0][:devices] if seed % 4 else [0, 1, 1][:devices],
            slots_D=[2, 1, 1] if devices == 3 else None,
        ),
        model=model_for(profile),
        semantics="stay-put",
        calibration=(LINEAR, DataSheetCalibration(), measured())[seed % 3],
    )
    bound = bound_by_parts(SolveRequest(problem=problem, model=CostModel(problem)))
    least = least_objective(problem)
    assert 0.5 * least < bound.value <= least
    assert bound.layer_L.sum() <= bound.value


def test_parts_bound_stay_put_step_time_alone() -> None:
    """Other problems are told so; a bound that was stopped says nothing wrong."""
    problem = sixteen()
    with pytest.raises(InputError, match="under stay-put"):
        bound_by_parts(SolveRequest(problem=problem, model=CostModel(problem)))
    chain = sixteen(semantics="stay-put")
    stopped = bound_by_parts(SolveRequest(problem=chain, model=CostModel(chain), stop=lambda: True))
    assert 0 <= stopped.value < np.inf
