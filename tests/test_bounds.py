"""Lower bounds where they are easy to get wrong: odd slots, sampled tokens, one device, bounds by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import LINEAR, cluster, least_objective, measured, model_for, random_profile

from placement.bounds import lower_bound
from placement.calibration import Calibration, DataSheetCalibration, LinearCalibration
from placement.cost import CostModel
from placement.problem import Objective, PlacementProblem, Risk, Semantics, make_problem
from placement.profile import RoutingProfile

TRAFFIC_HEAVY = LinearCalibration(pair_cost=0.1, token_cost=20.0)
CALIBRATIONS: tuple[Calibration, ...] = (
    LINEAR,
    TRAFFIC_HEAVY,
    DataSheetCalibration(overlap=0.25),
    measured(),
)


def odd_slots(rng: np.random.Generator, experts: int, devices: int) -> list[int]:
    """Slots of each device, some none, with up to two to spare."""
    slots = np.zeros(devices, dtype=np.int64)
    np.add.at(slots, rng.integers(0, devices, experts + int(rng.integers(0, 3))), 1)
    return slots.tolist()


@given(
    seed=st.integers(0, 100_000),
    objective=st.sampled_from(Objective),
    semantics=st.sampled_from(Semantics),
    risk=st.sampled_from(Risk),
    calibration=st.sampled_from(CALIBRATIONS),
)
@settings(max_examples=150, deadline=None)
def test_no_placement_of_odd_problems_beats_the_bound(
    seed: int, objective: Objective, semantics: Semantics, risk: Risk, calibration: Calibration
) -> None:
    """Slots of any number, two kinds of device, uneven nodes, sampled tokens, homes and a tail."""
    rng = np.random.default_rng(seed)
    if objective is Objective.TRAFFIC:
        risk = Risk.MEAN
        semantics = Semantics.DISPATCH if seed % 2 else Semantics.STAY_PUT
    devices, experts = int(rng.integers(1, 4)), int(rng.integers(2, 5))
    node_D = [0] * devices if seed % 3 else [0, *[1] * (devices - 1)]
    profile = random_profile(
        rng,
        tokens=30,
        layers=1 + seed % 2 * (experts < 4),
        experts=experts,
        top_k=int(rng.integers(1, experts)),
        tail=2,
        homes=devices * int(rng.integers(0, 2)),
        keep=float(rng.choice([1.0, 0.2])),
    )
    topology = cluster(
        node_D,
        kind_D=rng.integers(0, 2, devices).tolist(),
        tflops=(100.0, 33.0),
        inside_gbps=rng.choice([50.0, 100.0], devices),
        slots_D=odd_slots(rng, experts, devices),
    )
    problem = make_problem(
        profile,
        topology,
        model=model_for(profile),
        semantics=semantics,
        objective=objective,
        calibration=calibration,
        risk=risk,
        max_imbalance=1e9,
    )
    bound = lower_bound(CostModel(problem))
    assert bound.value <= least_objective(problem) * (1 + 1e-9)
    assert bound.layer_L.shape == (problem.num_layers,)


def test_the_hottest_expert_is_counted_on_sampled_tokens() -> None:
    """Exact loads say 9 of 10 tokens, the sample 1 of 2: the exchange carries what the sample stands for."""
    profile = RoutingProfile(
        load_WLE=[[[9, 1]]],
        window_tokens_W=[10],
        top_k=1,
        experts_TLK=np.array([[[0]], [[1]]], dtype=np.uint8),
        window_of_token_T=np.array([0, 0]),
    )
    problem = make_problem(
        profile, cluster([0, 0]), calibration=LinearCalibration(pair_cost=0.0, token_cost=1.0)
    )
    assert lower_bound(CostModel(problem)).value == least_objective(problem) == 5.0


@pytest.mark.parametrize("spare_slots", [0, 1, 3])
def test_one_device_is_bounded_by_what_it_must_carry(spare_slots: int) -> None:
    """Empty slots beside the experts add nothing to the bound."""
    profile = random_profile(np.random.default_rng(0), experts=4)
    for objective, expected in (("balance", 1.0), ("traffic", 1.0)):
        problem = make_problem(
            profile, cluster([0]), calibration=LINEAR, objective=objective, spare_slots=spare_slots
        )
        assert lower_bound(CostModel(problem)).value == pytest.approx(expected)


def counts(load_E: list[float], devices: int, **options: Any) -> PlacementProblem:
    profile = RoutingProfile(load_WLE=[[load_E]], window_tokens_W=[sum(load_E)], top_k=1)
    return make_problem(profile, cluster([0] * devices), objective="balance", calibration=LINEAR, **options)


@pytest.mark.parametrize(
    ("load_E", "devices", "spare_slots", "expected"),
    [
        # The hottest expert sits beside the coldest: (10 + 1) / (20 / 2).
        ([10, 5, 4, 1], 2, 0, 1.1),
        # Of the three hottest some device holds two: (4 + 4) / (14 / 2).
        ([5, 4, 4, 1], 2, 0, 8 / 7),
        # Split over two devices the hottest expert bounds nothing.
        ([10, 5, 4, 1], 2, 2, 1.0),
        # Three devices of one spare slot each: four replicas of half the load fit nowhere, three do.
        ([90, 1, 1], 3, 3, 1.0),
    ],
)
def test_load_bounds_by_hand(load_E: list[float], devices: int, spare_slots: int, expected: float) -> None:
    """The counting arguments, one at a time; each is met by some placement."""
    problem = counts(load_E, devices, spare_slots=spare_slots)
    assert lower_bound(CostModel(problem)).value == pytest.approx(expected)
    if devices == 2:
        assert least_objective(problem) == pytest.approx(expected)


def test_tokens_need_as_many_devices_as_their_experts() -> None:
    """Three experts on devices of two slots touch two; with replicas as well."""
    rng = np.random.default_rng(0)
    profile = random_profile(rng, experts=4, top_k=3)
    for spare_slots in (0, 2):
        problem = make_problem(
            profile, cluster([0, 0]), objective="traffic", max_imbalance=9.0, spare_slots=spare_slots
        )
        bound = lower_bound(CostModel(problem)).value
        assert bound >= (2.0 if spare_slots == 0 else 1.0)


@pytest.mark.parametrize(("devices", "expected"), [(2, 4 / 12), (3, 2 / 12)])
def test_hops_are_bounded_by_the_strongest_transitions(devices: int, expected: float) -> None:
    """Each expert sends its tokens to three others evenly; devices hold two experts of a layer each."""
    tokens = [(a, b) for a in range(4) for b in range(4) if a != b]
    profile = RoutingProfile(
        load_WLE=np.full((1, 2, 4), 3.0),
        window_tokens_W=[12],
        top_k=1,
        experts_TLK=np.array(tokens, dtype=np.uint8)[:, :, None],
        window_of_token_T=np.zeros(12, dtype=np.int64),
    )
    problem = make_problem(
        profile,
        cluster([0] * devices, slots_D=[2] * devices),
        semantics="stay-put",
        objective="traffic",
        max_imbalance=9.0,
    )
    # Of three transitions two stay where an expert's device holds two of the next layer; a third device lets
    # two experts have a replica each, where the third transition may stay.
    assert lower_bound(CostModel(problem)).value == pytest.approx(expected)
    if devices == 2:
        assert least_objective(problem) == pytest.approx(expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "balance"},
        {"objective": "traffic"},
        {"objective": "traffic", "semantics": "stay-put"},
    ],
)
@pytest.mark.parametrize("layers_done", [0, 1])
def test_a_bound_that_is_stopped_is_still_a_bound(options: dict[str, object], layers_done: int) -> None:
    """What is left is bounded by counting: no more than the whole bound, and more than nothing."""
    profile = random_profile(np.random.default_rng(1), tokens=300, layers=3, experts=8, windows=4)
    model = CostModel(make_problem(profile, cluster([0, 0, 0, 0]), calibration=LINEAR, **options))  # type: ignore[arg-type]
    asked = iter(range(1000))
    stopped = lower_bound(model, stop=lambda: next(asked) >= layers_done)
    whole = lower_bound(model)
    assert (stopped.layer_L <= whole.layer_L + 1e-12).all()
    assert stopped.value <= whole.value
    assert stopped.value > 0 or (options.get("semantics") == "stay-put" and layers_done == 0)
