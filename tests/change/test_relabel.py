"""Tests of exchanging alike devices: the objective stays, the moves do not rise, and are as few as can be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import LINEAR, cluster, model_for, placement_of, random_placement, random_profile

from placement.change.relabel import fewest_moves, layer_on_slots
from placement.cost import CostModel
from placement.optimizer import optimize
from placement.plan import Placement, diff
from placement.problem import Objective, PlacementProblem, Semantics, make_problem


def problem_of(seed: int, nodes: list[int], *, spare_slots: int = 0, **options: object) -> PlacementProblem:
    """Return a problem of 12 experts."""
    rng = np.random.default_rng(seed)
    homes = len(nodes) if options.pop("homes", False) else 0
    profile = random_profile(rng, tokens=80, layers=2, experts=12, top_k=3, windows=3, homes=homes)
    return make_problem(
        profile,
        cluster(nodes),
        model=model_for(profile),
        spare_slots=spare_slots,
        **options,  # type: ignore[arg-type]
    )


def shuffled(placement: Placement, order_LD: np.ndarray) -> Placement:
    """Return a placement whose devices' contents went to other devices with as many slots."""
    slots_D = [np.nonzero(placement.device_of_slot_S == d)[0] for d in range(placement.num_devices)]
    rows = np.array(placement.physical_to_logical_map_LS)
    for layer, order_D in enumerate(order_LD):
        for device, target in enumerate(order_D):
            rows[layer, slots_D[target]] = placement.physical_to_logical_map_LS[layer, slots_D[device]]
    return placement.with_layers(rows)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    nodes=st.sampled_from([[0] * 4, [0, 0, 1, 1], [0, 0, 0, 1]]),
    semantics=st.sampled_from(list(Semantics)),
    linear=st.booleans(),
    homes=st.booleans(),
    spare_slots=st.sampled_from([0, 4]),
)
def test_the_objective_stays_and_moves_do_not_rise(
    seed: int, nodes: list[int], semantics: Semantics, linear: bool, homes: bool, spare_slots: int
) -> None:
    """For every semantics, with homes and replicas, tiers that count and such that do not."""
    calibration = LINEAR if linear else None
    problem = problem_of(
        seed, nodes, spare_slots=spare_slots, semantics=semantics, calibration=calibration, homes=homes
    )
    rng = np.random.default_rng(seed)
    start, found = (random_placement(rng, problem) for _ in range(2))
    near = fewest_moves(problem, start, found)
    model = CostModel(problem)
    assert model.objective(near) <= model.objective(found) * (1 + 1e-11)
    assert len(diff(start, near)) <= len(diff(start, found))
    problem.check_capacity(near)


@pytest.mark.parametrize("seed", range(3))
def test_exchanged_devices_are_put_back(seed: int) -> None:
    """Where every layer's alike devices were exchanged at random, no move is left."""
    problem = problem_of(seed, [0] * 4, objective="balance")
    rng = np.random.default_rng(seed)
    start = random_placement(rng, problem)
    other = shuffled(start, np.stack([rng.permutation(4) for _ in range(2)]))
    near = fewest_moves(problem, start, other)
    np.testing.assert_array_equal(near.physical_to_logical_map_LS, start.physical_to_logical_map_LS)


def test_nodes_go_as_wholes() -> None:
    """Exchanged nodes and devices within them are put back; what mixes nodes is not an exchange."""
    problem = problem_of(1, [0, 0, 1, 1])
    start = random_placement(np.random.default_rng(1), problem)
    whole = shuffled(start, np.array([[3, 2, 0, 1], [2, 3, 1, 0]]))
    assert diff(start, fewest_moves(problem, start, whole)) == ()
    mixed = shuffled(start, np.array([[0, 2, 1, 3], [0, 1, 2, 3]]))
    near = fewest_moves(problem, start, mixed)
    assert diff(start, near) != ()
    assert CostModel(problem).objective(near) == pytest.approx(CostModel(problem).objective(mixed), rel=1e-12)


def test_coupled_layers_share_one_exchange() -> None:
    """Under stay-put a layer's devices are not exchanged alone, all layers' together are."""
    problem = problem_of(2, [0] * 4, semantics="stay-put", calibration=LINEAR)
    start = random_placement(np.random.default_rng(2), problem)
    together = shuffled(start, np.array([[1, 2, 3, 0]] * 2))
    assert diff(start, fewest_moves(problem, start, together)) == ()
    alone = shuffled(start, np.array([[1, 2, 3, 0], [0, 1, 2, 3]]))
    near = fewest_moves(problem, start, alone)
    model = CostModel(problem)
    assert model.objective(near) == pytest.approx(model.objective(alone), rel=1e-12)
    assert diff(start, near) != ()


def test_no_exchange_saves_more() -> None:
    """The assignment is as good as the best of all exchanges of five devices."""
    rng = np.random.default_rng(3)
    profile = random_profile(rng, tokens=80, layers=1, experts=10, top_k=3, windows=3)
    problem = make_problem(profile, cluster([0] * 5), calibration=LINEAR, objective="balance")
    start, found = (random_placement(rng, problem) for _ in range(2))
    every = [
        len(diff(start, shuffled(found, np.array([order])))) for order in itertools.permutations(range(5))
    ]
    assert len(diff(start, fewest_moves(problem, start, found))) == min(every)


def test_devices_of_other_size_are_not_exchanged() -> None:
    """Device 0 has three slots, the others less: only devices 1 and 2 are alike."""
    rng = np.random.default_rng(4)
    profile = random_profile(rng, tokens=60, layers=1, experts=6, windows=3)
    problem = make_problem(
        profile, cluster([0] * 3, slots_D=[3, 2, 2]), calibration=LINEAR, objective="balance"
    )
    start = placement_of(problem, [[0, 1, 2, 3, 4, 5, -1]])
    other = placement_of(problem, [[3, 4, 0, 5, -1, 1, 2]])
    near = fewest_moves(problem, start, other)
    # Device 0 keeps expert 0 and receives 3 and 4; {1, 2} and {5} go either way: one of them stays.
    assert len(diff(start, near)) == 4
    assert (near.count_LED.sum(axis=1) <= [3, 2, 2]).all()


def test_experts_that_stay_keep_their_slots() -> None:
    """Experts 2 and 0 stay on device 0 in slots 1 and 2; expert 5 takes the slot left."""
    problem = problem_of(5, [0] * 4)
    start = random_placement(np.random.default_rng(5), problem)
    row_S = np.array(start.physical_to_logical_map_LS[0])
    item_S = row_S.copy()
    # Exchange one expert of device 0 and one of device 1.
    item_S[0], item_S[3] = row_S[3], row_S[0]
    laid = layer_on_slots(
        item_S[::-1].copy(), problem.device_of_slot_S[::-1].copy(), problem.device_of_slot_S, start, 0
    )
    np.testing.assert_array_equal(laid, item_S)


@pytest.mark.parametrize("objective", [Objective.BALANCE, Objective.STEP_TIME])
def test_solves_from_a_start_save_moves(objective: Objective) -> None:
    """What a solve returns cannot be relabelled to fewer moves."""
    problem = problem_of(6, [0] * 4, objective=objective, calibration=LINEAR)
    start = random_placement(np.random.default_rng(6), problem)
    solution = optimize(problem, start=start, work_s=0.1)
    again = fewest_moves(problem, start, solution.placement)
    assert len(diff(start, again)) == len(diff(start, solution.placement))
    assert solution.objective == CostModel(problem).objective(solution.placement)
