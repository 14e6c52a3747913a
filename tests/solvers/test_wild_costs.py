"""Costs of any magnitude: what is best does not depend on the unit, from bound to search."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from instances import cluster, random_profile

from placement.calibration import LinearCalibration
from placement.optimizer import optimize
from placement.problem import PlacementProblem, ReplicaSplit, make_problem


def problem_of(pair_cost: float, token_cost: float) -> PlacementProblem:
    """Return a problem of 12 experts with two spare slots."""
    return make_problem(
        random_profile(np.random.default_rng(1), tokens=300, experts=12, top_k=3, windows=5),
        cluster([0, 0]),
        calibration=LinearCalibration(pair_cost=pair_cost, token_cost=token_cost),
        spare_slots=2,
    )


@pytest.mark.parametrize("scale", [2.0**-40, 1e-12, 1e12])
@pytest.mark.parametrize("solver", ["search", "split"])
def test_scaled_costs_are_solved_alike(solver: str, scale: float) -> None:
    """A millionth of a millionth of the cost gives as good a placement, bound and gap."""
    plain, wild = problem_of(1.0, 4.0), problem_of(scale, 4.0 * scale)
    if solver == "split":
        plain, wild = (replace(problem, replica_split=ReplicaSplit.LP) for problem in (plain, wild))
    one, other = (optimize(problem, solver=solver, work_s=0.2) for problem in (plain, wild))
    # Powers of two scale without rounding; others may part two equal moves.
    assert other.objective == pytest.approx(scale * one.objective, rel=1e-12 if scale < 1e-11 else 0.02)
    assert other.lower_bound == pytest.approx(scale * one.lower_bound, rel=1e-6)


@pytest.mark.parametrize(("pair_cost", "token_cost"), [(1e-12, 1e12), (1e12, 1e-12)])
def test_one_cost_may_dwarf_the_other(pair_cost: float, token_cost: float) -> None:
    """With a ratio of 10^24 the large cost alone decides: as good as where the small one is nothing."""
    both = optimize(problem_of(pair_cost, token_cost), solver="search", work_s=0.2)
    alone = optimize(
        problem_of(*(cost if cost > 1 else 0.0 for cost in (pair_cost, token_cost))),
        solver="search",
        work_s=0.2,
    )
    assert both.objective == pytest.approx(alone.objective, rel=0.02)
    assert np.isfinite(both.objective)
    assert both.lower_bound <= both.objective
