"""Curves of solves, health of deployments and traces at a glance: what is drawn is what was given."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pytest

from placement.report.figures.health import DriftLine, health_figure
from placement.report.figures.solve import incumbents_figure
from placement.report.figures.traffic import distance_figure, load_figure, windows_figure
from placement.report.numbers import Scale


def named(figure: go.Figure) -> dict[str, go.Scatter]:
    """Return the traces of a figure by their names."""
    return {trace.name: trace for trace in figure.data}


def curve(solver: list[str], *, elapsed_s: list[float] | None = None) -> go.Figure:
    """Return the curve of three incumbents in milliseconds, the first without a bound."""
    return incumbents_figure(
        elapsed_s=elapsed_s or [0.5, 1.0, 2.0],
        objective=[0.004, 0.002, 0.001],
        lower_bound=[0.0, 0.0005, 0.0009],
        solver=solver,
        label="predicted step time",
        scale=Scale(factor=1e-3, unit="ms"),
    )


def test_a_curve_has_a_mark_for_every_incumbent() -> None:
    """Objective and bound in the shown unit, marks by solver with their gap; no bound is not drawn as 0."""
    figure = curve(["greedy", "search", "search"])
    traces = named(figure)
    assert list(traces["best objective"].y) == pytest.approx([4.0, 2.0, 1.0])
    assert traces["lower bound"].y[0] is None
    assert list(traces["lower bound"].y[1:]) == pytest.approx([0.5, 0.9])
    assert list(traces["found by greedy"].x) == [0.5]
    assert list(traces["found by search"].customdata) == pytest.approx([75.0, 10.0])
    assert figure.layout.yaxis.title.text == "predicted step time (ms)"
    assert figure.layout.xaxis.type == "linear"


def test_long_solves_are_drawn_on_a_log_scale() -> None:
    """Where the last improvement is more than a hundred times later than the first."""
    assert curve(["a", "b", "c"], elapsed_s=[0.1, 1.0, 20.0]).layout.xaxis.type == "log"


def test_names_of_solvers_do_nothing() -> None:
    """What plotly would read as HTML or as a placeholder is shown as it is."""
    trace = curve(["<b>%{x}</b>", "search", "search"]).data[1]
    assert trace.name == "found by &lt;b&gt;%{x}&lt;/b&gt;"
    assert trace.hovertemplate.startswith("&lt;b&gt;&#37;{x}&lt;/b&gt;: ")


def health(version_W: list[int], drift: DriftLine | None = None) -> go.Figure:
    """Return the health of a deployment whose versions above 1 promised 1.1."""
    return health_figure(
        window_W=[7 * i for i in range(len(version_W))],
        balance_W=[1.2] * len(version_W),
        version_W=version_W,
        predicted={version: None if version == 1 else 1.1 for version in version_W},
        drift=drift,
    )


def test_versions_are_marked_where_they_change() -> None:
    """A line between the windows, a name for each stretch, a prediction where one was made."""
    figure = health([1, 1, 2, 3, 3])
    assert [shape.x0 for shape in figure.layout.shapes] == [1.5, 2.5]
    assert [note.text for note in figure.layout.annotations] == ["version 1", "version 2", "version 3"]
    traces = named(figure)
    assert list(traces["predicted"].x) == [1.5, 2.5, None, 2.5, 4.5]
    assert [list(pair) for pair in traces["posted windows"].customdata][2] == [14, 2]
    assert list(figure.layout.xaxis.ticktext) == ["0", "7", "14", "21", "28"]


def test_drift_is_drawn_over_the_windows_that_it_was_measured_on() -> None:
    """The line ends with the last window, and begins with the first one at the earliest."""
    due = named(health([1] * 6, DriftLine(num_windows=2, due=1.3)))["a refresh is due above"]
    assert (list(due.x), list(due.y)) == ([3.5, 5.5], [1.3, 1.3])
    assert (
        next(iter(named(health([1], DriftLine(num_windows=9, due=1.3)))["a refresh is due above"].x)) == -0.5
    )
    assert "predicted" not in named(health([1]))


def test_loads_are_relative_to_their_layer() -> None:
    """The mean of a layer is 1; a layer without any load is 0."""
    figure = load_figure([[1, 3], [0, 0]])
    assert figure.data[0].z.tolist() == [[0.5, 1.5], [0.0, 0.0]]


def test_large_maps_show_the_busiest_of_neighbours() -> None:
    """1,000 experts fit 500 columns; none that is busy is lost."""
    load_LE = np.ones((2, 1000))
    load_LE[1, 501] = 100.0
    heat = load_figure(load_LE).data[0]
    assert heat.z.shape == (2, 500)
    assert heat.x[250] == 500
    assert heat.z[1, 250] == heat.z.max() == pytest.approx(100 / 1.099)


def test_windows_show_their_busiest_experts() -> None:
    """Two windows of two layers: mean over layers, and the worst."""
    traces = named(windows_figure([[[1, 1], [1, 3]], [[0, 2], [2, 2]]]))
    assert traces["mean over layers"].y.tolist() == [1.25, 1.5]
    assert traces["worst layer"].y.tolist() == [1.5, 2.0]


def test_distances_are_in_per_cent() -> None:
    """Beside what chance explains."""
    traces = named(distance_figure([0.1, 0.2], [0.05, 0.05]))
    assert traces["distance"].y.tolist() == pytest.approx([10, 20])
    assert traces["expected by chance"].y.tolist() == pytest.approx([5, 5])
