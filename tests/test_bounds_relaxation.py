"""Relaxations over partitions against all partitions of a few experts, and what they prove of problems."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from instances import LINEAR, cluster, least_objective, measured, model_for, random_profile

from placement.bounds import layer_gaps, lower_bound
from placement.bounds.partition import Groups, relax
from placement.bounds.terms import FullestLoad, Touches
from placement.calibration import DataSheetCalibration, LinearCalibration
from placement.cost import CostModel
from placement.errors import InputError
from placement.optimizer import optimize
from placement.problem import Objective, Risk, Semantics, make_problem
from placement.profile import RoutingProfile

TOKEN_HEAVY = LinearCalibration(pair_cost=0.5, token_cost=8.0)


def partitions(experts: int, groups: Groups) -> Iterator[np.ndarray]:
    """Yield the group of each expert, for every way to fill groups of at most `slots`."""
    for group_E in itertools.product(range(groups.num_groups), repeat=experts):
        if np.bincount(group_E, minlength=groups.num_groups).max() <= groups.slots:
            yield np.array(group_E)


def random_tokens(rng: np.random.Generator, groups: Groups, top_k: int) -> Touches:
    """Return clustered tokens of four windows, some with a floor."""
    popular_E = rng.dirichlet(np.full(groups.num_experts, 0.7), size=3)
    tokens = [
        rng.choice(groups.num_experts, top_k, replace=False, p=0.9 * p + 0.1 / p.size)
        for p in popular_E[rng.integers(0, 3, 40)]
    ]
    return Touches(
        experts_TK=np.array(tokens, dtype=np.uint8),
        weight_T=rng.uniform(0.5, 1.5, 40),
        window_T=np.sort(rng.integers(0, 4, 40)),
        floor_W=rng.choice([0.0, 20.0], 4),
        num_experts=groups.num_experts,
        most_mates=min(groups.slots, top_k) - 1,
        sample_tokens=int(rng.choice([10, 100])),
    )


def touches(tokens: Touches, group_E: np.ndarray) -> float:
    """Count what tokens touch, window by window, under a partition."""
    touched_T = np.array([len(set(group_E[row])) for row in tokens.experts_TK])
    cost_W = np.bincount(tokens.window_T, weights=touched_T * tokens.weight_T, minlength=4)
    return float(np.maximum(cost_W, tokens.floor_W).sum())


def fullest(loads: FullestLoad, group_E: np.ndarray) -> float:
    """Add up the fullest groups of all windows under a partition."""
    carried = np.array([[load[group_E == g].sum() for g in set(group_E)] for load in loads.load_WE])
    return float(np.maximum(carried.max(axis=1), loads.floor_W).sum())


@pytest.mark.parametrize("seed", range(40))
def test_no_partition_undercuts_a_relaxation(seed: int) -> None:
    """Six or seven experts in two to three groups, full or not: touches, loads, and both at once."""
    rng = np.random.default_rng(seed)
    groups = [
        Groups(num_groups=2, slots=3, num_experts=6),
        Groups(num_groups=3, slots=2, num_experts=6),
        Groups(num_groups=2, slots=4, num_experts=6),
        Groups(num_groups=3, slots=2, num_experts=5),
    ][seed % 4]
    tokens = random_tokens(rng, groups, top_k=int(rng.integers(1, 5)))
    loads = FullestLoad(
        load_WE=rng.gamma(0.6, size=(5, groups.num_experts)), floor_W=rng.choice([0.0, 3.0], 5)
    )
    touched, carried = np.array(
        [
            (touches(tokens, group_E), fullest(loads, group_E))
            for group_E in partitions(groups.num_experts, groups)
        ]
    ).T
    steps = int(rng.choice([4, 80]))
    assert relax([tokens], groups, steps=steps) <= touched.min()
    assert relax([loads], groups, steps=steps) <= carried.min()
    assert relax([tokens, loads], groups, steps=steps) <= (touched + carried).min()


def test_a_line_is_met_where_groups_are_plain() -> None:
    """Two cliques of three experts, every token within one: a partition touches one group each, and so it is.

    Loads of 3 and 1 that surge together cannot both be spread, whatever the partition: (3 + 1 + 1) each.
    """
    groups = Groups(num_groups=2, slots=3, num_experts=6)
    tokens = Touches(
        experts_TK=np.array([[0, 1, 2], [3, 4, 5]] * 5, dtype=np.uint8),
        weight_T=np.ones(10),
        window_T=np.zeros(10, dtype=np.int64),
        floor_W=np.zeros(1),
        num_experts=6,
        most_mates=2,
    )
    loads = FullestLoad(load_WE=np.array([[3.0, 1, 1, 3, 1, 1]]), floor_W=np.zeros(1))
    assert relax([tokens], groups, steps=200) == pytest.approx(10.0, rel=1e-2)
    assert relax([tokens, loads], groups, steps=200) == pytest.approx(15.0, rel=1e-2)


def test_more_steps_prove_more() -> None:
    """The bound rises from the cheapest relaxation to a long one, on traffic worth grouping."""
    groups = Groups(num_groups=3, slots=2, num_experts=6)
    tokens = random_tokens(np.random.default_rng(5), groups, top_k=3)
    values = [relax([tokens], groups, steps=steps) for steps in (4, 40, 400)]
    assert values == sorted(values)


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_costs_of_any_size_are_bounded_alike(scale: float) -> None:
    """A unit that is a power of two changes the bound by just that: no absolute tolerance hides in it."""
    groups = Groups(num_groups=3, slots=2, num_experts=6)
    tokens = random_tokens(np.random.default_rng(7), groups, top_k=3)
    scaled = replace(tokens, weight_T=tokens.weight_T * scale, floor_W=tokens.floor_W * scale)
    expected = relax([tokens], groups, steps=40)
    assert relax([scaled], groups, steps=40) == pytest.approx(scale * expected, rel=1e-12)


def test_gaps_of_layers_add_up_to_the_gap() -> None:
    """Layers' gaps, weighted with the layers' costs, are the gap of the sum of their bounds."""
    rng = np.random.default_rng(3)
    profile = random_profile(rng, layers=3, experts=6)
    for objective in ("step-time", "balance"):
        problem = make_problem(profile, cluster([0, 0]), calibration=LINEAR, objective=objective)
        model = CostModel(problem)
        bound = lower_bound(model)
        found = optimize(problem, solver="greedy").breakdown
        gap_L = layer_gaps(problem, found, bound)
        mean_L = found.balance_WL.mean(axis=0)
        if objective == "step-time":
            mean_L = (found.experts_WL + found.dispatch_WL).mean(axis=0)
        assert (mean_L * (1 - gap_L)).tolist() == pytest.approx(bound.layer_L.tolist())


def test_traffic_has_no_gaps_of_layers() -> None:
    """Fanout is evaluated over all layers at once."""
    profile = random_profile(np.random.default_rng(3), experts=6)
    problem = make_problem(
        profile, cluster([0, 0]), calibration=LINEAR, objective="traffic", max_imbalance=9.0
    )
    model = CostModel(problem)
    found = optimize(problem, solver="contiguous").breakdown
    with pytest.raises(InputError, match="no gaps of single layers"):
        layer_gaps(problem, found, lower_bound(model))


def problem_of(seed: int, **options: Any) -> Any:
    """Return a problem of five or six experts on three devices, two slots each and a few to spare."""
    rng = np.random.default_rng(seed)
    profile = random_profile(
        rng,
        tokens=60,
        layers=1,
        experts=6 - seed % 2,
        top_k=3,
        tail=5 * (seed % 3),
        homes=3 * (seed % 4 == 0),
        keep=0.5 if seed % 5 == 0 else 1.0,
    )
    slots = {"slots_D": [3, 2, 1]} if seed % 3 == 0 else {"slots_D": [2, 2, 2]}
    topology = cluster([0, 0, seed % 2], kind_D=[0, 1, 0], tflops=(100.0, 50.0), **slots)
    return make_problem(profile, topology, model=model_for(profile), max_imbalance=1e9, **options)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize(
    ("objective", "semantics"),
    [
        (Objective.STEP_TIME, Semantics.DISPATCH),
        (Objective.TRAFFIC, Semantics.DISPATCH),
        (Objective.BALANCE, Semantics.DISPATCH),
    ],
)
def test_no_placement_of_six_experts_beats_the_bound(
    seed: int, objective: Objective, semantics: Semantics
) -> None:
    """Groups of several experts, replicas of one, uneven slots, homes, two tiers and unequal devices."""
    problem = problem_of(
        seed,
        objective=objective,
        semantics=semantics,
        calibration=(LINEAR, TOKEN_HEAVY, DataSheetCalibration(), measured())[seed % 4],
        risk=Risk.MEAN if objective is Objective.TRAFFIC else list(Risk)[seed % 3],
    )
    bound = lower_bound(CostModel(problem), effort=float(seed % 3))
    assert bound.value <= least_objective(problem) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_no_chain_of_layers_beats_the_bound_on_hops(seed: int) -> None:
    """Four experts on two devices in four layers, every chain of placements tried by dynamic programming."""
    profile = random_profile(np.random.default_rng(seed), tokens=80, layers=4, experts=4, top_k=1, tail=3)
    problem = make_problem(
        profile,
        cluster([0, 0]),
        semantics="stay-put",
        objective="traffic",
        calibration=LINEAR,
        max_imbalance=1e9,
    )
    halves = [np.isin(np.arange(4), half).astype(int) for half in itertools.combinations(range(4), 2)]
    least = np.zeros(len(halves))
    for layer in range(1, 4):
        count_EE = profile.transitions(layer - 1)
        cost = [[count_EE[a[:, None] != b[None]].sum() / count_EE.sum() for b in halves] for a in halves]
        least = (least[:, None] + np.array(cost)).min(axis=0)
    bound = lower_bound(CostModel(problem), effort=2.0)
    assert bound.value <= least.min() / 3 * (1 + 1e-9)
    assert bound.value >= 0.7 * least.min() / 3


def test_spare_slots_go_to_few_experts() -> None:
    """One expert is hot in each of three windows: one spare slot halves one of them, two windows stay hot."""
    profile = RoutingProfile(
        load_WLE=np.array([[[8, 1, 1, 2]], [[1, 8, 1, 2]], [[1, 1, 8, 2]]]), window_tokens_W=[12] * 3, top_k=1
    )
    problem = make_problem(profile, cluster([0, 0], slots_D=[3, 2]), objective="balance", calibration=LINEAR)
    bound = lower_bound(CostModel(problem)).value
    # Means are 6: the windows cost 8/6, 8/6 and 1 at the least.
    assert bound == pytest.approx((8 / 6 + 8 / 6 + 1) / 3, rel=0.02)
    assert bound <= least_objective(problem)
