"""Bounds on the fullest device's load, window by window and in the mean over windows.

In each window a device carries at least the mean; the hottest expert's device at least that expert (split
over as many replicas as spare slots allow) and, with all slots filled, the coldest experts beside it; of the
``j * D + 1`` hottest experts some device holds ``j + 1``. Over all windows, the spare slots can be given to
hot experts only once.

Shape letters: W windows, E experts, D devices, K device kinds, R numbers of replicas from 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.bounds.curves import convex_minorant
from placement.bounds.terms import soft_maximum
from placement.cost import CostModel
from placement.problem import Objective, PlacementProblem, ReplicaSplit

__all__ = ["LayerLoads", "layer_loads", "least_mean_load", "max_replicas"]

FloatArray = npt.NDArray[np.float64]

ROUNDING = 1e-12
"""What sums of loads are stepped back by."""

REPLICA_STEPS = 40
"""Steps of the ascent over who gets the spare slots."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerLoads:
    """What the experts of one layer cost in each window, whatever the placement.

    Parameters
    ----------
    total_WE
        Least that all replicas of an expert cost together, ``[windows, experts]``.
    split_RWE
        Least that the dearest replica of an expert costs with 1, 2, ... replicas, ``[R, windows, experts]``.
    floor_W
        Bound on the fullest device, ``[windows]``.
    """

    total_WE: FloatArray
    split_RWE: FloatArray
    floor_W: FloatArray


def max_replicas(problem: PlacementProblem) -> int:
    """Return the most replicas that an expert can have."""
    return int(min(problem.num_devices, 1 + problem.num_slots - problem.num_experts))


def layer_loads(model: CostModel, layer: int) -> LayerLoads:
    """Return what the experts of a layer cost: shares of the mean for balance, else their time."""
    problem = model.problem
    load_WE = problem.profile.load_WLE[:, layer]
    num_replicas = max_replicas(problem)
    replicas_R = np.arange(1, num_replicas + 1)[:, None, None]
    if problem.objective is Objective.BALANCE:
        mean_W = load_WE.sum(axis=1, keepdims=True) / problem.num_devices
        total_WE = np.divide(load_WE, mean_W, out=np.zeros_like(load_WE), where=mean_W > 0)
        split_RWE = total_WE / replicas_R
        # A window without tokens counts as balanced.
        floor_W = np.ones(len(load_WE))
    else:
        split_KRWE = np.stack([curve(load_WE / replicas_R) for curve in model.expert_curves])
        split_RWE = split_KRWE.min(axis=0)
        total_WE = _least_totals(model, load_WE, split_KRWE)
        floor_W = np.zeros(len(load_WE))
    floor_W = np.maximum(floor_W, total_WE.sum(axis=1) / problem.num_devices)
    floor_W = np.maximum(floor_W, split_RWE[-1].max(axis=1))
    if problem.num_slots == problem.num_experts:
        floor_W = np.maximum(floor_W, _cardinality_bounds(total_WE, problem.slots_D))
    return LayerLoads(total_WE=total_WE, split_RWE=split_RWE, floor_W=floor_W)


def _least_totals(model: CostModel, load_WE: FloatArray, split_KRWE: FloatArray) -> FloatArray:
    """Return the least cost of all replicas of each expert together."""
    num_replicas = split_KRWE.shape[1]
    replicas_R = np.arange(1, num_replicas + 1)[:, None, None]
    if num_replicas == 1 or model.problem.replica_split is ReplicaSplit.EVEN:
        return np.asarray((split_KRWE * replicas_R).min(axis=(0, 1)))
    # Uneven shares cost at least what even shares cost on a convex curve below.
    minorants = [convex_minorant(curve) for curve in model.expert_curves]
    costs = [num_replicas * curve(load_WE / num_replicas) for curve in minorants]
    return np.asarray(np.min(costs, axis=0))


def _cardinality_bounds(cost_WE: FloatArray, slots_D: npt.NDArray[np.int64]) -> FloatArray:
    """Bound the fullest device by counting, where every slot holds exactly one expert."""
    sorted_WE = -np.sort(-cost_WE, axis=1)
    num_experts, num_devices = cost_WE.shape[1], slots_D.size
    bound_W = np.zeros(len(cost_WE))
    # The hottest expert shares its device with at least the coldest of the rest.
    beside = int(slots_D.min()) - 1
    if beside > 0:
        bound_W = sorted_WE[:, 0] + sorted_WE[:, num_experts - beside :].sum(axis=1)
    prefix_WE = np.concatenate([np.zeros((len(cost_WE), 1)), np.cumsum(sorted_WE, axis=1)], axis=1)
    for j in range(1, (num_experts - 1) // num_devices + 1):
        last = j * num_devices + 1
        bound_W = np.maximum(bound_W, prefix_WE[:, last] - prefix_WE[:, last - j - 1])
    return bound_W


def least_mean_load(loads: LayerLoads, *, spare_slots: int) -> float:
    """Bound the mean over windows of the fullest device where spare slots hold replicas.

    Some device carries a whole share of each expert. Naming in every window, in a mixture, the expert whose
    share counts leaves a sum over experts that falls with their replicas; the best use of the spare slots
    for it is found exactly, and bounds the mean for every mixture. Mixtures are improved by playing against
    the average of the best uses so far.
    """
    num_replicas, num_windows, _ = loads.split_RWE.shape
    best = float(loads.floor_W.mean())
    if num_replicas == 1 or spare_slots == 0:
        return best
    # A named expert leaves the floor standing, however many replicas it has.
    named_RWE = np.maximum(loads.split_RWE, loads.floor_W[:, None])
    above_R = (named_RWE > loads.floor_W[:, None]).any(axis=(1, 2))
    # Shares fall with replicas: past the first number that brings all to the floor nothing changes.
    num_replicas = min(num_replicas, int(above_R.sum()) + 1)
    named_RWE = named_RWE[:num_replicas]
    if num_replicas == 1:
        return best
    share_RE = np.zeros((num_replicas, loads.split_RWE.shape[2]))
    share_RE[0] = 1.0
    for step in range(REPLICA_STEPS):
        seen_WE = np.einsum("rwe,re->we", named_RWE, share_RE)
        part_EW = soft_maximum(seen_WE.T) / num_windows
        cost_RE = np.einsum("ew,rwe->re", part_EW, named_RWE)
        used_E = _best_replicas(cost_RE, spare_slots)
        least = np.take_along_axis(_convex_rows(cost_RE), used_E[None], axis=0).sum()
        best = max(best, float(least) * (1.0 - ROUNDING))
        answer_RE = np.arange(num_replicas)[:, None] == used_E
        share_RE += 2.0 / (step + 3) * (answer_RE - share_RE)
    return best


def _best_replicas(cost_RE: FloatArray, spare_slots: int) -> npt.NDArray[np.int64]:
    """Return each expert's replicas less one: the spare slots go to the steepest falls of cost."""
    fall_RE = -np.diff(_convex_rows(cost_RE), axis=0)
    flat = fall_RE.ravel()
    taken = np.zeros(flat.size, dtype=bool)
    taken[np.argsort(-flat, kind="stable")[:spare_slots]] = True
    taken &= flat > 0
    return np.asarray(taken.reshape(fall_RE.shape).sum(axis=0))


def _convex_rows(cost_RE: FloatArray) -> FloatArray:
    """Return the largest convex sequences along the first axis below the given ones, or less.

    Falls are made non-increasing from the last to the first by raising the earlier ones: a sequence that
    starts as given then ends lower, never higher.
    """
    fall_RE = np.maximum(-np.diff(cost_RE, axis=0), 0.0)
    fall_RE = np.maximum.accumulate(fall_RE[::-1], axis=0)[::-1]
    fallen_RE = np.concatenate([np.zeros((1, cost_RE.shape[1])), np.cumsum(fall_RE, axis=0)])
    return np.asarray(cost_RE[0] - fallen_RE)
