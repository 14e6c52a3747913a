"""Tests of learning curves: what fitting to more windows brings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from placement import make_problem, parse_topology
from placement.errors import InputError
from placement.learning import LearningCurve, learning_curve
from placement.problem import PlacementProblem
from placement.profile import RoutingProfile


def problem(load_WLE: np.ndarray) -> PlacementProblem:
    """Return balance on two devices."""
    profile = RoutingProfile(load_WLE=load_WLE, window_tokens_W=load_WLE.sum(axis=(1, 2)), top_k=1)
    return make_problem(profile, parse_topology("h100:1x2"), objective="balance")


def test_steady_traffic_needs_one_window() -> None:
    """Loads 3, 3, 1, 1 in every window: apart, the busy two are even; in order, a device has 6 of mean 4."""
    curve = learning_curve(problem(np.tile([[[3.0, 3.0, 1.0, 1.0]]], (8, 1, 1))))
    assert curve.windows_N.tolist() == [1, 2, 4]
    assert (curve.best, curve.unfitted) == pytest.approx((1.0, 1.5))
    assert (curve.enough_spread, curve.enough_consecutive) == (1, 1)
    assert curve.unit == "max/mean"


def test_bursts_need_windows_of_both_times() -> None:
    """Experts 0 and 1 are busy first, 0 and 2 later: no window knows both."""
    early, late = [5.0, 5.0, 1.0, 1.0], [5.0, 1.0, 5.0, 1.0]
    curve = learning_curve(problem(np.array([[early]] * 16 + [[late]] * 16)), num_draws=6)
    assert curve.best == pytest.approx(1.0)
    assert curve.consecutive_RN[:, 0].mean() > 1.1
    assert curve.enough_spread <= curve.enough_consecutive


def test_same_seed_same_curve() -> None:
    """Draws follow from the seed."""
    load_WLE = np.random.default_rng(1).integers(1, 30, size=(10, 2, 6)).astype(float)
    one, two = (learning_curve(problem(load_WLE), seed=3) for _ in range(2))
    np.testing.assert_array_equal(one.spread_RN, two.spread_RN)
    assert (one.fitted_RN[:, 0] <= one.spread_RN[:, 0] + 1e-12).all()


def test_enough_is_where_the_mean_stays_near() -> None:
    """A lucky early number does not count if later ones are worse again."""
    objective_RN = np.array([[1.0, 1.2, 1.01, 1.0]])
    curve = LearningCurve(
        windows_N=np.array([1, 2, 4, 8]),
        spread_RN=objective_RN,
        consecutive_RN=np.array([[1.3, 1.2, 1.1, 1.0]]),
        fitted_RN=objective_RN,
        unfitted=1.5,
        unit="max/mean",
    )
    assert (curve.enough_spread, curve.enough_consecutive) == (4, 8)
    assert replace(curve, tolerance=0.5).enough_consecutive == 1
    assert [row["windows fitted"] for row in curve.table()] == [1, 2, 4, 8]


def test_too_few_windows_or_draws() -> None:
    """Both are said in a line."""
    with pytest.raises(InputError, match="3 windows are too few"):
        learning_curve(problem(np.ones((3, 1, 4))))
    with pytest.raises(InputError, match="num_draws is 0"):
        learning_curve(problem(np.ones((8, 1, 4))), num_draws=0)
