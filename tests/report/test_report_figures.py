"""Figures carry the comparison's own data."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from placement.comparison import Comparison
from placement.report import render_report
from placement.report.story import Story

MakeComparison = Callable[..., Comparison]
TakeApart = Callable[[str], Any]


def test_load_maps_hold_every_layers_relative_load(
    make_comparison: MakeComparison, take_apart: TakeApart
) -> None:
    """Before and after side by side on one scale; only the most improved layer is visible."""
    comparison = make_comparison()
    figure = take_apart(render_report(comparison)).figures["load-map"]
    balance_L = [comparison.policy(name).held_out.balance_WL.mean(axis=0) for name in ("eplb", "auto")]
    improved = int((balance_L[0] - balance_L[1]).argmax())
    assert len(figure["data"]) == 2
    for trace in figure["data"]:
        layer, policy = trace["meta"]["layer"], trace["meta"]["policy"]
        load_WD = comparison.policy(policy).held_out.load_WLD[:, layer]
        expected = (load_WD / load_WD.mean(axis=1, keepdims=True)).T
        np.testing.assert_allclose(trace["z"], expected, rtol=1e-6)
        assert layer == improved
        assert trace["coloraxis"] == "coloraxis"
    assert {trace["meta"]["policy"] for trace in figure["data"]} == {"eplb", "auto"}


def test_every_layers_map_is_in_the_page_to_the_nearest_step(
    make_comparison: MakeComparison, take_apart: TakeApart
) -> None:
    """A byte for each cell: what the selector puts in differs from the loads by half a step at most."""
    comparison = make_comparison()
    choices = take_apart(render_report(comparison)).figures["load-map"]["choices"]
    cells = np.frombuffer(b64decode(choices["bytes"]), dtype=np.uint8).reshape(choices["shape"])
    for cells_LRC, name in zip(cells, ("eplb", "auto"), strict=True):
        load_WLD = comparison.policy(name).held_out.load_WLD
        expected = (load_WLD / load_WLD.mean(axis=2, keepdims=True)).transpose(1, 2, 0)
        np.testing.assert_allclose(cells_LRC * choices["step"], expected, atol=0.501 * choices["step"])


def test_phases_add_up_to_the_step(make_comparison: MakeComparison, take_apart: TakeApart) -> None:
    """One bar per policy; its parts are the held-out means and its label their sum."""
    comparison = make_comparison()
    figure = take_apart(render_report(comparison)).figures["phases"]
    parts = {trace["name"]: np.array(trace["x"]) for trace in figure["data"]}
    for index, result in enumerate(comparison.policies):
        assert parts["experts"][index] == pytest.approx(result.held_out.experts_WL.sum(axis=1).mean())
        assert sum(part[index] for part in parts.values()) == pytest.approx(result.held_out.step)
    assert figure["data"][0]["y"] == [result.name for result in comparison.policies]
    assert "(cost)" in figure["layout"]["xaxis"]["title"]["text"]


def test_a_phase_that_costs_nothing_is_left_out(
    make_comparison: MakeComparison, take_apart: TakeApart
) -> None:
    """A linear calibration has no combine; an empty legend entry would only puzzle."""
    comparison = make_comparison()
    for result in comparison.policies:
        result.held_out.combine_WL[:] = 0.0
    figures = take_apart(render_report(comparison)).figures
    assert [trace["name"] for trace in figures["phases"]["data"]] == ["experts", "dispatch"]
    assert len(figures["layers"]["data"]) == 4


def test_layers_show_both_placements(make_comparison: MakeComparison, take_apart: TakeApart) -> None:
    """Each layer has a bar per placement, stacked from its parts, side by side."""
    comparison = make_comparison()
    traces = take_apart(render_report(comparison)).figures["layers"]["data"]
    for policy, shift in (("eplb", -0.2), ("auto", 0.2)):
        parts = [trace for trace in traces if trace["name"].endswith(f", {policy}")]
        held_out = comparison.policy(policy).held_out
        expected_L = (held_out.experts_WL + held_out.dispatch_WL + held_out.combine_WL).mean(axis=0)
        np.testing.assert_allclose(sum(np.array(part["y"]) for part in parts), expected_L)
        np.testing.assert_allclose(parts[0]["x"], np.arange(3) + shift)


def test_gap_follows_the_incumbents(make_comparison: MakeComparison, take_apart: TakeApart) -> None:
    """Objective and bound of every incumbent, at its second, the last one with what was proved by the end."""
    comparison = make_comparison()
    solution = comparison.policy("auto").solution
    incumbents = solution.incumbents
    traces = {trace["name"]: trace for trace in take_apart(render_report(comparison)).figures["gap"]["data"]}
    assert traces["best objective"]["x"] == [i.elapsed_s for i in incumbents]
    assert traces["best objective"]["y"] == pytest.approx([i.objective for i in incumbents])
    bounds = [*(i.lower_bound for i in incumbents[:-1]), solution.lower_bound]
    assert bounds[-1] > incumbents[-1].lower_bound
    assert traces["lower bound"]["y"] == pytest.approx(bounds)
    assert traces["found by search"]["x"] == [1.5]
    assert traces["found by greedy"]["x"] == [0.25]


@pytest.mark.parametrize("objective", ["step-time", "balance"])
def test_windows_show_what_better_share_compares(
    make_comparison: MakeComparison, take_apart: TakeApart, objective: str
) -> None:
    """Step costs for the step-time objective, balance otherwise, of every held-out window."""
    comparison = make_comparison(objective=objective, lower_bound=1.0)
    traces = take_apart(render_report(comparison)).figures["windows"]["data"]
    for trace, result in zip(traces, comparison.policies, strict=True):
        held_out = result.held_out
        expected_W = held_out.step_W if objective == "step-time" else held_out.balance_WL.mean(axis=1)
        np.testing.assert_allclose(trace["x"], expected_W)
        assert trace["name"] == result.name


def test_many_windows_are_thinned_to_quantiles(
    make_comparison: MakeComparison, take_apart: TakeApart
) -> None:
    """Thousands of windows keep their extremes and median at a bounded size."""
    comparison = make_comparison(num_windows=3001, num_layers=1)
    trace = take_apart(render_report(comparison)).figures["windows"]["data"][0]
    step_W = comparison.policies[0].held_out.step_W
    assert len(trace["x"]) == 250
    assert (min(trace["x"]), max(trace["x"])) == pytest.approx((step_W.min(), step_W.max()))
    assert np.median(trace["x"]) == pytest.approx(np.median(step_W), rel=1e-2)
    assert trace["boxpoints"] is False


def test_decoder_layers_are_named_where_they_differ(make_comparison: MakeComparison) -> None:
    """A model whose first decoder layer is dense counts its MoE layers from 0, and both numbers are told."""
    story = Story(comparison=make_comparison())
    object.__setattr__(story.proposed.placement, "moe_layer_ids", (1, 2, 3))
    assert story.layer_label(0) == "MoE layer 0 (decoder layer 1)"
    object.__setattr__(story.proposed.placement, "moe_layer_ids", (0, 1, 2))
    assert story.layer_label(2) == "MoE layer 2"
