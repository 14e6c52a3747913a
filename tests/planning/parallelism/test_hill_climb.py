"""Piper's hill climbing, exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from placement.planning.parallelism.hill_climb import Swap, climb, climb_layer


def plain_climb(load: list[float], devices: list[int], num_devices: int) -> list[int]:
    """Climb with lists and loops alone."""
    devices = list(devices)
    while True:
        loads = [sum(x for x, d in zip(load, devices, strict=True) if d == k) for k in range(num_devices)]
        top, low = loads.index(max(loads)), loads.index(min(loads))
        best, pair = loads[top] - loads[low], None
        for a, b in itertools.product(range(len(load)), repeat=2):
            if devices[a] == top and devices[b] == low:
                gap = abs((loads[top] - load[a] + load[b]) - (loads[low] + load[a] - load[b]))
                if gap < best:
                    best, pair = gap, (a, b)
        if pair is None:
            return devices
        devices[pair[0]], devices[pair[1]] = low, top


def test_by_hand() -> None:
    """9, 4 | 2, 1: one swap, 9 for 2, leaves 6 | 10, and no second one helps."""
    devices, swaps = climb_layer(np.array([9.0, 4.0, 2.0, 1.0]), np.array([0, 0, 1, 1]), num_devices=2)
    # 13 | 3 has a gap of 10. 9 for 2 leaves 6 | 10, 9 for 1: 5 | 11, 4 for 2: 11 | 5, 4 for 1: 10 | 6. The
    # first of the two best is taken: {2, 4} and {9, 1}. From there 9 for 4 gives 11 | 5 the other way round,
    # 9 for 2: 13 | 3, 1 for 4: 3 | 13, 1 for 2: 5 | 11; none is below 4.
    assert (devices.tolist(), swaps) == ([1, 0, 0, 1], [(0, 2)])


def test_a_limit_ends_it() -> None:
    """Swaps are counted, and none is allowed with a limit of 0."""
    # 26 | 4: 8 for 1 leaves 19 | 11, then 5 for 1 leaves 15 | 15.
    load = np.array([8.0, 7.0, 6.0, 5.0, 1.0, 1.0, 1.0, 1.0])
    start = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    assert len(climb_layer(load, start, num_devices=2)[1]) == 2
    assert len(climb_layer(load, start, num_devices=2, max_swaps=1)[1]) == 1
    assert climb_layer(load, start, num_devices=2, max_swaps=0)[0].tolist() == start.tolist()
    with pytest.raises(InputError, match="max_swaps is -1"):
        climb_layer(load, start, num_devices=2, max_swaps=-1)


def test_layers_are_climbed_one_by_one() -> None:
    """Each layer starts from its own devices, and swaps say which layer they are of."""
    load_LE = np.array([[9.0, 4.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    device_LE, swaps = climb(load_LE, np.array([[0, 0, 1, 1], [0, 1, 0, 1]]), num_devices=2)
    assert device_LE.tolist() == [[1, 0, 0, 1], [0, 1, 0, 1]]
    assert swaps == (Swap(layer=0, from_fullest=0, from_emptiest=2),)


@settings(max_examples=40, deadline=None)
@given(loads=st.lists(st.integers(0, 50), min_size=4, max_size=16), num_devices=st.sampled_from([2, 3, 4]))
def test_against_plain_loops(loads: list[int], num_devices: int) -> None:
    """The result is that of plain loops, devices keep their counts, and the squares of loads fall."""
    loads = loads[: len(loads) // num_devices * num_devices] or [1] * num_devices
    load = np.array(loads, dtype=np.float64)
    start = np.repeat(np.arange(num_devices), load.size // num_devices)
    devices, swaps = climb_layer(load, start, num_devices=num_devices)
    assert devices.tolist() == plain_climb(load.tolist(), start.tolist(), num_devices)
    assert np.bincount(devices, minlength=num_devices).tolist() == np.bincount(start).tolist()
    squares = [(np.bincount(d, weights=load, minlength=num_devices) ** 2).sum() for d in (start, devices)]
    assert squares[1] < squares[0] if swaps else squares[1] == squares[0]
