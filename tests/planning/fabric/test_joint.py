"""Placement and circuits together, against counting token by token and trying everything."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from fabric_reference import best_joint, layer_of, token_demand
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.planning.fabric import FabricRegion
from placement.planning.fabric.joint import plan_jointly, plan_layer, time_on
from placement.planning.fabric.swaps import LayerCost, _demand_after, _fullest_after, improve_placement
from placement.planning.fabric.traffic import LayerTraffic, RegionTraffic, dealt_homes
from placement.profile import RoutingProfile

IntArray = npt.NDArray[np.int64]

SERVERS = np.array([0, 0, 1, 1, 2, 2])


def routing(seed: int, *, experts: int, tokens: int, servers: int) -> tuple[IntArray, IntArray]:
    """Return two distinct experts and a home for each token; experts of a group go together."""
    random = np.random.default_rng(seed)
    first = random.integers(0, experts, tokens)
    second = (first + random.choice([1, 2, experts // 2], tokens)) % experts
    home = np.sort(random.integers(0, servers, tokens))
    home[first == 0] = 0
    return np.stack([first, second], axis=1), home


def drawn(seed: int, server_D: IntArray = SERVERS, *, experts: int = 6) -> LayerTraffic:
    """Return a layer of 40 tokens."""
    chosen, home = routing(seed, experts=experts, tokens=40, servers=int(server_D.max()) + 1)
    return layer_of(chosen, home, server_D, num_experts=experts, seconds_per_pair=1e-4)


def region(servers: int) -> FabricRegion:
    """Return a region of 2 + 1 ports and 1 GB/s."""
    return FabricRegion(num_servers=servers, ocs_ports=2, eps_ports=1, link_gbits=8.0)


def test_demand_by_hand() -> None:
    """A token is sent once to each other server that holds one of its experts."""
    # Experts 0, 1 | 2, 3 on two servers. Token at home 0 with {2, 3} sends once; {0, 1} nothing; {1, 2} once;
    # token at home 1 with {0, 1} sends once. A megabyte each.
    experts, home = np.array([[2, 3], [0, 1], [1, 2], [0, 1]]), np.array([0, 0, 0, 1])
    layer = layer_of(experts, home, np.array([0, 1]), num_experts=4, seconds_per_pair=1.0)
    device = np.array([0, 0, 1, 1])
    assert layer.demand(device).tolist() == [[0, 2e6], [1e6, 0]]
    # Pairs per expert: 2, 3, 2, 1.
    assert layer.compute_D(device).tolist() == [5.0, 3.0]


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_swaps_are_priced_exactly(seed: int) -> None:
    """Every swap's demand and fullest device are what counting anew gives."""
    chosen, home = routing(seed, experts=8, tokens=60, servers=3)
    layer = layer_of(chosen, home, SERVERS, num_experts=8, seconds_per_pair=1e-4)
    device = np.random.default_rng(seed).integers(0, 6, 8)
    first, second = np.triu_indices(8, 1)
    demand, fullest = (
        _demand_after(layer, device, first, second),
        _fullest_after(layer, device, first, second),
    )
    for index, pair in enumerate(zip(first, second, strict=True)):
        swapped = device.copy()
        swapped[list(pair)] = device[list(pair[::-1])]
        counted = token_demand(chosen, home, swapped, SERVERS, np.full(60, 1e6))
        assert demand[index] == pytest.approx(counted, abs=1e-3)
        assert fullest[index] == pytest.approx(layer.compute_D(swapped).max())


@given(seed=st.integers(0, 10**6), paired=st.booleans())
@settings(max_examples=5, deadline=None)
def test_together_is_never_slower_than_apart(seed: int, paired: bool) -> None:
    """On the traffic that is planned for, no starting placement with its own circuits is faster."""
    layer, cost = drawn(seed), LayerCost(region=region(3), paired=paired)
    random = np.random.default_rng(seed)
    starts = {"contiguous": np.arange(6), "other": random.permutation(6)}
    joint, separate = plan_layer(layer, starts, cost)
    assert joint.time_s == cost(layer, joint.device_E, joint.allocation.circuits_SS)
    assert joint.time_s <= min(answer.time_s for answer in separate.values())
    assert np.sort(joint.device_E).tolist() == list(range(6))


def test_together_against_trying_everything() -> None:
    """Tiny layers: never faster than the best of all placements and circuits, and near it."""
    servers = np.array([0, 1, 2])
    cost, starts = LayerCost(region=region(3)), {"contiguous": np.array([0, 0, 1, 1, 2, 2])}
    ratios = []
    for seed in range(2):
        layer = drawn(seed, servers)
        joint, _ = plan_layer(layer, starts, cost)
        ratios.append(joint.time_s / best_joint(layer, cost))
    assert min(ratios) >= 1 - 1e-9
    assert np.mean(ratios) <= 1.05


def test_swaps_only_gain() -> None:
    """A placement is left alone where no swap gains; limits on swaps are kept."""
    layer, cost = drawn(5), LayerCost(region=region(3))
    circuits = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])
    start = np.arange(6)
    better = improve_placement(layer, start, circuits, cost)
    assert cost(layer, better, circuits) <= cost(layer, start, circuits)
    assert improve_placement(layer, better, circuits, cost).tolist() == better.tolist()
    assert improve_placement(layer, start, circuits, cost, max_swaps=0).tolist() == start.tolist()


def test_layers_add_up() -> None:
    """The plan's time is the sum over layers, here and on other traffic."""
    traffic = RegionTraffic(layers=(drawn(1), drawn(2)))
    cost, starts = LayerCost(region=region(3)), {"contiguous": np.tile(np.arange(6), (2, 1))}
    plan = plan_jointly(traffic, starts, cost)
    assert plan.time_s == pytest.approx(time_on(traffic, plan.layers, cost))
    assert plan.time_s <= plan.separate_s
    assert plan.device_LE.shape == (2, 6)


def test_homes_are_dealt_in_blocks() -> None:
    """Tokens of a window are dealt to devices in order, each window anew; known homes are kept."""
    profile = RoutingProfile(
        load_WLE=np.ones((2, 1, 2)),
        window_tokens_W=np.array([4.0, 2.0]),
        top_k=1,
        experts_TLK=np.zeros((6, 1, 1), dtype=np.uint8),
        window_of_token_T=np.array([0, 0, 0, 0, 1, 1]),
    )
    assert dealt_homes(profile, 2).tolist() == [0, 0, 1, 1, 0, 1]
