"""The figures of how good a placement is: gains, balance against traffic, bounds, replicas, timelines.

Each figure comes with a sentence that says what it shows, from the same numbers.

Shape letters: W windows, L layers, P phases, D devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from placement.bounds import layer_gaps
from placement.comparison import Comparison, PolicyResult
from placement.cost import CostBreakdown
from placement.cost.timeline import PHASES, Timeline
from placement.errors import InputError
from placement.problem import Objective, Risk, Semantics
from placement.replication import Replication
from placement.report.figures.look import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    axis_title,
    empty_figure,
    faint,
    hover_name,
    legend_above,
    names_of,
)
from placement.report.numbers import Scale, capital, number, percent, plural
from placement.report.story import Story, gain_interval, relative_change
from placement.tradeoff import Tradeoff, Way, efficient, traffic_of

__all__ = [
    "bound_sentence",
    "bounds_figure",
    "gains_figure",
    "gains_sentence",
    "replicas_figure",
    "replicas_sentence",
    "timelines_figure",
    "timelines_sentence",
    "tradeoff_figure",
    "tradeoff_sentence",
    "waiting_figure",
]

FloatArray = npt.NDArray[np.float64]

PHASE_COLOURS = {"dispatch": ORANGE, "experts": BLUE, "combine": GREEN}
WAITING = "rgba(138,143,152,0.28)"

PALE = "#f2f7fb"

SAME_X, SAME_Y = 0.06, 0.04
"""Shares of a plot within which two marks have no room for two texts."""

MAX_LAYERS, MAX_DEVICES = 8, 32
"""Layers and devices of a timeline that a reader can still tell apart."""

COLOURS = {"auto": BLUE, "eplb": ORANGE, "greedy": GREEN}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gain:
    """Share by which a policy's held-out objective is below another's, and its 95 % interval."""

    name: str
    share: float
    interval: tuple[float, float] | None

    @property
    def certain(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def _reference(story: Story, against: str | None) -> PolicyResult:
    """Return the policy of that name, or the story's own reference."""
    rival = story.replaced if against is None else story.comparison.policy(against)
    if rival is None:
        raise InputError(f"there is no other policy to hold {story.proposed.name} against")
    return rival


def _gains(story: Story, rival: PolicyResult) -> list[_Gain]:
    others = [result for result in story.comparison.policies if result is not rival]
    gains = []
    for result in others:
        change = relative_change(result.held_out.objective, rival.held_out.objective)
        if change is not None:
            gains.append(_Gain(name=result.name, share=-change, interval=_interval(story, result, rival)))
    return gains


def _interval(story: Story, mine: PolicyResult, theirs: PolicyResult) -> tuple[float, float] | None:
    """Return the interval of a gain where the objective is a mean over windows."""
    problem = story.comparison.problem
    if problem.risk is not Risk.MEAN or problem.objective is Objective.TRAFFIC:
        return None
    return gain_interval(*(story.window_values_W(result.held_out) for result in (mine, theirs)))


def gains_figure(story: Story, *, against: str | None = None) -> go.Figure:
    """Draw what every policy gains against one of them on held-out windows, in %, with 95 % intervals.

    A hollow mark stands for a difference that may be noise.

    Raises
    ------
    InputError
        If there is no such policy, or none but the proposed one.
    """
    rival = _reference(story, against)
    gains = _gains(story, rival)
    figure = empty_figure(height=110 + 40 * len(gains), margin={"l": 8, "r": 24, "t": 8, "b": 8})
    for gain in gains:
        low, high = (gain.share, gain.share) if gain.interval is None else gain.interval
        figure.add_trace(
            go.Scatter(
                x=[100 * gain.share],
                y=[escape(gain.name)],
                mode="markers+text",
                text=[f"<b>{percent(gain.share, signed=True)}</b>"],
                textposition="top center",
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [100 * (high - gain.share)],
                    "arrayminus": [100 * (gain.share - low)],
                    "thickness": 2,
                    "width": 6,
                },
                marker={
                    "size": 11,
                    "symbol": "circle" if gain.certain else "circle-open",
                    "color": BLUE if gain.name == story.proposed.name else GREY,
                },
                hovertemplate=(
                    f"{hover_name(gain.name)}: {percent(gain.share, signed=True)}, 95 % interval "
                    f"{percent(low, signed=True)} to {percent(high, signed=True)}<extra></extra>"
                ),
                showlegend=False,
            )
        )
    label = f"{story.objective_label} saved against {rival.name} (%)"
    figure.update_xaxes(title=axis_title(label), zeroline=True, zerolinewidth=2, zerolinecolor=GREY)
    # Reversed, with room for the first policy's text.
    figure.update_yaxes(type="category", range=[len(gains) - 0.5, -0.75], showgrid=False)
    return figure


def gains_sentence(story: Story, *, against: str | None = None) -> str:
    """Say what the proposed policy gains against another, and how sure that is."""
    rival = _reference(story, against)
    gain = next((gain for gain in _gains(story, rival) if gain.name == story.proposed.name), None)
    if gain is None:
        return f"{capital(story.proposed.name)} cannot be compared with {rival.name}."
    less = "lowers" if gain.share >= 0 else "raises"
    text = f"{capital(story.proposed.name)} {less} {story.objective_label} by {percent(abs(gain.share))}"
    text += f" against {rival.name} on {plural(story.comparison.num_held_out_windows, 'held-out window')}"
    if gain.interval is None:
        return f"{text}."
    low, high = (percent(end) for end in gain.interval)
    doubt = "" if gain.certain else ", which may be nothing"
    return f"{text} (95 % interval of the gain: {low} to {high}){doubt}."


def tradeoff_figure(tradeoff: Tradeoff, comparison: Comparison) -> go.Figure:
    """Draw held-out balance (max / mean) against traffic: policies, and the edge of what was found."""
    edge = _edge(tradeoff, comparison)
    places = [_place(result.held_out, tradeoff.semantics) for result in comparison.policies]
    traces = [
        go.Scatter(
            name="edge of what was found",
            x=[balance for balance, _ in edge],
            y=[traffic for _, traffic in edge],
            mode="lines",
            line={"color": faint(BLUE), "width": 6},
            hoverinfo="skip",
        )
    ]
    for way, symbol, colour in ((Way.LIMIT, "diamond", GREEN), (Way.PRICE, "circle", BLUE)):
        chosen = [point for point in tradeoff.points if point.way is way]
        named = "least traffic under a load limit" if way is Way.LIMIT else "least cost at a price per visit"
        asked = (
            "load limit %{customdata}" if way is Way.LIMIT else "a visit costs as much as %{customdata} pairs"
        )
        traces.append(
            go.Scatter(
                name=named,
                x=[point.held_out.metrics.balance for point in chosen],
                y=[traffic_of(point.held_out, tradeoff.semantics) for point in chosen],
                customdata=[f"{point.value:g}" for point in chosen],
                mode="markers",
                marker={"symbol": symbol, "size": 10, "color": colour},
                hovertemplate=f"{asked}<br>balance %{{x:.3f}}, traffic %{{y:.3f}}<extra></extra>",
            )
        )
    traces.append(
        go.Scatter(
            name="policies",
            x=[balance for balance, _ in places],
            y=[traffic for _, traffic in places],
            text=_labels([result.name for result in comparison.policies], places),
            customdata=names_of(comparison.policies),
            mode="markers+text",
            textposition="top right",
            marker={"symbol": "x", "size": 10, "color": ORANGE},
            hovertemplate="%{customdata}<br>balance %{x:.3f}, traffic %{y:.3f}<extra></extra>",
            cliponaxis=False,
        )
    )
    figure = empty_figure(
        *traces, height=440, legend=legend_above(), margin={"l": 8, "r": 88, "t": 48, "b": 8}
    )
    figure.update_xaxes(title=axis_title("balance, held out (fullest / mean device)"))
    figure.update_yaxes(title=axis_title(_traffic_label(tradeoff.semantics)))
    return figure


def _traffic_label(semantics: Semantics) -> str:
    if semantics is Semantics.STAY_PUT:
        return "hops (share of tokens that change device)"
    return "fanout (devices that a token visits per layer)"


def _place(breakdown: CostBreakdown, semantics: Semantics) -> tuple[float, float]:
    return breakdown.metrics.balance, traffic_of(breakdown, semantics)


def _edge(tradeoff: Tradeoff, comparison: Comparison) -> list[tuple[float, float]]:
    """Balance and traffic of what no other placement beats, policies among them, by ascending balance."""
    costs = [*(each.held_out for each in tradeoff.points), *(each.held_out for each in comparison.policies)]
    places = sorted({_place(cost, tradeoff.semantics) for cost in costs})
    return [place for place, keep in zip(places, efficient(places), strict=True) if keep]


def _labels(names: Sequence[str], places: Sequence[tuple[float, float]]) -> list[str]:
    """Text of each mark: marks too near each other for two texts share that of the first."""
    span = np.maximum(np.ptp(places, axis=0), 1e-9)
    groups: dict[int, list[str]] = {}
    for name, place in zip(names, places, strict=True):
        apart = (np.abs(np.subtract(places[at], place)) / span for at in groups)
        near = [at for at, (x, y) in zip(groups, apart, strict=True) if x < SAME_X and y < SAME_Y]
        groups.setdefault(near[0] if near else list(places).index(place), []).append(name)
    return [escape(", ".join(groups.get(at, []))) for at in range(len(places))]


def tradeoff_sentence(tradeoff: Tradeoff, comparison: Comparison) -> str:
    """Say between which balances and traffics one can choose, and which policies are beaten in both."""
    edge = _edge(tradeoff, comparison)
    beaten = [r.name for r in comparison.policies if _place(r.held_out, tradeoff.semantics) not in edge]
    (first_balance, first_traffic), (last_balance, last_traffic) = edge[0], edge[-1]
    what = "hops" if tradeoff.semantics is Semantics.STAY_PUT else "fanout"
    span = (
        f"The choice is between balance {number(first_balance)} at {what} {number(first_traffic)} and "
        f"balance {number(last_balance)} at {what} {number(last_traffic)}"
        if len(edge) > 1
        else f"Balance {number(first_balance)} and {what} {number(first_traffic)} come together"
    )
    if not beaten:
        return f"{span}; no policy is beaten in both."
    verb = "is" if len(beaten) == 1 else "are"
    return f"{span}; {', '.join(beaten)} {verb} beaten in both at once."


def bounds_figure(story: Story, *, against: str | None = None) -> go.Figure:
    """Draw each layer's cost on the fitted windows beside the least that any placement could reach.

    Raises
    ------
    InputError
        If there is no such policy, or none but the proposed one, or the objective is traffic, which no
        evaluation takes apart by layers.
    """
    rival, proposed = _reference(story, against), story.proposed
    layer_gaps(story.comparison.problem, proposed.fitted, proposed.solution.bound)
    bound_L = proposed.solution.bound.layer_L
    cost_L = {result.name: _layer_costs(story, result) for result in (rival, proposed)}
    unit = proposed.held_out.step_unit if story.measures_step else "max / mean"
    scale = Scale.of(float(max(each.max() for each in cost_L.values())), unit)
    figure = empty_figure(height=360, legend=legend_above(), margin={"l": 8, "r": 16, "t": 40, "b": 8})
    layers = np.arange(bound_L.size)
    figure.add_trace(
        go.Scatter(
            name="no placement is below this",
            x=layers,
            y=bound_L / scale.factor,
            mode="markers",
            marker={"symbol": "line-ew-open", "size": 26, "color": GREY, "line": {"width": 3}},
            hovertemplate=f"layer %{{x}}: bound %{{y:,.4~g}} {scale.unit}<extra></extra>",
        )
    )
    for name, symbol in ((rival.name, "diamond"), (proposed.name, "circle")):
        gap_L = np.maximum(1 - bound_L / cost_L[name], 0.0)
        figure.add_trace(
            go.Scatter(
                name=escape(name),
                x=layers,
                y=cost_L[name] / scale.factor,
                customdata=100 * gap_L,
                mode="markers",
                marker={"symbol": symbol, "size": 10, "color": COLOURS.get(name, GREY)},
                hovertemplate=(
                    f"layer %{{x}}, {hover_name(name)}: %{{y:,.4~g}} {scale.unit}, at most "
                    "%{customdata:.1f} % above the best<extra></extra>"
                ),
            )
        )
    figure.update_xaxes(
        title=axis_title("MoE layer"), dtick=1 if bound_L.size <= 31 else None, showgrid=False
    )
    label = (
        "layer's time" if scale.unit.endswith("s") else "layer's cost" if story.measures_step else "balance"
    )
    figure.update_yaxes(title=axis_title(f"{label}, mean of fitted windows ({scale.unit})"))
    return figure


def _layer_costs(story: Story, result: PolicyResult) -> FloatArray:
    fitted = result.fitted
    if not story.measures_step:
        return np.asarray(fitted.balance_WL.mean(axis=0))
    return np.asarray((fitted.experts_WL + fitted.dispatch_WL + fitted.combine_WL).mean(axis=0))


def bound_sentence(story: Story, *, against: str | None = None) -> str:
    """Say how far the proposed policy and another can be from the best placement on the fitted windows."""
    rival, proposed = _reference(story, against), story.proposed
    theirs, mine = (percent(story.gap_of(result)) for result in (rival, proposed))
    if story.gap_of(proposed) < 5e-4:
        return (
            f"{capital(proposed.name)} is proved optimal on the fitted windows; {rival.name} could be "
            f"{theirs} lower there."
        )
    return (
        f"On the fitted windows no placement can be more than {mine} below {proposed.name}; for {rival.name} "
        f"that is {theirs}."
    )


def replicas_figure(replication: Replication) -> go.Figure:
    """Draw every policy's held-out objective against spare slots per layer."""
    stories = [Story(comparison=each) for each in replication.comparisons]
    scale = stories[0].objective_scale
    figure = empty_figure(height=360, legend=legend_above(), margin={"l": 8, "r": 48, "t": 40, "b": 8})
    base = replication.results(replication.names[0])[0].held_out.objective
    first = f"{replication.names[0]}, {plural(replication.spare_slots[0], 'spare slot')}"
    for name in replication.names:
        values = [result.held_out.objective for result in replication.results(name)]
        changes = [relative_change(value, base) for value in values]
        figure.add_trace(
            go.Scatter(
                name=escape(name),
                x=list(replication.spare_slots),
                y=[value / scale.factor for value in values],
                text=[percent(change, signed=True) for change in changes],
                mode="lines+markers+text",
                textposition="top right",
                line={"color": COLOURS.get(name, GREY), "width": 2},
                marker={"size": 9, "symbol": "circle" if name == "auto" else "diamond"},
                hovertemplate=(
                    f"{hover_name(name)}, %{{x}} spare slots: "
                    f"%{{y:,.4~g}} {scale.unit}, %{{text}} against {hover_name(first)}<extra></extra>"
                ),
                cliponaxis=False,
            )
        )
    figure.update_xaxes(
        title=axis_title("spare slots per layer (number)"),
        tickvals=list(replication.spare_slots),
    )
    figure.update_yaxes(title=axis_title(f"{stories[0].objective_label}, held out ({scale.unit})"))
    return figure


def replicas_sentence(replication: Replication) -> str:
    """Say what the best number of spare slots gains for every policy."""
    phrases = []
    for name in replication.names:
        values = np.array([result.held_out.objective for result in replication.results(name)])
        best = int(values.argmin())
        gain = 1 - values[best] / values[0] if values[0] > 0 else 0.0
        slots = replication.spare_slots[best] - replication.spare_slots[0]
        bought = f"{plural(slots, 'more slot')} save {percent(gain)}" if slots else "more slots save nothing"
        phrases.append(f"{bought} with {name}")
    story = Story(comparison=replication.comparisons[0])
    return f"Of the held-out {story.objective_label}, {' and '.join(phrases)}."


def timelines_figure(timelines: Mapping[str, Timeline], *, first_layer: int = 0) -> go.Figure:
    """Draw who is busy when in one step, one timeline above the other, on the same clock.

    Parameters
    ----------
    timelines
        By the name of the placement, of the same window.
    first_layer
        Layer to begin with; at most `MAX_LAYERS` are drawn, of the `MAX_DEVICES` waited for longest.
    """
    longest = max(each.step for each in timelines.values())
    scale = Scale.of(longest, next(iter(timelines.values())).unit)
    titles = [
        f"<b>{escape(name)}</b>: {scale.text(each.step)} {scale.unit}, "
        f"{percent(each.idle_share, digits=0)} of it spent waiting"
        for name, each in timelines.items()
    ]
    figure = make_subplots(
        rows=len(timelines), cols=1, shared_xaxes=True, vertical_spacing=0.14, subplot_titles=titles
    )
    rows = 0
    for row, each in enumerate(timelines.values(), start=1):
        devices = _chosen_devices(each)
        rows = max(rows, devices.size)
        for bar in _bars(each, devices, scale, first_layer, legend=row == 1):
            figure.add_trace(bar, row=row, col=1)
    figure.layout.template = {}
    figure.update_layout(
        barmode="overlay",
        bargap=0.2,
        height=int(np.clip(120 + len(timelines) * (60 + 30 * rows), 320, 1100)),
        legend={**legend_above(), "y": 1.09},
        margin={"l": 8, "r": 16, "t": 72, "b": 8},
    )
    figure.update_annotations(x=0, xanchor="left", font={"size": 13})
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, title=axis_title("device"))
    figure.update_xaxes(range=_time_range(timelines.values(), first_layer, scale))
    figure.update_xaxes(
        title=axis_title(f"time since the first layer's begin ({scale.unit})"), row=len(timelines)
    )
    return figure


def _chosen_devices(timeline: Timeline) -> npt.NDArray[np.int64]:
    waited_D = timeline.waiting_DD.sum(axis=0)
    return np.sort(np.argsort(-waited_D, kind="stable")[:MAX_DEVICES])


def _time_range(timelines: Any, first_layer: int, scale: Scale) -> list[float]:
    begins, ends = [], []
    for each in timelines:
        last = min(first_layer + MAX_LAYERS, each.busy_LPD.shape[0]) - 1
        begins.append(float(each.begin_LP[first_layer, 0]))
        ends.append(float(each.begin_LP[last, -1] + each.length_LP[last, -1]))
    return [min(begins) / scale.factor, 1.005 * max(ends) / scale.factor]


def _bars(
    timeline: Timeline, devices: npt.NDArray[np.int64], scale: Scale, first_layer: int, *, legend: bool
) -> list[go.Bar]:
    """One trace per phase, then the waiting; every layer and device is a bar in it."""
    layers = np.arange(first_layer, min(first_layer + MAX_LAYERS, timeline.busy_LPD.shape[0]))
    busy, idle = (array[layers][:, :, devices] for array in (timeline.busy_LPD, timeline.idle_LPD))
    begin = np.broadcast_to(timeline.begin_LP[layers][:, :, None], busy.shape)
    name_D = [str(device) for device in devices]
    bars = []
    for phase, name in enumerate(PHASES):
        if busy[:, phase].any():
            bars.append(
                go.Bar(
                    name=name,
                    orientation="h",
                    y=name_D * layers.size,
                    x=busy[:, phase].ravel() / scale.factor,
                    base=begin[:, phase].ravel() / scale.factor,
                    customdata=np.repeat(layers, devices.size),
                    marker={"color": PHASE_COLOURS[name]},
                    legendgroup=name,
                    showlegend=legend,
                    hovertemplate=(
                        f"device %{{y}}, layer %{{customdata}}: {name} "
                        f"%{{x:,.3~g}} {scale.unit}<extra></extra>"
                    ),
                )
            )
    slowest = np.broadcast_to(timeline.slowest_LP[layers][:, :, None], busy.shape)
    waits = idle.ravel() > 0
    bars.append(
        go.Bar(
            name="waiting for the slowest device",
            orientation="h",
            y=np.array(name_D * (layers.size * 3))[waits].tolist(),
            x=idle.ravel()[waits] / scale.factor,
            base=(begin + busy).ravel()[waits] / scale.factor,
            customdata=slowest.ravel()[waits],
            marker={"color": WAITING},
            legendgroup="waiting",
            showlegend=legend,
            hovertemplate=(
                f"device %{{y}} waits %{{x:,.3~g}} {scale.unit} for device %{{customdata}}<extra></extra>"
            ),
        )
    )
    return bars


def timelines_sentence(timelines: Mapping[str, Timeline]) -> str:
    """Say what share of the step devices wait, and for whom most."""
    phrases = []
    for name, each in timelines.items():
        waited_D = each.waiting_DD.sum(axis=0)
        total = float(waited_D.sum())
        most = int(waited_D.argmax())
        share = percent(waited_D[most] / total, digits=0) if total > 0 else percent(0.0, digits=0)
        phrases.append(
            f"under {name} devices wait {percent(each.idle_share, digits=0)} of the step, "
            f"{share} of that for device {most}"
        )
    shown = next(iter(timelines.values())).busy_LPD.shape
    cut = shown[0] > MAX_LAYERS or shown[2] > MAX_DEVICES
    drawn = f" Drawn are {MAX_LAYERS} layers and {MAX_DEVICES} devices at most." if cut else ""
    return f"{capital('; '.join(phrases))}.{drawn}"


def waiting_figure(timelines: Mapping[str, Timeline]) -> go.Figure:
    """Draw how long each device (row) waits for each other one (column) in a step, one map a placement."""
    top = max(float(each.waiting_DD.max()) for each in timelines.values())
    scale = Scale.of(top, next(iter(timelines.values())).unit)
    totals = [
        f"{scale.text(float(each.waiting_DD.sum()), digits=3)} {scale.unit}" for each in timelines.values()
    ]
    figure = make_subplots(
        rows=1,
        cols=len(timelines),
        shared_yaxes=True,
        horizontal_spacing=0.06,
        subplot_titles=[
            f"<b>{escape(name)}</b>: {total}" for name, total in zip(timelines, totals, strict=True)
        ],
    )
    for column, each in enumerate(timelines.values(), start=1):
        waiting_DD = each.waiting_DD / scale.factor
        names = [str(device) for device in range(waiting_DD.shape[0])]
        few = waiting_DD.shape[0] <= 8
        figure.add_trace(
            go.Heatmap(
                z=waiting_DD,
                x=names,
                y=names,
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
                texttemplate="%{z:.2~f}" if few else None,
                hovertemplate=(
                    f"device %{{y}} waits %{{z:,.3~g}} {scale.unit} for device %{{x}}<extra></extra>"
                ),
            ),
            row=1,
            col=column,
        )
    bar = {"thickness": 12, "outlinewidth": 0, "title": {"text": scale.unit, "side": "top"}, "nticks": 6}
    axis = {"type": "category", "showgrid": False, "nticks": 16}
    figure.layout.template = {}
    figure.update_layout(
        height=int(np.clip(140 + 34 * len(names), 280, 560)),
        margin={"l": 8, "r": 8, "t": 34, "b": 8},
        coloraxis={
            "cmin": 0,
            "cmax": top / scale.factor or 1,
            "colorscale": _pale_to_blue(),
            "colorbar": bar,
        },
    )
    figure.update_annotations(font={"size": 13})
    figure.update_xaxes(title=axis_title("device waited for"), **axis)
    figure.update_yaxes(autorange="reversed", **axis)
    figure.update_yaxes(title=axis_title("device that waits"), col=1)
    return figure


def _pale_to_blue() -> Sequence[tuple[float, str]]:
    return [(0.0, PALE), (1.0, BLUE)]
