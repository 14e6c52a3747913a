"""How a running placement does: balance of posted windows over time, against what was predicted.

Shape letters: W windows, V stretches of windows under one version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from placement.report.figures.look import BLUE, GREY, ORANGE, axis_title, empty_figure, legend_above

__all__ = ["DriftLine", "health_figure"]

Array = npt.NDArray[np.float64]

MOST_NAMED = 8
"""Versions whose change is named above the figure; older ones only have their line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftLine:
    """When a refresh is due: drawn over the windows that drift was measured on.

    Parameters
    ----------
    num_windows
        Latest windows that it was measured on.
    due
        Balance above which a refresh is due.
    """

    num_windows: int
    due: float


def health_figure(
    *,
    window_W: Sequence[int],
    balance_W: npt.ArrayLike,
    version_W: Sequence[int],
    predicted: Mapping[int, float | None],
    drift: DriftLine | None = None,
) -> go.Figure:
    """Draw the balance (fullest / mean device load) of posted windows, and where the placement changed.

    Parameters
    ----------
    window_W
        Numbers of the windows, ``[windows]``, in order of arrival; at least one.
    balance_W
        Balance of each, mean over layers.
    version_W
        Version of the placement that it is of.
    predicted
        Balance that versions promised, by version; None where one promised nothing.
    drift
        When a refresh is due.
    """
    place_W = np.arange(len(window_W))
    starts_V = [i for i in place_W.tolist() if i == 0 or version_W[i] != version_W[i - 1]]
    traces = [_balances(window_W, np.asarray(balance_W, dtype=np.float64), version_W)]
    traces += _predictions(starts_V, version_W, predicted)
    if drift is not None:
        traces.append(_due(drift, len(window_W)))
    figure = empty_figure(
        *traces,
        height=360,
        showlegend=True,
        legend={**legend_above(), "y": 1.12},
        margin={"l": 8, "r": 16, "t": 84, "b": 8},
    )
    figure.update_xaxes(
        title=axis_title("window (number, in order of arrival)"), showgrid=False, zeroline=False
    )
    figure.update_xaxes(**_window_ticks(window_W), range=[-0.6, len(window_W) - 0.4])
    figure.update_yaxes(title=axis_title("balance (fullest / mean device load)"))
    _mark_versions(figure, starts_V, version_W)
    return figure


def _window_ticks(window_W: Sequence[int]) -> dict[str, object]:
    """Name some windows: numbers may jump, so that the axis counts arrivals."""
    step = max(1, -(-len(window_W) // 8))
    shown = range(0, len(window_W), step)
    return {"tickvals": list(shown), "ticktext": [str(window_W[i]) for i in shown]}


def _balances(window_W: Sequence[int], balance_W: Array, version_W: Sequence[int]) -> go.Scatter:
    return go.Scatter(
        name="posted windows",
        mode="lines+markers",
        x=list(range(len(window_W))),
        y=balance_W,
        customdata=[list(pair) for pair in zip(window_W, version_W, strict=True)],
        line={"width": 2, "color": BLUE},
        marker={"size": 6, "color": BLUE},
        hovertemplate=(
            "window %{customdata[0]}, version %{customdata[1]}<br>balance %{y:.3f}<extra></extra>"
        ),
    )


def _predictions(
    starts_V: Sequence[int], version_W: Sequence[int], predicted: Mapping[int, float | None]
) -> list[go.Scatter]:
    """Return one line that is broken where the version changes."""
    x: list[float | None] = []
    y: list[float | None] = []
    ends_V = [*starts_V[1:], len(version_W)]
    for start, end in zip(starts_V, ends_V, strict=True):
        value = predicted.get(version_W[start])
        if value is not None:
            x += [start - 0.5, end - 0.5, None]
            y += [value, value, None]
    if not x:
        return []
    return [
        go.Scatter(
            name="predicted", mode="lines", x=x[:-1], y=y[:-1], connectgaps=False,
            line={"width": 2, "color": ORANGE, "dash": "dash"},
            hovertemplate="predicted balance %{y:.3f}<extra></extra>",
        )
    ]  # fmt: skip


def _due(drift: DriftLine, num_windows: int) -> go.Scatter:
    first = max(0, num_windows - drift.num_windows)
    return go.Scatter(
        name="a refresh is due above",
        mode="lines",
        x=[first - 0.5, num_windows - 0.5],
        y=[drift.due, drift.due],
        line={"width": 2, "color": GREY, "dash": "dot"},
        hovertemplate="a refresh is due above %{y:.3f}<extra></extra>",
    )


def _mark_versions(figure: go.Figure, starts_V: Sequence[int], version_W: Sequence[int]) -> None:
    for start in starts_V:
        if start:
            figure.add_shape(
                type="line", x0=start - 0.5, x1=start - 0.5, y0=0, y1=1, yref="paper",
                line={"width": 1, "color": GREY},
            )  # fmt: skip
    for start in starts_V[-MOST_NAMED:]:
        figure.add_annotation(
            x=start - 0.5, y=1, yref="paper", yanchor="bottom", xanchor="left", xshift=2, showarrow=False,
            text=f"version {version_W[start]}",
        )  # fmt: skip
