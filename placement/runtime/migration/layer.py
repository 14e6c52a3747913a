"""Steps that turn one layer's placement into another: the edge colouring and the choice of rows and sources.

Shape letters: S slots, D devices (ranks), C rows of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from placement.plan import EMPTY, Placement
from placement.runtime.migration.colouring import Edge, colour_edges
from placement.runtime.migration.moves import RowMove, RowShift

__all__ = ["LayerStep", "layer_steps"]

IntArray: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerStep:
    """What happens at once in one layer.

    Parameters
    ----------
    layer
        MoE layer.
    moves, shifts
        Copies between ranks, then changes of rows within them.
    expert_S
        Expert of each slot afterwards, ``[slots]``.
    """

    layer: int
    moves: tuple[RowMove, ...]
    shifts: tuple[RowShift, ...]
    expert_S: IntArray


def layer_steps(
    before: Placement,
    after: Placement,
    layer: int,
    *,
    staging: int,
    exact_rows: bool,
    distance_DD: IntArray,
) -> list[LayerStep]:
    """Return the steps of one layer, none if it stays as it is; only a last one may be without moves."""
    slots_D = [np.flatnonzero(before.device_of_slot_S == rank) for rank in range(before.num_devices)]
    old_S, new_S = (one.physical_to_logical_map_LS[layer] for one in (before, after))
    change = _Change(
        layer=layer,
        rows=[old_S[slots].tolist() for slots in slots_D],
        wanted=[set(new_S[slots].tolist()) - {EMPTY} for slots in slots_D],
        distance_DD=distance_DD,
    )
    colours = change.colours()
    steps = [
        LayerStep(
            layer=layer,
            moves=change.apply(colours[first : first + staging]),
            shifts=(),
            expert_S=change.map(slots_D),
        )
        for first in range(0, len(colours), staging)
    ]
    change.leave()
    shifts = change.arrange([new_S[slots].tolist() for slots in slots_D]) if exact_rows else ()
    last_S = change.map(slots_D)
    if steps:
        steps[-1] = replace(steps[-1], shifts=shifts, expert_S=last_S)
    elif not np.array_equal(old_S, last_S):
        steps = [LayerStep(layer=layer, moves=(), shifts=shifts, expert_S=last_S)]
    return steps


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arrival:
    """An expert that a rank must receive, and the rank (if any) that may give it up when it does."""

    expert: int
    target: int
    releases: int | None


@dataclass(slots=True, kw_only=True)
class _Change:
    """One layer on its way: the expert of each row of each rank, changed step by step.

    Parameters
    ----------
    rows
        Expert of each row of each rank, `EMPTY` where there is none.
    wanted
        Experts that each rank holds in the end.
    """

    layer: int
    rows: list[list[int]]
    wanted: Sequence[set[int]]
    distance_DD: IntArray
    _holders: dict[int, set[int]] = field(init=False)
    _tied_rank: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._holders = {}
        for rank, experts in enumerate(self.rows):
            for expert in experts:
                if expert != EMPTY:
                    self._holders.setdefault(expert, set()).add(rank)

    def colours(self) -> list[list[_Arrival]]:
        """Deal the arrivals out: one at most for each rank in each list, balanced by what the rank gives up.

        Left ends of edges are rows given up, right ends are arrivals. An arrival without a rank that
        gives the expert up, and a free row that is used up, have one end only. Loops fill all ranks up
        to the same degree, so that each has an arrival in a colour if and only if it gives up a row.
        """
        arrivals = self._arrivals()
        num_ranks = len(self.rows)
        arrive_D = np.bincount([one.target for one in arrivals], minlength=num_ranks)
        release_D = np.bincount(
            [one.releases for one in arrivals if one.releases is not None], minlength=num_ranks
        )
        num_colours = int(arrive_D.max(initial=0))
        edges: list[Edge] = [(one.releases, one.target) for one in arrivals]
        for rank in range(num_ranks):
            edges += [(rank, None)] * int(arrive_D[rank] - release_D[rank])
            edges += [(rank, rank)] * int(num_colours - arrive_D[rank])
        colours: list[list[_Arrival]] = [[] for _ in range(num_colours)]
        found = colour_edges(edges, num_colours=num_colours)
        for one, colour in zip(arrivals, found[: len(arrivals)], strict=True):
            colours[colour].append(one)
        return colours

    def _arrivals(self) -> list[_Arrival]:
        """Experts to receive; a rank gives up no more by them than it receives itself."""
        missing = [sorted(wanted - set(rows)) for wanted, rows in zip(self.wanted, self.rows, strict=True)]
        room = [len(experts) for experts in missing]
        tied = self._tied(missing)
        arrivals = []
        for target, experts in enumerate(missing):
            for expert in experts:
                releases = tied.get((expert, target))
                if releases is not None and room[releases] > 0:
                    room[releases] -= 1
                else:
                    releases = None
                arrivals.append(_Arrival(expert=expert, target=target, releases=releases))
        return arrivals

    def _tied(self, missing: Sequence[Sequence[int]]) -> dict[tuple[int, int], int]:
        """For experts that no rank keeps: the nearest pair of an old and a new holder."""
        targets: dict[int, list[int]] = {}
        for target, experts in enumerate(missing):
            for expert in experts:
                targets.setdefault(expert, []).append(target)
        tied = {}
        for expert, ranks in targets.items():
            holders = self._holders[expert]
            if not any(expert in self.wanted[rank] for rank in holders):
                pairs = ((self.distance_DD[old, new], old, new) for old in holders for new in ranks)
                _, old, new = min(pairs)
                tied[expert, new] = self._tied_rank[expert] = old
        return tied

    def apply(self, colours: Sequence[Sequence[_Arrival]]) -> tuple[RowMove, ...]:
        """Carry out some colours together; copies come from where the experts are before all of them."""
        sends: dict[int, int] = {}
        sources = {
            (one.expert, one.target): self._source(one, sends) for arrivals in colours for one in arrivals
        }
        moves = []
        for arrivals in colours:
            leaving = {one.releases: one.expert for one in arrivals}
            for one in arrivals:
                row = self._free_row(one.target, leaving.get(one.target))
                self._put(one.target, row, one.expert)
                source, source_row = sources[one.expert, one.target]
                moves.append(
                    RowMove(
                        layer=self.layer,
                        expert=one.expert,
                        source=source,
                        source_row=source_row,
                        target=one.target,
                        target_row=row,
                    )
                )
        return tuple(moves)

    def _source(self, one: _Arrival, sends: dict[int, int]) -> tuple[int, int]:
        """Nearest rank that holds the expert, among equals the one that sends least, and its row."""
        source = min(
            self._holders[one.expert],
            key=lambda rank: (self.distance_DD[rank, one.target], sends.get(rank, 0), rank),
        )
        sends[source] = sends.get(source, 0) + 1
        return source, self.rows[source].index(one.expert)

    def _free_row(self, rank: int, leaving: int | None) -> int:
        """Row of the expert that leaves now; else an empty one; else that of a replica that leaves anyway."""
        rows = self.rows[rank]
        if leaving is not None:
            return rows.index(leaving)
        if EMPTY in rows:
            return rows.index(EMPTY)
        return next(row for row, expert in enumerate(rows) if self._may_leave(rank, expert))

    def _may_leave(self, rank: int, expert: int) -> bool:
        """Whether a rank gives up a replica that others outlive; tied rows are kept for their arrivals."""
        return expert not in self.wanted[rank] and self._tied_rank.get(expert) != rank

    def leave(self) -> None:
        """Empty every row whose expert does not belong there in the end."""
        for rank, experts in enumerate(self.rows):
            for row, expert in enumerate(experts):
                if expert not in self.wanted[rank]:
                    self._clear(rank, row)

    def arrange(self, new_rows: Sequence[Sequence[int]]) -> tuple[RowShift, ...]:
        """Bring every expert into the row that it has in `new_rows`; the sets are equal already."""
        shifts: list[RowShift] = []
        for rank, new in enumerate(new_rows):
            shifts += _shifts(self.layer, rank, self.rows[rank], new)
            self.rows[rank] = list(new)
        return tuple(shifts)

    def map(self, slots_D: Sequence[IntArray]) -> IntArray:
        """Expert of each slot as it is now, ``[slots]``."""
        expert_S = np.full(sum(slots.size for slots in slots_D), EMPTY, dtype=np.int64)
        for slots, experts in zip(slots_D, self.rows, strict=True):
            expert_S[slots] = experts
        expert_S.setflags(write=False)
        return expert_S

    def _put(self, rank: int, row: int, expert: int) -> None:
        self._clear(rank, row)
        self.rows[rank][row] = expert
        self._holders.setdefault(expert, set()).add(rank)

    def _clear(self, rank: int, row: int) -> None:
        gone = self.rows[rank][row]
        if gone != EMPTY:
            self._holders[gone].discard(rank)
            self.rows[rank][row] = EMPTY


def _shifts(layer: int, rank: int, old: Sequence[int], new: Sequence[int]) -> list[RowShift]:
    """Paths and cycles of rows that turn one order into another."""
    goes_to = {
        row: new.index(expert) for row, expert in enumerate(old) if expert != EMPTY and new[row] != expert
    }
    shifts = []
    starts = sorted(set(goes_to) - set(goes_to.values()))
    for start in [*starts, *sorted(goes_to)]:
        if start not in goes_to:
            continue
        rows = [start]
        while (row := goes_to.pop(rows[-1], start)) != start:
            rows.append(row)
        shifts.append((rows, start))
    return [
        RowShift(layer=layer, rank=rank, rows=tuple(rows), closed=start not in starts)
        for rows, start in shifts
    ]
