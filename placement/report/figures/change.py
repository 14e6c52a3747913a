"""The figures of whether to move: drift, moves against cost, pay-back, and how sure all that is.

Each figure comes with a sentence that says what it shows, from the same numbers.

Shape letters: W windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from placement.change.advise import Advice, Interval
from placement.change.drift import Drift
from placement.change.frontier import FrontierPoint
from placement.cost import CostBreakdown
from placement.report.figures.look import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    axis_title,
    empty_figure,
    faint,
    legend_above,
)
from placement.report.numbers import Scale, capital, number, percent, plural
from placement.report.story import relative_change

__all__ = [
    "drift_figure",
    "drift_sentence",
    "frontier_figure",
    "frontier_sentence",
    "gains_figure",
    "gains_sentence",
    "pay_back_figure",
    "pay_back_sentence",
    "window_gains_figure",
    "window_gains_sentence",
]

FloatArray = npt.NDArray[np.float64]


def drift_figure(drift: Drift, *, fitted_windows: int = 0) -> go.Figure:
    """Draw each window's cost under the running placement and under fresh ones, and the price of staying.

    Parameters
    ----------
    fitted_windows
        First windows, which the running placement was fitted to: they are shaded.
    """
    scale = Scale.of(float(drift.running_W.max()), drift.unit)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.58, 0.42])
    windows = np.arange(drift.running_W.size)
    for name, value_W, colour in (
        ("running placement", drift.running_W, ORANGE),
        ("a placement fitted to the traffic around", drift.fresh_W, BLUE),
    ):
        figure.add_trace(
            go.Scatter(
                name=name,
                x=windows,
                y=value_W / scale.factor,
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"size": 4},
                hovertemplate=f"window %{{x}}, {name}: %{{y:,.4~g}} {scale.unit}<extra></extra>",
            ),
            row=1,
            col=1,
        )
    figure.add_trace(_excess_bars(drift), row=2, col=1)
    if fitted_windows:
        figure.add_vrect(x0=-0.5, x1=fitted_windows - 0.5, fillcolor=GREY, opacity=0.14, line_width=0)
        figure.add_annotation(
            x=0, xanchor="left", y=1, yref="y domain", yanchor="bottom",
            text="the running placement was fitted here", showarrow=False,
        )  # fmt: skip
    figure.layout.template = {}
    figure.update_layout(
        height=500,
        legend={**legend_above(), "y": 1.07},
        margin={"l": 8, "r": 16, "t": 64, "b": 8},
    )
    figure.update_yaxes(title=axis_title(f"a window's cost ({scale.unit})"), row=1)
    figure.update_yaxes(title=axis_title("price of staying (%)"), zeroline=True, zerolinecolor=GREY, row=2)
    figure.update_xaxes(range=[-1, drift.running_W.size])
    figure.update_xaxes(title=axis_title("window, in order of time"), row=2)
    return figure


def _excess_bars(drift: Drift) -> go.Bar:
    stretches = drift.stretches
    last = [each.first_window + each.num_windows - 1 for each in stretches]
    return go.Bar(
        x=[(each.first_window + end) / 2 for each, end in zip(stretches, last, strict=True)],
        y=[100 * each.excess.value for each in stretches],
        width=[0.8 * each.num_windows for each in stretches],
        customdata=[f"{each.first_window} to {end}" for each, end in zip(stretches, last, strict=True)],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [100 * (each.excess.high - each.excess.value) for each in stretches],
            "arrayminus": [100 * (each.excess.value - each.excess.low) for each in stretches],
            "color": GREY,
            "thickness": 1.5,
        },
        marker={"color": [ORANGE if each.excess.low > 0 else faint(ORANGE) for each in stretches]},
        hovertemplate="windows %{customdata}: %{y:.1f} % of the running placement's cost<extra></extra>",
        showlegend=False,
    )


def drift_sentence(drift: Drift) -> str:
    """Say what staying costs in the first stretch, in the last one, and where it costs most."""
    first, last = drift.stretches[0], drift.stretches[-1]
    worst = max(drift.stretches, key=lambda each: each.excess.value)
    end = worst.first_window + worst.num_windows - 1
    return (
        f"Staying costs {percent(first.excess.value)} in the first {plural(first.num_windows, 'window')}, "
        f"at most {percent(worst.excess.value)} (windows {worst.first_window} to {end}), and "
        f"{percent(last.excess.value)} in the last {plural(last.num_windows, 'window')}, where the "
        f"{_confidence(last.excess)} interval is {percent(last.excess.low)} to {percent(last.excess.high)}."
    )


def _confidence(interval: Interval) -> str:
    return percent(interval.confidence, digits=0)


def _cost(breakdown: CostBreakdown | None) -> float:
    return math.nan if breakdown is None else breakdown.objective


def _recommended(advice: Advice) -> int:
    """Index of the recommended point on the frontier."""
    return next(i for i, point in enumerate(advice.frontier.points) if point is advice.point)


def frontier_figure(advice: Advice) -> go.Figure:
    """Draw the objective against expert moves, on the fitted and on the held-out windows."""
    points = advice.frontier.points
    scale = Scale.of(points[0].fitted.objective, advice.frontier.unit)
    moves = [point.moves.num_moves for point in points]
    figure = empty_figure(height=380, legend=legend_above(), margin={"l": 8, "r": 24, "t": 40, "b": 8})
    for name, values, colour, dash in (
        ("windows it was fitted to", [_cost(point.fitted) for point in points], GREY, "dot"),
        ("held-out windows", [_cost(point.held_out) for point in points], BLUE, "solid"),
    ):
        figure.add_trace(
            go.Scatter(
                name=name,
                x=moves,
                y=[value / scale.factor for value in values],
                customdata=[_move_text(point) for point in points],
                mode="lines+markers",
                line={"color": colour, "dash": dash, "width": 2},
                marker={"size": 7},
                hovertemplate=f"%{{customdata}}<br>%{{y:,.4~g}} {scale.unit} on {name}<extra></extra>",
            )
        )
    at = advice.point
    value = at.held_out if at.held_out is not None else at.fitted
    figure.add_trace(
        go.Scatter(
            name="recommended",
            x=[at.moves.num_moves],
            y=[value.objective / scale.factor],
            mode="markers",
            marker={"symbol": "circle-open", "size": 18, "color": ORANGE, "line": {"width": 3}},
            hoverinfo="skip",
        )
    )
    figure.update_xaxes(title=axis_title("expert copies that are moved (number)"), rangemode="tozero")
    figure.update_yaxes(title=axis_title(f"{_objective_name(advice)} ({scale.unit})"))
    return figure


def _objective_name(advice: Advice) -> str:
    """Return what the frontier's unit measures."""
    unit = advice.frontier.unit
    if unit == "s":
        return "step time"
    return "balance" if unit == "max/mean" else "traffic" if unit.endswith("/token") else "step cost"


def _move_text(point: FrontierPoint) -> str:
    parts = [plural(point.moves.num_moves, "move")]
    if point.moves.total_bytes is not None:
        parts.append(f"{point.moves.total_bytes / 2**30:.3g} GiB")
    if point.moves.seconds is not None:
        parts.append(_time(point.moves.seconds))
    return ", ".join(parts)


def _time(seconds: float) -> str:
    scale = Scale.of(seconds, "s")
    return f"{scale.text(seconds, digits=3)} {scale.unit}"


def frontier_sentence(advice: Advice) -> str:
    """Say what the recommended moves keep of the gain of moving freely, on the held-out windows."""
    points = advice.frontier.points
    start, point, last = _held(points[0]), _held(advice.point), _held(points[-1])
    if advice.point.moves.num_moves == 0:
        return "No number of moves is recommended: nothing better than the running placement was found."
    whole = start - last
    free = plural(points[-1].moves.num_moves, "move")
    share = f", {percent((start - point) / whole, digits=0)} of what {free} would save" if whole > 0 else ""
    change = relative_change(point, start)
    saved = percent(None if change is None else -change)
    return f"{capital(_move_text(advice.point))}: {saved} saved on the held-out windows{share}."


def _held(point: FrontierPoint) -> float:
    return _cost(point.held_out if point.held_out is not None else point.fitted)


def gains_figure(advice: Advice, gains: Sequence[Interval], *, min_gain: float = 0.01) -> go.Figure:
    """Draw what every point of the frontier gains on held-out windows, in %, with its interval.

    Parameters
    ----------
    gains
        One for each point: `placement.change.advise.frontier_gains`.
    min_gain
        Least gain worth having, as a share: a dashed line.
    """
    points, chosen = advice.frontier.points, _recommended(advice)
    moves = [point.moves.num_moves for point in points]
    colours = [BLUE if i == chosen else GREY for i in range(len(points))]
    figure = empty_figure(height=360)
    for at, gain, colour in zip(moves, gains, colours, strict=True):
        figure.add_trace(
            go.Scatter(
                x=[at],
                y=[100 * gain.value],
                mode="markers",
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [100 * (gain.high - gain.value)],
                    "arrayminus": [100 * (gain.value - gain.low)],
                    "thickness": 2,
                },
                marker={"size": 10, "color": colour, "symbol": "circle" if gain.low > 0 else "circle-open"},
                hovertemplate=(
                    f"{plural(at, 'move')}: {percent(gain.value)}, {_confidence(gain)} interval "
                    f"{percent(gain.low)} to {percent(gain.high)}<extra></extra>"
                ),
                showlegend=False,
            )
        )
    figure.add_hline(y=0, line={"color": GREY, "width": 2})
    figure.add_hline(
        y=100 * min_gain,
        line={"color": ORANGE, "width": 1.5, "dash": "dash"},
        annotation={"text": f"least worth having: {percent(min_gain)}", "xanchor": "right"},
    )
    figure.update_xaxes(title=axis_title("expert copies that are moved (number)"))
    figure.update_yaxes(title=axis_title(f"{_objective_name(advice)} saved on held-out windows (%)"))
    return figure


def gains_sentence(advice: Advice, gains: Sequence[Interval]) -> str:
    """Say for how many points the gain is certain, and what it is at the recommended one."""
    others = [
        gain for point, gain in zip(advice.frontier.points, gains, strict=True) if point.moves.num_moves
    ]
    if not others:
        return "There is no change to judge: no placement better than the running one was found."
    certain = sum(gain.low > 0 for gain in others)
    text = (
        f"At {certain} of the {plural(len(others), 'number')} of moves tried the gain is more than noise "
        f"({_confidence(others[0])} interval above zero)"
    )
    if advice.point.moves.num_moves == 0:
        return f"{text}."
    gain = advice.relative_gain
    span = f"{percent(gain.low)} to {percent(gain.high)}"
    return f"{text}; the recommended one gains {percent(gain.value)}, {span}."


def pay_back_figure(advice: Advice) -> go.Figure:
    """Draw the time won since a move, against steps: it begins below zero by what the move takes.

    Where a step is not in seconds, or moves have no bytes, the figure says so.
    """
    point, gain = advice.point, advice.gain
    transfer_s = point.moves.seconds
    if not _pays_in_time(advice) or transfer_s is None:
        return _without_time()
    steps = _steps_shown(transfer_s, gain)
    ends_s = [abs(steps * end - transfer_s) for end in (gain.low, gain.value, gain.high)]
    scale = Scale.of(max(*ends_s, transfer_s), "s")
    x = [0.0, steps]
    low, middle, high = (
        [-transfer_s / scale.factor, (steps * end - transfer_s) / scale.factor]
        for end in (gain.low, gain.value, gain.high)
    )
    fill = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    figure = empty_figure(
        go.Scatter(x=x, y=low, showlegend=False, **fill),
        go.Scatter(
            name=f"{_confidence(gain)} interval", x=x, y=high, fill="tonexty",
            fillcolor=faint(BLUE).replace("0.45", "0.2"), **fill,
        ),
        go.Scatter(
            name=f"after {_move_text(point)}", x=x, y=middle, mode="lines", line={"color": BLUE, "width": 2},
            hovertemplate=f"after %{{x:,.0f}} steps: %{{y:,.3~g}} {scale.unit}<extra></extra>",
        ),
        height=360, legend=legend_above(), margin={"l": 8, "r": 24, "t": 40, "b": 8},
    )  # fmt: skip
    figure.add_hline(y=0, line={"color": GREY, "width": 2})
    if gain.value > 0 and transfer_s > 0:
        figure.add_trace(
            go.Scatter(
                name="paid back",
                x=[transfer_s / gain.value],
                y=[0],
                mode="markers",
                marker={"size": 12, "color": GREEN},
                hovertemplate="paid back after %{x:,.0f} steps<extra></extra>",
            )
        )
    figure.update_xaxes(title=axis_title("steps since the move (number)"))
    figure.update_yaxes(title=axis_title(f"time won, less the transfer ({scale.unit})"))
    return figure


def _without_time() -> go.Figure:
    figure = empty_figure(height=120)
    figure.add_annotation(
        text="not known without seconds and sizes", x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False
    )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def _pays_in_time(advice: Advice) -> bool:
    """Whether the gain is seconds of a step, so that it can make up for the transfer's."""
    return advice.frontier.unit == "s" and advice.point.moves.seconds is not None


def _steps_shown(transfer_s: float, gain: Interval) -> float:
    """Steps until the least sure gain has paid twice over, within reason."""
    if gain.value <= 0 or transfer_s <= 0:
        return 100.0
    middle = transfer_s / gain.value
    latest = transfer_s / gain.low if gain.low > 0 else math.inf
    return max(10.0, math.ceil(min(2 * latest, 6 * middle)))


def pay_back_sentence(advice: Advice) -> str:
    """Say after how many steps the recommended moves have paid, for the gain and the ends of its interval."""
    if not _pays_in_time(advice):
        return (
            "When it pays back is not known: that takes a step in seconds and the sizes of the model's "
            "experts."
        )
    transfer_s, gain = advice.point.moves.seconds, advice.gain
    if advice.point.moves.num_moves == 0 or not transfer_s:
        return "Nothing is moved, so there is nothing to pay back."
    if gain.value <= 0:
        return f"The transfer takes {_time(transfer_s)} and is never paid back."
    latest = f"{_steps(transfer_s, gain.low)}" if gain.low > 0 else "never"
    return (
        f"The transfer takes {_time(transfer_s)} and is paid back after "
        f"{_steps(transfer_s, gain.value)} steps ({_confidence(gain)} interval: "
        f"{_steps(transfer_s, gain.high)} to {latest})."
    )


def _steps(transfer_s: float, gain_s: float) -> str:
    return number(float(math.ceil(transfer_s / gain_s)), digits=1)


def window_gains_figure(advice: Advice) -> go.Figure:
    """Draw what the recommended moves save in every held-out window, in % of its cost."""
    gain_W = 100 * _window_gains(advice)
    better = gain_W > 0
    figure = empty_figure(height=320, legend=legend_above(), margin={"l": 8, "r": 16, "t": 40, "b": 8})
    for name, chosen, colour in (("less", better, BLUE), ("as much or more", ~better, ORANGE)):
        figure.add_trace(
            go.Bar(
                name=f"costs {name} after the move",
                x=np.flatnonzero(chosen),
                y=gain_W[chosen],
                marker={"color": colour},
                hovertemplate="held-out window %{x}: %{y:.1f} %<extra></extra>",
            )
        )
    mean = 100 * advice.relative_gain.value
    figure.add_trace(
        go.Scatter(
            name=f"all of them: {percent(advice.relative_gain.value)}",
            x=[-0.5, gain_W.size - 0.5],
            y=[mean, mean],
            mode="lines",
            line={"color": GREY, "dash": "dash"},
            hoverinfo="skip",
        )
    )
    figure.update_layout(showlegend=True)
    figure.update_xaxes(title=axis_title("held-out window, in order of time"))
    figure.update_yaxes(title=axis_title("saved by the move (%)"), zeroline=True, zerolinecolor=GREY)
    return figure


def _window_gains(advice: Advice) -> FloatArray:
    """Share that each held-out window saves: of its step, or of its balance."""
    before, after = (_values_W(advice, point) for point in (advice.frontier.points[0], advice.point))
    return np.asarray(1 - np.divide(after, before, out=np.ones_like(after), where=before > 0))


def _values_W(advice: Advice, point: FrontierPoint) -> FloatArray:
    breakdown = point.fitted if point.held_out is None else point.held_out
    if _objective_name(advice).startswith("step"):
        return breakdown.step_W
    return np.asarray(breakdown.balance_WL.mean(axis=1))


def window_gains_sentence(advice: Advice) -> str:
    """Say in how many held-out windows the recommended moves save something."""
    gain_W = _window_gains(advice)
    return (
        f"{int((gain_W > 0).sum())} of {plural(gain_W.size, 'held-out window')} cost less after the move; "
        f"the middle half of them save {percent(float(np.quantile(gain_W, 0.25)))} to "
        f"{percent(float(np.quantile(gain_W, 0.75)))}."
    )
