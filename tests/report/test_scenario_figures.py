"""Tests of the figures of scenarios: what stands where, in which unit, with escaped names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from instances import LINEAR, cluster, random_profile

from placement.errors import InputError
from placement.report.figures.look import BLUE, GREY
from placement.report.figures.scenario import fabrics_figure, scenarios_figure, times_figure
from placement.report.numbers import percent
from placement.scenario import ScenarioScore, make_scenario, score_scenarios

PROFILE = random_profile(np.random.default_rng(0), tokens=400, experts=6, windows=9)


@pytest.fixture(scope="module")
def scores() -> tuple[ScenarioScore, ...]:
    """Return two scenarios, one with a name that is HTML."""
    scenarios = [
        make_scenario(name, PROFILE, cluster([0] * devices), calibration=LINEAR)
        for name, devices in (("two", 2), ("<b>three</b>", 3))
    ]
    return score_scenarios(scenarios, work_s=0.05)


def test_every_policy_has_a_bar_in_every_scenario(scores: tuple[ScenarioScore, ...]) -> None:
    """Bars are held-out steps; above each group is what ours saves against EPLB."""
    figure = scenarios_figure(scores, question="devices & <more>")
    assert [trace.name for trace in figure.data] == ["experts in order", "EPLB", "moe-placement"]
    for trace, policy in zip(figure.data, ("contiguous", "eplb", "auto"), strict=True):
        assert list(trace.x) == ["two", "&lt;b&gt;three&lt;/b&gt;"]
        assert list(trace.y) == [score.step(policy) for score in scores]
    texts = [note.text for note in figure.layout.annotations]
    assert texts == [f"<b>{percent(-score.saving(), signed=True)}</b>" for score in scores]
    assert figure.layout.xaxis.title.text == "devices &amp; &lt;more&gt;"
    assert figure.layout.yaxis.rangemode == "tozero"
    assert len({trace.marker.color for trace in figure.data}) == 3


def test_a_policy_without_an_answer_has_no_bar(scores: tuple[ScenarioScore, ...]) -> None:
    """Scenarios may be scored by fewer policies."""
    fewer = score_scenarios(
        [make_scenario("two", PROFILE, cluster([0, 0]), calibration=LINEAR)],
        work_s=0.05,
        only=("eplb", "auto"),
    )
    assert [trace.name for trace in scenarios_figure(fewer, question="which").data] == [
        "EPLB",
        "moe-placement",
    ]
    with pytest.raises(InputError, match="no scenario"):
        scenarios_figure([], question="which")


def test_times_are_bars_in_a_fitting_unit() -> None:
    """Seconds become milliseconds, texts say so, and one bar is marked."""
    figure = times_figure({"a<b": 0.002, "c": 0.004}, title="step", marked="c")
    (bars,) = figure.data
    assert list(bars.x) == [2.0, 4.0]
    assert list(bars.y) == ["a&lt;b", "c"]
    assert list(bars.marker.color) == [GREY, BLUE]
    assert list(bars.text) == ["2.000 ms", "4.000 ms"]
    assert figure.layout.xaxis.title.text == "step (ms)"
    with pytest.raises(InputError, match="'d' is not among"):
        times_figure({"c": 1.0}, title="step", marked="d")


def test_fabrics_that_cannot_serve_are_left_out() -> None:
    """Each fabric has its price; the first one is the plan's own."""
    answers: list[Any] = [
        SimpleNamespace(kind="mixnet", dollars=123_648.0, all_to_all_s=0.02),
        SimpleNamespace(kind="static circuits", dollars=64_512.0, all_to_all_s=float("inf")),
        SimpleNamespace(kind="fat-tree", dollars=191_936.0, all_to_all_s=0.01),
    ]
    plan: Any = SimpleNamespace(fabrics=answers)
    (bars,) = fabrics_figure(plan).data
    assert list(bars.y) == ["mixnet, 124 k$", "fat-tree, 192 k$"]
    assert list(bars.x) == [20.0, 10.0]
    assert list(bars.marker.color) == [BLUE, GREY]
