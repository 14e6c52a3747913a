"""`plan_fabric` and what its plan says of itself."""

from __future__ import annotations

import json
from dataclasses import replace
from html import escape

import numpy as np
import pytest

from placement.errors import InputError
from placement.planning.fabric import (
    FabricKind,
    FabricRegion,
    OpticalSwitch,
    Timing,
    plan_fabric,
    synthetic_demand,
)
from placement.report.plan_fabric import headline, page_of
from placement.report.plan_page import render_plan

REGION = FabricRegion(num_servers=3, ocs_ports=1, eps_ports=1, link_gbits=8.0)


def test_plan_adds_up() -> None:
    """Times are sums over layers; fabrics of two directions; the dictionary is strict JSON."""
    demand = synthetic_demand(3, skew=1.0, seed=4, num_layers=2, mean_bytes=1e9)
    plan = plan_fabric(REGION, demand=demand, timing=Timing(window_s=0.5))
    assert plan.time_s == sum(allocation.time_s for allocation in plan.allocations)
    assert plan.lower_bound_s <= plan.time_s <= plan.published_s * (1 + 1e-12)
    assert plan.fabric(FabricKind.MIXNET).all_to_all_s == plan.schedule.time_s
    # Two layers of four all-to-alls, half a second of compute before each.
    tree = plan.fabric(FabricKind.FAT_TREE)
    assert tree.step_s - tree.all_to_all_s == pytest.approx(4.0)
    assert json.loads(json.dumps(plan.to_dict(), allow_nan=False))["schedule"]["changes"] >= 0


def test_paired_demand_adds_both_directions() -> None:
    """What goes one way and back shares links where they are paired: twice the time of equal halves."""
    # Servers 0 and 1 send 4 GB each way over one circuit and one packet port: 4/2 = 2 s, paired 8/2 = 4 s.
    demand = np.zeros((1, 3, 3))
    demand[0, 0, 1] = demand[0, 1, 0] = 4e9
    times = [
        plan_fabric(REGION, demand=demand, timing=Timing(paired=paired)).time_s for paired in (False, True)
    ]
    assert times == pytest.approx([2.0, 4.0])


def test_inputs_are_checked() -> None:
    """Neither nothing nor a demand of the wrong shape is planned."""
    with pytest.raises(InputError, match="either a demand or the traffic"):
        plan_fabric(REGION)
    with pytest.raises(InputError, match="not \\[layers, servers, servers\\]"):
        plan_fabric(REGION, demand=np.ones((3, 3)))
    with pytest.raises(InputError, match="window_s is -1"):
        Timing(window_s=-1.0)


def test_page_escapes_and_repeats() -> None:
    """The page begins with the answer, is the same each time, and names from files cannot break it."""
    plan = plan_fabric(REGION, demand=synthetic_demand(3, skew=1.0, seed=4))
    page = render_plan(page_of(plan, title="<b>", traffic="<script>"))
    assert page == render_plan(page_of(plan, title="<b>", traffic="<script>"))
    assert escape(headline(plan)) in page
    assert "<h1>&lt;b&gt;</h1>" in page
    assert "&lt;script&gt;" in page


def test_silent_servers_cost_nothing() -> None:
    """No demand at all is planned too: nothing takes time and nothing changes."""
    plan = plan_fabric(REGION, demand=np.zeros((2, 3, 3)))
    assert (plan.time_s, plan.gap, plan.schedule.num_changes) == (0.0, 0.0, 0)
    assert plan.to_dict()["fabrics"][0]["steps_per_s_per_dollar"] == 0.0
    assert render_plan(page_of(plan))


def test_the_schedule_is_drawn_where_it_changes_anything() -> None:
    """Circuits that are set once make no picture; numbers of things have no decimals."""
    # Layer 0 talks between servers 0 and 1, layer 1 between 1 and 2; each server has one circuit.
    demand = np.zeros((2, 3, 3))
    demand[0, 0, 1] = demand[0, 1, 0] = demand[1, 1, 2] = demand[1, 2, 1] = 8e9
    switches = [OpticalSwitch(name="test", ports=64, reconfiguration_s=delay_s) for delay_s in (1e3, 0.0)]
    kept, changed = (page_of(plan_fabric(replace(REGION, switch=one), demand=demand)) for one in switches)
    titles = [[section.title for section in page.sections] for page in (kept, changed)]
    assert ["Which circuits are up" in names for names in titles] == [False, True]
    assert (kept.facts["Servers"], kept.facts["Layers"]) == ("3", "2")
