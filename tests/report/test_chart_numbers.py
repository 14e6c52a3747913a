"""The numbers behind a picture."""

from __future__ import annotations

import plotly.graph_objects as go

from placement.report.chart_numbers import numbers_of
from placement.report.figures.look import empty_figure


def test_bars_become_a_row_for_each_place() -> None:
    """Names are unescaped (the table escapes them), what a series lacks is a dash."""
    figure = empty_figure(
        go.Bar(name="a &lt;b", x=["one", "two"], y=[1, 2.5]), go.Bar(name="c", x=["two"], y=[3]), height=200
    )
    numbers = numbers_of(figure)
    assert numbers is not None
    assert numbers.columns == ("", "a <b", "c")
    assert numbers.rows == (("one", "1", "\u2013"), ("two", "2.500", "3"))
    assert "a &lt;b" in numbers.html("label")


def test_maps_become_their_cells_and_boxes_their_quantiles() -> None:
    """Rows are the map's rows; a box is told by five numbers."""
    of_map = numbers_of(empty_figure(go.Heatmap(z=[[1, 2], [3, 4]], y=["p", "q"]), height=200))
    assert of_map is not None
    assert of_map.rows == (("p", "1", "2"), ("q", "3", "4"))
    of_box = numbers_of(empty_figure(go.Box(name="x", x=[1.0, 2.0, 3.0]), height=200))
    assert of_box is not None
    assert of_box.rows == (("x", "1.000", "1.500", "2.000", "2.500", "3.000"),)


def test_too_many_numbers_make_no_table() -> None:
    """Spans and large maps are left to the eye."""
    assert numbers_of(empty_figure(go.Heatmap(z=[[0] * 100] * 100), height=200)) is None
    assert numbers_of(empty_figure(go.Bar(x=[1], y=["a"], base=[2], orientation="h"), height=200)) is None
