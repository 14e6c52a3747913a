"""Circuits: the closed form, the greedies, the search, the program and their bounds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from fabric_reference import best_of_everything, lp_time
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InfeasibleError, InputError
from placement.planning.fabric import (
    Effort,
    FabricRegion,
    OpticalSwitch,
    all_to_all_time,
    allocate_circuits,
    paired_demand,
    synthetic_demand,
    unsplit_time,
)
from placement.planning.fabric.bounds import counting_bound, links_bound
from placement.planning.fabric.completion import check_circuits, optimal_split
from placement.planning.fabric.greedy import balanced_greedy, code_greedy, published_greedy
from placement.planning.fabric.search import improve_circuits

# Links of 8 Gb/s carry 1e9 bytes per second, so that gigabytes are seconds.
GB = 1e9


def small(servers: int = 3, *, ocs: int = 2, eps: int = 1) -> FabricRegion:
    """Return a region with links of 1 GB/s."""
    return FabricRegion(num_servers=servers, ocs_ports=ocs, eps_ports=eps, link_gbits=8.0)


def paired_draw(servers: int, skew: float, seed: int) -> npt.NDArray[np.float64]:
    """Return what pairs send and receive together."""
    return paired_demand(synthetic_demand(servers, skew=skew, seed=seed)[0])


def test_closed_form_by_hand() -> None:
    """A pair's bytes over its circuit and the packet port, and what is left of a heavy pair."""
    # Servers 0 and 1 share 6 GB and one circuit; 0 and 2 share 1 GB and no circuit. The set {1} alone gives
    # 6/(1+1) = 3 s, the set {1, 2} (6+1)/(1+1) = 3.5 s at server 0, which is the worst.
    demand = np.array([[0, 6, 1], [6, 0, 0], [1, 0, 0]]) * GB
    circuits = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert all_to_all_time(circuits, demand, small()) == pytest.approx(3.5)
    # Without splitting the pair 0-1 takes 6/1 = 6 s over its circuit.
    assert unsplit_time(circuits, demand, small()) == pytest.approx(6.0)


def test_full_duplex_takes_the_busier_direction() -> None:
    """Directed demand shares nothing with the way back; paired demand adds both."""
    # 4 GB one way, 2 GB back, one circuit and one packet port: 4/2 = 2 s directed, 6/2 = 3 s paired.
    region, circuits = small(2, ocs=1), np.array([[0, 1], [1, 0]])
    demand = np.array([[0, 4], [2, 0]]) * GB
    assert all_to_all_time(circuits, demand, region) == pytest.approx(2.0)
    assert all_to_all_time(circuits, paired_demand(demand), region) == pytest.approx(3.0)


@given(seed=st.integers(0, 10**6), symmetric=st.booleans(), eps=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_closed_form_equals_the_linear_program(seed: int, symmetric: bool, eps: int) -> None:
    """The formula gives what a linear program of time and split gives."""
    random, region = np.random.default_rng(seed), small(4, ocs=9, eps=eps)
    demand = GB * random.lognormal(0, 1, (4, 4)) * (random.random((4, 4)) < 0.8)
    np.fill_diagonal(demand, 0.0)
    demand[0, 1] = GB
    demand = paired_demand(demand) if symmetric else demand
    circuits = np.triu(random.integers(0, 3, (4, 4)), 1)
    circuits += circuits.T
    time_s = all_to_all_time(circuits, demand, region)
    assert time_s == pytest.approx(lp_time(circuits, demand, region), rel=1e-5)
    split = optimal_split(circuits, demand, region)
    assert all_to_all_time(circuits, demand, region, split_SS=split) == pytest.approx(time_s, rel=1e-9)


def test_published_greedy_serves_every_pair_first() -> None:
    """As printed, a pair without a circuit takes for ever, so a heavy pair waits for its second."""
    # 9 : 1 : 1 with 2 ports each: pairs 01, 02, 12 get one each, and all ports are used.
    demand = np.array([[0, 9, 1], [9, 0, 1], [1, 1, 0]]) * GB
    triangle = [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    assert published_greedy(demand, ocs_ports=2).tolist() == triangle
    assert code_greedy(demand, ocs_ports=2).tolist() == triangle
    # Counting packet ports, 9/2 is still more than 1: both circuits go to the heavy pair.
    assert balanced_greedy(demand, ocs_ports=2).tolist() == [[0, 2, 0], [2, 0, 0], [0, 0, 0]]


def test_code_weighs_demand_over_hundred_circuits() -> None:
    """The code's weight gives a pair 100 times as heavy its second circuit before a light one its first."""
    demand = np.array([[0, 500, 1], [500, 0, 1], [1, 1, 0]]) * GB
    assert code_greedy(demand, ocs_ports=2)[0, 1] == 2
    assert published_greedy(demand, ocs_ports=2)[0, 1] == 1


@given(seed=st.integers(0, 10**6), servers=st.integers(2, 9), ocs=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_circuits_are_feasible_and_never_slower_than_published(seed: int, servers: int, ocs: int) -> None:
    """Whatever allocates keeps ports and symmetry; the best of all is never slower; bounds hold."""
    region = small(servers, ocs=ocs)
    demand = synthetic_demand(servers, skew=1.0, seed=seed)[0]
    for greedy in (published_greedy, code_greedy, balanced_greedy):
        circuits = greedy(demand, ocs_ports=ocs)
        check_circuits(circuits, region)
        improved = improve_circuits(circuits, demand, region)
        check_circuits(improved, region)
        assert all_to_all_time(improved, demand, region) <= all_to_all_time(circuits, demand, region)
    answer = allocate_circuits(demand, region, effort=Effort(nodes=20))
    check_circuits(answer.circuits_SS, region)
    published = published_greedy(demand, ocs_ports=ocs)
    assert answer.published_s == unsplit_time(published, demand, region)
    assert answer.time_s == all_to_all_time(answer.circuits_SS, demand, region)
    split_s = all_to_all_time(published, demand, region)
    assert answer.time_s <= split_s
    # The two formulas add in different orders.
    assert split_s <= answer.published_s * (1 + 1e-12)
    assert links_bound(demand, region) * (1 - 1e-9) <= answer.lower_bound_s <= answer.time_s


@given(seed=st.integers(0, 10**6), servers=st.integers(3, 4), symmetric=st.booleans())
@settings(max_examples=12, deadline=None)
def test_best_of_all_is_the_best_there_is(seed: int, servers: int, symmetric: bool) -> None:
    """On tiny regions every circuits can be tried: the answer is as fast, and bounds stay below."""
    region = small(servers, ocs=3)
    demand = synthetic_demand(servers, skew=1.2, seed=seed)[0]
    demand = paired_demand(demand) if symmetric else demand
    best_s = best_of_everything(demand, region)
    answer = allocate_circuits(demand, region)
    assert answer.time_s == pytest.approx(best_s, rel=2e-4)
    assert answer.lower_bound_s <= best_s * (1 + 1e-9)
    assert counting_bound(demand, region) <= best_s * (1 + 1e-9)


@pytest.mark.parametrize("skew", [0.3, 0.6, 1.0])
def test_eight_servers_come_near_a_fat_tree(skew: float) -> None:
    """Eight servers of 6 + 2 ports: within 5 % of a fat-tree that never blocks in the mean of a few draws."""
    region = FabricRegion(num_servers=8)
    ours, published = [], []
    for seed in range(4):
        demand = paired_draw(8, skew, seed)
        answer = allocate_circuits(demand, region)
        assert answer.time_s <= min(answer.time_of_method_s.values()) * (1 + 1e-12)
        ours.append(answer.time_s / links_bound(demand, region))
        published.append(answer.published_s / links_bound(demand, region))
    assert np.mean(ours) <= 1.05
    assert np.mean(published) >= 1.3


def test_eight_servers_of_six_ports_get_24_circuits() -> None:
    """All 48 ports end in 24 circuits where the demand is equal (MixNet, section 7.3)."""
    demand = synthetic_demand(8, skew=0.0)[0]
    assert published_greedy(demand, ocs_ports=6).sum() // 2 == 24
    assert balanced_greedy(demand, ocs_ports=6).sum() // 2 == 24


def test_large_region_without_the_program() -> None:
    """Forty servers: the search brings the greedy to the bound that counting gives."""
    region = FabricRegion(num_servers=40)
    demand = paired_draw(40, 1.0, 0)
    answer = allocate_circuits(demand, region)
    assert "exact" not in answer.time_of_method_s
    assert answer.time_s < answer.time_of_method_s["balanced"]
    assert answer.gap < 0.01


def test_no_demand_takes_no_time() -> None:
    """Nothing to send needs no circuits."""
    answer = allocate_circuits(np.zeros((3, 3)), small())
    assert (answer.time_s, answer.lower_bound_s, answer.gap) == (0.0, 0.0, 0.0)


def test_without_packet_ports_every_pair_needs_a_circuit() -> None:
    """Two ports join three servers; four servers that all talk they do not."""
    assert np.isfinite(allocate_circuits(np.ones((3, 3)), small(3, ocs=2, eps=0)).time_s)
    with pytest.raises(InfeasibleError, match="talks to 3 peers"):
        allocate_circuits(np.ones((4, 4)), small(4, ocs=2, eps=0))


def test_start_is_kept_where_nothing_is_faster() -> None:
    """Circuits that are up are one of the answers."""
    demand, region = paired_draw(6, 1.0, 3), small(6)
    start = allocate_circuits(demand, region).circuits_SS
    again = allocate_circuits(demand, region, effort=Effort(nodes=0), start_SS=start)
    assert again.time_s <= all_to_all_time(start, demand, region)
    with pytest.raises(InputError, match="has 2 optical ports"):
        allocate_circuits(
            demand, region, start_SS=np.ones((6, 6), dtype=np.int64) - np.eye(6, dtype=np.int64)
        )


def test_region_must_fit_its_switch() -> None:
    """The message names what is missing and what would fit."""
    # 84 x 6 = 504 ports, 4 more than 500; 500 // 6 = 83 servers, 500 // 84 = 5 ports.
    with pytest.raises(InfeasibleError, match=r"504 ports.* 4 are missing.* 83 such .* 5 ports"):
        FabricRegion(num_servers=84)
    switch = OpticalSwitch(name="large", ports=504, reconfiguration_s=0.0)
    assert FabricRegion(num_servers=84, switch=switch).ports == 8


@pytest.mark.parametrize(
    ("demand", "message"),
    [
        (np.ones((2, 3)), "shape"),
        (np.array([[0, np.nan, 1], [1, 0, 1], [1, 1, 0]]), "from server 0 to 1"),
        (np.array([[0, 1, 1], [1, 0, -1], [1, 1, 0]]), "from server 1 to 2"),
    ],
)
def test_bad_demand_is_named(demand: npt.NDArray[np.float64], message: str) -> None:
    """Shape, NaN and negative bytes are told with their place."""
    with pytest.raises(InputError, match=message):
        allocate_circuits(demand, small())
