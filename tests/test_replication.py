"""Tests of what replicas buy."""

from __future__ import annotations

import numpy as np
import pytest
from instances import LINEAR, cluster, random_profile

from placement.comparison import compare
from placement.errors import InputError
from placement.problem import PlacementProblem, make_problem
from placement.replication import compare_spare_slots, spare_slot_steps


def problem_of(experts: int = 8, **options: object) -> PlacementProblem:
    profile = random_profile(np.random.default_rng(6), tokens=400, layers=1, experts=experts, windows=6)
    given: dict[str, object] = {"calibration": LINEAR, "spare_slots": -experts % 4, **options}
    return make_problem(profile, cluster([0] * 4), **given)  # type: ignore[arg-type]


def test_every_number_of_slots_is_compared_on_the_same_windows() -> None:
    """Slots grow by what was asked for; without any it is the plain comparison."""
    problem = problem_of()
    found = compare_spare_slots(problem, spare_slots=(4, 0), work_s=0.1)
    assert found.spare_slots == (0, 4)
    assert [each.problem.num_slots for each in found.comparisons] == [8, 12]
    assert found.names == ("eplb", "auto")
    plain = compare(problem, only=("eplb", "auto"), work_s=0.1)
    without, _ = found.results("auto")
    assert without.held_out.objective == plain.policy("auto").held_out.objective
    fitted = [result.fitted.objective for result in found.results("auto")]
    assert fitted[1] < fitted[0]


@pytest.mark.parametrize(
    ("experts", "most", "expected"),
    [
        (8, None, (0, 4)),
        (32, None, (0, 4, 8, 16)),
        (32, 15, (0, 4, 8, 12)),
        (8, 0, (0,)),
        (4, 99, (0, 4, 8, 12)),
        (10, None, (2, 6)),
    ],
)
def test_steps_double_from_one_for_every_device(
    experts: int, most: int | None, expected: tuple[int, ...]
) -> None:
    """None, one for each of four devices, twice as many, ...; never more than could be filled."""
    assert spare_slot_steps(problem_of(experts), most=most) == expected


def test_bad_spare_slots() -> None:
    """Negative numbers, none at all, and slots that the topology names are input errors."""
    problem = problem_of()
    with pytest.raises(InputError, match="spare_slots is -1"):
        compare_spare_slots(problem, spare_slots=(-1,))
    with pytest.raises(InputError, match="name at least one"):
        compare_spare_slots(problem, spare_slots=())
    fixed = make_problem(problem.profile, cluster([0] * 4, slots_D=[2, 2, 2, 2]), calibration=LINEAR)
    with pytest.raises(InputError, match="names each device's slots"):
        compare_spare_slots(fixed)
