"""Tests of the cost model where times follow tiers, device kinds, homes and risk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import (
    LINEAR,
    cluster,
    counts_only,
    measured,
    model_for,
    random_placement,
    random_profile,
)
from reference import OVERLAP, expert_seconds, reference_links, step_parts

from placement.calibration import DataSheetCalibration, LinearCalibration
from placement.cost import CostModel
from placement.errors import InputError
from placement.model import ModelShape
from placement.plan import Placement
from placement.problem import PlacementProblem, Risk, Semantics, make_problem
from placement.profile import RoutingProfile


@given(
    seed=st.integers(0, 10_000),
    semantics=st.sampled_from(Semantics),
    node_D=st.sampled_from([[0, 0, 0], [0, 0, 1, 1], [0, 1, 1], [0]]),
    homes=st.booleans(),
    keep=st.sampled_from([1.0, 0.5]),
)
@settings(max_examples=80, deadline=None)
def test_times_equal_the_reference(
    seed: int, semantics: Semantics, node_D: list[int], homes: bool, keep: float
) -> None:
    """Two kinds of device, uneven links, nodes and slots, sampled tokens, known homes; all semantics."""
    rng = np.random.default_rng(seed)
    devices = len(node_D)
    profile = random_profile(
        rng, tokens=40, top_k=3, tail=3, homes=devices if homes else 0, keep=keep, scale=100.0
    )
    problem = make_problem(
        profile,
        cluster(
            node_D,
            kind_D=rng.integers(0, 2, devices).tolist(),
            tflops=(100.0, 33.0),
            inside_gbps=rng.choice([50.0, 100.0], devices),
            across_gbps=rng.choice([5.0, 10.0], devices),
            slots_D=rng.integers(6 // devices + 1, 8, devices).tolist(),
        ),
        model=model_for(profile),
        semantics=semantics,
        calibration=DataSheetCalibration(dispatch_dtype="fp8", overlap=OVERLAP),
    )
    placement = random_placement(rng, problem, shuffle=True)
    breakdown = CostModel(problem).evaluate(placement)
    expected = step_parts(
        profile,
        placement,
        expert_seconds=expert_seconds(problem),
        links=reference_links(problem),
        semantics=str(semantics),
    )
    found = np.stack([breakdown.experts_WL, breakdown.dispatch_WL, breakdown.combine_WL])
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)
    assert breakdown.objective == pytest.approx(expected.sum(axis=(0, 2)).mean(), rel=1e-9)


# Two tokens, one layer: the first selects experts 0 and 1, the second 2 and 3; two nodes of one device.
TWO_TOKENS = RoutingProfile(
    load_WLE=[[[1, 1, 1, 1]]],
    window_tokens_W=[2],
    top_k=2,
    experts_TLK=np.array([[[0, 1]], [[2, 3]]], dtype=np.uint8),
    window_of_token_T=np.array([0, 0]),
)


def two_tokens(home_T: list[int] | None = None, **options: Any) -> tuple[PlacementProblem, ModelShape]:
    """Return the problem of `TWO_TOKENS` at 2 KiB per token, 10 GB/s across and 20 us."""
    profile = replace(TWO_TOKENS, home_T=None if home_T is None else np.array(home_T))
    model = model_for(profile)
    return make_problem(profile, cluster([0, 1]), model=model, **options), model


def both_at_home(problem: PlacementProblem) -> Placement:
    """Experts 0 and 1 on device 0, 2 and 3 on device 1."""
    return Placement(
        physical_to_logical_map_LS=[[0, 1, 2, 3]],
        device_of_slot_S=problem.device_of_slot_S,
        num_experts=4,
        num_devices=2,
    )


def test_tokens_at_home_are_not_charged() -> None:
    """At home only the latency is left; away the whole token travels; unknown homes, half of it."""
    latency_s, token_s = 2e-5, 2048 / 10e9
    for homes, volume in (([0, 1], 0.0), ([1, 0], 1.0), ([1, 1], 1.0), (None, 0.5)):
        problem, _ = two_tokens(homes)
        breakdown = CostModel(problem).evaluate(both_at_home(problem))
        # The slower tier across nodes bounds both phases.
        assert breakdown.dispatch_WL[0, 0] == pytest.approx(latency_s + volume * token_s)
        assert breakdown.combine_WL[0, 0] == pytest.approx(latency_s + volume * token_s)
        assert breakdown.bottleneck_tier_L == ("cluster",)


def test_the_bottleneck_may_be_the_inner_tier() -> None:
    """With a slow link inside the node it is named instead."""
    profile = random_profile(np.random.default_rng(0), experts=8, scale=100.0)
    topology = cluster([0, 0, 1, 1], inside_gbps=1.0, across_gbps=100.0, latency_s=(1e-6, 1e-6))
    problem = make_problem(profile, topology, model=model_for(profile))
    breakdown = CostModel(problem).evaluate(random_placement(np.random.default_rng(0), problem))
    assert breakdown.bottleneck_tier_L == ("node", "node")


def test_linear_costs_know_neither_tiers_nor_homes() -> None:
    """Abstract weights charge every distinct token, wherever it lives."""
    objectives = set()
    for homes in ([0, 1], [1, 0], None):
        problem, _ = two_tokens(homes, calibration=LINEAR)
        objectives.add(CostModel(problem).objective(both_at_home(problem)))
    assert objectives == {2.0 + 4.0}


def test_a_slow_device_bounds_the_experts() -> None:
    """At equal loads the device of a fifth of the speed is the fullest in time."""
    profile = replace(TWO_TOKENS, load_WLE=np.full((1, 1, 4), 1e5))
    problem = make_problem(
        profile, cluster([0, 0], kind_D=[0, 1], tflops=(100.0, 20.0)), model=model_for(profile)
    )
    breakdown = CostModel(problem).evaluate(both_at_home(problem))
    fast_s = 2 * 1e5 * 3145728 / 1e14
    np.testing.assert_allclose(breakdown.experts_LD, [[fast_s, 5 * fast_s]])
    assert breakdown.experts_WL[0, 0] == pytest.approx(5 * fast_s)


def test_measured_curves_price_the_step() -> None:
    """The measured curve of the nearest model gives the experts' time, the node's the exchanges'."""
    profile = replace(TWO_TOKENS, load_WLE=np.full((1, 1, 4), 512.0))
    model = model_for(profile, hidden_size=2048, expert_hidden_size=1024)
    problem = make_problem(profile, cluster([0, 0]), model=model, calibration=measured())
    breakdown = CostModel(problem).evaluate(both_at_home(problem))
    assert breakdown.experts_WL[0, 0] == pytest.approx(2 * 0.48e-3 / 32)
    assert breakdown.dispatch_WL[0, 0] == pytest.approx(0.05e-3)
    assert breakdown.step_unit == breakdown.unit == "s"


@pytest.mark.parametrize("risk", list(Risk))
def test_risk_is_taken_over_windows(risk: Risk) -> None:
    """Of step costs for times; of the ratios of all windows and layers for balance."""
    rng = np.random.default_rng(1)
    profile = random_profile(rng, tokens=300, windows=30)
    for objective in ("step-time", "balance"):
        problem = make_problem(profile, cluster([0, 0]), calibration=LINEAR, objective=objective, risk=risk)
        breakdown = CostModel(problem).evaluate(random_placement(rng, problem))
        values = breakdown.step_W if objective == "step-time" else np.sort(breakdown.balance_WL.ravel())
        worst = round(0.05 * values.size)
        expected = {
            Risk.MEAN: values.mean(),
            Risk.P95: np.quantile(values, 0.95),
            Risk.CVAR95: np.sort(values)[-worst:].mean(),
        }
        assert breakdown.objective == pytest.approx(expected[risk], rel=1e-12)


def test_the_breakdown_adds_up() -> None:
    """Phases and layers sum to the step, devices to the loads, and the summary says the same."""
    rng = np.random.default_rng(2)
    profile = random_profile(rng, layers=3)
    problem = make_problem(profile, cluster([0, 0, 1]), model=model_for(profile), spare_slots=3)
    breakdown = CostModel(problem).evaluate(random_placement(rng, problem))
    summary = breakdown.summary()
    assert breakdown.objective == pytest.approx(breakdown.step)
    assert summary["experts"] + summary["dispatch"] + summary["combine"] == pytest.approx(breakdown.step)
    by_layer = [layer["experts"] + layer["dispatch"] + layer["combine"] for layer in summary["layers"]]
    assert sum(by_layer) == pytest.approx(breakdown.step)
    np.testing.assert_allclose(breakdown.load_WLD.sum(axis=2), profile.load_WLE.sum(axis=2))
    for layer, row in enumerate(summary["layers"]):
        assert row["fullest_device"] in np.unique(breakdown.load_WLD[:, layer].argmax(axis=1))


@pytest.mark.parametrize("semantics", ["allgather", "dispatch-nodedup"])
def test_counts_alone_price_what_follows_from_loads(semantics: str) -> None:
    """Without tokens these semantics cost what they cost with them; per-token figures are left out."""
    rng = np.random.default_rng(3)
    profile = random_profile(rng)
    options: dict[str, Any] = {"model": model_for(profile), "semantics": semantics}
    full = make_problem(profile, cluster([0, 0]), **options)
    counted = make_problem(counts_only(profile), cluster([0, 0]), **options)
    placement = random_placement(rng, full)
    known, unknown = CostModel(full).evaluate(placement), CostModel(counted).evaluate(placement)
    assert unknown.objective == pytest.approx(known.objective, rel=1e-12)
    assert (unknown.metrics.fanout, unknown.metrics.node_fanout, unknown.metrics.hops) == (None, None, None)


def test_balance_needs_no_costs() -> None:
    """Without a model balance is computed, and times are what they are: unknown."""
    problem = make_problem(counts_only(TWO_TOKENS), cluster([0, 1]), objective="balance")
    breakdown = CostModel(problem).evaluate(both_at_home(problem))
    assert breakdown.objective == 1.0
    assert np.isnan(breakdown.step)
    assert breakdown.bottleneck_tier_L == ("",)


def test_a_window_without_tokens_in_a_layer_is_balanced() -> None:
    """Nothing to share counts as evenly shared, and costs nothing."""
    load_WLE = np.array([[[4.0, 0, 0, 0]], [[0.0, 0, 0, 0]]])
    profile = RoutingProfile(load_WLE=load_WLE, window_tokens_W=[2, 1], top_k=2)
    problem = make_problem(profile, cluster([0, 0]), objective="balance")
    breakdown = CostModel(problem).evaluate(both_at_home(problem))
    assert breakdown.balance_WL.tolist() == [[2.0], [1.0]]
    assert breakdown.objective == 1.5
    assert breakdown.metrics.balance_floor == 1.5


def test_other_slots_of_the_same_devices_may_be_evaluated() -> None:
    """Where an expert's slot lies within its device changes nothing."""
    problem, _ = two_tokens(calibration=LinearCalibration(pair_cost=1, token_cost=1))
    mixed = Placement(
        physical_to_logical_map_LS=[[3, 0, -1, 2, 1]],
        device_of_slot_S=[1, 0, 0, 1, 0],
        num_experts=4,
        num_devices=2,
    )
    model = CostModel(problem)
    assert model.objective(mixed) == model.objective(both_at_home(problem)) == 3.0


def test_placements_of_another_size_are_refused() -> None:
    """A placement of other experts is an input error, not an index error."""
    problem, _ = two_tokens()
    other = Placement(
        physical_to_logical_map_LS=[[0, 1, 2, 3, 4, -1]],
        device_of_slot_S=[0, 0, 0, 1, 1, 1],
        num_experts=5,
        num_devices=2,
    )
    with pytest.raises(InputError, match="the placement has 5 experts, the problem 4"):
        CostModel(problem).evaluate(other)
