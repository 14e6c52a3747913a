"""Tests of the frontier and of advice: curves that never rise, pay-back, intervals that cover."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from instances import LINEAR, cluster, counts_only, model_for, placement_of, random_placement, random_profile

from placement.change.advise import advise, bootstrap_interval, resample_blocks
from placement.change.frontier import frontier
from placement.cost import CostModel
from placement.errors import InputError
from placement.moves import summarise_moves
from placement.optimizer import optimize
from placement.plan import diff
from placement.problem import PlacementProblem, Semantics, make_problem
from placement.profile import RoutingProfile


def problem_of(
    seed: int = 0, *, windows: int = 24, scale: float = 1.0, **options: object
) -> PlacementProblem:
    """Return a problem of 16 experts on four devices."""
    rng = np.random.default_rng(seed)
    profile = random_profile(
        rng, tokens=40 * windows, layers=2, experts=16, top_k=2, windows=windows, scale=scale
    )
    given: dict[str, object] = {"calibration": LINEAR, **options}
    return make_problem(profile, cluster([0] * 4), model=model_for(profile), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("semantics", [Semantics.DISPATCH, Semantics.STAY_PUT])
def test_the_frontier_never_rises(semantics: Semantics) -> None:
    """More moves are never worse; every point keeps its budget and is priced by the cost model."""
    problem = problem_of(semantics=semantics)
    fit, held = problem.profile.split_alternate()
    problem = problem.with_profile(fit)
    start = random_placement(np.random.default_rng(1), problem)
    curve = frontier(problem, start, held_out=held, work_s=0.4)
    assert curve.points[0].placement is start
    assert len(curve.points) > 3
    for point in curve.points:
        assert point.moves.num_moves == len(diff(start, point.placement)) <= point.budget
        assert point.fitted.objective == CostModel(problem).objective(point.placement)
        assert point.held_out is not None
        assert point.held_out.objective == CostModel(problem.with_profile(held)).objective(point.placement)
    assert all(b.fitted.objective <= a.fitted.objective for a, b in itertools.pairwise(curve.points))
    assert 0 < curve.knee < len(curve.points)
    # Linear costs are in no seconds: nothing pays back in steps.
    assert {point.pay_back_steps for point in curve.points} == {None}


def test_the_frontier_ends_where_the_unbudgeted_solve_does() -> None:
    """The last point is at least as good as a solve without a budget."""
    problem = problem_of(1)
    start = random_placement(np.random.default_rng(1), problem)
    free = optimize(problem, start=start, work_s=0.2)
    curve = frontier(problem, start, points=4, work_s=0.4)
    assert curve.points[-1].fitted.objective <= free.objective
    assert curve.points[-1].held_out is None


def test_pay_back_is_transfer_over_saving() -> None:
    """With data-sheet costs a step is in seconds, and so is the transfer."""
    problem = problem_of(2, calibration=None, scale=2000.0)
    start = random_placement(np.random.default_rng(2), problem)
    curve = frontier(problem, start, budgets=[2, 8], work_s=0.4)
    first, last = curve.points[0], curve.points[-1]
    moves = summarise_moves(start, last.placement, topology=problem.topology, model=problem.model)
    assert last.moves.total_bytes == moves.num_moves * 3 * 1024 * 512 * 2
    assert last.saved_per_step == first.fitted.step - last.fitted.step
    assert last.saved_per_step is not None
    assert last.pay_back_steps == pytest.approx(moves.seconds / last.saved_per_step)
    assert first.pay_back_steps == 0.0


def test_bad_frontiers() -> None:
    """Negative budgets and no points are input errors."""
    problem = problem_of()
    start = random_placement(np.random.default_rng(1), problem)
    with pytest.raises(InputError, match=r"budgets are \[-1\]"):
        frontier(problem, start, budgets=[-1])
    with pytest.raises(InputError, match="points is 0"):
        frontier(problem, start, points=0)


def test_a_poor_start_is_worth_leaving() -> None:
    """The busy experts sit together: the advice is to move, with an interval above nothing."""
    problem = problem_of(3, objective="balance")
    heavy = np.argsort(-problem.profile.load_WLE.sum(axis=0), axis=1)
    start = placement_of(problem, heavy.tolist())
    advice = advise(problem, start, work_s=0.4)
    assert advice.worth_it
    assert 0 < advice.gain.low <= advice.gain.value <= advice.gain.high
    assert advice.relative_gain.value == pytest.approx(
        1 - advice.point.held_out.objective / advice.frontier.points[0].held_out.objective  # type: ignore[union-attr]
    )
    assert advice.reason.startswith(f"Worth it: {advice.point.moves.num_moves} moves")
    assert advice.warnings == ()


def test_a_good_start_is_not_worth_leaving() -> None:
    """What was solved on the same windows is left alone, in one sentence."""
    problem = problem_of(4, objective="balance")
    fit, _ = problem.profile.split_alternate()
    start = optimize(problem.with_profile(fit), work_s=1.0).placement
    advice = advise(problem, start, work_s=0.2, min_gain=0.02)
    assert not advice.worth_it
    assert advice.reason.startswith("Not worth it: ")


def test_even_traffic_has_nothing_to_gain() -> None:
    """All experts equally busy: no placement is better, and the recommended point is the start."""
    profile = counts_only(problem_of(windows=6).profile)
    level = type(profile)(load_WLE=np.ones((6, 2, 16)), window_tokens_W=np.full(6, 8.0), top_k=2)
    problem = make_problem(level, cluster([0] * 4), calibration=LINEAR, objective="balance")
    advice = advise(problem, random_placement(np.random.default_rng(0), problem), work_s=0.1)
    assert (advice.worth_it, advice.point.moves.num_moves, advice.gain.value) == (False, 0, 0.0)
    assert "no placement better" in advice.reason
    assert "only 3 held-out windows" in advice.warnings[0]


def test_a_late_pay_back_is_not_worth_it() -> None:
    """What one step saves does not make up for the transfer in a single step."""
    problem = problem_of(5, calibration=None, scale=2000.0)
    heavy = np.argsort(-problem.profile.load_WLE.sum(axis=0), axis=1)
    start = placement_of(problem, heavy.tolist())
    patient = advise(problem, start, work_s=0.4, horizon_steps=1e9)
    assert patient.worth_it
    assert "pay back after" in patient.reason
    hasty = advise(problem, start, work_s=0.4, horizon_steps=1e-6)
    assert not hasty.worth_it
    assert hasty.point.moves.num_moves == 0


@pytest.mark.parametrize("options", [{"horizon_steps": 0.0}, {"min_gain": 1.0}, {"confidence": 1.0}])
def test_bad_advice(options: dict[str, float]) -> None:
    """Options out of range are named."""
    problem = problem_of()
    with pytest.raises(InputError, match=next(iter(options))):
        advise(problem, random_placement(np.random.default_rng(1), problem), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("correlation", "least"), [(0.0, 0.9), (0.5, 0.8)])
def test_intervals_cover_the_truth(correlation: float, least: float) -> None:
    """Most 95 % intervals of a mean of 60 windows hold it, also where windows resemble the next.

    Blocks are short against how long such windows remember, so a few more than 5 % miss it there.
    """
    rng = np.random.default_rng(0)
    picks = resample_blocks(60, resamples=400)
    covered = 0
    for _ in range(300):
        noise = rng.standard_normal(80)
        for index in range(1, 80):
            noise[index] += correlation * noise[index - 1]
        value_W = 3.0 + noise[20:]
        interval = bootstrap_interval(
            float(value_W.mean()), value_W[picks].mean(axis=1), num_windows=60, confidence=0.95
        )
        assert interval.low <= interval.value <= interval.high
        covered += interval.low <= 3.0 <= interval.high
    assert least <= covered / 300 <= 0.99


def test_blocks_are_consecutive() -> None:
    """27 windows come in blocks of three, each window as often as the next."""
    picks_BW = resample_blocks(27, resamples=2000)
    assert picks_BW.shape == (2000, 27)
    steps = (picks_BW.reshape(-1, 9, 3)[:, :, 1:] - picks_BW.reshape(-1, 9, 3)[:, :, :-1]) % 27
    assert (steps == 1).all()
    share_W = np.bincount(picks_BW.ravel(), minlength=27) / picks_BW.size
    np.testing.assert_allclose(share_W, 1 / 27, rtol=0.05)


def test_what_loses_on_held_out_windows_gains_nothing() -> None:
    """Even windows want experts 0 and 2 together, odd ones apart: what is fitted to the former loses."""
    load_WLE = np.full((24, 1, 4), 10.0)
    load_WLE[:, :, 0] += 40
    load_WLE[::2, :, 1] += 40
    load_WLE[1::2, :, 2] += 40
    profile = RoutingProfile(load_WLE=load_WLE, window_tokens_W=np.full(24, 120.0), top_k=1)
    problem = make_problem(profile, cluster([0] * 2), objective="balance", calibration=LINEAR)
    advice = advise(problem, placement_of(problem, [[0, 1, 2, 3]]), work_s=0.1)
    assert not advice.worth_it
    # From 60 and 60 to 100 and 20 where the running placement was even: 100 / 60 against 1.
    assert advice.relative_gain.value == pytest.approx(1 - 100 / 60)
    assert advice.reason.startswith("Not worth it: 2 moves gain nothing on held-out windows: -66.7%")
