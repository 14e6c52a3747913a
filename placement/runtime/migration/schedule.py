"""From two placements to rounds: copies that may be switched over together, in bounded memory.

After every round the placement is whole: each expert has a slot, none sits twice on a device, no device
needs more rows than it has. Within a layer a rank receives, in each round, as many experts as it gives up
rows: a departing expert that lives nowhere else is tied to its copy's arrival at another rank, everything
else (an empty slot, a replica that leaves) is a free row. That makes sends and receives of every rank equal
in number, and an edge colouring deals them out: cycles and paths over the ranks, as many rounds as the
busiest rank has receives, never more.

Shape letters: L layers, S slots, D devices (ranks), R rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from placement.plan import Placement
from placement.runtime.migration.layer import LayerStep, layer_steps
from placement.runtime.migration.moves import RowMove, RowShift

__all__ = ["COMMITS", "MigrationSchedule", "Round", "schedule_migration"]

IntArray: TypeAlias = npt.NDArray[np.int64]

COMMITS = ("round", "all")
"""Switch over after every round, or once at the end."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Round:
    """What is transferred and then switched over at once.

    Parameters
    ----------
    moves
        Copies between ranks. All of them read their source as it is before the round.
    shifts
        Rows that change places within a rank, after the copies have been written.
    expert_LS
        For each layer that changes, the expert of each slot after the round, ``[slots]``.
    """

    moves: tuple[RowMove, ...]
    shifts: tuple[RowShift, ...]
    expert_LS: Mapping[int, IntArray]

    def receives(self, rank: int) -> int:
        """Experts that a rank receives."""
        return sum(move.target == rank for move in self.moves)

    def staged_rows(self, rank: int) -> int:
        """Experts that a rank has to hold besides its rows, until the round is switched over."""
        turns = any(shift.rank == rank and shift.closed for shift in self.shifts)
        return max(self.receives(rank), int(turns))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MigrationSchedule:
    """Rounds that turn one placement into another.

    Parameters
    ----------
    before, after
        Placements. `after` has the wanted experts on every device, in rows that need no needless copies.
    rounds
        In order.
    staging
        Experts that any rank receives in a round, at most.
    lower_bound
        Rounds that no schedule of whole layers with this staging can do without.
    """

    before: Placement
    after: Placement
    rounds: tuple[Round, ...]
    staging: int
    lower_bound: int

    @property
    def num_moves(self) -> int:
        """Copies between ranks."""
        return sum(len(one.moves) for one in self.rounds)

    def states(self) -> Iterator[Placement]:
        """Yield the placement after each round; every one is checked as it is made."""
        map_LS = self.before.physical_to_logical_map_LS.copy()
        for one in self.rounds:
            for layer, expert_S in one.expert_LS.items():
                map_LS[layer] = expert_S
            yield self.before.with_layers(map_LS)


def schedule_migration(
    before: Placement,
    after: Placement,
    *,
    staging: int = 1,
    commit: str = "round",
    pack_layers: bool = False,
    exact_rows: bool = False,
    distance_DD: IntArray | None = None,
) -> MigrationSchedule:
    """Plan the copies from one placement to another.

    Parameters
    ----------
    staging
        Experts that a rank may receive in a round.
    commit
        ``round``: switch over after every round. ``all``: one round with everything in it, so that the old
        placement stays whole until all has arrived; a rank then needs memory for all that it receives.
    pack_layers
        Put rounds of different layers together where `staging` allows: fewer rounds, the same memory.
    exact_rows
        Bring every expert into the very slot that `after` gives it, which may shift rows within a rank.
        Otherwise what a device holds already stays where it is.
    distance_DD
        Distance of two devices, ``[devices, devices]``; copies come from the nearest device that holds the
        expert at the start of the round. Default: all are alike.

    Raises
    ------
    InputError
        If the placements differ in layers, experts or the devices of their slots, or an option is unknown.
    """
    _check(before, after, staging, commit)
    if distance_DD is None:
        distance_DD = np.zeros((before.num_devices, before.num_devices), dtype=np.int64)
    at_once = staging if commit == "round" else before.num_slots
    layers = [
        layer_steps(before, after, layer, staging=at_once, exact_rows=exact_rows, distance_DD=distance_DD)
        for layer in range(before.num_layers)
    ]
    if commit == "all":
        rounds = _together(layers)
    else:
        rounds = _in_rounds(layers, before.num_devices, staging if pack_layers else None)
    receives = [one.receives(rank) for one in rounds for rank in range(before.num_devices)]
    return MigrationSchedule(
        before=before,
        after=_final(before, after, rounds),
        rounds=rounds,
        staging=max(receives, default=0),
        lower_bound=_lower_bound(before, after, staging=at_once, packed=pack_layers, commit=commit),
    )


def _check(before: Placement, after: Placement, staging: int, commit: str) -> None:
    for what in ("num_layers", "num_experts", "num_devices"):
        if getattr(before, what) != getattr(after, what):
            raise InputError(
                f"the new placement's {what} is {getattr(after, what)}, the running one's "
                f"{getattr(before, what)}; solve for the model and cluster that run"
            )
    if not np.array_equal(before.device_of_slot_S, after.device_of_slot_S):
        slots = [np.bincount(one.device_of_slot_S, minlength=one.num_devices) for one in (after, before)]
        raise InputError(
            f"the new placement's slots lie on other devices ({slots[0].tolist()} by device, running "
            f"{slots[1].tolist()}); solve it with the running placement's slots"
        )
    if staging < 1:
        raise InputError(f"staging is {staging} experts; a copy needs room for 1")
    if commit not in COMMITS:
        raise InputError(f"commit {commit!r} is none of {', '.join(COMMITS)}")


def _in_rounds(
    layers: Sequence[Sequence[LayerStep]], num_devices: int, staging: int | None
) -> tuple[Round, ...]:
    """Rounds of one step each, or with as many as `staging` allows; what copies nothing joins the last."""
    rounds: list[list[LayerStep]] = []
    full_RD: list[IntArray] = []
    for steps in layers:
        earliest = 0
        for step in (step for step in steps if step.moves):
            more_D = np.bincount([move.target for move in step.moves], minlength=num_devices)
            index = _room(full_RD, more_D, earliest, staging)
            if index == len(rounds):
                rounds.append([])
                full_RD.append(np.zeros(num_devices, dtype=np.int64))
            rounds[index].append(step)
            full_RD[index] += more_D
            earliest = index + 1
    silent = [step for steps in layers for step in steps if not step.moves]
    if silent and not rounds:
        rounds.append([])
    if silent:
        rounds[-1] += silent
    return tuple(_round(steps) for steps in rounds)


def _room(full_RD: Sequence[IntArray], more_D: IntArray, earliest: int, staging: int | None) -> int:
    """First round from `earliest` on that has room for more receives; a new one without `staging`."""
    if staging is not None:
        for index in range(earliest, len(full_RD)):
            if (full_RD[index] + more_D).max() <= staging:
                return index
    return len(full_RD)


def _together(layers: Sequence[Sequence[LayerStep]]) -> tuple[Round, ...]:
    steps = [step for steps in layers for step in steps]
    return (_round(steps),) if steps else ()


def _round(steps: Sequence[LayerStep]) -> Round:
    return Round(
        moves=tuple(move for step in steps for move in step.moves),
        shifts=tuple(shift for step in steps for shift in step.shifts),
        expert_LS={step.layer: step.expert_S for step in steps},
    )


def _lower_bound(before: Placement, after: Placement, *, staging: int, packed: bool, commit: str) -> int:
    """Rounds that the busiest rank's receives take, of each layer or of all."""
    received_LD = ((after.count_LED > 0) & (before.count_LED == 0)).sum(axis=1)
    if commit == "all":
        return int(received_LD.any())
    if not packed:
        return int((-(-received_LD.max(axis=1) // staging)).sum())
    most = max(received_LD.max(), received_LD.sum(axis=0).max())
    return int(-(-most // staging))


def _final(before: Placement, after: Placement, rounds: Sequence[Round]) -> Placement:
    map_LS = before.physical_to_logical_map_LS.copy()
    for one in rounds:
        for layer, expert_S in one.expert_LS.items():
            map_LS[layer] = expert_S
    return replace(after, physical_to_logical_map_LS=map_LS)
