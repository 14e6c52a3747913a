"""Bounds from whole groups: tokens counted set by set, and no partition below them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from instances import LINEAR, cluster, least_objective, measured, model_for, random_profile

from placement.bounds import cover, lower_bound
from placement.bounds.columns import GroupColumns, count_columns, group_columns, touching
from placement.bounds.cover import Fullest, cheapest_cover, least_fullest
from placement.bounds.grouped import columns_of
from placement.bounds.partition import Groups
from placement.bounds.terms import Touches
from placement.calibration import DataSheetCalibration, LinearCalibration
from placement.cost import CostModel
from placement.problem import Objective, PlacementProblem, ReplicaSplit, Risk, Semantics, make_problem
from placement.profile import RoutingProfile

TOKEN_HEAVY = LinearCalibration(pair_cost=0.1, token_cost=20.0)

GROUPS = [
    Groups(num_groups=3, slots=2, num_experts=6),
    Groups(num_groups=2, slots=3, num_experts=6),
    Groups(num_groups=3, slots=2, num_experts=5),
    Groups(num_groups=3, slots=3, num_experts=6),
    Groups(num_groups=4, slots=1, num_experts=4),
]


def partitions(columns: GroupColumns) -> Iterator[list[int]]:
    """Yield the sets of every partition, by trying all choices of sets."""
    groups = columns.groups
    for sets in itertools.combinations_with_replacement(range(len(columns.members_SM)), groups.num_groups):
        held = np.bincount(columns.members_SM[list(sets)].ravel(), minlength=groups.num_experts + 1)
        if (held == columns.demand_E).all():
            yield list(sets)


def random_tokens(rng: np.random.Generator, groups: Groups, top_k: int) -> Touches:
    """Return forty tokens of random experts, weights and windows, some of them in no window."""
    experts_TK = np.stack([rng.permutation(groups.num_experts)[:top_k] for _ in range(40)])
    return Touches(
        experts_TK=experts_TK,
        weight_T=rng.random(40),
        window_T=rng.integers(3, size=40),
        floor_W=np.zeros(3),
        num_experts=groups.num_experts,
        most_mates=1,
    )


@pytest.mark.parametrize("groups", GROUPS)
def test_sets_are_listed_once_and_partitions_are_made_of_them(groups: Groups) -> None:
    """Sets differ, their number is known beforehand, and the partition at hand is one."""
    columns = group_columns(groups)
    assert len(np.unique(columns.members_SM, axis=0)) == len(columns.members_SM) == count_columns(groups)
    held = np.bincount(columns.members_SM[columns.any_partition].ravel(), minlength=groups.num_experts + 1)
    assert held.tolist() == columns.demand_E.tolist()


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("groups", GROUPS)
def test_a_set_is_touched_by_tokens_of_any_of_its_experts(groups: Groups, top_k: int) -> None:
    """Inclusion and exclusion agree with looking at every token."""
    tokens = random_tokens(np.random.default_rng(top_k), groups, top_k)
    columns = group_columns(groups)
    touching_SW = touching(tokens, columns, num_windows=2)
    for members_M, touching_W in zip(columns.members_SM, touching_SW, strict=True):
        hit_T = np.isin(tokens.experts_TK, members_M).any(axis=1)
        expected = [tokens.weight_T[hit_T & (tokens.window_T == w)].sum() for w in range(2)]
        np.testing.assert_allclose(touching_W, expected, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("groups", GROUPS[:4])
def test_no_partition_undercuts_random_costs_of_sets(groups: Groups, seed: int, scale: float) -> None:
    """Two parts with floors, and a cover alone; costs of any size are bounded alike."""
    rng = np.random.default_rng(seed)
    columns = group_columns(groups)
    parts = [
        Fullest(cost_SW=scale * rng.random((len(columns.members_SM), 3)), floor_W=scale * rng.random(3) * 0.8)
        for _ in range(2)
    ]
    least_sum = least_cover = np.inf
    for sets in partitions(columns):
        least_sum = min(
            least_sum, sum(np.maximum(part.cost_SW[sets].max(axis=0), part.floor_W).sum() for part in parts)
        )
        least_cover = min(least_cover, parts[0].cost_SW[sets, 0].sum())
    bound = least_fullest(columns, parts, rounds=8)
    assert 0.6 * least_sum < bound <= least_sum
    cover = cheapest_cover(columns, parts[0].cost_SW[:, 0], rounds=8)
    assert 0.5 * least_cover < cover <= least_cover


def test_two_hot_experts_in_turn_bound_by_hand() -> None:
    """Of four experts on two devices the first two are hot in turn: 3 + 1 in each window."""
    columns = group_columns(Groups(num_groups=2, slots=2, num_experts=4))
    load_EW = np.array([[3.0, 1.0], [1.0, 3.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    part = Fullest(cost_SW=load_EW[columns.members_SM].sum(axis=1), floor_W=np.zeros(2))
    assert least_fullest(columns, [part], rounds=4) == pytest.approx(8.0, rel=1e-6)


def test_more_rounds_prove_no_less() -> None:
    """The bound is the best of all weights met."""
    rng = np.random.default_rng(3)
    columns = group_columns(Groups(num_groups=4, slots=3, num_experts=12))
    part = Fullest(cost_SW=rng.random((len(columns.members_SM), 5)), floor_W=np.zeros(5))
    bounds = [least_fullest(columns, [part], rounds=rounds) for rounds in (0, 1, 3, 9)]
    assert bounds == sorted(bounds)
    assert bounds[-1] > bounds[0]


def problem_of(seed: int, **options: Any) -> PlacementProblem:
    """Return five or six experts on three devices, or seven on two; homes, two tiers, unequal devices."""
    rng = np.random.default_rng(seed)
    devices, experts = (2, 7) if seed % 4 == 3 else (3, 6 - seed % 2)
    profile = random_profile(
        rng,
        tokens=60,
        layers=1,
        experts=experts,
        top_k=3,
        tail=5 * (seed % 3),
        homes=devices * (seed % 5 == 0),
        keep=0.5 if seed % 7 == 0 else 1.0,
    )
    slots = [4, 3] if devices == 2 else [[2, 2, 2], [3, 2, 1]][seed % 2]
    topology = cluster(
        [0, 0, seed % 3 // 2][:devices],
        kind_D=[0, 1, 0][:devices],
        tflops=(100.0, 50.0),
        inside_gbps=rng.choice([50.0, 100.0], devices),
        slots_D=slots,
    )
    return make_problem(profile, topology, model=model_for(profile), **options)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    ("objective", "semantics"),
    [
        *((Objective.STEP_TIME, s) for s in Semantics if s is not Semantics.STAY_PUT),
        (Objective.TRAFFIC, Semantics.DISPATCH),
        (Objective.BALANCE, Semantics.DISPATCH),
    ],
)
def test_no_placement_beats_the_bound(seed: int, objective: Objective, semantics: Semantics) -> None:
    """All that whole groups are used for, against every placement; load limits for the traffic objective."""
    problem = problem_of(
        seed,
        objective=objective,
        semantics=semantics,
        calibration=(LINEAR, TOKEN_HEAVY, DataSheetCalibration(), measured())[seed // 2 % 4],
        risk=Risk.MEAN if objective is Objective.TRAFFIC else list(Risk)[seed % 3],
        replica_split=ReplicaSplit.EVEN,
        max_imbalance=(1.1, 1.3, 1e9)[seed % 3],
    )
    bound = lower_bound(CostModel(problem), effort=float(seed % 3))
    assert bound.value <= least_objective(problem) * (1 + 1e-9)


@pytest.mark.parametrize(("max_imbalance", "expected"), [(1.05, 2.0), (1.5, 1.0)])
def test_the_load_limit_keeps_friends_apart(max_imbalance: float, expected: float) -> None:
    """Tokens use experts 0 and 1, or half as often 2 and 3; 0 and 1 on one device are 4/3 of the mean."""
    profile = RoutingProfile(
        load_WLE=np.array([[[40.0, 40.0, 20.0, 20.0]]]),
        window_tokens_W=np.array([60.0]),
        top_k=2,
        experts_TLK=np.repeat([[[0, 1]], [[2, 3]]], [40, 20], axis=0).astype(np.uint8),
        window_of_token_T=np.zeros(60, dtype=np.int64),
    )
    problem = make_problem(
        profile,
        cluster([0, 0], slots_D=[2, 2]),
        objective="traffic",
        calibration=LINEAR,
        max_imbalance=max_imbalance,
    )
    assert lower_bound(CostModel(problem)).value == pytest.approx(expected, rel=1e-6)
    assert least_objective(problem) == expected


@pytest.mark.parametrize("groups", GROUPS[:4])
def test_windows_that_are_merged_bound_no_partition_too_high(
    groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven windows in masters of three: less is proved than with all of them, and all of it holds."""
    rng = np.random.default_rng(groups.slots)
    columns = group_columns(groups)
    part = Fullest(cost_SW=rng.random((len(columns.members_SM), 7)), floor_W=rng.random(7) * 0.8)
    exact = least_fullest(columns, [part], rounds=9)
    monkeypatch.setattr(cover, "MOST_WINDOWS", 3)
    merged = least_fullest(columns, [part], rounds=9)
    least = min(
        float(np.maximum(part.cost_SW[sets].max(axis=0), part.floor_W).sum()) for sets in partitions(columns)
    )
    assert 0.8 * exact < merged <= exact * (1 + 1e-3) <= least * (1 + 2e-3)
    assert merged <= least


def test_merging_adds_up_consecutive_windows() -> None:
    """Windows stay as they are where they are few; else costs and floors of neighbours are added."""
    few = Fullest(cost_SW=np.ones((2, cover.MOST_WINDOWS)), floor_W=np.ones(cover.MOST_WINDOWS))
    assert few.merged() is few
    many = Fullest(cost_SW=np.ones((2, cover.MOST_WINDOWS + 1)), floor_W=np.ones(cover.MOST_WINDOWS + 1))
    merged = many.merged()
    assert merged.floor_W.tolist() == [2.0] * (cover.MOST_WINDOWS // 2) + [1.0]
    assert merged.cost_SW.tolist() == [merged.floor_W.tolist()] * 2


def test_too_many_sets_are_left_to_the_relaxation() -> None:
    """Sixty-four experts in groups of eight have four thousand million sets; of two, a few thousand."""
    profile = random_profile(np.random.default_rng(0), tokens=60, layers=1, experts=64, top_k=2)
    few = make_problem(profile, cluster([0] * 32, slots_D=[2] * 32), calibration=LINEAR)
    assert columns_of(few, num_windows=3) is not None
    many = make_problem(profile, cluster([0] * 8, slots_D=[8] * 8), calibration=LINEAR)
    assert columns_of(many, num_windows=3) is None
    spare = make_problem(profile, cluster([0] * 32, slots_D=[3] + [2] * 31), calibration=LINEAR)
    assert columns_of(spare, num_windows=3) is None


@pytest.mark.parametrize("objective", ["step-time", "balance"])
def test_the_same_problem_has_the_same_bound(objective: str) -> None:
    """Bounds repeat to the last bit."""
    bounds = [
        lower_bound(CostModel(problem_of(2, objective=objective, calibration=LINEAR))) for _ in range(2)
    ]
    assert bounds[0].value == bounds[1].value
    assert bounds[0].layer_L.tolist() == bounds[1].layer_L.tolist()


@pytest.mark.parametrize("seed", range(6))
def test_no_chain_with_replicas_hops_less_than_its_bound(seed: int) -> None:
    """Three experts on two devices with a spare slot, in two layers."""
    profile = random_profile(np.random.default_rng(seed), tokens=40, layers=2, experts=3, top_k=1, tail=seed)
    problem = make_problem(
        profile,
        cluster([0, 0], slots_D=[2, 2]),
        semantics="stay-put",
        objective="traffic",
        calibration=LINEAR,
        max_imbalance=1e9,
    )
    bound = lower_bound(CostModel(problem)).value
    assert bound <= least_objective(problem) * (1 + 1e-9)
