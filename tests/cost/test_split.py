"""Tests of the replica splits: against plain loops, linear programmes, brute force, and the even split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import (
    LINEAR,
    cluster,
    counts_only,
    least_objective,
    measured,
    model_for,
    placement_of,
    random_placement,
    random_profile,
)
from reference import (
    OVERLAP,
    Picks,
    RefLink,
    expert_seconds,
    metrics,
    reference_links,
    step_parts,
    tokens_of,
)

from placement.bounds import lower_bound
from placement.calibration import Calibration, DataSheetCalibration, LinearCalibration
from placement.cost import CostModel
from placement.cost.split import Replicas, SplitRule, least_fullest_shares, number_replicas
from placement.errors import InputError
from placement.plan import Placement
from placement.problem import Objective, PlacementProblem, ReplicaSplit, Risk, Semantics, make_problem
from placement.profile import RoutingProfile

SEEDS = st.integers(0, 10_000)
UNEVEN = [ReplicaSplit.HASH, ReplicaSplit.NEAREST, ReplicaSplit.LP]
NODES = [[0, 0, 0], [0, 0, 1, 1], [0, 1, 1]]


def problem_of(rng: np.random.Generator, split: ReplicaSplit, **options: Any) -> PlacementProblem:
    """Return a random problem of 6 experts on uneven slots of two kinds of device, with homes if needed."""
    nodes = options.pop("node_D", NODES[int(rng.integers(0, len(NODES)))])
    homes = options.pop("homes", False) or split is ReplicaSplit.NEAREST
    profile = random_profile(
        rng,
        tokens=40,
        top_k=3,
        tail=options.pop("tail", 3),
        homes=len(nodes) if homes else 0,
        keep=options.pop("keep", 1.0),
        scale=100.0,
    )
    devices = len(nodes)
    topology = cluster(
        nodes,
        kind_D=rng.integers(0, 2, devices).tolist(),
        tflops=(100.0, 33.0),
        inside_gbps=rng.choice([50.0, 100.0], devices),
        across_gbps=rng.choice([5.0, 10.0], devices),
        slots_D=rng.integers(6 // devices + 1, 8, devices).tolist(),
    )
    calibration = DataSheetCalibration(dispatch_dtype="fp8", overlap=OVERLAP)
    given_ = {"calibration": calibration, "model": model_for(profile), "replica_split": split, **options}
    return make_problem(profile, topology, **given_)


@pytest.mark.parametrize("split", UNEVEN)
@given(
    seed=SEEDS,
    semantics=st.sampled_from(Semantics),
    homes=st.booleans(),
    keep=st.sampled_from([1.0, 0.4]),
    linear=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_every_cost_equals_the_reference(
    split: ReplicaSplit, seed: int, semantics: Semantics, homes: bool, keep: float, linear: bool
) -> None:
    """Phases and quality figures, with tails, partial samples, tiers, kinds and homes; all semantics."""
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {"calibration": LINEAR} if linear else {}
    problem = problem_of(rng, split, semantics=semantics, homes=homes, keep=keep, **options)
    placement = random_placement(rng, problem, shuffle=True, fill=0.8)
    breakdown = CostModel(problem).evaluate(placement)
    node_D = problem.topology.node_of_device_D.tolist()
    count: Any = lambda weight: lambda volume: weight * volume  # noqa: E731
    flat = RefLink(
        group_D=range(problem.num_devices),
        slowness_D=[1.0] * problem.num_devices,
        dispatch=count(4.0),
        combine=count(0.0),
        flat=True,
    )
    expected = step_parts(
        problem.profile,
        placement,
        expert_seconds=[count(1.0)] * problem.num_devices if linear else expert_seconds(problem),
        links=[flat] if linear else reference_links(problem),
        semantics=str(semantics),
        split=str(split),
        node_D=node_D,
    )
    found = np.stack([breakdown.experts_WL, breakdown.dispatch_WL, breakdown.combine_WL])
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-15)
    quality = metrics(problem.profile, placement, node_D, split=str(split))
    for name, value in breakdown.metrics.as_dict().items():
        assert value == pytest.approx(quality[name], rel=1e-8, abs=1e-12), name


@pytest.mark.parametrize("split", UNEVEN)
@given(seed=SEEDS, semantics=st.sampled_from(Semantics))
@settings(max_examples=15, deadline=None)
def test_without_replicas_every_split_is_the_even_one(
    split: ReplicaSplit, seed: int, semantics: Semantics
) -> None:
    """Bit by bit: there is nothing to split."""
    rng = np.random.default_rng(seed)
    problem = problem_of(rng, split, semantics=semantics)
    placement = random_placement(rng, problem, fill=0.0)
    one = CostModel(problem).evaluate(placement)
    other = CostModel(replace(problem, replica_split=ReplicaSplit.EVEN)).evaluate(placement)
    assert one.objective == other.objective
    assert one.metrics == other.metrics
    np.testing.assert_array_equal(one.load_WLD, other.load_WLD)


def random_replicas(rng: np.random.Generator, experts: int, devices: int) -> Replicas:
    """Return experts on one to three devices each."""
    held = [rng.permutation(devices)[: rng.integers(1, min(4, devices + 1))] for _ in range(experts)]
    replica_EX = np.full((experts, max(len(h) for h in held)), -1)
    for expert, its in enumerate(held):
        replica_EX[expert, : len(its)] = its
    return Replicas(replica_EX=replica_EX, replicas_E=np.array([len(h) for h in held]))


def least_fullest(load_E: np.ndarray, replicas: Replicas, devices: int) -> float:
    """Return the optimum of the linear programme itself."""
    from scipy.optimize import linprog

    # The solver's tolerances are absolute: give it loads around 1.
    scale = load_E.mean() if load_E.any() else 1.0
    experts, numbers = np.nonzero(replicas.replica_EX >= 0)
    size = experts.size
    at_most = np.zeros((devices, size + 1))
    at_most[replicas.replica_EX[experts, numbers], np.arange(size)] = 1.0
    at_most[:, size] = -1.0
    all_of = np.zeros((load_E.size, size + 1))
    all_of[experts, np.arange(size)] = 1.0
    solved = linprog(
        np.append(np.zeros(size), 1.0), A_ub=at_most, b_ub=np.zeros(devices), A_eq=all_of, b_eq=load_E / scale
    )
    return float(solved.fun) * scale


@pytest.mark.parametrize("seed", range(60))
def test_water_filling_solves_the_linear_programme(seed: int) -> None:
    """The fullest device is as light as scipy's LP makes it; shares are shares, wild scales included."""
    rng = np.random.default_rng(seed)
    devices, experts = int(rng.integers(2, 13)), int(rng.integers(2, 30))
    replicas = random_replicas(rng, experts, devices)
    load_WE = rng.gamma(0.3, 100.0, (3, experts)).round() * 10.0 ** rng.integers(-9, 10)
    load_WE[2, rng.random(experts) < 0.5] = 0.0
    share_WEX = least_fullest_shares(load_WE, replicas, num_devices=devices)
    assert (share_WEX >= 0).all()
    np.testing.assert_allclose(share_WEX.sum(axis=2), 1.0, rtol=1e-12)
    assert (share_WEX[:, replicas.replica_EX < 0] == 0).all()
    for load_E, share_EX in zip(load_WE, share_WEX, strict=True):
        load_D = np.zeros(devices + 1)
        np.add.at(load_D, replicas.replica_EX, load_E[:, None] * share_EX)
        assert load_D[:devices].max() <= max(least_fullest(load_E, replicas, devices), 0.0) * (1 + 1e-8)


def test_water_filling_along_a_chain() -> None:
    """64 devices in a row, each sharing an expert with the next: slow to level out, and still exact."""
    devices = 64
    replica_EX = np.stack([np.arange(devices - 1), np.arange(1, devices)], axis=1)
    replicas = Replicas(replica_EX=replica_EX, replicas_E=np.full(devices - 1, 2))
    load_WE = np.full((1, devices - 1), 1.0)
    share_WEX = least_fullest_shares(load_WE, replicas, num_devices=devices)
    load_D = np.zeros(devices)
    np.add.at(load_D, replica_EX, load_WE[0][:, None] * share_WEX[0])
    np.testing.assert_allclose(load_D, (devices - 1) / devices, rtol=1e-7)


@pytest.mark.parametrize("homes", [0, 3])
def test_hash_follows_the_token_index(homes: int) -> None:
    """Token by token: Knuth's hash of its index in its window (and home) picks one replica number for all."""
    rng = np.random.default_rng(homes)
    profile = random_profile(rng, tokens=50, homes=homes, tail=5)
    problem = make_problem(
        profile, cluster([0, 0, 0]), calibration=LINEAR, replica_split="hash", spare_slots=6
    )
    placement = random_placement(rng, problem, fill=1.0)
    load_D = np.zeros((profile.num_windows, 3))
    row = placement.physical_to_logical_map_LS[0]
    seen: dict[tuple[int, int], int] = {}
    assert profile.window_of_token_T is not None
    assert profile.experts_TLK is not None
    for token, window in enumerate(profile.window_of_token_T.tolist()):
        home = -1 if profile.home_T is None else int(profile.home_T[token])
        index = seen.get((window, home), 0)
        seen[window, home] = index + 1
        hashed = (index * 2654435769) & 0xFFFFFFFF
        for expert in profile.experts_TLK[token, 0]:
            slots = np.nonzero(row == expert)[0]
            if window < profile.num_windows:
                load_D[window, placement.device_of_slot_S[slots[hashed % slots.size]]] += 1
    found = CostModel(problem).evaluate(placement).load_WLD[:, 0]
    np.testing.assert_allclose(found, load_D, rtol=1e-12)


def test_hash_keeps_experts_that_fire_together_together() -> None:
    """Replicas 0 of both experts on device 0 and replicas 1 on device 1: every token touches one device.

    Crossed (expert 0 on devices 0 and 1, expert 1 on devices 1 and 2), half of the tokens find both replicas
    on two devices whichever way they go: even indices (0, 1), odd ones (1, 2), so a fanout of 2.
    """
    profile = RoutingProfile(
        load_WLE=np.array([[[8.0, 8.0, 0.0]]]),
        window_tokens_W=[8],
        top_k=2,
        experts_TLK=np.tile(np.array([0, 1], dtype=np.uint8), (8, 1, 1)),
        window_of_token_T=np.zeros(8, dtype=np.int64),
    )
    problem = make_problem(
        profile, cluster([0, 0, 0]), calibration=LINEAR, replica_split="hash", spare_slots=3
    )
    aligned = placement_of(problem, [[0, 1, 0, 1, 2, -1]])
    crossed = placement_of(problem, [[0, 2, 0, 1, 1, -1]])
    model = CostModel(problem)
    assert model.evaluate(aligned).metrics.fanout == 1.0
    assert model.evaluate(crossed).metrics.fanout == 2.0
    # 8 pairs on each device, and 4 of the 8 tokens; crossed: device 1 has 4 + 4 pairs of all 8 tokens.
    assert model.objective(aligned) == 8.0 + 4.0 * 4.0
    assert model.objective(crossed) == 8.0 + 4.0 * 8.0


def test_nearest_by_hand() -> None:
    """Home device first, home node next, then a fixed choice by home; unknown homes use all alike."""
    replicas = number_replicas(np.array([0, 0, 1, 1, 0]), np.array([0, 1, 2, 3, 3]), 2)
    assert replicas.replica_EX.tolist() == [[0, 1, 3], [2, 3, -1]]
    rng = np.random.default_rng(0)
    rule = SplitRule(
        kind=ReplicaSplit.NEAREST,
        profile=random_profile(rng, experts=2, homes=4, top_k=1),
        node_of_device_D=np.array([0, 0, 1, 1]),
    )
    third = 1 / 3
    np.testing.assert_allclose(
        rule.layer(0, replicas).share_REX,
        [
            [[third, third, third], [0.5, 0.5, 0.0]],
            [[1, 0, 0], [1, 0, 0]],  # home 0: its own replica; expert 1 has none on node 0: 0 mod 2
            [[0, 1, 0], [0, 1, 0]],  # home 1: ... 1 mod 2
            [[0, 0, 1], [1, 0, 0]],  # home 2: the one on node 1; its own
            [[0, 0, 1], [0, 1, 0]],
        ],
    )


@pytest.mark.parametrize("split", UNEVEN)
def test_loads_stay_exact_where_the_sample_is_partial(split: ReplicaSplit) -> None:
    """What an expert's replicas carry adds up to its load, however few tokens were sampled."""
    rng = np.random.default_rng(4)
    problem = problem_of(rng, split, keep=0.2, node_D=[0, 0, 1, 1])
    placement = random_placement(rng, problem, fill=1.0)
    load_WLD = CostModel(problem).evaluate(placement).load_WLD
    np.testing.assert_allclose(load_WLD.sum(axis=2), problem.profile.load_WLE.sum(axis=2), rtol=1e-12)


def test_lp_is_never_fuller_than_any_other_split() -> None:
    """Nor than even: it is the best that a split can do for the placement."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        problem = problem_of(rng, ReplicaSplit.NEAREST)
        placement = random_placement(rng, problem, fill=1.0)
        fullest = {
            split: CostModel(replace(problem, replica_split=split)).evaluate(placement).load_WLD.max(axis=2)
            for split in ReplicaSplit
        }
        for split in ReplicaSplit:
            assert (fullest[ReplicaSplit.LP] <= fullest[split] * (1 + 1e-9)).all()


def test_splits_that_the_trace_cannot_serve() -> None:
    """Nearest needs homes and hash needs tokens; counts alone serve even and lp."""
    rng = np.random.default_rng(0)
    profile = random_profile(rng)
    options: dict[str, Any] = {"calibration": LINEAR, "objective": "balance"}
    with pytest.raises(InputError, match="the trace knows none; use --replica-split even, hash or lp"):
        make_problem(profile, cluster([0, 0]), replica_split="nearest", **options)
    with pytest.raises(InputError, match="expert counts only; use --replica-split even or lp"):
        make_problem(counts_only(profile), cluster([0, 0]), replica_split="hash", **options)
    with pytest.raises(InputError, match="unknown replica split 'hsah'; did you mean 'hash'"):
        make_problem(profile, cluster([0, 0]), replica_split="hsah", **options)
    even = make_problem(profile, cluster([0, 0]), **options)
    assert replace(even, replica_split="hash").replica_split is ReplicaSplit.HASH  # type: ignore[arg-type]
    problem = make_problem(
        counts_only(profile), cluster([0, 0]), replica_split="lp", spare_slots=2, **options
    )
    placement = random_placement(rng, problem, fill=1.0)
    assert CostModel(problem).objective(placement) >= 1.0


BOUND_CASES = [
    (objective, semantics)
    for semantics in Semantics
    for objective in Objective
    if objective is not Objective.TRAFFIC or semantics in (Semantics.DISPATCH, Semantics.STAY_PUT)
]


@pytest.mark.parametrize(("objective", "semantics"), BOUND_CASES)
@pytest.mark.parametrize("split", UNEVEN)
@pytest.mark.parametrize("seed", range(4))
def test_bounds_hold_under_every_split(
    split: ReplicaSplit, objective: Objective, semantics: Semantics, seed: int
) -> None:
    """Enumerating every placement of 4 experts finds none below the bound."""
    rng = np.random.default_rng([seed, BOUND_CASES.index((objective, semantics))])
    homes = 2 if split is ReplicaSplit.NEAREST or seed % 2 else 0
    profile = random_profile(rng, tokens=40, layers=1, experts=4, homes=homes)
    calibration: Calibration = (LINEAR, DataSheetCalibration(), measured(), LINEAR)[seed]
    problem = make_problem(
        profile,
        cluster([0, 0] if seed % 2 else [0, 1], kind_D=[0, 1], tflops=(100.0, 60.0)),
        model=model_for(profile),
        semantics=semantics,
        objective=objective,
        calibration=calibration,
        replica_split=split,
        spare_slots=2,
        max_imbalance=3.0,
        risk=Risk.MEAN if objective is Objective.TRAFFIC else list(Risk)[seed % 3],
    )
    assert 0 <= lower_bound(CostModel(problem)).value <= least_objective(problem) * (1 + 1e-9)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
@pytest.mark.parametrize("split", list(ReplicaSplit))
def test_costs_of_any_magnitude(split: ReplicaSplit, factor: float) -> None:
    """Scaled coefficients scale every placement's cost and leave the optimum where it was."""
    rng = np.random.default_rng(7)
    profile = random_profile(rng, experts=4, layers=1, homes=2)
    plain, wild = (
        make_problem(
            profile,
            cluster([0, 0]),
            calibration=LinearCalibration(pair_cost=scale, token_cost=4.0 * scale),
            replica_split=split,
            spare_slots=2,
        )
        for scale in (1.0, factor)
    )
    placements = [random_placement(rng, plain) for _ in range(10)]
    costs = np.array([CostModel(plain).objective(placement) for placement in placements])
    scaled = np.array([CostModel(wild).objective(placement) for placement in placements])
    np.testing.assert_allclose(scaled, factor * costs, rtol=1e-12)
    assert least_objective(wild) == pytest.approx(factor * least_objective(plain), rel=1e-12)


def test_the_reference_counts_every_token_once() -> None:
    """The slow scorer's own picks are probabilities."""
    rng = np.random.default_rng(3)
    problem = problem_of(rng, ReplicaSplit.LP)
    placement: Placement = random_placement(rng, problem, fill=1.0)
    for split in UNEVEN:
        picks = Picks(str(split), problem.profile, placement, problem.topology.node_of_device_D.tolist())
        for token in tokens_of(problem.profile):
            for expert in token.experts[0]:
                assert sum(picks.of(token, 0, expert).values()) == pytest.approx(1.0)
