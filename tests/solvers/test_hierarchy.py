"""Tests of the hierarchy solver: groups on nodes, exact visits, even loads, what it refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import LINEAR, cluster, counts_only, model_for, random_profile

from placement.cost import CostModel
from placement.errors import InputError
from placement.problem import PlacementProblem, make_problem
from placement.solvers.hierarchy.groups import cluster_experts, group_homes
from placement.solvers.hierarchy.kernels import make_cut, place_copies, place_on_devices, search_nodes
from placement.solvers.hierarchy.solver import BALANCE_LIMIT, layer_node_fanout
from placement.solvers.protocol import SolveRequest
from placement.solvers.registry import make_solver
from traces.statistics import build_profile
from traces.synthesize import synthesize

IntArray = npt.NDArray[np.int64]

NODES = [0, 0, 1, 1, 2, 2, 3, 3]


def request_of(problem: PlacementProblem) -> SolveRequest:
    """Return a small request."""
    return SolveRequest(problem=problem, model=CostModel(problem), work_s=0.5)


def grouped_problem(objective: str = "balance", *, groups: int = 8, spare_slots: int = 8) -> PlacementProblem:
    """Return 64 experts in 8 groups, tokens in 4 of them, on four nodes of two devices."""
    trace = synthesize(
        num_tokens=4096,
        num_layers=2,
        num_experts=64,
        top_k=6,
        num_groups=8,
        top_groups=4,
        coactivation=0.5,
        seed=0,
    )
    profile = build_profile(trace, window_tokens=1024)
    model = model_for(profile, num_expert_groups=groups)
    return make_problem(
        profile,
        cluster(NODES),
        model=model,
        calibration=LINEAR if objective != "step-time" else None,
        objective=objective,
        spare_slots=spare_slots,
    )


def visits(experts_TK: IntArray, node_E: IntArray) -> int:
    """Distinct nodes of all tokens, counted one by one."""
    return sum(len(set(nodes)) for nodes in node_E[experts_TK].tolist())


def test_one_node_is_refused() -> None:
    """The message names who serves it."""
    profile = random_profile(np.random.default_rng(0))
    problem = make_problem(profile, cluster([0, 0]), calibration=LINEAR)
    with pytest.raises(InputError, match="--solver balance"):
        make_solver("hierarchy").solve(request_of(problem))


def test_counts_without_groups_are_refused() -> None:
    """Counts alone do not tell what shares a token."""
    profile = counts_only(random_profile(np.random.default_rng(0)))
    problem = make_problem(profile, cluster([0, 1]), calibration=LINEAR, objective="balance")
    with pytest.raises(InputError, match="trace has counts only; use --solver balance"):
        make_solver("hierarchy").solve(request_of(problem))


def test_counts_with_groups_keep_groups_whole() -> None:
    """From counts, four groups of four go to two nodes, two whole groups on each."""
    profile = counts_only(random_profile(np.random.default_rng(1), experts=16, top_k=2))
    model = model_for(profile, num_expert_groups=4)
    problem = make_problem(
        profile, cluster([0, 0, 1, 1]), model=model, calibration=LINEAR, objective="balance"
    )
    placement = make_solver("hierarchy").solve(request_of(problem))
    node_LE = placement.first_device_LE // 2
    for node_GM in node_LE.reshape(-1, 4, 4):
        assert (node_GM == node_GM[:, :1]).all()
        assert np.bincount(node_GM[:, 0]).tolist() == [2, 2]


def test_visits_are_those_of_the_cost_model() -> None:
    """The solver's own count per layer averages to the metric, replicas and all."""
    problem = grouped_problem()
    placement = make_solver("hierarchy").solve(request_of(problem))
    problem.check_placement(placement)
    problem.check_capacity(placement)
    metric = CostModel(problem).evaluate(placement).metrics.node_fanout
    assert layer_node_fanout(problem, placement).mean() == pytest.approx(metric)


@pytest.mark.parametrize("groups", [1, 8])
def test_few_nodes_and_even_loads(groups: int) -> None:
    """Most of what whole groups save, at even loads, whether the groups are known or found."""
    problem = grouped_problem(groups=groups)
    flat, whole, ours = (
        CostModel(problem).evaluate(make_solver(name).solve(request_of(shown))).metrics
        for name, shown in (
            ("eplb", grouped_problem(groups=1)),
            ("eplb", grouped_problem()),
            ("hierarchy", problem),
        )
    )
    assert ours.mean_traffic_balance <= BALANCE_LIMIT < whole.mean_traffic_balance
    flat_visits, whole_visits, our_visits = (
        float(metrics.node_fanout or 0.0) for metrics in (flat, whole, ours)
    )
    saving = (flat_visits - our_visits) / (flat_visits - whole_visits)
    assert saving > (0.9 if groups == 8 else 0.6)


def test_step_time_is_not_worse_than_eplb() -> None:
    """The predicted time decides between visits and even loads."""
    problem = grouped_problem("step-time")
    ours, eplb = (
        CostModel(problem).objective(make_solver(name).solve(request_of(problem)))
        for name in ("hierarchy", "eplb")
    )
    assert ours < eplb


def test_the_load_limit_of_traffic_is_kept_in_every_layer() -> None:
    """A limit of 1.03 holds for the worst layer."""
    problem = replace(grouped_problem("traffic"), max_imbalance=1.03)
    placement = make_solver("hierarchy").solve(request_of(problem))
    assert CostModel(problem).evaluate(placement).metrics.worst_layer_balance <= 1.03


def test_nodes_of_different_size() -> None:
    """Three devices against one, with slots of their own."""
    profile = random_profile(np.random.default_rng(3), tokens=300, experts=12, top_k=3)
    topology = cluster([0, 0, 0, 1], slots_D=[4, 4, 3, 3])
    problem = make_problem(profile, topology, calibration=LINEAR, objective="balance")
    placement = make_solver("hierarchy").solve(request_of(problem))
    problem.check_placement(placement)
    problem.check_capacity(placement)


# ----------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("seed", range(4))
def test_groups_by_brute_force(seed: int) -> None:
    """Six groups of two on three nodes: the fewest visits of all ways, and the most even one."""
    rng = np.random.default_rng(seed)
    experts_TK = np.argsort(rng.gumbel(size=(200, 12)) + 2 * rng.gumbel(size=12), axis=1)[:, :4]
    load_E = np.bincount(experts_TK.ravel(), minlength=12) / experts_TK.size
    ways = [np.array(way) for way in itertools.product(range(3), repeat=6)]
    ways = [way for way in ways if np.bincount(way, minlength=3).tolist() == [2, 2, 2]]
    fewest, evenest = group_homes(experts_TK, load_E, 6, 3)
    assert visits(experts_TK, fewest) == min(visits(experts_TK, np.repeat(way, 2)) for way in ways)
    peaks = [np.bincount(np.repeat(way, 2), weights=load_E).max() for way in ways]
    assert np.bincount(evenest, weights=load_E).max() == pytest.approx(min(peaks))


def test_clusters_are_found_without_groups() -> None:
    """Tokens of two disjoint sets of experts: each set is a cluster."""
    rng = np.random.default_rng(0)
    sets = rng.permutation(12).reshape(2, 6)
    experts_TK = np.stack([rng.permutation(sets[token % 2])[:3] for token in range(200)])
    node_E = cluster_experts(experts_TK, 12, np.array([6, 6]))
    assert all(len(set(node_E[part].tolist())) == 1 for part in sets)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.4, np.inf]))
def test_the_search_keeps_its_tables_exact(seed: int, slack: float) -> None:
    """After any search tables are those of a fresh count, sizes are kept, and unpressed visits never rise."""
    rng = np.random.default_rng(seed)
    experts_TK = np.argsort(rng.gumbel(size=(80, 10)) + rng.gumbel(size=10), axis=1)[:, :3].copy()
    load_E = rng.gamma(1.0, size=10)
    load_E /= load_E.sum()
    before_E = rng.permutation(np.arange(10) % 2)
    cut = make_cut(experts_TK, load_E, before_E, 2)
    search_nodes(cut, np.full(2, 0.5 * (1 + slack)), 100_000)
    fresh = make_cut(experts_TK, load_E, cut.node_E, 2)
    for name in ("held_TN", "leave_E", "enter_EN"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(fresh, name))
    np.testing.assert_allclose(cut.load_N, fresh.load_N)
    assert np.bincount(cut.node_E).tolist() == [5, 5]
    if np.isinf(slack):
        assert visits(experts_TK, cut.node_E) <= visits(experts_TK, before_E)
    else:
        before_N = np.bincount(before_E, weights=load_E)
        assert cut.load_N.max() <= max(before_N.max(), 0.5 * (1 + slack)) + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_copies_and_devices_fill_what_they_are_given(seed: int) -> None:
    """Homes keep a replica, nodes keep their slots, no device holds an expert twice."""
    rng = np.random.default_rng(seed)
    node_D = np.repeat(np.arange(3), 2)
    slots, num_experts = int(rng.integers(3, 6)), 15
    start_D = np.arange(7) * slots
    load_E = rng.gamma(0.5, size=num_experts)
    load_E /= load_E.sum()
    node_E = rng.permutation(np.arange(num_experts) % 3)
    devices_N, slots_N = np.full(3, 2), np.full(3, 2 * slots)
    count_EN = place_copies(load_E, node_E, slots_N, devices_N, np.full(3, 2.0))
    assert (count_EN[np.arange(num_experts), node_E] >= 1).all()
    assert (count_EN <= 2).all()
    assert (count_EN.sum(axis=0) <= slots_N).all()
    row_S = place_on_devices(load_E, np.ones(6), start_D, node_D, count_EN, 1e-3)
    for node in range(3):
        for expert in range(num_experts):
            held = (row_S.reshape(6, slots)[node_D == node] == expert).sum(axis=1)
            assert held.max() <= 1
            assert held.sum() == count_EN[expert, node]
