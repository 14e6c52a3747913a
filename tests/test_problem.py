"""Tests of problems: pieces that do not fit together, slots, memory, and risk measures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from instances import LINEAR, cluster, counts_only, model_for, random_placement, random_profile

from placement.errors import InfeasibleError, InputError
from placement.problem import Objective, PlacementProblem, Risk, Semantics, make_problem
from placement.profile import RoutingProfile
from placement.topology import Topology

PROFILE = random_profile(np.random.default_rng(0))


def problem(
    profile: RoutingProfile = PROFILE, topology: Topology | None = None, **options: Any
) -> PlacementProblem:
    given = {"calibration": LINEAR, **options}
    return make_problem(profile, cluster([0, 0]) if topology is None else topology, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spare_slots": -1}, "spare_slots is -1"),
        ({"max_imbalance": 0.9}, "max_imbalance is 0.9; it must be 1 or more"),
        ({"max_imbalance": float("nan")}, "max_imbalance is nan"),
        ({"semantics": "dispach"}, "unknown semantics 'dispach'; did you mean 'dispatch'?"),
        ({"objective": "time"}, "unknown objective 'time'"),
        ({"risk": "max"}, "unknown risk 'max'; .*known: mean, p95, cvar95"),
        (
            {"objective": "traffic", "semantics": "allgather"},
            "under allgather no placement changes the traffic",
        ),
        ({"objective": "traffic", "semantics": "dispatch-nodedup"}, "under dispatch-nodedup no placement"),
        ({"objective": "traffic", "risk": "p95"}, "the traffic objective is a mean"),
        ({"calibration": None}, "step time needs the model's sizes: name it with --model"),
        (
            {"model": model_for(random_profile(np.random.default_rng(0), layers=3))},
            "has 3 MoE layers, the trace 2",
        ),
        (
            {"model": model_for(random_profile(np.random.default_rng(0), experts=7))},
            "has 7 experts, the trace 6",
        ),
        (
            {"model": model_for(random_profile(np.random.default_rng(0), top_k=3))},
            "3 experts per token, the trace 2",
        ),
        ({"device_of_slot_S": np.array([0, 1, 2])}, "slots on 3 devices, the topology 2"),
    ],
)
def test_pieces_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    """What contradicts itself is refused before any solver sees it."""
    with pytest.raises(InputError, match=message):
        problem(**options)


def test_homes_must_be_devices_of_the_topology() -> None:
    """A trace recorded on more ranks than there are devices says so."""
    homes = replace(PROFILE, home_T=np.full(PROFILE.num_sampled_tokens, 2))
    with pytest.raises(InputError, match="live on device 2, the topology has 2"):
        problem(homes)


@pytest.mark.parametrize("semantics", list(Semantics))
@pytest.mark.parametrize("objective", list(Objective))
def test_what_counts_alone_can_serve(semantics: Semantics, objective: Objective) -> None:
    """Balance under every semantics but stay-put's chain, and times that follow from loads."""
    served = objective is Objective.BALANCE or (
        objective is Objective.STEP_TIME and semantics in (Semantics.DISPATCH_NODEDUP, Semantics.ALLGATHER)
    )
    served = served and semantics is not Semantics.STAY_PUT
    if served:
        assert problem(counts_only(PROFILE), semantics=semantics, objective=objective).num_slots == 6
        return
    with pytest.raises(InputError, match=r"expert counts only|no placement changes"):
        problem(counts_only(PROFILE), semantics=semantics, objective=objective)


def test_slots_follow_spare_slots_or_the_topology() -> None:
    """Equal shares of experts + spare slots, or the topology's own limits."""
    assert problem(spare_slots=2).slots_D.tolist() == [4, 4]
    limited = problem(topology=cluster([0, 0], slots_D=[5, 2]), spare_slots=9)
    assert limited.device_of_slot_S.tolist() == [0, 0, 0, 0, 0, 1, 1]
    given = problem(device_of_slot_S=np.array([1, 0, 0, 1, 1, 0]))
    assert given.device_of_slot_S.tolist() == [0, 0, 0, 1, 1, 1]


def test_too_few_slots() -> None:
    """Both ways to run out of slots name the numbers."""
    with pytest.raises(InfeasibleError, match="6 experts do not fit the topology's 5 slots per layer; 1 are"):
        problem(topology=cluster([0, 0], slots_D=[3, 2]))
    with pytest.raises(InfeasibleError, match="7 slots do not divide evenly over 2 devices"):
        problem(spare_slots=1)


def test_weights_that_do_not_fit() -> None:
    """Missing memory is reported in GiB, with the device."""
    model = model_for(PROFILE, hidden_size=2**16, expert_hidden_size=2**15)
    # 3 experts x 2 layers x 3 matrices x 2^31 weights x 2 bytes = 72 GiB fit into 80; 4 experts need 96.
    assert problem(model=model).num_slots == 6
    with pytest.raises(
        InfeasibleError, match=r"4 experts x 2 layers .* need 96\.0 GiB on device 0, .* 16\.0 GiB"
    ):
        problem(model=model, spare_slots=2)


def test_units() -> None:
    """The unit follows the objective."""
    assert problem().unit == "cost"
    assert problem(calibration=None, model=model_for(PROFILE)).unit == "s"
    assert problem(objective="balance").unit == "max/mean"
    assert problem(objective="traffic").unit == "devices/token"
    assert problem(objective="traffic", semantics="stay-put").unit == "hops/token"


def test_placements_of_another_problem() -> None:
    """A placement must agree in layers, experts and devices, and fit the slots."""
    other = random_placement(np.random.default_rng(0), problem(topology=cluster([0, 0, 0])))
    with pytest.raises(InputError, match="the placement has 3 devices, the problem 2"):
        problem().check_placement(other)
    wide = random_placement(np.random.default_rng(0), problem(spare_slots=4), fill=1.0)
    with pytest.raises(InfeasibleError, match=r"layer 0 puts 5 experts on device 0, which has 3 slots"):
        problem().check_capacity(wide)


def test_with_profile_checks_again() -> None:
    """Other traffic must fit the same problem."""
    with pytest.raises(InputError, match="expert counts only"):
        problem().with_profile(counts_only(PROFILE))


def test_risk_measures_by_hand() -> None:
    """Of the windows 1..40: mean 20.5, 95th percentile 38.05, worst two 39.5."""
    values = np.arange(1.0, 41.0)
    assert Risk.MEAN.summarise(values) == 20.5
    assert Risk.P95.summarise(values) == pytest.approx(38.05)
    assert Risk.CVAR95.summarise(values) == 39.5
    assert Risk.CVAR95.summarise(np.array([3.0])) == 3.0
