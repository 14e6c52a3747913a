"""Tests of timelines: phases are barriers, and who is slow is waited for."""

from __future__ import annotations

import numpy as np
import pytest
from instances import LINEAR, cluster, counts_only, model_for, random_placement, random_profile

from placement.cost import CostModel
from placement.cost.timeline import PHASES, Timeline, timeline, typical_window
from placement.errors import InputError
from placement.problem import PlacementProblem, make_problem


def problem_of(**options: object) -> PlacementProblem:
    profile = random_profile(
        np.random.default_rng(4), tokens=200, layers=3, experts=8, windows=4, scale=500.0
    )
    given: dict[str, object] = {"model": model_for(profile), "spare_slots": 4, **options}
    return make_problem(profile, cluster([0, 0, 1, 1]), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("semantics", ["dispatch", "dispatch-nodedup", "stay-put", "allgather"])
@pytest.mark.parametrize("split", ["even", "hash"])
def test_phases_end_with_their_slowest_device(semantics: str, split: str) -> None:
    """The maxima over devices are the phases that the cost model adds up, whatever travels."""
    problem = problem_of(semantics=semantics, replica_split=split)
    placement = random_placement(np.random.default_rng(1), problem)
    breakdown = CostModel(problem).evaluate(placement)
    dispatch_WLD, experts_WLD, combine_WLD = CostModel(problem).device_times(placement)
    assert dispatch_WLD.shape == (4, 3, 4)
    np.testing.assert_allclose(dispatch_WLD.max(axis=2), breakdown.dispatch_WL)
    np.testing.assert_allclose(experts_WLD.max(axis=2), breakdown.experts_WL)
    np.testing.assert_allclose(combine_WLD.max(axis=2), breakdown.combine_WL)
    drawn = timeline(problem, placement, window=2)
    assert drawn.step == pytest.approx(breakdown.step_W[2])
    assert drawn.unit == "s"


def test_who_waits_for_whom() -> None:
    """Two devices, one layer: 1 waits 2 for 0 in dispatch, 0 waits 3 for 1 in experts; combine is even."""
    drawn = Timeline(busy_LPD=np.array([[[3.0, 1.0], [1.0, 4.0], [2.0, 2.0]]]), window=0, unit="cost")
    assert len(PHASES) == 3
    assert drawn.length_LP.tolist() == [[3.0, 4.0, 2.0]]
    assert drawn.begin_LP.tolist() == [[0.0, 3.0, 7.0]]
    assert drawn.step == 9.0
    assert drawn.slowest_LP.tolist() == [[0, 1, 0]]
    assert drawn.waiting_DD.tolist() == [[0.0, 3.0], [2.0, 0.0]]
    assert drawn.idle_share == pytest.approx(5 / 18)


def test_waiting_adds_up() -> None:
    """What is waited for somebody is all that is idle."""
    problem = problem_of()
    drawn = timeline(problem, random_placement(np.random.default_rng(2), problem), window=0)
    assert drawn.waiting_DD.sum() == pytest.approx(drawn.idle_LPD.sum())
    np.testing.assert_allclose(drawn.waiting_DD.sum(axis=1), drawn.idle_LPD.sum(axis=(0, 1)))


def test_timelines_need_costs_and_a_window() -> None:
    """No such window, no sizes, and counts that do not tell what travels are input errors."""
    problem = problem_of()
    placement = random_placement(np.random.default_rng(2), problem)
    with pytest.raises(InputError, match="window 4 of 4"):
        timeline(problem, placement, window=4)
    balance = make_problem(problem.profile, problem.topology, objective="balance", spare_slots=4)
    with pytest.raises(InputError, match="need costs"):
        timeline(balance, placement, window=0)
    counts = make_problem(
        counts_only(problem.profile),
        problem.topology,
        objective="balance",
        calibration=LINEAR,
        spare_slots=4,
    )
    with pytest.raises(InputError, match="counts only"):
        timeline(counts, placement, window=0)


def test_the_typical_window_is_the_median_one() -> None:
    """Of five windows the third by cost, of four the second."""
    assert typical_window(np.array([5.0, 1.0, 3.0, 9.0, 2.0])) == 2
    assert typical_window(np.array([4.0, 1.0, 3.0, 2.0])) == 3
