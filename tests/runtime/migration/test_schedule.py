"""Schedules of random changes of placement: every state between is whole, memory is kept, rounds are few."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from placement.plan import EMPTY, Placement, diff
from placement.runtime.migration.colouring import colour_edges
from placement.runtime.migration.nearness import distances
from placement.runtime.migration.schedule import MigrationSchedule, schedule_migration
from placement.topology import parse_shorthand


def random_placement(
    rng: np.random.Generator, rows_D: list[int], *, num_experts: int, num_layers: int
) -> Placement:
    """Return a placement with replicas and empty slots wherever they fall."""
    device_of_slot_S = rng.permutation(np.repeat(np.arange(len(rows_D)), rows_D))
    return Placement(
        physical_to_logical_map_LS=np.stack(
            [random_layer(rng, device_of_slot_S, num_experts) for _ in range(num_layers)]
        ),
        device_of_slot_S=device_of_slot_S,
        num_experts=num_experts,
        num_devices=len(rows_D),
    )


def random_layer(rng: np.random.Generator, device_of_slot_S: np.ndarray, num_experts: int) -> np.ndarray:
    slots = rng.permutation(device_of_slot_S.size)
    expert_S = np.full(device_of_slot_S.size, EMPTY)
    expert_S[slots[:num_experts]] = rng.permutation(num_experts)
    for slot in slots[num_experts:]:
        on_device = set(expert_S[device_of_slot_S == device_of_slot_S[slot]])
        others = sorted(set(range(num_experts)) - on_device)
        if others and rng.random() < 0.7:
            expert_S[slot] = rng.choice(others)
    return expert_S


@st.composite
def changes(draw: st.DrawFn) -> tuple[Placement, Placement]:
    rows_D = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda rows: sum(rows) > 0))
    num_experts = draw(st.integers(1, sum(rows_D)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    before = random_placement(rng, rows_D, num_experts=num_experts, num_layers=draw(st.integers(1, 3)))
    maps = [random_layer(rng, before.device_of_slot_S, num_experts) for _ in range(before.num_layers)]
    return before, before.with_layers(np.stack(maps))


def simulate(schedule: MigrationSchedule) -> None:
    """Carry the rounds out on labels instead of weights, and check everything that was promised."""
    before = schedule.before
    slots_D = [np.flatnonzero(before.device_of_slot_S == rank) for rank in range(before.num_devices)]
    held = {
        (layer, rank): before.physical_to_logical_map_LS[layer][slots].tolist()
        for layer in range(before.num_layers)
        for rank, slots in enumerate(slots_D)
    }
    for one, state in zip(schedule.rounds, schedule.states(), strict=True):
        arrived = [(move, held[move.layer, move.source][move.source_row]) for move in one.moves]
        for move, expert in arrived:
            assert expert == move.expert
            assert move.source != move.target
            held[move.layer, move.target][move.target_row] = expert
        for shift in one.shifts:
            rows = held[shift.layer, shift.rank]
            aside = rows[shift.rows[-1]]
            for source, target in shift.copies():
                rows[target] = rows[source]
            rows[shift.rows[0]] = aside if shift.closed else EMPTY
        for layer in one.expert_LS:
            for rank, slots in enumerate(slots_D):
                now = state.physical_to_logical_map_LS[layer][slots]
                # A row may be given up without being overwritten, but nothing appears by itself.
                given_up = now == EMPTY
                assert np.array_equal(now[~given_up], np.array(held[layer, rank])[~given_up])
                held[layer, rank] = now.tolist()
    assert np.array_equal(state_at_end(schedule).count_LED, schedule.after.count_LED)


def state_at_end(schedule: MigrationSchedule) -> Placement:
    return [schedule.before, *schedule.states()][-1]


@settings(max_examples=300, deadline=None)
@given(changes(), st.integers(1, 3), st.booleans(), st.booleans())
def test_rounds_keep_the_placement_whole(
    change: tuple[Placement, Placement], staging: int, pack: bool, exact: bool
) -> None:
    """Valid states, staging kept, the wanted sets at the end, and exactly as many rounds as needed."""
    before, after = change
    schedule = schedule_migration(before, after, staging=staging, pack_layers=pack, exact_rows=exact)
    simulate(schedule)
    assert np.array_equal(schedule.after.count_LED, after.count_LED)
    assert schedule.num_moves == len(diff(before, after))
    receives = [one.receives(rank) for one in schedule.rounds for rank in range(before.num_devices)]
    assert max(receives, default=0) == schedule.staging <= staging
    rounds = sum(bool(one.moves) for one in schedule.rounds)
    if pack:
        assert schedule.lower_bound <= rounds
    else:
        assert schedule.lower_bound == rounds
    if exact:
        assert np.array_equal(schedule.after.physical_to_logical_map_LS, after.physical_to_logical_map_LS)


@settings(max_examples=100, deadline=None)
@given(changes(), st.booleans())
def test_all_at_once_is_one_round_from_the_old_placement(
    change: tuple[Placement, Placement], exact: bool
) -> None:
    """One round whose sources are all old holders."""
    before, after = change
    schedule = schedule_migration(before, after, commit="all", exact_rows=exact)
    simulate(schedule)
    assert len(schedule.rounds) <= 1
    assert np.array_equal(schedule.after.count_LED, after.count_LED)
    for one in schedule.rounds:
        assert all(before.count_LED[move.layer, move.expert, move.source] for move in one.moves)


@settings(max_examples=100, deadline=None)
@given(changes())
def test_a_reordering_moves_nothing(change: tuple[Placement, Placement]) -> None:
    """Other slots of the same devices cost nothing, unless they are asked for; then no rank sends."""
    before, _ = change
    rng = np.random.default_rng(0)
    map_LS = before.physical_to_logical_map_LS.copy()
    for rank in range(before.num_devices):
        slots = np.flatnonzero(before.device_of_slot_S == rank)
        map_LS[:, slots] = map_LS[:, rng.permutation(slots)]
    assert schedule_migration(before, before.with_layers(map_LS)).rounds == ()
    exact = schedule_migration(before, before.with_layers(map_LS), exact_rows=True)
    simulate(exact)
    assert exact.num_moves == 0
    assert np.array_equal(exact.after.physical_to_logical_map_LS, map_LS)


def test_a_swap_takes_one_round() -> None:
    """Two devices that exchange an expert each receive one and send one, in place."""
    before = Placement(
        physical_to_logical_map_LS=np.array([[0, 1, 2, 3]]),
        device_of_slot_S=np.array([0, 0, 1, 1]),
        num_experts=4,
        num_devices=2,
    )
    schedule = schedule_migration(before, before.with_layers(np.array([[0, 2, 3, 1]])))
    (one,) = schedule.rounds
    assert {(m.expert, m.source, m.source_row, m.target, m.target_row) for m in one.moves} == {
        (1, 0, 1, 1, 0),
        (2, 1, 0, 0, 1),
    }
    assert one.expert_LS[0].tolist() == [0, 2, 1, 3]
    assert [one.staged_rows(rank) for rank in (0, 1)] == [1, 1]


def test_copies_come_from_the_nearest_holder() -> None:
    """Expert 0 lives on devices 0 and 2 of two nodes; device 3 takes it from device 2."""
    before = Placement(
        physical_to_logical_map_LS=np.array([[0, -1, 1, -1, 0, 2, 3, -1]]),
        device_of_slot_S=np.repeat(np.arange(4), 2),
        num_experts=4,
        num_devices=4,
    )
    after = before.with_layers(np.array([[0, -1, 1, 0, 0, 2, 3, 0]]))
    for distance_DD in (distances(4, devices_per_node=2), distances(4, topology=parse_shorthand("h100:2x2"))):
        (one,) = schedule_migration(before, after, distance_DD=distance_DD).rounds
        assert {(move.source, move.target) for move in one.moves} == {(0, 1), (2, 3)}


def test_what_does_not_fit_is_named() -> None:
    """Other slots, other experts, no staging, an unknown way to commit: one clear line each."""
    before = Placement(
        physical_to_logical_map_LS=np.array([[0, 1, -1]]),
        device_of_slot_S=np.array([0, 0, 1]),
        num_experts=2,
        num_devices=2,
    )
    other_slots = Placement(
        physical_to_logical_map_LS=np.array([[0, 1, -1]]),
        device_of_slot_S=np.array([0, 1, 1]),
        num_experts=2,
        num_devices=2,
    )
    other_experts = Placement(
        physical_to_logical_map_LS=np.array([[0, 1, 2]]),
        device_of_slot_S=np.array([0, 0, 1]),
        num_experts=3,
        num_devices=2,
    )
    with pytest.raises(
        InputError, match=r"slots lie on other devices \(\[1, 2\] by device, running \[2, 1\]\)"
    ):
        schedule_migration(before, other_slots)
    with pytest.raises(InputError, match="num_experts is 3, the running one's 2"):
        schedule_migration(before, other_experts)
    with pytest.raises(InputError, match="staging is 0"):
        schedule_migration(before, before, staging=0)
    with pytest.raises(InputError, match="commit 'later' is none of round, all"):
        schedule_migration(before, before, commit="later")
    with pytest.raises(InputError, match="3 devices do not fill nodes of 2"):
        distances(3, devices_per_node=2)
    with pytest.raises(InputError, match="has 3 devices, the topology 4"):
        distances(3, topology=parse_shorthand("h100:2x2"))


def test_too_few_colours_are_refused() -> None:
    """Three edges at a node need three colours."""
    assert sorted(colour_edges([(0, 0), (0, 1), (0, None)], num_colours=3)) == [0, 1, 2]
    with pytest.raises(InputError, match="2 colours are too few"):
        colour_edges([(0, 0), (0, 1), (0, None)], num_colours=2)
