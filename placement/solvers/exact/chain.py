"""Stay-put chains of layers, solved as a whole by dynamic programming over placements.

What a chain costs from its first layer to a placement of some layer is the same for all placements that
differ by a permutation of interchangeable devices. So the state is a class of placements; from one member of
each class every placement of the next layer is tried, whatever its labels.

Shape letters: L layers, C classes of placements, Q labelled placements, A automorphisms, P positions,
E experts, G parts, W windows, T tokens, R masks of one size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.cost import CostModel
from placement.plan import Placement
from placement.problem import Objective
from placement.solvers.exact.layout import NO_SIBLING, Layout, Part, exchange_links, make_layout
from placement.solvers.exact.rows import row_of_masks
from placement.solvers.exact.separate import device_limit
from placement.solvers.exact.subsets import Subsets
from placement.solvers.exact.tables import make_tables

__all__ = ["Chain", "best_chain"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

STEP_OPERATIONS = 20_000_000
"""Operations between two questions whether to stop: some milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _States:
    """All placements of a layer.

    Parameters
    ----------
    mask_CP
        One placement of each class: experts at each position.
    arrangement_AP
        Rearrangements of positions that change no cost.
    mask_QP, class_Q
        All placements, arrangement by arrangement, and their classes.
    """

    mask_CP: IntArray
    arrangement_AP: IntArray
    mask_QP: IntArray
    class_Q: IntArray


def _make_states(layout: Layout, subsets: Subsets) -> _States:
    mask_QP = _every_placement(layout, subsets)
    canonical_Q = np.ones(len(mask_QP), dtype=bool)
    for part in (*layout.devices, *layout.groups):
        if part.sibling != NO_SIBLING and part.slots:
            canonical_Q &= _lowest(mask_QP, part.first, part.last) > _lowest(
                mask_QP, part.sibling, part.first - 1
            )
    mask_CP = mask_QP[canonical_Q]
    arrangement_AP = layout.automorphisms_AP()
    return _States(
        mask_CP=mask_CP,
        arrangement_AP=arrangement_AP,
        mask_QP=mask_CP[:, arrangement_AP].transpose(1, 0, 2).reshape(-1, len(layout.devices)),
        class_Q=np.tile(np.arange(len(mask_CP)), len(arrangement_AP)),
    )


def _lowest(mask_QP: IntArray, first: int, last: int) -> IntArray:
    """Lowest expert that some positions hold, as a bit."""
    held_Q = np.bitwise_or.reduce(mask_QP[:, first : last + 1], axis=1)
    return np.asarray(held_Q & -held_Q)


def _every_placement(layout: Layout, subsets: Subsets) -> IntArray:
    mask_QP = np.zeros((1, 0), dtype=np.int64)
    used_Q = np.zeros(1, dtype=np.int64)
    for part in layout.devices:
        masks = subsets.of_size(part.slots)
        row, column = np.nonzero((used_Q[:, None] & masks) == 0)
        mask_QP = np.concatenate([mask_QP[row], masks[column, None]], axis=1)
        used_Q = used_Q[row] | masks[column]
    return mask_QP


def best_chain(model: CostModel, stop: Callable[[], bool]) -> Placement | None:
    """Return the best placement of all layers; None when stopped, or where none keeps the load limit."""
    return Chain(model, stop).solve()


class Chain:
    """One dynamic programme.

    Parameters
    ----------
    model
        Cost model of the problem.
    stop
        Asked every few milliseconds.
    """

    def __init__(self, model: CostModel, stop: Callable[[], bool]) -> None:
        self.model, self.stop = model, stop
        self.layout = make_layout(model)
        self.subsets = Subsets(model.problem.num_experts)
        self.states = _make_states(self.layout, self.subsets)

    def solve(self) -> Placement | None:
        """Go through the layers once and follow the best chain back."""
        value_C, steps = self._terms(0), []
        for layer in range(1, self.model.problem.num_layers):
            reached = self._reach(layer, value_C)
            if reached is None:
                return None
            value_C = reached[0]
            steps.append(reached[1:])
        if not np.isfinite(value_C.min()):
            return None
        return self._placement(int(value_C.argmin()), steps)

    def _terms(self, layer: int) -> FloatArray:
        """Cost of each class by one layer alone, infinite above the load limit, ``[classes]``."""
        problem = self.model.problem
        if problem.objective is Objective.TRAFFIC:
            load_E = problem.profile.load_WLE[:, layer].sum(axis=0)
            device_CE = self._devices(self.states.mask_CP)
            load_CP = np.stack([(device_CE == p) @ load_E for p in range(len(self.layout.devices))], axis=1)
            over_C = load_CP.max(axis=1) > device_limit(self.model, load_E)
            return np.where(over_C, np.inf, 0.0)
        identity_E = np.arange(problem.num_experts)
        tables = make_tables(self.model, layer, self.layout, self.subsets, order_E=identity_E)
        total_C = np.zeros(len(self.states.mask_CP))
        for phase in range(next(iter(tables.kind_RYW.values())).shape[1]):
            slowest_CW = np.zeros((total_C.size, problem.profile.num_windows))
            for part in self._parts():
                rank_C = self._rank(self.states.mask_CP, part)
                np.maximum(slowest_CW, tables.kind_RYW[part.kind][rank_C, phase], out=slowest_CW)
            total_C += slowest_CW.mean(axis=1)
        return total_C

    def _parts(self) -> tuple[Part, ...]:
        return (*self.layout.devices, *self.layout.groups)

    def _rank(self, mask_QP: IntArray, part: Part) -> IntArray:
        held_Q = np.bitwise_or.reduce(mask_QP[:, part.first : part.last + 1], axis=1)
        return self.subsets.rank_M[held_Q].astype(np.int64)

    def _devices(self, mask_QP: IntArray) -> IntArray:
        """Position of each expert, ``[placements, experts]``."""
        device_QE = np.zeros((len(mask_QP), self.model.problem.num_experts), dtype=np.int64)
        for position in range(mask_QP.shape[1]):
            held_QE = (mask_QP[:, position, None] >> np.arange(device_QE.shape[1])) & 1
            device_QE[held_QE == 1] = position
        return device_QE

    def _reach(self, layer: int, value_C: FloatArray) -> tuple[FloatArray, IntArray, IntArray] | None:
        """Extend the best chains by a layer; None when stopped."""
        best_C = np.full(value_C.size, np.inf)
        from_C, by_C = np.zeros((2, value_C.size), dtype=np.int64)
        extend, cost_per_class = self._extension(layer)
        step = max(1, int(STEP_OPERATIONS // cost_per_class))
        for first in range(0, value_C.size, step):
            if self.stop():
                return None
            extend(value_C, first, min(first + step, value_C.size), best_C, from_C, by_C)
        return best_C, from_C, by_C

    def _extension(self, layer: int) -> tuple[Callable[..., None], float]:
        """Return what extends chains by a layer from a range of classes, and what a class takes."""
        from placement.solvers.exact.kernels import reach_by_hops, reach_by_time

        states, problem = self.states, self.model.problem
        term_C = self._terms(layer)
        if problem.objective is Objective.TRAFFIC:
            transitions_EE = problem.profile.transitions(layer - 1)
            allowed_Q = np.where(np.isfinite(term_C)[states.class_Q], states.class_Q, -1)
            device_CE, device_QE = self._devices(states.mask_CP), self._devices(states.mask_QP)

            def by_hops(value_C: FloatArray, first: int, last: int, *out: npt.NDArray[np.generic]) -> None:
                reach_by_hops(value_C, transitions_EE, device_CE, device_QE, allowed_Q, first, last, *out)

            return by_hops, float(device_QE.size)
        time_N, row_GC, rank_GQ = self._exchange_times(layer)
        num_windows = problem.profile.num_windows

        def by_time(value_C: FloatArray, first: int, last: int, *out: npt.NDArray[np.generic]) -> None:
            reach_by_time(
                value_C, time_N, row_GC, rank_GQ, states.class_Q, term_C, num_windows, first, last, *out
            )

        return by_time, float(rank_GQ.size * num_windows)

    def _exchange_times(self, layer: int) -> tuple[FloatArray, IntArray, IntArray]:
        """Times of the exchange into a layer by part and pair of masks, as `reach_by_time` takes them."""
        transitions_WEE = _window_transitions(self.model, layer - 1)
        num_windows = len(transitions_WEE)
        tables: list[FloatArray] = []
        row_of_kind: dict[int, int] = {}
        for part in self._parts():
            if part.kind not in row_of_kind:
                row_of_kind[part.kind] = sum(table.size for table in tables)
                tables.append(self._part_times(part, transitions_WEE))
        parts = self._parts()
        row_GC = np.stack(
            [
                row_of_kind[part.kind]
                + self._rank(self.states.mask_CP, part) * self.subsets.of_size(part.slots).size * num_windows
                for part in parts
            ]
        )
        rank_GQ = np.stack([self._rank(self.states.mask_QP, part) for part in parts])
        return np.concatenate([table.ravel() for table in tables]), row_GC, rank_GQ

    def _part_times(self, part: Part, transitions_WEE: FloatArray) -> FloatArray:
        """Time that a part's links take by its masks before and after, ``[masks, masks, windows]``."""
        links = exchange_links(self.model)
        members_RE = self.subsets.members(part.slots)
        outside_RE = 1.0 - members_RE
        arriving_RRW = np.einsum("re,wef,sf->rsw", outside_RE, transitions_WEE, members_RE, optimize=True)
        time_RRW = np.zeros_like(arriving_RRW)
        for j in part.links:
            group = int(links[j].group_D[part.devices[0]])
            # From wherever outside the group a token comes, it adds the same.
            outside_H = np.append(False, links[j].group_D != group)
            share = float(links[j].enter_HG[outside_H, group].max(initial=0.0))
            np.maximum(time_RRW, links[j].dispatch(arriving_RRW * share), out=time_RRW)
        return np.asarray(time_RRW)

    def _placement(self, last: int, steps: list[tuple[IntArray, IntArray]]) -> Placement:
        """Follow the best chain back to its first layer, then carry the labels of each layer to the next."""
        classes, by = [last], []
        for from_C, by_C in reversed(steps):
            by.append(int(by_C[classes[-1]]))
            classes.append(int(from_C[classes[-1]]))
        states, problem = self.states, self.model.problem
        frame_P = np.arange(len(self.layout.devices))
        masks = [states.mask_CP[classes[-1]]]
        for labelled in reversed(by):
            masks.append(states.mask_QP[labelled][frame_P])
            frame_P = states.arrangement_AP[labelled // len(states.mask_CP)][frame_P]
        order_E = np.arange(problem.num_experts)
        rows = [row_of_masks(problem, self.layout, order_E, mask_P) for mask_P in masks]
        return Placement(
            physical_to_logical_map_LS=np.stack(rows),
            device_of_slot_S=problem.device_of_slot_S,
            num_experts=problem.num_experts,
            num_devices=problem.num_devices,
        )


def _window_transitions(model: CostModel, layer: int) -> FloatArray:
    """Tokens by their first expert in a layer and in the next, ``[windows, experts, experts]``."""
    profile = model.problem.profile
    assert profile.experts_TLK is not None
    assert profile.window_of_token_T is not None
    experts = profile.num_experts
    first_TL = profile.experts_TLK[:, layer : layer + 2, 0].astype(np.int64)
    cell_T = (profile.window_of_token_T * experts + first_TL[:, 0]) * experts + first_TL[:, 1]
    size = (profile.num_windows + 1) * experts**2
    count = np.bincount(cell_T, weights=profile.token_weight_T, minlength=size)
    return np.asarray(count.reshape(-1, experts, experts)[:-1])
