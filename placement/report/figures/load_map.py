"""The load map: each device's load in every held-out window, before and after.

Shape letters: L layers, P policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from placement.report.figures.heat import HeatGrid, load_colours, quantised, relative_load
from placement.report.figures.look import axis_title, names_of
from placement.report.numbers import number
from placement.report.story import Story

__all__ = ["LayerChoice", "grid_of", "heat_figure", "improved_most", "layer_choices", "packed_maps"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """One layer that the reader can select in the load map.

    Parameters
    ----------
    layer
        Its index, as in the traces' ``meta``.
    label
        Its name, and its balance before and after.
    """

    layer: int
    label: str


def improved_most(story: Story) -> int:
    """Return the layer whose held-out balance the proposed policy improves most."""
    balance_L = [result.held_out.balance_WL.mean(axis=0) for result in story.contrast]
    return int((balance_L[0] - balance_L[-1]).argmax()) if len(balance_L) > 1 else int(balance_L[0].argmax())


def layer_choices(story: Story) -> list[LayerChoice]:
    """Return the layers of the load map, in order."""
    balance_PL = np.stack([r.held_out.balance_WL.mean(axis=0) for r in story.contrast])
    arrow = " \N{RIGHTWARDS ARROW} "
    return [
        LayerChoice(
            layer=layer,
            label=f"{story.layer_label(layer)}: balance {arrow.join(number(float(b)) for b in balance_P)}",
        )
        for layer, balance_P in enumerate(balance_PL.T)
    ]


def grid_of(story: Story) -> HeatGrid:
    """Return the grid that all load maps share."""
    num_windows, num_layers, num_devices = story.proposed.held_out.load_WLD.shape
    maps = num_layers * len(story.contrast)
    return HeatGrid.fit(num_windows=num_windows, num_devices=num_devices, num_maps=maps)


def packed_maps(story: Story) -> tuple[npt.NDArray[np.uint8], float]:
    """Return all maps in bytes, ``[policies, layers, rows, columns]``, and the load / mean of one step."""
    grid = grid_of(story)
    maps_PLRC = np.stack(
        [
            np.stack([grid.map_RC(relative_WLD[:, layer]) for layer in range(relative_WLD.shape[1])])
            for relative_WLD in (relative_load(result.held_out.load_WLD) for result in story.contrast)
        ]
    )
    return quantised(maps_PLRC)


def heat_figure(story: Story, *, layer: int | None = None) -> go.Figure:
    """Draw load by device and window, before and after, of one layer: by default the most improved one.

    The scale is that of all layers. The report's selector puts other layers in (`packed_maps`).
    """
    policies, grid = story.contrast, grid_of(story)
    shown = improved_most(story) if layer is None else layer
    relative = [relative_load(result.held_out.load_WLD) for result in policies]
    figure = make_subplots(
        rows=1,
        cols=len(policies),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[f"<b>{name}</b>" for name in names_of(policies)],
    )
    gap = 1 if grid.first_device_R.size <= 32 and grid.windows_C.size <= 48 else 0
    for column, (result, relative_WLD) in enumerate(zip(policies, relative, strict=True), start=1):
        trace = go.Heatmap(
            z=grid.map_RC(relative_WLD[:, shown]),
            x=grid.column_names,
            y=grid.row_names,
            coloraxis="coloraxis",
            meta={"layer": shown, "policy": escape(result.name)},
            xgap=gap,
            ygap=gap,
            hovertemplate="device %{y}, window %{x}<br>%{z:.2f} times the mean<extra></extra>",
        )
        figure.add_trace(trace, row=1, col=column)
    return _finish_heat(figure, relative, rows=grid.first_device_R.size)


def _finish_heat(figure: go.Figure, relative: Sequence[FloatArray], *, rows: int) -> go.Figure:
    axis = {"type": "category", "showgrid": False, "nticks": 12}
    figure.update_xaxes(title=axis_title("window (number)"), **axis)
    figure.update_yaxes(autorange="reversed", **axis)
    figure.update_yaxes(title=axis_title("device"), col=1)
    # Assigned: an update would leave plotly's own theme in the figure.
    figure.layout.template = {}
    figure.update_layout(
        height=int(np.clip(18 * rows + 130, 300, 620)),
        margin={"l": 8, "r": 8, "t": 34, "b": 8},
        coloraxis=load_colours(*relative, of="c"),
    )
    return figure
