"""Reconfigure or keep, and predicting a layer's loads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from placement.planning.fabric.prediction import fit_transition, score_predictions, simplex_columns
from placement.planning.fabric.schedule import (
    best_schedule,
    layer_of_step,
    schedule_time,
    training_exposure,
)


def test_four_all_to_alls_per_layer() -> None:
    """Twice each going forward, twice each going back."""
    assert layer_of_step(2).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert layer_of_step(2, training=False).tolist() == [0, 0, 1, 1]


def test_only_the_first_all_to_all_blocks() -> None:
    """25 ms to change and 10 ms to hide it: 25 ms where the gate decides, 15 ms once it has, never before."""
    exposed = training_exposure(
        layer_of_step(2), np.array([-1, 0, 1]), np.array([True, False, False]), delay_s=0.025, window_s=0.010
    )
    assert exposed[0] == pytest.approx([0.015, 0.025, np.inf])
    assert exposed[1] == pytest.approx([0.015, 0.015, np.inf])
    assert exposed[2] == pytest.approx([0.015, 0.015, 0.025])
    assert exposed[3:].ravel() == pytest.approx([0.015] * 15)


def test_a_change_that_pays_is_made() -> None:
    """Two all-to-alls that gain 3 each pay for a delay of 5; one would not."""
    time = np.array([[4.0, 9.0], [4.0, 1.0], [4.0, 1.0]])
    delay = np.full((3, 2), 5.0)
    best = best_schedule(time, delay, start=0)
    # Keep 4, then change (5) and 1 + 1: 11, against 12 without.
    assert (best.up_A.tolist(), best.time_s, best.num_changes) == ([0, 1, 1], 11.0, 1)
    assert best_schedule(time[:2], delay[:2], start=0).up_A.tolist() == [0, 0]


@given(seed=st.integers(0, 10**6), steps=st.integers(1, 5), circuits=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_schedule_is_the_best_of_all(seed: int, steps: int, circuits: int) -> None:
    """No sequence is faster, so neither keeping always nor changing always is."""
    random = np.random.default_rng(seed)
    time, exposed = random.random((2, steps, circuits))
    best = best_schedule(time, exposed, start=0)
    every = [
        schedule_time(np.array(up), time, exposed, start=0).time_s
        for up in itertools.product(range(circuits), repeat=steps)
    ]
    assert best.time_s == pytest.approx(min(every))


def test_schedule_checks_its_shapes() -> None:
    """Times and delays must be of the same all-to-alls."""
    with pytest.raises(InputError, match="exposed delays"):
        best_schedule(np.ones((2, 2)), np.ones((3, 2)), start=0)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_projection_is_the_nearest_distribution(seed: int) -> None:
    """Columns become distributions, and no step towards a corner comes nearer."""
    values = np.random.default_rng(seed).normal(size=(4, 3))
    nearest = simplex_columns(values)
    assert nearest.min() >= 0
    assert nearest.sum(axis=0) == pytest.approx(np.ones(3))
    # The nearest point of a convex set: (corner - nearest) . (values - nearest) <= 0.
    away = values - nearest
    assert ((np.eye(4) @ away) - (nearest * away).sum(axis=0)).max() <= 1e-9


def test_transition_is_found_where_there_is_one() -> None:
    """Loads that follow from a matrix are predicted by it, on windows that it has not seen."""
    random = np.random.default_rng(0)
    truth = simplex_columns(random.random((4, 4)) * 3)
    now = random.dirichlet(np.ones(4), 30)
    fitted = fit_transition(now, now @ truth.T)
    assert fitted == pytest.approx(truth, abs=0.02)
    # Doubling a window counts it twice, as a weight of 2 does.
    weighted = fit_transition(now[:5], now[:5] @ truth.T, weight_W=np.array([2.0, 1, 1, 1, 1]))
    doubled = fit_transition(now[[0, 0, 1, 2, 3, 4]], now[[0, 0, 1, 2, 3, 4]] @ truth.T)
    assert weighted == pytest.approx(doubled, abs=1e-6)


def test_scores_name_the_best_way_to_predict() -> None:
    """Loads that jump but follow from the layer before are predicted by the transition."""
    random = np.random.default_rng(1)
    first = random.dirichlet(np.ones(4), 24)
    turned = np.stack([first, first[:, ::-1]], axis=1)
    score = score_predictions(turned)
    assert score.best == "transition"
    assert score.error["transition"] < 0.1 < score.error["mean"]
    steady = score_predictions(np.ones((4, 2, 4)))
    assert steady.error == pytest.approx({"transition": 0.0, "last window": 0.0, "mean": 0.0})
    with pytest.raises(InputError, match="needs 2 of each"):
        score_predictions(np.ones((1, 2, 4)))
    with pytest.raises(InputError, match="without load"):
        fit_transition(np.zeros((2, 3)), np.ones((2, 3)))
