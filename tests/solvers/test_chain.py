"""Tests of the chain solver: its exact steps against enumeration, its answers against brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from instances import LINEAR, cluster, least_objective, model_for, random_placement, random_profile

from placement.cost import CostModel
from placement.errors import InfeasibleError, InputError
from placement.optimizer import optimize
from placement.plan import Placement
from placement.problem import Objective, PlacementProblem, Semantics, make_problem
from placement.profile import RoutingProfile
from placement.solution import Solution
from placement.solvers.chain.assignment import assign_layer, level_layer
from placement.solvers.chain.model import devices_of, make_chain, price_loads, rows_of, tokens_kept
from placement.solvers.chain.recombine import best_matching, overload, recombine
from placement.solvers.chain.replicas import Walk
from placement.stopping import Never

Rng = np.random.Generator


def stay_put(
    rng: Rng, *, devices: int = 2, slots_D: list[int] | None = None, spare_slots: int = 0, **options: Any
) -> PlacementProblem:
    """Return a random problem of hops, three layers of four experts unless said otherwise."""
    sizes = {key: options.pop(key) for key in ("layers", "experts", "tokens", "homes") if key in options}
    profile = random_profile(rng, **{"tokens": 300, "layers": 3, "experts": 4, "windows": 3, **sizes})
    given = {"semantics": "stay-put", "objective": "traffic", "max_imbalance": 2.0, **options}
    if given["objective"] == "step-time":
        given = {"model": model_for(profile), "calibration": LINEAR, **given}
    return make_problem(profile, cluster([0] * devices, slots_D=slots_D), spare_slots=spare_slots, **given)


def solve(problem: PlacementProblem, **options: Any) -> Solution:
    """Solve with little effort, and check the answer."""
    solution = optimize(problem, **{"solver": "chain", "work_s": 0.05, **options})
    problem.check_placement(solution.placement)
    problem.check_capacity(solution.placement)
    assert solution.objective == CostModel(problem).objective(solution.placement)
    assert solution.lower_bound <= solution.objective * (1 + 1e-12)
    return solution


def assignments(experts: int, slots_D: list[int]) -> list[np.ndarray]:
    """Every way to put one copy of each expert on devices."""
    every = (np.array(device_E) for device_E in itertools.product(range(len(slots_D)), repeat=experts))
    return [E for E in every if (np.bincount(E, minlength=len(slots_D)) <= slots_D).all()]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_imbalance", [1.15, 3.0])
def test_tiny_chains_are_optimal(seed: int, max_imbalance: float) -> None:
    """One copy of each expert: the optimum over all placements that keep the load limit, or none does."""
    problem = stay_put(np.random.default_rng(seed), max_imbalance=max_imbalance)
    least = least_objective(problem)
    if np.isinf(least):
        with pytest.raises(InfeasibleError, match="--max-imbalance"):
            solve(problem)
        return
    assert solve(problem).objective == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_devices_of_different_size_are_filled_optimally(seed: int) -> None:
    """Slots follow the topology, and devices that differ in size are not exchanged."""
    problem = stay_put(np.random.default_rng(seed), slots_D=[3, 2], experts=5, max_imbalance=1.9)
    assert solve(problem).objective == pytest.approx(least_objective(problem), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_spare_slots_keep_tokens_in_place(seed: int) -> None:
    """With replicas hops come near the optimum over all placements, and below any without."""
    plain, spare = (
        stay_put(np.random.default_rng(seed), layers=2, max_imbalance=1.4, spare_slots=spare)
        for spare in (0, 2)
    )
    found = solve(spare).objective
    assert found <= least_objective(spare) * 1.05 + 1e-12
    assert found < least_objective(plain)


def test_replicas_make_a_limit_possible() -> None:
    """An expert with half of the load keeps no limit of 1.5 on three devices unless it is split."""
    tokens = np.arange(120)
    first_T = np.where(tokens % 2 == 0, 0, 1 + tokens // 2 % 2)
    profile = RoutingProfile(
        load_WLE=np.array([[[60.0, 30.0, 30.0]]]).repeat(2, axis=1),
        window_tokens_W=np.array([120.0]),
        top_k=1,
        experts_TLK=np.stack([first_T, first_T], axis=1)[:, :, None].astype(np.uint8),
        window_of_token_T=np.zeros(120, dtype=np.int64),
    )
    options = {"semantics": "stay-put", "objective": "traffic", "max_imbalance": 1.3}
    topology = cluster([0, 0, 0])
    with pytest.raises(InfeasibleError, match=r"layer 0.*1\.5000"):
        solve(make_problem(profile, topology, **options))  # type: ignore[arg-type]
    # 30 + 30, 30 + 30 or, split: every device 40 at best; tokens stay if both layers look alike.
    spare = make_problem(profile, topology, spare_slots=3, **options)  # type: ignore[arg-type]
    assert solve(spare).breakdown.metrics.worst_layer_balance <= 1.3


@pytest.mark.parametrize("seed", range(5))
def test_tight_load_limits_are_kept(seed: int) -> None:
    """A limit that the least even layer can only just keep is kept by all."""
    loose = stay_put(np.random.default_rng(seed), experts=12, devices=3, layers=4, tokens=600)
    least_L = [
        np.bincount(_level(load_E), weights=load_E, minlength=3).max() * 3 / load_E.sum()
        for load_E in loose.profile.load_WLE.sum(axis=0)
    ]
    limit = float(np.max(least_L))
    solution = solve(replace(loose, max_imbalance=limit))
    assert solution.breakdown.metrics.worst_layer_balance <= limit * (1 + 1e-9)
    with pytest.raises(InfeasibleError, match=f"layer {np.argmax(least_L)}: .*{limit:.4f}"):
        solve(replace(loose, max_imbalance=1 + (limit - 1) * 0.99))


def _level(load_E: np.ndarray) -> np.ndarray:
    device_E = level_layer(load_E, np.array([4, 4, 4]), limit=1.0)
    assert device_E is not None
    return device_E


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tightness", [np.inf, 1.3, 1.1, 0.9])
def test_assignment_is_exact(seed: int, tightness: float) -> None:
    """A layer's assignment keeps as many tokens as the best of all; none is found where none fits."""
    rng = np.random.default_rng(seed)
    slots_D = [3, 2, 2]
    kept_ED, load_E = rng.integers(0, 50, (6, 3)).astype(float), rng.integers(1, 20, 6).astype(float)
    limit = float(tightness * load_E.sum() / 3)
    fitting = [
        E for E in assignments(6, slots_D) if np.bincount(E, weights=load_E, minlength=3).max() <= limit
    ]
    found_E = assign_layer(kept_ED, np.array(slots_D), load_E, limit)
    if not fitting:
        assert found_E is None
        return
    assert found_E is not None
    assert np.bincount(found_E, weights=load_E, minlength=3).max() <= limit * (1 + 1e-9)
    best = max(kept_ED[np.arange(6), E].sum() for E in fitting)
    assert kept_ED[np.arange(6), found_E].sum() == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_levelling_is_exact(seed: int) -> None:
    """The fullest device is as light as in the best of all assignments, or within the limit."""
    rng = np.random.default_rng(seed)
    load_E = rng.integers(1, 30, 7).astype(float)
    slots_D = [3, 2, 3]
    lightest = min(np.bincount(E, weights=load_E, minlength=3).max() for E in assignments(7, slots_D))
    for limit in (0.5 * lightest, 1.2 * lightest):
        found_E = level_layer(load_E, np.array(slots_D), float(limit))
        assert found_E is not None
        assert np.bincount(found_E, weights=load_E, minlength=3).max() <= max(lightest, limit) * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_matching_is_the_best_of_all_permutations(seed: int) -> None:
    """Devices of equal size are matched as well as enumeration does, others with themselves."""
    flow_DD = np.random.default_rng(seed).integers(0, 30, (5, 5)).astype(float)
    slots_D = np.array([2, 3, 2, 3, 2])
    best = max(
        flow_DD[list(order), range(5)].sum()
        for order in itertools.permutations(range(5))
        if (slots_D[list(order)] == slots_D).all()
    )
    kept, renamed_D = best_matching(flow_DD, slots_D)
    assert kept == best == flow_DD[renamed_D, range(5)].sum()
    assert (slots_D[renamed_D] == slots_D).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("price", [np.inf, 0.7])
def test_recombination_is_the_best_of_all_choices_and_names(seed: int, price: float) -> None:
    """Every choice of contents per layer and every naming of devices from each layer on, enumerated."""
    rng = np.random.default_rng(seed)
    problem = stay_put(rng, devices=3, experts=6)
    chain = make_chain(problem, max_imbalance=1.1)
    if np.isfinite(price):
        chain = price_loads(chain, problem, price=price)
    pool_PLE = np.stack([_random_devices(rng, problem) for _ in range(3)])
    over_PL = np.stack([overload(chain, device_LE) for device_LE in pool_PLE])
    names = [np.array(order) for order in itertools.permutations(range(3))]
    best = -np.inf
    for choice in itertools.product(range(3), repeat=3):
        over_L = over_PL[choice, range(3)]
        if np.isinf(price) and (over_L > over_PL.min(axis=0)).any():
            continue
        kept = -price * over_L.sum() if np.isfinite(price) else 0.0
        for b in range(2):
            before_E, after_E = pool_PLE[choice[b], b], pool_PLE[choice[b + 1], b + 1]
            # Names from a layer on change nothing behind it: boundaries may be named one by one.
            kept += max(
                chain.ahead_BEE[b][before_E[:, None] == name_D[after_E][None, :]].sum() for name_D in names
            )
        best = max(best, kept)
    found_LE = recombine(chain, pool_PLE)
    cost = price * overload(chain, found_LE).sum() if np.isfinite(price) else 0.0
    assert tokens_kept(chain, found_LE) - cost == pytest.approx(best)


def test_loads_beyond_the_mean_are_summed_over_windows() -> None:
    """Two experts that surge in turn are level in sum, and a window's surplus apart."""
    profile = RoutingProfile(
        load_WLE=np.array([[[9.0, 1.0]], [[1.0, 9.0]]]),
        window_tokens_W=np.array([10.0, 10.0]),
        top_k=1,
        experts_TLK=np.zeros((2, 1, 1), dtype=np.uint8),
        window_of_token_T=np.array([0, 1]),
    )
    problem = make_problem(profile, cluster([0, 0]), semantics="stay-put", objective="traffic")
    chain = make_chain(problem, max_imbalance=1.0)
    device_LE = np.array([[0, 1]])
    assert overload(chain, device_LE).tolist() == [0.0]
    assert overload(price_loads(chain, problem, price=1.0), device_LE).tolist() == [8.0]


def _random_devices(rng: Rng, problem: PlacementProblem) -> np.ndarray:
    placement = random_placement(rng, problem, fill=0.0)
    return placement.first_device_LE


def test_compiled_moves_agree_with_the_cost_model() -> None:
    """The tokens that a compiled state keeps, after annealing, are those of the cost model's hops."""
    from placement.solvers.chain.kernels import anneal, new_state, total_kept

    rng = np.random.default_rng(0)
    problem = stay_put(rng, devices=3, experts=8, layers=4, slots_D=[4, 3, 3])
    chain = make_chain(problem, max_imbalance=1.5)
    control = np.zeros(1, dtype=np.int64)
    start_LS = rows_of(chain.device_S, _random_devices(rng, problem))
    found_LS = anneal(chain, start_LS, (5.0, 0.1), (1.0, 100.0), 20_000, 3, control)
    device_LE = devices_of(chain.device_S, found_LS, 8)
    kept = tokens_kept(chain, device_LE)
    assert total_kept(new_state(chain, found_LS)) == pytest.approx(kept)
    hops = CostModel(problem).evaluate(_placement(problem, found_LS)).metrics.hops
    assert hops == pytest.approx(1 - kept / chain.ahead_BEE.sum())


def _placement(problem: PlacementProblem, expert_LS: np.ndarray) -> Placement:
    return Placement(
        physical_to_logical_map_LS=expert_LS,
        device_of_slot_S=problem.device_of_slot_S,
        num_experts=problem.num_experts,
        num_devices=problem.num_devices,
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("homes", [0, 3])
def test_walks_count_hops_as_the_cost_model_does(seed: int, homes: int) -> None:
    """Replicas on any device: hops agree, and settling never adds any nor breaks a limit that was kept."""
    rng = np.random.default_rng(seed)
    problem = stay_put(rng, devices=3, experts=6, spare_slots=3, homes=homes, max_imbalance=1.3)
    model = CostModel(problem)
    limit_L = make_chain(problem, max_imbalance=1.3).limit_LQ[:, 0]
    walk = Walk(problem, limit_L, Never())
    start = random_placement(rng, problem)
    rows_LS = np.array(start.physical_to_logical_map_LS)
    boundaries = (problem.num_layers - 1) * problem.profile.token_weight_T.sum()
    assert walk.hops(rows_LS) / boundaries == pytest.approx(model.objective(start))
    settled = _placement(problem, walk.settle(rows_LS))
    before, after = walk.excess(rows_LS), walk.excess(settled.physical_to_logical_map_LS)
    assert after <= before + 1e-9
    if before == 0:
        assert model.objective(settled) <= model.objective(start)


@pytest.mark.parametrize("seed", range(3))
def test_step_time_is_no_worse_than_search(seed: int) -> None:
    """The search's own answer is among those compared; homes and nodes count."""
    rng = np.random.default_rng(seed)
    problem = stay_put(rng, devices=4, experts=8, homes=4 * (seed % 2), objective="step-time")
    searched = optimize(problem, solver="search", work_s=0.1).objective
    assert solve(problem, work_s=0.1).objective <= searched


def test_nodes_are_told_apart_for_step_time() -> None:
    """Two chains that never mix: each stays on its node, though hops would not mind."""
    rng = np.random.default_rng(1)
    profile = random_profile(rng, tokens=400, layers=3, experts=8, top_k=1, windows=2, scale=500.0)
    problem = make_problem(
        profile, cluster([0, 1, 0, 1]), model=model_for(profile), semantics="stay-put", objective="step-time"
    )
    assert solve(problem, work_s=0.1).objective <= optimize(problem, solver="search", work_s=0.1).objective


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spare_slots", [0, 2])
def test_a_start_is_never_worsened(seed: int, spare_slots: int) -> None:
    """Whatever the start, with replicas or without, if it keeps the limit."""
    rng = np.random.default_rng(seed)
    problem = stay_put(rng, experts=6, spare_slots=spare_slots)
    start = random_placement(rng, problem)
    assert solve(problem, start=start, work_s=0.01).objective <= CostModel(problem).objective(start)


def test_one_layer_has_nothing_to_keep() -> None:
    """Without a boundary there are no hops, and the limit is kept all the same."""
    solution = solve(stay_put(np.random.default_rng(0), layers=1, experts=6, max_imbalance=1.5))
    assert solution.objective == 0.0


@pytest.mark.parametrize(
    ("semantics", "objective"),
    [
        (Semantics.DISPATCH, Objective.TRAFFIC),
        (Semantics.ALLGATHER, Objective.STEP_TIME),
        (Semantics.STAY_PUT, Objective.BALANCE),
    ],
)
def test_other_problems_are_refused(semantics: Semantics, objective: Objective) -> None:
    """Where layers are no chain the message names the solver to use."""
    problem = stay_put(np.random.default_rng(0), semantics=semantics, objective=objective, calibration=LINEAR)
    with pytest.raises(InputError, match="use search"):
        solve(problem)
