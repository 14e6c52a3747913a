"""Tests of drift: what staying costs, stretch by stretch."""

from __future__ import annotations

import numpy as np
import pytest
from instances import LINEAR, cluster, placement_of

from placement.change.advise import advise, frontier_gains, window_costs
from placement.change.drift import drift
from placement.errors import InputError
from placement.optimizer import optimize
from placement.problem import PlacementProblem, make_problem
from placement.profile import RoutingProfile


def shifting(*, windows: int = 16, **options: object) -> PlacementProblem:
    """Return four experts on two devices; 0 and 1 are hot in the first half, 0 and 2 in the second one."""
    rng = np.random.default_rng(3)
    load_WLE = np.full((windows, 1, 4), 10.0) + rng.integers(0, 3, (windows, 1, 4))
    load_WLE[:, :, 0] += 40
    load_WLE[: windows // 2, :, 1] += 40
    load_WLE[windows // 2 :, :, 2] += 40
    profile = RoutingProfile(load_WLE=load_WLE, window_tokens_W=load_WLE.sum(axis=(1, 2)), top_k=1)
    given: dict[str, object] = {"calibration": LINEAR, "objective": "balance", **options}
    return make_problem(profile, cluster([0] * 2), **given)  # type: ignore[arg-type]


def test_staying_costs_where_traffic_has_shifted() -> None:
    """The running placement is as good as a fresh one until the two hot experts share a device."""
    problem = shifting()
    # About 60 on either device in the first half, 100 and 20 in the second one: 100 / 60 against 1.
    running = placement_of(problem, [[0, 2, 1, 3]])
    found = drift(problem, running, stretch_windows=4, work_s=0.1)
    assert [(each.first_window, each.num_windows) for each in found.stretches] == [
        (0, 4),
        (4, 4),
        (8, 4),
        (12, 4),
    ]
    np.testing.assert_array_equal(found.running_W, window_costs(problem, running).mean(axis=1))
    assert found.unit == "max/mean"
    first, *_, last = (each.excess for each in found.stretches)
    assert abs(first.value) < 0.05
    assert last.value == pytest.approx(1 - 60 / 100, abs=0.05)
    assert 0 < last.low <= last.value <= last.high


def test_fresh_windows_are_scored_by_what_did_not_see_them() -> None:
    """Two windows a stretch: each is scored by the placement fitted to the other one alone."""
    problem = shifting(windows=4)
    running = optimize(problem, work_s=0.1).placement
    found = drift(problem, running, stretch_windows=2, work_s=0.1)
    for window, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        fit, held = (problem.with_profile(problem.profile.select_windows([w])) for w in (other, window))
        fresh = optimize(fit, work_s=0.1).placement
        assert found.fresh_W[window] == pytest.approx(window_costs(held, fresh).mean())


def test_left_over_windows_join_the_last_stretch() -> None:
    """Sixteen windows in stretches of six: six and ten."""
    problem = shifting()
    running = optimize(problem, work_s=0.1).placement
    found = drift(problem, running, stretch_windows=6, work_s=0.1)
    assert [each.num_windows for each in found.stretches] == [6, 10]


def test_bad_drift() -> None:
    """Stretches that cannot be split and impossible confidence are input errors."""
    problem = shifting()
    running = optimize(problem, work_s=0.1).placement
    with pytest.raises(InputError, match="2 or more"):
        drift(problem, running, stretch_windows=1)
    with pytest.raises(InputError, match="2 or more"):
        drift(problem.with_profile(problem.profile.select_windows([0])), running)
    with pytest.raises(InputError, match="confidence is 1"):
        drift(problem, running, confidence=1)


def test_gains_of_the_frontier_are_those_of_the_advice() -> None:
    """One interval for each point: nothing at the start, the advice's own at the recommended one."""
    problem = shifting()
    running = optimize(problem.with_profile(problem.profile.select_windows(range(8))), work_s=0.1).placement
    recent = problem.with_profile(problem.profile.select_windows(range(8, 16)))
    advice = advise(recent, running, work_s=0.2)
    gains = frontier_gains(recent, advice.frontier)
    assert len(gains) == len(advice.frontier.points)
    assert (gains[0].low, gains[0].value, gains[0].high) == (0, 0, 0)
    chosen = next(g for p, g in zip(advice.frontier.points, gains, strict=True) if p is advice.point)
    assert chosen == advice.relative_gain
