"""The figures of routing: who is busy, when and for what traffic, who goes together, and how much is enough.

Shape letters: W windows, L MoE layers, E experts, C kinds of traffic, N lags or numbers of windows, R draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from placement.report.figures.heat import load_colours, relative_load
from placement.report.figures.look import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    axis_title,
    diverging,
    empty_figure,
    faint,
    hover_name,
    legend_above,
    number_ticks,
)

__all__ = [
    "ageing_figure",
    "drift_figure",
    "information_figure",
    "kind_distances_figure",
    "kind_loads_figure",
    "learning_figure",
    "lift_figure",
    "variation_figure",
    "window_loads_figure",
]

FloatArray = npt.NDArray[np.float64]

_MOST_COLUMNS = 512
_LEAST_LIFT = 1 / 16


def window_loads_figure(load_WLE: npt.ArrayLike, *, layer: int) -> go.Figure:
    """Draw how one layer's loads move: experts by windows, over the mean expert of each window.

    Parameters
    ----------
    load_WLE
        Token-expert pairs, ``[windows, layers, experts]``, in the order of time. Neighbours are added up
        where there are more than can be told apart.
    layer
        Which layer.
    """
    load_WE = np.asarray(load_WLE)[:, layer].astype(np.float64)
    first_C = np.arange(0, len(load_WE), -(-len(load_WE) // _MOST_COLUMNS))
    relative_CE = relative_load(np.add.reduceat(load_WE, first_C, axis=0))
    trace = go.Heatmap(
        x=first_C,
        z=_cells(relative_CE.T),
        **load_colours(relative_CE),
        hovertemplate="window %{x}, expert %{y}<br>%{z:.2f} times the mean expert's load<extra></extra>",
    )
    figure = _map(trace, rows=relative_CE.shape[1])
    figure.update_xaxes(title=axis_title("window, in the order of time (number)"))
    figure.update_yaxes(
        title=axis_title(f"expert of layer {layer} (number)"), **number_ticks(relative_CE.shape[1])
    )
    return figure


def variation_figure(steady_L: npt.ArrayLike, moving_L: npt.ArrayLike, chance_L: npt.ArrayLike) -> go.Figure:
    """Draw what each layer's unevenness is made of: typical distance from even, divided by its causes.

    Parameters
    ----------
    steady_L, moving_L, chance_L
        Parts of the mean square distance of an expert's relative load from 1.
    """
    parts = {
        "stays, and can be balanced once": (np.asarray(steady_L), BLUE),
        "moves from window to window": (np.asarray(moving_L), ORANGE),
        "chance": (np.asarray(chance_L), GREY),
    }
    total_L = np.sum([part_L for part_L, _ in parts.values()], axis=0)
    # The parts of a square add up, its root is what can be read: each part gets its share of the root.
    root_L = 100 * np.sqrt(total_L) / np.where(total_L > 0, total_L, 1)
    figure = empty_figure(
        *(
            go.Bar(
                name=name,
                x=np.arange(part_L.size),
                y=part_L * root_L,
                customdata=100 * part_L / np.where(total_L > 0, total_L, 1),
                marker={"color": colour},
                hovertemplate=f"layer %{{x}}: %{{customdata:.0f}} % of the unevenness {name}<extra></extra>",
            )
            for name, (part_L, colour) in parts.items()
        ),
        height=320,
        barmode="stack",
        bargap=0.35,
        legend=legend_above(),
        margin={"l": 8, "r": 16, "t": 40, "b": 8},
    )
    figure.update_xaxes(title=axis_title("MoE layer (number)"), showgrid=False, **number_ticks(total_L.size))
    figure.update_yaxes(title=axis_title("distance from even (% of mean)"), rangemode="tozero")
    return figure


def kind_loads_figure(names: Sequence[str], load_CLE: npt.ArrayLike, *, layer: int) -> go.Figure:
    """Draw one layer's loads by kind of traffic: kinds by experts, over the mean expert of each kind."""
    relative_CE = relative_load(np.asarray(load_CLE, dtype=np.float64)[:, layer])
    trace = go.Heatmap(
        y=[escape(name) for name in names],
        z=_cells(relative_CE),
        **load_colours(relative_CE),
        **_gaps(relative_CE),
        hovertemplate="%{y}, expert %{x}<br>%{z:.2f} times the mean expert's load<extra></extra>",
    )
    figure = _map(trace, rows=len(relative_CE), row_height=24)
    figure.update_xaxes(
        title=axis_title(f"expert of layer {layer} (number)"), **number_ticks(relative_CE.shape[1])
    )
    figure.update_yaxes(type="category")
    return figure


def kind_distances_figure(
    names: Sequence[str], distance_C: npt.ArrayLike, *, null_C: npt.ArrayLike, null_high_C: npt.ArrayLike
) -> go.Figure:
    """Draw how far each kind's load is from that of all others, and how far chance would take it.

    Parameters
    ----------
    names
        Names of the kinds.
    distance_C
        Total variation distance, a share.
    null_C, null_high_C
        Mean and largest distance of shuffled kinds.
    """
    order = np.argsort(np.asarray(distance_C))[::-1]
    labels = [escape(names[kind]) for kind in order]
    null, high = (100 * np.asarray(values)[order] for values in (null_C, null_high_C))
    figure = empty_figure(
        go.Bar(
            name="this trace",
            orientation="h",
            y=labels,
            x=100 * np.asarray(distance_C)[order],
            marker={"color": BLUE},
            hovertemplate="%{y}: %{x:.1f} % of its load is at other experts<extra></extra>",
        ),
        go.Scatter(
            name="chance: mean and largest of the shuffles",
            mode="markers",
            y=labels,
            x=null,
            error_x={
                "type": "data",
                "array": high - null,
                "arrayminus": np.zeros_like(null),
                "color": ORANGE,
            },
            marker={"color": ORANGE, "symbol": "line-ns-open", "size": 14, "line": {"width": 3}},
            hovertemplate="%{y}: %{x:.1f} % by chance<extra></extra>",
        ),
        height=110 + 28 * len(labels),
        bargap=0.3,
        legend=legend_above(),
        margin={"l": 8, "r": 16, "t": 40, "b": 8},
    )
    figure.update_xaxes(title=axis_title("load at other experts than the rest's (%)"), rangemode="tozero")
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure


def drift_figure(recent_W: npt.ArrayLike, earlier_W: npt.ArrayLike, *, span: int, null: float) -> go.Figure:
    """Draw how far each window's load is from the last `span` windows', and from that of all before it.

    Parameters
    ----------
    recent_W, earlier_W
        Total variation distances, shares; NaN where there was none before.
    span
        Windows that count as recent.
    null
        Mean distance from recent windows if windows came in random order.
    """
    recent = "the window before" if span == 1 else f"the {span} windows before"
    figure = empty_figure(
        _line("from all windows before", np.asarray(earlier_W), colour=GREY),
        _line(f"from {recent}", np.asarray(recent_W), colour=BLUE),
        height=320,
        legend=legend_above(),
        margin={"l": 8, "r": 16, "t": 40, "b": 8},
    )
    figure.add_trace(
        _level("if windows came in random order", 100 * null, (0, np.size(recent_W) - 1), ORANGE)
    )
    figure.update_xaxes(title=axis_title("window, in the order of time (number)"))
    figure.update_yaxes(title=axis_title("load at other experts (%)"), rangemode="tozero")
    return figure


def ageing_figure(
    lag_N: npt.ArrayLike, distance_N: npt.ArrayLike, *, null: float, half_life: float | None
) -> go.Figure:
    """Draw how far windows are from those seen so many windows before.

    Parameters
    ----------
    lag_N
        Windows between seeing and being judged.
    distance_N
        Mean total variation distance, a share.
    null
        That of windows in random order.
    half_life
        Lag at which half of what recency tells is lost, if it is.
    """
    lag, distance = np.asarray(lag_N), np.asarray(distance_N)
    figure = empty_figure(
        go.Scatter(
            name="from windows seen so long before",
            x=lag,
            y=100 * distance,
            mode="lines+markers",
            line={"color": BLUE, "width": 2},
            marker={"size": 7},
            hovertemplate="%{x} windows before: %{y:.1f} % at other experts<extra></extra>",
        ),
        _level("if windows came in random order", 100 * null, (lag[0], lag[-1]), ORANGE),
        height=360,
        legend={**legend_above(), "y": 1.08},
        margin={"l": 8, "r": 16, "t": 64, "b": 8},
    )
    if half_life is not None:
        figure.add_vline(x=half_life, line={"color": GREEN, "width": 2, "dash": "dot"})
        figure.add_annotation(
            x=np.log10(half_life), y=1, yref="y domain", yanchor="bottom", showarrow=False,
            text=f"half is lost: {half_life:.2g} windows",
        )  # fmt: skip
    figure.update_xaxes(title=axis_title("age of what is known (windows)"), **_log_ticks(lag))
    figure.update_yaxes(title=axis_title("load at other experts (%)"), rangemode="tozero")
    return figure


def lift_figure(lift_EE: npt.ArrayLike, exceeds_EE: npt.ArrayLike, *, layer: int, other: int) -> go.Figure:
    """Draw how much more often pairs of experts go together than chance explains; white pairs do not.

    Parameters
    ----------
    lift_EE
        Observed over expected by loads alone; NaN where unknown.
    exceeds_EE
        Pairs that differ from chance; all others are left white.
    layer, other
        MoE layers of rows and columns; the same for pairs within a layer.
    """
    lift, exceeds = np.asarray(lift_EE, dtype=np.float64), np.asarray(exceeds_EE, dtype=np.bool_)
    power = np.log2(np.maximum(lift, _LEAST_LIFT))
    # Rare pairs may be rare without end; the common ones set the scale.
    above = power[exceeds & (power > 0)]
    top = max(1.0, float(np.quantile(above, 0.99))) if above.size else 1.0
    ticks = list(range(-int(top), int(top) + 1))
    known = np.isfinite(lift)
    trace = go.Heatmap(
        z=_cells(np.where(exceeds, power, np.where(known, 0.0, np.nan))),
        customdata=_cells(lift),
        zmin=-top,
        zmax=top,
        colorscale=diverging(0.5),
        colorbar=_colour_bar(
            "times as<br>often", tickvals=ticks, ticktext=[_power_text(tick) for tick in ticks]
        ),
        hoverongaps=False,
        **_gaps(lift),
        hovertemplate=(
            f"expert %{{y}} of layer {layer} and expert %{{x}} of layer {other}<br>"
            "%{customdata:.2f} times as often as by chance<extra></extra>"
        ),
    )
    figure = _map(trace, rows=len(lift), row_height=22)
    figure.update_xaxes(title=axis_title(f"expert of layer {other} (number)"), **number_ticks(lift.shape[1]))
    figure.update_yaxes(title=axis_title(f"expert of layer {layer} (number)"), **number_ticks(len(lift)))
    return figure


def information_figure(
    bits: npt.ArrayLike,
    *,
    null_bits: npt.ArrayLike,
    null_deviation_bits: npt.ArrayLike,
    labels: Sequence[str],
    label: str,
) -> go.Figure:
    """Draw the mutual information of pairs of experts, and what shuffled routing has.

    Parameters
    ----------
    bits, null_bits, null_deviation_bits
        Mutual information in bits as counted; mean and standard deviation of the shuffles.
    labels
        What each value is of.
    label
        Title of their axis.
    """
    names = [escape(name) for name in labels]
    deviation = 3 * np.asarray(null_deviation_bits)
    figure = empty_figure(
        go.Bar(
            name="this trace",
            x=names,
            y=np.asarray(bits),
            marker={"color": BLUE},
            hovertemplate="%{x}: %{y:.3f} bits<extra></extra>",
        ),
        go.Scatter(
            name="shuffled: mean, three standard deviations each way",
            mode="markers",
            x=names,
            y=np.asarray(null_bits),
            customdata=np.asarray(null_deviation_bits),
            error_y={"type": "data", "array": deviation, "color": ORANGE, "thickness": 2},
            marker={"color": ORANGE, "symbol": "line-ew-open", "size": 18, "line": {"width": 3}},
            hovertemplate="%{x}, shuffled: %{y:.4f} bits, deviation %{customdata:.4f}<extra></extra>",
        ),
        height=320,
        bargap=0.45,
        legend=legend_above(),
        margin={"l": 8, "r": 16, "t": 40, "b": 8},
    )
    figure.update_xaxes(title=axis_title(label), type="category", showgrid=False, nticks=32)
    figure.update_yaxes(title=axis_title("mutual information (bits)"), rangemode="tozero")
    return figure


def learning_figure(
    windows_N: npt.ArrayLike,
    *,
    spread_RN: npt.ArrayLike,
    consecutive_RN: npt.ArrayLike,
    fitted_RN: npt.ArrayLike,
    unfitted: float,
    label: str,
) -> go.Figure:
    """Draw what fitting to more windows brings on windows held out: every draw, and their mean.

    Parameters
    ----------
    windows_N
        Numbers of windows fitted.
    spread_RN, consecutive_RN
        Held-out value of every draw, of windows spread over time and of consecutive ones.
    fitted_RN
        Value on the spread windows themselves: what a fit promises.
    unfitted
        Held-out value without any fit.
    label
        Title of the values' axis, with their unit.
    """
    windows = np.asarray(windows_N)
    figure = empty_figure(height=400, legend=legend_above(), margin={"l": 8, "r": 16, "t": 40, "b": 8})
    ways = (
        ("consecutive windows", consecutive_RN, ORANGE, "solid"),
        ("windows spread over the trace", spread_RN, BLUE, "solid"),
        ("the same, on the windows fitted", fitted_RN, GREY, "dot"),
    )
    for name, values, colour, dash in ways:
        value_RN = np.asarray(values, dtype=np.float64)
        figure.add_trace(
            go.Scatter(
                name=name,
                x=windows,
                y=value_RN.mean(axis=0),
                mode="lines+markers",
                line={"color": colour, "width": 2, "dash": dash},
                marker={"size": 8},
                hovertemplate=f"%{{x}} windows, {hover_name(name)}: %{{y:.4~g}}<extra></extra>",
            )
        )
        if dash == "solid":
            figure.add_trace(_draws(windows, value_RN, colour=colour))
    figure.add_trace(_level("experts in order, no fit", unfitted, (windows[0], windows[-1]), GREY))
    figure.update_xaxes(title=axis_title("windows fitted (number)"), **_log_ticks(windows))
    figure.update_yaxes(title=axis_title(label))
    return figure


def _draws(windows_N: npt.NDArray[Any], value_RN: FloatArray, *, colour: str) -> go.Scatter:
    return go.Scatter(
        x=np.tile(windows_N, len(value_RN)),
        y=value_RN.ravel(),
        mode="markers",
        marker={"color": faint(colour), "size": 5},
        hoverinfo="skip",
        showlegend=False,
    )


def _map(trace: go.Heatmap, *, rows: int, row_height: int = 20) -> go.Figure:
    figure = empty_figure(trace, height=int(np.clip(row_height * rows + 110, 240, 640)))
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(showgrid=False, zeroline=False, autorange="reversed")
    return figure


def _cells(values: FloatArray) -> npt.NDArray[np.float32]:
    return values.astype(np.float32)


def _gaps(cells: FloatArray) -> dict[str, int]:
    """Return gaps between the cells of small maps."""
    gap = 1 if max(cells.shape) <= 64 else 0
    return {"xgap": gap, "ygap": gap}


def _colour_bar(title: str, **more: Any) -> dict[str, Any]:
    return {"thickness": 12, "outlinewidth": 0, "title": {"text": title, "side": "top"}, **more}


def _power_text(power: int) -> str:
    return f"{2**power}" if power >= 0 else f"1/{2**-power}"


def _log_ticks(values: npt.NDArray[Any]) -> dict[str, Any]:
    """Return a logarithmic axis that names powers of two."""
    powers = 2 ** np.arange(int(np.log2(max(1, values.max()))) + 1)
    return {"type": "log", "tickvals": powers, "ticktext": [f"{power:,}" for power in powers]}


def _line(name: str, value_W: FloatArray, *, colour: str) -> go.Scatter:
    return go.Scatter(
        name=name,
        x=np.arange(value_W.size),
        y=100 * value_W,
        mode="lines",
        line={"color": colour, "width": 2},
        hovertemplate=f"window %{{x}}, {hover_name(name)}: %{{y:.1f}} %<extra></extra>",
    )


def _level(name: str, value: float, ends: tuple[float, float], colour: str) -> go.Scatter:
    """Return a dashed line across."""
    return go.Scatter(
        name=name,
        x=ends,
        y=[value, value],
        mode="lines",
        line={"color": colour, "width": 2, "dash": "dash"},
        hovertemplate=f"{hover_name(name)}: %{{y:.4~g}}<extra></extra>",
    )
