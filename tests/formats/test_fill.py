"""Tests of filling slots that a solve left empty: valid, harmless, and noted in the file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from formats.samples import place, placements
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.formats.fill import KEY, fillers_of, find_fillers, full, with_fillers
from placement.plan import EMPTY, Placement

# Experts 0-3 on two devices of three slots; device 1 has an empty one.
ROW = [0, 1, 2, 3, 0, -1]


def loads(*experts: float) -> np.ndarray:
    return np.array([[experts]], dtype=np.float64)


def test_the_least_harm_by_hand() -> None:
    """Device 0 has 5 + 8 + 1, device 1 5 + 2: it stays below with expert 1 or 2, and 2 is the lighter."""
    placement = place([ROW])
    assert find_fillers(placement, loads(10, 8, 1, 2)) == ((0, 5, 2),)


def test_what_runs_there_already_comes_first() -> None:
    """An expert that the device holds now costs no move, even where another is colder."""
    placement, start = place([ROW]), place([[0, 2, 3, 1, 0, 3]])
    assert find_fillers(placement, loads(10, 8, 1, 2), start=start) == ((0, 5, 1),)


def test_a_device_with_every_expert_gets_none() -> None:
    """There is nothing left to put there."""
    full_device = place([[0, 1, -1, 1, 0, -1]], experts=2)
    assert find_fillers(full_device, loads(1, 1)) == ()


@settings(max_examples=40)
@given(placement=placements(), seed=st.integers(0, 1000), windows=st.integers(1, 40))
def test_filled_placements_are_whole(placement: Placement, seed: int, windows: int) -> None:
    """Emptied slots are filled again, and no expert is twice on a device."""
    rng = np.random.default_rng(seed)
    map_LS = placement.physical_to_logical_map_LS.copy()
    for layer, slot in np.argwhere(map_LS >= 0):
        if (map_LS[layer] == map_LS[layer, slot]).sum() > 1 and rng.random() < 0.5:
            map_LS[layer, slot] = EMPTY
    emptied = placement.with_layers(map_LS)
    load_WLE = rng.random((windows, placement.num_layers, placement.num_experts))
    fillers = find_fillers(emptied, load_WLE)
    filled = with_fillers(emptied, fillers)
    assert len(fillers) == (map_LS == EMPTY).sum()
    assert (filled.physical_to_logical_map_LS != EMPTY).all()


def test_a_file_notes_them() -> None:
    """What a solve noted is used where devices are uneven, and only there."""
    noted = place([ROW], extra={KEY: [[0, 5, 2]]})
    assert full(noted).physical_to_logical_map_LS.tolist() == [[0, 1, 2, 3, 0, 2]]
    even = place([[0, 1, -1, 2, 3, -1]], extra={KEY: [[0, 2, 2], [0, 5, 0]]})
    assert full(even) is even


@pytest.mark.parametrize(
    "noted",
    [
        None,
        "abc",
        [],
        [[0, 5]],
        [[0, 5, 2.0]],
        [[0, 5, True]],
        [7],
        [[0, 0, 2]],  # not empty
        [[0, 5, 3]],  # held already
        [[0, 5, 4]],
        [[0, 6, 2]],
        [[1, 5, 2]],
        [[-1, 5, 2]],
        [[0, 5, 2], [0, 5, 2]],
    ],
)
def test_notes_that_do_not_fit_are_left_alone(noted: Any) -> None:
    """A file that was changed since its solve is not filled by old notes."""
    placement = replace(place([ROW]), extra={KEY: noted})
    assert fillers_of(placement) == ()
    assert full(placement).physical_to_logical_map_LS.tolist() == [ROW]
