"""The page of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from placement import LinearCalibration, make_problem, parse_topology
from placement.cost import CostModel
from placement.plan import Placement
from placement.problem import PlacementProblem
from placement.report.evaluation import render_evaluation
from placement.report.numbers import number
from placement.solvers.contiguous import contiguous_placement
from traces.statistics import build_profile
from traces.synthesize import synthesize

TakeApart = Callable[[str], Any]


@pytest.fixture(name="problem", scope="module")
def _problem() -> PlacementProblem:
    trace = synthesize(num_tokens=2048, num_layers=2, num_experts=8, top_k=2, seed=0)
    calibration = LinearCalibration(pair_cost=1, token_cost=4)
    profile = build_profile(trace, window_tokens=128)
    return make_problem(profile, parse_topology("h100:1x4"), calibration=calibration)


@pytest.fixture(name="placement")
def _placement(problem: PlacementProblem) -> Placement:
    return contiguous_placement(problem).with_layers(np.tile([0, 2, 1, 3, 4, 6, 5, 7], (2, 1)))


def test_the_answer_comes_first_then_pictures_then_tables(
    problem: PlacementProblem, placement: Placement, take_apart: TakeApart
) -> None:
    """In reading order, with the cost model's own number and without a word of windows held out."""
    page = take_apart(render_evaluation(problem, placement, provenance={"trace": "sha256:abc"}))
    headings = (
        "Evaluation of a placement", "On this traffic", "experts in order", "Where the load sits",
        "What a step is made of", "Layer by layer", "How windows differ", "Fullest devices",
        "Heaviest experts", "How to read this", "sha256:abc",
    )  # fmt: skip
    places = [page.text.index(heading) for heading in headings]
    assert places == sorted(places)
    assert number(CostModel(problem).evaluate(placement).objective) in page.text
    assert "held-out" not in page.text
    assert "tells no prediction" in page.text


def test_a_prediction_is_compared_where_it_is_for_the_same_question(
    problem: PlacementProblem, placement: Placement, take_apart: TakeApart
) -> None:
    """The file's own figure, and its bound where the trace is the same; other options are named."""
    value = CostModel(problem).evaluate(placement).objective
    objective = {"name": "step-time", "value": value / 1.1, "unit": "cost", "lower_bound": value / 2}
    extra = {"objective": objective, "provenance": {"trace": "sha256:abc", "options": {"window": 128}}}
    known = replace(placement, extra=extra)
    text = take_apart(render_evaluation(problem, known, trace="sha256:abc")).text
    assert "on this very trace: here it is +10.0 %" in text
    assert "at most 50.0 % from the best possible" in text
    assert "best possible" not in take_apart(render_evaluation(problem, known, trace="sha256:b")).text
    extra["provenance"] = {"options": {"window": 64}}
    other = take_apart(render_evaluation(problem, replace(placement, extra=extra))).text
    assert "not compared, since it is for window 64, not 128" in other


def test_experts_in_order_are_the_same_as_themselves(
    problem: PlacementProblem, take_apart: TakeApart
) -> None:
    """No gain is claimed of what is the baseline."""
    text = take_apart(render_evaluation(problem, contiguous_placement(problem))).text
    assert "the same as with experts in order" in text
