"""Figures of change carry the advice's own numbers, and their sentences say the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
from instances import LINEAR, cluster, model_for, random_placement, random_profile

from placement.change.advise import Advice, Interval, advise, frontier_gains
from placement.change.drift import Drift, Stretch
from placement.problem import PlacementProblem, make_problem
from placement.report.figures import change
from placement.report.figures.look import BLUE

ALLOWED = {"scatter", "bar", "box", "heatmap"}
"""Kinds of traces that the embedded plotly draws."""

PERCENT = "\N{NO-BREAK SPACE}%"


def interval(value: float, spread: float = 0.02) -> Interval:
    """Return an interval of 95 % around a value."""
    return Interval(value=value, low=value - spread, high=value + spread, confidence=0.95)


def problem_of(**options: object) -> PlacementProblem:
    """Return a problem in seconds, with experts that take long to move."""
    rng = np.random.default_rng(2)
    profile = random_profile(rng, tokens=960, layers=2, experts=16, windows=24, scale=2000.0)
    given: dict[str, object] = {"model": model_for(profile), **options}
    return make_problem(profile, cluster([0] * 4), **given)  # type: ignore[arg-type]


@pytest.fixture(name="problem", scope="module")
def _problem() -> PlacementProblem:
    return problem_of()


@pytest.fixture(name="advice", scope="module")
def _advice(problem: PlacementProblem) -> Advice:
    start = random_placement(np.random.default_rng(1), problem)
    return advise(problem, start, work_s=0.3, points=4)


@pytest.fixture(name="stay", scope="module")
def _stay(advice: Advice) -> Advice:
    """Advice to move nothing."""
    first = advice.frontier.points[0]
    curve = replace(advice.frontier, points=(first,), knee=0)
    nothing = interval(0.0, 0.0)
    return replace(advice, point=first, frontier=curve, gain=nothing, relative_gain=nothing, worth_it=False)


@pytest.fixture(name="drifted")
def _drifted() -> Drift:
    return Drift(
        running_W=np.array([2e-3, 2e-3, 3e-3, 4e-3]),
        fresh_W=np.array([2e-3, 2e-3, 2e-3, 3e-3]),
        stretches=(
            Stretch(first_window=0, num_windows=2, excess=interval(0.01)),
            Stretch(first_window=2, num_windows=2, excess=interval(0.25)),
        ),
        unit="s",
    )


def error_ends(trace: go.Bar | go.Scatter) -> tuple[list[float], list[float]]:
    """Return the lower and upper ends of a trace's bars."""
    y = np.array(trace.y)
    low, high = y - np.array(trace.error_y.arrayminus), y + np.array(trace.error_y.array)
    return low.tolist(), high.tolist()


def test_drift_is_drawn_by_window_and_by_stretch(drifted: Drift) -> None:
    """Both costs in ms, the price of staying in per cent, faint where it may be nothing."""
    figure = change.drift_figure(drifted, fitted_windows=2)
    running, fresh, excess = figure.data
    assert list(running.y) == [2, 2, 3, 4]
    assert list(fresh.y) == [2, 2, 2, 3]
    assert list(excess.x) == [0.5, 2.5]
    assert list(excess.y) == [1, 25]
    low, high = error_ends(excess)
    assert low == pytest.approx([-1, 23])
    assert high == pytest.approx([3, 27])
    assert excess.marker.color[0] != excess.marker.color[1]
    assert "ms" in figure.layout.yaxis.title.text
    assert figure.layout.shapes[0].x1 == 1.5
    assert not change.drift_figure(drifted).layout.shapes
    assert change.drift_sentence(drifted) == (
        f"Staying costs 1.0{PERCENT} in the first 2 windows, at most 25.0{PERCENT} (windows 2 to 3), and "
        f"25.0{PERCENT} in the last 2 windows, where the 95{PERCENT} interval is 23.0{PERCENT} to "
        f"27.0{PERCENT}."
    )


def test_the_frontier_is_drawn_fitted_and_held_out(advice: Advice) -> None:
    """Both curves over the moves, and the recommended point marked on the held-out one."""
    figure = change.frontier_figure(advice)
    fitted, held_out, recommended = figure.data
    points = advice.frontier.points
    assert list(fitted.x) == [point.moves.num_moves for point in points]
    factor = fitted.y[0] / points[0].fitted.objective
    np.testing.assert_allclose(fitted.y, [factor * point.fitted.objective for point in points])
    np.testing.assert_allclose(
        held_out.y, [factor * point.held_out.objective for point in points if point.held_out]
    )
    assert recommended.x[0] == advice.point.moves.num_moves
    assert "GiB" in held_out.customdata[1]
    assert change.frontier_sentence(advice).startswith(f"{advice.point.moves.num_moves} move")


def test_gains_have_their_intervals(problem: PlacementProblem, advice: Advice) -> None:
    """A mark for each point; the recommended one is coloured; hollow where it may be nothing."""
    gains = frontier_gains(problem, advice.frontier)
    figure = change.gains_figure(advice, gains, min_gain=0.03)
    assert len(figure.data) == len(gains)
    for trace, gain in zip(figure.data, gains, strict=True):
        assert trace.y[0] == pytest.approx(100 * gain.value)
        low, high = error_ends(trace)
        assert (low[0], high[0]) == pytest.approx((100 * gain.low, 100 * gain.high))
        assert trace.marker.symbol == ("circle" if gain.low > 0 else "circle-open")
    coloured = [trace.x[0] for trace in figure.data if trace.marker.color == BLUE]
    assert coloured == [advice.point.moves.num_moves]
    assert [shape.y0 for shape in figure.layout.shapes] == [0, 3]
    certain = sum(gain.low > 0 for gain in gains[1:])
    assert change.gains_sentence(advice, gains).startswith(f"At {certain} of the {len(gains) - 1} number")


def test_pay_back_crosses_zero_after_transfer_over_gain(advice: Advice) -> None:
    """The line begins below zero by the transfer and crosses it where the sentence says."""
    transfer_s = advice.point.moves.seconds
    assert transfer_s is not None
    sure = replace(
        advice, gain=Interval(value=transfer_s / 8, low=transfer_s / 16, high=transfer_s / 4, confidence=0.95)
    )
    low, high, middle, paid = change.pay_back_figure(sure).data
    assert paid.x[0] == pytest.approx(8)
    assert low.y[0] == high.y[0] == middle.y[0] < 0
    np.testing.assert_allclose(np.interp(8, middle.x, middle.y), 0, atol=1e-9)
    np.testing.assert_allclose(np.interp(16, low.x, low.y), 0, atol=1e-9)
    np.testing.assert_allclose(np.interp(4, high.x, high.y), 0, atol=1e-9)
    assert change.pay_back_sentence(sure).endswith(f"after 8 steps (95{PERCENT} interval: 4 to 16).")
    doubtful = replace(sure, gain=Interval(value=transfer_s / 8, low=-1.0, high=transfer_s, confidence=0.95))
    assert change.pay_back_sentence(doubtful).endswith("1 to never).")
    losing = replace(sure, gain=interval(-1e-3))
    assert change.pay_back_sentence(losing).endswith("is never paid back.")
    assert "paid back" not in [trace.name for trace in change.pay_back_figure(losing).data]


def test_nothing_to_pay_back(stay: Advice) -> None:
    """Where nothing is moved, sentences say so."""
    assert change.pay_back_sentence(stay) == "Nothing is moved, so there is nothing to pay back."
    assert "No number of moves is recommended" in change.frontier_sentence(stay)
    assert "no change to judge" in change.gains_sentence(stay, [interval(0.0, 0.0)])
    assert change.window_gains_sentence(stay).startswith("0 of 12 held-out windows cost less")
    for figure in (change.frontier_figure(stay), change.pay_back_figure(stay)):
        assert {trace.type for trace in figure.data} <= ALLOWED


def test_pay_back_without_seconds_says_what_is_missing() -> None:
    """Costs in no unit of time: no pay-back, and the figure is not silently empty."""
    problem = problem_of(calibration=LINEAR)
    start = random_placement(np.random.default_rng(1), problem)
    advice = advise(problem, start, work_s=0.2, points=2)
    assert "not known" in change.pay_back_sentence(advice)
    assert "not known" in change.pay_back_figure(advice).layout.annotations[0].text
    assert "step cost" in change.frontier_figure(advice).layout.yaxis.title.text


def test_every_held_out_window_has_its_bar(advice: Advice) -> None:
    """Windows that gain and windows that do not are told apart; together they are all."""
    better, worse, mean = change.window_gains_figure(advice).data
    before, after = (point.held_out for point in (advice.frontier.points[0], advice.point))
    assert before is not None
    assert after is not None
    gain_W = 100 * (1 - after.step_W / before.step_W)
    assert sorted([*better.x, *worse.x]) == list(range(12))
    np.testing.assert_allclose(better.y, gain_W[gain_W > 0])
    np.testing.assert_allclose(worse.y, gain_W[gain_W <= 0])
    assert mean.y[0] == pytest.approx(100 * advice.relative_gain.value)
    assert change.window_gains_sentence(advice).startswith(f"{(gain_W > 0).sum()} of 12 held-out windows")


def test_figures_of_change_have_no_theme(problem: PlacementProblem, advice: Advice, drifted: Drift) -> None:
    """Axes have titles, and only traces are used that the embedded plotly can draw."""
    gains = frontier_gains(problem, advice.frontier)
    figures = [
        change.drift_figure(drifted),
        change.frontier_figure(advice),
        change.gains_figure(advice, gains),
        change.pay_back_figure(advice),
        change.window_gains_figure(advice),
    ]
    for figure in figures:
        assert {trace.type for trace in figure.data} <= ALLOWED
        assert figure.layout.template.layout.to_plotly_json() == {}
        layout = figure.to_plotly_json()["layout"]
        assert any("title" in axis for name, axis in layout.items() if name.startswith("xaxis"))
