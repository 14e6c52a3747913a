"""The cost model against an independent scorer, on random traffic and placements of every kind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import LINEAR, cluster, measured, model_for, random_placement, random_profile
from reference import RefLink, metrics, step_parts

from placement.calibration import Calibration, DataSheetCalibration
from placement.cost import CostModel
from placement.cost.incremental import LayerState
from placement.cost.layers import Neighbours
from placement.plan import EMPTY, Placement
from placement.problem import Objective, PlacementProblem, Semantics, make_problem

SEEDS = st.integers(0, 10_000)
NODES = [[0, 0], [0, 0, 1, 1]]


def problem_of(
    rng: np.random.Generator,
    *,
    semantics: Semantics = Semantics.DISPATCH,
    objective: Objective = Objective.STEP_TIME,
    calibration: Calibration = LINEAR,
    node_D: list[int] | None = None,
    spare_slots: int = 0,
    homes: bool = False,
    tail: int = 0,
) -> PlacementProblem:
    """Return a random problem of 8 experts."""
    nodes = NODES[int(rng.integers(0, 2))] if node_D is None else node_D
    profile = random_profile(rng, experts=8, top_k=3, tail=tail, homes=len(nodes) if homes else 0)
    return make_problem(
        profile,
        cluster(nodes),
        model=model_for(profile),
        semantics=semantics,
        objective=objective,
        calibration=calibration,
        spare_slots=spare_slots,
        max_imbalance=50.0,
    )


@given(seed=SEEDS, spare=st.sampled_from([0, 4, 8]))
@settings(max_examples=60, deadline=None)
def test_quality_figures_equal_the_reference(seed: int, spare: int) -> None:
    """Balance, fanout, node fanout, hops and floor, with replicas, empty slots and a tail."""
    rng = np.random.default_rng(seed)
    problem = problem_of(rng, spare_slots=spare, tail=7)
    placement = random_placement(rng, problem, shuffle=True)
    ours = CostModel(problem).evaluate(placement).metrics.as_dict()
    expected = metrics(problem.profile, placement, problem.topology.node_of_device_D.tolist())
    for name, value in ours.items():
        assert value == pytest.approx(expected[name], rel=1e-12, abs=1e-12), name


@given(seed=SEEDS, spare=st.sampled_from([0, 4]), semantics=st.sampled_from(Semantics))
@settings(max_examples=80, deadline=None)
def test_linear_step_equals_the_reference(seed: int, spare: int, semantics: Semantics) -> None:
    """Experts and exchanges of every window and layer under all four semantics."""
    rng = np.random.default_rng(seed)
    problem = problem_of(rng, semantics=semantics, spare_slots=spare, homes=bool(seed % 2))
    placement = random_placement(rng, problem)
    link = RefLink(
        group_D=range(problem.num_devices),
        slowness_D=[1.0] * problem.num_devices,
        dispatch=lambda tokens: 4.0 * tokens,
        combine=lambda tokens: 0.0,
        flat=True,
        per_device=semantics is Semantics.DISPATCH_NODEDUP,
    )
    expected = step_parts(
        problem.profile,
        placement,
        expert_seconds=[lambda tokens: tokens] * problem.num_devices,
        links=[link],
        semantics=str(semantics),
    )
    breakdown = CostModel(problem).evaluate(placement)
    np.testing.assert_allclose(breakdown.experts_WL, expected[0], rtol=1e-12)
    np.testing.assert_allclose(breakdown.dispatch_WL, expected[1], rtol=1e-12)
    np.testing.assert_allclose(breakdown.combine_WL, expected[2], rtol=1e-12)
    assert breakdown.objective == pytest.approx(expected.sum(axis=(0, 2)).mean(), rel=1e-12)


def test_four_experts_by_hand() -> None:
    """Experts {0, 1} on device 0 and {2, 3} on device 1; five tokens with two experts each.

    Tokens (0,1) (0,1) (0,2) (2,3) (1,3): device 0 holds the pairs of experts 0 and 1, 3 + 3 = 6, device 1
    2 + 2 = 4. Device 0 sees tokens 1, 2, 3, 5 (4 of them), device 1 tokens 3, 4, 5. The linear step is
    6 + 4 x 4 = 22, the fanout (1 + 1 + 2 + 1 + 2) / 5 = 1.4, the balance 6 / 5.
    """
    from placement.profile import RoutingProfile

    tokens = np.array([[0, 1], [0, 1], [0, 2], [2, 3], [1, 3]], dtype=np.uint8)[:, None, :]
    profile = RoutingProfile(
        load_WLE=np.array([[[3.0, 3.0, 2.0, 2.0]]]),
        window_tokens_W=np.array([5.0]),
        top_k=2,
        experts_TLK=tokens,
        window_of_token_T=np.zeros(5, dtype=np.int64),
    )
    problem = make_problem(profile, cluster([0, 0]), calibration=LINEAR)
    placement = Placement(
        physical_to_logical_map_LS=[[0, 1, 2, 3]], device_of_slot_S=[0, 0, 1, 1], num_experts=4, num_devices=2
    )
    breakdown = CostModel(problem).evaluate(placement)
    assert breakdown.objective == 22.0
    assert breakdown.metrics.fanout == pytest.approx(1.4)
    assert breakdown.metrics.balance == pytest.approx(1.2)


def neighbours_of(problem: PlacementProblem, placement: Placement, layer: int) -> Neighbours:
    """Return where single-copy tokens are before and after a layer."""
    experts_TLK = problem.profile.experts_TLK
    assert experts_TLK is not None

    def devices(other: int) -> np.ndarray:
        if other < 0 and problem.profile.home_T is not None:
            return problem.profile.home_T
        if not 0 <= other < problem.num_layers:
            return np.full(len(experts_TLK), -1)
        return placement.first_device_LE[other][experts_TLK[:, other, 0]]

    return Neighbours(previous_T=devices(layer - 1), next_T=devices(layer + 1))


def swappable(placement: Placement, layer: int) -> list[tuple[int, int]]:
    """Return the pairs of slots whose contents may change places."""
    row, device = placement.physical_to_logical_map_LS[layer], placement.device_of_slot_S
    pairs = []
    for a in range(row.size):
        for b in range(a + 1, row.size):
            if device[a] == device[b] or row[a] == row[b]:
                continue
            held_a, held_b = row[device == device[a]], row[device == device[b]]
            if (row[a] != EMPTY and row[a] in held_b) or (row[b] != EMPTY and row[b] in held_a):
                continue
            pairs.append((a, b))
    return pairs


CASES = [
    (Objective.STEP_TIME, Semantics.DISPATCH, LINEAR),
    (Objective.STEP_TIME, Semantics.DISPATCH, DataSheetCalibration()),
    (Objective.STEP_TIME, Semantics.DISPATCH, measured()),
    (Objective.STEP_TIME, Semantics.DISPATCH_NODEDUP, DataSheetCalibration()),
    (Objective.STEP_TIME, Semantics.STAY_PUT, LINEAR),
    (Objective.STEP_TIME, Semantics.STAY_PUT, DataSheetCalibration()),
    (Objective.STEP_TIME, Semantics.ALLGATHER, DataSheetCalibration()),
    (Objective.BALANCE, Semantics.DISPATCH, LINEAR),
    (Objective.TRAFFIC, Semantics.DISPATCH, LINEAR),
    (Objective.TRAFFIC, Semantics.STAY_PUT, LINEAR),
]


@pytest.mark.parametrize("case", range(len(CASES)))
@given(seed=SEEDS, spare=st.sampled_from([0, 4]), homes=st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_swap_costs_what_two_evaluations_differ_by(case: int, seed: int, spare: int, homes: bool) -> None:
    """Incremental deltas equal full evaluations to 1e-9, with replicas and empty slots, swap after swap."""
    objective, semantics, calibration = CASES[case]
    rng = np.random.default_rng(seed)
    stay_put = semantics is Semantics.STAY_PUT
    problem = problem_of(
        rng,
        semantics=semantics,
        objective=objective,
        calibration=calibration,
        spare_slots=spare,
        homes=homes and objective is not Objective.TRAFFIC,
    )
    placement = random_placement(rng, problem, fill=0.0 if stay_put else 0.7)
    model = CostModel(problem)
    layer = int(rng.integers(0, problem.num_layers))
    neighbours = neighbours_of(problem, placement, layer) if stay_put else None
    state = LayerState(model, placement, layer, neighbours=neighbours)
    scale = {Objective.STEP_TIME: 1.0, Objective.BALANCE: 1.0 / problem.num_layers}.get(objective)
    if scale is None:
        # The state sums touched devices or hops over tokens of a mean window; the objective is per token.
        boundaries = problem.num_layers - 1 if stay_put else problem.num_layers
        scale = 1.0 / (float(problem.profile.window_tokens_W.mean()) * boundaries)
    for _ in range(3):
        pairs = swappable(placement, layer)
        if not pairs:
            return
        a, b = pairs[int(rng.integers(0, len(pairs)))]
        row = placement.physical_to_logical_map_LS.copy()
        row[layer, [a, b]] = row[layer, [b, a]]
        after = placement.with_layers(row)
        before_value, after_value = model.objective(placement), model.objective(after)
        delta = state.swap_delta(a, b) * scale
        assert delta == pytest.approx(after_value - before_value, rel=1e-9, abs=1e-9 * abs(before_value))
        # Items keep their numbers when they move; start the next state from the placement itself.
        placement = after
        state = LayerState(model, placement, layer, neighbours=neighbours)
