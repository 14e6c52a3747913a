"""Tests of the optimizer: what it refuses, reports on the way, and says when it ends."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from instances import LINEAR, cluster, counts_only, random_placement, random_profile

from placement.cost import CostModel
from placement.errors import InfeasibleError, InputError, NoPlacementFoundError
from placement.optimizer import optimize
from placement.portfolio import portfolio
from placement.problem import PlacementProblem, make_problem
from placement.profile import RoutingProfile
from placement.solution import Incumbent, Termination, relative_gap
from placement.solvers.registry import BASELINES

PROFILE = random_profile(np.random.default_rng(0), tokens=200, experts=8, windows=4)


def problem(**options: object) -> PlacementProblem:
    given: dict[str, object] = {"calibration": LINEAR, **options}
    return make_problem(PROFILE, cluster([0, 0]), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"work_s": 0.0}, "work_s is 0.0"),
        ({"work_s": float("nan")}, "work_s is nan"),
        ({"solver": "eplp"}, "unknown solver 'eplp'; did you mean 'eplb'"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    """Slips of the pen are named before any work is done."""
    with pytest.raises(InputError, match=message):
        optimize(problem(), **options)  # type: ignore[arg-type]


def test_a_start_must_belong_to_the_problem() -> None:
    """Other devices are an input error, too many experts on a device an infeasible one."""
    rng = np.random.default_rng(0)
    other = make_problem(PROFILE, cluster([0] * 4), calibration=LINEAR)
    with pytest.raises(InputError, match="the placement has 4 devices, the problem 2"):
        optimize(problem(), start=random_placement(rng, other))
    with pytest.raises(InfeasibleError, match="which has 4 slots"):
        optimize(problem(), start=random_placement(rng, problem(spare_slots=4), fill=1.0))


def test_incumbents_are_told_as_they_come() -> None:
    """Each is better than the one before, on the clock given, and the last one is the answer."""
    ticks = iter(range(1000))
    seen: list[Incumbent] = []
    solution = optimize(problem(), work_s=0.1, on_incumbent=seen.append, clock=lambda: float(next(ticks)))
    assert tuple(seen) == solution.incumbents
    assert [i.elapsed_s for i in seen] == sorted(i.elapsed_s for i in seen)
    assert all(a.objective > b.objective for a, b in itertools.pairwise(seen))
    assert (seen[-1].objective, seen[-1].solver) == (solution.objective, solution.solver)
    assert solution.gap <= seen[-1].gap
    assert {*BASELINES, "exact"} <= set(solution.candidates) <= set(portfolio(problem()))


def test_the_objective_entry_of_a_file() -> None:
    """Name, value, unit, bound and gap; the gap is the share that might be won."""
    solution = optimize(problem(), solver="greedy")
    entry = solution.objective_dict("step-time")
    assert entry == {
        "name": "step-time",
        "value": solution.objective,
        "unit": "cost",
        "lower_bound": solution.lower_bound,
        "gap": (solution.objective - solution.lower_bound) / solution.objective,
    }


def test_relative_gap() -> None:
    """Nothing is left to win at the bound, below it by rounding, and at 0."""
    assert relative_gap(4.0, 3.0) == 0.25
    assert relative_gap(3.0, 3.0) == relative_gap(3.0, 3.1) == relative_gap(0.0, 0.0) == 0.0


def test_meeting_the_bound_is_optimal() -> None:
    """Equal experts in equal shares cannot be improved, and nobody tries."""
    level = RoutingProfile(load_WLE=np.ones((2, 1, 8)), window_tokens_W=[4, 4], top_k=2)
    solution = optimize(make_problem(level, cluster([0, 0]), objective="balance"))
    assert (solution.termination, solution.gap, solution.objective) == (Termination.OPTIMAL, 0.0, 1.0)


def test_a_stop_before_the_first_answer() -> None:
    """Where no baseline keeps the limit, there is nothing to show."""
    tight = problem(objective="traffic", max_imbalance=1.0000001)
    with pytest.raises(NoPlacementFoundError, match="before any placement was found"):
        optimize(tight, stop=lambda: True)


def test_solvers_without_an_answer_are_listed() -> None:
    """Uneven slots are not EPLB's; the portfolio says so and goes on; alone it is infeasible."""
    uneven = make_problem(PROFILE, cluster([0, 0], slots_D=[5, 3]), calibration=LINEAR)
    solution = optimize(uneven, work_s=0.05)
    assert solution.skipped == {"eplb": "eplb needs equal slots on every device; they are [3, 5]"}
    with pytest.raises(InfeasibleError, match="eplb needs equal slots"):
        optimize(uneven, solver="eplb")


def test_a_baseline_beyond_the_load_limit_is_no_answer() -> None:
    """Contiguous placement is as uneven as it is; the reason names both figures."""
    tight = problem(objective="traffic", max_imbalance=1.0000001)
    with pytest.raises(InfeasibleError, match=r"contiguous: a layer's balance is 1\.\d+, above 1.0000001"):
        optimize(tight, solver="contiguous")


def test_counts_alone_can_be_balanced() -> None:
    """Without tokens there is still a portfolio."""
    counted = make_problem(counts_only(PROFILE), cluster([0, 0]), objective="balance")
    solution = optimize(counted, work_s=0.1)
    assert solution.objective == CostModel(counted).objective(solution.placement)
    assert solution.objective <= min(solution.candidates[name] for name in BASELINES)
