"""Tables of a layer's slots agree with the placement they come from."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_checks import random_placement

from placement.plan import EMPTY
from placement.runtime.parallel.replicas import shared_rows
from placement.runtime.parallel.slots import LayerSlots, rows_of_rank


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), devices=st.integers(1, 5))
def test_rows_are_the_device_s_slots_in_order(seed: int, devices: int) -> None:
    """Each slot's rank and row lead back to it, and each expert's replicas are its slots in order."""
    placement = random_placement(seed, num_layers=2, num_devices=devices)
    for layer, expert_S in enumerate(placement.physical_to_logical_map_LS):
        slots = LayerSlots.of_layer(placement, layer)
        for rank in range(devices):
            slot_C = rows_of_rank(placement, rank)
            assert slots.rank_of_slot_S[slot_C].tolist() == [rank] * slot_C.size
            assert slots.row_of_slot_S[slot_C].tolist() == list(range(slot_C.size))
            assert slots.experts_of_rank(rank).tolist() == expert_S[slot_C].tolist()
            assert slots.num_rows(rank) == slot_C.size
        for expert in range(placement.num_experts):
            held = np.flatnonzero(expert_S == expert).tolist()
            padded = held + [held[0]] * (slots.slot_EX.shape[1] - len(held))
            assert slots.slot_EX[expert].tolist() == padded
            assert slots.replicas_E[expert] == len(held)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), devices=st.integers(1, 5))
def test_what_ranks_share_fits_together(seed: int, devices: int) -> None:
    """What one rank gives another owns, row for row, and every replica is given or owned once."""
    placement = random_placement(seed, num_layers=1, num_devices=devices)
    slots = LayerSlots.of_layer(placement, 0)
    shared = [shared_rows(slots, rank) for rank in range(devices)]
    given = 0
    for rank in range(devices):
        for owner, rows in shared[rank].given.items():
            owned = shared[owner].owned[rank]
            mine, theirs = slots.experts_of_rank(rank), slots.experts_of_rank(owner)
            assert mine[list(rows)].tolist() == theirs[list(owned)].tolist()
            assert owner < rank
            given += len(rows)
    filled = int(np.count_nonzero(slots.expert_S != EMPTY))
    assert given == filled - placement.num_experts
    assert given == sum(len(rows) for one in shared for rows in one.owned.values())


def test_other_experts_in_the_same_slots() -> None:
    """The tables follow a new row of the map."""
    placement = random_placement(3, num_layers=2, num_devices=3)
    first = LayerSlots.of_layer(placement, 0)
    again = first.with_experts(placement.physical_to_logical_map_LS[1])
    second = LayerSlots.of_layer(placement, 1)
    for name in ("expert_S", "rank_of_slot_S", "row_of_slot_S", "slot_EX", "replicas_E"):
        np.testing.assert_array_equal(getattr(again, name), getattr(second, name))
