"""Tests of the search where problems are odd: replicas, limits, chains, and sizes at the edge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import LINEAR, cluster, counts_only, least_objective, measured, model_for, random_profile

from placement.calibration import DataSheetCalibration
from placement.cost import CostModel
from placement.errors import InfeasibleError
from placement.optimizer import optimize
from placement.problem import Objective, PlacementProblem, Semantics, make_problem
from placement.profile import RoutingProfile
from placement.solution import Solution


def solve(problem: PlacementProblem, **options: Any) -> Solution:
    """Search alone, with little effort, and check the answer."""
    solution = optimize(problem, **{"solver": "search", "work_s": 0.05, **options})
    problem.check_placement(solution.placement)
    problem.check_capacity(solution.placement)
    assert solution.objective == CostModel(problem).objective(solution.placement)
    assert solution.lower_bound <= solution.objective * (1 + 1e-12)
    return solution


@pytest.mark.parametrize("semantics", list(Semantics))
@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("seed", range(5))
def test_tiny_problems_are_solved(objective: Objective, semantics: Semantics, seed: int) -> None:
    """One copy of each expert: the optimum to a few percent, since softened scenarios are searched."""
    if objective is Objective.TRAFFIC and semantics not in (Semantics.DISPATCH, Semantics.STAY_PUT):
        semantics = Semantics.DISPATCH
    chained = semantics is Semantics.STAY_PUT
    rng = np.random.default_rng(seed)
    profile = random_profile(rng, tokens=400, experts=4 if chained else 6, windows=4, scale=50.0)
    calibration = (LINEAR, DataSheetCalibration(), measured())[seed % 3]
    problem = make_problem(
        profile,
        cluster([0, 0] if chained or seed % 2 else [0, 0, 1], kind_D=None),
        model=model_for(profile),
        semantics=semantics,
        objective=objective,
        calibration=calibration,
        max_imbalance=2.0,
    )
    assert solve(problem).objective <= least_objective(problem) * 1.03


@pytest.mark.parametrize("seed", range(4))
def test_replicas_spare_tokens_a_trip(seed: int) -> None:
    """Under the traffic objective spare slots hold what tokens would travel for."""
    rng = np.random.default_rng(seed)
    profile = random_profile(rng, tokens=300, layers=1, experts=4, top_k=2)
    plain, spare = (
        make_problem(profile, cluster([0, 0]), objective="traffic", max_imbalance=2.0, spare_slots=spare)
        for spare in (0, 2)
    )
    found = solve(spare).objective
    assert found <= least_objective(spare) * 1.03
    assert found < least_objective(plain)


@pytest.mark.parametrize("semantics", ["dispatch", "stay-put"])
def test_replicas_even_out_the_load(semantics: str) -> None:
    """Balance needs replicas whatever the semantics: loads know no paths."""
    rng = np.random.default_rng(2135)
    profile = random_profile(rng, tokens=400, layers=1, experts=4, windows=4)
    problem = make_problem(
        profile,
        cluster([0, 0, 0], slots_D=[3, 2, 3]),
        semantics=semantics,
        objective="balance",
    )
    assert solve(problem).objective <= least_objective(problem) * 1.03


@given(seed=st.integers(0, 10_000), limit=st.sampled_from([1.02, 1.1, 1.5]))
@settings(max_examples=15, deadline=None)
def test_the_load_limit_is_kept_or_named(seed: int, limit: float) -> None:
    """Where some placement keeps the limit the answer does; else the message says what was reached."""
    rng = np.random.default_rng(seed)
    profile = random_profile(rng, tokens=300, experts=8, top_k=2)
    problem = make_problem(profile, cluster([0, 0]), objective="traffic", max_imbalance=limit)
    if least_objective(problem) == np.inf:
        with pytest.raises(InfeasibleError, match=f"--max-imbalance {limit}"):
            solve(problem)
        return
    solution = solve(problem)
    assert solution.breakdown.metrics.worst_layer_balance <= limit * (1 + 1e-9)


@pytest.mark.parametrize("objective", ["step-time", "traffic"])
def test_chains_of_layers_improve_on_greedy(objective: str) -> None:
    """Stay-put tokens follow their experts through four layers with fewer hops, with and without homes."""
    for homes in (0, 4):
        rng = np.random.default_rng(homes)
        profile = random_profile(rng, tokens=600, layers=4, experts=16, homes=homes)
        problem = make_problem(
            profile,
            cluster([0, 0, 1, 1]),
            model=model_for(profile),
            semantics="stay-put",
            objective=objective,
            max_imbalance=1.6,
        )
        hops = solve(problem).breakdown.metrics.hops
        greedy = optimize(make_problem(profile, cluster([0, 0, 1, 1]), objective="balance"), solver="greedy")
        assert hops is not None
        assert greedy.breakdown.metrics.hops is not None
        assert hops < 0.95 * greedy.breakdown.metrics.hops


@pytest.mark.parametrize(
    ("experts", "top_k", "windows", "node_D", "spare_slots"),
    [
        (4, 2, 3, [0], 0),
        (4, 2, 3, [0], 3),
        (4, 2, 3, [0, 0, 1, 1], 0),
        (4, 4, 3, [0, 0], 4),
        (6, 1, 3, [0, 0, 0], 3),
        (6, 2, 1, [0, 0], 0),
        (2, 1, 1, [0, 1], 2),
    ],
)
@pytest.mark.parametrize("semantics", list(Semantics))
def test_sizes_at_the_edge(
    semantics: Semantics, experts: int, top_k: int, windows: int, node_D: list[int], spare_slots: int
) -> None:
    """One device, one expert per device, all experts, top-1, one window, a replica of everything."""
    profile = random_profile(
        np.random.default_rng(0), tokens=30, experts=experts, top_k=top_k, windows=windows
    )
    problem = make_problem(
        profile, cluster(node_D), model=model_for(profile), semantics=semantics, spare_slots=spare_slots
    )
    assert np.isfinite(solve(problem).objective)


def test_windows_with_fewer_tokens_than_pieces() -> None:
    """A window of one token cannot be cut into quarters, and need not be."""
    profile = random_profile(np.random.default_rng(0), tokens=4, windows=3, tail=1)
    assert solve(make_problem(profile, cluster([0, 0]), calibration=LINEAR)).objective > 0


def test_counts_alone_are_balanced_over_windows() -> None:
    """Two experts that surge together part, though their averages are as any other's."""
    load_WLE = np.array([[[30, 30, 10, 10]], [[10, 10, 30, 30]]] * 3, dtype=np.float64)
    profile = RoutingProfile(load_WLE=load_WLE, window_tokens_W=np.full(6, 40.0), top_k=2)
    problem = make_problem(profile, cluster([0, 0]), objective="balance")
    assert solve(problem).objective == 1.0
    assert counts_only(profile).num_sampled_tokens == 0


@pytest.mark.parametrize("objective", ["step-time", "balance"])
@pytest.mark.parametrize("seed", range(3))
def test_screening_by_few_scenarios_loses_nothing(objective: str, seed: int) -> None:
    """Where scenarios are many, swaps are screened by a quarter of them; optima are still found."""
    profile = random_profile(np.random.default_rng(seed), tokens=1280, layers=1, windows=64)
    problem = make_problem(profile, cluster([0, 0, 0]), calibration=LINEAR, objective=objective)
    assert solve(problem, work_s=0.5).objective <= least_objective(problem) * 1.03


class CountedStop:
    """Stop at the n-th question, and count those that follow."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.asked = 0

    def __call__(self) -> bool:
        """Count the question."""
        self.asked += 1
        return self.asked > self.after


@pytest.mark.parametrize("solver", ["search", "auto"])
@pytest.mark.parametrize(
    ("semantics", "after"), [("dispatch", 0), ("dispatch", 5), ("stay-put", 0), ("stay-put", 5)]
)
def test_a_stop_is_heeded_soon(solver: str, semantics: str, after: int) -> None:
    """Once told to stop, the solve asks a few more times at most, and answers."""
    profile = random_profile(np.random.default_rng(0), tokens=600, layers=6, experts=16, top_k=3)
    problem = make_problem(
        profile, cluster([0, 0, 0, 0]), model=model_for(profile), semantics=semantics, calibration=LINEAR
    )
    stop = CountedStop(after)
    solution = solve(problem, solver=solver, stop=stop, work_s=100.0)
    assert solution.termination == "stopped"
    assert stop.asked - after <= 40


def test_a_failing_stop_criterion_ends_the_solve() -> None:
    """An exception (Ctrl-C in the calling thread) leaves at once and takes no thread with it."""
    profile = random_profile(np.random.default_rng(0), tokens=600, layers=6, experts=16, top_k=3)
    problem = make_problem(profile, cluster([0, 0]), calibration=LINEAR)

    def interrupted() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimize(problem, solver="search", stop=interrupted, work_s=100.0)
