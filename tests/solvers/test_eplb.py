"""Tests of DeepSeek's EPLB against its published example, and of the repair of duplicates."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from placement.errors import InfeasibleError, InputError
from placement.solvers.eplb import rebalance_experts, replicate_experts
from placement.solvers.replicas import logical_to_physical, without_duplicates

# The example of EPLB's README: 2 layers, 12 experts in 4 groups, 16 replicas on 2 nodes of 4 GPUs.
README_WEIGHT = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
README_MAP = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


@st.composite
def problems(draw: st.DrawFn) -> tuple[npt.NDArray[np.float64], int, int, int, int]:
    """Draw loads and sizes that the published algorithm accepts, of both policies."""
    num_nodes = draw(st.sampled_from([1, 2, 4]))
    num_gpus = num_nodes * draw(st.integers(1, 3))
    num_groups = draw(st.sampled_from([1, 2, 4, 6]))
    num_experts = num_groups * draw(st.integers(1, 4))
    num_replicas = (-(-num_experts // num_gpus) + draw(st.integers(0, 2))) * num_gpus
    loads = st.integers(0, 40).map(float) | st.floats(0, 1e4, width=32)
    rows = st.lists(loads, min_size=num_experts, max_size=num_experts)
    weight = np.array(draw(st.lists(rows, min_size=1, max_size=2)))
    return weight, num_replicas, num_groups, num_nodes, num_gpus


def devices_hold_distinct(p2l_LR: npt.NDArray[np.int64], num_gpus: int) -> bool:
    per_device = p2l_LR.reshape(p2l_LR.shape[0] * num_gpus, -1)
    return all(len(set(row)) == len(row) for row in per_device.tolist())


def fullest(p2l_R: npt.NDArray[np.int64], weight_E: npt.NDArray[np.float64], num_gpus: int) -> float:
    """Load of the fullest device when replicas share evenly."""
    share_E = weight_E / np.bincount(p2l_R, minlength=weight_E.size)
    return float(share_E[p2l_R].reshape(num_gpus, -1).sum(axis=1).max())


# --------------------------------------------------------------------------------------- the algorithm


def test_published_example() -> None:
    """The map is the one that EPLB's README prints."""
    p2l, l2p, count = rebalance_experts(README_WEIGHT, 16, 4, 2, 8)
    assert p2l.tolist() == README_MAP
    assert count.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    assert l2p[0, :2].tolist() == [[12, -1], [15, 13]]
    assert {str(array.dtype) for array in (p2l, l2p, count)} == {"int64"}


def test_groups_stay_on_their_node() -> None:
    """The hierarchical policy keeps the experts of a group on one node."""
    p2l, _, _ = rebalance_experts(README_WEIGHT, 16, 4, 2, 8)
    for node_slots in p2l.reshape(2, 2, 8):
        groups = [set((slots // 3).tolist()) for slots in node_slots]
        assert not groups[0] & groups[1]


def test_global_policy_where_nodes_do_not_divide_groups() -> None:
    """3 groups on 2 nodes: groups and nodes are ignored."""
    by_groups = rebalance_experts(README_WEIGHT, 16, 3, 2, 8)
    as_one = rebalance_experts(README_WEIGHT, 16, 1, 1, 8)
    for a, b in zip(by_groups, as_one, strict=True):
        assert a.tolist() == b.tolist()


def test_hottest_expert_is_replicated_first() -> None:
    """Loads 9, 4, 1 in six slots: 9 -> 4.5, then 4.5 -> 3, then 4 -> 2; extra slots go 0, 0, 1."""
    expert, rank, count = replicate_experts(np.array([[9.0, 4.0, 1.0]]), 6)
    assert expert.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert rank.tolist() == [[0, 0, 0, 1, 2, 1]]
    assert count.tolist() == [[3, 2, 1]]


def test_published_algorithm_may_duplicate() -> None:
    """Two GPUs, one hot expert: the published algorithm puts its replicas together; kept as it is."""
    p2l, _, _ = rebalance_experts([[100.0, 0.0, 0.0, 0.0]], 6, 1, 1, 2)
    assert not devices_hold_distinct(p2l, 2)


@given(problems())
def test_maps_agree(problem: tuple[npt.NDArray[np.float64], int, int, int, int]) -> None:
    """Every expert is present, counts are right, and the two maps are inverse to each other."""
    weight, num_replicas, num_groups, num_nodes, num_gpus = problem
    assume(num_replicas // num_nodes >= weight.shape[1] // num_nodes)
    p2l, l2p, count = rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus)
    assert p2l.shape == (weight.shape[0], num_replicas)
    assert l2p.shape == (*weight.shape, count.max())
    assert (count >= 1).all()
    for layer in range(weight.shape[0]):
        assert np.array_equal(count[layer], np.bincount(p2l[layer], minlength=weight.shape[1]))
        for expert in range(weight.shape[1]):
            slots, padding = np.split(l2p[layer, expert], [count[layer, expert]])
            assert (p2l[layer, slots] == expert).all()
            assert len(set(slots.tolist())) == count[layer, expert]
            assert (padding == -1).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0, 2.0], 2, 1, 1, 1), InputError, r"weight has shape \(2,\), not \[layers, items\]"),
        (([[1.0, float("nan")]], 2, 1, 1, 1), InputError, r"weight\[0\]\[1\] is nan"),
        (([[1.0, -1.0]], 2, 1, 1, 1), InputError, r"weight\[0\]\[1\] is -1.0"),
        (([[1e300, 1.0]], 2, 1, 1, 1), InputError, r"weight \(single precision\)\[0\]\[0\] is inf"),
        (([[1.0, 2.0, 3.0]], 2, 1, 1, 1), InfeasibleError, "2 replicas cannot hold 3 experts; at least 3"),
        (
            ([[1.0, 2.0]], 3, 1, 1, 2),
            InfeasibleError,
            "3 replicas do not divide evenly over 2 GPUs; add 1 spare",
        ),
        (([[1.0, 2.0, 3.0]], 4, 2, 2, 2), InputError, "3 experts do not form 2 equal groups"),
        (([[1.0, 2.0]], 3, 2, 2, 3), InputError, "3 GPUs do not divide evenly over 2 nodes"),
        (([[1.0, 2.0]], 2, 1, 0, 1), InputError, "1 groups, 0 nodes, 1 GPUs; each must be 1 or more"),
    ],
)
def test_malformed_input_is_explained(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    """Every wrong argument is one line with the numbers."""
    with pytest.raises(error, match=message) as caught:
        rebalance_experts(*arguments)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ maps


def test_logical_to_physical_by_hand() -> None:
    """Expert 1 sits in slots 0 and 3, expert 0 in slot 2, expert 2 in slot 1."""
    l2p, count = logical_to_physical([[1, 2, 0, 1]], 3)
    assert l2p.tolist() == [[[2, -1], [0, 3], [1, -1]]]
    assert count.tolist() == [[1, 2, 1]]


@pytest.mark.parametrize(
    ("p2l", "message"),
    [
        ([0, 1], r"physical_to_logical has shape \(2,\)"),
        ([[0.0, 1.0]], "of float64, not"),
        ([[0, 2]], r"names experts 0\.\.2, outside 0\.\.1"),
        ([[-1, 1]], r"names experts -1\.\.1, outside 0\.\.1"),
    ],
)
def test_malformed_map_is_explained(p2l: Any, message: str) -> None:
    """A map holds ids of experts that exist."""
    with pytest.raises(InputError, match=message):
        logical_to_physical(p2l, 2)


# ---------------------------------------------------------------------------------------------- repair


def test_repair_by_hand() -> None:
    """0 0 | 1 2 with loads 8, 3, 1: giving 1 away leaves 4+3 | 4+1, giving 2 away 4+1 | 3+4; both 7.

    The squares are equal too, so the lowest slots decide: slots 1 and 2 are swapped.
    """
    assert without_duplicates([[0, 0, 1, 2]], 2, [[8.0, 3.0, 1.0]]).tolist() == [[0, 1, 0, 2]]


def test_repair_does_the_least_damage() -> None:
    """0 0 | 1 2 | 3 4, loads 8, 5, 1, 0, 0: the replica goes where nothing is (4+0 | 5+1 | 4+0)."""
    repaired = without_duplicates([[0, 0, 1, 2, 3, 4]], 3, [[8.0, 5.0, 1.0, 0.0, 0.0]])
    assert repaired.tolist() == [[0, 3, 1, 2, 0, 4]]


def test_repair_prefers_the_node() -> None:
    """As above, but the idle device is on another node: the swap with the busier neighbour is made."""
    p2l, weight = [[0, 0, 1, 2, 3, 4, 5, 6]], [[8.0, 5.0, 1.0, 0.0, 0.0, 0.0, 0.0]]
    assert without_duplicates(p2l, 4, weight, num_nodes=1).tolist() == [[0, 3, 1, 2, 0, 4, 5, 6]]
    assert without_duplicates(p2l, 4, weight, num_nodes=2).tolist() == [[0, 1, 0, 2, 3, 4, 5, 6]]


def test_repair_crosses_nodes_where_it_must() -> None:
    """Three replicas on a node of two devices: one has to leave it."""
    repaired = without_duplicates([[0, 0, 0, 1, 2, 3, 4, 5]], 4, [[9.0, 1, 1, 1, 1, 1]], num_nodes=2)
    assert devices_hold_distinct(repaired, 4)
    assert sorted(repaired[0].tolist()) == [0, 0, 0, 1, 2, 3, 4, 5]


def test_repair_leaves_good_layers_alone() -> None:
    """Only the layer with a duplicate changes."""
    repaired = without_duplicates([[1, 0, 0, 2], [0, 0, 1, 2]], 2, [[4.0, 1, 1], [4.0, 1, 1]])
    assert repaired[0].tolist() == [1, 0, 0, 2]
    assert devices_hold_distinct(repaired, 2)


def test_repair_through_an_intermediate_swap() -> None:
    """The only device without expert 0 holds nothing new to the first: another swap opens the way."""
    p2l = [[0, 0, 1, 2, 1, 1, 2, 2, 0, 3, 4, 5]]
    repaired = without_duplicates(p2l, 3, np.ones((1, 6)))
    assert devices_hold_distinct(repaired, 3)
    assert sorted(repaired[0].tolist()) == sorted(p2l[0])


def test_repair_does_not_change_its_input() -> None:
    """The given map stays as it was."""
    p2l = np.array([[0, 0, 1, 2]])
    without_duplicates(p2l, 2, [[8.0, 3.0, 1.0]])
    assert p2l.tolist() == [[0, 0, 1, 2]]


def test_more_replicas_than_devices_is_infeasible() -> None:
    """Three replicas cannot be on different ones of two devices."""
    with pytest.raises(InfeasibleError, match="layer 0 has 3 replicas of expert 0 for 2 GPUs"):
        without_duplicates([[0, 0, 0, 1]], 2, [[3.0, 1.0]])


@pytest.mark.parametrize(
    ("p2l", "num_gpus", "num_nodes", "message"),
    [
        ([[0, 1, 1]], 2, 1, "3 slots, 2 GPUs and 1 nodes do not divide evenly"),
        ([[0, 1, 1, 0]], 2, 4, "4 slots, 2 GPUs and 4 nodes do not divide evenly"),
        ([[0, 1], [0, 1]], 2, 1, "physical_to_logical has 2 layers, weight 1"),
    ],
)
def test_repair_rejects_shapes_that_do_not_fit(
    p2l: list[list[int]], num_gpus: int, num_nodes: int, message: str
) -> None:
    """Slots, devices, nodes and layers must fit together."""
    with pytest.raises(InputError, match=message):
        without_duplicates(p2l, num_gpus, [[1.0, 1.0]], num_nodes=num_nodes)


@given(problems())
def test_repaired_placements_are_whole(problem: tuple[npt.NDArray[np.float64], int, int, int, int]) -> None:
    """After the repair no device holds an expert twice, and each layer has the replicas it had."""
    weight, num_replicas, num_groups, num_nodes, num_gpus = problem
    p2l, _, count = rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus)
    assume(count.max() <= num_gpus)
    repaired = without_duplicates(p2l, num_gpus, weight, num_nodes=num_nodes)
    assert devices_hold_distinct(repaired, num_gpus)
    assert np.array_equal(np.sort(repaired, axis=1), np.sort(p2l, axis=1))


@given(st.data())
def test_repair_mends_any_map(data: st.DataObject) -> None:
    """From any arrangement of feasible replicas, however clumped, the repair arrives."""
    num_gpus, capacity = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 4))
    num_experts = data.draw(st.integers(capacity, 8))
    spread = data.draw(
        st.lists(
            st.lists(st.integers(0, num_experts - 1), min_size=capacity, max_size=capacity, unique=True),
            min_size=num_gpus,
            max_size=num_gpus,
        )
    )
    shuffled = data.draw(st.permutations([expert for device in spread for expert in device]))
    start = np.array([data.draw(st.sampled_from([shuffled, sorted(shuffled)]))])
    weight = np.array([data.draw(st.lists(st.floats(0, 99), min_size=num_experts, max_size=num_experts))])
    repaired = without_duplicates(start, num_gpus, weight)
    assert devices_hold_distinct(repaired, num_gpus)
    assert sorted(repaired[0].tolist()) == sorted(shuffled)


def test_repair_is_cheap_in_balance() -> None:
    """On skewed loads of DeepSeek's size the fullest device grows by less than 5 %."""
    weight = np.random.default_rng(7).gamma(0.5, 1000, size=(2, 256))
    p2l, _, _ = rebalance_experts(weight, 288, 8, 4, 32)
    repaired = without_duplicates(p2l, 32, weight, num_nodes=4)
    assert (p2l != repaired).any()
    for layer in range(2):
        assert fullest(repaired[layer], weight[layer], 32) <= 1.05 * fullest(p2l[layer], weight[layer], 32)
