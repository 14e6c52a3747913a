"""How a solve went: its best objective and lower bound over time, a mark for every improvement."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from placement.report.figures.look import (
    BLUE,
    GREY,
    ORANGE,
    axis_title,
    empty_figure,
    hover_name,
    legend_above,
)
from placement.report.numbers import Scale
from placement.solution import relative_gap

__all__ = ["incumbents_figure"]

SYMBOLS = ("square", "diamond", "triangle-up", "x", "star", "cross")
"""Of the solvers beside the search, in order of their first incumbent."""


def incumbents_figure(
    *,
    elapsed_s: Sequence[float],
    objective: Sequence[float],
    lower_bound: Sequence[float],
    solver: Sequence[str],
    label: str,
    scale: Scale,
) -> go.Figure:
    """Draw the best objective and the lower bound against the solve's seconds; a mark per improvement.

    Parameters
    ----------
    elapsed_s, objective, lower_bound, solver
        Of every incumbent, in order: seconds since the solve began, its objective and the bound known by then
        in the original unit, who found it. Not empty.
    label
        What the objective is called.
    scale
        Unit in which objectives are shown.
    """
    shown = [value / scale.factor for value in objective]
    # A bound of 0 says nothing, and would take most of the axis.
    bound = [value / scale.factor if value > 0 else None for value in lower_bound]
    step = {"shape": "hv", "width": 2}
    traces = [
        go.Scatter(
            name="best objective", x=list(elapsed_s), y=shown, mode="lines", line={**step, "color": GREY},
            hoverinfo="skip",
        ),
        *_solver_marks(elapsed_s, shown, _gaps(objective, lower_bound), solver, unit=scale.unit),
        go.Scatter(
            name="lower bound", x=list(elapsed_s), y=bound, mode="lines" if len(bound) > 1 else "markers",
            line={**step, "color": ORANGE, "dash": "dash"}, marker={"symbol": "line-ew-open", "size": 14},
            hovertemplate=f"bound %{{y:,.5~g}} {hover_name(scale.unit)}<extra></extra>",
        ),
    ]  # fmt: skip
    figure = empty_figure(
        *traces, height=360, legend=legend_above(), margin={"l": 8, "r": 16, "t": 56, "b": 8}
    )
    log = min(elapsed_s) > 0 and max(elapsed_s) / min(elapsed_s) > 100
    figure.update_xaxes(title=axis_title("time since the solve began (s)"), type="log" if log else "linear")
    figure.update_xaxes(rangemode="normal" if log else "tozero")
    figure.update_yaxes(title=axis_title(f"{label} ({scale.unit})"))
    if log:
        figure.update_xaxes(dtick=1, tickformat="~g")
    return figure


def _gaps(objective: Sequence[float], lower_bound: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return the gap of each incumbent in per cent."""
    pairs = zip(objective, lower_bound, strict=True)
    return np.array([100 * relative_gap(value, bound) for value, bound in pairs])


def _solver_marks(
    elapsed_s: Sequence[float],
    shown: Sequence[float],
    gap: npt.NDArray[np.float64],
    solver: Sequence[str],
    *,
    unit: str,
) -> list[go.Scatter]:
    others = [name for name in dict.fromkeys(solver) if name != "search"]
    marks = []
    for name in dict.fromkeys(solver):
        own = [index for index, found_by in enumerate(solver) if found_by == name]
        is_search = name == "search"
        marks.append(
            go.Scatter(
                name=f"found by {escape(name)}",
                mode="markers",
                x=[elapsed_s[index] for index in own],
                y=[shown[index] for index in own],
                customdata=[float(gap[index]) for index in own],
                marker={
                    "size": 9,
                    "symbol": "circle" if is_search else SYMBOLS[others.index(name) % len(SYMBOLS)],
                    "color": BLUE if is_search else GREY,
                },
                hovertemplate=(
                    f"{hover_name(name)}: %{{y:,.5~g}} {hover_name(unit)} after %{{x:.3~g}} s"
                    "<br>gap %{customdata:.1f} %<extra></extra>"
                ),
            )
        )
    return marks
