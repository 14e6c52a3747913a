"""Lower bounds against exhaustive optima of tiny random problems."""

from __future__ import annotations

import numpy as np
import pytest
from instances import LINEAR, cluster, counts_only, least_objective, model_for, random_profile

from placement.bounds import lower_bound
from placement.calibration import DataSheetCalibration
from placement.cost import CostModel
from placement.errors import InfeasibleError
from placement.problem import Objective, Risk, Semantics, make_problem

CASES = [
    (objective, semantics)
    for semantics in Semantics
    for objective in Objective
    if objective is not Objective.TRAFFIC or semantics in (Semantics.DISPATCH, Semantics.STAY_PUT)
]


@pytest.mark.parametrize(("objective", "semantics"), CASES)
@pytest.mark.parametrize("seed", range(12))
def test_no_placement_beats_the_bound(objective: Objective, semantics: Semantics, seed: int) -> None:
    """Enumerating every placement of 4 experts finds none below the bound, replicas and homes included."""
    rng = np.random.default_rng([seed, CASES.index((objective, semantics))])
    profile = random_profile(rng, tokens=40, layers=2, experts=4, homes=2 if seed % 3 == 1 else 0)
    problem = make_problem(
        profile,
        cluster(
            [0, 0] if seed % 2 else [0, 1], kind_D=[0, 1] if seed % 4 == 3 else None, tflops=(100.0, 60.0)
        ),
        model=model_for(profile),
        semantics=semantics,
        objective=objective,
        calibration=LINEAR if seed % 5 else DataSheetCalibration(),
        spare_slots=2 if seed % 4 == 2 else 0,
        max_imbalance=3.0,
        risk=Risk.MEAN if objective is Objective.TRAFFIC else list(Risk)[seed % 3],
    )
    bound = lower_bound(CostModel(problem))
    least = least_objective(problem)
    assert 0 <= bound.value <= least * (1 + 1e-9)


def test_the_bound_is_met_where_it_must_be() -> None:
    """Four equal experts on two devices, counts only: perfect balance is bounded by 1 and reached."""
    rng = np.random.default_rng(0)
    profile = counts_only(random_profile(rng, experts=4))
    level = type(profile)(
        load_WLE=np.ones_like(profile.load_WLE), window_tokens_W=profile.window_tokens_W, top_k=2
    )
    problem = make_problem(level, cluster([0, 0]), calibration=LINEAR, objective="balance")
    assert lower_bound(CostModel(problem)).value == pytest.approx(1.0)
    assert least_objective(problem) == pytest.approx(1.0)


def test_infeasible_slots_name_the_numbers() -> None:
    """Five experts do not divide over two devices."""
    profile = random_profile(np.random.default_rng(0), experts=5)
    with pytest.raises(InfeasibleError, match="5 slots do not divide evenly over 2 devices"):
        make_problem(profile, cluster([0, 0]), calibration=LINEAR)
