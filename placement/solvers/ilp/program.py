"""Our own objective of one layer as an integer program: which free item goes to which free device.

With x[i, d] = 1 for item i on device d, u[w] the fullest device's expert cost in window w, v[p, g] = 1 for
tokens of pattern p that touch group g, and t[y, w] the time of phase y,

    min  sum_w weight_w (u[w] + sum_y t[y, w])
    u[w] >= sum_i cost[d, i, w] x[i, d]                       every free device
    v[p, g] >= sum_{d in g} x[i, d]                           every item of the pattern
    t[y, w] >= slope * volume[g, w] + intercept               every free group, every piece of the curve

where a group's volume is linear in x (pairs) or in v (distinct tokens). Devices that are not free hold u and
t up from below by constants. A curve that is not convex is replaced by its largest convex minorant, so the
program's bound is a bound on the objective whatever the curves.

Two inequalities are added that the relaxation lacks: u[w] is at least the mean over the free devices, and at
least the hottest item with the coldest ones that must share its device. Interchangeable devices are ordered
by their first item.

Shape letters: D devices, F free devices, G free groups, I free items, J links, K device kinds, P patterns,
W windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from placement.bounds.curves import convex_minorant
from placement.calibration import PiecewiseLinear
from placement.cost import CostModel
from placement.cost.links import Link, counting_link
from placement.cost.model import home_loads
from placement.errors import InputError
from placement.problem import Objective, PlacementProblem, Semantics
from placement.solvers.ilp.layer import LayerItems
from placement.solvers.ilp.patterns import Patterns, token_patterns
from placement.solvers.milp.formulation import MilpBuilder, MilpProgram

__all__ = ["LayerProgram", "layer_program"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

NO_REPLICAS = "an integer program of distinct tokens takes no replicas; use search"

MOST_PATTERN_VARIABLES = 40_000
"""Distinct (pattern, group) variables of one program; beyond it a relaxation alone takes minutes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerProgram:
    """An integer program and what its variables mean.

    Parameters
    ----------
    program
        The program, started from the layer as it is.
    assign_IF
        Number of the variable that puts a free item on a free device, ``[free items, free devices]``.
    items
        The layer as it is.
    free_items, free_devices
        What may move, and where to.
    """

    program: MilpProgram
    assign_IF: IntArray
    items: LayerItems
    free_items: IntArray
    free_devices: IntArray

    def decode(self, value_V: FloatArray) -> LayerItems:
        """Return the layer that a solution stands for."""
        chosen = value_V[self.assign_IF].argmax(axis=1)
        return self.items.moved(self.free_items, self.free_devices[chosen])


def layer_program(
    model: CostModel,
    items: LayerItems,
    free_devices: IntArray,
    *,
    free_items: IntArray | None = None,
    most_pattern_variables: int = MOST_PATTERN_VARIABLES,
) -> LayerProgram:
    """Write the objective of a one-layer problem as a program over items of some devices.

    Parameters
    ----------
    model
        Cost model of a one-layer problem (`PlacementProblem.one_layer`), of any semantics but stay-put; risk
        is the mean.
    items
        The layer as it is.
    free_devices
        Devices whose items may change places, ascending.
    free_items
        Items on these devices that may move; all of them by default.
    most_pattern_variables
        Largest number of (pattern, group) variables.

    Raises
    ------
    InputError
        If distinct tokens count and experts are replicated, or there are too many patterns of tokens.
    """
    on_free = np.nonzero(np.isin(items.device_I, free_devices))[0]
    chosen = on_free if free_items is None else free_items
    return _Assembly(model, items, free_devices, chosen, most_pattern_variables).assemble()


class _Assembly:
    """Collects the pieces of one program."""

    def __init__(
        self,
        model: CostModel,
        items: LayerItems,
        free_devices: IntArray,
        free_items: IntArray,
        most_pattern_variables: int,
    ) -> None:
        self.model = model
        self.problem: PlacementProblem = model.problem
        self.items = items
        self.free_devices = free_devices
        self.free_items = free_items
        self.most_pattern_variables = most_pattern_variables
        self.builder = MilpBuilder()
        self.replicas_I = items.replicas_I(self.problem.num_experts)
        stays_I = np.ones(items.device_I.size, dtype=np.bool_)
        stays_I[free_items] = False
        self.staying = np.nonzero(stays_I)[0]

    def assemble(self) -> LayerProgram:
        self._order_items()
        self._add_assignment()
        if self.problem.objective is Objective.TRAFFIC:
            self._limit_loads()
        else:
            self._add_loads()
        if self.problem.objective is not Objective.BALANCE:
            self._add_exchange()
        program = self.builder.build()
        return LayerProgram(
            program=replace(program, start_V=self._start(program.num_variables)),
            assign_IF=self.assign_IF,
            items=self.items,
            free_items=self.free_items,
            free_devices=self.free_devices,
        )

    def _order_items(self) -> None:
        """Order free items by falling load: the hottest ones break the symmetry of devices first."""
        load_E = self.problem.profile.load_WLE[:, 0].sum(axis=0)
        load_I = (load_E[self.items.expert_I] / self.replicas_I)[self.free_items]
        self.free_items = self.free_items[np.argsort(-load_I, kind="stable")]

    @cached_property
    def item_cost_KIW(self) -> FloatArray:
        """Cost of every item on a device kind in each window, ``[kinds, all items, windows]``."""
        profile, problem = self.problem.profile, self.problem
        load_WE = profile.load_WLE[:, 0]
        load_IW = load_WE.T[self.items.expert_I] / self.replicas_I[:, None]
        if problem.objective is Objective.BALANCE:
            mean_W = load_WE.sum(axis=1) / problem.num_devices
            ratio_IW = np.divide(load_IW, mean_W, out=np.zeros_like(load_IW), where=mean_W > 0)
            return np.repeat(ratio_IW[None], len(problem.topology.kinds), axis=0)
        return np.stack([curve(load_IW) for curve in self.model.expert_curves])

    def _add_assignment(self) -> None:
        """Every item on one device, every device within its slots, no expert twice on a device."""
        shape = (self.free_items.size, self.free_devices.size)
        upper_IF = self._allowed_IF()
        self.assign_IF = self.builder.add_variables(shape, upper=upper_IF, integer=True)
        self.builder.add_rows((self.assign_IF, 1.0), lower=1.0, upper=1.0)
        self.builder.add_rows((self.assign_IF.T, 1.0), upper=self._room_F.astype(np.float64))
        expert_I = self.items.expert_I[self.free_items]
        for expert in np.unique(expert_I):
            copies = np.nonzero(expert_I == expert)[0]
            if copies.size > 1:
                self.builder.add_rows((self.assign_IF[copies].T, 1.0), upper=1.0)

    def _allowed_IF(self) -> FloatArray:
        """1 where an item may go: the first items of interchangeable devices name them in order."""
        allowed = np.ones((self.free_items.size, self.free_devices.size))
        for members in self._interchangeable():
            for position, column in enumerate(members):
                allowed[:position, column] = 0.0
        expert_I, device_I = self.items.expert_I, self.items.device_I
        for column, device in enumerate(self.free_devices):
            held = expert_I[self.staying[device_I[self.staying] == device]]
            allowed[np.isin(expert_I[self.free_items], held), column] = 0.0
        return allowed

    @cached_property
    def _room_F(self) -> IntArray:
        """Slots of each free device that items which stay leave, ``[free devices]``."""
        held_D = np.bincount(self.items.device_I[self.staying], minlength=self.problem.num_devices)
        return np.asarray((self.problem.slots_D - held_D)[self.free_devices])

    @cached_property
    def _signature_D(self) -> IntArray:
        """Number of each device's equivalence class: alike in speed, slots, links and homes."""
        problem = self.problem
        rows: list[npt.NDArray[np.generic]] = [problem.topology.kind_of_device_D, problem.slots_D]
        for link in self._links():
            size_G = np.bincount(link.group_D)
            # Devices that share a group are alike in it; lone ones if tokens enter them alike.
            alone_D = size_G[link.group_D] == 1
            rows.append(np.where(alone_D, -1, link.group_D))
            enter_HD = link.enter_HG[:, link.group_D]
            rows.extend(enter_HD if problem.profile.home_T is not None else enter_HD[:1])
        return np.unique(np.stack(rows), axis=1, return_inverse=True)[1].ravel()

    def _interchangeable(self) -> Iterator[IntArray]:
        """Columns of free devices that may be exchanged without any change of the objective."""
        if np.isin(self.items.device_I[self.staying], self.free_devices).any():
            return  # what stays on a device tells it from the others
        signature_F = self._signature_D[self.free_devices]
        for value in np.unique(signature_F):
            yield np.nonzero(signature_F == value)[0]

    def _links(self) -> tuple[Link, ...]:
        problem = self.problem
        if problem.objective is Objective.BALANCE or problem.semantics is Semantics.ALLGATHER:
            return ()
        if problem.objective is Objective.TRAFFIC:
            return (counting_link(problem.num_devices),)
        return self.model.links

    def _limit_loads(self) -> None:
        problem = self.problem
        total_E = problem.profile.load_WLE[:, 0].sum(axis=0)
        load_I = (total_E[self.items.expert_I] / self.replicas_I)[self.free_items]
        limit = problem.max_imbalance * total_E.sum() / problem.num_devices * (1 + 1e-12)
        staying_I = (total_E[self.items.expert_I] / self.replicas_I)[self.staying]
        held_D = np.bincount(
            self.items.device_I[self.staying], weights=staying_I, minlength=problem.num_devices
        )
        self.builder.add_rows((self.assign_IF.T, load_I), upper=limit - held_D[self.free_devices])

    def _add_loads(self) -> None:
        """Charge the fullest device of every window."""
        cost_KIW = self.item_cost_KIW
        num_windows = cost_KIW.shape[2]
        self.load_W = self.builder.add_variables(
            num_windows, lower=self._least_load_W(), objective=1.0 / num_windows
        )
        kind_F = self.problem.topology.kind_of_device_D[self.free_devices]
        for column, kind in enumerate(kind_F):
            cost_WI = cost_KIW[kind][self.free_items].T
            columns_WI = np.broadcast_to(self.assign_IF[:, column], cost_WI.shape)
            self.builder.add_rows(
                (columns_WI, cost_WI),
                (self.load_W[:, None], -1.0),
                upper=-self._staying_DW[self.free_devices[column]],
            )

    @cached_property
    def _staying_DW(self) -> FloatArray:
        """Cost of what stays on each device, ``[devices, windows]``."""
        kind_I = self.problem.topology.kind_of_device_D[self.items.device_I]
        cost_DW = np.zeros((self.problem.num_devices, self.item_cost_KIW.shape[2]))
        cost_IW = self.item_cost_KIW[kind_I[self.staying], self.staying]
        np.add.at(cost_DW, self.items.device_I[self.staying], cost_IW)
        return cost_DW

    def _least_load_W(self) -> FloatArray:
        """What the fullest device carries at least in each window, whatever the free items do."""
        kind_F = self.problem.topology.kind_of_device_D[self.free_devices]
        least_IW = self.item_cost_KIW[np.unique(kind_F)].min(axis=0)[self.free_items]
        staying_FW = self._staying_DW[self.free_devices]
        mean_W = (least_IW.sum(axis=0) + staying_FW.sum(axis=0)) / self.free_devices.size
        hottest_W = least_IW.max(axis=0)
        if self.free_items.size == self._room_F.sum():
            # No free slot is left over: the hottest item shares its device with at least the coldest.
            beside = int(self._room_F.min()) - 1
            hottest_W = hottest_W + np.sort(least_IW, axis=0)[: max(beside, 0)].sum(axis=0)
        floor = 1.0 if self.problem.objective is Objective.BALANCE else 0.0
        least_W = np.maximum(np.maximum(self._staying_DW.max(axis=0), floor), np.maximum(mean_W, hottest_W))
        return np.asarray(least_W)

    def _add_exchange(self) -> None:
        """Charge every phase by the fullest group of the slowest link, or count touched devices."""
        links = self._links()
        if not links:
            self.builder.offset += self._constant_exchange()
            return
        volumes = [self._volume(link) for link in links]
        if self.problem.objective is Objective.TRAFFIC:
            self._count_touched(volumes[0])
            return
        num_windows = self.problem.profile.num_windows
        for phase in ("dispatch", "combine"):
            curves = [_convex_pieces(getattr(link, phase)) for link in links]
            if all(pieces == [(0.0, 0.0)] for pieces in curves):
                continue
            fixed = [
                getattr(link, phase)(volume.fixed_GW.max(axis=0)) if volume.others else np.zeros(num_windows)
                for link, volume in zip(links, volumes, strict=True)
            ]
            time_W = self.builder.add_variables(
                num_windows, lower=np.max(fixed, axis=0), objective=1.0 / num_windows
            )
            for pieces, volume in zip(curves, volumes, strict=True):
                self._charge(time_W, pieces, volume)

    def _constant_exchange(self) -> float:
        """Time of exchanges that no placement changes, mean over windows."""
        breakdown = self.model.evaluate(self.items.placement(self.problem))
        return float((breakdown.dispatch_WL + breakdown.combine_WL).mean())

    def _charge(self, time_W: IntArray, pieces: list[tuple[float, float]], volume: _Volume) -> None:
        for slope, intercept in pieces:
            for g in range(volume.columns_GN.shape[0]):
                coefficient_WN = slope * volume.coefficient_GNW[g].T
                columns_WN = np.broadcast_to(volume.columns_GN[g], coefficient_WN.shape)
                constant_W = intercept + slope * volume.free_fixed_GW[g]
                self.builder.add_rows(
                    (columns_WN, coefficient_WN), (time_W[:, None], -1.0), upper=-constant_W
                )

    def _count_touched(self, volume: _Volume) -> None:
        """Minimise the mean number of devices that a token touches."""
        tokens = float(self.problem.profile.token_weight_T.sum())
        counted = self.builder.add_variables(volume.columns_GN.shape[0], objective=1.0 / tokens)
        for g, columns_N in enumerate(volume.columns_GN):
            self.builder.add_rows(
                (columns_N, volume.coefficient_GNW[g, :, 0]), (counted[[g]], -1.0), upper=0.0
            )
        self.builder.offset += float(volume.fixed_GW.sum()) / tokens

    def _volume(self, link: Link) -> _Volume:
        """Volume of the groups of a link between which items may move."""
        free_groups = np.unique(link.group_D[self.free_devices])
        if self.problem.semantics is Semantics.DISPATCH:
            return self._token_volume(link, free_groups)
        return self._pair_volume(link, free_groups)

    def _pair_volume(self, link: Link, free_groups: IntArray) -> _Volume:
        """Volume that adds up over items: pairs."""
        volume_GIW = _pair_volumes(self.problem, link)[:, self.items.expert_I] / self.replicas_I[:, None]
        fixed_GW = np.zeros((link.num_groups, volume_GIW.shape[2]))
        group_I = link.group_D[self.items.device_I[self.staying]]
        np.add.at(fixed_GW, group_I, volume_GIW[group_I, self.staying])
        columns, coefficients = [], []
        for group in free_groups:
            inside_F = link.group_D[self.free_devices] == group
            columns.append(np.where(inside_F, self.assign_IF, -1))
            one_IW = volume_GIW[group][self.free_items]
            coefficients.append(np.repeat(one_IW[:, None], inside_F.size, axis=1) * inside_F[None, :, None])
        columns_GN = np.maximum(np.stack(columns).reshape(free_groups.size, -1), 0)
        return _Volume(
            columns_GN=columns_GN,
            coefficient_GNW=np.stack(coefficients).reshape(*columns_GN.shape, -1),
            fixed_GW=_without(fixed_GW, free_groups),
            free_fixed_GW=fixed_GW[free_groups],
            others=free_groups.size < link.num_groups,
        )

    def _token_volume(self, link: Link, free_groups: IntArray) -> _Volume:
        """Volume that distinct tokens make, by patterns."""
        if (self.replicas_I > 1).any():
            raise InputError(NO_REPLICAS)
        patterns = token_patterns(self.problem, link, self.items, self.free_items, free_groups)
        counted = self.problem.objective is Objective.TRAFFIC
        if len(patterns.selects_PF) * free_groups.size > self.most_pattern_variables:
            raise InputError(
                f"{len(patterns.selects_PF)} patterns of tokens over {free_groups.size} devices are too many "
                "for an integer program; use lns or search"
            )
        touch_GP = self._touch_variables(link, free_groups, patterns)
        fixed_GW = patterns.fixed_GW
        return _Volume(
            columns_GN=touch_GP,
            coefficient_GNW=patterns.volume_PGW.transpose(1, 0, 2),
            fixed_GW=fixed_GW if counted else _without(fixed_GW, free_groups),
            free_fixed_GW=np.zeros_like(fixed_GW[free_groups]) if counted else fixed_GW[free_groups],
            others=free_groups.size < link.num_groups,
        )

    def _touch_variables(self, link: Link, free_groups: IntArray, patterns: Patterns) -> IntArray:
        """Variables that say whether a pattern's tokens touch a free group, ``[groups, patterns]``."""
        touch_GP = self.builder.add_variables((free_groups.size, len(patterns.selects_PF)), upper=1.0)
        pattern, item = np.nonzero(patterns.selects_PF)
        for g, group in enumerate(free_groups):
            inside_F = np.nonzero(link.group_D[self.free_devices] == group)[0]
            self.builder.add_rows(
                (self.assign_IF[item][:, inside_F], 1.0), (touch_GP[g, pattern][:, None], -1.0), upper=0.0
            )
        return touch_GP

    def _start(self, num_variables: int) -> FloatArray:
        """Return the layer as it is, with interchangeable devices in the order that the program asks for."""
        start_V = np.zeros(num_variables)
        column_D = np.full(self.problem.num_devices, -1, dtype=np.int64)
        column_D[self.free_devices] = np.arange(self.free_devices.size)
        column_I = column_D[self.items.device_I[self.free_items]]
        for members in self._interchangeable():
            first = [np.append(np.nonzero(column_I == column)[0], column_I.size)[0] for column in members]
            renamed = np.arange(self.free_devices.size)
            renamed[members[np.argsort(first, kind="stable")]] = members
            column_I = renamed[column_I]
        start_V[self.assign_IF[np.arange(column_I.size), column_I]] = 1.0
        return start_V


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Volume:
    """Volume of a link's free groups as linear expressions, and of the others as constants.

    Parameters
    ----------
    columns_GN, coefficient_GNW
        Variables and their volumes, ``[free groups, terms(, windows)]``.
    fixed_GW
        Volume of the groups that do not change, ``[all groups, windows]``; 0 for free ones. When touched
        devices are counted: what items that stay add to all groups.
    free_fixed_GW
        Constant part of the free groups' volumes, ``[free groups, windows]``.
    others
        Whether there are groups that are not free.
    """

    columns_GN: IntArray
    coefficient_GNW: FloatArray
    fixed_GW: FloatArray
    free_fixed_GW: FloatArray
    others: bool


def _without(volume_GW: FloatArray, groups: IntArray) -> FloatArray:
    rest = volume_GW.copy()
    rest[groups] = 0.0
    return rest


def _pair_volumes(problem: PlacementProblem, link: Link) -> FloatArray:
    """Volume that an expert's only copy adds to a group if it sits there, ``[groups, experts, windows]``."""
    profile = problem.profile
    if profile.home_T is None:
        return np.asarray(link.enter_HG[0][:, None, None] * profile.load_WLE[:, 0].T[None])
    home_load_WHE = home_loads(profile, 0, num_homes=link.enter_HG.shape[0])
    return np.asarray(np.einsum("whe,hg->gew", home_load_WHE, link.enter_HG))


def _convex_pieces(curve: PiecewiseLinear) -> list[tuple[float, float]]:
    """Slope and intercept of the lines whose maximum is the largest convex minorant of a rising curve."""
    hull = convex_minorant(curve)
    slopes = np.diff(hull.y) / np.diff(hull.x)
    return list(
        dict.fromkeys(zip(slopes.tolist(), (hull.y[:-1] - slopes * hull.x[:-1]).tolist(), strict=True))
    )
