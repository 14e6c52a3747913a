"""Tests of what-if scenarios: the same traffic on other clusters, scored on windows held out."""

from __future__ import annotations

import numpy as np
import pytest
from instances import LINEAR, cluster, model_for, random_profile

from placement.comparison import compare
from placement.errors import InputError
from placement.planning.fabric import OPTICAL_SWITCHES, FabricRegion, PlacedTraffic, plan_fabric
from placement.scenario import (
    POLICIES,
    even_spare_slots,
    make_scenario,
    most_and_least,
    score_scenarios,
    slower_links,
)
from placement.topology import parse_topology

PROFILE = random_profile(np.random.default_rng(0), tokens=400, experts=6, windows=9)


def test_spare_slots_fill_up_devices() -> None:
    """As many as are missing to the next multiple of the devices, on top of those that were asked for."""
    assert [even_spare_slots(16, devices) for devices in (4, 8, 16, 32, 6)] == [0, 0, 0, 16, 2]
    assert [even_spare_slots(16, 8, least=least) for least in (1, 8, 9)] == [8, 8, 16]


def test_a_scenario_holds_every_expert_on_any_number_of_devices() -> None:
    """More devices than experts: the slots left over are spare."""
    problem = make_scenario("many", PROFILE, cluster([0] * 4 + [1] * 4), calibration=LINEAR).problem
    assert problem.slots_D.tolist() == [1] * 8
    problem = make_scenario("more", PROFILE, "h100:1x3", spare_slots=1, calibration=LINEAR).problem
    assert problem.slots_D.tolist() == [3, 3, 3]


def test_links_between_nodes_get_slower_alone() -> None:
    """The outermost tier has a share of its bandwidth; what is inside nodes stays."""
    fast = parse_topology("h100:2x4")
    slow = slower_links(fast, 0.25)
    assert slow.tiers[-1].bandwidth_D.tolist() == (fast.tiers[-1].bandwidth_D / 4).tolist()
    assert slow.tiers[0] is fast.tiers[0]
    assert slow.name == "h100:2x4 at 0.25 of its bandwidth"
    for share in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="share of bandwidth is"):
            slower_links(fast, share)


def test_scores_are_those_of_the_comparison() -> None:
    """Held-out steps of the policies, what ours saves of EPLB's, and in how many windows."""
    scenario = make_scenario("two", PROFILE, cluster([0, 0]), calibration=LINEAR)
    (score,) = score_scenarios([scenario], work_s=0.05)
    whole = compare(scenario.problem, work_s=0.05, only=POLICIES)
    assert [result.name for result in score.comparison.policies] == list(POLICIES)
    for policy in POLICIES:
        assert score.step(policy) == whole.policy(policy).held_out.step
    assert score.saving() == 1 - score.step() / score.step("eplb")
    assert score.saving(against="auto") == 0.0
    assert score.better_share == whole.better_share("auto", "eplb")
    row = score.to_dict()
    assert (row["scenario"], row["devices"], row["slots"]) == ("two", 2, 6)
    assert row[f"eplb ({score.step_unit})"] == score.step("eplb")


def test_slower_links_never_make_a_step_faster() -> None:
    """The same placement on slower links takes longer, and so does the best one for them."""
    topology = cluster([0, 0, 1, 1])
    given = {"model": None, "calibration": LINEAR}
    fast, slow = (
        make_scenario(f"{share}", PROFILE, slower_links(topology, share), **given) for share in (1.0, 0.1)
    )
    scores = score_scenarios([fast, slow], work_s=0.05, only=("eplb", "auto"))
    assert [len(score.comparison.policies) for score in scores] == [2, 2]
    assert scores[1].step("eplb") >= scores[0].step("eplb")


def test_the_most_and_the_least_are_by_saving() -> None:
    """One scenario is both; none is an error."""
    scores = score_scenarios(
        [make_scenario(f"{n}", PROFILE, cluster([0] * n), calibration=LINEAR) for n in (2, 3)],
        work_s=0.05,
    )
    most, least = most_and_least(scores)
    assert most.saving() == max(score.saving() for score in scores)
    assert least.saving() == min(score.saving() for score in scores)
    assert most_and_least(scores[:1]) == (scores[0], scores[0])
    with pytest.raises(InputError, match="no scenario"):
        most_and_least([])


def test_a_fabric_is_compared_with_circuits_for_further_placements() -> None:
    """EPLB's placement gets circuits afterwards, and planning together never fits worse."""
    profile = random_profile(np.random.default_rng(1), tokens=600, experts=8, windows=4)
    topology = cluster([0, 0, 1, 1, 2, 2, 3, 3])
    problem = make_scenario("servers", profile, topology, model=model_for(profile)).problem
    region = FabricRegion(
        num_servers=4, ocs_ports=3, eps_ports=1, link_gbits=100.0, switch=OPTICAL_SWITCHES["polatis"]
    )
    plan = plan_fabric(
        region,
        traffic=PlacedTraffic(problem=problem, batch_tokens=1024, placement_work_s=0.05, also=("eplb",)),
    )
    assert plan.placement is not None
    assert list(plan.placement.separate_held_out_s) == ["contiguous", "optimized", "eplb"]
    assert plan.placement.time_s <= plan.placement.separate_s["eplb"] * (1 + 1e-9)
