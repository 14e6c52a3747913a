"""Gives devices other names to save moves: what a solver found, with alike devices exchanged.

Devices of one kind, with as many slots and the same place in every tier, are interchangeable, and so are
whole nodes. Of all ways to exchange them, the one that keeps most expert copies where they are is a nested
linear assignment: devices within nodes, nodes within racks, and so on. Where layers are coupled one exchange
must serve all layers; elsewhere every layer has its own.

Shape letters: L layers, E experts, D devices, S slots, G groups.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.cost import CostModel
from placement.plan import EMPTY, Placement, diff
from placement.problem import Objective, PlacementProblem, Semantics

__all__ = ["are_layers_coupled", "fewest_moves", "items_on_slots", "layer_on_slots"]

IntArray = npt.NDArray[np.int64]

SAME = 1e-12
"""Relative difference of two sums of the same numbers in another order."""


def are_layers_coupled(problem: PlacementProblem) -> bool:
    """Return whether what a layer costs depends on where the layers beside it are."""
    return problem.semantics is Semantics.STAY_PUT and problem.objective is not Objective.BALANCE


def items_on_slots(problem: PlacementProblem, placement: Placement, layer: int) -> tuple[IntArray, IntArray]:
    """Return expert and device of each item of a layer, laid out on the problem's slots."""
    slots = problem.device_of_slot_S
    expert_I = np.full(slots.size, EMPTY, dtype=np.int64)
    for device in range(problem.num_devices):
        held = placement.physical_to_logical_map_LS[layer, placement.device_of_slot_S == device]
        held = held[held != EMPTY]
        expert_I[np.nonzero(slots == device)[0][: held.size]] = held
    return expert_I, np.array(slots)


def layer_on_slots(
    expert_I: IntArray, device_I: IntArray, device_of_slot_S: IntArray, start: Placement, layer: int
) -> IntArray:
    """Lay a layer's items out on slots so that an expert that stays on its device stays in its slot.

    Parameters
    ----------
    expert_I, device_I
        Expert and device of each item; empty items are left out.
    device_of_slot_S
        Slots to lay out on.
    start
        Placement whose slots are kept where it has the same ones.
    """
    row_S = np.full(device_of_slot_S.size, EMPTY, dtype=np.int64)
    keeps = np.array_equal(start.device_of_slot_S, device_of_slot_S)
    for device in np.unique(device_I):
        slots = np.nonzero(device_of_slot_S == device)[0]
        experts = np.sort(expert_I[(device_I == device) & (expert_I != EMPTY)])
        if keeps:
            before = start.physical_to_logical_map_LS[layer, slots]
            stays = np.isin(before, experts)
            row_S[slots[stays]] = before[stays]
            experts = np.setdiff1d(experts, before[stays])
            slots = slots[~stays]
        row_S[slots[: experts.size]] = experts
    return row_S


def fewest_moves(problem: PlacementProblem, start: Placement, placement: Placement) -> Placement:
    """Exchange alike devices of a placement so that few moves lead to it from the start.

    The objective stays what it was (or becomes lower, where replicas make device numbers count), and so
    do the moves.

    Raises
    ------
    InputError
        If a placement does not belong to the problem.
    """
    problem.check_placement(start)
    problem.check_placement(placement)
    before = len(diff(start, placement))
    device_LD = _assignments(problem, start, placement)
    candidate = _relabelled(problem, start, placement, device_LD)
    model = CostModel(problem)
    chosen = _acceptable(model, start, placement, candidate, device_LD)
    return chosen if len(diff(start, chosen)) < before else _on_slots_of(problem, start, placement)


def _acceptable(
    model: CostModel, start: Placement, placement: Placement, candidate: Placement, device_LD: IntArray
) -> Placement:
    """Return the candidate, or it in the layers where it costs no more, or the placement as it is."""
    problem = model.problem
    given, found = model.evaluate(placement), model.evaluate(candidate)
    if found.objective <= given.objective * (1 + SAME):
        return candidate
    if are_layers_coupled(problem) or problem.objective is Objective.TRAFFIC:
        return placement
    by_layer = [
        b.balance_WL.mean(axis=0)
        if problem.objective is Objective.BALANCE
        else (b.experts_WL + b.dispatch_WL + b.combine_WL).mean(axis=0)
        for b in (given, found)
    ]
    worse_L = by_layer[1] > by_layer[0] * (1 + SAME)
    device_LD = np.where(worse_L[:, None], np.arange(problem.num_devices), device_LD)
    mixed = _relabelled(problem, start, placement, device_LD)
    return mixed if model.objective(mixed) <= given.objective * (1 + SAME) else placement


def _assignments(problem: PlacementProblem, start: Placement, placement: Placement) -> IntArray:
    """New device of each device, ``[layers, devices]``."""
    # Copies that stay if the contents of device d go to device c, [layers, d, c].
    kept_LDD = np.matmul(
        placement.count_LED.transpose(0, 2, 1).astype(np.float64), start.count_LED.astype(np.float64)
    )
    tree = _tree(problem)
    if are_layers_coupled(problem):
        joint_D = _permutation(tree, kept_LDD.sum(axis=0))
        return np.tile(joint_D, (problem.num_layers, 1))
    return np.stack([_permutation(tree, kept_DD) for kept_DD in kept_LDD])


@dataclass(frozen=True, slots=True)
class _Group:
    """A device, or a group of a tier, with what makes it exchangeable for another one."""

    signature: Hashable
    device: int
    members: tuple[_Group, ...] = ()


def _tree(problem: PlacementProblem) -> _Group:
    """Nest the devices in the groups of the tiers that the objective knows."""
    topology = problem.topology
    slots_D = problem.slots_D
    # Linear costs and balance know no tiers, and balance no kinds either.
    flat = problem.calibration.flat or problem.objective is not Objective.STEP_TIME
    level = []
    for device in range(problem.num_devices):
        speeds = () if flat else tuple(float(tier.bandwidth_D[device]) for tier in topology.tiers)
        signature = (int(topology.kind_of_device_D[device]), int(slots_D[device]), speeds)
        level.append(_Group(signature, device))
    if flat:
        return _joined(level)
    for tier in topology.tiers:
        groups: dict[int, list[_Group]] = {}
        for group in level:
            groups.setdefault(int(tier.group_D[group.device]), []).append(group)
        level = [_joined(members) for members in groups.values()]
    return level[0]


def _joined(members: list[_Group]) -> _Group:
    signature = tuple(sorted(repr(member.signature) for member in members))
    return _Group(signature, members[0].device, tuple(members))


def _permutation(tree: _Group, kept_DD: npt.NDArray[np.float64]) -> IntArray:
    """Device that takes each device's contents, ``[devices]``."""
    device_D = np.arange(kept_DD.shape[0], dtype=np.int64)
    for source, target in _match(tree, tree, kept_DD)[1]:
        device_D[source] = target
    return device_D


def _match(
    source: _Group, target: _Group, kept_DD: npt.NDArray[np.float64]
) -> tuple[float, list[tuple[int, int]]]:
    """Return the most copies that stay when one group's contents go to another, and device by device how."""
    from scipy.optimize import linear_sum_assignment

    if not source.members:
        return float(kept_DD[source.device, target.device]), [(source.device, target.device)]
    pairs: dict[tuple[int, int], list[tuple[int, int]]] = {}
    alike_GG = np.array([[a.signature == b.signature for b in target.members] for a in source.members])
    kept_GG = np.full(alike_GG.shape, -1.0 - float(kept_DD.sum()))
    if any(member.members for member in source.members):
        for a, b in zip(*(index.tolist() for index in np.nonzero(alike_GG)), strict=True):
            kept_GG[a, b], pairs[a, b] = _match(source.members[a], target.members[b], kept_DD)
    else:
        here, there = ([member.device for member in group.members] for group in (source, target))
        kept_GG = np.where(alike_GG, kept_DD[np.ix_(here, there)], kept_GG)
    rows, columns = linear_sum_assignment(kept_GG, maximize=True)
    chosen: list[tuple[int, int]] = []
    for a, b in zip(rows.tolist(), columns.tolist(), strict=True):
        chosen += pairs.get((a, b), [(source.members[a].device, target.members[b].device)])
    return float(kept_GG[rows, columns].sum()), chosen


def _relabelled(
    problem: PlacementProblem, start: Placement, placement: Placement, device_LD: IntArray
) -> Placement:
    """Return a placement whose devices' contents went to others, on the problem's slots."""
    rows = [
        layer_on_slots(row_S, device_D[placement.device_of_slot_S], problem.device_of_slot_S, start, layer)
        for layer, (row_S, device_D) in enumerate(
            zip(placement.physical_to_logical_map_LS, device_LD, strict=True)
        )
    ]
    return Placement(
        physical_to_logical_map_LS=np.stack(rows),
        device_of_slot_S=problem.device_of_slot_S,
        num_experts=problem.num_experts,
        num_devices=problem.num_devices,
        model_name=placement.model_name,
        moe_layer_ids=placement.moe_layer_ids,
        extra=placement.extra,
    )


def _on_slots_of(problem: PlacementProblem, start: Placement, placement: Placement) -> Placement:
    """Return a placement with its experts in the slots where they were, which may matter to nobody's cost."""
    same = np.tile(np.arange(problem.num_devices), (problem.num_layers, 1))
    if placement is start or not np.array_equal(placement.device_of_slot_S, problem.device_of_slot_S):
        return placement
    return _relabelled(problem, start, placement, same)
