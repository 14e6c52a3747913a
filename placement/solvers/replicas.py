"""Replica maps with equal slots per device: both directions, and the repair of duplicates on a device.

Shape letters: L MoE layers, E experts, R slots (device by device, none empty), X most replicas of one
expert, G devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.errors import InfeasibleError, InputError
from placement.solvers.packing import check_weight

__all__ = ["logical_to_physical", "scatter_slots", "without_duplicates"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def scatter_slots(p2l_LR: IntArray, rank_LR: IntArray, count_LE: IntArray) -> IntArray:
    """Turn expert and replica rank of each slot into the slots of each expert, padded with -1."""
    num_layers, num_replicas = p2l_LR.shape
    l2p_LEX = np.full((*count_LE.shape, int(count_LE.max())), -1, dtype=np.int64)
    l2p_LEX[np.arange(num_layers)[:, None], p2l_LR, rank_LR] = np.arange(num_replicas)
    return l2p_LEX


def logical_to_physical(physical_to_logical_LR: npt.ArrayLike, num_experts: int) -> tuple[IntArray, IntArray]:
    """Return the slots of each expert in slot order (padded with -1), and its number of replicas.

    Raises
    ------
    InputError
        If the map is not a table of experts 0 to `num_experts` - 1.
    """
    p2l_LR = _check_map(physical_to_logical_LR, num_experts)
    count_LE = _counts(p2l_LR, num_experts)
    order_LR = np.argsort(p2l_LR, axis=1, kind="stable")
    first_LE = np.cumsum(count_LE, axis=1) - count_LE
    sorted_LR = np.take_along_axis(p2l_LR, order_LR, axis=1)
    rank_LR = np.empty_like(p2l_LR)
    ranks = np.arange(p2l_LR.shape[1]) - np.take_along_axis(first_LE, sorted_LR, axis=1)
    np.put_along_axis(rank_LR, order_LR, ranks, axis=1)
    return scatter_slots(p2l_LR, rank_LR, count_LE), count_LE


def _check_map(physical_to_logical_LR: npt.ArrayLike, num_experts: int) -> IntArray:
    p2l = np.asarray(physical_to_logical_LR)
    if p2l.ndim != 2 or 0 in p2l.shape or p2l.dtype.kind not in "iu":
        raise InputError(
            f"physical_to_logical has shape {p2l.shape} of {p2l.dtype}, not [layers, slots] of ids"
        )
    if p2l.min() < 0 or p2l.max() >= num_experts:
        raise InputError(
            f"physical_to_logical names experts {p2l.min()}..{p2l.max()}, outside 0..{num_experts - 1}"
        )
    return p2l.astype(np.int64)


def _counts(p2l_LR: IntArray, num_experts: int) -> IntArray:
    count_LE = np.zeros((p2l_LR.shape[0], num_experts), dtype=np.int64)
    np.add.at(count_LE, (np.arange(p2l_LR.shape[0])[:, None], p2l_LR), 1)
    return count_LE


def without_duplicates(
    physical_to_logical_LR: npt.ArrayLike, num_gpus: int, weight_LE: npt.ArrayLike, *, num_nodes: int = 1
) -> IntArray:
    """Swap replicas between devices until none holds an expert twice.

    Each swap takes a surplus replica to a device without its expert, in exchange for an expert that is new
    to the first device. Of all such swaps the one with the least damage is made: within a node rather than
    across nodes (so that expert groups stay on their node where they can), then the lowest load of the
    fullest device, then the lowest sum of squared loads, then the lowest slots. A layer without duplicates
    is returned as it was.

    Parameters
    ----------
    physical_to_logical_LR
        Expert of each slot, ``[layers, slots]``, device by device.
    num_gpus, num_nodes
        Devices with equal slots, and nodes with equal devices.
    weight_LE
        Load of each expert, ``[layers, experts]``; its replicas share it evenly.

    Returns
    -------
    IntArray
        The repaired map: the same replicas in every layer, no expert twice on a device.

    Raises
    ------
    InputError
        If the shapes do not fit together.
    InfeasibleError
        If an expert has more replicas than there are devices.
    """
    weight = check_weight(weight_LE, name="weight").astype(np.float64)
    p2l_LR = _check_map(physical_to_logical_LR, weight.shape[1]).copy()
    if p2l_LR.shape[0] != weight.shape[0]:
        raise InputError(f"physical_to_logical has {p2l_LR.shape[0]} layers, weight {weight.shape[0]}")
    if num_gpus < 1 or num_nodes < 1 or num_gpus % num_nodes or p2l_LR.shape[1] % num_gpus:
        raise InputError(
            f"{p2l_LR.shape[1]} slots, {num_gpus} GPUs and {num_nodes} nodes do not divide evenly"
        )
    count_LE = _counts(p2l_LR, weight.shape[1])
    _check_enough_devices(count_LE, num_gpus)
    share_LE = weight / np.maximum(count_LE, 1)
    device_R = np.repeat(np.arange(num_gpus), p2l_LR.shape[1] // num_gpus)
    node_R = device_R // (num_gpus // num_nodes)
    for expert_R, share_E in zip(p2l_LR, share_LE, strict=True):
        _Layer(expert_R, share_E, device_R, node_R).repair()
    return p2l_LR


def _check_enough_devices(count_LE: IntArray, num_gpus: int) -> None:
    if count_LE.max() > num_gpus:
        layer, expert = (int(i[0]) for i in np.nonzero(count_LE > num_gpus))
        raise InfeasibleError(
            f"layer {layer} has {count_LE[layer, expert]} replicas of expert {expert} for {num_gpus} GPUs; "
            "without holding one twice there is room for one on each"
        )


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer under repair; `expert_R` is changed in place."""

    expert_R: IntArray
    share_E: FloatArray
    device_R: IntArray
    node_R: IntArray

    def repair(self) -> None:
        """Swap until no device holds an expert twice.

        A swap lessens the surplus by at least one, so this ends. There always is one: take the device g
        with a surplus that holds the fewest distinct experts. Some device h lacks the surplus expert (it
        has no more replicas than there are devices). Were all experts of h on g already, h would hold
        fewer distinct experts than g, thus a surplus itself, against the choice of g.
        """
        while (surplus := self._surplus()).size:
            leaving, entering = self._swaps(surplus)
            best = self._least_damage(leaving, entering)
            a, b = leaving[best], entering[best]
            self.expert_R[a], self.expert_R[b] = self.expert_R[b], self.expert_R[a]

    def _held_GE(self) -> npt.NDArray[np.bool_]:
        held = np.zeros((int(self.device_R[-1]) + 1, self.share_E.size), dtype=np.bool_)
        held[self.device_R, self.expert_R] = True
        return held

    def _surplus(self) -> IntArray:
        """Slots whose expert already has an earlier slot on the same device."""
        key_R = self.device_R * self.share_E.size + self.expert_R
        _, first = np.unique(key_R, return_index=True)
        return np.setdiff1d(np.arange(key_R.size), first)

    def _swaps(self, surplus: IntArray) -> tuple[IntArray, IntArray]:
        """Pairs of a surplus slot and a slot of another device where each expert is new to the other's."""
        held_GE = self._held_GE()
        new_here = ~held_GE[self.device_R[surplus]][:, self.expert_R]
        new_there = ~held_GE[self.device_R][:, self.expert_R[surplus]].T
        row, entering = np.nonzero(new_here & new_there)
        return surplus[row], entering

    def _least_damage(self, leaving: IntArray, entering: IntArray) -> int:
        share_R = self.share_E[self.expert_R]
        load_G = np.bincount(self.device_R, weights=share_R).astype(np.float64)
        shift = share_R[entering] - share_R[leaving]
        here, there = self.device_R[leaving], self.device_R[entering]
        after_here, after_there = load_G[here] + shift, load_G[there] - shift
        fullest = np.maximum(np.maximum(after_here, after_there), _fullest_other(load_G, here, there))
        squares = after_here**2 + after_there**2 - load_G[here] ** 2 - load_G[there] ** 2
        across = self.node_R[leaving] != self.node_R[entering]
        return int(np.lexsort((entering, leaving, squares, fullest, across))[0])


def _fullest_other(load_G: FloatArray, a: IntArray, b: IntArray) -> FloatArray:
    """Load of the fullest device besides two, for many pairs; 0 where no other is left.

    It is one of the three fullest.
    """
    fullest = np.zeros(a.shape, dtype=np.float64)
    for device in np.argsort(load_G, kind="stable")[-3:]:  # ascending: the last that fits is the fullest
        fullest = np.where((a != device) & (b != device), load_G[device], fullest)
    return fullest
