"""Tests of scenarios: pieces of windows, their mixtures, and the bit sets of tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import LINEAR, cluster, counts_only, random_placement, random_profile

from placement.cost import CostModel
from placement.cost.incremental import LayerState, layer_row
from placement.cost.layer_kernels import new_state, state_value
from placement.cost.layers import WINDOWS, ScenarioPlan, expert_overlap, make_layer, make_scenarios
from placement.errors import InputError
from placement.problem import Objective, make_problem
from placement.profile import RoutingProfile


@given(
    seed=st.integers(0, 10_000),
    pieces=st.integers(1, 4),
    homes=st.integers(0, 3),
    most=st.sampled_from([None, 7, 30]),
)
def test_pieces_share_out_the_tokens(seed: int, pieces: int, homes: int, most: int | None) -> None:
    """Every used token has its own bit in a word of its piece and home, and pieces keep the real tokens."""
    profile = random_profile(np.random.default_rng(seed), tail=3, homes=homes, scale=5.0)
    made = make_scenarios(profile, ScenarioPlan(pieces_per_window=pieces, max_tokens=most))
    assert profile.window_of_token_T is not None
    assert np.unique(made.bit_T).size == made.token_T.size <= profile.num_sampled_tokens - 3
    assert (profile.window_of_token_T[made.token_T] == made.piece_T // pieces).all()
    word_T = made.bit_T // 64
    segment_T = np.searchsorted(made.segment_start_Q, word_T, side="right") - 1
    np.testing.assert_array_equal(made.segment_piece_Q[segment_T], made.piece_T)
    home_T = np.full(made.token_T.size, -1) if profile.home_T is None else profile.home_T[made.token_T]
    np.testing.assert_array_equal(made.segment_home_Q[segment_T], home_T + 1)
    used_P = np.bincount(made.piece_T, minlength=made.scale_P.size)
    real_P = np.repeat(profile.window_tokens_W, pieces)
    np.testing.assert_allclose(made.scale_P * used_P, np.where(used_P > 0, real_P, 0.0))


def test_scenarios_mix_neighbouring_pieces() -> None:
    """Three windows in two pieces each make five overlapping pairs; a limit spreads them evenly."""
    profile = random_profile(np.random.default_rng(0))
    plan = ScenarioPlan(pieces_per_window=2, span_pieces=2)
    assert make_scenarios(profile, plan).mix_WM.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]
    few = make_scenarios(profile, replace(plan, max_scenarios=3))
    assert few.mix_WM.tolist() == [[0, 1], [2, 3], [4, 5]]
    wide = make_scenarios(profile, replace(plan, span_pieces=99))
    assert wide.mix_WM.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_first_scenarios_stand_for_all() -> None:
    """Softened plans hold the scenarios of plain ones, in an order whose first quarter spreads evenly."""
    profile = random_profile(np.random.default_rng(0), tokens=640, windows=64)
    plain, soft = (make_scenarios(profile, ScenarioPlan(soft=soft)).mix_WM[:, 0] for soft in (False, True))
    assert plain.tolist() == sorted(soft.tolist()) == list(range(64))
    assert np.diff(np.sort(soft[:16])).max() <= 8


def test_overlap_is_a_share_of_the_first_expert() -> None:
    """Of expert 0's three tokens one selects expert 1, which has no other; expert 3 is never selected."""
    profile = RoutingProfile(
        load_WLE=np.array([[[3.0, 1.0, 2.0, 0.0]]]),
        window_tokens_W=np.array([3.0]),
        top_k=2,
        experts_TLK=np.array([[[0, 1]], [[0, 2]], [[2, 0]]], dtype=np.uint8),
        window_of_token_T=np.zeros(3, dtype=np.int64),
    )
    expected = np.array([[1, 1 / 3, 2 / 3, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(expert_overlap(profile, 0, make_scenarios(profile, WINDOWS)), expected)


def test_counts_make_windows_alone() -> None:
    """Without tokens a window cannot be cut."""
    profile = counts_only(random_profile(np.random.default_rng(0)))
    made = make_scenarios(profile, ScenarioPlan(pieces_per_window=4))
    assert (made.num_scenarios, made.num_words) == (3, 0)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_windows_price_the_objective_itself(seed: int) -> None:
    """The plain plan's layers sum to the step; softening and shrinking keep its order of magnitude."""
    rng = np.random.default_rng(seed)
    profile = random_profile(rng)
    problem = make_problem(profile, cluster([0, 0, 0]), calibration=LINEAR, spare_slots=3)
    model, placement = CostModel(problem), random_placement(rng, problem)
    exact, soft, shrunk = (
        sum(LayerState(model, placement, layer, plan=plan).value for layer in range(2))
        for plan in (WINDOWS, ScenarioPlan(soft=True), ScenarioPlan(shrink=0.5))
    )
    assert exact == pytest.approx(model.objective(placement), rel=1e-9)
    # A 16-norm of 3 devices exceeds the maximum by at most 3^(1/16) = 7.2 %; a mean is the least risky.
    assert exact * (1 - 1e-9) <= soft <= exact * 3 ** (1 / 16) * (1 + 1e-9)
    assert shrunk <= exact * (1 + 1e-9)


def test_impossible_swaps_are_refused() -> None:
    """Two slots of one device, and a copy beside its twin, cannot change places."""
    profile = random_profile(np.random.default_rng(0), experts=4)
    problem = make_problem(profile, cluster([0, 0]), calibration=LINEAR, spare_slots=2)
    placement = random_placement(np.random.default_rng(1), problem, fill=1.0)
    state = LayerState(CostModel(problem), placement, 0)
    with pytest.raises(InputError, match="slots 0 and 1 cannot change places: same device"):
        state.swap_delta(0, 1)
    row = placement.physical_to_logical_map_LS[0]
    twin = next(int(e) for e in row[:3] if e in row[3:])
    a = int(np.nonzero(row[:3] == twin)[0][0])
    b = next(3 + s for s in range(3) if row[3 + s] != twin)
    with pytest.raises(InputError, match="an expert twice"):
        state.swap(a, b)


def test_rows_are_laid_out_in_order() -> None:
    """Experts ascend on every device, empty slots come last, and what does not fit is refused."""
    expert_I, device_I = np.array([3, 0, -1, 1, 2]), np.array([1, 1, 0, 0, 1])
    assert layer_row(expert_I, device_I, np.array([0, 0, 1, 1, 1])).tolist() == [1, -1, 0, 2, 3]
    with pytest.raises(InputError, match="device 1 holds 3 experts and has 2 slots"):
        layer_row(expert_I, device_I, np.array([0, 0, 0, 1, 1]))


def test_loads_are_counted_on_all_tokens() -> None:
    """However few tokens are searched on, scenarios of pieces have the loads of all of their tokens."""
    profile = random_profile(np.random.default_rng(3), tokens=400, windows=4)
    problem = make_problem(profile, cluster([0, 0]), calibration=LINEAR)
    made = [
        make_scenarios(profile, ScenarioPlan(pieces_per_window=2, max_tokens=most)) for most in (None, 40)
    ]
    assert made[1].token_T.size <= 40 < made[0].token_T.size
    values = []
    for scenarios in made:
        layer = make_layer(CostModel(replace(problem, objective=Objective.BALANCE)), 0, scenarios)
        values.append(state_value(layer, new_state(layer, np.arange(6), np.repeat([0, 1], 3))))
    assert values[0] == values[1]
