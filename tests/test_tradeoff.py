"""Tests of balance against traffic."""

from __future__ import annotations

import numpy as np
import pytest
from instances import LINEAR, cluster, counts_only, random_profile

from placement.cost import CostModel
from placement.errors import InputError
from placement.problem import PlacementProblem, Semantics, make_problem
from placement.tradeoff import Way, efficient, tradeoff, traffic_of


def problem_of(**options: object) -> PlacementProblem:
    profile = random_profile(np.random.default_rng(5), tokens=800, layers=2, experts=8, windows=8)
    return make_problem(profile, cluster([0] * 4), calibration=LINEAR, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("semantics", [Semantics.DISPATCH, Semantics.STAY_PUT])
def test_points_answer_what_was_asked(semantics: Semantics) -> None:
    """Limits are kept on the fitted windows; a looser limit needs no more traffic, a price less balance."""
    problem = problem_of(semantics=semantics)
    fit, held = problem.profile.split_alternate()
    found = tradeoff(problem, limits=(1.8, 1.4), prices=(0.0, 8.0), work_s=0.2)
    assert not found.skipped
    assert [(point.way, point.value) for point in found.points] == [
        (Way.LIMIT, 1.4),
        (Way.LIMIT, 1.8),
        (Way.PRICE, 0.0),
        (Way.PRICE, 8.0),
    ]
    for point in found.points:
        assert point.fitted.objective == CostModel(problem.with_profile(fit)).objective(point.placement)
        assert point.held_out.objective == CostModel(problem.with_profile(held)).objective(point.placement)
    tight, loose, free, dear = (point.fitted for point in found.points)
    assert tight.metrics.mean_traffic_balance <= 1.4
    assert traffic_of(loose, semantics) <= traffic_of(tight, semantics)
    assert free.metrics.balance <= dear.metrics.balance
    assert traffic_of(dear, semantics) <= traffic_of(free, semantics)


def test_a_limit_that_nothing_keeps_is_told() -> None:
    """One expert carries nearly all of the load: no placement is that even."""
    profile = random_profile(np.random.default_rng(5), tokens=60, layers=1, experts=4, windows=2, top_k=1)
    load_WLE = np.zeros((2, 1, 4))
    load_WLE[:, :, 0], load_WLE[:, :, 1:] = 97.0, 1.0
    lopsided = type(profile)(
        load_WLE=load_WLE,
        window_tokens_W=np.full(2, 100.0),
        top_k=1,
        experts_TLK=profile.experts_TLK,
        window_of_token_T=profile.window_of_token_T,
    )
    problem = make_problem(lopsided, cluster([0] * 2), calibration=LINEAR)
    found = tradeoff(problem, limits=(1.01,), prices=(), work_s=0.1)
    assert found.points == ()
    assert list(found.skipped) == ["load limit 1.01"]


def test_efficient_rows_are_beaten_by_none() -> None:
    """Equal rows do not beat each other; a row that is worse in one measure alone is not beaten."""
    assert efficient([[1, 3], [2, 2], [2, 3], [3, 1], [2, 2]]).tolist() == [True, True, False, True, True]


def test_bad_tradeoffs() -> None:
    """Nothing to solve, and counts, which tell no traffic, are input errors."""
    problem = problem_of()
    with pytest.raises(InputError, match="name at least one"):
        tradeoff(problem, limits=(), prices=())
    counts = make_problem(
        counts_only(problem.profile), cluster([0] * 4), calibration=LINEAR, semantics="dispatch-nodedup"
    )
    with pytest.raises(InputError, match="no placement changes the traffic"):
        tradeoff(counts, limits=(1.1,))
    balance = make_problem(counts_only(problem.profile), cluster([0] * 4), objective="balance")
    breakdown = CostModel(balance).evaluate(
        tradeoff(problem, limits=(), prices=(1,), work_s=0.1).points[0].placement
    )
    with pytest.raises(InputError, match="counts only"):
        traffic_of(breakdown, Semantics.DISPATCH)
