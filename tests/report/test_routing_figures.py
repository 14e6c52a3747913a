"""Tests of the figures of routing: what they draw is what they were given, and axes have units."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pytest

from placement.report.figures import routing
from placement.report.figures.traffic import load_figure

LOAD_WLE = np.random.default_rng(0).integers(1, 50, size=(9, 3, 4)).astype(float)


def figures() -> dict[str, go.Figure]:
    """Return every figure of the module, of little."""
    relative_LE = LOAD_WLE.mean(axis=0) / LOAD_WLE.mean(axis=(0, 2))[:, np.newaxis]
    lift_EE = np.array([[np.nan, 4.0], [0.25, 1.1]])
    draws_RN = np.array([[1.4, 1.2, 1.1], [1.3, 1.3, 1.1]])
    return {
        "loads": load_figure(relative_LE),
        "windows": routing.window_loads_figure(LOAD_WLE, layer=1),
        "variation": routing.variation_figure([0.1, 0.0], [0.2, 0.0], [0.1, 0.0]),
        "kinds": routing.kind_loads_figure(["<b>", "prose"], LOAD_WLE[:2], layer=0),
        "distances": routing.kind_distances_figure(
            ["<b>", "prose"], [0.1, 0.3], null_C=[0.02, 0.02], null_high_C=[0.05, 0.04]
        ),
        "drift": routing.drift_figure([np.nan, 0.1, 0.2], [np.nan, 0.1, 0.3], span=1, null=0.25),
        "ageing": routing.ageing_figure(np.array([1, 2, 4]), [0.1, 0.2, 0.3], null=0.3, half_life=2.0),
        "lift": routing.lift_figure(lift_EE, lift_EE > 2, layer=0, other=1),
        "information": routing.information_figure(
            [0.5], null_bits=[0.1], null_deviation_bits=[0.01], labels=["0"], label="MoE layer (number)"
        ),
        "learning": routing.learning_figure(
            [1, 2, 4],
            spread_RN=draws_RN,
            consecutive_RN=draws_RN + 0.1,
            fitted_RN=draws_RN - 0.2,
            unfitted=1.6,
            label="fullest / mean device",
        ),
    }


@pytest.mark.parametrize("name", list(figures()))
def test_axes_have_titles_and_texts_are_escaped(name: str) -> None:
    """Every value axis says what it shows, there is no theme, and names are no markup."""
    figure = figures()[name]
    titles = [figure.layout.xaxis.title.text, figure.layout.yaxis.title.text]
    assert titles[0]
    assert titles[1] or figure.layout.yaxis.type == "category"
    assert figure.layout.template.layout.to_plotly_json() == {}
    assert "<b>" not in str(figure.to_dict())
    assert {trace.type for trace in figure.data} <= {"scatter", "bar", "heatmap"}


def test_even_load_is_white() -> None:
    """The middle of the colours lies at 1."""
    heat = figures()["loads"].data[0]
    at_even = (1 - heat.zmin) / (heat.zmax - heat.zmin)
    assert [colour for place, colour in heat.colorscale if place == pytest.approx(at_even)] == ["#f7f7f7"]


def test_many_windows_share_columns() -> None:
    """Neighbours are added up where windows are too many, and an even load stays even."""
    figure = routing.window_loads_figure(np.ones((1500, 1, 4)), layer=0)
    assert figure.data[0].z.shape == (4, 500)
    assert (figure.data[0].z == 1).all()


def test_variation_adds_up_to_the_distance_from_even() -> None:
    """The bars of a layer add up to the root of the sum of its parts: sqrt(0.4) is 63.2 %."""
    figure = figures()["variation"]
    assert sum(trace.y for trace in figure.data) == pytest.approx([100 * np.sqrt(0.4), 0])


def test_pairs_within_chance_are_white() -> None:
    """Lifts are drawn as powers of two where they exceed chance, else as none; unknown pairs stay empty."""
    heat = figures()["lift"].data[0]
    np.testing.assert_array_equal(heat.z, [[np.nan, 2.0], [0.0, 0.0]])
    np.testing.assert_allclose(heat.customdata, [[np.nan, 4.0], [0.25, 1.1]], rtol=1e-6)
    assert list(heat.colorbar.ticktext) == ["1/4", "1/2", "1", "2", "4"]


def test_lift_without_any_pair_beyond_chance() -> None:
    """A map that is all white has a scale all the same."""
    heat = routing.lift_figure(np.ones((2, 2)), np.zeros((2, 2)), layer=0, other=0).data[0]
    assert (heat.zmin, heat.zmax) == (-1, 1)


def test_kinds_are_ordered_by_distance() -> None:
    """The kind that differs most comes first, with its own mark of chance."""
    bars, marks = figures()["distances"].data
    assert list(bars.y) == ["prose", "&lt;b&gt;"]
    assert list(bars.x) == pytest.approx([30, 10])
    assert list(marks.error_x.array) == pytest.approx([2, 3])


def test_ageing_without_half_life_has_no_line() -> None:
    """Where the order means nothing, nothing is marked."""
    figure = routing.ageing_figure(np.array([1, 2]), [0.3, 0.3], null=0.3, half_life=None)
    assert not figure.layout.shapes


def test_learning_draws_means() -> None:
    """Lines are means of draws; each draw is a dot."""
    names = {trace.name: trace for trace in figures()["learning"].data if trace.name}
    assert list(names["windows spread over the trace"].y) == pytest.approx([1.35, 1.25, 1.1])
    assert list(names["experts in order, no fit"].y) == [1.6, 1.6]
