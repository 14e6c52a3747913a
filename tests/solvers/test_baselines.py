"""Tests of the baselines as solvers: in order, longest first, and EPLB on the problem's slots."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from instances import LINEAR, cluster, model_for, random_profile

from placement.errors import InfeasibleError
from placement.optimizer import optimize
from placement.plan import Placement
from placement.problem import PlacementProblem, make_problem
from placement.profile import RoutingProfile
from placement.solvers.contiguous import contiguous_placement
from placement.solvers.eplb import rebalance_experts
from placement.solvers.greedy import even_room, greedy_devices, greedy_placement
from placement.topology import Topology


def problem(load_E: list[float], topology: Topology, **options: object) -> PlacementProblem:
    profile = RoutingProfile(load_WLE=[[load_E]], window_tokens_W=[sum(load_E)], top_k=1)
    return make_problem(profile, topology, objective="balance", **options)  # type: ignore[arg-type]


def rows(placement: Placement) -> list[int]:
    return placement.physical_to_logical_map_LS[0].tolist()


def test_contiguous_fills_slots_in_order() -> None:
    """Spare slots stay empty, spread over the devices; uneven slots take uneven shares."""
    level = [1.0] * 6
    assert rows(contiguous_placement(problem(level, cluster([0, 0])))) == [0, 1, 2, 3, 4, 5]
    spared = contiguous_placement(problem(level, cluster([0, 0]), spare_slots=2))
    assert rows(spared) == [0, 1, 2, -1, 3, 4, 5, -1]
    uneven = contiguous_placement(problem(level, cluster([0, 0, 0], slots_D=[4, 0, 2])))
    assert rows(uneven) == [0, 1, 2, 3, 4, 5]
    assert uneven.device_of_slot_S.tolist() == [0, 0, 0, 0, 2, 2]


def test_greedy_takes_the_longest_first() -> None:
    """By hand: 9 | 8, 7 beside 8 makes it full, so 6 and 5 go beside 9."""
    made = greedy_placement(problem([5, 6, 7, 8, 9, 1], cluster([0, 0])))
    # 9 -> 0, 8 -> 1, 7 -> 1 (8 < 9), 6 -> 0, 5 -> 0 or 1 at 15 each: the first; 1 -> the last slot of 1.
    assert rows(made) == [0, 1, 4, 2, 3, 5]


def test_greedy_loads_fast_devices_more() -> None:
    """Nine tenths of the speed take nine tenths of the load."""
    device_E = greedy_devices(np.ones(10), np.array([10, 10]), np.array([9.0, 1.0]))
    assert np.bincount(device_E).tolist() == [9, 1]


@given(slots=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(lambda s: sum(s) > 0), data=st.data())
def test_spare_slots_are_spread(slots: list[int], data: st.DataObject) -> None:
    """Every expert has room, no device more than its slots, and no roomier device is left emptier."""
    experts = data.draw(st.integers(1, sum(slots)))
    room_D = even_room(experts, np.array(slots))
    assert room_D.sum() >= experts
    assert (room_D <= slots).all()
    assert all(room == slot or room == room_D.max() for room, slot in zip(room_D, slots, strict=True))


@given(seed=st.integers(0, 10_000), slots=st.permutations([4, 3, 1, 0]))
def test_baselines_fit_any_slots(seed: int, slots: list[int]) -> None:
    """Contiguous and greedy answer wherever the experts fit at all."""
    profile = random_profile(np.random.default_rng(seed), experts=int(seed % 5) + 4)
    whole = make_problem(profile, cluster([0, 0, 1, 1], slots_D=slots), objective="balance")
    for make in (contiguous_placement, greedy_placement):
        whole.check_capacity(make(whole))


def test_eplb_is_the_published_algorithm() -> None:
    """Without a model's groups the global policy, on the summed loads of all windows."""
    profile = random_profile(np.random.default_rng(0), experts=8, windows=4)
    spared = make_problem(profile, cluster([0, 0, 1, 1]), calibration=LINEAR, spare_slots=4)
    solution = optimize(spared, solver="eplb")
    expected, _, _ = rebalance_experts(profile.load_WLE.sum(axis=0), 12, 1, 1, 4)
    np.testing.assert_array_equal(
        np.sort(solution.placement.physical_to_logical_map_LS, axis=1), np.sort(expected, axis=1)
    )


def test_eplb_keeps_groups_on_nodes() -> None:
    """A model with two groups on two nodes gets the hierarchical policy."""
    profile = random_profile(np.random.default_rng(1), experts=8, windows=4)
    model = model_for(profile, num_expert_groups=2)
    grouped = make_problem(profile, cluster([0, 0, 1, 1]), model=model, calibration=LINEAR)
    made = optimize(grouped, solver="eplb").placement
    for row in made.physical_to_logical_map_LS:
        nodes = {frozenset(row[:4] // 4), frozenset(row[4:] // 4)}
        assert nodes == {frozenset({0}), frozenset({1})}


def test_more_replicas_than_devices_are_no_answer_of_eplb() -> None:
    """EPLB fills every slot; where that needs an expert twice on a device it has no answer."""
    with pytest.raises(InfeasibleError, match="for 2 GPUs"):
        optimize(problem([9, 1], cluster([0, 0]), spare_slots=4), solver="eplb")
