"""Tests of one layer under long chains of swaps: nothing may drift."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import LINEAR, cluster, measured, model_for, random_placement, random_profile

from placement.calibration import Calibration, DataSheetCalibration
from placement.cost import CostModel
from placement.cost.incremental import LayerState
from placement.cost.layers import Neighbours
from placement.errors import InputError
from placement.plan import Placement
from placement.problem import Objective, PlacementProblem, Semantics, make_problem

CALIBRATIONS: tuple[Calibration, ...] = (LINEAR, DataSheetCalibration(overlap=0.25), measured())
KINDS = [
    (semantics, objective)
    for semantics in Semantics
    for objective in Objective
    if objective is not Objective.TRAFFIC or semantics in (Semantics.DISPATCH, Semantics.STAY_PUT)
]


def random_problem(
    rng: np.random.Generator, semantics: Semantics, objective: Objective, calibration: Calibration
) -> PlacementProblem:
    """Uneven slots, links and kinds on one or two nodes; spare slots where replicas are exact."""
    devices = int(rng.integers(2, 5))
    experts = int(rng.integers(3, 8))
    traffic = objective is Objective.TRAFFIC
    chained = semantics is Semantics.STAY_PUT and objective is not Objective.BALANCE
    profile = random_profile(
        rng,
        tokens=int(rng.choice([40, 200])),
        experts=experts,
        top_k=int(rng.integers(1, 4)),
        tail=0 if traffic else 3,
        homes=0 if traffic else devices * int(rng.integers(0, 2)),
        keep=float(rng.choice([1.0, 0.6])),
        scale=float(rng.choice([1.0, 100.0])),
    )
    slots = np.zeros(devices, dtype=np.int64)
    np.add.at(slots, rng.integers(0, devices, experts + (1 if chained else 4)), 1)
    topology = cluster(
        [0] * devices if rng.random() < 0.5 else [0, *[1] * (devices - 1)],
        kind_D=rng.integers(0, 2, devices).tolist(),
        tflops=(100.0, 33.0),
        inside_gbps=rng.choice([50.0, 100.0], devices),
        across_gbps=rng.choice([5.0, 10.0], devices),
        slots_D=np.minimum(slots, experts).tolist(),
    )
    return make_problem(
        profile,
        topology,
        model=model_for(profile),
        semantics=semantics,
        objective=objective,
        calibration=calibration,
        max_imbalance=1e9,
    )


def neighbours_of(problem: PlacementProblem, placement: Placement, layer: int) -> Neighbours:
    """Devices of every token before and after a layer, each expert having one copy."""
    experts_TLK, home_T = problem.profile.experts_TLK, problem.profile.home_T
    assert experts_TLK is not None
    nowhere = np.full(len(experts_TLK), -1)

    def devices(other: int) -> np.ndarray:
        return placement.first_device_LE[other][experts_TLK[:, other, 0]]

    before = devices(layer - 1) if layer > 0 else nowhere if home_T is None else home_T
    after = devices(layer + 1) if layer + 1 < problem.num_layers else nowhere
    return Neighbours(previous_T=before, next_T=after)


def share_of_objective(problem: PlacementProblem) -> float:
    """How much the objective changes with a layer's value."""
    layers = problem.num_layers
    if problem.objective is Objective.STEP_TIME:
        return 1.0
    if problem.objective is Objective.BALANCE:
        return 1.0 / layers
    per_window = float(problem.profile.window_tokens_W.mean())
    return 1.0 / per_window / (layers - 1 if problem.semantics is Semantics.STAY_PUT else layers)


@pytest.mark.parametrize(("semantics", "objective"), KINDS)
@given(seed=st.integers(0, 100_000), calibration=st.sampled_from(CALIBRATIONS))
@settings(max_examples=20, deadline=None)
def test_deltas_hold_after_a_chain_of_swaps(
    semantics: Semantics, objective: Objective, seed: int, calibration: Calibration
) -> None:
    """One state, many swaps: every delta is the difference of two evaluations to 1e-9."""
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, semantics, objective, calibration)
    chained = semantics is Semantics.STAY_PUT and objective is not Objective.BALANCE
    placement = random_placement(rng, problem, fill=0.0 if chained else 0.7)
    layer = int(rng.integers(0, problem.num_layers))
    model = CostModel(problem)
    neighbours = neighbours_of(problem, placement, layer) if chained else None
    state = LayerState(model, placement, layer, neighbours=neighbours)
    rows = placement.physical_to_logical_map_LS.copy()
    before = model.objective(placement)
    for a, b in rng.integers(0, problem.num_slots, (10, 2)):
        try:
            delta = state.swap_delta(int(a), int(b)) * share_of_objective(problem)
        except InputError:
            continue
        state.swap(int(a), int(b))
        rows[layer] = state.row(problem.device_of_slot_S)
        after = model.objective(placement.with_layers(rows))
        assert delta == pytest.approx(after - before, rel=1e-9, abs=1e-9 * max(before, after))
        before = after


@given(seed=st.integers(0, 100_000))
@settings(max_examples=20, deadline=None)
def test_a_load_limit_keeps_devices_from_filling_up(seed: int) -> None:
    """Under the traffic objective swaps within the limit are priced, those that pass it further refused."""
    rng = np.random.default_rng(seed)
    profile = random_profile(rng, layers=1)
    problem = make_problem(profile, cluster([0, 0]), objective="traffic", max_imbalance=1.2)
    model, placement = CostModel(problem), random_placement(rng, problem)
    state = LayerState(model, placement, 0)
    for a, b in ((a, b) for a in range(3) for b in range(3, 6)):
        rows = placement.physical_to_logical_map_LS.copy()
        rows[0, [a, b]] = rows[0, [b, a]]
        before, after = (
            model.evaluate(p).metrics.worst_layer_balance for p in (placement, placement.with_layers(rows))
        )
        if after <= 1.2 * (1 - 1e-9):
            assert np.isfinite(state.swap_delta(a, b))
        elif after > max(before, 1.2) * (1 + 1e-9):
            with pytest.raises(InputError, match="the load limit"):
                state.swap_delta(a, b)
