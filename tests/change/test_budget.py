"""Tests of placements within a budget of moves: the budget, the start, the optimum of tiny problems."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import (
    LINEAR,
    cluster,
    every_row,
    model_for,
    placement_of,
    random_placement,
    random_profile,
)

from placement.change import kernels
from placement.change.budget import improve_within
from placement.change.curves import PATIENCE
from placement.change.divide import divide_budget
from placement.cost import CostModel
from placement.errors import InfeasibleError, InputError
from placement.optimizer import optimize
from placement.plan import Placement, diff
from placement.problem import Objective, PlacementProblem, Risk, Semantics, make_problem
from placement.stopping import Cancellation

QUICK = 0.05

PAIRS = [
    (semantics, objective)
    for semantics, objective in itertools.product(Semantics, Objective)
    if objective is not Objective.TRAFFIC or semantics in (Semantics.DISPATCH, Semantics.STAY_PUT)
]


def problem_of(seed: int, *, experts: int = 8, spare_slots: int = 0, **options: object) -> PlacementProblem:
    """Return a problem of two layers on two nodes of two devices."""
    rng = np.random.default_rng(seed)
    profile = random_profile(rng, tokens=120, layers=2, experts=experts, top_k=2, windows=4)
    given: dict[str, object] = {"calibration": LINEAR, "max_imbalance": 3.0, **options}
    return make_problem(
        profile,
        cluster([0, 0, 1, 1]),
        model=model_for(profile),
        spare_slots=spare_slots,
        **given,  # type: ignore[arg-type]
    )


def start_of(problem: PlacementProblem, seed: int, *, fill: float = 0.7) -> Placement:
    """Return some placement of a problem."""
    return random_placement(np.random.default_rng(seed + 1000), problem, fill=fill)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    max_moves=st.integers(0, 12),
    pair=st.sampled_from(PAIRS),
    spare_slots=st.sampled_from([0, 4]),
)
def test_the_budget_is_kept_and_the_start_never_worsened(
    seed: int, max_moves: int, pair: tuple[Semantics, Objective], spare_slots: int
) -> None:
    """Whatever is asked, no more copies move than allowed, slots suffice, and nothing gets worse."""
    semantics, objective = pair
    problem = problem_of(seed, spare_slots=spare_slots, semantics=semantics, objective=objective)
    start = start_of(problem, seed)
    found = improve_within(problem, start, max_moves=max_moves, seed=seed, work_s=QUICK)
    assert len(diff(start, found)) <= max_moves
    problem.check_capacity(found)
    model = CostModel(problem)
    assert model.objective(found) <= model.objective(start)


@pytest.mark.parametrize("spare_slots", [0, 4])
def test_no_moves_keep_the_start(spare_slots: int) -> None:
    """A budget of nothing returns the start itself."""
    problem = problem_of(0, spare_slots=spare_slots)
    start = start_of(problem, 0)
    assert improve_within(problem, start, max_moves=0) is start
    solution = optimize(problem, start=start, max_moves=0)
    assert (solution.placement, solution.solver) == (start, "start")


def least_within(problem: PlacementProblem, start: Placement, max_moves: int) -> float:
    """Return the least objective within a budget, by trying all placements of independent layers."""
    rows = list(every_row(problem.num_experts, problem.slots_D.tolist()))
    model = CostModel(problem)
    best_LM = np.full((problem.num_layers, max_moves + 1), np.inf)
    for layer, row in itertools.product(range(problem.num_layers), rows):
        candidate = np.array(start.physical_to_logical_map_LS)
        candidate[layer] = row
        placement = placement_of(problem, candidate)
        moves = len(diff(start, placement))
        if moves <= max_moves:
            best_LM[layer, moves] = min(best_LM[layer, moves], model.objective(placement))
    best_LM = np.minimum.accumulate(best_LM, axis=1)
    # Layers add up: each one's change against the start is its own.
    change_LM = best_LM - model.objective(start)
    return model.objective(start) + min(
        change_LM[0, moves] + change_LM[1, max_moves - moves] for moves in range(max_moves + 1)
    )


@pytest.mark.parametrize("spare_slots", [0, 2])
@pytest.mark.parametrize("max_moves", [1, 2, 4])
@pytest.mark.parametrize("objective", [Objective.BALANCE, Objective.STEP_TIME])
def test_close_to_the_optimum_of_tiny_problems(
    objective: Objective, max_moves: int, spare_slots: int
) -> None:
    """Within 3 % of the best of all placements that few moves reach, though scenarios are fitted."""
    rng = np.random.default_rng(max_moves)
    profile = random_profile(rng, tokens=200, layers=2, experts=4, top_k=2, windows=4)
    problem = make_problem(
        profile, cluster([0, 0]), calibration=LINEAR, objective=objective, spare_slots=spare_slots
    )
    start = random_placement(rng, problem, fill=1.0)
    found = improve_within(problem, start, max_moves=max_moves, work_s=0.2)
    least = least_within(problem, start, max_moves)
    assert least * (1 - 1e-9) <= CostModel(problem).objective(found) <= 1.03 * least


def test_moves_go_to_the_layer_that_needs_them() -> None:
    """Layer 0 is even already; two moves suffice to even layer 1 by exchanging experts 0 and 2."""
    profile = random_profile(np.random.default_rng(0), tokens=40, layers=2, experts=4, windows=2)
    load = np.ones((2, 2, 4))
    load[:, 1] = [3.0, 3.0, 1.0, 1.0]
    level = type(profile)(load_WLE=load, window_tokens_W=np.full(2, 2.0), top_k=2)
    problem = make_problem(level, cluster([0, 0]), calibration=LINEAR, objective="balance")
    start = placement_of(problem, [[0, 1, 2, 3], [0, 1, 2, 3]])
    found = improve_within(problem, start, max_moves=2, work_s=QUICK)
    assert CostModel(problem).objective(found) == 1.0
    assert [move.layer for move in diff(start, found)] == [1, 1]


def counts_problem(load_E: list[float]) -> PlacementProblem:
    """Return the balance of one layer's loads on two devices of three slots."""
    load = np.array([[load_E]])
    profile = type(random_profile(np.random.default_rng(0)))(
        load_WLE=load, window_tokens_W=load.sum(axis=2)[:, 0] / 2, top_k=2
    )
    return make_problem(profile, cluster([0, 0]), calibration=LINEAR, objective="balance", spare_slots=2)


def test_one_move_fills_an_empty_slot() -> None:
    """Loads 8 + 4 against 2 + 2: expert 1 in the empty slot, or a replica of expert 0, makes it 8 and 8."""
    problem = counts_problem([8.0, 4.0, 2.0, 2.0])
    start = placement_of(problem, [[0, 1, -1, 2, 3, -1]])
    found = improve_within(problem, start, max_moves=1, work_s=QUICK)
    assert CostModel(problem).objective(found) == 1.0
    assert len(diff(start, found)) == 1


def test_a_dropped_replica_is_no_move() -> None:
    """Loads 4 / 2 + 4 + 4 and 4 / 2 + 12: without expert 0's second replica it is 12 and 12."""
    problem = counts_problem([4.0, 4.0, 4.0, 12.0])
    start = placement_of(problem, [[0, 1, 2, 0, 3, -1]])
    found = improve_within(problem, start, max_moves=1, work_s=QUICK)
    assert CostModel(problem).objective(found) == 1.0
    assert diff(start, found) == ()


@pytest.mark.parametrize("semantics", [Semantics.DISPATCH, Semantics.STAY_PUT])
def test_many_moves_are_as_good_as_any_number(semantics: Semantics) -> None:
    """A budget that cannot bind gives the unbudgeted solve; a large one is not worse than its placement."""
    problem = problem_of(3, experts=16, semantics=semantics)
    start = start_of(problem, 3)
    free = optimize(problem, start=start, work_s=0.2)
    assert optimize(problem, start=start, max_moves=10_000, work_s=0.2).objective == free.objective
    found = improve_within(problem, start, max_moves=31, work_s=QUICK, prefer=free.placement)
    assert CostModel(problem).objective(found) <= free.objective


def test_a_budgeted_solve_is_a_solve() -> None:
    """The optimizer's result says who found it, keeps the budget, and repeats exactly for a seed."""
    problem = problem_of(4, experts=16, spare_slots=4)
    start = start_of(problem, 4)
    first, second = (optimize(problem, start=start, max_moves=6, work_s=0.2, seed=3) for _ in range(2))
    assert (first.solver, len(first.candidates)) == ("change", 2)
    assert len(diff(start, first.placement)) <= 6
    assert first.lower_bound <= first.objective < first.candidates["start"]
    np.testing.assert_array_equal(
        first.placement.physical_to_logical_map_LS, second.placement.physical_to_logical_map_LS
    )
    threaded = optimize(problem, start=start, max_moves=6, work_s=0.2, seed=3, threads=2)
    assert threaded.objective == first.objective


@pytest.mark.parametrize("risk", [Risk.P95, Risk.CVAR95])
def test_tail_risks_are_improved(risk: Risk) -> None:
    """Few moves lower the tail from a poor start."""
    problem = problem_of(5, experts=16, risk=risk)
    start = start_of(problem, 5)
    found = improve_within(problem, start, max_moves=8, work_s=0.1)
    assert CostModel(problem).objective(found) < CostModel(problem).objective(start)


def test_a_start_over_the_load_limit_is_mended_or_refused() -> None:
    """Where the limit cannot be kept within the budget the error names both loads."""
    problem = problem_of(6, experts=16, objective="traffic", max_imbalance=1.5)
    start = placement_of(problem, [list(range(16))] * 2)
    heavy = CostModel(problem).evaluate(start).metrics.worst_layer_balance
    assert heavy > 1.5
    with pytest.raises(InfeasibleError, match=f"{heavy:.4f} of its layer's mean"):
        improve_within(problem, start, max_moves=0)
    found = improve_within(problem, start, max_moves=16, work_s=0.1)
    assert CostModel(problem).evaluate(found).metrics.worst_layer_balance <= 1.5 * (1 + 1e-9)


def test_stopping_keeps_what_there_is() -> None:
    """A search that is stopped at once still returns a placement within the budget."""
    problem = problem_of(7, experts=16)
    start = start_of(problem, 7)
    stop = Cancellation()
    stop.cancel()
    found = improve_within(problem, start, max_moves=4, stop=stop, work_s=30.0)
    assert len(diff(start, found)) <= 4


def test_bad_budgets() -> None:
    """Negative budgets, and budgets without a start, are input errors."""
    problem = problem_of(8)
    with pytest.raises(InputError, match="max_moves is -1"):
        improve_within(problem, start_of(problem, 8), max_moves=-1)
    with pytest.raises(InputError, match="max_moves is -1"):
        optimize(problem, start=start_of(problem, 8), max_moves=-1)
    with pytest.raises(InputError, match="no start"):
        optimize(problem, max_moves=3)


@given(seed=st.integers(0, 10_000), budget=st.integers(0, 9))
def test_the_knapsack_is_exact(seed: int, budget: int) -> None:
    """It agrees with trying every way to share the budget."""
    rng = np.random.default_rng(seed)
    value_LM = rng.integers(0, 50, (3, 4)).astype(np.float64)
    value_LM[:, 1:][rng.random((3, 3)) < 0.3] = np.inf
    moves_L = divide_budget(value_LM, budget)
    ways = [way for way in itertools.product(range(4), repeat=3) if sum(way) <= budget]
    least = min(sum(value_LM[layer, moves] for layer, moves in enumerate(way)) for way in ways)
    assert moves_L.sum() <= budget
    assert value_LM[np.arange(3), moves_L].sum() == least


def test_the_knapsack_says_when_a_budget_is_too_small() -> None:
    """A layer that needs two moves has no placement within one."""
    with pytest.raises(ValueError, match="within 1 moves"):
        divide_budget(np.array([[np.inf, np.inf, 1.0]]), 1)


def test_a_tiny_problem_is_soon_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing new is found the search ends, whatever effort is left: 2 s allow 20,000 falls."""
    falls = 0

    def counted(*arguments: object) -> None:
        nonlocal falls
        falls += 1
        fall_layer(*arguments)

    fall_layer = kernels.fall_layer
    monkeypatch.setattr(kernels, "fall_layer", counted)
    problem = problem_of(1, experts=4)
    start = random_placement(np.random.default_rng(1), problem)
    improve_within(problem, start, max_moves=1, work_s=2.0)
    # Two layers; in each the patience, once more for every find, of which there are few.
    assert 2 * PATIENCE < falls < 10 * PATIENCE
