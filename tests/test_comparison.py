"""Tests of the comparison: who is compared, on which windows, and what it says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from instances import LINEAR, cluster, counts_only, random_profile

from placement.comparison import compare, cross_validate
from placement.cost import CostModel
from placement.errors import InfeasibleError, InputError
from placement.problem import PlacementProblem, make_problem
from placement.profile import RoutingProfile

PROFILE = random_profile(np.random.default_rng(0), tokens=400, experts=8, windows=9)


def problem(profile: RoutingProfile = PROFILE, **options: object) -> PlacementProblem:
    given: dict[str, object] = {"calibration": LINEAR, **options}
    return make_problem(profile, cluster([0, 0]), **given)  # type: ignore[arg-type]


def test_every_policy_is_fitted_and_held_out() -> None:
    """Even windows are fitted, odd ones scored, each for the problem's own objective."""
    whole = problem()
    told: list[str] = []
    comparison = compare(whole, work_s=0.05, on_policy=told.append)
    names = ["contiguous", "greedy", "eplb", "balance-only", "traffic-only", "auto"]
    assert [result.name for result in comparison.policies] == told == names
    assert (comparison.problem.profile.num_windows, comparison.num_held_out_windows) == (5, 4)
    assert comparison.few_windows
    held = CostModel(whole.with_profile(whole.profile.split_alternate()[1]))
    for result in comparison.policies:
        assert result.held_out.objective == held.objective(result.placement)
        assert result.fitted.objective >= comparison.lower_bound
    assert comparison.policy("auto").fitted.objective <= min(
        comparison.policy(name).fitted.objective for name in names[:3]
    )


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"objective": "balance"}, ["traffic-only"]),
        ({"objective": "traffic", "max_imbalance": 2.0}, ["balance-only"]),
        ({"semantics": "allgather"}, ["balance-only"]),
        ({"semantics": "stay-put"}, ["balance-only", "traffic-only"]),
        ({"risk": "p95"}, ["balance-only", "traffic-only"]),
    ],
)
def test_parts_are_what_the_objective_is_not(options: dict[str, object], names: list[str]) -> None:
    """Balance and traffic alone stand beside the objective where they differ from it and make sense."""
    comparison = compare(problem(**options), work_s=0.05)
    assert [r.name for r in comparison.policies if r.name.endswith("-only")] == names


def test_counts_have_no_traffic_to_compare() -> None:
    """Without tokens balance is all there is."""
    comparison = compare(problem(counts_only(PROFILE), objective="balance"), work_s=0.05)
    assert [r.name for r in comparison.policies] == ["contiguous", "greedy", "eplb", "auto"]


def test_only_some_policies() -> None:
    """Names choose; an absent policy is an input error that lists those there are."""
    comparison = compare(problem(), work_s=0.05, only=("greedy",))
    assert [result.name for result in comparison.policies] == ["greedy"]
    with pytest.raises(InputError, match=r"policy 'auto' is not among \['greedy'\]"):
        comparison.policy("auto")


def test_the_share_of_windows_that_are_better() -> None:
    """Against itself no window is; two policies share the windows but for ties."""
    comparison = compare(problem(), work_s=0.05)
    assert comparison.better_share("auto", "auto") == 0.0
    ours, theirs = (comparison.policy(name).held_out.step_W for name in ("auto", "contiguous"))
    assert comparison.better_share("auto", "contiguous") == np.mean(ours < theirs)


def test_the_json_form() -> None:
    """Strict JSON with one entry per policy."""
    comparison = compare(problem(), work_s=0.05)
    values = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert [p["name"] for p in values["policies"]] == [r.name for r in comparison.policies]
    assert values["fitted_windows"] + values["held_out_windows"] == 9
    assert values["policies"][0]["held_out"]["step"] == comparison.policy("contiguous").held_out.step


def test_policies_without_an_answer_are_skipped() -> None:
    """Uneven slots skip EPLB; a limit that nobody keeps is infeasible for all."""
    uneven = make_problem(PROFILE, cluster([0, 0], slots_D=[5, 3]), calibration=LINEAR)
    assert list(compare(uneven, work_s=0.05).skipped) == ["eplb"]
    with pytest.raises(InfeasibleError, match="--max-imbalance"):
        compare(problem(objective="traffic", max_imbalance=1.0000001), work_s=0.05)


def test_stopped_policies_do_not_end_the_comparison() -> None:
    """Stopped at once, the baselines still stand; a part that found nothing is skipped."""
    profile = random_profile(np.random.default_rng(3), tokens=400, experts=8, windows=9)
    tight = problem(profile, max_imbalance=1.0000001)
    comparison = compare(tight, stop=lambda: True)
    assert comparison.policy("auto").solution.termination == "stopped"
    assert "before any placement was found" in comparison.skipped["traffic-only"]


def test_one_window_cannot_be_compared() -> None:
    """There is nothing to hold out."""
    with pytest.raises(InputError, match="cannot be split"):
        compare(problem(PROFILE.select_windows([0])))


def test_cross_validation_holds_every_window_out_once() -> None:
    """The folds' held-out windows are all windows; the last of two folds is the plain comparison."""
    whole = problem()
    validation = cross_validate(whole, folds=2, work_s=0.02, only=["contiguous", "greedy", "auto"])
    assert sum(fold.num_held_out_windows for fold in validation.folds) == whole.profile.num_windows
    assert validation.names == ("contiguous", "greedy", "auto")
    plain = compare(whole, work_s=0.02, only=["contiguous"])
    assert validation.held_out("contiguous")[1] == plain.policy("contiguous").held_out.objective
    np.testing.assert_array_equal(validation.change("greedy", "greedy"), [0.0, 0.0])
    said = json.loads(json.dumps(validation.to_dict()))
    assert said["windows"] == whole.profile.num_windows
    assert said["policies"][2]["mean"] == pytest.approx(validation.held_out("auto").mean())


def test_three_folds_split_windows_by_number() -> None:
    """Fold 1 of 3 holds windows 1, 4, 7 out."""
    fit, held = PROFILE.split_fold(1, folds=3)
    np.testing.assert_array_equal(held.load_WLE, PROFILE.load_WLE[[1, 4, 7]])
    np.testing.assert_array_equal(fit.load_WLE, PROFILE.load_WLE[[0, 2, 3, 5, 6, 8]])


@pytest.mark.parametrize(("fold", "folds"), [(2, 2), (-1, 2), (0, 1), (0, 10)])
def test_impossible_folds_are_refused(fold: int, folds: int) -> None:
    """There are at least two folds, each with a window."""
    with pytest.raises(InputError, match=r"folds are|cannot be split"):
        PROFILE.split_fold(fold, folds=folds)
