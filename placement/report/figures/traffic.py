"""A trace at a glance: which experts are busy, and how that changes from window to window.

Shape letters: W windows, L MoE layers, E logical experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from placement.report.figures.heat import load_colours
from placement.report.figures.look import (
    BLUE,
    GREY,
    ORANGE,
    axis_title,
    empty_figure,
    legend_above,
)

__all__ = ["distance_figure", "load_figure", "windows_figure"]

Array = npt.NDArray[np.float64]

MOST_LAYERS, MOST_EXPERTS = 160, 512
"""Rows and columns of a map; more are narrower than a pixel, and neighbours share one."""
MOST_POINTS = 1000


def load_figure(load_LE: npt.ArrayLike) -> go.Figure:
    """Draw the load of every expert relative to its layer's mean, ``[layers, experts]`` pairs of any total.

    Where there are too many to draw, a cell shows the busiest of some neighbours.
    """
    share_LE = _relative(np.asarray(load_LE, dtype=np.float64))
    layers, experts = (
        _starts(n, most) for n, most in zip(share_LE.shape, (MOST_LAYERS, MOST_EXPERTS), strict=True)
    )
    cells = np.maximum.reduceat(np.maximum.reduceat(share_LE, layers, axis=0), experts, axis=1)
    trace = go.Heatmap(
        z=cells.astype(np.float32),
        x=experts,
        y=layers,
        **load_colours(share_LE),
        hovertemplate="layer %{y}, expert %{x}<br>%{z:.2f} times the layer's mean<extra></extra>",
    )
    figure = empty_figure(trace, height=int(np.clip(9 * layers.size + 130, 240, 620)))
    figure.update_xaxes(title=axis_title("expert (number)"), showgrid=False, zeroline=False)
    figure.update_yaxes(title=axis_title("MoE layer"), autorange="reversed", showgrid=False, zeroline=False)
    return figure


def windows_figure(load_WLE: npt.ArrayLike) -> go.Figure:
    """Draw the busiest expert of every window relative to the mean: mean over layers, and the worst layer."""
    busiest_WL = _relative(np.asarray(load_WLE, dtype=np.float64)).max(axis=2)
    figure = empty_figure(
        _line("mean over layers", busiest_WL.mean(axis=1), colour=BLUE, unit=" times the mean expert"),
        _line("worst layer", busiest_WL.max(axis=1), colour=ORANGE, unit=" times the mean expert"),
        height=320,
        legend=legend_above(),
        margin={"l": 8, "r": 16, "t": 40, "b": 8},
    )
    figure.update_xaxes(title=axis_title("window (number)"))
    figure.update_yaxes(title=axis_title("busiest expert / mean expert"), rangemode="tozero")
    return figure


def distance_figure(distance_W: Sequence[float] | Array, noise_W: Sequence[float] | Array) -> go.Figure:
    """Draw how far each window's expert shares are from the whole trace's, and how far chance alone would be.

    Parameters
    ----------
    distance_W
        Total variation distance, 0 to 1, mean over layers.
    noise_W
        What is expected of independent draws.
    """
    figure = empty_figure(
        _line("distance", 100 * np.asarray(distance_W), colour=BLUE, unit=" % of pairs"),
        _line("expected by chance", 100 * np.asarray(noise_W), colour=GREY, unit=" % of pairs", dash="dash"),
        height=320,
        legend=legend_above(),
        margin={"l": 8, "r": 16, "t": 40, "b": 8},
    )
    figure.update_xaxes(title=axis_title("window (number)"))
    figure.update_yaxes(title=axis_title("pairs at other experts (%)"), rangemode="tozero")
    return figure


def _relative(load: Array) -> Array:
    """Return loads over the mean of their last axis; 0 where there is none."""
    mean = load.mean(axis=-1, keepdims=True)
    return np.asarray(np.divide(load, mean, out=np.zeros_like(load), where=mean > 0))


def _starts(count: int, most: int) -> npt.NDArray[np.int64]:
    return np.arange(0, count, -(-count // most), dtype=np.int64)


def _line(name: str, value_W: Array, *, colour: str, unit: str, dash: str = "solid") -> go.Scatter:
    shown = np.unique(np.linspace(0, value_W.size - 1, min(value_W.size, MOST_POINTS)).round().astype(int))
    return go.Scatter(
        name=name,
        mode="lines" if shown.size > 1 else "markers",
        x=shown,
        y=value_W[shown].astype(np.float32),
        line={"width": 2, "color": colour, "dash": dash},
        marker={"color": colour},
        hovertemplate=f"window %{{x}}, {name}: %{{y:.3~g}}{unit}<extra></extra>",
    )
