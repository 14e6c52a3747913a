"""Tests of the fast balancer: valid maps, brute force on tiny layers, uneven slots, speeds, windows."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import LINEAR, cluster, every_row, random_profile

from placement.cost import CostModel
from placement.errors import InfeasibleError
from placement.problem import make_problem
from placement.solvers.balance import TOLERANCE, balance_layers
from placement.solvers.balance.kernels import least_share, partition_equal
from placement.solvers.protocol import SolveRequest
from placement.solvers.registry import make_solver

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def fullest(
    row_S: IntArray, load_E: FloatArray, slots_D: IntArray, speed_D: FloatArray | None = None
) -> float:
    """Longest time of a device when replicas share evenly."""
    device_S = np.repeat(np.arange(slots_D.size), slots_D)
    held_S = row_S >= 0
    share_E = load_E / np.maximum(np.bincount(row_S[held_S], minlength=load_E.size), 1)
    load_D = np.bincount(device_S[held_S], weights=share_E[row_S[held_S]], minlength=slots_D.size)
    return float((load_D / (1.0 if speed_D is None else speed_D)).max())


def check_row(row_S: IntArray, num_experts: int, slots_D: IntArray) -> None:
    """Every expert is somewhere, no device holds one twice."""
    assert set(row_S[row_S >= 0].tolist()) == set(range(num_experts))
    for held in np.split(row_S, np.cumsum(slots_D)[:-1]):
        experts = held[held >= 0].tolist()
        assert len(set(experts)) == len(experts)


@st.composite
def layers(draw: st.DrawFn) -> tuple[FloatArray, IntArray]:
    """Draw loads, ties and zeros among them, and slots of any number on each device."""
    num_experts = draw(st.integers(1, 12))
    slots_D = np.array(draw(st.lists(st.integers(0, 8), min_size=1, max_size=5)))
    missing = num_experts - int(slots_D.sum())
    slots_D[-1] += max(missing, 0)
    if slots_D.clip(max=num_experts).sum() < num_experts:
        slots_D[:] = num_experts
    load = st.sampled_from([0.0, 1.0, 3.0, 50.0]) | st.floats(0, 1e3)
    return np.array(draw(st.lists(load, min_size=num_experts, max_size=num_experts))), slots_D


@settings(max_examples=100, deadline=None)
@given(layers(), st.integers(0, 3))
def test_any_layer_gets_a_valid_row(layer: tuple[FloatArray, IntArray], seed: int) -> None:
    """Whatever loads and slots: coverage, no duplicates, slots empty only where nothing new fits."""
    load_E, slots_D = layer
    row_S = balance_layers(load_E[None], slots_D, seed=seed)[0]
    check_row(row_S, load_E.size, slots_D)
    for held, slots in zip(np.split(row_S, np.cumsum(slots_D)[:-1]), slots_D, strict=True):
        assert (held >= 0).sum() == min(slots, load_E.size)


def test_a_hot_expert_by_hand() -> None:
    """Loads 6, 1, 1, 1, 1, 2 on 3 devices of 3 slots: three replicas of 2 each, then 4 on every device."""
    load_E = np.array([6.0, 1, 1, 1, 1, 2])
    row_S = balance_layers(load_E[None], np.array([3, 3, 3]))[0]
    assert fullest(row_S, load_E, np.array([3, 3, 3])) == pytest.approx(4.0, rel=TOLERANCE)


@pytest.mark.parametrize("seed", range(12))
def test_tiny_layers_are_optimal(seed: int) -> None:
    """The fullest device is that of the best of all placements, or within the tolerance of the floor."""
    rng = np.random.default_rng(seed)
    slots_D = np.array([[2, 2, 2], [3, 3], [4, 2], [2, 2, 1]][seed % 4])
    load_E = rng.gamma(0.7, 10.0, size=4)
    rows = (np.array(row) for row in every_row(4, slots_D.tolist()))
    least = min(fullest(row_S, load_E, slots_D) for row_S in rows)
    found = fullest(balance_layers(load_E[None], slots_D, fill=False)[0], load_E, slots_D)
    assert least * (1 - 1e-12) <= found <= least * (1 + TOLERANCE) + 1e-12


def test_shares_are_watered_level() -> None:
    """Loads 9, 4, 1 in six slots: 3, 2 and 1 replicas leave 3 as the largest share, one device's least."""
    assert least_share(np.array([9.0, 4.0, 1.0]), 6, 4) == 3.0
    assert least_share(np.array([9.0, 4.0, 1.0]), 6, 2) == 4.5


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_scale_of_loads_does_not_matter(scale: float) -> None:
    """Loads times any factor give the same map."""
    load_LE = np.random.default_rng(3).gamma(0.5, 10.0, size=(2, 24))
    slots_D = np.full(4, 8)
    np.testing.assert_array_equal(balance_layers(load_LE * scale, slots_D), balance_layers(load_LE, slots_D))


def test_a_layer_without_load_is_spread_evenly() -> None:
    """Replicas differ by one at most where nobody knows better."""
    row_S = balance_layers(np.zeros((1, 6)), np.full(4, 2))[0]
    assert sorted(np.bincount(row_S).tolist()) == [1, 1, 1, 1, 2, 2]


def test_real_sizes_are_even_to_a_ten_thousandth() -> None:
    """256 skewed experts with 32 spare slots on 32 devices."""
    load_LE = np.random.default_rng(0).gamma(0.5, 1000.0, size=(4, 256))
    slots_D = np.full(32, 9)
    for row_S, load_E in zip(balance_layers(load_LE, slots_D), load_LE, strict=True):
        check_row(row_S, 256, slots_D)
        assert fullest(row_S, load_E, slots_D) <= load_E.sum() / 32 * (1 + 1.01 * TOLERANCE)


def test_fast_devices_carry_more() -> None:
    """Devices of speed 3, 1 and 1 are loaded in that proportion."""
    load_E = np.random.default_rng(1).gamma(2.0, 10.0, size=24)
    slots_D, speed_D = np.array([10, 8, 8]), np.array([3.0, 1.0, 1.0])
    row_S = balance_layers(load_E[None], slots_D, speed_D=speed_D)[0]
    assert fullest(row_S, load_E, slots_D, speed_D) <= 1.02 * load_E.sum() / 5


def test_too_few_slots_are_infeasible() -> None:
    """Both numbers are named."""
    with pytest.raises(InfeasibleError, match="3 slots cannot hold 4 experts; at least 4"):
        balance_layers(np.ones((1, 4)), np.array([2, 1]))


def test_windows_beat_their_sum() -> None:
    """Experts 0, 1 surge together, and 2, 3: alike in sum, but only mixed pairs are even in each window."""
    load_WLE = np.array([[[5.0, 5, 1, 1]], [[1.0, 1, 5, 5]]])
    slots_D = np.array([2, 2])
    row_S = balance_layers(load_WLE.sum(axis=0), slots_D, load_WLE=load_WLE)[0]
    assert {tuple(sorted(row_S[:2].tolist()))} & {(0, 2), (0, 3), (1, 2), (1, 3)}


@pytest.mark.parametrize("seed", range(4))
def test_windows_come_close_to_brute_force(seed: int) -> None:
    """Within 5 % of the best mean over windows of fullest / mean device, though windows are softened."""
    rng = np.random.default_rng(seed)
    load_WLE = rng.gamma(1.0, 10.0, size=(3, 1, 6))
    slots_D = np.array([3, 3])

    def value(row_S: IntArray) -> float:
        return float(np.mean([2 * fullest(row_S, w[0], slots_D) / w.sum() for w in load_WLE]))

    halves = itertools.combinations(range(6), 3)
    least = min(value(np.array([*half, *sorted(set(range(6)) - set(half))])) for half in halves)
    row_S = balance_layers(load_WLE.sum(axis=0), slots_D, load_WLE=load_WLE)[0]
    assert least * (1 - 1e-12) <= value(row_S) <= 1.05 * least


@pytest.mark.parametrize("seed", range(6))
def test_equal_bins_by_brute_force(seed: int) -> None:
    """Eight groups on four nodes, two on each: the lightest heaviest node of all 105 ways."""
    load_G = np.random.default_rng(seed).gamma(1.0, 10.0, size=8)
    bin_G = partition_equal(load_G, 4, 100_000)
    assert np.bincount(bin_G).tolist() == [2, 2, 2, 2]
    # Pair the heaviest with the lightest, and so on: optimal for pairs.
    ordered = np.sort(load_G)
    least = (ordered + ordered[::-1]).max()
    assert np.bincount(bin_G, weights=load_G).max() == pytest.approx(least)


@pytest.mark.parametrize("objective", ["balance", "step-time"])
def test_the_solver_is_not_worse_than_greedy(objective: str) -> None:
    """With tokens, windows and devices of two speeds."""
    rng = np.random.default_rng(2)
    profile = random_profile(rng, tokens=600, experts=16, top_k=3, windows=5)
    topology = cluster([0, 0, 0], kind_D=[0, 0, 1], tflops=(100.0, 100.0))
    problem = make_problem(profile, topology, calibration=LINEAR, objective=objective, spare_slots=2)
    request = SolveRequest(problem=problem, model=CostModel(problem))
    ours, greedy = (
        CostModel(problem).evaluate(make_solver(name).solve(request)).metrics.balance
        for name in ("balance", "greedy")
    )
    assert ours <= greedy
