"""Tests of placements: what they refuse, what follows from them, and what turns one into another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from instances import placement_of, random_placement, random_profile

from placement.errors import InfeasibleError, InputError
from placement.plan import Move, Placement, diff, equal_slots
from placement.problem import PlacementProblem, make_problem
from placement.topology import parse_shorthand


def placement(rows: object = ((0, 3, 1, 2), (2, 0, 1, 3)), **other: Any) -> Placement:
    given: dict[str, Any] = {"device_of_slot_S": [0, 0, 1, 1], "num_experts": 4, "num_devices": 2}
    return Placement(physical_to_logical_map_LS=np.array(rows), **{**given, **other})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [0, 1, 2, 3]}, "physical_to_logical_map has 1 dimensions, not 2"),
        ({"rows": np.zeros((0, 4), int)}, "physical_to_logical_map is empty"),
        ({"rows": [[0.0, 1.0, 2.0, 3.0]]}, "holds float64 values, not integers"),
        ({"rows": [[0, 1, 2, 4]]}, "layer 0 slot 3 holds expert 4, outside 0..3"),
        ({"rows": [[0, 1, 2, -2]]}, "layer 0 slot 3 holds expert -2"),
        ({"rows": [[0, 1, 2, 3], [0, 1, 2, -1]]}, "layer 1 gives expert 3 no slot"),
        ({"device_of_slot_S": [0, 0, 1]}, "device_of_slot names 3 slots, the map has 4"),
        ({"device_of_slot_S": [0, 0, 1, 2]}, "slot 3 is on device 2, outside 0..1"),
        ({"device_of_slot_S": [0, 0, -1, 1]}, "slot 2 is on device -1"),
        ({"num_experts": 0}, "0 experts on 2 devices"),
        ({"num_experts": 5}, "4 slots cannot hold 5 experts"),
        ({"moe_layer_ids": (1,)}, "moe_layer_ids names 1 layers, the map has 2"),
    ],
)
def test_a_broken_placement_is_refused(change: dict[str, Any], message: str) -> None:
    """Shapes, ids and coverage are checked, and the message names the place."""
    with pytest.raises(InputError, match=message.replace("..", r"\.\.")):
        placement(**change)


def test_an_expert_twice_on_a_device_is_refused() -> None:
    """The second copy would do nothing; device numbers may have holes."""
    with pytest.raises(InputError, match="layer 1 puts expert 2 twice on device 7"):
        placement(
            [[0, 1, 2, 3, -1], [0, 1, 2, 2, 3]],
            device_of_slot_S=[0, 0, 7, 7, 0],
            num_devices=8,
        )


def test_absurd_sizes_do_not_take_memory() -> None:
    """A file may claim any number of devices or experts; checking it makes no table of them."""
    assert placement(num_devices=10**15).num_devices == 10**15
    with pytest.raises(InputError, match="cannot hold"):
        placement(num_experts=10**15)


def test_what_follows_from_the_map() -> None:
    """Counts, replicas and first devices of a placement with a replica and an empty slot."""
    replicated = placement([[2, 0, 1, 0, 3, -1]], device_of_slot_S=[1, 1, 0, 0, 0, 1])
    assert replicated.replicas_LE.tolist() == [[2, 1, 1, 1]]
    assert replicated.count_LED[0].tolist() == [[1, 1], [1, 0], [0, 1], [1, 0]]
    # Expert 0 comes first in slot 1, which is on device 1.
    assert replicated.first_device_LE.tolist() == [[1, 0, 1, 0]]
    assert (replicated.num_layers, replicated.num_slots) == (1, 6)


def test_arrays_are_the_placements_own() -> None:
    """Changing what a placement was made from, or what it holds, is impossible."""
    rows = np.array([[0, 1, 2, 3]])
    made = placement(rows)
    rows[0, 0] = 3
    assert made.physical_to_logical_map_LS[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        made.physical_to_logical_map_LS[0, 0] = 1


def test_with_layers_keeps_everything_else() -> None:
    """A new map keeps slots, names and unknown keys."""
    before = placement(model_name="m", moe_layer_ids=(3, 5), extra={"note": 1})
    after = before.with_layers([[3, 0, 1, 2], [2, 0, 1, 3]])
    assert (after.model_name, after.moe_layer_ids, after.extra) == ("m", (3, 5), {"note": 1})
    assert after.physical_to_logical_map_LS[0, 0] == 3


def test_diff_takes_copies_from_the_nearest_holder() -> None:
    """Only devices that lack an expert receive it, and slots within a device do not matter."""
    before = placement([[0, 1, 1, 2]], device_of_slot_S=[0, 0, 3, 3], num_experts=3, num_devices=4)
    after = placement([[1, 0, 2, 1]], device_of_slot_S=[0, 0, 3, 2], num_experts=3, num_devices=4)
    assert diff(before, after) == (Move(layer=0, expert=1, source=3, target=2),)
    assert diff(before, before) == ()


def test_diff_needs_comparable_placements() -> None:
    """Different numbers of layers cannot be compared."""
    with pytest.raises(InputError, match="differ in num_layers: 2 against 1"):
        diff(placement(), placement([[0, 1, 2, 3]]))


def problem(seed: int) -> PlacementProblem:
    profile = random_profile(np.random.default_rng(seed))
    return make_problem(profile, parse_shorthand("h100:1x3"), objective="balance", spare_slots=3)


@given(seed=st.integers(0, 10_000))
def test_a_diff_is_what_the_target_lacks(seed: int) -> None:
    """Applying the moves to the copies before gives all copies after, each from a holder."""
    rng = np.random.default_rng(seed)
    before, after = (random_placement(rng, problem(seed), shuffle=True) for _ in range(2))
    moves = diff(before, after)
    held = before.count_LED.copy()
    for move in moves:
        assert before.count_LED[move.layer, move.expert, move.source] == 1
        assert held[move.layer, move.expert, move.target] == 0
        held[move.layer, move.expert, move.target] = 1
    assert (held >= after.count_LED).all()
    assert len(moves) == int(((after.count_LED > 0) & (before.count_LED == 0)).sum())


@given(seed=st.integers(0, 10_000))
def test_counts_agree_with_the_map(seed: int) -> None:
    """Every slot is counted once, and each expert's first device holds it."""
    made = random_placement(np.random.default_rng(seed), problem(seed), shuffle=True)
    filled = made.physical_to_logical_map_LS >= 0
    assert made.count_LED.sum() == filled.sum() == made.replicas_LE.sum()
    assert np.take_along_axis(made.count_LED, made.first_device_LE[:, :, None], axis=2).min() == 1


def test_equal_slots() -> None:
    """Slots go to devices in order, or the message says how many more are needed."""
    assert equal_slots(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(InfeasibleError, match=r"7 slots .* over 3 devices \(1 left over\); add 2 spare"):
        equal_slots(7, 3)


def test_rows_become_placements() -> None:
    """The helper of these tests lays rows out on a problem's slots."""
    rows = [[0, 1, 2, 3, 4, 5, -1, -1, -1]] * 2
    assert placement_of(problem(0), rows).physical_to_logical_map_LS.tolist() == rows
