"""Tests of the refinement under the realised replica split: its prices, its contract, tiny optima."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from instances import (
    LINEAR,
    cluster,
    counts_only,
    least_objective,
    model_for,
    placement_of,
    random_placement,
    random_profile,
)

from placement.cost import CostModel
from placement.cost.split import number_replicas
from placement.errors import InfeasibleError, InputError
from placement.optimizer import optimize
from placement.plan import EMPTY
from placement.problem import Objective, PlacementProblem, ReplicaSplit, Risk, Semantics, make_problem
from placement.profile import RoutingProfile
from placement.solution import Termination
from placement.solvers.split_price import SplitPrice, sample_tokens
from placement.solvers.split_refine import relief

UNEVEN = [ReplicaSplit.HASH, ReplicaSplit.NEAREST, ReplicaSplit.LP]


def problem_of(seed: int, split: ReplicaSplit, **options: Any) -> PlacementProblem:
    """Return a problem of 12 experts on two nodes of two devices, with homes."""
    rng = np.random.default_rng(seed)
    profile = random_profile(rng, tokens=300, layers=2, experts=12, top_k=3, windows=5, homes=4, tail=9)
    given = {"calibration": LINEAR, "spare_slots": 4, "max_imbalance": 2.0, **options}
    return make_problem(
        profile, cluster([0, 0, 1, 1]), model=model_for(profile), replica_split=split, **given
    )


CASES = [
    (Semantics.DISPATCH, Objective.STEP_TIME),
    (Semantics.DISPATCH, Objective.BALANCE),
    (Semantics.DISPATCH, Objective.TRAFFIC),
    (Semantics.DISPATCH_NODEDUP, Objective.STEP_TIME),
    (Semantics.ALLGATHER, Objective.STEP_TIME),
    (Semantics.STAY_PUT, Objective.STEP_TIME),
    (Semantics.STAY_PUT, Objective.BALANCE),
]


@pytest.mark.parametrize("split", UNEVEN)
@pytest.mark.parametrize(("semantics", "objective"), CASES[:5])
@pytest.mark.parametrize("calibration", [LINEAR, None])
def test_prices_are_the_cost_model_s(
    split: ReplicaSplit, semantics: Semantics, objective: Objective, calibration: Any
) -> None:
    """Priced from nothing, and by what a swap of two slots changes, move after move."""
    whole = problem_of(1, split, semantics=semantics, objective=objective, calibration=calibration)
    problem = whole.one_layer(1, profile=problem_of(1, split).profile)
    rng = np.random.default_rng(2)
    model = CostModel(problem)
    price = SplitPrice(problem, lambda cost_W: float(cost_W.mean()))
    row_S = random_placement(rng, problem, fill=0.8).physical_to_logical_map_LS[0]
    priced = price.price(row_S)
    for _ in range(8):
        assert priced.rank[1] == pytest.approx(model.objective(price.placement(priced.row_S)), rel=1e-9)
        after_S = random_placement(rng, problem, fill=0.8).physical_to_logical_map_LS[0]
        before, after = (
            number_replicas(row, problem.device_of_slot_S, 12) for row in (priced.row_S, after_S)
        )
        changed = [
            e
            for e in range(12)
            if before.replica_EX[e, : before.replicas_E[e]].tolist()
            != after.replica_EX[e, : after.replicas_E[e]].tolist()
        ]
        priced = price.change(priced, after_S, np.array(changed, dtype=np.int64))


@pytest.mark.parametrize("split", UNEVEN)
@pytest.mark.parametrize(("semantics", "objective"), CASES)
def test_refinement_never_worsens_and_mostly_improves(
    split: ReplicaSplit, semantics: Semantics, objective: Objective
) -> None:
    """Feasible, priced by the cost model, above the bound, seeded, and at least as good as its start."""
    problem = problem_of(3, split, semantics=semantics, objective=objective)
    model = CostModel(problem)
    start = optimize(problem_of(3, split, objective="balance"), solver="eplb").placement
    limited = objective is Objective.TRAFFIC
    first, second = (optimize(problem, solver="split", start=start, seed=5, work_s=0.15) for _ in range(2))
    problem.check_capacity(first.placement)
    assert first.objective == model.objective(first.placement)
    assert first.lower_bound <= first.objective
    if not limited or model.evaluate(start).metrics.worst_layer_balance <= 2.0:
        assert first.objective < model.objective(start)
    np.testing.assert_array_equal(
        first.placement.physical_to_logical_map_LS, second.placement.physical_to_logical_map_LS
    )


@pytest.mark.parametrize("split", UNEVEN)
@pytest.mark.parametrize("risk", [Risk.P95, Risk.CVAR95])
def test_tail_risks_fall(split: ReplicaSplit, risk: Risk) -> None:
    """The risk over windows is what is minimised, not the mean of each layer."""
    problem = problem_of(4, split, risk=risk)
    start = optimize(problem_of(4, split, objective="balance"), solver="eplb").placement
    assert optimize(problem, solver="split", start=start, work_s=0.3).objective < CostModel(
        problem
    ).objective(start)


@pytest.mark.parametrize("split", UNEVEN)
@pytest.mark.parametrize("seed", range(4))
def test_close_to_the_optimum_of_tiny_problems(split: ReplicaSplit, seed: int) -> None:
    """Within 10 % of the best of all placements of 4 experts on 6 slots, and never below it."""
    rng = np.random.default_rng(seed)
    profile = random_profile(rng, tokens=60, layers=1, experts=4, homes=2)
    problem = make_problem(profile, cluster([0, 0]), calibration=LINEAR, replica_split=split, spare_slots=2)
    found = optimize(problem, solver="split", work_s=0.5).objective
    least = least_objective(problem)
    assert least * (1 - 1e-12) <= found <= 1.1 * least


def test_the_aligned_placement_is_found() -> None:
    """Two experts of every token, replicated on the same devices in the same order: one device a token."""
    profile = RoutingProfile(
        load_WLE=np.array([[[64.0, 64.0, 0.0]]]),
        window_tokens_W=[64],
        top_k=2,
        experts_TLK=np.tile(np.array([0, 1], dtype=np.uint8), (64, 1, 1)),
        window_of_token_T=np.zeros(64, dtype=np.int64),
    )
    problem = make_problem(
        profile,
        cluster([0, 0, 0]),
        objective="traffic",
        max_imbalance=1.5,
        replica_split="hash",
        spare_slots=3,
    )
    crossed = placement_of(problem, [[0, 2, 0, 1, 1, -1]])
    assert CostModel(problem).objective(crossed) == 2.0
    # The load limit asks for two replicas of both.
    assert optimize(problem, solver="split", start=crossed, work_s=0.5).objective == 1.0


def test_a_copy_off_the_fullest_device_relieves_it() -> None:
    """Device 0 holds the hot expert alone at 90 of 100 pairs: only its copy elsewhere has a price."""
    profile = RoutingProfile(load_WLE=np.array([[[90.0, 6.0, 4.0]]]), window_tokens_W=[50], top_k=2)
    problem = make_problem(
        profile,
        cluster([0, 0]),
        calibration=LINEAR,
        objective="balance",
        replica_split="lp",
        spare_slots=1,
    )
    price = SplitPrice(problem, lambda cost_W: float(cost_W.mean()))
    priced = price.price(np.array([0, EMPTY, 1, 2]))
    np.testing.assert_allclose(relief(price.load_WE, priced), [[0, 90], [0, 0], [0, 0]])
    # With the copy the load is split 50 : 50.
    assert optimize(problem, solver="split", work_s=0.1).objective == pytest.approx(1.0)


def test_counts_alone_are_refined_under_lp() -> None:
    """No tokens are needed where loads decide."""
    problem = problem_of(6, ReplicaSplit.LP, objective="balance")
    counted = problem.with_profile(counts_only(problem.profile))
    start = random_placement(np.random.default_rng(0), counted)
    assert optimize(counted, solver="split", start=start, work_s=0.2).objective < CostModel(
        counted
    ).objective(start)


def test_the_even_split_is_left_to_search() -> None:
    """Refused, with the solver to use instead."""
    with pytest.raises(InputError, match="for the even split use search"):
        optimize(problem_of(0, ReplicaSplit.EVEN), solver="split")


@pytest.mark.parametrize("questions", [0, 3, 40])
def test_stopping_keeps_the_incumbent(questions: int) -> None:
    """A stop at any question leaves a feasible placement that is no worse than the start."""
    problem = problem_of(7, ReplicaSplit.HASH)
    start = random_placement(np.random.default_rng(1), problem)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > questions

    solution = optimize(problem, solver="split", start=start, stop=stop, work_s=30.0)
    assert solution.termination is Termination.STOPPED
    assert solution.objective <= CostModel(problem).objective(start)


def test_a_start_on_other_slots_is_not_worsened() -> None:
    """Replicas are numbered by slot: a start whose slots are in another order keeps its value."""
    problem = problem_of(8, ReplicaSplit.HASH)
    for seed in range(5):
        start = random_placement(np.random.default_rng(seed), problem, shuffle=True, fill=1.0)
        found = optimize(problem, solver="split", start=start, work_s=0.01)
        assert found.objective <= CostModel(problem).objective(start)


def test_too_full_a_start_is_refused() -> None:
    """A start must fit the slots."""
    start = random_placement(
        np.random.default_rng(0), problem_of(0, ReplicaSplit.HASH, spare_slots=8), fill=1.0
    )
    with pytest.raises(InfeasibleError, match="which has 4 slots"):
        optimize(problem_of(0, ReplicaSplit.HASH), solver="split", start=start)


def test_a_sample_keeps_every_window() -> None:
    """At most so many tokens (and one of every window), the same for a seed; loads stay exact."""
    profile = random_profile(np.random.default_rng(0), tokens=400, windows=20, tail=10)
    sample = sample_tokens(profile, 60, seed=1)
    assert 60 <= sample.num_sampled_tokens <= 81
    assert set(sample.window_of_token_T.tolist()) == set(profile.window_of_token_T.tolist())
    np.testing.assert_array_equal(sample.load_WLE, profile.load_WLE)
    np.testing.assert_array_equal(sample_tokens(profile, 60, seed=1).experts_TLK, sample.experts_TLK)
    assert sample_tokens(profile, 400, seed=1) is profile
