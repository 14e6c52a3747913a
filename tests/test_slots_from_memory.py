"""Tests of slots that follow from the devices' memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from instances import LINEAR, cluster, model_for, random_profile

from placement.errors import InfeasibleError, InputError
from placement.optimizer import optimize
from placement.problem import PlacementProblem, ReplicaSplit, make_problem
from placement.topology import Topology

PROFILE = random_profile(np.random.default_rng(0), tokens=200)

# 2 layers x 3 matrices x 2^28 weights x 2 bytes: 3 GiB for one expert in all layers.
MODEL = model_for(PROFILE, hidden_size=2**14, expert_hidden_size=2**14)
COPY_BYTES = 3 * 2**30


def with_memory(*copies: float, slots_D: list[int] | None = None) -> Topology:
    """Return devices with room for so many copies of one expert in all layers."""
    memory_bytes_D = np.array([int(number * COPY_BYTES) for number in copies])
    return replace(cluster([0] * len(copies), slots_D=slots_D), memory_bytes_D=memory_bytes_D)


def problem(topology: Topology, **options: Any) -> PlacementProblem:
    given = {"model": MODEL, "calibration": LINEAR, "slots_from_memory": True, **options}
    return make_problem(PROFILE, topology, **given)


def test_every_device_takes_what_its_memory_holds() -> None:
    """Whole copies only, and never more than one of each of the 6 experts."""
    assert problem(with_memory(2.9, 4.0, 9.5)).slots_D.tolist() == [2, 4, 6]
    assert problem(with_memory(0.5, 6.0)).slots_D.tolist() == [0, 6]


def test_too_little_memory_names_the_numbers() -> None:
    """How many experts fit, what one takes, and what is missing."""
    with pytest.raises(
        InfeasibleError,
        match=r"memory holds 5 of 6 experts per layer: .* 2 layers of test-moe \(bf16\) takes 3\.00 GiB; "
        r"1 experts are missing, 3\.0 GiB",
    ):
        problem(with_memory(2.5, 3.5))


def test_what_else_says_how_many_slots_there_are() -> None:
    """The topology's slots win; spare slots and memory contradict each other; sizes are needed."""
    assert problem(with_memory(4.0, 4.0, slots_D=[3, 4])).slots_D.tolist() == [3, 4]
    assert problem(with_memory(4.0, 4.0), device_of_slot_S=np.repeat([0, 1], 3)).slots_D.tolist() == [3, 3]
    with pytest.raises(InputError, match="spare_slots is 2, and slots_from_memory fills the memory already"):
        problem(with_memory(4.0, 4.0), spare_slots=2)
    with pytest.raises(InputError, match="name it with --model"):
        problem(with_memory(4.0, 4.0), model=None)


def test_uneven_slots_are_solved() -> None:
    """A large device takes more experts and replicas than a small one, and none more than it holds."""
    uneven = problem(with_memory(2.0, 3.0, 4.0))
    solution = optimize(uneven, work_s=0.2)
    uneven.check_capacity(solution.placement)
    assert (solution.placement.count_LED.sum(axis=1) <= [2, 3, 4]).all()
    refined = optimize(replace(uneven, replica_split=ReplicaSplit.HASH), solver="split", work_s=0.2)
    assert (refined.placement.count_LED.sum(axis=1) <= [2, 3, 4]).all()
